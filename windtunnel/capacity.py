"""A capacity search of resolved settings, in memory or in a folder of trials that can be resumed.

found = search_capacity(config, tolerance=0.025, folder=Path("runs/capacity"))
print(found["max_qps_under_slo"], found["binding_slo"])
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
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
from studies.capacity.confirm import gpu_hours
from studies.capacity.ranges import curve_shares, over_seeds
from studies.capacity.search import find_capacity
from studies.capacity.trial import Trial, arrivals_per_request, at_rate, guess, judged, simulated_trial
from studies.capacity.uncertainty import capacity_range, described, errors_in_words
from windtunnel.plugins import load_plugin
from windtunnel.results import SEARCH_FILE
from windtunnel.run_config import resolved
from windtunnel.settings import ENGINE_KEYS, SEEDS, FileConfig, ReplicaGroup

NUM_PROMPTS = 2048  # of a search, where nothing else was asked for
SETTINGS = "settings.json"
_AT_CAPACITY = {"p99_tbt_ms": summary_key("p99", "tbt"), "p50_ttft_ms": summary_key("p50", "ttft"),
                "output_throughput": "output_throughput", "mean_tpot_ms": summary_key("mean", "tpot")}  # fmt: skip


def search_capacity(
    settings: FileConfig,
    tolerance: float,
    folder: Path | None,
    *,
    seeds: int = SEEDS,
    curve: bool = True,
    keep_runs: bool = True,
) -> dict[str, Any]:
    """Search the capacity of one deployment and return what `search.json` holds.

    With a folder the trials are written to `folder/trials` and those already there are kept: as runs, or without
    `keep_runs` their settings and summaries alone. The capacity is searched again, near the first, for each further one
    of `seeds`; with `curve` loads beyond it are simulated to their end. Raises InputError for settings that can't be
    searched with.
    """
    for plugin in settings.plugin:
        load_plugin(plugin)
    workload, slos = checked(settings)
    kinds = [(deployed(group), group.count) for group in settings.groups()]
    deployments = [kind for kind, count in kinds for _ in range(count)]

    def simulate(rate: float, partial: Path | None) -> Trial:
        requests = at_rate(workload, rate)
        run = partial if keep_runs else None
        made = simulated_trial(requests, deployments, slos, rate, run, settings.router, settings.seed)
        if partial is not None:
            write_config(partial, _config(settings, [kind.replica for kind, _ in kinds], len(requests), rate))
        return made

    def trial(rate: float) -> Trial:
        if folder is None:
            return simulate(rate, None)
        return kept(folder / "trials", rate, lambda rate, partial: simulate(rate, partial).summary)

    def seeded(seed: int, rate: float) -> Trial:
        requests = at_rate(replace(workload, seed=workload.seed + seed), rate)
        return simulated_trial(requests, deployments, slos, rate, None, settings.router, settings.seed + seed)

    def to_its_end(rate: float) -> Trial:
        run = simulate_run(at_rate(workload, rate), deployments, router=settings.router, seed=settings.seed, slos=slos)
        return judged(run.summary, rate)

    begin = settings.request_rate or guess(workload, deployments, settings.router)
    per_request = arrivals_per_request(workload)
    capacity = find_capacity(trial, begin, tolerance, arrivals_per_request=per_request)
    things = "conversations" if workload.has_conversations else "requests"
    gpus = sum(kind.parallel.world_size for kind in deployments)
    found: dict[str, Any] = {
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
        "unsteady": _unsteady(capacity.best) if capacity.outcome == "found" else None,
    }
    ended = [each for each in capacity.trials if each.summary.get("stopped_early") is None]
    if settings.uncertainty is not None:
        found |= _ranges(settings, workload, kinds, slos, capacity.qps, tolerance, settings.uncertainty)
    elif capacity.outcome == "found" and seeds > 1:
        spread = over_seeds(seeded, capacity.qps, seeds, tolerance, per_request)
        per_gpu = {name: value / gpus for name, value in spread.items()}
        found |= {"seeds": seeds, "intervals": {"max_qps_under_slo": spread, "qps_per_gpu": per_gpu}}
    if capacity.outcome == "found" and curve:
        ended += [
            to_its_end(share * capacity.qps) for share in curve_shares(capacity.qps, [each.rate for each in ended])
        ]
    found["loads"] = [_load(each) for each in sorted(ended, key=lambda each: each.rate)]
    if folder is not None:
        write_json(folder / SEARCH_FILE, found)
    return found


def _load(trial: Trial) -> dict[str, Any]:
    """Return what a run to its end says of a load: its rate, its results and the value of each SLO (s)."""
    return {
        "rate": trial.rate,
        "met": trial.met,
        **_at_capacity(trial),
        "slos": {each["slo"]: each["value_s"] for each in trial.summary["slos"]},
    }


def _ranges(
    settings: FileConfig,
    workload: WorkloadSpec,
    kinds: list[tuple[Deployment, int]],
    slos: list[SLO],
    start: float,
    tolerance: float,
    draws: int,
) -> dict[str, Any]:
    """Return the range of the capacity under drawn errors and seeds; it is searched again for each, near `start`."""

    @cache
    def drawn(seed: int) -> list[Deployment]:
        every = [(kind.drawn(seed), count) for kind, count in kinds]
        return [kind for kind, count in every for _ in range(count)]

    def trial(seed: int, rate: float) -> Trial:
        requests = at_rate(replace(workload, seed=workload.seed + seed), rate)
        return simulated_trial(requests, drawn(seed), slos, rate, None, settings.router, settings.seed + seed)

    begin = start or guess(workload, drawn(1), settings.router)
    found = {"max_qps_under_slo": capacity_range(trial, begin, draws, tolerance, arrivals_per_request(workload))}
    gpus = sum(kind.parallel.world_size * count for kind, count in kinds)
    found["qps_per_gpu"] = {name: value / gpus for name, value in found["max_qps_under_slo"].items()}
    return described(found, draws, [errors_in_words(kind) for kind, _ in kinds])


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
