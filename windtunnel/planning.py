"""A plan of resolved settings: from a load and its SLOs to the cheapest fleet that holds them.

made = make_plan(settings, devices=["h100_sxm", "l40s"], prices={"h100_sxm": 2.5, "l40s": 0.9}, varied={})
print(made["best"]["replicas"], made["best"]["usd_per_hour"])
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from importlib.metadata import version
from math import inf, prod
from pathlib import Path
from typing import Any

from engine import engine_preset
from engine.documents import MOST_DIGITS
from engine.errors import InputError, unknown
from engine.results.files import write_json, write_whole
from engine.specs import DeviceSpec, catalog
from engine.specs.checks import file_name, short
from engine.specs.device_folder import folder_of
from simulator.predictor import calibration as store
from simulator.router import ROUTERS
from studies.capacity.ranges import DRAWS
from studies.capacity.sweep import MOST_POINTS, name_of
from studies.jobs.pool import in_turn, work_off, work_off_on_ray
from studies.plan.answer import summary_of
from studies.plan.planner import Candidate, Planner
from studies.words import unlike_sources
from windtunnel.capacity import open_search
from windtunnel.plan_point import forget_points, work
from windtunnel.plugins import load_plugin
from windtunnel.prices import prices_of
from windtunnel.results import PLAN_FILE
from windtunnel.run_config import full_paths, hashes
from windtunnel.settings import FileConfig, combined

ENGINE = "vllm@latest"
NUM_PROMPTS = 1024  # of a search of capacity; a fleet has FLEET_S seconds of load
MOST_GPUS = 8  # of a replica, where the layouts are left open
FAILED_FILE = "failed.json"  # where no point is left
AXES: dict[str, tuple[Any, ...]] = {  # what varies, and what it varies over where it is left open
    "engine": (ENGINE,),
    "quantization": ("auto",),
    "tensor_parallel_size": (1, 2, 4, 8),
    "pipeline_parallel_size": (1, 2),
    "data_parallel_size": (1,),
    "max_num_seqs": (None,),
    "max_num_batched_tokens": (512, 2048, 8192),
}
_WHOLE = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "max_num_seqs",
          "max_num_batched_tokens")  # fmt: skip

Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much


def listed(name: str, value: Any) -> list[Any]:
    """Return the values of an axis, of a list or of text such as "2,4,8". Raises InputError for an empty one."""
    flag = f"--{name.replace('_', '-')}"
    parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    parts = list(parts) if isinstance(parts, list | tuple) else [parts]
    if not parts or any(part in ("", None) for part in parts):
        raise InputError(f"{flag} {value!r}: give one value or several, separated by commas")
    found: list[Any] = []
    for part in parts:
        if name in _WHOLE:
            text = "" if isinstance(part, bool) else str(part)
            if not text.isdecimal() or len(text) > MOST_DIGITS or int(text) < 1:
                raise InputError(f"{flag} {short(value)}: {short(part)}: give whole numbers of at least 1")
            part = int(text)
        elif not isinstance(part, str):
            raise InputError(f"{flag} {short(value)}: {short(part)}: give names")
        if part not in found:
            found.append(part)
    return found


def make_plan(
    settings: Mapping[str, Any],
    devices: Sequence[str],
    prices: Mapping[str, float],
    varied: Mapping[str, Sequence[Any]],
    *,
    folder: Path,
    workers: int | None = None,
    ray_address: str | None = None,
    bounds: bool = True,
    on_progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Plan and return what `plan.json` holds, which is written into the folder.

    Args:
        settings: those that all points share, by the flags' names; `request_rate`, `model` and `slo` among them.
        prices: dollars per GPU-hour by device, "" for any other (`windtunnel.prices`).
        varied: values by names of AXES, for those that are not left open.
        folder: new, or of the same plan, which resumes.
        bounds: False searches every point to its end.

    Raises InputError for what can't be planned, before anything is written.
    """
    shared, rate = _shared(settings)
    specs = {_given(device): catalog.device(device) for device in devices}
    if not specs:
        raise InputError("no devices given: add --devices h100_sxm,a100_sxm")
    names = [spec.name for spec in specs.values()]
    own = dict(zip(names, prices_of(names, prices), strict=True))
    if workers is not None and workers < 1:
        raise InputError(f"--workers {workers}: give at least 1")
    candidates = _candidates(shared, specs, own, varied, folder)
    config = FileConfig(**candidates[0].job["settings"])
    known = {each: store.fingerprint(where) for each, spec in specs.items() if (where := folder_of(spec))}
    given = [*shared.values(), *specs, *varied.values()]
    files = hashes(itertools.chain.from_iterable(v if isinstance(v, list | tuple) else [v] for v in given))
    identity = {
        "plan": {"settings": {**shared}, "prices": own, "points": [each.job["settings"] for each in candidates]},
        "version": version("windtunnel"),
        "contents": {**files, **known},
        "bounds": bounds,
    }
    planner = Planner(candidates, rate, config.uncertainty or DRAWS, bounds)
    with open_search(folder, identity, "a plan"):
        try:
            _work_off(planner, workers or os.cpu_count() or 1, ray_address, on_progress)
        finally:
            forget_points()
        _check_any(planner, folder)
        best = planner.best
        assert best is not None
        found = summary_of(planner)
        found |= {
            "settings": shared,
            "gpu_price": own,
            "slos": [str(slo) for slo in config.slos()],
            "draws": planner.num_draws,
            "cpu_s": planner.cpu_s,
            "warning": unlike_sources([each["provenance"] for each in found["candidates"] if each["met"]]),
            "version": version("windtunnel"),
        }
        write_json(folder / PLAN_FILE, found)
        _write_config(folder / "best.yaml", best, found["best"]["replicas"])
    return found


