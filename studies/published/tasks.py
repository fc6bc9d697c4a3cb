"""Computes the points of a study: a capacity search, a load, or a few predictions, and the small record each leaves.

A record is plain data: `values` by metric, `facts` in words that say why they are so, and what a figure draws.

    record = compute(expand(load("scheduler_ablation"), "sarathi_osdi24")[0])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf
from typing import Any

import numpy as np

from engine.results.metrics import summary_key
from engine.results.recorder import Run
from engine.results.slo import SLO
from engine.results.tables import Columns
from engine.scheduling.request import BatchShape
from engine.workload.workload import WorkloadSpec, make_workload
from simulator.cluster import Deployment, simulate
from studies.capacity.ranges import STEPS
from studies.capacity.search import TOLERANCE, Capacity, find_capacity, fine_capacity
from studies.capacity.trial import Trial, at_rate, guess, hopeless, judged, time_limit
from studies.published.experiment import METRICS
from studies.published.operation_split import split
from studies.published.points import Point
from studies.words import seconds

TIMELINE_POINTS = 400
FROM_THE_GUESS = (1.4, 1.4, 2.0, inf)  # steps of a search's bracket: the fewest trials, over all of the studies' points


def compute(point: Point) -> dict[str, Any]:
    """Compute the record of a point."""
    return TASKS[point.task](point, point.deployment())


def _search(point: Point, deployment: Deployment) -> dict[str, Any]:
    """Compute the capacity for each seed, and for the first the batches of the run at it."""
    slos = [SLO.parse(text) for text in point.slos]
    spec, kinds, limit_s = point.workload(), [deployment], point.time_limit_s
    best: list[Run] = []  # the run of the first seed's last trial that was met: the one at the highest rate

    def search(spec: WorkloadSpec, start: float, steps: Sequence[float]) -> Capacity:
        def trial(rate: float) -> Trial:
            workload = at_rate(spec, rate)
            run = simulate(workload, kinds, slos=slos, stop=time_limit(limit_s, hopeless(slos, workload)))
            found = judged(run.summary, rate)
            if found.met and spec.seed == point.seed:
                best[:] = [run]
            return found

        return find_capacity(trial, start, steps=steps)

    start = guess(spec, kinds)
    found = search(spec, start, FROM_THE_GUESS)
    drawn = [found.qps]
    for seed in range(point.seed + 1, point.seed + point.seeds):
        near = next((qps for qps in reversed(drawn) if qps), start)
        drawn.append(search(replace(spec, seed=seed), near, STEPS).qps)
    record: dict[str, Any] = {
        "values": {"qps": float(np.median(drawn))},
        "outcome": found.outcome,
        "binding": found.binding,
        "trials": len(found.trials),
        "tolerance": TOLERANCE,
    }
    if point.seeds > 1:
        record["draws"] = {"qps": drawn}
    facts = found.describe()
    if found.outcome == "found":
        (run,) = best
        record["batches"] = batches(run.iterations, deployment)
        facts += f"; at it, {in_words(run.summary, record['batches'])}"
    record["facts"] = facts
    if point.fine:
        stop = time_limit(limit_s)

        def met(rate: float) -> bool:
            if found.outcome == "found" and rate == found.qps:  # that trial ran to its end
                return True
            return judged(simulate(at_rate(spec, rate), kinds, slos=slos, stop=stop).summary, rate).met

        record["coarse_qps"] = found.qps
        record["fine_qps"] = fine_capacity(met, found.qps or start)
    return record


def _run(point: Point, deployment: Deployment) -> dict[str, Any]:
    """Return a load at a rate: its latencies and batches, and if asked when its tokens came."""
    run = simulate(make_workload(point.workload()), [deployment], stop=time_limit(point.time_limit_s))
    shown = batches(run.iterations, deployment)
    record = {"values": _latencies(run.summary), "batches": shown, "facts": in_words(run.summary, shown)}
    if point.timeline:
        record["timeline"] = completions(run.iterations, deployment)
    return record


def _latencies(summary: dict[str, Any]) -> dict[str, float]:
    """Return the values of a run (s; throughput in requests/s; duration is from first arrival to last token)."""
    whole = {"throughput": summary["request_throughput"], "duration": summary["duration"]}
    return {
        name: whole[name] if name in whole else summary[summary_key(*name.split("_", maxsplit=1))] / 1e3
        for name in METRICS["run"]
    }


def _last_stage(iterations: Columns | None, deployment: Deployment) -> Columns:
    assert iterations is not None
    last = iterations["stage"] == deployment.parallel.pipeline_parallel_size - 1
    return {name: column[last] for name, column in iterations.items()}


def batches(iterations: Columns | None, deployment: Deployment) -> dict[str, float]:
    """Describe a run's batches: durations (s) on the last stage, tokens, and the KV cache at its fullest."""
    rows = _last_stage(iterations, deployment)
    prefills = rows["num_prefills"] > 0
    with_prompts = rows["duration_s"][prefills]
    return {
        "count": len(rows["duration_s"]),
        "p50_s": float(np.median(rows["duration_s"])),
        "p99_s": float(np.percentile(rows["duration_s"], 99)),
        "p50_with_prompts_s": float(np.median(with_prompts)) if len(with_prompts) else 0.0,
        "with_prompts": float(prefills.mean()),
        "mean_tokens": float(rows["num_tokens"].mean()),
        "mean_decodes": float(rows["num_decodes"].mean()),
        "peak_kv": float(rows["kv_blocks"].max() / deployment.num_kv_blocks),
        "peak_running": float(rows["num_running"].max()),
        "max_num_seqs": float(deployment.scheduler.max_num_seqs),
        "kv_cache_tokens": float(deployment.num_kv_blocks * deployment.scheduler.block_size),
    }


