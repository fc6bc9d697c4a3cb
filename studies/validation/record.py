"""What the page of a validation draws and judges, as plain numbers.

results["loads"].append({**compare(pair, deployment, workload), "curves": curves(pair, deployment)})
judge(results["loads"][-1])
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine.results.metric_table import drawn_metrics
from engine.results.metrics import QUANTILES, distributions
from engine.results.recorder import Run
from engine.results.tables import Array
from simulator.cluster import Deployment
from studies.validation.compare import Pair, iteration_times

ITERATION_TARGET = 0.05  # mean absolute error of the batches' times
LATENCY_TARGET = 0.05  # of P50 and P99
NEAR_CAPACITY_TARGET = 0.10  # of the same at a load of NEAR_CAPACITY or more, where small errors add up in the queue
NEAR_CAPACITY = 0.95
THROUGHPUT_TARGET = 0.02
MOST_POINTS = 3000  # of the batches' times


@dataclass(frozen=True)
class Judgement:
    """An error of one load, and what it may be; both as fractions. Without a target it is held to none."""

    what: str
    statistic: str
    error: float | None  # None where there is nothing to compare
    target: float | None

    @property
    def met(self) -> bool | None:
        """Whether the error is within the target; None without an error or a target."""
        return None if self.error is None or self.target is None else abs(self.error) <= self.target


def held(results: Mapping[str, Any]) -> bool:
    """Return whether a validation is held to the targets, which are those for GPUs: a CPU's is not."""
    return bool(results["device"] != "cpu" and results.get("runs_on") != "cpu")


def judge(load: Mapping[str, Any], held: bool = True) -> list[Judgement]:
    """Return the errors of one load that GPUs have a target for: always the same ones, in the same order.

    A server that was measured from outside has none of iterations, whose batches nobody saw. What is not `held` to
    the targets has none.
    """
    near = load["load"] is not None and load["load"] >= NEAR_CAPACITY
    target = NEAR_CAPACITY_TARGET if near else LATENCY_TARGET
    found = []
    if load["iterations"] is not None:
        found.append(Judgement("Iterations", "mean error", load["iterations"].get("mape"), ITERATION_TARGET))
    for metric in drawn_metrics():
        for statistic in ("p50", "p99"):
            error = load["latencies"][metric.key].get(statistic, {}).get("error")
            found.append(Judgement(metric.name, statistic.upper(), error, target))
    worst = max((each["error"] for each in load["throughput"].values()), key=abs)
    found.append(Judgement("Throughput", "", worst, THROUGHPUT_TARGET))
    return [each if held else replace(each, target=None) for each in found]


def curves(pair: Pair, deployment: Deployment) -> dict[str, Any]:
    """Return what there is to draw of a pair of runs, with five digits.

    Each drawn metric has the `engine` and the `simulated` quantiles (s) at `metrics.QUANTILES`; tbt is
    absent where no request has two tokens. `iterations` has the measured_ms, predicted_ms and kind of the engine's
    batches on each stage, or of a sample of them.
    """
    drawn = latency_curves(pair.engine, pair.simulated)
    measured, predicted, kinds = iteration_times(pair, deployment)
    chosen = np.arange(measured.size)
    if len(chosen) > MOST_POINTS:
        chosen = np.sort(np.random.default_rng(0).choice(chosen, MOST_POINTS, replace=False))
    drawn["iterations"] = {
        "measured_ms": _short(1e3 * measured.ravel()[chosen]),
        "predicted_ms": _short(1e3 * predicted.ravel()[chosen]),
        "kind": np.broadcast_to(kinds, measured.shape).ravel()[chosen].tolist(),
    }
    return drawn


def latency_curves(engine: Run, simulated: Run) -> dict[str, Any]:
    """Return the quantiles of each drawn metric on both sides."""
    runs = {"engine": _quantiles(engine), "simulated": _quantiles(simulated)}
    return {
        metric.key: {name: _short(each[metric.key]) for name, each in runs.items()}
        for metric in drawn_metrics()
        if all(metric.key in each for each in runs.values())
    }


def _quantiles(run: Run) -> dict[str, Array]:
    drawn = distributions(run.requests, run.summary)
    return {metric: np.interp(QUANTILES, quantiles, values) for metric, (quantiles, values) in drawn.items()}


def _short(values: Array) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]
