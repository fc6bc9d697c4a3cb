"""`windtunnel validate --against URL`: send a workload to a server and simulate it, and compare them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from cli.bench_url import Load, measure, prepare, summary_of, write_tables
from cli.output import progress_bar
from cli.validate import print_latencies
from engine.errors import InputError
from engine.loadgen.client import ServerFacts
from engine.results.metrics import tbt_percentiles
from engine.results.recorder import Recorder, Run
from engine.results.run_folder import kept_if_interrupted, run_folder, write_config, write_summary
from engine.results.tables import to_numpy
from simulator.cluster import Deployment, simulate
from studies.measured.readers import SERVER
from studies.validation.outside import as_served, compare_outside
from windtunnel.plugins import load_plugin
from windtunnel.run_config import resolved
from windtunnel.settings import BenchConfig, LoadConfig, ReplicaGroup


def run(
    config: BenchConfig,
    server: Mapping[str, Any],
    loads: str | None,
    served_name: str | None,
    output_dir: Path,
    *,
    as_json: bool,
) -> dict[str, Any]:
    """Measure and simulate, write `validation.json` and `validation.html`, and print and return the comparison."""
    if loads is not None:
        raise InputError(f"--load {loads} has no meaning with --against: give --request-rate or --max-concurrency")
    for plugin in config.plugin:
        load_plugin(plugin)
    groups, slos = config.groups(), config.slos()
    if len(groups) != 1:
        raise InputError("--against compares with replicas of one kind: give no replicas of several")
    (group,) = groups
    load = prepare(LoadConfig(**config.model_dump()), server, model=served_name, longest=config.max_model_len)
    group, copies, said, assumed = _as_said(config, group, load.facts)
    replica = group.replica_spec()
    if (blocks := said.get("num_gpu_blocks")) is not None and group.num_gpu_blocks_override is None:
        replica = replica.with_blocks(blocks)
    deployment = Deployment.of(replica, group.predictor)
    console = Console(stderr=as_json, highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 130)
    with run_folder(output_dir) as folder, kept_if_interrupted(folder, output_dir, "validation.json"):
        places = [folder / name for name in (SERVER, "simulated")]
        for place in places:
            place.mkdir()
        recorder = Recorder(places[0], tbt_percentiles(slos), predicted=False)
        with progress_bar("requests") as progress:
            task = progress.add_task("sending", total=len(load.workload))
            found = measure(load, recorder, lambda ended: progress.update(task, completed=ended))
        summary = summary_of(load, found, recorder, slos)
        write_tables(places[0], found)
        write_summary(places[0], summary)
        measured = Run(summary, recorder.requests(), None)
        workload = as_served(load.workload, measured.requests)
        simulated = simulate(
            workload, [deployment] * copies, router=config.router, seed=config.seed, slos=slos, folder=places[1]
        )
        write_summary(places[1], simulated.summary)
        import pyarrow.parquet as pq

        iterations = to_numpy(pq.read_table(places[1] / "iterations.parquet"))
        kv_blocks = [deployment.new_scheduler().kv_cache.num_blocks] * copies
        compared = compare_outside(measured, simulated, iterations, found.gauges(), kv_blocks)
        results = _describe(deployment, load, copies) | {
            "said": said,
            "assumed": [*assumed, *_more_assumed(deployment, load, found.uncounted)],
            "failed": sum(found.errors.values()),
            "generator_lateness_ms": summary["server"]["generator_lateness_ms"],
            "loads": [{**compared, "request_rate": load.spec.request_rate}],
        }
        results["version"] = version("windtunnel")
        resolved_config = config.model_copy(update={"num_replicas": copies})
        write_config(folder, resolved(resolved_config, [replica], len(load.workload)))
        write_summary(folder, results, "validation.json")
        from studies.pages.validation import validation_page

        validation_page(results).write(folder / "validation.html")
        if found.interrupted:
            raise KeyboardInterrupt
    _print(results, console)
    console.print(f"report: {output_dir / 'validation.html'}")
    if as_json:
        print(json.dumps({**results, "output_dir": str(output_dir)}, allow_nan=False))
    return results


def _as_said(
    config: BenchConfig, group: ReplicaGroup, facts: ServerFacts
) -> tuple[ReplicaGroup, int, dict[str, Any], list[str]]:
    """Fill in what the server says of itself and no flag does: the settings, copies, what it said, what is assumed."""
    said = {
        name: value
        for name in ("version", "max_model_len", "block_size", "num_gpu_blocks", "num_replicas", "simulated")
        if (value := getattr(facts, name)) is not None
    }
    said = {"model": facts.models[0], **said}
    changes: dict[str, Any] = {name: said[name] for name in ("max_model_len", "block_size")
               if name in said and getattr(group, name) is None}  # fmt: skip
    copies = group.count if "num_replicas" in config.model_fields_set else said.get("num_replicas", group.count)
    assumed = []
    for name, words in (
        ("max_model_len", "the longest request is the model's"),
        ("block_size", "the block size is the engine preset's"),
        ("num_gpu_blocks", "as many KV blocks as the data sheet leaves room for"),
    ):
        if name not in said and getattr(group, "num_gpu_blocks_override" if name == "num_gpu_blocks" else name) is None:
            assumed.append(words)
    if "num_replicas" not in said:
        assumed.append(f"{copies} replica{'s' * (copies > 1)}")
    return group.model_copy(update=changes), copies, said, assumed


def _more_assumed(deployment: Deployment, load: Load, uncounted: int) -> list[str]:
    replica = deployment.replica
    assumed = [
        f"the model {deployment.model.name} in {deployment.model.dtype} on {deployment.device.name}, "
        f"{deployment.parallel}",
        f"the engine {replica.engine.name} with its limits of {replica.scheduler.max_num_batched_tokens} tokens and "
        f"{replica.scheduler.max_num_seqs} sequences in a batch",
        f"prefix caching {'on' if replica.scheduler.enable_prefix_caching else 'off'}, asynchronous scheduling "
        f"{'on' if replica.async_scheduling else 'off'}",
        "no time on the network or in the server's front end beside the engine's host overhead",
    ]
    if uncounted:
        assumed.append("an event of the stream is a token, where the server counts none")
    return assumed


def _describe(deployment: Deployment, load: Load, copies: int) -> dict[str, Any]:
    """Return what was compared with what, as `validation.json` has it of an engine."""
    return {
        "against": load.facts.url,
        "model": deployment.model.name,
        "device": deployment.device.name,
        "hardware": load.facts.url,
        "engine": f"{deployment.replica.engine.name}, {deployment.model.dtype}, {deployment.parallel}",
        "num_replicas": copies,
        "predictor": deployment.predictor.description,
        "scheduler": deployment.scheduler.policy,
        "max_num_batched_tokens": deployment.scheduler.max_num_batched_tokens,
        "async_scheduling": deployment.async_scheduling,
        "num_gpu_blocks": deployment.num_kv_blocks,
        "workload": load.workload.name,
        "host_overhead": None,
        "operators": {},
        "capacity": None,
    }


def _print(results: Mapping[str, Any], console: Console) -> None:
    (load,) = results["loads"]
    console.print(f"{load['requests']:,} requests to {results['against']}, {load['engine_s']:.1f} s", style="bold")
    console.print(f"times: {results['predictor']}", style="dim")
    if results["failed"]:
        console.print(f"{results['failed']:,} requests failed and are left out", style="red")
    console.print("latencies of the server / simulated (ms), and the error:")
    print_latencies(load["latencies"], console)
    for name, found in load["gauges"].items():
        mean, peak = (f"{found[f'engine_{what}']:.3g} / {found[f'simulated_{what}']:.3g}" for what in ("mean", "max"))
        console.print(f"{name}: mean {mean}, peak {peak}")
    for line in results["assumed"]:
        console.print(f"assumed: {line}", style="dim")
    console.print(f"largest: {load['largest']}")
