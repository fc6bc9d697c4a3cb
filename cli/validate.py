"""`windtunnel validate`: a workload on this machine's engine and in the simulator, and how far apart they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cli.bench import only_group
from cli.config import BenchConfig
from cli.engine import asynchronous, engine_device, engine_spec
from cli.output import load_plugin, progress_bar, resolved
from engine.engine_spec import EngineSpec, start
from engine.errors import InputError
from engine.executor import Executor
from engine.run_folder import run_folder, write_config
from engine.workload import Workload, WorkloadSpec, make_workload
from profiler.session import SETTINGS
from simulator.cluster import Deployment, deploy
from simulator.predictor import calibration as store
from studies.validation import METRICS, STATISTICS, compare, run_pair


def run(
    config: BenchConfig, loads: str | None, against: str | None, output_dir: Path, *, as_json: bool
) -> dict[str, Any]:
    """Run both, write `validation.json` and `validation.html`, and print how far apart they are."""
    if against is not None:
        raise InputError("--against is not there yet: validate this machine's engine by leaving it out")
    for plugin in config.plugin:
        load_plugin(plugin)
    group = only_group(config)
    spec, scheduler = engine_spec(group, config, engine_device(group.device), config.seed)
    ahead = asynchronous(group, spec)
    console = Console(stderr=as_json, highlight=False, soft_wrap=True)
    deployment = deploy(
        spec.model,
        group.device,
        network=group.network,
        internode_network=group.internode_network,
        parallel=spec.parallel,
        scheduler=scheduler,
        host_overhead=group.host_overhead,
        predictor=group.predictor,
        num_gpu_blocks_override=spec.num_blocks or 1,
        async_scheduling=ahead,
    )
    wanted = _loads(loads)
    workload_spec = config.workload_spec(spec.max_model_len)
    first = make_workload(workload_spec if not wanted else _burst(workload_spec))
    with run_folder(output_dir) as folder:
        executor = start(spec, config.executor)
        try:
            _check_machine(deployment, spec, executor)
            deployment = replace(deployment, num_kv_blocks=executor.num_blocks)
            results = _describe(config, deployment, spec, executor)
            results["loads"] = []
            capacity = None
            if wanted:
                capacity, results["capacity"] = _capacity(first, deployment, spec, executor, folder, ahead, config)
                console.print(
                    f"capacity, all requests at once: {results['capacity']['engine']:.3g} requests/s on the engine, "
                    f"{capacity:.3g} simulated ({results['capacity']['error']:+.1%})"
                )
            each: list[float | None] = [*wanted] or [None]
            for load in each:
                rate = config.request_rate if load is None or capacity is None else load * capacity
                at = replace(workload_spec, request_rate=rate, arrival=None) if load is not None else workload_spec
                workload = make_workload(at)
                name = "run" if load is None else f"load-{load:g}"
                result = _pair(workload, deployment, spec, executor, folder / name, ahead, config)
                results["loads"].append({"load": load, "request_rate": rate, **result})
                _print(results["loads"][-1], console)
        finally:
            executor.close()
        settings = resolved(config, [deployment], len(first))
        write_config(folder, {**settings, "num_gpu_blocks_override": executor.num_blocks, "async_scheduling": ahead})
        (folder / "validation.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", "utf-8")
        from studies.validation_report import write_validation

        write_validation(results, folder / "validation.html")
    console.print(f"report: {output_dir / 'validation.html'}")
    if as_json:
        print(json.dumps({**results, "output_dir": str(output_dir)}, allow_nan=False))
    return results


def _pair(
    workload: Workload,
    deployment: Deployment,
    spec: EngineSpec,
    executor: Executor,
    folder: Path,
    ahead: bool,
    config: BenchConfig,
) -> dict[str, Any]:
    """Serve and simulate one workload, and compare."""
    from studies.validation_record import curves

    with progress_bar(len(workload)) as progress:
        task = progress.add_task(f"serving {folder.name}", total=len(workload))
        pair = run_pair(
            workload,
            deployment,
            executor,
            folder,
            vocab_size=spec.model.vocab_size,
            async_scheduling=ahead,
            seed=config.seed,
            slos=config.slos(),
            on_progress=lambda finished: progress.update(task, completed=finished),
        )
    host = store.measured_host(deployment.device)
    return {**compare(pair, deployment, workload, host), "curves": curves(pair, deployment)}


def _capacity(
    burst: Workload,
    deployment: Deployment,
    spec: EngineSpec,
    executor: Executor,
    folder: Path,
    ahead: bool,
    config: BenchConfig,
) -> tuple[float, dict[str, float]]:
    """Requests/s when all come at once, which is about what a replica can carry: simulated, and both with the error."""
    pair = run_pair(
        burst,
        deployment,
        executor,
        folder / "burst",
        vocab_size=spec.model.vocab_size,
        async_scheduling=ahead,
        seed=config.seed,
    )
    real, predicted = (run.summary["request_throughput"] for run in (pair.engine, pair.simulated))
    return predicted, {"engine": real, "simulated": predicted, "error": predicted / real - 1}


def _burst(spec: WorkloadSpec) -> WorkloadSpec:
    return replace(spec, request_rate=None, arrival="burst")


def _loads(text: str | None) -> list[float]:
    if text is None:
        return []
    try:
        loads = [float(part) for part in text.split(",")]
    except ValueError:
        loads = []
    if not loads or not all(0 < load < 10 for load in loads):
        raise InputError(f"--load {text!r}: give shares of the capacity such as 0.5,0.85,0.95")
    return loads


def _check_machine(deployment: Deployment, spec: EngineSpec, executor: Executor) -> None:
    """Raise InputError if the calibration was measured on another machine, type of number or attention backend."""
    folder = store.folder_of(deployment.device)
    path = folder / SETTINGS if folder is not None else None
    if path is None or not path.is_file():
        return  # from public tables or a data sheet: what it is worth is what a validation tells
    measured = json.loads(path.read_text("utf-8"))["identity"]
    here = {"hardware": executor.hardware, "dtype": spec.dtype, "attention_backend": executor.attention_backend}
    for name, value in here.items():
        if measured[name] != value:
            raise InputError(
                f"the calibration in {folder} was measured with {name} {measured[name]!r}, and this engine has "
                f"{value!r}: profile this machine, or choose what was profiled"
            )


def _describe(config: BenchConfig, deployment: Deployment, spec: EngineSpec, executor: Executor) -> dict[str, Any]:
    """What was validated on what."""
    folder = store.folder_of(deployment.device)
    learned = store.load(folder, deployment.device) if folder is not None else None
    torch = version("torch")
    host = store.measured_host(deployment.device)
    return {
        "model": spec.model.name,
        "device": deployment.device.name,
        "hardware": executor.hardware,
        "engine": f"{spec.dtype}, {executor.attention_backend} attention, torch {torch}, {spec.parallel}",
        "predictor": deployment.predictor.description,
        "scheduler": deployment.scheduler.policy,
        "max_num_batched_tokens": deployment.scheduler.max_num_batched_tokens,
        "num_gpu_blocks": executor.num_blocks,
        "workload": config.workload or str(config.trace or "openchat_sharegpt4"),
        "version": version("windtunnel"),
        "host_overhead": None if host is None else {"iteration_s": host.iteration_s, "sequence_s": host.sequence_s},
        "operators": {} if learned is None else {kind: _short(each) for kind, each in learned.records.items()},
        "capacity": None,
    }


def _short(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: record["held_out"].get(name) for name in ("count", "mape", "p50", "p95", "bias")}


def _print(result: Mapping[str, Any], console: Console) -> None:
    """How far apart one pair of runs is."""
    where = "" if result["load"] is None else f" at {result['load']:.0%} load"
    rate = "" if result["request_rate"] is None else f" ({result['request_rate']:.3g} requests/s)"
    iterations = result["iterations"]
    console.print(f"{result['requests']:,} requests{where}{rate}, {result['engine_s']:.1f} s", style="bold")
    console.print(
        f"iterations: {iterations['count']:,}, mean error {iterations['mape']:.1%}, bias {iterations['bias']:+.1%}, "
        f"{iterations['in_range']:.0%} within the calibrated range"
    )
    batches, replay = result["batches"], result["replay"]
    first = (
        "the same sequence" if batches["same"] else f"the first that differs is number {batches['first_difference']}"
    )
    console.print(
        f"batches: {batches['engine']:,} on the engine, {batches['simulated']:,} simulated; {first}; replayed with "
        f"measured durations {'the same' if replay['same'] else 'NOT the same'}"
    )
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("latency: engine / simulated (ms), error", *STATISTICS):
        table.add_column(column, justify="left" if column not in STATISTICS else "right")
    for metric in METRICS:
        cells = []
        for statistic in STATISTICS:
            value = result["latencies"][metric].get(statistic)
            cells.append("-" if value is None else _cell(value))
        table.add_row(metric.upper(), *cells)
    console.print(table)
    throughput = result["throughput"]["output_throughput"]
    console.print(
        f"output throughput: {throughput['engine']:,.0f} / {throughput['simulated']:,.0f} tokens/s "
        f"({throughput['error']:+.1%})"
    )
    console.print(f"largest: {result['largest']}")


def _cell(value: Mapping[str, Any]) -> str:
    error = "" if value["error"] is None else f" {value['error']:+.1%}"
    return f"{1e3 * value['engine_s']:.4g} / {1e3 * value['simulated_s']:.4g}{error}"
