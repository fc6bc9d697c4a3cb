"""A profiling session: points measured within a budget of time, written down as they come, and the tables at the end.

A session's folder holds `profile.json` (what is profiled, where, with what), `samples.jsonl` (a measurement a line, in
the order they were made) and, when it is finished, `operators.csv` (the calibration table) and `iterations.csv` (whole
iterations, by which predictions are checked). A session that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import csv
import io
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from engine.documents import parse_json, read_text
from engine.errors import InputError
from engine.results.files import write_whole
from engine.runtime.executor import WorkerError
from engine.specs import ModelSpec
from engine.specs.checks import MOST_SECONDS, short
from engine.specs.device_folder import PROFILE_FILE, profile_settings
from profiler.grids import Point
from profiler.iterations import COLUMNS as ITERATION_COLUMNS
from profiler.iterations import STAGES, host_points
from profiler.kinds import KINDS
from profiler.timing import Timing

MOST_BYTES = 1 << 30  # of a session's samples
MOST_BUDGET_S = 30 * 86400.0
SAMPLES, OPERATORS, ITERATIONS = "samples.jsonl", "operators.csv", "iterations.csv"
Measure = Callable[[Point], Timing]


@dataclass(frozen=True)
class Part:
    """Points that are measured alike, such as those of one model's rank: `open` makes ready, and gives the measure.

    `share` is its part of the time that is left when it begins, of all parts still to come (itself included).
    """

    name: str
    points: list[Point]
    open: Callable[[], Measure]
    share: float = 1.0


@dataclass(frozen=True)
class Bursts:
    """Whole iterations to run: `open` gives what runs a burst of (requests, prompt tokens) and returns its rows."""

    name: str
    bursts: list[tuple[int, int]]
    open: Callable[[], Callable[[int, int], list[dict[str, Any]]]]
    share: float = 1.0


class Session:
    """The folder of a session. Raises InputError if it holds another session, or something else.

    Args:
        identity: what must be the same for a session to go on: device, models, versions, ...
        provenance: what else to write down.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], provenance: dict[str, Any]) -> None:
        self.folder = folder
        self._settings = {"identity": identity, "provenance": provenance}
        settings = folder / PROFILE_FILE
        if settings.is_file():
            known = profile_settings(folder)
            if known["identity"] != identity:
                before = known["identity"]
                other = next(key for key in {**identity, **before} if before.get(key) != identity.get(key))
                raise InputError(
                    f"{folder} holds a profile with {other} {before.get(other)!r}, not {identity.get(other)!r}: "
                    "give another --output-dir"
                )
            self._settings = known
        elif folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder} is not empty and holds no profile: give another --output-dir")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(settings, json.dumps(self._settings, indent=1) + "\n")
        self.samples = list(self._read_samples())
        self.failures: list[str] = []  # parts that could not be measured at all, and why
        self.spent_s = sum(sample["cost_s"] for sample in self.samples)
        self.left = 0  # points that `run` had no time for

    @property
    def provenance(self) -> dict[str, Any]:
        """As it was written down when the session began."""
        found: dict[str, Any] = self._settings["provenance"]
        return found

    def run(
        self, parts: Iterable[Part | Bursts], budget_s: float, on_progress: Callable[[str, int, float], None]
    ) -> None:
        """Measure what is not measured yet, until everything is or the budget is spent.

        `on_progress` is told the part, how many samples there are, and the seconds that are left of the budget.
        """
        began = time.perf_counter() - self.spent_s
        parts = list(parts)
        done = {_key(sample) for sample in self.samples}
        with (self.folder / SAMPLES).open("a", encoding="utf-8") as file:
            for i, part in enumerate(parts):
                left = budget_s - (time.perf_counter() - began)
                end = time.perf_counter() + left * part.share / sum(each.share for each in parts[i:])
                wanted = [entry for entry in _entries(part) if _key(entry) not in done]
                measure: Any = None
                for entry in wanted:
                    if time.perf_counter() >= end:
                        break
                    start = time.perf_counter()
                    try:
                        measure = measure or part.open()
                    except (InputError, RuntimeError) as error:  # too large a model for this machine, say
                        self.failures.append(f"{part.name}: {error}")
                        break
                    try:
                        entry |= _measured(part, measure, entry)
                    except WorkerError as error:  # there is nobody left to ask
                        self.failures.append(f"{part.name}: {error}")
                        break
                    except (InputError, RuntimeError) as error:  # out of memory, or no kernel for this size
                        entry["failed"] = str(error)
                    entry["cost_s"] = time.perf_counter() - start
                    file.write(json.dumps(entry) + "\n")
                    file.flush()
                    done.add(_key(entry))
                    self.samples.append(entry)
                    self.spent_s += entry["cost_s"]
                    on_progress(part.name, len(self.samples), budget_s - (time.perf_counter() - began))
        self.left = len({_key(entry) for part in parts for entry in _entries(part)} - done)

    def finish(self) -> None:
        """Write the tables of what was measured."""
        if not any("failed" not in sample for sample in self.samples):
            if self.failures:
                raise InputError(self.failures[0])
            raise InputError("nothing was measured within the budget: raise --budget")
        iterations = [row for sample in self.samples for row in sample.get("iterations", [])]
        rows = [
            {
                **sample["point"],
                "time_ms": 1e3 * sample["seconds"],
                "spread_ms": 1e3 * sample["spread_s"],
                "repeats": sample["repeats"],
            }
            for sample in self.samples
            if "seconds" in sample
        ]
        for name, sequences, timing in host_points(iterations):
            host = {"operator": name, "kind": "host", "batch_size": sequences}
            rows.append({**host, "time_ms": 1e3 * timing.seconds, "spread_ms": 1e3 * timing.spread_s,
                         "repeats": timing.repeats})  # fmt: skip
        shared = {name: self.provenance[name] for name in ("dtype", "device", "software", "date", "source")}
        import pandas as pd

        from profiler import table

        frame = pd.DataFrame([{**shared, **row} for row in rows])
        libraries = {name: kind.library for name, kind in KINDS.items()}
        ran = [libraries.get(kind, "torch") for kind in frame["kind"]]
        frame["backend"] = [self.provenance.get(library, library) for library in ran]
        table.write(frame, self.folder / OPERATORS)
        if iterations:
            _write_csv(self.folder / ITERATIONS, iterations)

    def _read_samples(self) -> Iterator[dict[str, Any]]:
        path = self.folder / SAMPLES
        if not path.is_file():
            return
        lines = read_text(path, "profile into another folder", MOST_BYTES).splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        if len(whole) < len(lines):  # it was stopped in the middle of a line: that one is measured again
            write_whole(path, "".join(whole))
        for number, line in enumerate(whole, start=1):
            sample = parse_json(line, f"{path} line {number}", "it is damaged: delete that line")
            if (wrong := _damage(sample)) is not None:
                raise InputError(f"{path} line {number} is damaged ({wrong}): delete that line")
            yield sample


