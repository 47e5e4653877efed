"""Builds the embedded policy: a tokenizer, a cold start on worked solutions, a short stage on mixed demonstrations.

The first stage gives ability: next-token training on worked solutions of procedural problems. The second leaves the
policy undecided between working and guessing, as a model trained on text from many hands is: a share of demonstrations
is worked, the rest a bare boxed guess that is often wrong. Reinforcement learning then has something to choose.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from plumbline.models.config import PolicyConfig
from plumbline.models.policy import Policy
from plumbline.rl.batch import Prompt, Sampling
from plumbline.rl.procedural import LEVELS, ProceduralProblem, generate, stream
from plumbline.rl.stats import Interval, mean_interval

END = "<|end|>"
PAD = "<|pad|>"
# Symbols take the spaces around them along, a word the space before it; digits stand alone.
PIECES = r"\\[A-Za-z]+\{?|\d| ?[A-Za-z]+| ?[^\sA-Za-z\d\\]+ ?|\\|\s+"
CHAT = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}" + END + "{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result.

    Attributes:
        problems: worked solutions of the first stage, in equal shares of families and levels.
        batch: sequences an optimizer step.
        learning_rate: peak of the first stage (warm-up, then cosine to zero).
        mixed_problems: of the second stage.
        mixed_learning_rate: peak of the second stage.
        worked_share: demonstrations of the second stage that show their work.
        guess_accuracy: share of bare guesses that are right.
        vocab: largest vocabulary; the others are the policy's shape, as in PolicyConfig.
        card_problems: held-out problems that the card's accuracies are measured on.
        families: of problems, see rl/procedural; those a policy of this size learns in minutes.
    """

    problems: int = 240_000
    batch: int = 128
    learning_rate: float = 2e-3
    mixed_problems: int = 12_800
    mixed_learning_rate: float = 3e-4
    worked_share: float = 0.45
    guess_accuracy: float = 0.5
    vocab: int = 400
    hidden: int = 192
    intermediate: int = 512
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    card_problems: int = 2_000
    families: tuple[str, ...] = (
        "addition",
        "subtraction",
        "multiplication",
        "fractions",
        "linear_equations",
        "sequences",
        "remainders",
        "gcd",
    )


NSA = {"block": 8, "stride": 4, "select_block": 8, "count": 4, "initial": 1, "local": 2, "window": 32}


def build(out: Path, seed: int = 0, recipe: Recipe | None = None) -> None:
    """Train the policy and write its folder: weights, config, tokenizer, prompt style, and a card of measured accuracy.

    The same seed on the same kind of machine gives the same weights. The first stage takes most of the time; its end is
    kept in out/worked.pt until the folder is whole, and a build that was stopped goes on from there.
    """
    recipe = recipe or Recipe()
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    # Cold start and mixed stage draw other problems than any run's training set: their own seeds.
    worked = list(stream("train", recipe.problems, seed + 1_000_003, recipe.families))
    tokenizer = train_tokenizer(worked[:20_000], recipe.vocab)
    policy = Policy(policy_config(tokenizer, recipe))
    kept = out / "worked.pt"
    spent = first_stage(policy, tokenizer, worked, recipe, seed, kept)
    mixed = stream("train", recipe.mixed_problems, seed + 2_000_003, recipe.families)
    demonstrations = list(mixed_demonstrations(mixed, recipe, seed))
    fit(policy, tokenizer, demonstrations, recipe.mixed_learning_rate, recipe.batch, seed, "mixed demonstrations")
    save(policy, tokenizer, out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    made = f"in {(time.monotonic() - began + spent) / 60:.0f} minutes on {where}, torch {torch.__version__}"
    count = recipe.card_problems
    sampled, greedy = (
        measure(out, temperature=heat, problems=count, families=recipe.families, device=device) for heat in (1.0, 0.0)
    )
    parameters = sum(parameter.numel() for parameter in policy.parameters())
    card = model_card(sampled, greedy, recipe, seed=seed, parameters=parameters, made=made)
    (out / "README.md").write_text(card, encoding="utf-8")
    kept.unlink()


def first_stage(
    policy: Policy,
    tokenizer: PreTrainedTokenizerFast,
    worked: list[ProceduralProblem],
    recipe: Recipe,
    seed: int,
    kept: Path,
) -> float:
    """Fit `policy` to worked solutions, or take its weights from an earlier, stopped build of the same recipe and seed.

    Returns the seconds that the earlier build had spent, 0 without one.
    """
    # The second stage and the card do not reach back into the first.
    later = {"mixed_problems", "mixed_learning_rate", "worked_share", "guess_accuracy", "card_problems"}
    key = repr((seed, torch.__version__, {k: v for k, v in asdict(recipe).items() if k not in later}))
    if kept.is_file():
        state = torch.load(kept, weights_only=True)
        if state["key"] == key:
            print(f"cold start: {kept} holds the end of the first stage", flush=True)
            policy.load_state_dict(state["weights"])
            return float(state["seconds"])
    began = time.monotonic()
    pairs = [(problem.problem, problem.solution) for problem in worked]
    fit(policy, tokenizer, pairs, recipe.learning_rate, recipe.batch, seed, "worked solutions")
    state = {"key": key, "seconds": time.monotonic() - began, "weights": policy.state_dict()}
    partial = kept.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, kept)
    return 0.0


