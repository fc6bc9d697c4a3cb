"""What is laid side by side of several runs, as small arrays and rows: read from their folders, nothing drawn.

sides = [read_side(folder, name) for folder, name in zip(folders, names_of(folders), strict=True)]
print(differing_settings(sides), headline(sides))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal

import numpy as np

from engine import documents
from engine.errors import InputError
from engine.results.metric_table import find_metric
from engine.results.metrics import summary_key
from engine.results.tables import Array
from studies.pages.run_record import NOT_SET, Record, flat, read_record
from studies.words import capital, number, seconds, statistic_name

Kind = Literal["run", "search", "sweep", "study", "validation", "plan"]
RUN_FILES = ("config.yaml", "summary.json", "requests.parquet", "iterations.parquet")
_NEAR = 0.01  # numbers nearer to each other than this share are as good as each other
LONGEST_NAME = 28  # characters, beyond which folders are called A, B, C
_KINDS: tuple[Kind, ...] = ("validation", "plan", "sweep", "search", "study")  # each by its file
_UNFINISHED = {".partial-": "half-written: what wrote it was killed", ".incomplete": "what a failed run left behind"}
_LATENCIES = (("ttft", "p50"), ("ttft", "p99"), ("tbt", "p50"), ("tbt", "p99"), ("tbt", "max"), ("e2e", "p50"),
              ("e2e", "p99"), ("scheduling_delay", "p50"))  # fmt: skip


# each headline number: its name, its unit (s, %, or a word), and its key in a summary (ms for the unit s)
_HEADLINES = (
    ("Requests finished", "", "completed"),
    ("Throughput", "requests/s", "request_throughput"),
    ("Goodput", "requests/s", "request_goodput"),
    ("Output", "tokens/s", "output_throughput"),
    *((f"{capital(find_metric(metric).name)}, {statistic_name(statistic)}", "s", summary_key(statistic, metric))
      for metric, statistic in _LATENCIES),
    ("Preemptions", "", "preemptions"),
)  # fmt: skip
_IF_ANY = (  # likewise, left out where no run has it
    ("Throughput, steady window", "requests/s", "steady_request_throughput"),
    ("Output, steady window", "tokens/s", "steady_output_throughput"),
    ("TTFT, steady window, P99", "s", "steady_p99_ttft_ms"),
    ("Prefix cache hits", "%", "prefix_hit_rate"),
    ("Blocks evicted from the prefix cache", "", "prefix_evictions"),
)
_SCALE = {"s": 1e-3, "%": 100.0}  # of a unit: what a summary has is times this


@dataclass(frozen=True, eq=False)
class Side:
    """One of the runs."""

    name: str
    folder: Path
    record: Record


@dataclass(frozen=True)
class Headline:
    """A number that every run has, or lacks (None)."""

    name: str
    unit: str  # s, %, or a word
    values: list[float | None]
    better: str = ""  # "more" or "less"; "": neither

    def words(self, value: float | None) -> str:
        """Return a value in words, without the unit where that is not seconds."""
        return seconds(value) if self.unit == "s" else number(value)

    @property
    def best(self) -> int | None:
        """The run that is better than every other by a hundredth or more; None where a run lacks the number, too."""
        known = [value for value in self.values if value is not None]
        if not self.better or len(known) < max(2, len(self.values)):
            return None
        best, second = sorted(known, reverse=self.better == "more")[:2]
        return known.index(best) if abs(second - best) >= _NEAR * max(abs(best), abs(second), 1e-12) else None


def kind_of(folder: Path) -> Kind:
    """Return what a folder is of. Raises InputError for one that is no result of Windtunnel's, or unfinished."""
    if not folder.exists():
        raise InputError(f"there is no folder {folder}: give one that a run, a search or a study has written")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file: give the folder that it is in")
    for mark, what in _UNFINISHED.items():
        if mark in folder.resolve().name:
            raise InputError(f"{folder} is {what}: give a finished one")
    for kind in _KINDS:
        if (folder / f"{kind}.json").is_file():
            return kind
    missing = [name for name in RUN_FILES if not (folder / name).is_file()]
    if not missing:
        return "run"
    if len(missing) < len(RUN_FILES):
        raise InputError(f"{folder} is no finished run: it lacks {' and '.join(missing)}")
    if (folder / "settings.json").is_file():
        raise InputError(f"{folder} is an unfinished search: the same command again goes on with it")
    kinds = "a run, search, sweep, plan, study or validation"
    raise InputError(f"{folder} is no folder of {kinds}: it has none of their files")


