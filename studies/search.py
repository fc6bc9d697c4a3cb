"""The capacity search: the highest request rate at which every SLO holds, to a tolerance.

The same requests come at every rate, only closer together, so that two rates differ in nothing else. A search brackets
the capacity by doubling and halving, then bisects in the logarithm of the rate. A trial is given up as soon as so many
requests have missed an SLO that it can't be met any more, whatever the rest do.

    capacity = find_capacity(lambda rate: simulated_trial(workload_at(rate), deployments, slos), start=1.0)
    print(capacity.qps, capacity.binding)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import floor, inf, isfinite, sqrt
from pathlib import Path
from typing import Any, Literal

import numpy as np

from engine.errors import InputError
from engine.results.metric_table import find_metric
from engine.results.recorder import request_row
from engine.results.slo import SLO
from engine.results.tables import Array
from engine.scheduling.request import Request
from engine.workload.workload import Workload, WorkloadSpec, make_workload
from simulator.cluster import Deployment, simulate

TOLERANCE = 0.025
FAR = 1000.0  # a rate this many times lower or higher than the guess stands for none at all, or for all at once


@dataclass(frozen=True)
class Trial:
    """One rate. `margin` is the worst of value / threshold over the SLOs; `binding` the SLO that has it."""

    rate: float
    met: bool
    margin: float
    binding: str
    summary: dict[str, Any]
    folder: str | None = None


@dataclass(frozen=True)
class Capacity:
    """What a search found.

    `outcome` "found": `qps` meets every SLO and at most `tolerance` more misses one, `binding`. "none": not even a
    trickle meets them, `qps` is 0. "all": even all requests at once meet them, and `qps` is the throughput of that.
    """

    outcome: Literal["found", "none", "all"]
    qps: float
    binding: str | None
    tolerance: float
    trials: tuple[Trial, ...]  # in the order they were made

    @property
    def best(self) -> Trial | None:
        """The trial at the capacity."""
        return max((trial for trial in self.trials if trial.met), key=lambda trial: trial.rate, default=None)

    def describe(self) -> str:
        """The outcome in words."""
        if self.outcome == "none":
            return f"no rate meets {self.binding}, not even one request at a time"
        if self.outcome == "all":
            return f"every rate meets the SLOs, even all requests at once ({self.qps:.3g} requests/s)"
        return f"{self.qps:.3g} requests/s within the SLOs; beyond it {self.binding} is missed"

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; `max_qps_under_slo` is the capacity."""
        return {
            "max_qps_under_slo": self.qps,
            "outcome": self.outcome,
            "binding_slo": self.binding,
            "tolerance": self.tolerance,
            "trials": [
                {
                    "rate": trial.rate,
                    "met": trial.met,
                    "margin": trial.margin if isfinite(trial.margin) else None,
                    "binding_slo": trial.binding,
                    "stopped_early": trial.summary.get("stopped_early"),
                    "folder": trial.folder,
                }
                for trial in self.trials
            ],
        }


def find_capacity(run: Callable[[float], Trial], start: float, tolerance: float = TOLERANCE) -> Capacity:
    """Search from the guess `start` (requests/s): `run` makes the trial at a rate.

    Raises whatever `run` raises: a trial that crashes is no trial that misses its SLOs.
    """
    if not 0 < tolerance < 1:
        raise InputError(f"tolerance {tolerance}: give a share such as 0.025")
    trials: list[Trial] = []

    def met(rate: float) -> bool:
        trials.append(run(rate))
        return trials[-1].met

    low, high = 0.0, 0.0  # the highest rate that is known to meet the SLOs, the lowest that does not
    step = 2.0
    rate = start
    while not (low and high):
        if met(rate):
            low = rate
            rate = rate * step if rate < start * step**2 else start * FAR
            if low >= start * FAR:
                throughput = trials[-1].summary["request_throughput"]
                return Capacity("all", throughput, None, tolerance, tuple(trials))
        else:
            high = rate
            rate = rate / step if rate > start / step**2 else start / FAR
            if high <= start / FAR:
                return Capacity("none", 0.0, trials[-1].binding, tolerance, tuple(trials))
    while high > low * (1 + tolerance):
        middle = sqrt(low * high)
        if met(middle):
            low = middle
        else:
            high = middle
    over = min((trial for trial in trials if not trial.met and trial.rate >= high), key=lambda trial: trial.rate)
    return Capacity("found", low, over.binding, tolerance, tuple(trials))


