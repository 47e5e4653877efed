"""plumbline evaluate: a policy on benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

BENCHMARKS = "aime24,aime25,math500"


def evaluate(
    model: Annotated[
        str, typer.Argument(help="embedded, smollm2, a policy folder or checkpoint, or a hub id.", show_default=False)
    ],
    benchmarks: Annotated[
        str | None,
        typer.Option(
            help="Comma list of benchmark names, data files or hub ids.  [default: aime24,aime25,math500; "
            "none with --loss-on]"
        ),
    ] = None,
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
    loss_on: Annotated[
        list[str] | None,
        typer.Option(
            help="Text set to measure the loss on: FILE or NAME=FILE (.txt, .jsonl, .parquet); may be repeated."
        ),
    ] = None,
    loss_column: Annotated[str, typer.Option(help="Column of the text in .jsonl and .parquet files.")] = "text",
    loss_documents: Annotated[int | None, typer.Option(min=1, help="First so many documents of each text set.")] = None,
    loss_window: Annotated[
        int | None, typer.Option(min=2, help="Tokens a prediction sees; default: the policy's, at most 2,048.")
    ] = None,
    trained_on: Annotated[
        str | None, typer.Option(help="For losses.json: the model's training data; default: a checkpoint's own.")
    ] = None,
    trained_tokens: Annotated[
        int | None, typer.Option(min=1, help="For losses.json: its training tokens; default: a checkpoint's own.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the results; default runs/evaluate-<model>.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace earlier results in the output folder.")
    ] = False,
) -> None:
    """Answer benchmarks, grade the answers, and report accuracy with 95% intervals; measure losses on text."""
    from rich.console import Console

    from plumbline.rl.evaluation.launch import launch_evaluation
    from plumbline.rl.text_loss import launch_losses
    from plumbline.rl.text_sets import read_text_sets

    console = Console(emoji=False)
    texts = read_text_sets(loss_on or [], column=loss_column, limit=loss_documents)
    wanted = "" if benchmarks is None and texts else benchmarks if benchmarks is not None else BENCHMARKS
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    if names or not texts:
        launch_evaluation(
            model,
            names,
            console,
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
    if texts:
        launch_losses(
            model,
            texts,
            console,
            output=output,
            prepared=bool(names),
            overwrite=overwrite,
            attention=attention,
            device=device,
            window=loss_window,
            data=trained_on,
            tokens=trained_tokens,
        )
