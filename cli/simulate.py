"""`windtunnel simulate`: settings in, a run's folder with its report out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from cli.output import default_folder, print_summary, progress_bar
from windtunnel.settings import FileConfig
from windtunnel.simulation import Simulation


def run(
    config: FileConfig,
    output_dir: Path | None,
    *,
    as_json: bool,
    chrome_trace: bool,
    operator_times: bool = False,
    started: float,
) -> dict[str, Any]:
    """Simulate `config`, write its folder and print the results. `started`: perf_counter when the process began."""
    simulation = Simulation.of(config)
    target = output_dir or default_folder(simulation.kinds[0].replica, simulation.workload.name)
    with progress_bar("requests") as progress:
        task = progress.add_task("simulating", total=len(simulation.workload) * (1 + (config.uncertainty or 0)))
        summary = simulation.write(
            target,
            started=started,
            chrome_trace=chrome_trace,
            operator_times=operator_times,
            on_progress=lambda finished: progress.update(task, completed=finished),
        )
    print_summary(summary, simulation.copies, target, Console(stderr=as_json, highlight=False, soft_wrap=True))
    if as_json:
        print(json.dumps({**summary, "output_dir": str(target)}, allow_nan=False))
    return summary
