"""A capacity search of resolved settings, in memory or in a folder of trials that can be resumed.

found = search_capacity(config, tolerance=0.025, folder=Path("runs/capacity"))
print(found["max_qps_under_slo"], found["binding_slo"])
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine.documents import read_json
from engine.errors import InputError, unknown
from engine.replica_spec import ReplicaSpec
from engine.results.files import write_json
from engine.results.folders import owned, remove_unfinished
from engine.results.metrics import summary_key
from engine.results.run_folder import run_folder, write_config, write_summary
from engine.results.slo import SLO
from engine.specs.checks import short
from engine.workload.workload import WorkloadSpec
from simulator.cluster import Deployment
from simulator.cluster import simulate as simulate_run
from simulator.router import ROUTERS
from studies.capacity.ranges import (
    COARSE,
    DRAWS,
    FAR_BELOW,
    LONGER,
    STEPS,
    curve_shares,
    described,
    drawn_capacity,
    errors_in_words,
    range_of_draws,
)
from studies.capacity.search import bracket, find_capacity, gpu_hours
from studies.capacity.trial import Trial, arrivals_per_request, at_rate, guess, judged, simulated_trial
from studies.jobs.cache import Cache
from windtunnel.plugins import load_plugin
from windtunnel.results import SEARCH_FILE
from windtunnel.run_config import resolved
from windtunnel.settings import ENGINE_KEYS, MOST_DRAWS, FileConfig, ReplicaGroup

NUM_PROMPTS = 2048  # of a search, where nothing else was asked for
SETTINGS = "settings.json"
DRAWS_FOLDER = "draws"  # of a search: what its range is made of
_AT_CAPACITY = {"p99_tbt_ms": summary_key("p99", "tbt"), "p50_ttft_ms": summary_key("p50", "ttft"),
                "output_throughput": "output_throughput", "mean_tpot_ms": summary_key("mean", "tpot")}  # fmt: skip


@dataclass(frozen=True)
class Draws:
    """Over how many further workloads a capacity is searched for its range, and whether with drawn errors, too."""

    count: int
    errors: bool

    @classmethod
    def of(cls, uncertainty: int | None, seeds: int | None) -> Draws:
        """Return those that the settings ask for: by default DRAWS with errors; of seeds the first is the capacity's.

        Raises InputError where they ask for both, and for a number of seeds that can't be.
        """
        if seeds is None:
            return cls(uncertainty or DRAWS, errors=True)
        if not 1 <= seeds <= MOST_DRAWS:
            raise InputError(f"--seeds {seeds}: give 1 to {MOST_DRAWS:,}")
        if uncertainty is not None:
            raise InputError(f"--seeds {seeds} draws no errors, --uncertainty {uncertainty} does: remove one")
        return cls(seeds - 1, errors=False)

    def numbers(self, found: Mapping[str, Any]) -> range:
        """Return the draws of a capacity: none of seeds alone where it is no rate beyond which an SLO is missed."""
        return range(1, self.count + 1) if self.errors or found["outcome"] == "found" else range(0)


class CapacitySearch:
    """The search of one deployment's capacity: the first, over the workload as it is, and those of its draws.

    With a folder the trials are written to `folder/trials` and those already there are kept, and so are the results in
    `folder/draws`. Raises InputError for settings that can't be searched with.
    """

    def __init__(self, settings: FileConfig, tolerance: float, folder: Path | None) -> None:
        self.tolerance, self.folder = tolerance, folder
        for plugin in settings.plugin:
            load_plugin(plugin)
        self.settings = settings
        self.workload, self.slos = checked(settings)
        self.kinds = [(deployed(group), group.count) for group in settings.groups()]
        self.deployments = [kind for kind, count in self.kinds for _ in range(count)]
        self.per_request = arrivals_per_request(self.workload)
        self._cache = None if folder is None else Cache(folder / DRAWS_FOLDER)

    def first(self, *, curve: bool = True, keep_runs: bool = True) -> dict[str, Any]:
        """Search the capacity and return what `search.json` holds, without its range.

        With `curve` loads beyond it are simulated to their end. Trials in a folder are kept as runs, or without
        `keep_runs` their settings and summaries alone.
        """
        return self._record("first", lambda: self._first(curve, keep_runs))

    def draw(self, found: Mapping[str, Any], number: int, errors: bool) -> float:
        """Return the capacity (arrivals/s) over another workload, of deployments whose errors are drawn where asked.

        `found` is what `first` gave, `number` is 1 or more.
        """

        def make() -> dict[str, Any]:
            kinds = [(kind.drawn(number) if errors else kind, count) for kind, count in self.kinds]
            deployments = [kind for kind, count in kinds for _ in range(count)]
            start = found["max_qps_under_slo"] or self._guess()
            run = partial(self._of_seed, number, deployments)
            return {"qps": drawn_capacity(run, start, self.tolerance, self.per_request)}

        return float(self._record(f"{'draw' if errors else 'seed'}-{number}", make)["qps"])

    def _first(self, curve: bool, keep_runs: bool) -> dict[str, Any]:
        workload, slos, deployments = self.workload, self.slos, self.deployments
        settings, folder = self.settings, self.folder

        def simulate(rate: float, place: Path | None) -> Trial:
            requests = at_rate(workload, rate)
            run = place if keep_runs else None
            made = simulated_trial(requests, deployments, slos, rate, run, settings.router, settings.seed)
            if place is not None:
                write_config(place, _config(settings, [kind.replica for kind, _ in self.kinds], len(requests), rate))
            return made

        def trial(rate: float) -> Trial:
            if folder is None:
                return simulate(rate, None)
            return kept(folder / "trials", rate, lambda rate, place: simulate(rate, place).summary)

        begin = settings.request_rate or self._guess()
        capacity = find_capacity(trial, begin, self.tolerance, arrivals_per_request=self.per_request)
        things = "conversations" if workload.has_conversations else "requests"
        gpus = sum(kind.parallel.world_size for kind in deployments)
        known = capacity.outcome == "found"
        unsteady = _unsteady(capacity.best) if known else None
        ended = [each for each in capacity.trials if each.summary.get("stopped_early") is None]
        if known and curve:
            shares = curve_shares(capacity.qps, [each.rate for each in ended])
            ended += [self._to_its_end(share * capacity.qps) for share in shares]
        return {
            "status": "done",
            **capacity.to_json(),
            "words": capacity.describe(things),
            "rate_of": things,
            "slos": [str(slo) for slo in slos],
            "device": deployments[0].device.name,
            "num_gpus": gpus,
            "qps_per_gpu": capacity.qps / gpus,
            "plain_search_gpu_hours": gpu_hours(capacity.trials, gpus),
            "predictor": deployments[0].predictor.description,
            **_at_capacity(capacity.best),
            "unsteady": unsteady,
            "sustained_qps": self._sustained(capacity.qps) if unsteady else None,
            "loads": [_load(each) for each in sorted(ended, key=lambda each: each.rate)],
            "errors": [errors_in_words(kind) for kind, _ in self.kinds],
        }

    def _guess(self) -> float:
        return guess(self.workload, self.deployments, self.settings.router)

    def _record(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what is kept by a name, or make and keep it."""
        return json.loads(json.dumps(make())) if self._cache is None else self._cache.kept(name, make)

    def _of_seed(self, seed: int, deployments: list[Deployment], rate: float) -> Trial:
        """Return the trial at a rate of a workload whose seed is that much higher, not kept."""
        settings = self.settings
        requests = at_rate(replace(self.workload, seed=self.workload.seed + seed), rate)
        return simulated_trial(requests, deployments, self.slos, rate, None, settings.router, settings.seed + seed)

    def _to_its_end(self, rate: float) -> Trial:
        router, seed = self.settings.router, self.settings.seed
        run = simulate_run(at_rate(self.workload, rate), self.deployments, router=router, seed=seed, slos=self.slos)
        return judged(run.summary, rate)

    def _sustained(self, start: float) -> float | None:
        """Return the highest rate up to `start` that holds over LONGER times the requests, its queue included.

        0 where a FAR_BELOW-th of it does not; None of a trace, of which there is no more.
        """
        if self.workload.trace is not None or self.workload.num_prompts is None:
            return None
        spec = replace(self.workload, num_prompts=LONGER * self.workload.num_prompts)
        router, seed = self.settings.router, self.settings.seed

        def holds(rate: float) -> bool:
            return simulated_trial(at_rate(spec, rate), self.deployments, self.slos, rate, None, router, seed).holds

        if holds(start):
            return start
        low, _ = bracket(holds, start / STEPS[0], steps=(*STEPS[:-1], 2.0), far=FAR_BELOW, tolerance=COARSE)
        return min(low or 0.0, start)


