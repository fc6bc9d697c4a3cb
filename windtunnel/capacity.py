"""A capacity search of resolved settings, in memory or in a folder of trials that can be resumed.

found = search_capacity(config, tolerance=0.025, folder=Path("runs/capacity"))
print(found["max_qps_under_slo"], found["binding_slo"])
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from engine.errors import InputError
from engine.replica_spec import ReplicaSpec
from engine.results.files import write_json
from engine.results.metrics import summary_key
from engine.results.run_folder import run_folder, write_config, write_summary
from engine.results.slo import SLO
from engine.workload.workload import WorkloadSpec
from simulator.cluster import Deployment
from studies.capacity.confirm import gpu_hours
from studies.capacity.search import find_capacity
from studies.capacity.trial import Trial, at_rate, guess, judged, simulated_trial
from studies.capacity.uncertainty import capacity_range, described, errors_in_words
from windtunnel.plugins import load_plugin
from windtunnel.results import SEARCH_FILE
from windtunnel.run_config import resolved
from windtunnel.settings import ENGINE_KEYS, FileConfig, ReplicaGroup

NUM_PROMPTS = 2048  # of a search, where nothing else was asked for
SETTINGS = "settings.json"
_AT_CAPACITY = {"p99_tbt_ms": summary_key("p99", "tbt"), "p50_ttft_ms": summary_key("p50", "ttft"),
                "output_throughput": "output_throughput", "mean_tpot_ms": summary_key("mean", "tpot")}  # fmt: skip


def search_capacity(settings: FileConfig, tolerance: float, folder: Path | None) -> dict[str, Any]:
    """Search the capacity of one deployment and return what `search.json` holds.

    With a folder the trials are written to `folder/trials` and those already there are kept. Raises InputError for
    settings that can't be searched with.
    """
    for plugin in settings.plugin:
        load_plugin(plugin)
    workload, slos = checked(settings)
    kinds = [(deployed(group), group.count) for group in settings.groups()]
    deployments = [kind for kind, count in kinds for _ in range(count)]

    def simulate(rate: float, partial: Path | None) -> Trial:
        requests = at_rate(workload, rate)
        made = simulated_trial(requests, deployments, slos, rate, partial, settings.router, settings.seed)
        if partial is not None:
            write_config(partial, _config(settings, [kind.replica for kind, _ in kinds], len(requests), rate))
        return made

    def trial(rate: float) -> Trial:
        if folder is None:
            return simulate(rate, None)
        return kept(folder / "trials", rate, lambda rate, partial: simulate(rate, partial).summary)

    begin = settings.request_rate or guess(workload, deployments, settings.router)
    capacity = find_capacity(trial, begin, tolerance)
    gpus = sum(kind.parallel.world_size for kind in deployments)
    things = "conversations" if workload.has_conversations and capacity.outcome != "all" else "requests"
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
    if settings.uncertainty is not None:
        found |= _ranges(settings, workload, kinds, slos, capacity.qps, tolerance, settings.uncertainty)
    if folder is not None:
        write_json(folder / SEARCH_FILE, found)
    return found


def _ranges(
    settings: FileConfig,
    workload: WorkloadSpec,
    kinds: list[tuple[Deployment, int]],
    slos: list[SLO],
    start: float,
    tolerance: float,
    draws: int,
) -> dict[str, Any]:
    """Return the range of the capacity under drawn errors; it is searched again for each draw, near `start`."""

    @cache
    def drawn(seed: int) -> list[Deployment]:
        every = [(kind.drawn(seed), count) for kind, count in kinds]
        return [kind for kind, count in every for _ in range(count)]

    def trial(seed: int, rate: float) -> Trial:
        return simulated_trial(
            at_rate(workload, rate), drawn(seed), slos, rate, router=settings.router, seed=settings.seed
        )

    begin = start or guess(workload, drawn(1), settings.router)
    found = {"max_qps_under_slo": capacity_range(trial, begin, draws, tolerance)}
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


def check_tolerance(tolerance: float) -> None:
    """Raise InputError unless it is a share."""
    if not 0 < tolerance < 1:
        raise InputError(f"tolerance {tolerance}: give a share such as 0.025")


def deployed(group: ReplicaGroup) -> Deployment:
    """Return the group's replica with its predictor."""
    return Deployment.of(group.replica_spec(), group.predictor)


def kept(folder: Path, rate: float, make: Callable[[float, Path], dict[str, Any]]) -> Trial:
    """Return the trial of a rate: the one that is in `folder` already, or what `make` returns, written there."""
    place = folder / f"{rate:.6g}"
    if not (place / "summary.json").is_file():
        with run_folder(place) as partial:
            write_summary(partial, make(rate, partial))
    return judged(json.loads((place / "summary.json").read_text("utf-8")), rate, place)


def open_search(folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder, or resume the same search in it. Raises InputError if it holds anything else."""
    path = folder / SETTINGS
    if path.is_file():
        if json.loads(path.read_text("utf-8")) != json.loads(json.dumps(settings)):
            raise InputError(f"{folder} holds a search with other settings: give another --output-dir")
    elif folder.exists() and any(folder.iterdir()):
        raise InputError(f"output folder {folder} is not empty: give another --output-dir")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)


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