def _work_off(planner: Planner, workers: int, ray_address: str | None, on_progress: Progress) -> None:
    """Do a plan's jobs, in this process, in several, or on a Ray cluster."""
    if ray_address is not None:
        results = work_off_on_ray(work, planner.jobs(), ray_address)
    elif workers == 1:
        results = in_turn(work, planner.jobs())
    else:
        results = work_off(work, planner.jobs(), workers, reuse=True)
    with closing(results):  # type: ignore[type-var]
        for job, result in results:
            planner.take(job, result)
            on_progress(*_progress(planner))


def _shared(settings: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """Return the settings that all points share, and the rate. Raises InputError for what can't be planned."""
    shared = {key: value for key, value in settings.items() if value not in (None, [], "")}
    for key in ("device", "num_replicas", "replicas"):
        if key in shared:
            fix = "name the devices with --devices" if key == "device" else "a plan finds the number of replicas"
            raise InputError(f"--{key.replace('_', '-')} {shared[key]} has no meaning in a plan: {fix}")
    if "request_rate" not in shared:
        raise InputError("no request rate to plan for: add --request-rate 40")
    try:
        rate = float(shared["request_rate"])
    except (TypeError, ValueError):
        raise InputError(f"--request-rate {shared['request_rate']}: give a number of requests/s") from None
    if not 0 < rate < inf:
        raise InputError(f"--request-rate {shared['request_rate']}: give requests/s above 0")
    if "trace" not in shared:
        shared.setdefault("num_prompts", NUM_PROMPTS)
    return shared, rate


def _given(device: str) -> str:
    """Return what the settings call a device: its whole name, or the path as it was given."""
    return catalog.device(device).name if catalog.is_name("device", device) else device


def _candidates(
    shared: Mapping[str, Any],
    specs: Mapping[str, DeviceSpec],
    own: Mapping[str, float],
    varied: Mapping[str, Sequence[Any]],
    folder: Path,
) -> list[Candidate]:
    """Return the points of the space, without those that resolve to the same replica as another.

    `specs` are the devices by what the settings call them, `own` their prices by name.
    """
    axes = {name: varied.get(name, default) for name, default in AXES.items()}
    for engine in axes["engine"]:
        for spec in specs.values():
            engine_preset.preset(engine, spec)  # raises InputError for an unknown one
    if (count := len(specs) * prod(map(len, axes.values()))) > MOST_POINTS:
        raise InputError(f"{count:,} points to plan with: give fewer values, at most {MOST_POINTS:,} in all")
    left_open = not {"tensor_parallel_size", "pipeline_parallel_size"} & set(varied)
    found: list[Candidate] = []
    seen: set[str] = set()
    checked_once = False
    for device, spec in specs.items():
        for values in itertools.product(*axes.values()):
            change = dict(zip(axes, values, strict=True))
            layout = [change[f"{each}_parallel_size"] for each in ("tensor", "pipeline", "data")]
            if left_open and layout[0] * layout[1] > MOST_GPUS:
                continue
            given = {**change, "device": device}
            config = combined(dict(shared), {k: v for k, v in given.items() if v is not None}, "the plan", FileConfig)
            if not checked_once:  # what is wrong for all points is told before any is tried
                for plugin in config.plugin:
                    load_plugin(plugin)
                catalog.model(config.model).quantized(config.quantization) if config.quantization != "auto" else None
                _check_load(config)
                checked_once = True
            shown = {"device": device, **{name: change[name] for name in axes if change[name] is not None}}
            name, of = name_of(shown), full_paths(config.model_dump(mode="json"))
            if (key := json.dumps(of, sort_keys=True)) not in seen:
                seen.add(key)  # files of one name in two folders are two points: the hash tells their trials apart
                place = file_name("the point", f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:8]}")
                job = {"name": place, "settings": of, "folder": str(folder.absolute()), "layout": layout}
                found.append(Candidate(name, spec.name, own[spec.name], job))
    return found


