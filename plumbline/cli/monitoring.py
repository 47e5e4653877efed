"""plumbline monitoring: the files that Grafana and Prometheus want."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def monitoring(
    folder: Annotated[Path, typer.Argument(help="Where the two files go.")] = Path("monitoring"),
    ray_folder: Annotated[str, typer.Option(help="Temporary folder of the Ray head node.")] = "/tmp/ray",
) -> None:
    """Write the Grafana dashboard and the Prometheus configuration; see docs/monitoring.md."""
    from plumbline.rl.monitoring.dashboard import write

    dashboard, prometheus = write(folder, ray_folder)
    print(f"prometheus --config.file={prometheus} --web.listen-address=127.0.0.1:9090")
    print(f"Grafana: import {dashboard} and choose the Prometheus data source")
