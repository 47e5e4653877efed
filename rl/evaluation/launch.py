"""From `plumbline evaluate` to results: check everything, say what will happen, start, report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from plumbline.errors import InputError
from plumbline.rewards.workers import Grader
from plumbline.rl.batch import Sampling
from plumbline.rl.data import load_problems
from plumbline.rl.evaluation.endpoint import Endpoint
from plumbline.rl.evaluation.manifest import MANIFEST, Manifest, ResultPart, compare_results, differences, read_manifest
from plumbline.rl.evaluation.overlap import Overlap, find_overlap
from plumbline.rl.evaluation.request import SERVED, Job, Request, repeat, resolve
from plumbline.rl.evaluation.run import GroupSource, evaluate
from plumbline.rl.evaluation.scores import Evaluation
from plumbline.rl.files import sha256
from plumbline.rl.output import lost_with_the_job, mark_run, prepare_output
from plumbline.rl.plan import make_plan
from plumbline.rl.stats import Interval

LINE_SECONDS = 10.0


def launch_evaluation(request: Request, console: Console) -> bool:
    """`plumbline evaluate`. False when a repetition from a manifest gave other completions."""
    wanted = read_manifest(request.manifest) if request.manifest else None
    job = repeat(request, wanted, console) if wanted else resolve(request, console)
    folder = job.config.folder
    if wanted:
        refuse_differences(wanted, job.manifest, f"the manifest {request.manifest}")
    served = find_server(job)
    overlaps = check_overlap(request.training, job, console)
    earlier = read_manifest(folder) if request.resume and (folder / MANIFEST).is_file() else None
    if earlier:
        refuse_differences(earlier, job.manifest, f"the earlier evaluation in {folder}")
        job.manifest.attempts = earlier.attempts + 1
        job.manifest.results = earlier.results
    work = sum(part.problems * part.completions * part.max_new_tokens for part in job.manifest.benchmarks)
    prepare_output(folder, 4 * work, resume=request.resume, overwrite=request.overwrite)
    mark_run(job.config, "evaluate")
    job.manifest.write(folder)
    if overlaps:
        tree = {name: [found.as_dict() for found in group] for name, group in overlaps.items()}
        (folder / "overlap.json").write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    warning = lost_with_the_job(folder)
    if warning:
        console.print(warning, highlight=False)
    console.print(describe(job), highlight=False, markup=False)
    results = []
    with begun_source(job, served, console) as source:
        for part in job.manifest.benchmarks:
            with progress_line(part.name, console) as progress:
                result = evaluate(
                    part.name,
                    job.tasks[part.name],
                    source,
                    Sampling(part.max_new_tokens, part.temperature, part.top_p, job.manifest.seed),
                    part.completions,
                    folder,
                    shard_problems=part.shard_problems,
                    independent=job.manifest.engine.name != "native",
                    resume=request.resume,
                    policy=job.manifest.model.path,
                    progress=progress,
                )
            results.append(result)
            job.manifest.results[part.name] = ResultPart(
                completions_sha256=sha256(folder / f"{part.name}.jsonl"),
                accuracy=result.accuracy.as_dict(),
                seconds=result.seconds,
            )
            job.manifest.write(folder)
    from plumbline.rl.run_report import write_run_report

    write_run_report([folder], folder / "run.html")
    print_results(job.manifest.model.path, results, console)
    console.print(f"completions, figures, {MANIFEST} and run.html: {folder}", highlight=False)
    return wanted is None or say_repetition(wanted, job.manifest, console)


def refuse_differences(wanted: Manifest, now: Manifest, whose: str) -> None:
    """InputError when something that decides completions is not as `wanted` has it."""
    changed = differences(wanted, now)
    if changed:
        more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
        raise InputError(f"this evaluation is not that of {whose}: {'; '.join(changed[:3])}{more}")


def check_overlap(training: list[str], job: Job, console: Console) -> dict[str, list[Overlap]]:
    """Compare every benchmark with every training source; prints a line each."""
    found: dict[str, list[Overlap]] = {}
    for source in training:
        problems, _ = load_problems(source)
        for name, tasks in job.tasks.items():
            overlap = find_overlap([tasks[sample_id].problem for sample_id in tasks], problems, source=source)
            console.print(overlap.line(name), highlight=False, markup=False)
            for match in [match for match in overlap.matches if match.share >= 0.5][:5]:
                console.print(
                    f"  {match.evaluation} ~ {match.training}: {match.share:.0%}", highlight=False, markup=False
                )
            found.setdefault(name, []).append(overlap)
    return found


def describe(job: Job) -> str:
    """Who answers, how many completions, where to."""
    manifest = job.manifest
    lines = [f"{manifest.model.path} by {manifest.engine.name} on {manifest.engine.device}; output {job.config.folder}"]
    if manifest.engine.name != "endpoint":
        lines[0] = f"{make_plan(job.config).parameters / 1e6:.1f} M parameters; " + lines[0]
    for part in manifest.benchmarks:
        how = "greedy" if part.temperature == 0 else f"temperature {part.temperature:g}, top-p {part.top_p:g}"
        lines.append(
            f"{part.name}: {part.problems} problems x {part.completions}, {how}, at most {part.max_new_tokens:,} tokens"
        )
    return "\n".join(lines)


def find_server(job: Job) -> Endpoint | None:
    """The served model, if that is what answers; InputError when the server is not there or serves another."""
    engine, grading = job.manifest.engine, job.manifest.grading
    if job.messages is None or engine.url is None:
        return None
    grader = Grader(1, grading.timeout_seconds, grading.memory_gib)
    model = None if job.manifest.model.path == SERVED else job.manifest.model.path
    return Endpoint(engine.url, model, job.messages, grader, concurrency=engine.slots)


@contextmanager
def begun_source(job: Job, served: Endpoint | None, console: Console) -> Iterator[GroupSource]:
    """The engine, ready to answer; ended with the block."""
    if served is not None:
        with served.grader:
            yield served
        return
    from plumbline.rl.cluster import Roles

    console.print("starting Ray and the workers …")
    with Roles.start(job.config, learner=False) as roles:
        roles.begin_evaluation(job.config, None)
        yield roles


@contextmanager
def progress_line(name: str, console: Console) -> Iterator[Callable[[int, int], None]]:
    """Problems answered, with an ETA: a bar on a terminal, elsewhere a plain line now and then."""
    began, first, last = time.monotonic(), -1, -LINE_SECONDS
    columns = (TextColumn("[bold]{task.description}"), BarColumn(24), MofNCompleteColumn())
    clock = (TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn())
    with Progress(*columns, *clock, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None)

        def show(done: int, whole: int) -> None:
            nonlocal first, last
            bar.update(task, completed=done, total=whole)
            if first < 0:
                first = done
            passed = time.monotonic() - began
            if not console.is_terminal and (done == whole or passed - last >= LINE_SECONDS):
                last = passed
                eta = f"ETA {passed / (done - first) * (whole - done):.0f} s" if done > first else "ETA unknown"
                console.print(f"{name}  {done}/{whole} problems  {passed:.0f} s  {eta}", highlight=False)

        yield show


def print_results(model: str, results: list[Evaluation], console: Console) -> None:
    """One row a benchmark."""
    table = Table(title=f"{model}: 95% intervals over problems", title_justify="left")
    for heading in ("benchmark", "problems", "avg@k", "pass@k", "maj@k", "tokens", "truncated", "no answer", "seconds"):
        table.add_column(heading, justify="left" if heading == "benchmark" else "right")
    for result in results:
        k = result.completions
        table.add_row(
            result.name,
            str(result.accuracy.n),
            f"@{k} {percent(result.accuracy)}",
            f"@{k} {percent(result.pass_at[k])}" if k > 1 else "-",
            f"@{k} {percent(result.majority)}" if result.majority else "-",
            f"{result.tokens['mean']:.0f}" if result.tokens else "-",
            f"{result.truncated.mean:.1%}",
            f"{result.no_answer.mean:.1%}",
            f"{result.seconds:.0f}",
        )
    console.print(table)
    for result in results:
        if result.grader_faults.mean > 0:
            console.print(
                f"{result.name}: {result.grader_faults.mean:.1%} of completions could not be graded; see `reason`"
            )


def percent(value: Interval) -> str:
    return f"{value.mean:.1%} ({100 * value.low:.1f}-{100 * value.high:.1f})"


def say_repetition(wanted: Manifest, now: Manifest, console: Console) -> bool:
    """Whether the completions are those of the manifest, bit for bit; prints which are and what else changed."""
    if not wanted.results:
        console.print("the manifest has no results to compare with")
        return True
    found = compare_results(wanted, now)
    if found.equal:
        console.print(f"repeated bit for bit: {', '.join(found.equal)}", highlight=False)
    if found.different:
        console.print(f"other completions than the manifest's: {', '.join(found.different)}", highlight=False)
    for change in found.changes:
        console.print(f"  {change}", highlight=False, markup=False)
    return not found.different
