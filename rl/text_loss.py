"""The loss of a policy on any text, a token and a byte: what `plumbline scaling` compares models by.

Every token of a document is predicted once: the first after the tokenizer's start token (its beginning-of-sequence
token, else its end-of-sequence token), the others after what precedes them in their window. A document longer than the
window is cut into windows that share one token, as lm-eval's `loglikelihood_rolling` cuts it. Bytes are those of the
text in UTF-8, so that losses a byte compare models of different tokenizers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from plumbline.errors import InputError
from plumbline.rl.text_sets import TextSet

if TYPE_CHECKING:
    from rich.console import Console

    from plumbline.models.policy import Policy

FILE = "losses.json"
RESAMPLES = 2000


@dataclass(frozen=True)
class TextLoss:
    """Loss on a text set, in nats.

    Attributes:
        per_token, per_byte: total loss over the number of tokens predicted, and over the bytes of the text.
        tokens, bytes, documents: their numbers.
        unknown_tokens: tokens that stand for text the tokenizer cannot spell; the loss a byte means little if not 0.
        per_token_interval, per_byte_interval: (low, high), 95% bootstrap over documents; None for a single one.
        sha256: of the documents.
        source: where they were read from.
    """

    per_token: float
    per_byte: float
    tokens: int
    bytes: int
    documents: int
    unknown_tokens: int
    per_token_interval: tuple[float, float] | None
    per_byte_interval: tuple[float, float] | None
    sha256: str
    source: str


def text_loss(
    policy: Policy,
    tokenizer: Any,
    text: TextSet,
    *,
    window: int,
    tokens_per_batch: int = 4096,
    chunk_tokens: int = 1024,
    progress: Callable[[int, int], None] | None = None,
) -> TextLoss:
    """Loss of a policy on a text set.

    Args:
        policy: on its device; evaluated in its own dtype, log-probabilities in float32, sums in float64.
        tokenizer: of the policy.
        text: what to predict.
        window: tokens that a prediction sees at most.
        tokens_per_batch: packed tokens of one forward pass.
        chunk_tokens: tokens whose logits exist at once.
        progress: called with (tokens done, all).

    Raises:
        InputError: a tokenizer without start token, or no token in the whole set.
    """
    start = start_token(tokenizer)
    ids = [tokenizer(document, add_special_tokens=False)["input_ids"] for document in text.documents]
    tokens = np.array([len(each) for each in ids])
    if not tokens.sum():
        raise InputError(f"text set {text.name}: the tokenizer makes no token of its {len(ids)} documents")
    bytes_ = np.array([len(document.encode()) for document in text.documents])
    nats = np.zeros(len(ids))
    done = 0
    for batch in _batches(ids, start, window, tokens_per_batch):
        for (number, _, targets), loss in zip(batch, _losses(policy, batch, chunk_tokens), strict=True):
            nats[number] += loss
            done += len(targets)
        if progress:
            progress(done, int(tokens.sum()))
    unknown = getattr(tokenizer, "unk_token_id", None)
    digest = hashlib.sha256("\0".join(text.documents).encode()).hexdigest()
    return TextLoss(
        per_token=float(nats.sum() / tokens.sum()),
        per_byte=float(nats.sum() / bytes_.sum()),
        tokens=int(tokens.sum()),
        bytes=int(bytes_.sum()),
        documents=len(ids),
        unknown_tokens=0 if unknown is None else sum(each.count(unknown) for each in ids),
        per_token_interval=_interval(nats, tokens),
        per_byte_interval=_interval(nats, bytes_),
        sha256=digest,
        source=text.source,
    )


def windows(ids: Sequence[int], start: int, window: int) -> Iterator[tuple[list[int], list[int]]]:
    """(inputs, targets) of one document, of equal length and at most `window`; every token is a target once."""
    before = start
    for first in range(0, len(ids), window):
        targets = list(ids[first : first + window])
        yield [before, *targets[:-1]], targets
        before = targets[-1]


def start_token(tokenizer: Any) -> int:
    """Id that stands before a document. InputError if the tokenizer has neither a beginning nor an end token."""
    for name in ("bos_token_id", "eos_token_id"):
        found = getattr(tokenizer, name, None)
        if found is not None:
            return int(found)
    raise InputError("the tokenizer has neither a beginning-of-sequence nor an end-of-sequence token to start a text")


def origin(model: str) -> tuple[str | None, int | None]:
    """(data, completion tokens) that a checkpoint of a training run was trained on; None for other models."""
    from plumbline.models.load import policy_folder
    from plumbline.rl.checkpoint import STATE
    from plumbline.selection.segments import iterate_stored

    checkpoint = policy_folder(model).parent
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        config, offset = state["config"], int(state["history_offset"])
        data = config["data"]["source"] + (f" ({config['data']['subset']})" if config["data"]["subset"] else "")
    except (OSError, ValueError, KeyError, TypeError):
        return None, None
    tokens = rows = 0
    try:
        for batch in iterate_stored(checkpoint.parent.parent / "history", config["name"]):
            if rows >= offset:
                break
            lengths = batch.column("tokens").slice(0, offset - rows)
            tokens += sum(length or 0 for length in lengths.to_pylist())
            rows += len(lengths)
    except FileNotFoundError:
        return data, None
    return data, tokens if rows == offset else None


def record_losses(
    model: str,
    sets: Sequence[TextSet],
    folder: Path,
    *,
    attention: str | None = None,
    device: str = "auto",
    window: int | None = None,
    data: str | None = None,
    tokens: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, TextLoss]:
    """Measure the losses of a model and write folder/losses.json, a row of `plumbline scaling`.

    Args:
        model, attention, device: as in the config's policy section.
        sets: from read_text_sets.
        folder: exists.
        window: tokens that a prediction sees at most; None: what the policy was made for, but at most 2,048.
        data, tokens: what the model was trained on and how many tokens of it; None: what a checkpoint of ours says.
        progress: called with (set, tokens done, all).

    Raises:
        InputError: a window beyond what the policy was made for, and as text_loss.
    """
    import torch

    from plumbline.models.load import load_policy, load_tokenizer
    from plumbline.rl.device import pick_device

    policy = load_policy(model, attention=attention, dtype=torch.float32, device=pick_device(device))
    tokenizer = load_tokenizer(model)
    longest = policy.config.max_position_embeddings
    if window is not None and window > longest:
        raise InputError(f"a window of {window} tokens is beyond the {longest} positions that {model} was made for")
    window = window or min(longest, 2048)
    found: dict[str, TextLoss] = {}
    for text in sets:

        def report(done: int, total: int, name: str = text.name) -> None:
            if progress:
                progress(name, done, total)

        found[text.name] = text_loss(policy, tokenizer, text, window=window, progress=report)
    known_data, known_tokens = origin(model)
    record = {
        "model": model,
        "data": data or known_data,
        "params": sum(parameter.numel() for parameter in policy.parameters()),
        "tokens": tokens or known_tokens,
        "tokenizer": tokenizer_label(tokenizer),
        "architecture": architecture_label(policy.config),
        "window": window,
        "start_token": start_token(tokenizer),
        "losses": {name: asdict(loss) for name, loss in found.items()},
    }
    (folder / FILE).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return found


def tokenizer_label(tokenizer: Any) -> str:
    """The same for tokenizers of one vocabulary: its size and a hash of it."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return f"{len(vocabulary)} tokens, {hashlib.sha256(repr(vocabulary).encode()).hexdigest()[:8]}"


