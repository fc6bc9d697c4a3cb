"""How far the simulator is off: one workload on the engine and in the simulator, laid side by side, top down.

Operators (how well the calibration predicts what was held out), iterations (predicted and measured durations of the
same batches), the sequence of batches, requests, throughput. The engine's run is also replayed with its measured
durations: whether the simulator then forms the same batches tells errors of time from errors of scheduling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.results.metric_table import drawn_metrics
from engine.results.metrics import latencies, summary_key
from engine.results.recorder import Run
from engine.results.slo import SLO
from engine.results.tables import Array, Columns, to_numpy
from engine.runtime.driver import Clock
from engine.runtime.executor import Executor, RankTime
from engine.runtime.serve import serve
from engine.scheduling.request import Batch, BatchShape
from engine.workload.workload import Workload
from simulator.cluster import Deployment, simulate
from simulator.predictor.calibration_errors import errors
from simulator.replay import Measured
from studies.words import percent

STATISTICS = ("mean", "p50", "p90", "p99")
BATCH_KINDS = ("decodes alone", "prompts alone", "hybrid")


@dataclass(frozen=True)
class Pair:
    """A workload's two runs: on the engine, with every batch's shape and time on the ranks, and simulated."""

    engine: Run
    simulated: Run
    iterations: Columns  # of the engine's run
    simulated_iterations: Columns
    shapes: list[BatchShape]
    compute_s: Array  # (batches,) the slowest stage's own time, without the host's


def run_pair(
    workload: Workload,
    deployment: Deployment,
    executor: Executor,
    folder: Path | None = None,
    *,
    seed: int = 0,
    slos: Sequence[SLO] = (),
    on_progress: Callable[[int], None] | None = None,
    clock: Clock | None = None,
) -> Pair:
    """Serve `workload` on the engine, then simulate it; the tables go to `engine` and `simulated` in a folder."""
    shapes: list[BatchShape] = []
    compute: list[float] = []

    def on_batch(batch: Batch, times: Sequence[RankTime]) -> None:
        shapes.append(batch.shape)
        compute.append(max(time.end - time.start for time in times))

    ours, theirs = (None if folder is None else folder / name for name in ("engine", "simulated"))
    for place in filter(None, (ours, theirs)):
        place.mkdir(parents=True)
    engine = serve(workload, deployment.replica, executor, seed=seed, slos=slos, folder=ours,
                   on_progress=on_progress, on_batch=on_batch, clock=clock)  # fmt: skip
    simulated = simulate(workload, [deployment], seed=seed, slos=slos, folder=theirs)
    measured, predicted = _iterations(engine, ours), _iterations(simulated, theirs)
    return Pair(engine, simulated, measured, predicted, shapes, np.array(compute))


def compare(pair: Pair, deployment: Deployment, workload: Workload) -> dict[str, Any]:
    """Make every comparison of a pair of runs, as plain numbers (shares are fractions, times seconds)."""
    measured, simulated = pair.iterations, pair.simulated_iterations
    result = {
        "requests": len(workload),
        "engine_s": pair.engine.summary["duration"],
        "iterations": _iteration_errors(pair, deployment),
        "batches": _batch_sequences(measured, simulated),
        "replay": _replay(deployment, workload, measured),
        **compare_runs(pair.engine, pair.simulated, [metric.key for metric in drawn_metrics()]),
    }
    return {**result, "largest": in_words(result)}


def in_words(result: dict[str, Any]) -> str:
    """Return what contributes most to the error of the iterations' time, in a sentence."""
    parts = result["iterations"]["contributions"]
    name = max(parts, key=lambda each: abs(parts[each]))
    how = "too short" if parts[name] < 0 else "too long"
    batches = "hybrid batches" if name == "hybrid" else f"batches of {name}"
    what = f"the ranks' work in {batches}" if "host" in parts else f"the time of {batches}"
    what = "the host's part of iterations" if name == "host" else what
    return (
        f"{what} is predicted {how} by {percent(abs(parts[name]))} of the time that all batches took together, the "
        f"largest part of an error of {percent(result['iterations']['bias_of_time'], sign=True)}"
    )


def iteration_times(pair: Pair, deployment: Deployment) -> tuple[Array, Array, Array]:
    """Return measured and predicted durations (stages, batches) in s of the engine's batches, and each one's kind."""
    measured, stages = pair.iterations, range(deployment.parallel.pipeline_parallel_size)
    actual = np.stack([measured["duration_s"][measured["stage"] == stage] for stage in stages])
    stage_time = deployment.predictor.stage_time
    predicted = np.array([[stage_time(shape, stage) for shape in pair.shapes] for stage in stages])
    return actual, predicted, np.array([_kind(shape) for shape in pair.shapes])


def _iterations(run: Run, folder: Path | None) -> Columns:
    """Return a run's iterations, from memory or from its folder."""
    if run.iterations is not None:
        return run.iterations
    import pyarrow.parquet as pq  # a node that only measures may lack it

    assert folder is not None
    return to_numpy(pq.read_table(folder / "iterations.parquet"))


