"""What a report shows of a run, as arrays: read from the run's folder, small however long the run was.

The iterations, of which there may be tens of millions, are read a chunk at a time and folded into time bins. A batch's
state (its tokens, the KV blocks in use, the queue) holds from its start on the first stage to its end there, and the
value of a bin is the mean over the time in it that a batch was running; a bin without any is 0.

    record = read_record(Path("runs/first"))
    print(record.timeline.kv_percent.max(axis=1))
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from engine.results.metric_table import REQUEST_COLUMNS
from engine.results.metrics import distributions, summary_key
from engine.results.slo import SLO
from engine.results.tables import Array, Columns, to_numpy

STALL_FACTOR = 5.0  # a gap this many times the run's median is a generation stall
MOST_BINS = 240
FEWEST_BINS = 24
CHUNK_ROWS = 1 << 17
NOT_SET = "not set"

_COLUMNS = ["replica", "stage", "start_s", "duration_s", "num_tokens", "num_decodes", "kv_blocks", "num_running",
            "num_waiting", "max_tbt_s", "predicted", "in_range"]  # fmt: skip
# logarithmic buckets for the median gap of a bin, 2 % wide, from 1 us to 100,000 s
_BUCKETS_PER_DECADE, _FIRST_DECADE, _DECADES = 116, -6, 11


@dataclass(frozen=True, eq=False)
class Distribution:
    """Quantiles of a latency: `values_s[i]` is the quantile `quantiles[i]`."""

    quantiles: Array
    values_s: Array


@dataclass(frozen=True, eq=False)
class Timeline:
    """The run over time. `edges_s` (bins + 1,) counts from the first arrival; the other arrays have a column a bin."""

    edges_s: Array
    decode_tokens: Array  # (bins,) of a batch, mean
    prefill_tokens: Array  # (bins,)
    kv_percent: Array  # (replicas, bins) of the replica's KV blocks
    num_running: Array  # (replicas, bins)
    num_waiting: Array  # (replicas, bins)
    max_tbt_s: Array  # (bins,) longest gap between tokens; NaN where none ended
    median_tbt_s: Array  # (bins,) over batches of each one's longest gap, to within 1 %
    stall_threshold_s: float | None
    batches: int
    stalled_batches: int  # that ended a gap above the threshold
    peak_kv_percent: float
    predicted_batches: int
    outside_range: int  # batches that the predictor was not calibrated for


@dataclass(frozen=True, eq=False)
class Record:
    """All that a report shows."""

    config: dict[str, Any]
    summary: dict[str, Any]
    files: dict[str, int]  # bytes of each file in the folder
    latencies: dict[str, Distribution]  # of each drawn metric; tbt is absent where no request has two tokens
    arrival_rate: float | None  # requests/s as they came; None when all came at once
    timeline: Timeline

    @property
    def slos(self) -> list[tuple[SLO, float | None, bool]]:
        """Each SLO, the value that the run had, and whether that meets it."""
        return [(SLO.parse(entry["slo"]), entry["value_s"], entry["met"]) for entry in self.summary["slos"]]


def read_record(folder: Path) -> Record:
    """Read a finished run's folder. Raises FileNotFoundError where one of its files is missing."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}
    requests = to_numpy(pq.ParquetFile(folder / "requests.parquet").read(list(REQUEST_COLUMNS)))
    first, last = float(requests["arrived_s"].min()), float(requests["arrived_s"].max())
    return Record(
        config=config,
        summary=summary,
        files={path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()},
        latencies={metric: Distribution(*curve) for metric, curve in distributions(requests, summary).items()},
        arrival_rate=(len(requests["arrived_s"]) - 1) / (last - first) if last > first else None,
        timeline=read_timeline(
            folder / "iterations.parquet", summary, start_s=first, end_s=float(requests["last_token_s"].max())
        ),
    )


