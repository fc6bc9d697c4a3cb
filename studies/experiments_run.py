"""Runs the points of a study on every core, keeps each finished record, and picks up where it was stopped.

A record is kept under a hash of all it depends on, so that one of another version of the code or calibration is never
taken for this one's. A point that crashes is a crash of the study, with its error; the others are kept.

    records = run(load("capacity"), ["sarathi_osdi24"], Path("runs/capacity"))
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import InputError
from studies.experiment import Experiment
from studies.experiments_points import Point, expand
from studies.experiments_work import compute

MARKER = "study.json"  # says which study a folder is of

Compute = Callable[[Point], dict[str, Any]]


@dataclass(frozen=True)
class Crash:
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


Progress = Callable[[str, int, int], None]


def run(
    experiment: Experiment,
    hosts: list[str],
    folder: Path,
    workers: int | None = None,
    on_progress: Progress = lambda what, done, of: None,
    work: Compute = compute,
) -> dict[str, dict[str, dict[str, Any]]]:
    """The records of every point, by host overhead and point; the same whatever the number of workers.

    Raises StudyCrashedError when a point does, once all the others are done.
    """
    points = [point for host in hosts for point in expand(experiment, host)]
    kept = folder / "points"
    kept.mkdir(parents=True, exist_ok=True)
    records: dict[Point, dict[str, Any]] = {}
    for point in points:
        if (record := _read(kept, point)) is not None:
            records[point] = record
    missing = [point for point in points if point not in records]
    crashes: list[Crash] = []
    on_progress("", len(records), len(points))
    for point, record in _computed(missing, workers or os.cpu_count() or 1, work):
        if isinstance(record, Crash):
            crashes.append(record)
            continue
        records[point] = record
        _write(kept, point, record)
        on_progress(f"{point.id} ({point.host})", len(records), len(points))
    if crashes:
        order = {(point.id, point.host): i for i, point in enumerate(points)}
        raise StudyCrashedError(sorted(crashes, key=lambda crash: order[crash.point, crash.host]))
    return {host: {point.id: records[point] for point in points if point.host == host} for host in hosts}


def claim_folder(folder: Path, name: str) -> None:
    """Make `folder` this study's; InputError if it holds something else."""
    marker = folder / MARKER
    if folder.is_dir() and any(folder.iterdir()):
        try:
            held = json.loads(marker.read_text(encoding="utf-8"))["study"]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"output folder {folder} holds no study: give another --output-dir") from None
        if held != name:
            raise InputError(f"output folder {folder} holds the study {held}: give another --output-dir")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(marker, json.dumps({"study": name}) + "\n")
    except OSError as error:
        raise InputError(f"can't write to {folder}: {error.strerror}: give another --output-dir") from None


def write_whole(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def _file(kept: Path, point: Point) -> Path:
    return kept / f"{point.host}--{point.id.replace('/', '--')}-{point.key()}.json"


def _read(kept: Path, point: Point) -> dict[str, Any] | None:
    try:
        record = json.loads(_file(kept, point).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _write(kept: Path, point: Point, record: dict[str, Any]) -> None:
    write_whole(_file(kept, point), json.dumps(record, indent=1, allow_nan=False) + "\n")


def _computed(points: list[Point], workers: int, work: Compute) -> Any:
    """(point, record or Crash) as they are finished, in processes of their own if there is more than one worker."""
    if workers == 1 or len(points) < 2:
        for point in points:
            yield point, _safely(work, point)
        return
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    pool = ProcessPoolExecutor(min(workers, len(points)), mp_context=context, initializer=_leave_signals_to_the_parent)
    try:
        futures = {pool.submit(_safely, work, point): point for point in points}
        for future in as_completed(futures):
            point = futures[future]
            try:
                yield point, future.result()
            except BrokenProcessPool as error:  # killed, perhaps for memory: whose fault it was is not known
                yield point, Crash(point.id, point.host, f"a worker process died: {error}", "")
    except BaseException:  # Ctrl-C, or a full disk: don't wait for what nobody will read
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    pool.shutdown()


def _leave_signals_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _safely(work: Compute, point: Point) -> dict[str, Any] | Crash:
    """The record, or the crash: never a value that looks like one."""
    try:
        return work(point)
    except Exception as error:
        said = str(error).replace("\n", " ")
        return Crash(point.id, point.host, f"{type(error).__name__}: {said}", traceback.format_exc())