def architecture_label(config: Any) -> str:
    """What tells one decoder from another apart from its size."""
    extras = [name for name in ("qkv_bias", "qk_norm") if getattr(config, name)]
    return ", ".join([f"{config.attention} attention", *extras])


# Of one document's window: (number of the document, inputs, targets).
_Window = tuple[int, list[int], list[int]]


def _batches(ids: list[list[int]], start: int, window: int, tokens_per_batch: int) -> Iterator[list[_Window]]:
    """Windows of like length together, so that padding inside the policy stays small."""
    cut = [(number, *pair) for number, each in enumerate(ids) for pair in windows(each, start, window)]
    cut.sort(key=lambda entry: len(entry[1]))
    batch: list[_Window] = []
    used = 0
    for entry in cut:
        if batch and used + len(entry[1]) > tokens_per_batch:
            yield batch
            batch, used = [], 0
        batch.append(entry)
        used += len(entry[1])
    if batch:
        yield batch


def _losses(policy: Policy, batch: list[_Window], chunk_tokens: int) -> list[float]:
    """Nats of each window."""
    import torch

    from plumbline.rl.logprobs import token_logprobs

    lengths = [len(inputs) for _, inputs, _ in batch]
    ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=policy.device)
    with torch.inference_mode():
        inputs = torch.tensor([token for _, inputs, _ in batch for token in inputs], device=policy.device)
        targets = torch.tensor([token for _, _, targets in batch for token in targets], device=policy.device)
        hidden = policy.hidden_states(inputs, ends)
        logprobs, _ = token_logprobs(hidden, targets, policy.lm_head, chunk_tokens=chunk_tokens)
    return [-part.sum().item() for part in logprobs.double().split(lengths)]


