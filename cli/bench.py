"""`windtunnel bench`: serve a workload on the engine in real time, with the flags and the folder of `simulate`."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from cli.engine import engine_spec
from cli.output import default_folder, print_summary, progress_bar
from engine.errors import InputError, unknown
from engine.executors.start import start
from engine.results.run_folder import (
    keep_incomplete,
    kept_if_interrupted,
    run_folder,
    write_chrome_trace,
    write_config,
    write_summary,
)
from engine.runtime.engine_spec import EngineSpec
from engine.runtime.executor import Executor, WorkerError
from engine.runtime.serve import serve
from engine.workload.workload import make_workload
from simulator.cluster import PREDICTORS
from simulator.router import ROUTERS
from windtunnel.plugins import load_plugin
from windtunnel.run_config import resolved
from windtunnel.settings import BenchConfig, ReplicaGroup


def run(config: BenchConfig, output_dir: Path | None, *, as_json: bool, chrome_trace: bool) -> dict[str, Any]:
    """Serve `config`'s workload, write its folder, and print and return the summary."""
    for plugin in config.plugin:
        load_plugin(plugin)
    group = only_group(config)
    slos = config.slos()
    replica = group.replica_spec()
    spec = engine_spec(replica, group.model, config, config.seed)
    workload = make_workload(config.workload_spec(spec.max_model_len))
    console = Console(stderr=as_json, highlight=False, soft_wrap=True)
    check_names(config, group)
    target = output_dir or default_folder(replica, workload.name, "bench-")
    with run_folder(target) as folder, kept_if_interrupted(folder, target, "requests.parquet"):
        with progress_bar("requests") as progress:
            task = progress.add_task("starting", total=len(workload))
            executor = start(spec, config.executor)
            try:
                progress.update(task, description="serving")
                replica = replica.with_blocks(executor.num_blocks)
                write_config(folder, resolved(config, [replica], len(workload)))
                result = serve(
                    workload,
                    replica,
                    executor,
                    seed=config.seed,
                    slos=slos,
                    folder=folder,
                    on_progress=lambda finished: progress.update(task, completed=finished),
                )
            except (WorkerError, InputError) as error:
                if not (folder / "ranks.parquet").exists():  # nothing was served
                    raise
                kept = keep_incomplete(folder, target)
                raise type(error)(f"{error}. What was finished is in {kept}") from None
            finally:
                executor.close()
        summary = result.summary
        summary["version"] = version("windtunnel")
        summary["engine"] |= {"dtype": spec.dtype, "load_format": "dummy" if spec.folder is None else "safetensors"}
        summary["replicas"] = [{**replica.describe(source_of_times(executor, spec)), **summary["replicas"][0]}]
        write_summary(folder, summary)
        if chrome_trace:
            write_chrome_trace(folder)
        from studies.pages.run import write_report

        write_report(folder)
    print_summary(summary, [1], target, console)
    if as_json:
        print(json.dumps({**summary, "output_dir": str(target)}, allow_nan=False))
    return summary


def only_group(config: BenchConfig) -> ReplicaGroup:
    """Return the one replica of the settings. Raises InputError for a cluster."""
    groups = config.groups()
    if len(groups) != 1 or groups[0].count != 1:
        raise InputError("the engine runs one replica: give --num-replicas 1, or use simulate for a cluster")
    return groups[0]


def check_names(config: BenchConfig, group: ReplicaGroup) -> None:
    """Check the names that only a simulation of the run's config looks up. Raises InputError for an unknown one."""
    for what, name, known in (("predictor", group.predictor, PREDICTORS), ("router", config.router, ROUTERS)):
        if name not in known:
            raise unknown(what, name, known)


def source_of_times(executor: Executor, spec: EngineSpec) -> str:
    """Return the line that names the source of the times."""
    torch = version("torch")
    return f"measured on {executor.hardware} ({spec.dtype}, {executor.attention_backend} attention, torch {torch})"