def in_words(summary: dict[str, Any], shown: dict[str, float]) -> str:
    """Return the facts of a run that bear on why it is as fast as it is."""
    gap_s, delay_s = (summary[summary_key(*each)] / 1e3 for each in (("p99", "tbt"), ("p50", "scheduling_delay")))
    return (
        f"P99 TBT {seconds(gap_s)}, median scheduling delay {seconds(delay_s)}; a batch takes "
        f"{seconds(shown['p50_s'])} (median; "
        f"P99 {seconds(shown['p99_s'])}; {shown['with_prompts']:.0%} have prompts in them, median "
        f"{seconds(shown['p50_with_prompts_s'])}) and has {shown['mean_decodes']:.0f} decodes on average; KV "
        f"cache at most {shown['peak_kv']:.0%} full, {shown['peak_running']:.0f} of "
        f"{shown['max_num_seqs']:.0f} requests running; stages busy "
        f"{' and '.join(f'{busy:.0%}' for busy in summary['replicas'][0]['stage_utilization'])} of the time"
    )


def completions(iterations: Columns | None, deployment: Deployment) -> dict[str, list[float]]:
    """Return decodes completed by each of some moments, evenly spread over the run."""
    rows = _last_stage(iterations, deployment)
    ends = rows["start_s"] + rows["duration_s"]
    order = np.argsort(ends, kind="stable")
    ends, counts = ends[order], rows["num_decodes"][order]
    moments = np.linspace(0.0, float(ends[-1]), TIMELINE_POINTS)
    total = np.concatenate([[0], np.cumsum(counts)])
    done = total[np.searchsorted(ends, moments, side="right")]
    return {"seconds": moments.round(3).tolist(), "decodes": done.astype(float).tolist()}


def _prefill(point: Point, deployment: Deployment) -> dict[str, Any]:
    """Compute a prompt alone, in chunks or whole."""
    step, took = point.chunk or point.prompt, 0.0
    for prefix in range(0, point.prompt, step):
        chunk = min(step, point.prompt - prefix)
        ends = prefix + chunk == point.prompt
        took += _latency(deployment, BatchShape(chunk, 0, 0, ((chunk, prefix),), int(ends), 0))
    return {"values": {"seconds": took}, "facts": f"{-(-point.prompt // step)} iterations"}


def _piggyback(point: Point, deployment: Deployment) -> dict[str, Any]:
    """Compute a decode batch alone; with a chunk that fills the token budget; with a whole prompt."""
    batch = point.batch
    decodes = BatchShape(batch, batch, batch * point.context, (), batch, batch)

    def beside(tokens: int) -> float:
        both = decodes._replace(num_tokens=batch + tokens, prefills=((tokens, 0),), num_sampled=batch + 1)
        return _latency(deployment, both)

    alone, with_chunk = _latency(deployment, decodes), beside(point.chunk - batch)
    return {"values": {"alone": alone, "with_chunk": with_chunk, "with_prompt": beside(point.prompt)}, "facts": ""}


def _latency(deployment: Deployment, shape: BatchShape) -> float:
    """Return seconds from a batch's start on the first stage to its end on the last."""
    predictor, count = deployment.predictor, deployment.parallel.pipeline_parallel_size
    stages = sum(predictor.stage_time(shape, stage) for stage in range(count))
    return stages + sum(predictor.send_time(shape, stage) for stage in range(count - 1))


def _operators(point: Point, deployment: Deployment) -> dict[str, Any]:
    """Compute a prompt, a decode batch or both by kind of operator."""
    return {"values": split(deployment, point.prompt, point.batch, point.context), "facts": ""}


TASKS: dict[str, Callable[[Point, Deployment], dict[str, Any]]] = {
    "search": _search,
    "run": _run,
    "prefill": _prefill,
    "operators": _operators,
    "piggyback": _piggyback,
}