def search_capacity(
    settings: FileConfig,
    tolerance: float,
    folder: Path | None,
    *,
    seeds: int | None = None,
    curve: bool = True,
    keep_runs: bool = True,
) -> dict[str, Any]:
    """Search the capacity of one deployment and its range, and return what `search.json` holds.

    The capacity is searched again, near the first, for workloads of other seeds with errors of the predicted times
    drawn; `seeds` leaves the errors out. `curve`, `keep_runs` and the folder are as `CapacitySearch` takes them. Raises
    InputError for settings that can't be searched with.
    """
    draws = Draws.of(settings.uncertainty, seeds)
    search = CapacitySearch(settings, tolerance, folder)
    found = search.first(curve=curve, keep_runs=keep_runs)
    drawn = [search.draw(found, number, draws.errors) for number in draws.numbers(found)]
    return with_range(found, drawn, tolerance, draws, folder)


def with_range(
    found: Mapping[str, Any], drawn: Sequence[float], tolerance: float, draws: Draws, folder: Path | None
) -> dict[str, Any]:
    """Return a search with the range of its capacity by those of its draws, as `search.json` holds it; write that."""
    done = {name: value for name, value in found.items() if name != "errors"}
    if drawn:
        spread = range_of_draws(found["max_qps_under_slo"], drawn, tolerance)
        ranges = {"max_qps_under_slo": spread,
                  "qps_per_gpu": {name: value / found["num_gpus"] for name, value in spread.items()}}  # fmt: skip
        if draws.errors:
            done |= described(ranges, draws.count, found["errors"])
        else:
            done |= {"seeds": draws.count + 1, "intervals": ranges}
    if folder is not None:
        write_json(folder / SEARCH_FILE, done)
    return done