def model_record(model: ModelSpec) -> dict[str, Any]:
    """Return a model's shape as a session's identity holds it: without its name, and with the bytes of its dtype."""
    record: dict[str, Any] = json.loads(json.dumps(asdict(replace(model, name=""))))
    for name in ("weight_dtype", "activation_dtype", "kv_cache_dtype"):
        del record[name]  # the session's dtype is in its identity
    for name in ("experts", "full_attention_layers", "qk_norm", "attention_sinks"):
        if not record[name]:  # as sessions before these fields have it
            del record[name]
    return {**record, "dtype_bytes": model.activation_itemsize}


def _damage(sample: Any) -> str | None:
    """Return what is wrong with a line of `samples.jsonl`; None for a point or a burst with what came of it."""
    if not isinstance(sample, dict):
        return "no object"
    if not _is_time(sample.get("cost_s"), zero=True):
        return f"cost_s {short(sample.get('cost_s'))}"
    if "point" in sample:
        whole = isinstance(sample["point"], dict) and (
            isinstance(sample.get("failed"), str)
            or (
                _is_time(sample.get("seconds"))
                and _is_time(sample.get("spread_s"), zero=True)
                and type(sample.get("repeats")) is int
            )
        )
        return None if whole else "a point without its time"
    rows = sample.get("iterations")
    named = isinstance(sample.get("part"), str) and isinstance(sample.get("burst"), list)
    times = ("duration_ms", "compute_ms", *(f"{name}_ms" for name in STAGES))
    whole = isinstance(rows, list) and all(
        isinstance(row, dict) and set(row) == set(ITERATION_COLUMNS) and all(_is_time(row[key], True) for key in times)
        for row in rows
    )
    return None if named and (whole or isinstance(sample.get("failed"), str)) else "a burst without its iterations"


def _is_time(value: Any, zero: bool = False) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and (value >= 0 if zero else value > 0) and value <= 1e3 * MOST_SECONDS


def duration(text: str) -> float:
    """Seconds of 90, 90s, 8m or 1.5h."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(s|m|h|)", text.strip())
    seconds = 0.0 if found is None else float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]
    if not 0 < seconds <= MOST_BUDGET_S:
        raise InputError(f"--budget {short(text)}: give a time such as 90s, 8m or 1h, at most 30 days")
    return seconds


def _measured(part: Part | Bursts, measure: Any, entry: dict[str, Any]) -> dict[str, Any]:
    """What measuring an entry gives."""
    if isinstance(part, Bursts):
        return {"iterations": measure(*entry["burst"])}
    timing: Timing = measure(entry["point"])
    return {"seconds": timing.seconds, "spread_s": timing.spread_s, "repeats": timing.repeats}


def _entries(part: Part | Bursts) -> Iterator[dict[str, Any]]:
    if isinstance(part, Part):
        yield from ({"point": point} for point in part.points)
    else:
        yield from ({"part": part.name, "burst": [count, prompt]} for count, prompt in part.bursts)


def _key(entry: dict[str, Any]) -> str:
    """The same for what needs no second measurement: models share shapes."""
    if "point" in entry:
        point = {name: value for name, value in entry["point"].items() if name not in ("model", "tensor_parallel_size")}
        return json.dumps(point, sort_keys=True)
    return json.dumps([entry["part"], entry["burst"]])


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ITERATION_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})
    write_whole(path, text.getvalue())
