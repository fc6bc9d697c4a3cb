"""`windtunnel simulate`: settings in, a run's folder with its report out."""

from __future__ import annotations

import json
import resource
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from cli.config import FileConfig
from cli.output import default_folder, load_plugin, print_summary, progress_bar, resolved
from engine.results.run_folder import run_folder, write_chrome_trace, write_config, write_summary
from engine.workload.workload import make_workload
from simulator.cluster import Deployment
from simulator.cluster import simulate as simulate_cluster


def run(
    config: FileConfig, output_dir: Path | None, *, as_json: bool, chrome_trace: bool, started: float
) -> dict[str, Any]:
    """Simulate `config`, write its folder and print what came out. `started`: perf_counter when the process began."""
    for plugin in config.plugin:
        load_plugin(plugin)
    groups = config.groups()
    slos = config.slos()
    kinds = [Deployment.of(group.replica_spec(), group.predictor) for group in groups]
    deployments = [kind for kind, group in zip(kinds, groups, strict=True) for _ in range(group.count)]
    shortest = min(kind.scheduler.max_model_len or 0 for kind in kinds)
    workload = make_workload(config.workload_spec(shortest))
    target = output_dir or default_folder(kinds[0].replica, workload.name)
    with run_folder(target) as folder:
        startup_seconds = time.perf_counter() - started
        with progress_bar("requests") as progress:
            task = progress.add_task("simulating", total=len(workload))
            result = simulate_cluster(
                workload,
                deployments,
                router=config.router,
                seed=config.seed,
                slos=slos,
                folder=folder,
                on_progress=lambda finished: progress.update(task, completed=finished),
            )
        summary = result.summary
        summary["version"] = version("windtunnel")
        summary["simulator"] = {
            **summary["simulator"],
            "startup_seconds": startup_seconds,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        write_config(folder, resolved(config, [kind.replica for kind in kinds], len(workload)))
        write_summary(folder, summary)
        if chrome_trace:
            write_chrome_trace(folder)
        from studies.pages.run import write_report  # plotly takes longer to import than everything else

        write_report(folder)
    copies = [group.count for group in groups]
    print_summary(summary, copies, target, Console(stderr=as_json, highlight=False, soft_wrap=True))
    if as_json:
        print(json.dumps({**summary, "output_dir": str(target)}, allow_nan=False))
    return summary
