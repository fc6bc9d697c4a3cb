"""Predicts what others measured and says how far off the predictions are: `windtunnel validate --against FILE`.

found = validate_measured(Path("silicon.csv"), {})
print(found["tpot"], found["ttft"])
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engine.errors import InputError
from engine.replica_spec import ReplicaSpec
from studies.jobs.pool import Results, in_turn, work_off
from studies.measured.judge import point_record, summary
from studies.measured.point import Measurements, Point
from studies.measured.predict import Job, predict
from studies.measured.readers import read
from windtunnel.settings import FileConfig, ReplicaConfig, combined

_OWN = frozenset(ReplicaConfig.model_fields)  # settings that the points share
MOST_POINTS = 20_000


def validate_measured(
    path: Path,
    given: Mapping[str, Any],
    *,
    source: str | None = None,
    client: str | None = None,
    columns: str | None = None,
    warmup_requests: int | None = None,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:
    """Predict every point of a file or folder of measured results and return what `validation.json` holds.

    Args:
        given: settings of the replica that win over what the file and its source say.
        source, client, columns, warmup_requests: see `studies.measured.readers.read`.
        workers: processes; None: one a processor.
        on_progress: called with how many points are predicted, and of how many.

    Raises InputError for a file that can't be read, and for a setting that has no meaning for measured results.
    """
    for name in given:
        if name not in _OWN:
            raise InputError(
                f"--{name.replace('_', '-')} {given[name]} has no meaning with --against: the load is the measured one"
            )
    files = read(path, given, source, client, columns, warmup_requests)
    total = sum(len(file.points) for file in files)
    if total > MOST_POINTS:
        raise InputError(f"{path} holds {total:,} points: give at most {MOST_POINTS:,} at a time")
    return _together(path, files, workers, on_progress)


def _together(
    path: Path, files: list[Measurements], workers: int | None, on_progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Predict the points of all files."""
    refused = [row for file in files for row in file.refused]
    ready: list[tuple[Point, ReplicaSpec, Job]] = []
    for file in files:
        for point in file.points:
            try:
                ready.append((point, *_job(point)))
            except InputError as error:
                refused.append((point.id, str(error)))
    num_points = len(ready) + len(refused)
    if not ready:
        raise InputError(f"none of the {num_points} points of {path} can be run; the first: {refused[0][1]}")
    records: list[dict[str, Any] | None] = [None] * len(ready)
    predictors: dict[str, None] = {}
    for done, (number, result) in enumerate(_work([job for _, _, job in ready], workers), start=1):
        point, replica, _ = ready[number]
        if "status" in result:
            refused.append((point.id, str(result["error"])))
        else:
            records[number] = point_record(point, replica, result)
            predictors[result["predictor"]] = None
        on_progress(done, len(ready))
    found = [record for record in records if record is not None]
    if not found:
        raise InputError(f"none of the {num_points} points of {path} could be predicted; the first: {refused[0][1]}")
    return {
        "version": version("windtunnel"),
        "file": path.name,
        "formats": sorted({file.format for file in files}),
        "sources": sorted({file.source for file in files if file.source}),
        "assumed": list(dict.fromkeys(text for file in files for text in file.assumed)),
        "predictors": list(predictors),
        **summary(found, num_points),
        "refused": [{"id": name, "why": why} for name, why in refused],
        "records": found,
    }


def _job(point: Point) -> tuple[ReplicaSpec, Job]:
    settings = {name: value for name, value in point.settings.items() if name in _OWN}
    config = combined({}, settings, point.id, FileConfig)
    (group,) = config.groups()
    replica = group.replica_spec()
    return replica, Job(
        replica, point.workload, point.warmup_requests, point.statistic, group.predictor, bool(point.per_request)
    )


def _work(jobs: list[Job], workers: int | None) -> Results:
    count = min(workers or os.cpu_count() or 1, len(jobs))
    return in_turn(predict, jobs) if count == 1 else work_off(predict, jobs, count, reuse=True)
