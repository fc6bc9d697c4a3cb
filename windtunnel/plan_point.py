"""One point of a plan: a replica's settings, its bound, the smallest fleet of it that holds, and its capacity's draws.

Processes of a plan import these functions by name. What a trial finds is kept in the plan's folder, under a name that
says all that it depends on within the plan, so a plan that is run again simulates only what is missing.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, lru_cache
from math import ceil, inf, isfinite
from pathlib import Path
from time import process_time
from typing import Any

from engine.results.metrics import summary_key
from engine.scheduling import policies
from engine.scheduling.request import BatchShape
from engine.workload.workload import Workload, WorkloadSpec, make_workload
from simulator.cluster import Deployment, simulate
from simulator.fleet import Fleet, Pool
from studies.capacity.search import find_capacity
from studies.capacity.trial import Trial, arrivals, at_rate, judged, simulated_trial
from studies.jobs.cache import Cache
from studies.plan.bounds import replica_bound
from studies.plan.smallest import smallest_fleet
from windtunnel.capacity import checked, deployed
from windtunnel.plugins import load_plugin
from windtunnel.settings import FileConfig

FLEET_S = 120.0  # seconds of load that a fleet is simulated under, at least
SPANS = 6.0  # and times the median E2E: as many requests are under way then as ever will be, most of the time
CURVE = (0.25, 0.5, 0.75, 1.0, 1.25, 1.6, 2.0)  # shares of the plan's load at which latencies are drawn
CURVE_S = 60.0  # seconds of load of each
DRAW_S = 120.0  # of a search of the capacity: in less a queue that fills up looks like one that grows
MOST_REQUESTS = 24_000  # of such a trial; of a fleet that takes more a slice is simulated, at its share of the rate
GROUP = 4  # replicas, at most, whose capacity behind the router is searched
TOLERANCE = 0.05  # of that search: what the draws differ by is more
_ALONE = 1e-3  # of the likely rate: requests are alone
_FEW = 256  # requests of a trial that says how far from its SLOs a point is
_STEPS = (1.15, 1.3, 1.5, 2.0, 2.0, 4.0, inf)  # of the bracket of a capacity that is nearly known
_KEPT = (  # of a trial's summary
    "duration", "completed", "request_throughput", "output_throughput", "total_token_throughput", "total_input_tokens",
    "total_output_tokens", "slos", "preemptions", "peak_kv_utilization", "steady_utilization", "saturation",
    "prefix_hit_rate", "stopped_early", "workload", "workload_notes", "router",
    *(summary_key(statistic, key) for key in ("ttft", "tbt", "tpot", "e2e", "scheduling_delay")
      for statistic in ("mean", "p50", "p90", "p99")),
)  # fmt: skip


class Point:
    """A point with what is needed to simulate it. Raises InputError for a replica that can't be."""

    def __init__(self, name: str, settings: FileConfig, folder: Path) -> None:
        self.name = name
        self.settings = settings
        self.cache = Cache(folder / "trials" / name)
        for plugin in settings.plugin:
            load_plugin(plugin)
        self.spec, self.slos = checked(settings)
        (self.group,) = settings.groups()
        self.rate = float(settings.request_rate or 0.0)

    @cached_property
    def deployment(self) -> Deployment:
        return deployed(self.group)

    @cached_property
    def workload(self) -> Workload:
        return make_workload(self.spec)

    @property
    def step(self) -> int:
        """Replicas come in multiples of those that share experts."""
        return self.group.data_parallel_size

    def fleet_spec(self, seconds: float, rate: float | None = None) -> WorkloadSpec:
        """Return the workload that lasts so long at the target rate, at least; of a trace what it has."""
        if self.spec.trace is not None:
            return self.spec
        enough = ceil((rate or self.rate) * seconds * len(self.workload) / arrivals(self.workload))
        return replace(self.spec, num_prompts=max(self.spec.num_prompts or 0, enough))

    def fleet(self, replicas: int, draw: int = 0) -> Fleet:
        """Return a fleet of the point; of a draw past 0 with errors of the predicted times, where these are known."""
        kind = self.deployment.drawn(draw) if draw else self.deployment
        return Fleet((Pool(kind, replicas),), self.settings.router)

    def fleet_trial(self, replicas: int, whole: bool = False) -> dict[str, Any]:
        """Simulate a fleet at the target rate; `whole` to its end, and every replica of it. Returns its record.

        "holds": every SLO is met and the queue does not grow.
        """

        def make() -> dict[str, Any]:
            found = run(FLEET_S)
            usual = found["summary"].get(summary_key("p50", "e2e")) or 0.0
            enough = SPANS * usual / 1e3
            return found if not found["holds"] or enough <= FLEET_S else run(enough)

        def run(seconds: float) -> dict[str, Any]:
            share = 1.0
            if not whole:
                requests = self.fleet_spec(seconds).num_prompts or 0
                some = ceil(replicas / ceil(requests / MOST_REQUESTS)) if requests else replicas
                share = self.step * ceil(some / self.step) / replicas
            fleet = self.fleet(round(replicas * share))
            rate = self.rate * share
            load = at_rate(self.fleet_spec(seconds * share), rate)
            trial = self.trial(load, fleet, rate, stop=not whole)
            return {**_kept(trial), "replicas": replicas, "simulated_replicas": fleet.replicas, "requests": len(load)}

        if whole and (found := self.cache.read(f"fleet-{replicas}")) is not None:
            ended = found["summary"].get("stopped_early") is None
            if ended and found["simulated_replicas"] == replicas:  # it was whole already
                return found
        return self.cache.kept(f"fleet-{replicas}{'-whole' if whole else ''}", make)

    def group_size(self, replicas: int, rate: float) -> int:
        """Return of how many replicas, of so many that carry `rate` each, the capacity is searched.

        As few as take the plan's least number of requests in DRAW_S, at most GROUP.
        """
        few = min(GROUP, ceil((self.spec.num_prompts or 0) / (rate * DRAW_S))) if self.spec.trace is None else GROUP
        group = min(replicas, max(few, 1))
        return max(group - group % self.step, self.step)

    def trial(self, workload: Workload, fleet: Fleet, rate: float, stop: bool = True) -> Trial:
        """Simulate a fleet at a rate; `stop` gives the trial up as soon as an SLO can't be met any more."""
        if fleet.replicas > GROUP:
            gc.collect()  # the fleet before: of many replicas, each with the blocks of its KV cache
        router, seed = fleet.router, self.settings.seed
        if stop:
            return simulated_trial(workload, fleet.deployments, self.slos, rate, None, router, seed)
        return judged(simulate(workload, fleet.deployments, router, seed, self.slos).summary, rate)

    def possible(self, likely: float) -> bool:
        """Whether one request at a time meets the SLOs."""

        def make() -> dict[str, Any]:
            rate = likely * _ALONE
            return _kept(self.trial(at_rate(self.spec, rate), self.fleet(1), rate))

        return bool(self.cache.kept(f"alone-{likely:.9g}", make)["met"])


