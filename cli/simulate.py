"""`windtunnel simulate`: settings in, a run's folder with its report out."""

from __future__ import annotations

import json
import resource
import runpy
import sys
import time
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from cli.config import FileConfig, ReplicaGroup
from engine import catalog
from engine.errors import InputError
from engine.metrics import METRIC_NAMES, describe, summary_key
from engine.run_folder import run_folder, write_chrome_trace, write_config, write_summary
from engine.workload import DEFAULT_LENGTHS, make_workload
from simulator.cluster import Deployment, deploy
from simulator.cluster import simulate as simulate_cluster


def run(
    config: FileConfig, output_dir: Path | None, *, as_json: bool, chrome_trace: bool, started: float
) -> dict[str, Any]:
    """Simulate `config`, write its folder and print what came out. `started`: perf_counter when the process began."""
    for plugin in config.plugin:
        _load_plugin(plugin)
    groups = config.groups()
    slos = config.slos()
    kinds = [_deployment(group) for group in groups]
    deployments = [kind for kind, group in zip(kinds, groups, strict=True) for _ in range(group.count)]
    shortest = min(kind.scheduler.max_model_len or 0 for kind in kinds)
    workload = make_workload(config.workload_spec(shortest))
    target = output_dir or _default_folder(kinds[0], workload.name)
    with run_folder(target) as folder:
        startup_seconds = time.perf_counter() - started
        with _progress(len(workload)) as progress:
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
        write_config(folder, _resolved(config, kinds, len(workload)))
        write_summary(folder, summary)
        if chrome_trace:
            write_chrome_trace(folder)
        from studies.report import write_report  # plotly takes longer to import than everything else

        write_report(folder)
    counts = [(kind, group.count) for kind, group in zip(kinds, groups, strict=True)]
    _print(summary, counts, target, Console(stderr=as_json, highlight=False, soft_wrap=True))
    if as_json:
        print(json.dumps({**summary, "output_dir": str(target)}, allow_nan=False))
    return summary


def _load_plugin(path: Path) -> None:
    """Run a user's file, which adds its names to POLICIES, ROUTERS or PREDICTORS."""
    if not path.is_file():
        raise InputError(f"plugin {path} is not a file: give the path of a Python file")
    try:
        runpy.run_path(str(path))
    except Exception as error:
        raise InputError(f"plugin {path} fails: {type(error).__name__}: {error}".replace("\n", " ")) from error


def _deployment(group: ReplicaGroup) -> Deployment:
    return deploy(
        group.model,
        group.device,
        network=group.network,
        internode_network=group.internode_network,
        parallel=group.parallel_spec(),
        scheduler=group.scheduler_spec(),
        host_overhead=group.host_overhead,
        predictor=group.predictor,
        gpu_memory_utilization=group.gpu_memory_utilization,
        num_gpu_blocks_override=group.num_gpu_blocks_override,
    )


def _resolved(config: FileConfig, kinds: list[Deployment], num_prompts: int) -> dict[str, Any]:
    """The settings with what was left open filled in, and files by their full path, so that it runs again anywhere."""
    values = config.model_dump(mode="json")
    values["num_prompts"] = num_prompts
    if config.trace is None:
        values["workload"] = config.workload or DEFAULT_LENGTHS
    if config.replicas:
        del values["num_replicas"]
    else:
        (kind,) = kinds
        values["max_num_batched_tokens"] = kind.scheduler.max_num_batched_tokens
        values["max_model_len"] = kind.scheduler.max_model_len
    values["replicas"] = [_full_paths(group) for group in config.replicas]
    values["plugin"] = [str(path.resolve()) for path in config.plugin]
    return {key: value for key, value in _full_paths(values).items() if value not in (None, "", [])}


def _full_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with each file by its full path; a known name is no file, whatever lies in this folder."""
    full = dict(settings)
    for key in ("model", "device", "network"):
        if full.get(key) and not catalog.is_name(key, full[key]):
            full[key] = str(Path(full[key]).expanduser().resolve())
    for key in ("trace", "workload"):
        if full.get(key) and (key == "trace" or full[key].endswith(".json")):
            full[key] = str(Path(full[key]).resolve())
    return full


def _default_folder(kind: Deployment, workload: str) -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    name = f"{stamp}-{kind.model.name.split('/')[-1]}-{kind.device.name}-{kind.scheduler.policy}-{Path(workload).stem}"
    return Path("runs") / name


def _progress(total: int) -> Progress:
    """A bar on a terminal, nothing in a pipe."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("requests"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    )


def _print(summary: dict[str, Any], counts: list[tuple[Deployment, int]], target: Path, console: Console) -> None:
    """What came out, for a person."""
    for kind, copies in counts:
        console.print(
            f"{copies} x {kind.model.name} on {kind.device.name}, {kind.parallel}, {kind.scheduler.policy}: "
            f"{kind.num_kv_blocks * kind.scheduler.block_size:,} tokens of KV cache",
        )
        for note in kind.notes():
            console.print(f"note: {note}", style="yellow")
        console.print(f"times: {kind.predictor.description}", style="dim")
    if len(summary["replicas"]) > 1:
        console.print(f"{len(summary['replicas'])} replicas behind a {summary['router']} router")
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("latency (s)", "mean", "P50", "P90", "P99", "max"):
        table.add_column(column, justify="left" if column.startswith("latency") else "right")
    for metric, name in METRIC_NAMES.items():
        values = [summary.get(summary_key(s, metric)) for s in ("mean", "p50", "p90", "p99", "max")]
        table.add_row(name, *("-" if value is None else f"{value / 1e3:.4g}" for value in values))
    console.print(table)
    console.print(
        f"{summary['completed']:,} requests in {summary['duration']:,.1f} s simulated"
        + (f" ({summary['dropped']:,} too long, dropped)" if summary["dropped"] else "")
        + (
            f" ({summary['trace_failures']:,} rows of the trace are failures, left out)"
            if summary["trace_failures"]
            else ""
        )
        + f": {summary['request_throughput']:.3g} requests/s, {summary['output_throughput']:,.0f} output tokens/s",
    )
    simulator = summary["simulator"]
    console.print(
        f"{simulator['batches']:,} batches in {simulator['loop_seconds']:.2f} s, "
        f"{simulator['peak_rss_bytes'] / 2**20:,.0f} MiB",
        style="dim",
    )
    console.print(f"verdict: {'; '.join(describe(summary))}", style="bold")
    console.print(f"report: {target / 'report.html'}")