def _load(trial: Trial) -> dict[str, Any]:
    """Return what a run to its end says of a load: its rate, its results and the value of each SLO (s)."""
    return {
        "rate": trial.rate,
        "met": trial.met,
        **_at_capacity(trial),
        "slos": {each["slo"]: each["value_s"] for each in trial.summary["slos"]},
    }


def checked(settings: FileConfig) -> tuple[WorkloadSpec, list[SLO]]:
    """Return the workload and the SLOs of a search. Raises InputError for what can't be searched with."""
    slos = settings.slos()
    if not slos:
        raise InputError("no SLO to search by: add --slo 'p99_tbt<=0.1'")
    if settings.arrival in ("trace", "burst"):
        raise InputError(f"--arrival {settings.arrival} has no rate to search: leave it out")
    if settings.router not in ROUTERS:
        raise unknown("router", settings.router, ROUTERS)
    for flag, bound in (("max-concurrency", settings.max_concurrency), ("users", settings.users)):
        if bound is None:
            continue
        raise InputError(
            f"--{flag} {bound} bounds the load whatever the rate, so there is no "
            f"capacity to search: leave it out, or simulate it"
        )
    longest = min(group.replica_spec().scheduler.max_model_len or 0 for group in settings.groups())
    prompts = settings.num_prompts or (None if settings.trace is not None else NUM_PROMPTS)
    workload = settings.model_copy(update={"num_prompts": prompts, "request_rate": settings.request_rate or 1.0})
    return workload.workload_spec(longest), slos


