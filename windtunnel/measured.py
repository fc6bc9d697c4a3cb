"""Predicts what others measured and says how far off the predictions are: `windtunnel validate --against FILE`.

found = validate_measured(Path("silicon.csv"), {})
print(found["tpot"], found["ttft"])
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from math import inf
from pathlib import Path
from typing import Any, TypedDict, Unpack

from engine.errors import InputError, unknown
from engine.replica_spec import ReplicaSpec
from engine.specs import HostOverhead
from simulator.cluster import Deployment
from simulator.predictor.uncertainty import deviations
from studies.jobs.pool import Results, in_turn, work_off
from studies.measured.adjust import UNITS, Adjusted, adjust, figures_of
from studies.measured.effects import effects as effects_of
from studies.measured.effects import variants
from studies.measured.judge import point_record, summary
from studies.measured.point import MEASURES, Measurements, Point
from studies.measured.predict import Job, predict
from studies.measured.readers import read
from windtunnel.settings import FileConfig, ReplicaConfig, combined

_OWN = frozenset(ReplicaConfig.model_fields)  # settings that the points share
MOST_POINTS = 20_000
JOBS_A_PROCESS = 8  # at least: a process takes longer to start than most points


class Reading(TypedDict, total=False):
    """How to read measured results: `only` keeps points whose id or load matches it; else see `readers.read`."""

    only: str | None
    source: str | None
    client: str | None
    columns: str | None
    warmup_requests: int | None


def validate_measured(
    path: Path,
    given: Mapping[str, Any],
    *,
    uncertainty: int | None = None,
    effects: bool = False,
    workers: int | None = 1,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
    **reading: Unpack[Reading],
) -> dict[str, Any]:
    """Predict every point of a file or folder of measured results and return what `validation.json` holds.

    Args:
        given: settings of the replica that win over what the file and its source say.
        uncertainty: reruns of each point with drawn errors, for ranges; 19 or more give 90 % ranges.
        effects: whether to predict a few points again with other plausible values of what is assumed.
        workers: processes; None: one a processor. More than one needs the caller's script to guard `__main__`.
        on_progress: called with how many points are predicted, and of how many.
        **reading: how to read the file.

    Raises InputError for a file that can't be read, and for a setting that has no meaning for measured results.
    """
    files, ready, refused = read_points(path, given, **reading)
    found = _predicted(path, (files, with_draws(ready, uncertainty), refused), workers, on_progress)
    return {**found, "effects": _effects(ready, given, found["records"], workers) if effects else []}


def _effects(
    ready: Sequence[_Ready], given: Mapping[str, Any], records: Sequence[Mapping[str, Any]], workers: int | None
) -> list[dict[str, Any]]:
    """Return what other values of the assumptions change, of a few points."""
    tried = variants([each.point for each in ready], given)
    places: list[int] = []
    jobs = []
    for place, variant in enumerate(tried):
        try:
            jobs.append(job_of(variant.point))
        except InputError:  # a value that this replica can't have is no plausible one
            continue
        places.append(place)
    failures: dict[int, str] = {}
    after: list[Mapping[str, Any] | None] = [None] * len(tried)
    for place, record in zip(places, predict_points(jobs, workers, failures=failures), strict=True):
        after[place] = None if record is None else record["predicted"]
    by_id = {record["id"]: record["predicted"] for record in records}
    before = {i: by_id[each.point.id] for i, each in enumerate(ready) if each.point.id in by_id}
    return effects_of(tried, before, after)


def adjust_preset(
    path: Path,
    given: Mapping[str, Any],
    free: Sequence[str] = (),
    *,
    workers: int | None = 1,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
    **reading: Unpack[Reading],
) -> dict[str, Any]:
    """Fit the host constants of an engine preset to measured results; return a preset, and the errors before and after.

    `free` names the constants and kinds of operators (empty: those that the engine has, and every kind).
    What comes back has the `preset` (keys of an engine's file), its `margins` (s, 90 %), the `alike` pairs of
    constants that the points can't tell apart, and the errors `before` and `after`, of the points fitted to.
    """
    _, kept, refused = read_points(path, given, **reading)
    names = sorted({each.replica.engine.name for each in kept})
    if len(names) > 1:
        raise InputError(f"{path} has points of {' and '.join(names)}: give --engine, or --only some of them")
    host = kept[0].replica.engine.host
    known = _factors_known(kept)
    for name in free:
        if name not in UNITS and name not in known:
            raise unknown("constant", name, (*UNITS, *known))
    figures = sum(len(figures_of(each.point)) for each in kept)
    usual = (*(_HIDDEN if host.hidden else _SERIAL)[: max(1, figures - 1)], *known)
    chosen = tuple(free) or usual
    done = 0

    def evaluate(trials: Sequence[Mapping[str, float]]) -> list[list[Mapping[str, Any]]]:
        nonlocal done
        jobs = [replace(each.job, replica=_with_host(each.replica, trial)) for trial in trials for each in kept]
        results: list[Mapping[str, Any]] = [{}] * len(jobs)
        for number, result in _work(jobs, workers):
            if "status" in result:
                raise InputError(f"{kept[number % len(kept)].point.id}: {result['error']}")
            results[number] = result
            done += 1
            on_progress(done, 0)
        return [results[i : i + len(kept)] for i in range(0, len(jobs), len(kept))]

    before = {name: float(getattr(host, name)) if name in UNITS else host.factor(name) for name in chosen}
    found = adjust([each.point for each in kept], before, evaluate, known)
    errors = [
        summary([point_record(each.point, each.replica, result) for each, result in zip(kept, results, strict=True)], 0)
        for results in (found.before, found.after)
    ]
    only = reading.get("only")
    rows = f"{len(kept)} points of {path.name}" + (f" (those with {only!r})" if only else "")
    fitted = asdict(_host_with(host, found.constants))
    fitted["source"] = f"fitted by 'windtunnel calibrate adjust' to {rows}: {', '.join(chosen)}; the rest as {names[0]}"
    fitted["factors"] = dict(fitted["factors"])
    fitted["margins"] = {**dict(host.margins), **_shares_off(found)}
    own = {key: value for key, value in fitted.items() if key not in ("name", "graph_sizes", "kernels")}
    return {
        "preset": {"base": names[0], "description": f"{names[0]} adjusted to {path.name}", "host": own},
        "constants": found.constants,
        "before_constants": before,
        "margins": found.margins,
        "factors": sorted(known),
        "alike": [list(pair) for pair in found.alike],
        "flat": found.flat,
        "share": found.share,
        "points": len(kept),
        "before": {name: errors[0][name] for name in MEASURES},
        "after": {name: errors[1][name] for name in MEASURES},
        "refused": [{"id": name, "why": why} for name, why in refused],
    }


def _factors_known(ready: Sequence[_Ready]) -> dict[str, float]:
    """Return the kinds of operators of the points, with how far each may be off (`uncertainty.deviations`)."""
    found: dict[str, float] = {}
    for each in {(one.replica.model, one.replica.parallel): one for one in ready}.values():
        errors = Deployment.of(each.replica, each.job.predictor).predictor.errors
        for name, deviation in deviations(each.replica, errors).items():
            kind = name.partition(".")[0]
            if name in errors and kind != "send":
                found[kind] = max(deviation, found.get(kind, 0.0))
    return found


def _shares_off(found: Adjusted) -> dict[str, float]:
    """Return how far each constant of the host may be off as a share of it (90 %), where that is known."""
    return {
        name: float(f"{found.margins[name] / value:.3g}")
        for name, value in found.constants.items()
        if name in UNITS and value > 0 and 0 < found.margins[name] < inf
    }


# constants to fit where nothing else is asked for, the first of them where there are few figures
_SERIAL = ("iteration_s", "transit_s", "sequence_s")
_HIDDEN = ("exposed_s", "transit_s", "sampler_logit_s")


@dataclass(frozen=True)
class _Ready:
    """A point that can be predicted."""

    point: Point
    replica: ReplicaSpec
    job: Job


_Found = tuple[list[Measurements], list[_Ready], list[tuple[str, str]]]


def read_points(path: Path, given: Mapping[str, Any], **reading: Unpack[Reading]) -> _Found:
    """Return what the file or folder holds, the points that can be predicted, and rows that can't, with the reason."""
    for name in given:
        if name not in _OWN:
            raise InputError(
                f"--{name.replace('_', '-')} {given[name]} has no meaning with --against: the load is the measured one"
            )
    only = reading.get("only")
    files = read(
        path,
        given,
        reading.get("source"),
        reading.get("client"),
        reading.get("columns"),
        reading.get("warmup_requests"),
    )
    if only is not None:
        every = sum(len(file.points) + len(file.refused) for file in files)
        files = [file.only(only) for file in files]
        if not any(file.points or file.refused for file in files):
            raise InputError(f"--only {only!r}: none of the {every:,} points of {path} has it in its id or load")
    total = sum(len(file.points) for file in files)
    if total > MOST_POINTS:
        raise InputError(f"{path} holds {total:,} points: give at most {MOST_POINTS:,} at a time")
    refused = [row for file in files for row in file.refused]
    ready: list[_Ready] = []
    for file in files:
        for point in file.points:
            try:
                ready.append(job_of(point))
            except InputError as error:
                refused.append((point.id, str(error)))
    if not ready:
        raise InputError(f"none of the {len(refused)} points of {path} can be run; the first: {refused[0][1]}")
    return files, ready, refused


def _with_host(replica: ReplicaSpec, constants: Mapping[str, float]) -> ReplicaSpec:
    host = _host_with(replica.engine.host, constants)
    return replace(replica, engine=replace(replica.engine, host=host))


def _host_with(host: HostOverhead, constants: Mapping[str, float]) -> HostOverhead:
    """Return the host overhead with its fields, or factors of kinds of operators, changed."""
    seconds: dict[str, Any] = {name: value for name, value in constants.items() if name in UNITS}
    kinds = {name: value for name, value in constants.items() if name not in UNITS}
    kept = [(name, value) for name, value in host.factors if name.partition(".")[0] not in kinds]
    return replace(host, **seconds, factors=(*kept, *kinds.items()))


def _predicted(
    path: Path, found: _Found, workers: int | None, on_progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Predict the points."""
    files, ready, refused = found
    num_points = len(ready) + len(refused)
    failures: dict[int, str] = {}
    records = predict_points(ready, workers, on_progress, failures)
    refused += [(ready[number].point.id, why) for number, why in failures.items()]
    predictors = dict.fromkeys(record["predictor"] for record in records if record is not None)
    made = [record for record in records if record is not None]
    if not made:
        raise InputError(f"none of the {num_points} points of {path} could be predicted; the first: {refused[0][1]}")
    return {
        "version": version("windtunnel"),
        "file": path.name,
        "formats": sorted({file.format for file in files}),
        "sources": list(dict.fromkeys(name for file in files for name in file.sources)),
        "assumed": list(dict.fromkeys(text for file in files for text in file.every_assumption)),
        "predictors": list(predictors),
        **summary(made, num_points),
        "refused": [{"id": name, "why": why} for name, why in refused],
        "records": made,
    }


def predict_points(
    ready: Sequence[_Ready],
    workers: int | None = 1,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
    failures: dict[int, str] | None = None,
) -> list[dict[str, Any] | None]:
    """Return the record of each point (`studies.measured.judge.point_record`); None for one that fails.

    `failures` gets the reason by the point's number. A failure without it is raised as InputError.
    """
    records: list[dict[str, Any] | None] = [None] * len(ready)
    for done, (number, result) in enumerate(_work([each.job for each in ready], workers), start=1):
        one = ready[number]
        if "status" not in result:
            records[number] = point_record(one.point, one.replica, result)
        elif failures is None:
            raise InputError(f"{one.point.id}: {result['error']}")
        else:
            failures[number] = str(result["error"])
        on_progress(done, len(ready))
    return records


def with_draws(ready: Sequence[_Ready], uncertainty: int | None) -> list[_Ready]:
    """Return the points, each to be rerun so often with drawn errors."""
    return [replace(each, job=replace(each.job, draws=uncertainty or 0)) for each in ready]


def job_of(point: Point) -> _Ready:
    """Return a point with its replica and what predicts it. Raises InputError for settings that can't be."""
    settings = {name: value for name, value in point.settings.items() if name in _OWN}
    config = combined({}, settings, point.id, FileConfig)
    (group,) = config.groups()
    replica = group.replica_spec()
    job = Job(replica, point.workload, point.warmup_requests, point.statistic, group.predictor, bool(point.per_request))
    return _Ready(point, replica, job)


def _work(jobs: list[Job], workers: int | None) -> Results:
    count = min(workers or os.cpu_count() or 1, len(jobs) // JOBS_A_PROCESS)
    return in_turn(predict, jobs) if count <= 1 else work_off(predict, jobs, count, reuse=True)
