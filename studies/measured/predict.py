"""Predicts a measured point: its replica under its load, simulated, and the same figures taken of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.replica_spec import ReplicaSpec
from engine.results.metrics import latencies
from engine.results.recorder import Run
from engine.results.tables import Array, Columns
from engine.workload.workload import Workload, WorkloadSpec, make_workload
from simulator.cluster import Deployment, simulate

_STATISTICS: dict[str, Callable[[Array], float]] = {"mean": np.nanmean, "median": np.nanmedian, "max": np.nanmax}
OFTEN = 0.1  # of the batches: a replica whose requests wait for KV blocks so often is limited by them


@dataclass(frozen=True)
class Job:
    """A point to predict: what ran, under which load, and of which requests the figures are."""

    replica: ReplicaSpec
    workload: Workload | WorkloadSpec
    warmup_requests: int = 0
    statistic: str = "mean"
    predictor: str = "auto"
    per_request: bool = False
    draws: int = 0  # reruns with drawn errors of the times


def predict(job: Job) -> dict[str, Any]:
    """Return the predicted figures of a point as plain numbers: seconds, tokens/s and shares.

    `kv_limited`: requests waited for KV blocks. `in_range`: the share of the batches within the calibrated range.
    `draws`: the figures of each rerun with drawn errors.
    """
    workload = job.workload if isinstance(job.workload, Workload) else make_workload(job.workload)
    deployment = Deployment.of(job.replica, job.predictor)
    run = simulate(workload, [deployment])
    iterations = run.iterations
    assert iterations is not None
    found, values = _figures(job, run)
    replica = run.summary["replicas"][0]
    found |= {
        "duration_s": run.summary["duration"],
        "preemptions": run.summary["preemptions"],
        "kv_limited": _waited_for_blocks(iterations, job.replica),
        "in_range": float(np.mean(iterations["in_range"])),
        "where": _where(iterations, run.summary["duration"]),
        "predictor": replica["predictor"],
        "num_gpu_blocks": replica["num_gpu_blocks"],
    }
    if job.per_request:
        found["per_request"] = {name: values[name].tolist() for name in ("ttft", "e2e")}
    if job.draws:
        seeds = range(1, job.draws + 1)
        found["draws"] = [_figures(job, simulate(workload, [deployment.drawn(seed)]))[0] for seed in seeds]
    return found


def _figures(job: Job, run: Run) -> tuple[dict[str, Any], Columns]:
    """Return the figures of a run that are measured too, and its requests' latencies in the order of the workload."""
    order = np.argsort(run.requests["request_id"])
    requests = {name: column[order] for name, column in run.requests.items()}
    values = latencies(requests)
    counted = slice(job.warmup_requests, None)
    statistic = _STATISTICS[job.statistic]
    found: dict[str, Any] = {
        name: float(statistic(values[name][counted]))
        for name in ("ttft", "tpot", "e2e")
        if np.isfinite(values[name][counted]).any()
    }
    return {**found, "throughput": run.summary["output_throughput"]}, values


def _waited_for_blocks(iterations: Columns, replica: ReplicaSpec) -> bool:
    """Whether in a tenth of the batches requests waited beside free seats and a token budget that was not used up."""
    scheduler = replica.scheduler
    waited: Array = (
        (iterations["num_waiting"] > 0)
        & (iterations["num_running"] < scheduler.max_num_seqs)
        & (iterations["num_tokens"] < (scheduler.max_num_batched_tokens or math.inf))
    )
    return bool(waited.mean() > OFTEN)


def _where(iterations: Columns, duration: float) -> Mapping[str, float]:
    """Shares of the run's time: batches with prompts, batches of decodes alone, and none."""
    first = iterations["stage"] == 0
    seconds, prompts = iterations["duration_s"][first], iterations["num_prefills"][first] > 0
    shares = [float(seconds[chosen].sum()) / duration for chosen in (prompts, ~prompts)]
    return {"prompts": shares[0], "decodes": shares[1], "idle": max(0.0, 1.0 - sum(shares))}