def names_of(folders: Sequence[Path]) -> list[str]:
    """Return a short name for each folder: as much of its path as it takes to see it apart, else a letter."""
    paths = [folder.resolve() for folder in folders]
    if twice := next((str(f) for f, path in zip(folders, paths, strict=True) if paths.count(path) > 1), None):
        raise InputError(f"{twice} is there twice: give each folder once")
    if len(folders) > len(ascii_uppercase):
        raise InputError(f"{len(folders)} folders are too many to see apart: give at most {len(ascii_uppercase)}")
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names if max(map(len, names)) <= LONGEST_NAME else list(ascii_uppercase[: len(names)])


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a file holds."""
    values: dict[str, Any] = documents.read_json(path, "is all of it there?")
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no object: is all of it there?")
    return values


@contextmanager
def readable(folder: Path, kind: str) -> Iterator[None]:
    """Say of what goes wrong while a folder is read that it can't be read."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"{folder} can't be read as a {kind} ({why}): is all of it there?") from error


def read_side(folder: Path, name: str) -> Side:
    """Read a run's folder. Raises InputError where its files can't be read."""
    with readable(folder, "run"):
        return Side(name, folder, read_record(folder))


def differing_settings(sides: Sequence[Side]) -> list[tuple[str, list[str]]]:
    """Return each setting that is not the same in all runs, and its value in each."""
    every = [_settings(side.record) for side in sides]
    names = dict.fromkeys(name for settings in every for name in settings)
    rows = [(name, [settings.get(name, NOT_SET) for settings in every]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _settings(record: Record) -> dict[str, str]:
    found, replicas = dict(flat(record.config, number="{:.6g}".format)), record.summary["replicas"]
    if "server" not in record.summary:
        found["KV blocks"] = f"{sum(replica['num_gpu_blocks'] for replica in replicas):,}"
    return {**found, "times": "; ".join(dict.fromkeys(each.get("predictor") or "measured" for each in replicas))}


def headline(sides: Sequence[Side]) -> list[Headline]:
    """Return the numbers to see first, of each run."""
    summaries = [side.record.summary for side in sides]
    rows = []
    for name, unit, key in (*_HEADLINES, *_IF_ANY):
        found = [summary.get(key) for summary in summaries]
        if any(each is not None for each in found) or (name, unit, key) in _HEADLINES:
            values = [None if each is None else _SCALE.get(unit, 1) * each for each in found]
            better = "more" if unit.endswith("/s") or key == "prefix_hit_rate" else "less" if key != "completed" else ""
            rows.append(Headline(name, unit, values, better))
    counts = [num_gpus(side.record) or None for side in sides]
    per_device = [count and each["output_throughput"] / count for each, count in zip(summaries, counts, strict=True)]
    rows.insert(4, Headline("Output per device", "tokens/s", per_device, "more"))
    seen = [side.record.timeline if side.record.timeline.batches else None for side in sides]
    stalls = [None if each is None else 100 * each.stalled_batches / each.batches for each in seen]
    rows.append(Headline("Batches that ended a stall", "%", stalls, "less"))
    peaks = [None if each is None else each.peak_kv_percent for each in seen]
    rows.append(Headline("KV cache, peak use", "%", peaks))
    return rows


def num_gpus(record: Record) -> int:
    """Return devices of all replicas; 0 of a server that was measured from outside."""
    return sum(replica.get("num_gpus", 0) for replica in record.summary["replicas"])


def same_requests(sides: Sequence[Side]) -> bool:
    """Return whether all served as many requests, with as many tokens in and out."""
    keys = ("workload", "completed", "total_input_tokens", "total_output_tokens")
    return len({tuple(side.record.summary.get(key) for key in keys) for side in sides}) == 1


def bubbles(record: Record) -> Array:
    """Return (stages,) the share of the time with requests that each stage idled, mean over its replicas."""
    shares = [replica.get("stage_bubbles", []) for replica in record.summary["replicas"]]
    return np.array([np.mean([each[j] for each in shares if len(each) > j]) for j in range(max(map(len, shares)))])
