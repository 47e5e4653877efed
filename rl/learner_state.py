"""A learner on disk and on its way to the rollout engines.

On disk: `policy/`, a Hugging Face folder for everyone; `learner/`, the tensors that training goes on from, written by
torch.distributed.checkpoint (each process its shards, read by any number of processes); and `learner.pt`, the rest.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from plumbline.errors import InputError
from plumbline.models.policy import Policy
from plumbline.rl.distributed import whole
from plumbline.rl.files import disk_refusal, sha256
from plumbline.rl.learner import Learner
from plumbline.rl.lora import merged_state, plain_name
from plumbline.rl.optimizers import MOMENT_BITS, after_loading, keeps_state_of

TENSORS = "learner"
REST = "learner.pt"

# That one process writes alone is what is asked for; the threads that write would say so each time.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)


def policy_weights(learner: Learner) -> dict[str, Tensor]:
    """The policy's tensors by name, whole, adapters merged, a tied tensor once. Every rank must call."""
    return dict(each_policy_weight(learner))


def each_policy_weight(learner: Learner, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """policy_weights one after the other, so that shards of one tensor alone are whole at once (with adapters: of all).

    Every rank must take all of them.

    Args:
        dtype: that shards are gathered in; None: theirs.
    """
    lora = learner.config.learner.lora
    named = learner.policy.named_parameters()
    if lora.rank:
        yield from merged_state({n: whole(p.detach()) for n, p in named}, lora.alpha, lora.rank).items()
        return
    for name, parameter in named:
        yield name, whole(parameter.detach().to(dtype or parameter.dtype))


def policy_shapes(learner: Learner) -> dict[str, tuple[int, ...]]:
    """Names and shapes of policy_weights, in their order; nothing is gathered."""
    named = learner.policy.named_parameters()
    return {plain_name(name): tuple(parameter.shape) for name, parameter in named if ".lora_" not in name}


class Saving:
    """A checkpoint of a learner while its files are written. Training may go on: the state was copied. Every rank makes one.

    Args:
        learner: whose state, as it is now.
        folder: for policy/, learner/ and learner.pt; what is in it already is summed too.
    """

    def __init__(self, learner: Learner, folder: Path) -> None:
        self.folder, self.rank = folder, learner.ranks.rank
        self.shape = learner.policy.config
        weights = policy_weights(learner)
        self.weights = {name: tensor.to("cpu", copy=True) for name, tensor in weights.items()} if self.rank == 0 else {}
        self.rest = io.BytesIO()
        torch.save(_rest(learner), self.rest)
        self.tensors: Any = dcp.async_save(
            _tensors(learner),
            checkpoint_id=folder / TENSORS,
            process_group=learner.ranks.files,
            no_dist=learner.ranks.size == 1,
        )
        pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.sums: Future[dict[str, str]] = pool.submit(self._write)
        pool.shutdown(wait=False)

    def written(self, *, wait: bool) -> dict[str, str] | None:
        """SHA-256 by path of this rank's files once every rank's are written; None until then.

        Raises what kept this rank, or another one's tensors, from being written: OSError for a full disk.
        """
        return self.sums.result() if wait or self.sums.done() else None

    def _write(self) -> dict[str, str]:
        problems: list[BaseException] = []
        try:
            if self.rank == 0:
                self._export()
        except Exception as error:
            problems.append(error)
        try:
            # To the end, also after a failure above: the folder may be removed once this returns.
            self.tensors.result()
        except CheckpointException as error:  # no Exception
            problems += [cause for cause, _ in error.failures.values()]
        if problems:
            raise disk_refusal(self.folder) or problems[0]
        return {str(path.relative_to(self.folder)): sha256(path) for path in self._own_files()}

    def _export(self) -> None:
        target = self.folder / "policy"
        target.mkdir(parents=True, exist_ok=True)
        (self.folder / REST).write_bytes(self.rest.getbuffer())
        with torch.device("meta"):
            shell = Policy(self.shape)  # names and configuration: the policy in training is not to be touched from here
        shell.save_pretrained(target, state_dict=self.weights)
        self.weights = {}

    def _own_files(self) -> Iterator[Path]:
        """Of learner/ those with this rank's number; everything else is rank 0's."""
        for path in sorted(self.folder.rglob("*")):
            numbered = path.parent.name == TENSORS and path.name.startswith("__")
            if path.is_file() and (path.name.startswith(f"__{self.rank}_") if numbered else self.rank == 0):
                yield path


def save(learner: Learner, folder: Path) -> None:
    """Write folder/policy, folder/learner and folder/learner.pt, and wait until they are. Every rank must call."""
    Saving(learner, folder).written(wait=True)


def load(learner: Learner, folder: Path) -> None:
    """Continue from what was saved, in as many processes as there are now. InputError when it is another model's."""
    rest = torch.load(folder / REST, map_location="cpu", weights_only=True)
    if rest["clipping"] != learner.config.learner.clipping.method:
        raise InputError(f"checkpoint {folder} was made with another learner.clipping.method; keep it when resuming")
    # Checkpoints from before there was a choice say nothing of it.
    bits, own = rest.get("moment_bits", 32), _moment_bits(learner)
    if bits != own:
        raise InputError(
            f"checkpoint {folder} has optimizer moments of {bits} bits, learner.optimizer "
            f"{learner.config.learner.optimizer} of {own}; keep it when resuming"
        )
    for part, here in _parts(learner).items():
        if rest[part] != here:
            there = "with" if rest[part] else "without"
            raise InputError(f"checkpoint {folder} was made {there} {part}; keep the learner's settings when resuming")
    metadata = dcp.FileSystemReader(folder / TENSORS).read_metadata().state_dict_metadata
    saved: dict[str, Any] = dict(metadata)
    for name, model, _ in _trained(learner):
        prefix = f"{name}."
        sizes = {key.removeprefix(prefix): entry.size for key, entry in saved.items() if key.startswith(prefix)}
        path = learner.config.policy.path if name == "policy" else "the critic's decoder"
        check_shapes(sizes, {key: tensor.shape for key, tensor in _trainable(model).items()}, folder, path)
    _make_moments(learner, saved)
    dcp.load(
        _tensors(learner),
        checkpoint_id=folder / TENSORS,
        process_group=learner.ranks.files,
        no_dist=learner.ranks.size == 1,
    )
    for _, _, optimizer in _trained(learner):
        after_loading(optimizer)
    learner.clipper.load_state_dict(rest["clipper"])
    _set_schedule(learner.scheduler, rest["scheduler"])
    if learner.critic is not None:
        _set_schedule(learner.critic_scheduler, rest["critic_scheduler"])
    learner.version = rest["version"]
    learner.skipped_in_a_row = rest["skipped_in_a_row"]
    torch.set_rng_state(rest["rng"])


def _parts(learner: Learner) -> dict[str, bool]:
    return {"adapters": bool(learner.config.learner.lora.rank), "critic": learner.critic is not None}


def _moment_bits(learner: Learner) -> int:
    return MOMENT_BITS[learner.config.learner.optimizer]


def _rest(learner: Learner) -> dict[str, Any]:
    """What is no tensor of the model's size; the same on every rank."""
    rest: dict[str, Any] = {
        **_parts(learner),
        "clipping": learner.config.learner.clipping.method,
        "clipper": learner.clipper.state_dict(),
        "moment_bits": _moment_bits(learner),
        "scheduler": learner.scheduler.state_dict(),
        "version": learner.version,
        "skipped_in_a_row": learner.skipped_in_a_row,
        "rng": torch.get_rng_state(),
    }
    if learner.critic is not None:
        rest["critic_scheduler"] = learner.critic_scheduler.state_dict()
    return rest


def _trained(learner: Learner) -> Iterator[tuple[str, nn.Module, torch.optim.Optimizer]]:
    yield "policy", learner.policy, learner.optimizer
    if learner.critic is not None:
        yield "critic", learner.critic, learner.critic_optimizer


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name: all parameters, or the adapters."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _tensors(learner: Learner) -> dict[str, Tensor]:
    """Trainable parameters and what the optimizers keep for each, by name: the learner's own, this rank's shards."""
    tensors: dict[str, Tensor] = {}
    for part, model, optimizer in _trained(learner):
        for name, parameter in _trainable(model).items():
            tensors[f"{part}.{name}"] = parameter.detach()
            for key, value in optimizer.state.get(keeps_state_of(optimizer, parameter), {}).items():
                tensors[f"{part}_optimizer.{name}.{key}"] = torch.as_tensor(value)
    return tensors


def _make_moments(learner: Learner, saved: Mapping[str, Any]) -> None:
    """Empty optimizer state of the names, shapes and dtypes that a checkpoint has, to read into.

    (torch's own helper makes it with an optimizer step, which also counts where a parameter had none yet.)
    """
    for part, model, optimizer in _trained(learner):
        optimizer.state.clear()
        for name, parameter in _trainable(model).items():
            prefix, keeper = f"{part}_optimizer.{name}.", keeps_state_of(optimizer, parameter)
            for key in [key for key in saved if key.startswith(prefix)]:
                size, dtype = saved[key].size, saved[key].properties.dtype
                whole_parameter = size == parameter.shape
                value = (
                    torch.zeros_like(keeper, dtype=dtype)
                    if whole_parameter
                    else torch.zeros(size, dtype=dtype, device=keeper.device)
                )
                optimizer.state[keeper][key.removeprefix(prefix)] = value.detach()


def _set_schedule(scheduler: torch.optim.lr_scheduler.LambdaLR, state: dict[str, Any]) -> None:
    scheduler.load_state_dict(state)
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate


def check_shapes(saved: Mapping[str, torch.Size], own: Mapping[str, torch.Size], folder: Path, path: str) -> None:
    """InputError that names the first tensor which the checkpoint and this learner do not have in common."""
    for name in [*own, *saved]:
        if saved.get(name) != own.get(name):
            here = list(own[name]) if name in own else "nothing"
            there = list(saved[name]) if name in saved else "nothing"
            raise InputError(
                f"checkpoint {folder} is of another shape: {name} is {there} there and {here} in {path}; "
                "resume with the policy it was made from"
            )
