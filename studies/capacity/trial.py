"""Trials of a capacity search: one rate each, judged by the SLOs.

The same requests come at every rate, only closer together, so that two rates differ in nothing else. A trial is given
up as soon as so many requests have missed an SLO that it can't be met any more, whatever the rest do.

    trial = simulated_trial(at_rate(spec, 2.0), deployments, slos, 2.0)
    print(trial.met, trial.binding, trial.margin)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import floor, inf, isfinite
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import InputError
from engine.results.metric_table import find_metric
from engine.results.recorder import request_row
from engine.results.slo import SLO
from engine.results.tables import Array
from engine.scheduling.request import Request
from engine.workload.workload import Workload, WorkloadSpec, make_workload
from simulator.cluster import Deployment, simulate

TIME_LIMIT = "time limit"
Watch = Callable[[Request], str | None]  # takes a finished request into account and says why the run ends, if it does


@dataclass(frozen=True)
class Trial:
    """One rate. `margin` is the worst of value / threshold over the SLOs; `binding` the SLO that has it."""

    rate: float
    met: bool
    margin: float
    binding: str
    summary: dict[str, Any]
    folder: str | None = None

    @property
    def holds(self) -> bool:
        """Every SLO is met and the queue does not grow: the rate can be kept up, not only outlasted by a short run."""
        return self.met and self.summary.get("saturation", {}).get("growing") is not True

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers; an infinite margin is None."""
        return {
            "rate": self.rate,
            "met": self.met,
            "margin": self.margin if isfinite(self.margin) else None,
            "binding_slo": self.binding,
            "folder": self.folder,
        }


def simulated_trial(
    workload: Workload, deployments: Sequence[Deployment], slos: Sequence[SLO], rate: float,
    folder: Path | None = None, router: str = "round_robin", seed: int = 0,
) -> Trial:  # fmt: skip
    """Simulate a workload that comes at `rate`; the trial is given up when an SLO can't be met any more."""
    stop = hopeless(slos, workload)
    run = simulate(workload, deployments, router=router, seed=seed, slos=slos, folder=folder, stop=stop)
    return judged(run.summary, rate, folder)


def time_limit(seconds: float | None, watch: Watch | None = None) -> Watch | None:
    """Return what ends a run with the first request that finishes after so many seconds of it, or when `watch` does."""
    if seconds is None:
        return watch
    return lambda request: (watch and watch(request)) or (TIME_LIMIT if request.token_times[-1] > seconds else None)


def judged(summary: dict[str, Any], rate: float, folder: Path | None = None) -> Trial:
    """Judge a run: whether every SLO is met, and which is nearest to its limit or farthest beyond it.

    Of one that its time limit ended, by the requests that have finished.
    """
    if not summary["slos"]:
        raise InputError("no SLO to search by: add --slo 'p99_tbt<=0.1'")
    hopeless = ended if (ended := summary.get("stopped_early")) != TIME_LIMIT else None
    margins = {
        each["slo"]: inf if each["slo"] == hopeless else (each["value_s"] or 0.0) / SLO.parse(each["slo"]).threshold_s
        for each in summary["slos"]
    }
    binding = max(margins, key=lambda name: margins[name])
    met = hopeless is None and all(each["met"] for each in summary["slos"])
    return Trial(rate, met, margins[binding], binding, summary, None if folder is None else str(folder))


def at_rate(spec: WorkloadSpec, rate: float) -> Workload:
    """Return the workload at a rate: the same requests as at any other, only closer together."""
    arrival = spec.arrival if spec.arrival in ("gamma", "static") else "poisson"
    return make_workload(replace(spec, request_rate=rate, arrival=arrival, rate_scale=1.0))


def arrivals(workload: Workload) -> int:
    """Return how many of a workload's requests arrive by themselves: a conversation arrives once, with its first."""
    return len(workload) if workload.after is None else int((workload.after < 0).sum())


def arrivals_per_request(spec: WorkloadSpec) -> float:
    """Return the share of a workload's requests that arrive by themselves."""
    return arrivals(workload := at_rate(spec, 1.0)) / len(workload) if spec.has_conversations else 1.0


def guess(spec: WorkloadSpec, deployments: Sequence[Deployment], router: str = "round_robin") -> float:
    """Return a rate near the capacity: most of what is sustained when some of the requests come all at once."""
    some = min(spec.num_prompts or 256, 256)
    few = replace(spec, request_rate=None, arrival="burst", rate_scale=1.0, num_prompts=some)
    run = simulate(make_workload(few), deployments, router=router)
    throughput: float = run.summary["request_throughput"]
    return 0.7 * throughput


def hopeless(slos: Sequence[SLO], workload: Workload) -> Watch:
    """Return what watches a run's finished requests and names the first SLO that can't be met any more, whatever comes.

    Of n values the p-th percentile lies at place p / 100 * (n - 1) among them in order, so it is beyond its threshold
    for certain when n - floor(place) values are.
    """
    every = [_Watched(slo, workload.output_tokens) for slo in slos]
    return lambda request: next((str(watched.slo) for watched in every if watched.sees(request)), None)


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
        """Take a finished request into account and return whether the SLO is hopeless now."""
        values = self._values(request)
        if self._budget is not None:
            self._left -= len(values)
            self._total += float(np.sum(values))
            least = self._metric.lower_bound_s
            return least is not None and self._total + self._left * least > self._budget
        self._missed += int(np.count_nonzero(values > self.slo.threshold_s))
        return self._missed > self._allowed

    def _values(self, request: Request) -> Array:
        """Return the values (s) that a finished request has of the metric: none, one, or one for each gap."""
        times = request.token_times
        if self._metric.value is None:
            return np.diff(np.frombuffer(times)[request.late_first_token :])
        has_one = len(times) - request.late_first_token >= self._metric.least_tokens
        return np.array([self._metric.value(request_row(request))] if has_one else [], dtype=float)
