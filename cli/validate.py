"""`windtunnel validate`: run a workload on this machine's engine and in the simulator, and compare them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cli.bench import check_names, only_group
from cli.engine import engine_spec
from cli.output import progress_bar
from engine.errors import InputError
from engine.executors.start import start
from engine.results.metric_table import METRICS
from engine.results.run_folder import keep_incomplete, kept_if_interrupted, run_folder, write_config, write_summary
from engine.runtime.executor import WorkerError
from engine.workload.workload import make_workload
from simulator.cluster import Deployment
from studies.validation.compare import STATISTICS
from studies.validation.run import Validation
from windtunnel.plugins import load_plugin
from windtunnel.run_config import resolved
from windtunnel.settings import BenchConfig

MOSTLY = 0.9  # of the batches within the calibrated range; with fewer a note is printed


def run(config: BenchConfig, loads: str | None, output_dir: Path, *, as_json: bool) -> dict[str, Any]:
    """Run both, write `validation.json` and `validation.html`, and print and return the comparison."""
    for plugin in config.plugin:
        load_plugin(plugin)
    group = only_group(config)
    check_names(config, group)
    replica = group.replica_spec()
    spec = engine_spec(replica, group.model, config, config.seed)
    # a placeholder until the engine has measured its KV blocks
    deployment = Deployment.of(replica.with_blocks(spec.num_blocks or 1), group.predictor)
    shares = _loads(loads)
    for flag, value in (("request-rate", config.request_rate), ("arrival", config.arrival)):
        if shares and value is not None:
            raise InputError(f"--{flag} {value} has no meaning with --load, which sets the rate of Poisson arrivals: "
                             "leave one out")  # fmt: skip
    workload = config.workload_spec(spec.max_model_len, burst=bool(shares))
    num_prompts = len(make_workload(workload))  # raises InputError before the wait
    validation = Validation(
        deployment=deployment, workload=workload, loads=shares, seed=config.seed, slos=config.slos()
    )
    width = None if (sys.stderr if as_json else sys.stdout).isatty() else 130
    console = Console(stderr=as_json, highlight=False, soft_wrap=True, width=width)
    with run_folder(output_dir) as folder, kept_if_interrupted(folder, output_dir, "validation.json"):

        def so_far(results: Mapping[str, Any]) -> None:
            write_summary(folder, results, "validation.json")
            if len(results["loads"]) == 1:
                console.print(f"times: {results['predictor']}", style="dim")
            _print(results["loads"][-1], console, results["predictor"].startswith("calibrated"))

        with progress_bar("requests") as progress:
            task = progress.add_task("starting", total=num_prompts)
            executor = start(spec, config.executor)
            try:
                results = validation.run(
                    executor,
                    folder,
                    lambda what, done, of: progress.update(task, description=what, completed=done, total=of),
                    so_far,
                )
            except (WorkerError, InputError) as error:
                if isinstance(error, InputError) and not (folder / "validation.json").is_file():
                    raise
                kept = keep_incomplete(folder, output_dir)
                raise type(error)(f"{error}. What was finished is in {kept}") from None
            finally:
                executor.close()
        results["version"] = version("windtunnel")
        write_config(folder, resolved(config, [replica.with_blocks(executor.num_blocks)], num_prompts))
        write_summary(folder, results, "validation.json")
        from studies.pages.validation import validation_page

        validation_page(results).write(folder / "validation.html")
    if (capacity := results["capacity"]) is not None:
        console.print(
            f"all requests at once: {capacity['engine']:.3g} requests/s on the engine, {capacity['simulated']:.3g} "
            f"simulated ({capacity['error']:+.1%})"
        )
    console.print(f"report: {output_dir / 'validation.html'}")
    if as_json:
        print(json.dumps({**results, "output_dir": str(output_dir)}, allow_nan=False))
    return results


def _loads(text: str | None) -> tuple[float, ...]:
    if text is None:
        return ()
    try:
        loads = tuple(float(part) for part in text.split(","))
    except ValueError:
        loads = ()
    if not loads or not all(0 < load < 10 for load in loads):
        raise InputError(f"--load {text!r}: give shares of the capacity such as 0.5,0.85,0.95")
    return loads


def _print(result: Mapping[str, Any], console: Console, calibrated: bool) -> None:
    """Print the comparison of one pair of runs."""
    where = "" if result["load"] is None else f" at {result['load']:.0%} load"
    rate = "" if result["request_rate"] is None else f" ({result['request_rate']:.3g} requests/s)"
    iterations = result["iterations"]
    console.print(f"{result['requests']:,} requests{where}{rate}, {result['engine_s']:.1f} s", style="bold")
    console.print(
        f"iterations: {iterations['count']:,}, mean error {iterations['mape']:.1%}, bias {iterations['bias']:+.1%}"
        + (f", {iterations['in_range']:.0%} within the calibrated range" if calibrated else "")
    )
    if calibrated and iterations["in_range"] < MOSTLY:
        console.print(
            "note: the other batches are extrapolated: their operators were not profiled, or only in smaller sizes "
            "(--max-num-seqs, --max-num-batched-tokens and --max-model-len of 'windtunnel profile')",
            style="yellow",
        )
    batches, replay = result["batches"], result["replay"]
    first = (
        "the same sequence" if batches["same"] else f"the first that differs is number {batches['first_difference']}"
    )
    console.print(
        f"batches: {batches['engine']:,} on the engine, {batches['simulated']:,} simulated; {first}; replayed with "
        f"measured durations {'the same' if replay['same'] else 'NOT the same'}"
    )
    console.print("latencies on the engine / simulated (ms), and the error:")
    print_latencies(result["latencies"], console)
    throughput = result["throughput"]["output_throughput"]
    console.print(
        f"output throughput: {throughput['engine']:,.0f} / {throughput['simulated']:,.0f} tokens/s "
        f"({throughput['error']:+.1%})"
    )
    console.print(f"largest: {result['largest']}")


def print_latencies(found: Mapping[str, Any], console: Console) -> None:
    """Print each statistic of each latency on both sides, and the error."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("")
    for statistic in STATISTICS:
        table.add_column(statistic if statistic == "mean" else statistic.upper(), justify="right")
    for key, statistics in found.items():
        values = [statistics.get(statistic) for statistic in STATISTICS]
        table.add_row(METRICS[key].name, *("-" if value is None else _cell(value) for value in values))
    console.print(table)


def _cell(value: Mapping[str, Any]) -> str:
    error = "" if value["error"] is None else f" {value['error']:+.1%}"
    return f"{1e3 * value['engine_s']:.4g} / {1e3 * value['simulated_s']:.4g}{error}"
