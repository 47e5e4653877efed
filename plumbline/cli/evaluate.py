"""plumbline evaluate: a policy on benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(
            help="embedded, smollm2, a policy folder or checkpoint, a hub id, or the name a server knows it by.",
            show_default=False,
        ),
    ] = None,
    benchmarks: Annotated[
        str | None,
        typer.Option(
            help="Comma list of aime24, aime25, amc23, math500, gsm8k, data files or hub ids; default: the preset's."
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="limr (LIMR's protocol), avg32 (32 completions, T 0.6, top-p 0.95) or greedy.  [default: greedy; none with --loss-on]"
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="First so many problems of each.")] = None,
    completions: Annotated[
        int | None, typer.Option(min=1, help="Completions a problem; default: the preset's.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 answers greedily; default: the preset's.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0.01, max=1, help="Nucleus mass; default: the preset's.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longer completions are cut; default: the preset's.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message; default: the preset's or the policy's.")] = None,
    instruction: Annotated[
        str | None, typer.Option(help="Sentence after the problem; default: the preset's or the policy's.")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="native, vllm, or endpoint (a server with OpenAI's protocol).")
    ] = "native",
    url: Annotated[str | None, typer.Option(help="The server's base URL, with /v1, for --engine endpoint.")] = None,
    slots: Annotated[int, typer.Option(min=1, help="Sequences decoded, or requests under way, at once.")] = 64,
    workers: Annotated[int, typer.Option(min=1, help="Rollout actors.")] = 1,
    attention: Annotated[str | None, typer.Option(help="full or nsa; default: the checkpoint's own.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Seed of sampling.")] = 0,
    manifest: Annotated[
        Path | None,
        typer.Option(
            help="Repeat the evaluation of this manifest.json (or its folder); exit 1 unless every completion is the same."
        ),
    ] = None,
    training: Annotated[
        str | None, typer.Option(help="Comma list of training data: report evaluation problems that also stand in it.")
    ] = None,
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
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted evaluation.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace earlier results in the output folder.")
    ] = False,
) -> None:
    """Answer benchmarks, grade the answers, and report avg@k, pass@k and maj@k with 95% intervals; measure losses on text."""
    from rich.console import Console

    from plumbline.errors import InputError
    from plumbline.rl.evaluation.launch import launch_evaluation
    from plumbline.rl.evaluation.request import Request
    from plumbline.rl.text_loss import launch_losses
    from plumbline.rl.text_sets import read_text_sets

    console = Console(emoji=False)
    if benchmarks is not None and not _names(benchmarks):
        raise InputError("--benchmarks names nothing; for example aime24,math500, or --loss-on FILE")
    texts = read_text_sets(loss_on or [], column=loss_column, limit=loss_documents)
    answered = not texts or any(option is not None for option in (benchmarks, preset, manifest))
    same = True
    if answered:
        request = Request(
            model=model,
            benchmarks=_names(benchmarks),
            preset=preset or "greedy",
            limit=limit,
            completions=completions,
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            system=system,
            instruction=instruction,
            engine=engine,
            url=url,
            slots=slots,
            workers=workers,
            attention=attention,
            device=device,
            seed=seed,
            output=output,
            manifest=manifest,
            training=_names(training),
            resume=resume,
            overwrite=overwrite,
        )
        same = launch_evaluation(request, console)
    if texts:
        if model is None:
            raise InputError("--loss-on needs a MODEL: embedded, smollm2, a policy folder, a checkpoint or a hub id")
        launch_losses(
            model,
            texts,
            console,
            output=output,
            prepared=answered,
            overwrite=overwrite,
            attention=attention,
            device=device,
            window=loss_window,
            data=trained_on,
            tokens=trained_tokens,
        )
    if not same:
        raise typer.Exit(1)
