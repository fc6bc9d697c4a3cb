"""Runs the points of a study on every core, keeps each finished record, and resumes where it was stopped.

A point whose requests are drawn runs once for each seed; its record has the median of the values, and each draw's.

A record is kept under a hash of all it depends on, so that one of another version of the code or calibration is never
taken for this one's. A point that crashes is a crash of the study, with its error; the others are kept.

    records = run(load("capacity"), ["sarathi_osdi24"], Path("runs/capacity"))
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from studies.jobs.cache import Cache
from studies.jobs.pool import in_turn, work_off
from studies.published.experiment import CONTROLS, Experiment
from studies.published.points import Point, expand
from studies.published.tasks import compute


class Crash(NamedTuple):
    """A point that raised: its place, the error in a line, and the traceback."""

    point: str
    host: str
    error: str
    trace: str


class StudyCrashedError(RuntimeError):
    """Points crashed; the others' records are kept."""

    def __init__(self, crashes: list[Crash]) -> None:
        self.crashes = crashes
        super().__init__(f"{len(crashes)} points crashed, first {crashes[0].point}: {crashes[0].error}")


def run(
    experiment: Experiment,
    hosts: list[str],
    folder: Path,
    workers: int | None = None,
    on_progress: Callable[[str, int, int], None] = lambda what, done, of: None,
    work: Callable[[Point], dict[str, Any]] = compute,
    seeds: int = 1,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the records of every point, by host overhead and point; the same whatever the number of workers.

    The controls among `hosts` run the first seed alone.

    Raises StudyCrashedError when a point crashes, once all the others are done.
    """
    points = [point for host in hosts for point in expand(experiment, host, 1 if host in CONTROLS else seeds)]
    cache = Cache(folder / "points")
    records = {point: record for point in points if (record := cache.read(_name(point))) is not None}
    missing = [point for point in points if point not in records]
    crashes: dict[int, Crash] = {}
    on_progress("", len(records), len(points))
    workers = min(workers or os.cpu_count() or 1, len(missing))
    for number, record in work_off(work, missing, workers, reuse=True) if workers > 1 else in_turn(work, missing):
        point = missing[number]
        if "status" in record:
            error = record["error"].replace("\n", " ")
            crashes[number] = Crash(point.id, point.host, error, record.get("traceback", ""))
            continue
        records[point] = record
        cache.write(_name(point), record)
        on_progress(f"{point.id} ({point.host})", len(records), len(points))
    if crashes:
        raise StudyCrashedError([crashes[number] for number in sorted(crashes)])
    found: dict[str, dict[str, list[dict[str, Any]]]] = {host: {} for host in hosts}
    for point in points:
        found[point.host].setdefault(point.id, []).append(records[point])
    return {host: {id: merged(draws) for id, draws in places.items()} for host, places in found.items()}


def merged(draws: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the record of a point of these of its draws: medians, each draw's values, and the first one's facts."""
    if len(draws) == 1:  # or a search, which has its draws already
        return draws[0]
    each = {name: [draw["values"][name] for draw in draws] for name in draws[0]["values"]}
    return {**draws[0], "values": {name: median(values) for name, values in each.items()}, "draws": each}


def _name(point: Point) -> str:
    return f"{point.host}--{point.id.replace('/', '--')}-{point.seed}-{point.key()}"