@lru_cache(maxsize=64)
def _point(name: str, settings: str, folder: str) -> Point:
    return Point(name, FileConfig.model_validate_json(settings), Path(folder))


def forget_points() -> None:
    """Drop the points that this process has loaded: another plan's files may have changed."""
    _point.cache_clear()


def point_of(job: dict[str, Any]) -> Point:
    """Return a job's point, with what it has loaded already."""
    return _point(job["name"], json.dumps(job["settings"]), job["folder"])


def bound_point(job: dict[str, Any]) -> dict[str, Any]:
    """Return a point's description and what bounds its capacity (requests/s of a replica)."""
    point = point_of(job)

    def make() -> dict[str, Any]:
        point.workload.check_fits(point.deployment.new_scheduler())
        bound = replica_bound(point.deployment, point.workload, point.slos)
        return {
            "most": bound.most if isfinite(bound.most) else None,
            "likely": bound.likely if isfinite(bound.likely) else 0.0,
            "replica": {**point.deployment.describe(), "quantization": point.deployment.model.quantization or "none"},
            "step": point.step,
            "notes": list(point.workload.notes),
            "tokens": tokens_per_arrival(point.workload),
        }

    return {"status": "done", **point.cache.kept("bound", make)}


def tokens_per_arrival(workload: Workload) -> list[float]:
    """Return the mean prompt and output tokens of an arrival: a request, or a conversation with all its turns."""
    tokens = workload.prompt_tokens, workload.output_tokens
    return [float(each.sum()) / arrivals(workload) for each in tokens]


def size_point(job: dict[str, Any]) -> dict[str, Any]:
    """Return the smallest fleet of a point that holds, of at most `job["most"]` replicas if given, near the likely.

    "outcome" is "holds", "dismissed" (as many do not hold), or "none" (no fleet holds).
    """
    point = point_of(job)
    impossible = False

    def possible() -> bool:
        nonlocal impossible
        impossible = not point.possible(point.rate / job["likely"])
        return not impossible

    found = smallest_fleet(
        lambda replicas: bool(point.fleet_trial(replicas)["holds"]),
        job["likely"],
        least=job["least"],
        most=job["most"],
        step=point.step,
        possible=possible,
    )
    outcome = "holds" if found.replicas else "none" if impossible or job["most"] is None else "dismissed"
    trial = point.fleet_trial(found.replicas) if found.replicas else None
    missed = point.cache.read(f"fleet-{found.too_few}") if found.too_few else None
    return {"status": "done", "outcome": outcome, "replicas": found.replicas, "too_few": found.too_few,
            "trial": trial, "missed": missed}  # fmt: skip