@dataclass(frozen=True)
class Ability:
    """What a policy folder can do on held-out procedural problems, one completion each.

    Attributes:
        overall: accuracy.
        by_level: level -> accuracy.
        worked: share of completions that show work, and do not open with the box.
        when_worked, when_guessed: accuracy of the two kinds; None if there are none.
        tokens: mean completion length.
    """

    overall: Interval
    by_level: dict[int, Interval]
    worked: Interval
    when_worked: Interval | None
    when_guessed: Interval | None
    tokens: float


def measure(
    folder: Path,
    *,
    temperature: float,
    problems: int,
    families: Sequence[str] | None = None,
    seed: int = 1,
    device: str = "cpu",
) -> Ability:
    """Answer `problems` held-out problems (of some families; None is all) once each and grade them."""
    from plumbline.rewards.workers import Grader
    from plumbline.rl.rollout.native import NativeEngine
    from plumbline.rl.text import Codec

    codec = Codec(str(folder))
    engine = NativeEngine(str(folder), attention=None, codec=codec, slots=512, device=device)
    held_out = generate("heldout", problems, seed, families=list(families) if families else None)
    prompts = [
        Prompt(row, p.id, codec.encode(p.problem), p.problem, p.answer, key=row) for row, p in enumerate(held_out)
    ]
    groups = sorted(engine.generate(prompts, 1, Sampling(96, temperature, seed=seed)), key=lambda g: g.prompt.index)
    texts = [group.completions[0].text for group in groups]
    with Grader() as grader:
        verdicts = grader.grade_many([(text, p.answer) for text, p in zip(texts, held_out, strict=True)])
    right = np.array([verdict.correct for verdict in verdicts], dtype=np.float64)
    level = np.array([p.level for p in held_out])
    worked = np.array([not text.startswith("\\boxed") for text in texts])
    return Ability(
        overall=mean_interval(right),
        by_level={one: mean_interval(right[level == one]) for one in LEVELS},
        worked=mean_interval(worked),
        when_worked=mean_interval(right[worked]) if worked.any() else None,
        when_guessed=mean_interval(right[~worked]) if not worked.all() else None,
        tokens=float(np.mean([len(group.completions[0].token_ids) for group in groups])),
    )


def model_card(sampled: Ability, greedy: Ability, recipe: Recipe, *, seed: int, parameters: int, made: str) -> str:
    """README.md of the policy folder. `made` says on what it was made, and in what time."""

    def row(name: str, read: Callable[[Ability], Interval | None]) -> str:
        cells = [f"{interval} | {interval.n:,}" if (interval := read(one)) else "- | 0" for one in (sampled, greedy)]
        return f"| {name} | {' | '.join(cells)} |"

    rows = [row("all", lambda a: a.overall)]
    rows += [row(f"level {level}", lambda a, level=level: a.by_level[level]) for level in LEVELS]  # type: ignore[misc]
    rows += [row("when it works", lambda a: a.when_worked), row("when it guesses", lambda a: a.when_guessed)]
    rows += [row("share that works", lambda a: a.worked)]
    table = "\n".join(rows)
    settings = "\n".join(f"- {name}: {_shown(value)}" for name, value in asdict(recipe).items())
    return f"""---
library_name: plumbline
license: apache-2.0
---

# The embedded policy

A decoder with Native Sparse Attention and {parameters / 1e6:.2f} M parameters that knows the form of the task and is
middling at the answers. It exists so that the whole pipeline can be run, and learn something, in minutes on a CPU. It
knows nothing but the procedural problems of `rl/procedural`; ask it nothing else.

## What it can do

Held-out procedural problems, one completion each, up to 96 tokens, 95% intervals. The easy levels hold few distinct
problems, so the hard ones weigh more.

| | temperature 1 | n | greedy | n |
|---|---|---|---|---|
{table}

## How it was made

`plumbline build-embedded --seed {seed}`, {made}. The tokenizer is a byte-level BPE
trained on the first problems (any text can be encoded; digits are single tokens). The first stage is one pass over
worked solutions. The second is one pass over demonstrations of mixed quality, on purpose: a share is worked, the rest
is a bare boxed guess that is often wrong. So the policy starts undecided between working and guessing, and
reinforcement learning has something to choose. Both stages draw from the training split alone; a hash of the statement
decides the split.

{settings}

The same seed gives the same weights on the same kind of machine with the same versions.
"""


