"""Between problems and token ids: the prompt a policy wants to see, and what its tokens say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from plumbline.errors import InputError
from plumbline.models.load import load_tokenizer, policy_folder
from plumbline.rl.sections import PromptSection

PROMPT_FILE = "prompt.json"
# transformers' and vLLM's name for it.
GENERATION_FILE = "generation_config.json"
# What most maths checkpoints were trained to be asked.
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."


class PromptStyle(BaseModel):
    """How a policy is asked. Saved beside its weights as prompt.json, so that evaluation asks as training did.

    Attributes:
        template: `chat` (the tokenizer's chat template) or `plain`; None: chat if the tokenizer has a template.
        system: the system message, if any.
        instruction: put after the problem, on its own paragraph, unless empty.
    """

    model_config = ConfigDict(extra="forbid")

    template: Literal["chat", "plain"] | None = None
    system: str | None = None
    instruction: str = BOXED

    @classmethod
    def read(cls, folder: Path, overrides: PromptSection | None = None) -> PromptStyle:
        """The style in folder/prompt.json, or the defaults, with what the config sets put on top."""
        path = folder / PROMPT_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            style = cls.model_validate(values)
        except (OSError, ValueError, ValidationError) as error:
            raise InputError(f"{path} is not a prompt style: {' '.join(str(error).split())}") from None
        if overrides is not None:
            chosen = overrides.model_dump(include={"template", "system", "instruction"}, exclude_none=True)
            style = style.model_copy(update=chosen)
        return style

    def text(self, problem: str) -> str:
        """The problem as the user puts it."""
        return f"{problem}\n\n{self.instruction}" if self.instruction else problem

    def messages(self, problem: str) -> list[dict[str, str]]:
        """The same as a chat."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return [*head, {"role": "user", "content": self.text(problem)}]


def stored_end_ids(folder: Path) -> set[int]:
    """Tokens that end a completion by a policy folder's own files: chat models often have two, and their tokenizer
    knows one."""
    found: set[int] = set()
    for name in (GENERATION_FILE, "config.json"):
        path = folder / name
        try:
            ids = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.exists() else None
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
        found.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    return found


class Codec:
    """A policy's tokenizer, prompt style and end tokens: the tokenizer's, and those that the folder's files name.

    Args:
        path: policy path, as for load_tokenizer.
        style: None reads the folder's own.
        overrides: the config's prompt section.
    """

    def __init__(self, path: str, *, style: PromptStyle | None = None, overrides: PromptSection | None = None) -> None:
        self.tokenizer: Any = load_tokenizer(path)
        self.style = style or PromptStyle.read(policy_folder(path), overrides)
        template = self.style.template or ("chat" if self.tokenizer.chat_template else "plain")
        if template == "chat" and not self.tokenizer.chat_template:
            raise InputError(f"prompt.template is chat, but the tokenizer of {path} has no chat template; use plain")
        self.chat = template == "chat"
        if self.tokenizer.eos_token_id is None:
            raise InputError(f"the tokenizer of {path} has no end-of-sequence token; a completion could never end")
        self.end_ids = frozenset([self.tokenizer.eos_token_id, *stored_end_ids(policy_folder(path))])

    def encode(self, problem: str) -> list[int]:
        """Token ids of the whole prompt."""
        if not self.chat:
            return list(self.tokenizer(self.style.text(problem))["input_ids"])
        messages = self.style.messages(problem)
        rendered = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """Tokenizer, prompt style and end tokens into a policy folder."""
        self.tokenizer.save_pretrained(folder)
        if len(self.end_ids) > 1:
            text = json.dumps({"eos_token_id": sorted(self.end_ids)}, indent=2)
            (folder / GENERATION_FILE).write_text(text + "\n", encoding="utf-8")
        (folder / PROMPT_FILE).write_text(self.style.model_dump_json(indent=2) + "\n", encoding="utf-8")
