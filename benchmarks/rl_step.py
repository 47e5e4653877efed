"""One optimizer step of reinforcement learning, ours beside TRL's GRPOTrainer, in one run on one machine.

    PYTHONPATH=. python benchmarks/rl_step.py --data gsm8k/train.jsonl --out benchmarks/results/rl_step.json

    native        our learner, our engine
    native-alone  our engine answers the same prompts, nothing is learnt: rollout only
    vllm          our learner, vLLM as engine
    trl-vllm      TRL's GRPOTrainer, vLLM colocated
    trl-generate  TRL's GRPOTrainer, transformers' generate
    vllm-alone    the same by vLLM

**The work** is the same for all: a policy (SmolLM2-135M-Instruct), the same GSM8K prompts in the same chat template, 64
prompts x 8 completions a step, at most 256 new tokens, temperature 1, the same verifier as reward in as many processes,
GRPO, one AdamW step on all 512 completions, float32 master weights with bfloat16 arithmetic.

**A step** goes from the prompts' text to new weights in the rollout engine: tokenizing, rollout, what grading takes
beyond the rollout, update, weight transfer. (TRL transfers when the next rollout begins; from the end of one optimizer
step to the end of the next there is one transfer all the same.) Steps that compile and capture are shown apart
(`warmup_steps`) and not counted, nor is what an engine takes to start (`start_seconds`). Completions are drawn, so
their lengths differ a little between modes: their tokens, end tokens included, are counted in each, and rates are given
beside seconds.

**Differences that stay.** Ours leaves completions without advantage (groups all right or all wrong) out of the update,
which changes nothing but the time; `update_all_rows` is the update where no group is left out. TRL recomputes the
log-probabilities before the update to correct for vLLM's by default; that is off here (--trl-correction turns it on),
since ours takes its ratio to the engine's own. Activation checkpointing, TRL's default, is off too, and a microbatch is
--trl-batch completions.

Each mode runs in a process of its own. One that fails or takes longer than --mode-seconds is named, with what it had
measured until then; --out is written after each mode, and the processes' output lies beside it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.processes import failure, run_alone, run_each

MODES = {
    "native": "benchmarks.rl_ours:native",
    "native-alone": "benchmarks.rl_ours:native_alone",
    "vllm": "benchmarks.rl_ours:vllm",
    "trl-vllm": "benchmarks.rl_others:trl_vllm",
    "trl-generate": "benchmarks.rl_others:trl_generate",
    "vllm-alone": "benchmarks.rl_others:vllm_alone",
}
USUAL = ["native", "trl-vllm", "trl-generate", "vllm-alone"]
PACKAGES = {
    "native": [],
    "native-alone": [],
    "vllm": ["vllm"],
    "trl-vllm": ["trl", "datasets", "vllm"],
    "trl-generate": ["trl", "datasets"],
    "vllm-alone": ["vllm"],
}


def main(given: list[str] | None = None) -> int:
    arguments = parser().parse_args(given)
    settings = vars(arguments).copy()
    out, modes, seconds, add = (settings.pop(name) for name in ("out", "modes", "mode_seconds", "add"))
    settings["data"] = str(arguments.data.resolve())
    if arguments.policy not in ("embedded", "smollm2") and Path(arguments.policy).exists():
        settings["policy"] = str(Path(arguments.policy).resolve())
    result: dict[str, Any] = {"work": settings | {"data": arguments.data.name}, "modes": {}}
    if add:
        earlier = json.loads(out.read_text(encoding="utf-8"))
        if earlier["work"] != result["work"]:
            sys.exit(f"--add: {out} has figures of other work: {earlier['work']}")
        result = earlier

    def run(mode: str, folder: Path) -> dict[str, Any]:
        missing = [name for name in PACKAGES[mode] if importlib.util.find_spec(name) is None]
        if missing:
            return {"failed": f"not installed: {', '.join(missing)}"}
        return run_alone(MODES[mode], settings, folder, seconds=seconds, environment=environment(mode, settings))

    run_each(result, "modes", modes, run, shown, out)
    print("\n".join(compared(result["modes"])), flush=True)
    return 1 if any("failed" in record for record in result["modes"].values()) else 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--modes", nargs="+", choices=MODES, default=USUAL)
    made.add_argument("--policy", default="smollm2")
    made.add_argument("--attention", choices=["full", "nsa"], help="of our modes")
    made.add_argument("--data", type=Path, required=True, help="JSONL with `id`, `problem` and `answer`")
    made.add_argument("--prompts", type=int, default=64)
    made.add_argument("--completions", type=int, default=8)
    made.add_argument("--max-new-tokens", type=int, default=256)
    made.add_argument("--slots", type=int, help="completions under way at once, of engines that ask; default: all")
    made.add_argument("--max-prompt-tokens", type=int, help="leave out problems with longer prompts, in every mode")
    made.add_argument("--tokens-per-microbatch", type=int, default=32768, help="of our learner")
    made.add_argument("--liger", action="store_true", help="liger-kernel in our learner")
    made.add_argument("--optimizer", default="adamw", help="learner.optimizer of ours")
    made.add_argument("--warmup", type=int, default=2, help="steps that are not counted (trl-generate: 1)")
    made.add_argument("--steps", type=int, default=5, help="steps that are counted")
    made.add_argument("--generate-steps", type=int, default=1, help="the same for trl-generate, whose steps are long")
    made.add_argument("--trl-batch", type=int, default=64, help="completions of one of TRL's microbatches")
    made.add_argument("--trl-correction", action="store_true", help="TRL corrects for vLLM's log-probabilities")
    made.add_argument("--memory-share", type=float, default=0.3, help="of the GPU's memory, for vLLM beside a learner")
    made.add_argument("--alone-memory-share", type=float, default=0.6, help="the same for vllm-alone")
    made.add_argument("--graders", type=int, default=8, help="grading processes")
    made.add_argument("--mode-seconds", type=float, default=240, help="a mode's process is killed after so many")
    made.add_argument("--out", type=Path)
    made.add_argument("--add", action="store_true", help="keep what --out has of other modes, measured on this machine")
    return made


def environment(mode: str, settings: dict[str, Any]) -> dict[str, str]:
    """What a mode's process sees beside this one's environment. Set already: kept."""
    # One GPU: transformers' trainer would spread over all that it sees.
    wanted = {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "0"}
    if Path(settings["policy"]).exists() or "/" not in settings["policy"]:
        # The policy is here: no library has to ask the hub for anything.
        wanted |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if mode in ("vllm", "trl-vllm", "vllm-alone"):
        wanted |= {
            # FlashInfer's sampler is compiled at first use and needs a CUDA toolkit.
            "VLLM_USE_FLASHINFER_SAMPLER": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            # One process on one machine: no name or interface has to be looked up.
            "VLLM_HOST_IP": "127.0.0.1",
            "MASTER_ADDR": "127.0.0.1",
            "NCCL_SOCKET_IFNAME": "lo",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        # In the process itself: its engine is asked for its model, to give it new weights, and a forked one cannot use
        # a GPU that this process has looked at. RANK, WORLD_SIZE, LOCAL_RANK and MASTER_PORT are TRL's to set, once its
        # trainer is made: earlier, accelerate would take this for one of several processes.
        wanted["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if mode in ("trl-vllm", "vllm-alone"):
        wanted["VLLM_PLUGINS"] = ""  # vLLM's own architectures alone
    return {name: value for name, value in wanted.items() if name not in os.environ}


def shown(mode: str, record: dict[str, Any]) -> Iterator[str]:
    yield f"{mode} ({record.get('engine', '-')}; process {record.get('process_seconds', 0):.0f} s)"
    yield from failure(record)
    parts = {"": record} | {name: record[name] for name in ("with_logprobs", "tokens_only") if name in record}
    for part, of in parts.items():
        warm = [step.get("step", step.get("rollout")) for step in of.get("warmup_steps", [])]
        if warm:
            yield f"  {part} not counted: {', '.join(f'{seconds:.2f}' for seconds in warm)} s"
        for name, value in of.get("median", {}).items():
            yield f"  {part} {name:28s} {value:14,.4f}"
    for name in ("update_all_rows", "rollout_floor", "decode_step"):
        if "share" in record.get(name, {}):
            floor = record[name]
            work = f"{floor['bytes'] / 1e9:,.2f} GB, {floor['flops'] / 1e12:,.2f} TFLOP"
            least = f"{floor['floor_seconds'] * 1e3:,.2f} ms"
            taken = f"{floor['seconds'] * 1e3:,.2f} ms"
            yield f"  {name}: {taken}, floor {least} ({work}), {floor['share']:.1%} of it reached"


def compared(modes: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Ratios to our native mode, in seconds a step and in completion tokens a second."""
    for mode in ("native", "native-alone"):
        here = modes.get(mode, {}).get("median", {}).get("rollout_tokens_per_second")
        for name in ("with_logprobs", "tokens_only"):
            alone = modes.get("vllm-alone", {}).get(name, {}).get("median")
            if here and alone:
                there = alone["rollout_tokens_per_second"]
                rates = f"{here:,.0f}, {there:,.0f}; {here / there:.2f}x"
                yield f"rollout, {mode} and vLLM alone ({name}), tokens/s: {rates}"
    ours = modes.get("native", {}).get("median")
    if ours is None:
        return
    whole = modes["native"].get("update_all_rows", {}).get("each_seconds")
    for mode, record in modes.items():
        other = record.get("median", {})
        if mode == "native" or "step" not in other:
            continue
        rate = (ours["completion_tokens"] / ours["step"]) / (other["completion_tokens"] / other["step"])
        yield (
            f"native against {mode}: {other['step'] / ours['step']:.2f}x in seconds a step "
            f"({ours['step']:.3f} and {other['step']:.3f}), {rate:.2f}x in tokens a second of the whole step"
        )
        if whole:
            step = ours["step"] - ours["update"] + min(whole)
            yield f"  with every group in native's update: {other['step'] / step:.2f}x ({step:.3f} s)"


if __name__ == "__main__":
    sys.exit(main())