def deployed(group: ReplicaGroup) -> Deployment:
    """Return the group's replica with its predictor."""
    return Deployment.of(group.replica_spec(), group.predictor)


def kept(folder: Path, rate: float, make: Callable[[float, Path], dict[str, Any]]) -> Trial:
    """Return the trial of a rate: the one that is in `folder` already, or what `make` returns, written there."""
    place = folder / f"{rate:.6g}"
    path = place / "summary.json"
    if not path.is_file():
        with run_folder(place) as partial:
            write_summary(partial, make(rate, partial))
    again = f"remove {place}, and the same command makes it again"
    summary = read_json(path, again)
    try:
        return judged(summary, rate, place)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{path} holds no trial ({type(error).__name__}: {error}): {again}") from None


@contextmanager
def open_search(folder: Path, settings: dict[str, Any], what: str = "a search") -> Iterator[None]:
    """Own a folder for a search, or for `what` it is: a new one, or one with the same, which resumes.

    Raises InputError if it holds anything else, or another process is at it.
    """
    path = folder / SETTINGS
    with owned(folder, ours=(SETTINGS,)):
        if path.is_file():
            if read_json(path, "give another --output-dir") != json.loads(json.dumps(settings)):
                raise InputError(f"{folder} holds {what} with other settings: give another --output-dir")
        elif any(folder.iterdir()):
            raise InputError(f"output folder {folder} is not empty: give another --output-dir")
        else:
            write_json(path, settings)
        remove_unfinished(folder)
        yield


def read_search_file(path: Path) -> dict[str, Any]:
    """Read a finished search's results. Raises InputError for a damaged file."""
    again = f"remove {path}, and the same command makes it again from the trials"
    found: Any = read_json(path, again)
    if not isinstance(found, dict) or found.get("status") != "done":
        raise InputError(f"{path} holds no results of a search: {again}")
    try:
        Found.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: {place} {short(first['input'])}: {first['msg']}: {again}") from None
    return found


class Found(BaseModel):
    """What `search.json` holds that others calculate with; the rest is kept as it is."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    max_qps_under_slo: float = Field(ge=0)
    outcome: Literal["found", "none", "all"]
    binding_slo: str | None
    words: str
    device: str
    num_gpus: int = Field(ge=1)
    qps_per_gpu: float = Field(ge=0)
    plain_search_gpu_hours: float = Field(ge=0)
    predictor: str
    p99_tbt_ms: float | None
    p50_ttft_ms: float | None
    output_throughput: float | None
    unsteady: str | None
    trials: list[dict[str, Any]]


def _config(settings: FileConfig, kinds: list[ReplicaSpec], num_prompts: int, rate: float) -> dict[str, Any]:
    """Return the settings of a trial, by which `simulate` runs it again: to its end, if it was given up."""
    found = resolved(settings, kinds, num_prompts)
    left_out = {*ENGINE_KEYS, "uncertainty"}
    return {key: value for key, value in found.items() if key not in left_out} | {"request_rate": rate}


def _at_capacity(best: Trial | None) -> dict[str, Any]:
    """Return figures of the run at the capacity."""
    summary = best.summary if best is not None else {}
    return {name: summary.get(key) for name, key in _AT_CAPACITY.items()}


def _unsteady(best: Trial | None) -> str | None:
    """Return why a capacity may not hold for more requests; None if the run at it was seen to be sustained."""
    judged_steady = best.summary["saturation"] if best is not None else {"growing": False}
    return None if judged_steady["growing"] is False else str(judged_steady["verdict"])