def _iteration_errors(pair: Pair, deployment: Deployment) -> dict[str, Any]:
    """Return errors of the engine's own batches' times on each stage, and which kinds make up that of their sum."""
    actual, predicted, kinds = iteration_times(pair, deployment)
    predictor, shapes, stages = deployment.predictor, pair.shapes, len(actual)
    by_kind = {name: errors(actual[:, kinds == name].ravel(), predicted[:, kinds == name].ravel())
               for name in BATCH_KINDS if (kinds == name).any()}  # fmt: skip
    total = float(actual.sum())
    host = deployment.host
    off, of_host = (predicted - actual).sum(axis=0), {}
    if stages == 1 and host is not None:
        ranks, layers = deployment.parallel.world_size, deployment.model.num_layers
        # what the host is predicted to add to each batch
        added = np.array([host.times(layers, each.num_decodes + len(each.prefills), ranks, 0)[1] for each in shapes])
        off = predicted[0] - added - pair.compute_s
        of_host = {"host": float((added - (actual[0] - pair.compute_s)).sum()) / total}
    contributions = {name: float(off[kinds == name].sum()) / total for name in by_kind} | of_host
    return {
        **errors(actual.ravel(), predicted.ravel()),
        "bias_of_time": float(predicted.sum()) / total - 1,
        "in_range": float(np.mean([predictor.in_range(shape) for shape in shapes])),
        "by_kind": by_kind,
        "contributions": contributions,
    }


def _kind(shape: BatchShape) -> str:
    if not shape.prefills:
        return "decodes alone"
    return "hybrid" if shape.num_decodes else "prompts alone"


def _batch_sequences(measured: Columns, simulated: Columns) -> dict[str, Any]:
    """Find where the two runs' batches first differ: an earlier or later end may let another request in."""
    names = ("num_tokens", "num_decodes", "num_prefills")
    ours, theirs = (np.stack([table[name][table["stage"] == 0] for name in names]) for table in (measured, simulated))
    count = min(ours.shape[1], theirs.shape[1])
    differ = (ours[:, :count] != theirs[:, :count]).any(axis=0)
    first = int(differ.argmax()) if differ.any() else count
    same = ours.shape == theirs.shape and first == count
    return {
        "engine": int(ours.shape[1]),
        "simulated": int(theirs.shape[1]),
        "same": same,
        "first_difference": None if same else first,
        "at_s": None if same or first >= ours.shape[1] else float(measured["start_s"][measured["stage"] == 0][first]),
    }


def _replay(deployment: Deployment, workload: Workload, measured: Columns) -> dict[str, Any]:
    """Return whether the simulator forms the engine's batches when it is given the engine's durations."""
    replayed = replace(deployment, predictor=Measured(measured, deployment.parallel.pipeline_parallel_size))
    try:
        run = simulate(workload, [replayed], repeats=False)
    except RuntimeError as error:
        return {"same": False, "first_difference": None, "why": str(error)}
    return _batch_sequences(measured, _iterations(run, None))


def compare_runs(engine: Run, simulated: Run, metrics: Sequence[str]) -> dict[str, Any]:
    """Return the latencies and the throughput of two runs on both sides, with the simulated ones' errors."""
    throughput = {}
    for key in ("request_throughput", "output_throughput", "total_token_throughput"):
        real, predicted = (run.summary[key] for run in (engine, simulated))
        throughput[key] = {"engine": real, "simulated": predicted, "error": predicted / real - 1}
    return {"latencies": _latencies(engine, simulated, metrics), "throughput": throughput}


def _latencies(engine: Run, simulated: Run, metrics: Sequence[str]) -> dict[str, Any]:
    """Return each metric's statistics on both sides (s), and how the requests' own values go together."""
    ours, theirs = (latencies(_by_id(run.requests)) for run in (engine, simulated))
    same = len(engine.requests["request_id"]) == len(simulated.requests["request_id"])
    result: dict[str, Any] = {}
    for metric in metrics:
        statistics = {}
        for statistic in STATISTICS:
            key = summary_key(statistic, metric)
            real, predicted = (run.summary.get(key) for run in (engine, simulated))
            if real is not None and predicted is not None:
                error = predicted / real - 1 if real else None
                statistics[statistic] = {"engine_s": real / 1e3, "simulated_s": predicted / 1e3, "error": error}
        result[metric] = statistics
        if same and metric in ours and len(ours[metric]) > 2 and ours[metric].std() > 0 and theirs[metric].std() > 0:
            result[metric]["pearson_r"] = float(np.corrcoef(ours[metric], theirs[metric])[0, 1])
    return result


def _by_id(requests: Columns) -> Columns:
    order = np.argsort(requests["request_id"])
    return {name: column[order] for name, column in requests.items()}
