"""plumbline monitoring: the files that Grafana and Prometheus want, and a look at what Prometheus has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def monitoring(
    folder: Annotated[Path, typer.Argument(help="Where the two files go.")] = Path("monitoring"),
    ray_folder: Annotated[str, typer.Option(help="Temporary folder of the Ray head node.")] = "/tmp/ray",
    check: Annotated[
        str | None,
        typer.Option(
            help="Write nothing; ask the Prometheus at this URL every query of the dashboard, over the last hour. "
            "Exit 1 if a metric that every run has shows nothing."
        ),
    ] = None,
) -> None:
    """Write the Grafana dashboard and the Prometheus configuration; see docs/monitoring.md."""
    if check is not None:
        from plumbline.rl.monitoring.check_dashboard import ask_every_query

        answers = ask_every_query(check)
        for answer in answers:
            note = f"  (only with {answer.metric.when})" if answer.metric.when and not answer.points else ""
            print(f"{answer.points:>6} points  {answer.series:>3} lines  {answer.panel}: {answer.query}{note}")
        missing = sum(answer.missing for answer in answers)
        print(f"{len(answers)} queries, {sum(answer.points > 0 for answer in answers)} with data, {missing} missing")
        if missing:
            raise typer.Exit(1)
        return
    from plumbline.rl.monitoring.dashboard import write

    dashboard, prometheus = write(folder, ray_folder)
    print(f"prometheus --config.file={prometheus} --web.listen-address=127.0.0.1:9090")
    print(f"Grafana: import {dashboard} and choose the Prometheus data source")