def train_tokenizer(problems: list[ProceduralProblem], vocab: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: encodes any text; digits one by one."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[PAD, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"{p.problem}\n{p.solution}" for p in problems), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT
    return fast


def policy_config(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> PolicyConfig:
    return PolicyConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=1024,
        attention="nsa",
        nsa=NSA,
        qk_norm=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )


def mixed_demonstrations(problems: Iterable[ProceduralProblem], recipe: Recipe, seed: int) -> Iterator[tuple[str, str]]:
    """(problem, completion) pairs: some worked, the rest bare guesses."""
    rng = Random(seed)
    for problem in problems:
        if rng.random() < recipe.worked_share:
            yield problem.problem, problem.solution
        else:
            guess = problem.answer if rng.random() < recipe.guess_accuracy else wrong_guess(problem.answer, rng)
            yield problem.problem, f"\\boxed{{{guess}}}"


def wrong_guess(answer: str, rng: Random) -> str:
    """The answer with one digit changed to another."""
    places = [i for i, character in enumerate(answer) if character.isdigit()]
    place = rng.choice(places)
    digit = rng.choice([d for d in "123456789" if d != answer[place]])
    return answer[:place] + digit + answer[place + 1 :]


def fit(
    policy: Policy,
    tokenizer: PreTrainedTokenizerFast,
    demonstrations: list[tuple[str, str]],
    learning_rate: float,
    batch: int,
    seed: int,
    label: str,
) -> None:
    """One pass of TRL's SFTTrainer, loss on completions alone."""
    from trl import SFTConfig, SFTTrainer

    dataset = encode(tokenizer, demonstrations)
    config = SFTConfig(
        output_dir=str(Path(os.environ.get("TMPDIR", "/tmp")) / "plumbline-coldstart"),
        per_device_train_batch_size=batch,
        num_train_epochs=1,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, len(dataset) // batch // 20),
        weight_decay=0.01,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        # Not group_by_length: it orders each stretch of batches from long to short, so every stretch would end on bare
        # guesses and the easiest problems, and the policy would forget the rest.
        padding_free=True,
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        logging_steps=50,
        dataloader_num_workers=2 if torch.cuda.is_available() else 0,
        seed=seed,
        data_seed=seed,
        disable_tqdm=True,
    )
    print(f"cold start: {len(dataset):,} {label}", flush=True)
    trainer = SFTTrainer(model=policy, args=config, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()


def encode(tokenizer: PreTrainedTokenizerFast, demonstrations: list[tuple[str, str]]) -> Dataset:
    """input_ids, labels that put the loss on the completion and its end token, and length."""
    chats = [[{"role": "user", "content": problem}] for problem, _ in demonstrations]
    prompts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    completions = [completion + END for _, completion in demonstrations]
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    completion_ids = tokenizer(completions, add_special_tokens=False)["input_ids"]
    lengths = np.array([len(p) + len(c) for p, c in zip(prompt_ids, completion_ids, strict=True)])
    offsets = pa.array(np.concatenate([[0], lengths.cumsum()]), pa.int64())
    tokens, labels = np.empty(lengths.sum(), np.int32), np.full(lengths.sum(), -100, np.int32)
    at = 0
    for prompt, completion in zip(prompt_ids, completion_ids, strict=True):
        middle, end = at + len(prompt), at + len(prompt) + len(completion)
        tokens[at:middle], tokens[middle:end], labels[middle:end] = prompt, completion, completion
        at = end
    columns = {"input_ids": tokens, "labels": labels}
    arrays: dict[str, pa.Array] = {n: pa.LargeListArray.from_arrays(offsets, pa.array(x)) for n, x in columns.items()}
    return Dataset(pa.table({**arrays, "length": pa.array(lengths)}))


def save(policy: Policy, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """A policy folder; weights in bfloat16, which halves it."""
    out.mkdir(parents=True, exist_ok=True)
    policy.cpu().bfloat16().save_pretrained(out)
    policy.float()
    tokenizer.save_pretrained(out)
    # The tiny policy was never shown an instruction: it gets the bare problem.
    style = {"template": "chat", "system": None, "instruction": ""}
    (out / "prompt.json").write_text(json.dumps(style, indent=2) + "\n", encoding="utf-8")


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else f"{value:,}"
