"""plumbline adapt: teach a dense or converted checkpoint to use Native Sparse Attention on long text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def adapt(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="smollm2, a policy folder (dense or converted), a .gguf file, or a hub id.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Argument(help="New folder.", show_default=False)],
    text: Annotated[
        list[Path],
        typer.Option(help="UTF-8 text file or folder of .txt files; give it again for more.", show_default=False),
    ],
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Dense checkpoint that the last two stages learn from. A fresh conversion learns from the one it was made "
            "of, one that was adapted before from the text.",
            show_default=False,
        ),
    ] = None,
    context: Annotated[int, typer.Option(min=64, help="Tokens of a training window.")] = 8192,
    layer_steps: Annotated[
        int, typer.Option(min=0, help="Steps that teach each layer of a fresh conversion what exact attention does.")
    ] = 70,
    gate_steps: Annotated[int, typer.Option(min=0, help="Steps that then train gates and phi alone.")] = 10,
    all_steps: Annotated[int, typer.Option(min=0, help="Steps that then train everything.")] = 370,
    repeat_share: Annotated[
        float,
        typer.Option(min=0, max=0.9, help="Of a window, overwritten with passages that repeat earlier ones of it."),
    ] = 0.35,
    tokens_per_step: Annotated[int, typer.Option(min=64, help="Tokens of an optimizer step.")] = 32_768,
    tokens_per_microbatch: Annotated[
        int, typer.Option(min=64, help="Tokens of one forward and backward pass.")
    ] = 16_384,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Of the checkpoint's own weights. By its width: 1e-3 at 576 and below, beyond 1/width."),
    ] = None,
    new_learning_rate: Annotated[float, typer.Option(help="Of gates and phi, after the first stage.")] = 1e-3,
    alignment: Annotated[
        float, typer.Option(min=0, help="Factor of the loss that keeps phi ranking, after the first stage.")
    ] = 0.5,
    minutes: Annotated[float | None, typer.Option(help="End all stages within this time.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Order of the windows.")] = 0,
) -> None:
    """Teach each layer, then gates and the compression map, then all weights, on long text; write a policy folder."""
    import json

    import torch
    from rich.progress import Progress

    from plumbline.errors import InputError
    from plumbline.models.adapt import Recipe, check_teacher
    from plumbline.models.adapt import adapt as train
    from plumbline.models.convert import empty_target, save_folder
    from plumbline.models.load import load_policy, load_tokenizer, policy_config, stored_dtype
    from plumbline.models.longcontext import read_tokens, windows

    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device must be auto, cpu or cuda, got {device!r}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device")
    torch.manual_seed(seed)
    try:
        recipe = Recipe(
            context=context,
            tokens_per_step=tokens_per_step,
            tokens_per_microbatch=tokens_per_microbatch,
            layer_steps=layer_steps,
            gate_steps=gate_steps,
            all_steps=all_steps,
            repeat_share=repeat_share,
            new_learning_rate=new_learning_rate,
            learning_rate=learning_rate,
            alignment=alignment,
            minutes=minutes,
            seed=seed,
        )
        target = empty_target(out)
        sparse = policy_config(checkpoint).attention == "nsa"
        attention = None if sparse else "nsa"
        config = policy_config(checkpoint, attention=attention)
        reach = config.nsa_config.count * config.nsa_config.select_block
        if context <= reach:
            raise InputError(f"--context {context}: selection reaches {reach} tokens, so learning needs longer windows")
        if context > config.max_position_embeddings:
            raise InputError(
                f"--context {context} exceeds the checkpoint's max_position_embeddings ({config.max_position_embeddings})"
            )
        files = sorted(file for path in text for file in (path.glob("*.txt") if path.is_dir() else [path]))
        if not files:
            raise InputError(f"--text {', '.join(map(str, text))}: no .txt file there")
        rows = windows(read_tokens(files, load_tokenizer(checkpoint)), context)
        policy = load_policy(checkpoint, attention=attention, dtype=torch.float32, device=device)
        dense = (
            None if teacher is None else load_policy(teacher, dtype=torch.float32, device=device).requires_grad_(False)
        )
        if dense is not None:
            check_teacher(dense, policy)
        stored = stored_dtype(checkpoint)
    except (FileNotFoundError, PermissionError, ValueError) as error:
        raise InputError(str(error)) from error
    print(f"{len(rows)} windows of {context:,} tokens from {len(files)} files; {device}")
    records: list[dict[str, float]] = []
    with Progress() as progress:
        bar = progress.add_task("adapting", total=layer_steps + gate_steps + all_steps)

        def report(figures: dict[str, float]) -> None:
            records.append(figures)
            main = next(name for name in ("output_error", "divergence", "loss") if name in figures)
            shown = f"{main.replace('_', ' ')} {figures[main]:.3f}, alignment {figures['alignment']:.3f}"
            progress.update(bar, advance=1, description=f"stage {figures['stage']}, {shown}")

        train(policy, rows, recipe, report, teacher=dense)
    save_folder(policy.to(stored), checkpoint, target)  # type: ignore[arg-type]
    (target / "adaptation.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    print(
        f"{target}: {policy.config.attention} attention, {sum(int(r['tokens']) for r in records):,} tokens of training"
    )