def flat(value: Any, name: str = "", number: Callable[[float], str] = str) -> Iterator[tuple[str, str]]:
    """Yield names and values of nested settings: an inner name comes after its outer one and a dot."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}" if name else str(key), number)
    elif isinstance(value, list) and any(isinstance(each, Mapping) for each in value):
        for i, inner in enumerate(value):
            yield from flat(inner, f"{name}.{i}", number)
    elif value in (None, "", []):
        yield name, NOT_SET
    elif isinstance(value, list):
        yield name, ", ".join(map(str, value))
    else:
        yield name, number(value) if isinstance(value, float) else str(value)


def read_timeline(path: Path, summary: dict[str, Any], start_s: float, end_s: float) -> Timeline:
    """Fold `iterations.parquet` into time bins between two times on the run's own clock."""
    blocks = np.array([replica["num_gpu_blocks"] for replica in summary["replicas"]], dtype=float)
    stages = np.array([len(replica["stage_utilization"]) for replica in summary["replicas"]])
    median_ms = summary.get(summary_key("p50", "tbt"))
    threshold = None if median_ms is None else STALL_FACTOR * median_ms / 1e3
    with pq.ParquetFile(path) as file:
        num_bins = int(np.clip(file.metadata.num_rows / stages.sum(), FEWEST_BINS, MOST_BINS))
        edges = np.linspace(0.0, max(end_s - start_s, 1e-9), num_bins + 1)
        busy = _TimeMean(len(blocks), edges)
        names = ("num_decodes", "num_tokens", "kv_blocks", "num_running", "num_waiting")
        states = {name: _TimeMean(len(blocks), edges) for name in names}
        gaps = _Gaps(edges)
        batches = predicted = outside = stalled = 0
        peak_kv = 0.0
        for rows in _chunks(file):
            begin = rows["start_s"] - start_s
            end = begin + rows["duration_s"]
            first_stage = rows["stage"] == 0
            batches += int(first_stage.sum())
            predicted += int((first_stage & rows["predicted"]).sum())
            outside += int((first_stage & ~rows["in_range"]).sum())
            replica = rows["replica"][first_stage]
            kv = rows["kv_blocks"][first_stage] / blocks[replica]
            peak_kv = max(peak_kv, float(kv.max(initial=0.0)))
            place = _Place(replica, begin[first_stage], end[first_stage], edges)
            busy.add(place, np.ones(len(replica)))
            for name, state in states.items():
                state.add(place, rows[name][first_stage])
            ended = rows["max_tbt_s"] > 0  # false for NaN, which the other stages have
            gaps.add(end[ended], rows["max_tbt_s"][ended])
            stalled += 0 if threshold is None else int((rows["max_tbt_s"][ended] > threshold).sum())
    decode = states["num_decodes"].over(busy, all_replicas=True)
    return Timeline(
        edges_s=edges,
        decode_tokens=decode,
        prefill_tokens=np.maximum(0.0, states["num_tokens"].over(busy, all_replicas=True) - decode),
        kv_percent=100 * states["kv_blocks"].over(busy) / blocks[:, None],
        num_running=states["num_running"].over(busy),
        num_waiting=states["num_waiting"].over(busy),
        max_tbt_s=gaps.longest,
        median_tbt_s=gaps.medians(),
        stall_threshold_s=threshold,
        batches=batches,
        stalled_batches=stalled,
        peak_kv_percent=100 * peak_kv,
        predicted_batches=predicted,
        outside_range=outside,
    )


def _chunks(file: pq.ParquetFile) -> Iterator[Columns]:
    for chunk in file.iter_batches(CHUNK_ROWS, columns=_COLUMNS):
        yield to_numpy(pa.Table.from_batches([chunk]))


def _bins(times: Array, edges: Array) -> tuple[Array, Array]:
    """Return the bin of each time, and the share of that bin that is still to come."""
    place = times * ((len(edges) - 1) / edges[-1])
    index = np.clip(place.astype(np.int64), 0, len(edges) - 2)
    return index, np.clip(index + 1 - place, 0.0, 1.0)


class _Place:
    """Which cells (replica, bin) intervals begin and end in."""

    def __init__(self, replica: Array, begin: Array, end: Array, edges: Array) -> None:
        first, self.first_share = _bins(begin, edges)
        last, self.last_share = _bins(end, edges)
        self.first = replica * (len(edges) - 1) + first
        self.last = replica * (len(edges) - 1) + last


class _TimeMean:
    """The integral over each bin of a value that holds during intervals, for each replica, in value * bins.

    An interval adds its value to all that comes after its beginning and takes it away from all after its end. So only
    the two cells of its ends are touched, however many bins it spans.
    """

    def __init__(self, replicas: int, edges: Array) -> None:
        self.shape = (replicas, len(edges) - 1)
        self.inside = np.zeros(replicas * (len(edges) - 1))
        self.step = np.zeros(replicas * (len(edges) - 1))

    def add(self, place: _Place, values: Array) -> None:
        size = len(self.step)
        self.inside += np.bincount(place.first, values * place.first_share, size)
        self.inside -= np.bincount(place.last, values * place.last_share, size)
        self.step += np.bincount(place.first, values, size)
        self.step -= np.bincount(place.last, values, size)

    def integral(self) -> Array:
        """(replicas, bins)"""
        step = self.step.reshape(self.shape)
        return self.inside.reshape(self.shape) + np.cumsum(step, axis=1) - step

    def over(self, busy: _TimeMean, all_replicas: bool = False) -> Array:
        """Return the mean over the time that is `busy`, (replicas, bins) or for all of them together (bins,)."""
        total, time = self.integral(), busy.integral()
        if all_replicas:
            total, time = total.sum(axis=0), time.sum(axis=0)
        some = time > 1e-6  # below that it is what rounding leaves of an idle bin
        return np.where(some, np.maximum(0.0, total) / np.where(some, time, 1.0), 0.0)


class _Gaps:
    """The longest gap between tokens in each bin, and a histogram of the batches' longest gaps."""

    def __init__(self, edges: Array) -> None:
        self.edges = edges
        self.longest = np.full(len(edges) - 1, np.nan)
        self.buckets = _BUCKETS_PER_DECADE * _DECADES
        self.counts = np.zeros((len(edges) - 1) * self.buckets, dtype=np.int64)

    def add(self, ended: Array, gaps: Array) -> None:
        index, _ = _bins(ended, self.edges)
        np.fmax.at(self.longest, index, gaps)
        bucket = ((np.log10(gaps) - _FIRST_DECADE) * _BUCKETS_PER_DECADE).astype(np.int64)
        cell = index * self.buckets + np.clip(bucket, 0, self.buckets - 1)
        self.counts += np.bincount(cell, minlength=len(self.counts))

    def medians(self) -> Array:
        """Return (bins,) the middle of the bucket that the median falls in; NaN without a gap."""
        below = np.cumsum(self.counts.reshape(-1, self.buckets), axis=1)
        total = below[:, -1:]
        bucket = np.argmax(below >= np.ceil(total / 2), axis=1)
        value = 10.0 ** (_FIRST_DECADE + (bucket + 0.5) / _BUCKETS_PER_DECADE)
        return np.where(total[:, 0] > 0, value, np.nan)
