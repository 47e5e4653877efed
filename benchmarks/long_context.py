"""Dense, converted and adapted policy side by side: loss by position, needles found, how much of exact attention the
chosen blocks hold, and what adaptation did.

    PYTHONPATH=. python benchmarks/long_context.py smollm2 --text ESSAYS --converted --adapt BOOKS --minutes 3

Texts are files, or folders of .txt files. Without --converted and --adapt only the policy itself is measured.
Lengths over --native are measured with the YaRN scaling that reaches them (arXiv 2309.00071), untrained.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from plumbline.models.adapt import Recipe, adapt, mean_gates
from plumbline.models.convert import empty_target, save_folder
from plumbline.models.load import load_policy, load_tokenizer
from plumbline.models.longcontext import (
    Estimate,
    attention_recall,
    find_needles,
    needle_recall,
    needles,
    read_tokens,
    token_losses,
    windows,
)
from plumbline.models.policy import Policy
from plumbline.models.rope import Rope

STEPS = ("layer_steps", "gate_steps", "all_steps")
# Of a length, looked at for the needle's blocks; windows likewise for the recall of attention.
RECALL_NEEDLES = 10
RECALL_WINDOWS = 4
STARTED = time.perf_counter()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy")
    parser.add_argument("--text", nargs="+", type=Path, required=True)
    parser.add_argument("--converted", action="store_true", help="also with NSA attention")
    parser.add_argument("--adapt", nargs="+", type=Path, help="also adapted on these texts")
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 8192], help="contexts of the needle test")
    parser.add_argument("--needles", type=int, default=100, help="questions a length; 0 leaves the test out")
    parser.add_argument("--native", type=int, default=8192, help="longest context without scaling")
    parser.add_argument("--window", type=int, default=8192, help="tokens of a window for the loss")
    parser.add_argument("--windows", type=int, default=16, help="windows for the loss; 0 leaves it out")
    parser.add_argument("--edges", nargs="+", type=int, default=[512, 1024, 2048, 4096], help="the loss is split here")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    recipe = Recipe()
    for name in ("context", "tokens_per_step", "tokens_per_microbatch", *STEPS):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(recipe, name))
    parser.add_argument("--repeat-share", type=float, default=recipe.repeat_share)
    parser.add_argument("--learning-rate", type=float, help="see plumbline adapt")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--out", type=Path, help="JSON lines")
    parser.add_argument("--save", type=Path, help="folder for the adapted policy")
    return parser.parse_args()


def files(paths: list[Path]) -> list[Path]:
    return sorted(file for path in paths for file in (path.glob("*.txt") if path.is_dir() else [path]))


def shown(value: Estimate, form: str) -> str:
    return f"{value.mean:{form}} [{value.low:{form}}, {value.high:{form}}] n={value.n}"


def say(text: str) -> None:
    print(f"{time.perf_counter() - STARTED:6.1f} s  {text}", flush=True)


def scaled(policy: Policy, length: int, native: int) -> Policy:
    """The policy with YaRN if the length needs it."""
    parameters = {"rope_theta": policy.config.rope_parameters["rope_theta"], "rope_type": "default"}
    if length > native:
        parameters |= {"rope_type": "yarn", "factor": length / native, "original_max_position_embeddings": native}
    policy.config.rope_parameters = parameters
    policy.model.rope = Rope(policy.config)
    return policy


def measure(name: str, policy: Policy, tokenizer: Any, text: torch.Tensor, args: argparse.Namespace) -> list[dict]:
    autocast = torch.bfloat16 if args.dtype == "bfloat16" else None
    records: list[dict] = []
    if args.windows:
        losses = token_losses(scaled(policy, 1, 1), windows([text], args.window, args.windows), autocast=autocast)
        for low, high in pairwise([0, *(edge for edge in args.edges if edge < args.window), args.window]):
            # Column t is the loss of token t + 1.
            part = Estimate.of(losses[:, max(low - 1, 0) : high - 1].mean(1))
            records.append({"policy": name, "what": "loss", "from": low, "to": high, **vars(part)})
            say(f"{name:10} loss of tokens {low:>5} to {high:>5}: {shown(part, '.4f')}")
        config = policy.config.nsa_config
        if policy.config.attention == "nsa" and args.window > config.count * config.select_block:
            some = windows([text], args.window, min(RECALL_WINDOWS, args.windows))
            chosen, best = attention_recall(policy, some, autocast=autocast)
            part, limit = Estimate.of(chosen.mean(1)), best.mean().item()
            layers = {"layers": chosen.mean(0).tolist(), "best_layers": best.mean(0).tolist()}
            records.append({"policy": name, "what": "recall", **vars(part), "best": limit, **layers})
            say(f"{name:10} recall of attention mass: {shown(part, '.1%')}, the best choice {limit:.1%}")
    for length in args.lengths if args.needles else []:
        # Longer contexts cost more: the same number of tokens a length, from the native one on.
        count = max(16, args.needles * min(args.native, length) // length)
        questions = needles([text], tokenizer, length, count)
        found, answer = find_needles(scaled(policy, length, args.native), questions, autocast=autocast)
        share, nats = Estimate.of_share(int(found.sum()), len(found)), Estimate.of(answer)
        depths = sorted({question.depth for question in questions})
        by_depth = {
            depth: found[[question.depth == depth for question in questions]].double().mean().item() for depth in depths
        }
        scaling = "yarn" if length > args.native else "none"
        records.append(
            {
                **{"policy": name, "what": "needle", "length": length, "scaling": scaling, **vars(share)},
                **{"answer_loss": vars(nats), "by_depth": by_depth},
            }
        )
        say(f"{name:10} needle at {length:>5}: found {shown(share, '.1%')}, loss {shown(nats, '.3f')}")
        if policy.config.attention == "nsa":
            seen = needle_recall(policy, questions[:RECALL_NEEDLES], autocast=autocast)
            mass, held, best = (part.sum().item() for part in (seen.mass, seen.held, seen.best))
            figures = {"held": held / mass, "best": best / mass, "chosen": seen.chosen.mean().item()}
            layers = {part: getattr(seen, part).mean(0).tolist() for part in ("mass", "held", "best")}
            records.append({"policy": name, "what": "needle_blocks", "length": length, **figures, "layers": layers})
            say(
                f"{name:10} needle at {length:>5}: its blocks chosen {figures['chosen']:.1%}, of the attention on them "
                f"{figures['held']:.1%} held, by the best choice {figures['best']:.1%}"
            )
    scaled(policy, 1, 1)
    return records


def main() -> None:
    args = arguments()
    if args.save:
        empty_target(args.save)
    tokenizer = load_tokenizer(args.policy)
    text = torch.cat(read_tokens(files(args.text), tokenizer))
    # Before anything is measured: a file that cannot be read should not cost what was.
    rows = windows(read_tokens(files(args.adapt), tokenizer), args.context) if args.adapt else None
    where = {"dtype": torch.float32, "device": args.device}
    policy = load_policy(args.policy, **where)
    say(f"{args.policy} loaded, {policy.config.attention} attention; {len(text):,} tokens to measure on")
    name = "dense" if policy.config.attention == "full" else "sparse"
    records: list[dict] = []

    def keep(new: list[dict]) -> None:
        """After each part, so that a run which is cut off leaves what it had."""
        records.extend(new)
        if args.out:
            card = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
            common = {
                "checkpoint": Path(args.policy).name,
                "card": card,
                "torch": torch.__version__,
                "dtype": args.dtype,
            }
            args.out.write_text("".join(json.dumps({**common, **record}) + "\n" for record in records))

    keep(measure(name, policy, tokenizer, text, args))
    teacher = policy.requires_grad_(False) if name == "dense" else None
    if args.converted or args.adapt:
        policy = load_policy(args.policy, attention="nsa", **where)
        if args.converted:
            keep(measure("converted", policy, tokenizer, text, args))
    if rows is not None:
        names = ("context", "tokens_per_step", "tokens_per_microbatch", *STEPS)
        names += ("repeat_share", "learning_rate", "minutes")
        recipe = Recipe(**{name: getattr(args, name) for name in names})
        warm_up(policy, rows, recipe)
        say(f"adapting on {len(rows)} windows of {args.context} tokens")
        for name, part in parts_of(recipe):
            steps: list[dict] = []

            def report(figures: dict, steps: list[dict] = steps) -> None:
                steps.append({"what": "step", **figures})
                if figures["step"] % 10 == 1:
                    say(", ".join(f"{key} {value:.4g}" for key, value in figures.items()))

            adapt(policy, rows, part, report, teacher=teacher)
            keep(steps)
            say(f"{name}: {sum(step['tokens'] for step in steps):,} tokens in {len(steps)} steps")
            if steps:  # a policy whose gates are trained has no layer stage
                keep(measure(name, policy, tokenizer, text, args))
        if args.save:
            save_folder(policy, args.policy, args.save)
        autocast = torch.autocast(policy.device.type, torch.bfloat16, enabled=policy.device.type == "cuda")
        with autocast:
            gates = mean_gates(policy, rows[:2])
        say("mean gates (cmp, slc, win): " + ", ".join(f"{value:.3f}" for value in gates.mean(0).tolist()))
        keep([{"what": "gates", "layers": gates.tolist()}])


def parts_of(recipe: Recipe) -> list[tuple[str, Recipe]]:
    """The layer stage and the others, each to be measured after; they share the time as one adaptation would."""
    whole = recipe.layer_steps + recipe.gate_steps + recipe.all_steps
    parts = {
        "layers": replace(recipe, gate_steps=0, all_steps=0),
        "adapted": replace(recipe, layer_steps=0, seed=recipe.seed + 1),
    }
    made = []
    for name, part in parts.items():
        steps = part.layer_steps + part.gate_steps + part.all_steps
        if steps:
            minutes = None if recipe.minutes is None else recipe.minutes * steps / whole
            made.append((name, replace(part, minutes=minutes)))
    return made


def warm_up(policy: Policy, rows: torch.Tensor, recipe: Recipe) -> None:
    """Compile what training will need before its clock runs."""
    count = recipe.tokens_per_microbatch // recipe.context
    ids = rows[:count].flatten().to(policy.device)
    ends = torch.arange(count + 1, dtype=torch.int32, device=ids.device) * recipe.context
    with torch.autocast(policy.device.type, torch.bfloat16, enabled=policy.device.type == "cuda"):
        policy.hidden_states(ids, ends).float().square().mean().backward()
    policy.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