def _check_load(config: FileConfig) -> None:
    """Raise InputError for a workload or SLOs that can't be planned for, whatever the replica."""
    if not config.slo:
        raise InputError("no SLO to plan for: add --slo 'p99_ttft<=2' --slo 'p99_tbt<=0.1'")
    config.slos()
    model = catalog.model(config.model)
    if config.router not in ROUTERS:
        raise unknown("router", config.router, ROUTERS)
    longest = config.max_model_len or model.max_position_embeddings
    config.workload_spec(longest)


def _check_any(planner: Planner, folder: Path) -> None:
    """Raise InputError if every point was refused or has crashed, with the first one's reason, a crash before all."""
    if planner.best is None:
        first = min(planner.candidates, key=lambda each: each.outcome != "crashed")
        if first.outcome == "crashed":
            write_json(folder / FAILED_FILE, {"failed": planner.failed})
            raise InputError(f"every point of the plan failed: {first.name} crashed: {first.why}: the tracebacks are "
                             f"in {folder / FAILED_FILE}")  # fmt: skip
        of = f" (and {len(planner.candidates) - 1} more)" if len(planner.candidates) > 1 else ""
        raise InputError(f"no point of the plan can run: {first.name}{of}: {first.why}")


def _progress(planner: Planner) -> tuple[str, int, int]:
    """Return what is done of a plan, in words and numbers."""
    every = planner.candidates
    bounded = sum(bool(each.bound) or each.outcome in ("refused", "crashed") for each in every)
    if bounded < len(every):
        return "bounding points", bounded, len(every)
    draws = sum(len(each.draws) for each in planner.finalists)
    wanted = (planner.num_draws + 1) * len(planner.finalists)
    if planner.finalists:
        return "drawing capacities of the finalists", draws, wanted
    held = planner.holding
    best = f"; so far {held[0].count} x {held[0].name} at ${held[0].usd_per_hour:,.0f}/h" if held else ""
    return f"sizing fleets{best}", planner.settled, len(every)


def _write_config(path: Path, best: Candidate, replicas: int) -> None:
    """Write the best fleet as a config file that `windtunnel simulate --config` runs."""
    import yaml

    kept = {key: value for key, value in best.job["settings"].items() if value not in (None, "", [])}
    write_whole(path, yaml.safe_dump({**kept, "num_replicas": replicas}, sort_keys=False))


def default_folder(settings: Mapping[str, Any], *more: Any) -> Path:
    """Return the folder of a plan that was given none: the same command again resumes in it."""
    text = json.dumps([settings, version("windtunnel"), *more], sort_keys=True, default=str)
    model = str(settings.get("model", "")).rstrip("/").split("/")[-1] or "model"
    return Path("runs") / f"plan-{model}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def given_axes(settings: dict[str, Any]) -> dict[str, list[Any]]:
    """Take the axes out of settings and return their values."""
    names: Iterable[str] = [name for name in AXES if settings.get(name) not in (None, [])]
    return {name: listed(name, settings.pop(name)) for name in names}