def draw_point(job: dict[str, Any]) -> dict[str, Any]:
    """Return the capacity of a replica in a group behind the router, for one draw of what is uncertain.

    Draw 0 has the plan's own seed and the predicted times as they are; each other one a workload of its own seed and
    times with their errors drawn, which unlike candidates share as far as they have them in common. As of a fleet, a
    rate at which the queue grows is too high, even where the trial ends before an SLO is missed.
    """
    point = point_of(job)
    group = point.group_size(job["replicas"], job["start"])

    def make() -> dict[str, Any]:
        spec = point.fleet_spec(DRAW_S, job["start"] * group)
        spec = replace(spec, seed=spec.seed + job["draw"])
        fleet = point.fleet(group, job["draw"])
        trials: list[dict[str, Any]] = []

        def run(rate: float) -> Trial:
            trial = point.trial(at_rate(spec, rate * group), fleet, rate * group)
            trials.append({**_kept(trial), "rate": rate})
            return replace(trial, rate=rate, met=trial.holds)

        capacity = find_capacity(run, job["start"], TOLERANCE, _STEPS)
        qps = capacity.qps / (group if capacity.outcome == "all" else 1)
        return {"qps": qps, "outcome": capacity.outcome, "binding_slo": capacity.binding, "trials": trials}

    return {"status": "done", **point.cache.kept(f"capacity-{group}-{job['draw']}-{job['start']:.9g}", make)}


def finish_point(job: dict[str, Any]) -> dict[str, Any]:
    """Return the trial of the whole fleet at the target rate, to its end, and how long its largest batch takes."""
    point = point_of(job)
    trial = point.fleet_trial(job["replicas"], whole=True)

    def make() -> dict[str, Any]:
        return full_batch(point.deployment)

    return {"status": "done", "trial": trial, "batch": point.cache.kept("batch", make)}


def full_batch(deployment: Deployment) -> dict[str, Any]:
    """Return the time of one batch of prompt tokens up to the token budget, and of one decode alone (s)."""
    scheduler = deployment.scheduler
    tokens = min(policies.largest_batch(scheduler), scheduler.max_model_len or inf)
    full = BatchShape(int(tokens), 0, 0, ((int(tokens), 0),), 1, 0)
    one = BatchShape(1, 1, 1024, (), 1, 1)
    full_s, one_s = (
        sum(deployment.predictor.stage_time(shape, s) for s in range(deployment.parallel.pipeline_parallel_size))
        for shape in (full, one)
    )
    return {"tokens": int(tokens), "full_s": full_s, "decode_s": one_s}


def curve_point(job: dict[str, Any]) -> dict[str, Any]:
    """Return what a group of a point's replicas does under shares of a load, each trial to its end."""
    point = point_of(job)
    group = point.group_size(job["replicas"], job["start"])

    def make() -> dict[str, Any]:
        found = []
        for share in CURVE:
            rate = share * job["start"]
            few = point.fleet_spec(CURVE_S, rate * group)
            trial = point.trial(at_rate(few, rate * group), point.fleet(group), rate * group, stop=False)
            found.append({"rate": rate, "slos": trial.summary["slos"]})
        return {"curve": found}

    return {"status": "done", **point.cache.kept(f"curve-{group}-{job['start']:.9g}", make)}


def alone_point(job: dict[str, Any]) -> dict[str, Any]:
    """Return the trial of one request at a time, to its end: how far from its SLOs a point is that no fleet meets."""
    point = point_of(job)
    rate = _ALONE * (job["likely"] or 1.0)

    def make() -> dict[str, Any]:
        few = point.spec if point.spec.trace is not None else replace(point.spec, num_prompts=_FEW)
        return _kept(point.trial(at_rate(few, rate), point.fleet(1), rate, stop=False))

    return {"status": "done", "trial": point.cache.kept(f"alone-few-{rate:.9g}", make)}


def _kept(trial: Trial) -> dict[str, Any]:
    """Return what is kept of a trial; its rate is the fleet's."""
    return {
        **trial.to_json(),
        "holds": trial.holds,
        "summary": {name: trial.summary[name] for name in _KEPT if name in trial.summary},
    }


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Do a job: what it is says `job["what"]`."""
    begun = process_time()
    return {**_WORK[job["what"]](job), "cpu_s": process_time() - begun}


_WORK: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "bound": bound_point,
    "size": size_point,
    "draw": draw_point,
    "finish": finish_point,
    "alone": alone_point,
    "curve": curve_point,
}
