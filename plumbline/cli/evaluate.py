"""plumbline evaluate: a policy on benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    model: Annotated[
        str, typer.Argument(help="embedded, smollm2, a policy folder or checkpoint, or a hub id.", show_default=False)
    ],
    benchmarks: Annotated[
        str, typer.Option(help="Comma list of benchmark names, data files or hub ids.")
    ] = "aime24,aime25,math500",
    limit: Annotated[int | None, typer.Option(min=1, help="First so many problems of each.")] = None,
    completions: Annotated[int, typer.Option(min=1, help="Completions a problem.")] = 1,
    temperature: Annotated[float, typer.Option(min=0, help="0 answers greedily.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1, help="Nucleus mass.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longer completions are cut.")] = 2048,
    slots: Annotated[int, typer.Option(min=1, help="Sequences decoded at once.")] = 64,
    workers: Annotated[int, typer.Option(min=1, help="Rollout actors.")] = 1,
    attention: Annotated[str | None, typer.Option(help="full or nsa; default: the checkpoint's own.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Seed of sampling.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Folder of the results; default runs/evaluate-<model>.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace earlier results in the output folder.")
    ] = False,
) -> None:
    """Answer benchmarks, grade the answers, and report accuracy with 95% intervals."""
    from rich.console import Console

    from plumbline.rl.evaluation.launch import launch_evaluation

    launch_evaluation(
        model,
        [name.strip() for name in benchmarks.split(",") if name.strip()],
        Console(emoji=False),
        limit=limit,
        completions=completions,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        slots=slots,
        workers=workers,
        attention=attention,
        device=device,
        seed=seed,
        output=output,
        overwrite=overwrite,
    )