def simulated_trial(
    workload: Workload,
    deployments: Sequence[Deployment],
    slos: Sequence[SLO],
    rate: float,
    folder: Path | None = None,
    router: str = "round_robin",
    seed: int = 0,
) -> Trial:
    """The trial of a workload that comes at `rate`, given up when an SLO can't be met any more."""
    watch = Hopeless(slos, workload)
    run = simulate(workload, deployments, router=router, seed=seed, slos=slos, folder=folder, stop=watch)
    return judged(run.summary, rate, folder)


def judged(summary: dict[str, Any], rate: float, folder: Path | None = None) -> Trial:
    """The verdict on a run: whether every SLO is met, and which is nearest to its limit or farthest beyond it."""
    if not summary["slos"]:
        raise InputError("no SLO to search by: add --slo 'p99_tbt<=0.1'")
    hopeless = summary.get("stopped_early")
    margins = {
        each["slo"]: inf if each["slo"] == hopeless else (each["value_s"] or 0.0) / SLO.parse(each["slo"]).threshold_s
        for each in summary["slos"]
    }
    binding = max(margins, key=lambda name: margins[name])
    met = hopeless is None and all(each["met"] for each in summary["slos"])
    return Trial(rate, met, margins[binding], binding, summary, None if folder is None else str(folder))


def at_rate(spec: WorkloadSpec, rate: float) -> Workload:
    """The same requests as at any other rate."""
    arrival = spec.arrival if spec.arrival in ("gamma", "static") else "poisson"
    return make_workload(replace(spec, request_rate=rate, arrival=arrival, rate_scale=1.0))


def guess(spec: WorkloadSpec, deployments: Sequence[Deployment], router: str = "round_robin") -> float:
    """A rate near the capacity: most of what the deployments sustain when some of the requests come all at once."""
    some = min(spec.num_prompts or 256, 256)
    few = replace(spec, request_rate=None, arrival="burst", rate_scale=1.0, num_prompts=some)
    run = simulate(make_workload(few), deployments, router=router)
    throughput: float = run.summary["request_throughput"]
    return 0.7 * throughput


class Hopeless:
    """Watches a run's finished requests: names the first SLO that can't be met any more, whatever the others do.

    Of n values the p-th percentile lies at place p / 100 * (n - 1) among them in order, so it is beyond its threshold
    for certain when n - floor(place) values are.
    """

    def __init__(self, slos: Sequence[SLO], workload: Workload) -> None:
        self._watched = [_Watched(slo, workload.output_tokens) for slo in slos]

    def __call__(self, request: Request) -> str | None:
        """To be called with each finished request; the SLO that has become hopeless, if one has."""
        for watched in self._watched:
            if watched.sees(request):
                return str(watched.slo)
        return None


class _Watched:
    """One SLO's misses so far, in a workload of requests of so many `output_tokens` (n,)."""

    def __init__(self, slo: SLO, output_tokens: Array) -> None:
        self.slo = slo
        self._metric = find_metric(slo.metric)
        self._left = count = self._metric.count(output_tokens)  # values to come
        percentile = {"mean": None, "max": 100.0}.get(slo.statistic, slo.percentile)
        self._allowed = 0 if percentile is None else count - floor(percentile / 100 * (count - 1)) - 1
        self._budget = slo.threshold_s * count if percentile is None else None  # seconds in all, of a mean
        self._missed, self._total = 0, 0.0

    def sees(self, request: Request) -> bool:
        """Take a finished request into account; whether the SLO is hopeless now."""
        values = self._values(request)
        if self._budget is not None:
            self._left -= len(values)
            self._total += float(np.sum(values))
            least = self._metric.lower_bound_s
            return least is not None and self._total + self._left * least > self._budget
        self._missed += int(np.count_nonzero(values > self.slo.threshold_s))
        return self._missed > self._allowed

    def _values(self, request: Request) -> Array:
        """The values (s) that a finished request has of the metric: none, one, or one for each gap."""
        times = request.token_times
        if self._metric.value is None:
            return np.diff(np.frombuffer(times))
        has_one = len(times) >= self._metric.least_tokens
        return np.array([self._metric.value(request_row(request))] if has_one else [], dtype=float)
