"""Answers from any server that speaks OpenAI's chat-completions protocol, graded here."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

from plumbline.errors import InputError
from plumbline.rewards.workers import Grader
from plumbline.rl.batch import Group, Prompt, Sampling
from plumbline.rl.evaluation.run import ServedCompletion
from plumbline.rl.grading import binary, grade_group
from plumbline.rl.rollout.sampler import sequence_key
from plumbline.rl.text import PromptStyle

# Worth asking again: too many requests, and faults of the server or of what stands before it.
RETRIED = (408, 409, 429, 500, 502, 503, 504)


class EndpointError(RuntimeError):
    """The server did not answer a request after all retries, or answered what is no completion."""


class Messages:
    """The prompt as a chat server gets it. Its `encode` gives the messages as UTF-8 bytes of JSON, which is what the
    manifest's fingerprint covers; the server makes tokens of them with a template of its own.

    Args:
        system: the system message, if any.
        instruction: put after the problem, on its own paragraph, unless empty.
    """

    def __init__(self, system: str | None, instruction: str) -> None:
        self.style = PromptStyle(system=system, instruction=instruction)

    def encode(self, problem: str) -> list[int]:
        return list(json.dumps(self.style.messages(problem), ensure_ascii=False).encode())


class Endpoint:
    """A served model.

    Each completion is a request of its own with its own seed, so a server that honours seeds repeats it. The key of
    the environment variable OPENAI_API_KEY, if set, is sent as bearer token and never written anywhere.

    Args:
        url: base URL, up to and including `/v1`.
        model: the served name; None takes the only one.
        messages: builds the prompt.
        grader: grades the answers.
        concurrency: requests under way at once.
        timeout_seconds: of one request.
        retries: of one request, with doubling pauses, for connection faults and statuses in RETRIED.
        pause_seconds: before the first retry.
    """

    def __init__(
        self,
        url: str,
        model: str | None,
        messages: Messages,
        grader: Grader,
        *,
        concurrency: int = 64,
        timeout_seconds: float = 1800.0,
        retries: int = 6,
        pause_seconds: float = 1.0,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise InputError(f"--url {url!r} must start with http:// or https:// and end with the server's /v1")
        self.url = url.rstrip("/")
        self.messages = messages
        self.grader = grader
        self.concurrency = concurrency
        self.timeout = timeout_seconds
        self.retries = retries
        self.pause = pause_seconds
        self.model = self._served(model)

    def graded_groups(self, prompts: list[Prompt], completions: int, sampling: Sampling) -> Iterator[Group]:
        """Groups as their last completion arrives, graded. Raises EndpointError when a request finally fails."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            sent: dict[Future[ServedCompletion], tuple[Prompt, int]] = {
                pool.submit(self.complete, prompt, number, sampling): (prompt, number)
                for prompt in prompts
                for number in range(completions)
            }
            got: dict[int, dict[int, ServedCompletion]] = {prompt.index: {} for prompt in prompts}
            try:
                for future in as_completed(sent):
                    prompt, number = sent[future]
                    answers = got[prompt.index]
                    answers[number] = future.result()
                    if len(answers) == completions:
                        group = Group(prompt, [answers[i] for i in range(completions)], policy_version=0)
                        yield grade_group(group, self.grader, binary)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def complete(self, prompt: Prompt, number: int, sampling: Sampling) -> ServedCompletion:
        """One completion of one prompt."""
        answer = self._request(
            "/chat/completions",
            {
                "model": self.model,
                "messages": self.messages.style.messages(prompt.text),
                "max_tokens": sampling.max_new_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                # Servers take 32-bit seeds.
                "seed": sequence_key(sampling.seed, prompt, number) & 0x7FFFFFFF,
            },
        )
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"] or ""
            tokens = (answer.get("usage") or {}).get("completion_tokens")
            return ServedCompletion(text, choice.get("finish_reason") == "length", tokens)
        except (KeyError, IndexError, TypeError):
            raise EndpointError(f"{self.url} answered no chat completion: {json.dumps(answer)[:200]}") from None

    def _served(self, wanted: str | None) -> str:
        try:
            names = [entry["id"] for entry in self._request("/models", None)["data"]]
        except EndpointError as error:
            raise InputError(f"no server to evaluate: {error}") from None
        except (KeyError, TypeError):
            raise InputError(f"{self.url}/models lists no models; is {self.url} the server's /v1?") from None
        if wanted is None and len(names) == 1:
            return str(names[0])
        if wanted is None or wanted not in names:
            raise InputError(f"{self.url} serves {', '.join(names) or 'nothing'}; name one of them as MODEL")
        return wanted

    def _request(self, path: str, body: dict[str, Any] | None) -> Any:
        headers = {"Content-Type": "application/json"}
        key = os.environ.get("OPENAI_API_KEY")
        if key:
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        # A model list is asked for at the start, where waiting long for a server that is not there helps nobody.
        tries = self.retries if body is not None else 0
        for attempt in range(tries + 1):
            request = urllib.request.Request(self.url + path, data=data, headers=headers)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                detail = f"HTTP {error.code}: {error.read(300).decode(errors='replace')}"
                again = error.code in RETRIED
            except (OSError, ValueError) as error:  # no connection, cut off, timed out, or no JSON
                detail, again = str(getattr(error, "reason", error)), True
            if not again or attempt == tries:
                break
            time.sleep(self.pause * 2**attempt)
        raise EndpointError(f"{self.url}{path} failed after {attempt + 1} tries: {' '.join(detail.split())}")