def _interval(nats: np.ndarray, size: np.ndarray) -> tuple[float, float] | None:
    """95% percentile bootstrap over documents of the ratio of sums."""
    n = len(nats)
    if n < 2:
        return None
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(RESAMPLES):
        pick = rng.integers(0, n, n)
        ratios.append(nats[pick].sum() / size[pick].sum() if size[pick].sum() else np.nan)
    low, high = np.nanpercentile(ratios, [2.5, 97.5])
    return float(low), float(high)


def launch_losses(
    model: str,
    sets: Sequence[TextSet],
    console: Console,
    *,
    output: Path | None,
    prepared: bool,
    overwrite: bool,
    **settings: Any,
) -> None:
    """The part of `plumbline evaluate` that measures losses: record them in the evaluation's folder and print them.

    Args:
        prepared: the folder holds this evaluation's results already; otherwise it is made, or refused.
        settings: of record_losses.
    """
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.table import Table

    from plumbline.models.load import policy_config
    from plumbline.rl.config import parse_config
    from plumbline.rl.evaluation.request import evaluation_name
    from plumbline.rl.output import mark_run, prepare_output

    policy_config(model)  # refuse a model that is none before a folder is made
    tree = {"name": evaluation_name(model), "output": str(output) if output else None, "policy": {"path": model}}
    config = parse_config(tree, where="plumbline evaluate")
    if not prepared:
        prepare_output(config.folder, 1 << 20, resume=False, overwrite=overwrite)
        mark_run(config, "evaluate")
    columns = (TextColumn("[bold]{task.description}"), BarColumn(24), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        tasks = {text.name: progress.add_task(f"loss on {text.name}", total=None) for text in sets}

        def report(name: str, done: int, total: int) -> None:
            progress.update(tasks[name], completed=done, total=total)

        found = record_losses(model, sets, config.folder, progress=report, **settings)
    table = Table(title=f"{model}: loss in nats, 95% intervals over documents")
    for heading in ("text set", "documents", "tokens", "a token", "bytes", "a byte"):
        table.add_column(heading, justify="left" if heading == "text set" else "right")
    for name, loss in found.items():
        table.add_row(
            name,
            f"{loss.documents:,}",
            f"{loss.tokens:,}",
            _shown(loss.per_token, loss.per_token_interval),
            f"{loss.bytes:,}",
            _shown(loss.per_byte, loss.per_byte_interval),
        )
    console.print(table)
    for name, loss in found.items():
        if loss.unknown_tokens:
            console.print(
                f"warning: {loss.unknown_tokens:,} of {loss.tokens:,} tokens of {name} stand for text that the tokenizer "
                "cannot spell; its loss a byte is too low",
                markup=False,
            )
    console.print(f"losses: {config.folder / FILE}", highlight=False, markup=False, soft_wrap=True)


def _shown(value: float, interval: tuple[float, float] | None) -> str:
    return f"{value:.4f}" + (f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "")
