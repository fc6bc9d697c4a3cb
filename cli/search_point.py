"""One point of a search: its capacity in the simulator, and that capacity on this node's engine.

Both are importable by a process of their own, and go on with the trials that are in the point's folder.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cli.bench import only_group
from cli.config import ENGINE_KEYS, BenchConfig, ReplicaGroup, load
from cli.engine import engine_spec
from cli.output import load_plugin, resolved
from engine.errors import InputError
from engine.executors.start import start
from engine.replica_spec import ReplicaSpec
from engine.results.files import write_json
from engine.results.metrics import summary_key
from engine.results.run_folder import run_folder, write_config, write_summary
from engine.results.slo import SLO
from engine.runtime.serve import serve
from simulator.cluster import Deployment
from studies.capacity.confirm import confirm, gpu_hours
from studies.capacity.search import find_capacity
from studies.capacity.trial import Trial, at_rate, guess, judged, simulated_trial
from studies.validation.run import check_machine

NUM_PROMPTS = 2048  # of a search, where nothing else was asked for
RESULT = "search.json"
_AT_CAPACITY = {"p99_tbt_ms": summary_key("p99", "tbt"), "p50_ttft_ms": summary_key("p50", "ttft"),
                "output_throughput": "output_throughput", "mean_tpot_ms": summary_key("mean", "tpot")}  # fmt: skip


def search_point(point: dict[str, Any]) -> dict[str, Any]:
    """One search, in its folder."""
    folder = Path(point["folder"])
    settings = load(Path(point["config"]) if point["config"] else None, point["flags"], BenchConfig)
    for plugin in settings.plugin:
        load_plugin(plugin)
    workload, slos = checked(settings)
    kinds = [(simulated(group), group.count) for group in settings.groups()]
    deployments = [kind for kind, count in kinds for _ in range(count)]

    def simulate(rate: float, partial: Path) -> dict[str, Any]:
        requests = at_rate(workload, rate)
        made = simulated_trial(requests, deployments, slos, rate, partial, settings.router, settings.seed)
        write_config(partial, _config(settings, [kind.replica for kind, _ in kinds], len(requests), rate))
        return made.summary

    def trial(rate: float) -> Trial:
        return _kept(folder / "trials", rate, simulate)

    begin = settings.request_rate or guess(workload, deployments, settings.router)
    capacity = find_capacity(trial, begin, point["tolerance"])
    gpus = sum(kind.parallel.world_size for kind in deployments)
    found: dict[str, Any] = {
        "status": "done",
        **capacity.to_json(),
        "words": capacity.describe(),
        "slos": [str(slo) for slo in slos],
        "device": deployments[0].device.name,
        "num_gpus": gpus,
        "qps_per_gpu": capacity.qps / gpus,
        "plain_search_gpu_hours": gpu_hours(capacity.trials, gpus),
        "predictor": deployments[0].predictor.description,
        **_at_capacity(capacity.best),
        "unsteady": _unsteady(capacity.best) if capacity.outcome == "found" else None,
    }
    write_json(folder / RESULT, found)
    return found


def confirm_point(point: dict[str, Any]) -> dict[str, Any]:
    """Run a point's predicted capacity on this node's engine."""
    settings = load(Path(point["config"]) if point["config"] else None, point["flags"], BenchConfig)
    for plugin in settings.plugin:
        load_plugin(plugin)
    group = only_group(settings)
    workload, slos = checked(settings)
    replica = group.replica_spec()
    executor = start(engine_spec(replica, group.model, settings, settings.seed), settings.executor)

    def served(rate: float, partial: Path) -> dict[str, Any]:
        made = serve(
            at_rate(workload, rate),
            replica,
            executor,
            seed=settings.seed,
            slos=slos,
            folder=partial,
        )
        return made.summary

    def trial(rate: float) -> Trial:
        requests = len(at_rate(workload, rate))
        _say(f"{point['name']}: the engine at {rate:.3g} requests/s, {requests / rate:,.0f} s at least")
        made = _kept(Path(point["folder"]) / "confirm", rate, served)
        _say(f"{point['name']}: {rate:.3g} requests/s {'meets the SLOs' if made.met else f'misses {made.binding}'}")
        return made

    try:
        check_machine(replica, executor)
        found = confirm(trial, point["predicted"])
    finally:
        executor.close()
    used = gpu_hours(found.trials, replica.parallel.world_size)
    on = replica.device.runs_on
    return {"status": "done", **found.to_json(), "gpu_hours": used, "hardware": executor.hardware, "on": on}


def checked(settings: BenchConfig) -> tuple[Any, list[SLO]]:
    """The workload and the SLOs of a search; InputError for what can't be searched with."""
    slos = settings.slos()
    if not slos:
        raise InputError("no SLO to search by: add --slo 'p99_tbt<=0.1'")
    if settings.arrival in ("trace", "burst"):
        raise InputError(f"--arrival {settings.arrival} has no rate to search: leave it out")
    longest = min(group.replica_spec().scheduler.max_model_len or 0 for group in settings.groups())
    prompts = settings.num_prompts or (None if settings.trace is not None else NUM_PROMPTS)
    workload = settings.model_copy(update={"num_prompts": prompts, "request_rate": settings.request_rate or 1.0})
    return workload.workload_spec(longest), slos


def _say(text: str) -> None:
    """On the terminal, from whichever process."""
    print(text, file=sys.stderr, flush=True)


def simulated(group: ReplicaGroup) -> Deployment:
    """Return the group's replica with its predictor."""
    return Deployment.of(group.replica_spec(), group.predictor)


def _kept(folder: Path, rate: float, make: Callable[[float, Path], dict[str, Any]]) -> Trial:
    """The trial of a rate: the one that is in `folder` already, or what `make` gives, kept there."""
    place = folder / f"{rate:.6g}"
    if not (place / "summary.json").is_file():
        for unfinished in folder.glob(f".{place.name}.partial-*"):  # of a process that was killed
            shutil.rmtree(unfinished, ignore_errors=True)
        with run_folder(place) as partial:
            write_summary(partial, make(rate, partial))
    return judged(json.loads((place / "summary.json").read_text("utf-8")), rate, place)


def _config(settings: BenchConfig, kinds: list[ReplicaSpec], num_prompts: int, rate: float) -> dict[str, Any]:
    """The settings of a trial, by which `simulate` runs it again: to its end, if it was given up."""
    found = resolved(settings, kinds, num_prompts)
    return {key: value for key, value in found.items() if key not in ENGINE_KEYS} | {"request_rate": rate}


def _at_capacity(best: Trial | None) -> dict[str, Any]:
    """What the run at the capacity was like."""
    summary = best.summary if best is not None else {}
    return {name: summary.get(key) for name, key in _AT_CAPACITY.items()}


def _unsteady(best: Trial | None) -> str | None:
    """Why a capacity holds for so many requests and may not for more; None if its run was seen to be sustained."""
    judged_steady = best.summary["saturation"] if best is not None else {"growing": False}
    return None if judged_steady["growing"] is False else str(judged_steady["verdict"])
