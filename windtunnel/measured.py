"""Predicts what others measured and says how far off the predictions are: `windtunnel validate --against FILE`.

found = validate_measured(Path("silicon.csv"), {})
print(found["tpot"], found["ttft"])
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engine.errors import InputError, unknown
from engine.replica_spec import ReplicaSpec
from studies.jobs.pool import Results, in_turn, work_off
from studies.measured.adjust import UNITS, adjust, figures_of
from studies.measured.judge import point_record, summary
from studies.measured.point import MEASURES, Measurements, Point
from studies.measured.predict import Job, predict
from studies.measured.readers import read
from windtunnel.settings import FileConfig, ReplicaConfig, combined

_OWN = frozenset(ReplicaConfig.model_fields)  # settings that the points share
MOST_POINTS = 20_000
JOBS_A_PROCESS = 8  # at least: a process takes longer to start than most points


def validate_measured(
    path: Path,
    given: Mapping[str, Any],
    *,
    only: str | None = None,
    source: str | None = None,
    client: str | None = None,
    columns: str | None = None,
    warmup_requests: int | None = None,
    uncertainty: int | None = None,
    workers: int | None = 1,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:
    """Predict every point of a file or folder of measured results and return what `validation.json` holds.

    Args:
        given: settings of the replica that win over what the file and its source say.
        only: keeps the points whose id or load matches this regular expression.
        source, client, columns, warmup_requests: see `studies.measured.readers.read`.
        uncertainty: reruns of each point with drawn errors, for ranges; 19 or more give 90 % ranges.
        workers: processes; None: one a processor. More than one needs the caller's script to guard `__main__`.
        on_progress: called with how many points are predicted, and of how many.

    Raises InputError for a file that can't be read, and for a setting that has no meaning for measured results.
    """
    files, ready, refused = read_points(path, given, source, client, columns, warmup_requests, only)
    return _predicted(path, (files, with_draws(ready, uncertainty), refused), workers, on_progress)


def adjust_preset(
    path: Path,
    given: Mapping[str, Any],
    free: Sequence[str] = (),
    *,
    only: str | None = None,
    source: str | None = None,
    client: str | None = None,
    columns: str | None = None,
    warmup_requests: int | None = None,
    workers: int | None = 1,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:
    """Fit the host constants of an engine preset to measured results; return a preset, and the errors before and after.

    `free` names the constants (empty: those that the engine has); `only` keeps the points whose id or load it matches.
    What comes back has the `preset` (keys of an engine's file), its `margins` (s, 90 %), the `alike` pairs of
    constants that the points can't tell apart, and the errors `before` and `after`, of the points fitted to.
    """
    _, kept, refused = read_points(path, given, source, client, columns, warmup_requests, only)
    names = sorted({each.replica.engine.name for each in kept})
    if len(names) > 1:
        raise InputError(f"{path} has points of {' and '.join(names)}: give --engine, or --only some of them")
    host = kept[0].replica.engine.host
    for name in free:
        if name not in UNITS:
            raise unknown("constant", name, UNITS)
    figures = sum(len(figures_of(each.point)) for each in kept)
    chosen = tuple(free) or (_HIDDEN if host.hidden else _SERIAL)[: max(1, figures - 1)]
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

    before = {name: float(getattr(host, name)) for name in chosen}
    found = adjust([each.point for each in kept], before, evaluate)
    errors = [
        summary([point_record(each.point, each.replica, result) for each, result in zip(kept, results, strict=True)], 0)
        for results in evaluate([before, found.constants])
    ]
    fitted = {**asdict(host), **found.constants}
    rows = f"{len(kept)} points of {path.name}" + (f" (those with {only!r})" if only else "")
    fitted["source"] = f"fitted by 'windtunnel calibrate adjust' to {rows}: {', '.join(chosen)}; the rest as {names[0]}"
    own = {key: value for key, value in fitted.items() if key not in ("name", "graph_sizes", "kernels")}
    return {
        "preset": {"base": names[0], "description": f"{names[0]} adjusted to {path.name}", "host": own},
        "constants": found.constants,
        "before_constants": before,
        "margins": found.margins,
        "alike": [list(pair) for pair in found.alike],
        "points": len(kept),
        "before": {name: errors[0][name] for name in MEASURES},
        "after": {name: errors[1][name] for name in MEASURES},
        "refused": [{"id": name, "why": why} for name, why in refused],
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


def read_points(
    path: Path,
    given: Mapping[str, Any],
    source: str | None = None,
    client: str | None = None,
    columns: str | None = None,
    warmup_requests: int | None = None,
    only: str | None = None,
) -> _Found:
    """Return what the file or folder holds, the points that can be predicted, and rows that can't, with the reason."""
    for name in given:
        if name not in _OWN:
            raise InputError(
                f"--{name.replace('_', '-')} {given[name]} has no meaning with --against: the load is the measured one"
            )
    files = read(path, given, source, client, columns, warmup_requests)
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
    changed: dict[str, Any] = dict(constants)
    host = replace(replica.engine.host, **changed)
    return replace(replica, engine=replace(replica.engine, host=host))


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
