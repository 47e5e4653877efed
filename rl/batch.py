"""What passes between the roles of a training step: plain, picklable records."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Attributes:
        max_new_tokens: a completion that reaches it without an end token is `truncated`.
        temperature: 0 is greedy; log-probabilities are then those at temperature 1.
        top_p: nucleus mass; 1 turns it off. Evaluation only.
        seed: with a request's key and the token position it decides every draw, whatever else is in the batch.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Prompt:
    """One problem to be answered `completions` times.

    Attributes:
        index: position in the step's batch; groups come back in any order and are sorted by it.
        sample_id: the problem's id.
        token_ids: the encoded prompt.
        text: the problem as the data set has it.
        gold: the answer to grade against.
        epoch: pass over the training set.
        key: makes this prompt's random draws its own; the step for training, the problem's row for evaluation.
        first_rollout: completions of this group that were drawn before and elsewhere; numbering goes on from there.
    """

    index: int
    sample_id: str
    token_ids: list[int]
    text: str
    gold: str
    epoch: int = 0
    key: int = 0
    first_rollout: int = 0


@dataclass
class Completion:
    """One sampled answer.

    Attributes:
        token_ids: without the prompt; the end token, if one came, is the last.
        logprobs: of each token at sampling time, in nats.
        text: decoded, special tokens left out.
        truncated: no end token within max_new_tokens.
        versions: [index of a token, version of the policy that drew it and those after it], in order; more than one when
            new weights came while it was under way.
    """

    token_ids: list[int]
    logprobs: list[float]
    text: str
    truncated: bool
    versions: list[list[int]] = field(default_factory=list)


@dataclass
class Group:
    """All completions of one prompt, then their verdicts and rewards (parallel lists).

    `policy_version` is that of the oldest token.
    """

    prompt: Prompt
    completions: list[Completion]
    policy_version: int
    correct: list[bool] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    answers: list[str | None] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)


@dataclass
class TrainingBatch:
    """What the learner sees: one entry a completion, grouped by prompt (a group's completions are neighbours).

    Attributes:
        prompt_ids, completion_ids: token ids.
        logprobs: sampling log-probabilities of the completion's tokens.
        rewards: one a completion.
        group_size: completions a prompt.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    logprobs: list[list[float]]
    rewards: list[float]
    group_size: int

    def __len__(self) -> int:
        return len(self.completion_ids)
