"""A run over time: its iterations folded into bins, and the output tokens by each time.

The iterations, of which there may be tens of millions, are read a chunk at a time. A batch's state (its tokens, the KV
blocks in use, the queue) holds from its start on the first stage to its end there, and the value of a bin is the mean
over the time in it that a batch was running; a bin without any is 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engine.errors import InputError
from engine.results.metrics import summary_key
from engine.results.tables import Array, Columns, open_parquet, to_numpy

STALL_FACTOR = 5.0  # a gap this many times the run's median is a generation stall
MOST_BINS = 240
FEWEST_BINS = 24
OUTPUT_TIMES = 401
CHUNK_ROWS = 1 << 17

_COLUMNS = ["replica", "stage", "start_s", "duration_s", "num_tokens", "num_decodes", "kv_blocks", "num_running",
            "num_waiting", "max_tbt_s", "predicted", "in_range"]  # fmt: skip
# logarithmic buckets for the median gap of a bin, 2 % wide, from 1 us to 100,000 s
_BUCKETS_PER_DECADE, _FIRST_DECADE, _DECADES = 116, -6, 11


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
    output_s: Array  # (times,) evenly from the first arrival to the end
    output_tokens: Array  # (times,) that were there by each of them
    stall_threshold_s: float | None
    batches: int
    stalled_batches: int  # that ended a gap above the threshold
    peak_kv_percent: float
    predicted_batches: int
    outside_range: int  # batches that the predictor was not calibrated for


def read_timeline(
    path: Path, summary: dict[str, Any], start_s: float, end_s: float, first_token_s: Sequence[float] | Array = ()
) -> Timeline:
    """Fold `iterations.parquet` into time bins between two times on the run's own clock.

    `first_token_s` are the requests' first tokens, which no decode is counted for.
    """
    # of a server that was measured from outside there are no batches, and nothing is known
    blocks = np.array([replica.get("num_gpu_blocks", 1) for replica in summary["replicas"]], dtype=float)
    stages = np.array([len(replica.get("stage_utilization", [0.0])) for replica in summary["replicas"]])
    median_ms = summary.get(summary_key("p50", "tbt"))
    threshold = None if median_ms is None else STALL_FACTOR * median_ms / 1e3
    with open_parquet(path) as file:
        num_bins = int(np.clip(file.metadata.num_rows / stages.sum(), FEWEST_BINS, MOST_BINS))
        edges = np.linspace(0.0, max(end_s - start_s, 1e-9), num_bins + 1)
        busy = _TimeMean(len(blocks), edges)
        names = ("num_decodes", "num_tokens", "kv_blocks", "num_running", "num_waiting")
        states = {name: _TimeMean(len(blocks), edges) for name in names}
        gaps = _Gaps(edges)
        output_s = np.linspace(0.0, edges[-1], OUTPUT_TIMES)
        decoded = np.zeros(OUTPUT_TIMES)
        batches = predicted = outside = stalled = 0
        peak_kv = 0.0
        for rows in chunks(file, _COLUMNS):
            _check(path, rows, stages)
            begin = rows["start_s"] - start_s
            end = begin + rows["duration_s"]
            first_stage = rows["stage"] == 0
            batches += int(first_stage.sum())
            predicted += int((first_stage & rows["predicted"]).sum())
            outside += int((first_stage & ~rows["in_range"]).sum())
            replica = rows["replica"][first_stage]
            kv = rows["kv_blocks"][first_stage] / blocks[replica]
            peak_kv = max(peak_kv, float(kv.max(initial=0.0)))
            ends = [_bins(times[first_stage], edges) for times in (begin, end)]
            busy.add(replica, ends, np.ones(len(replica)))
            for name, state in states.items():
                state.add(replica, ends, rows[name][first_stage])
            ended = rows["max_tbt_s"] > 0  # false for NaN, which the other stages have
            gaps.add(end[ended], rows["max_tbt_s"][ended])
            last_stage = rows["stage"] == stages[rows["replica"]] - 1
            # the first of the times by which it had ended; rounding must not put the run's last batch after its end
            done = np.searchsorted(output_s, (rows["start_s"] + rows["duration_s"])[last_stage] - start_s, side="left")
            decoded += np.bincount(np.minimum(done, OUTPUT_TIMES - 1), rows["num_decodes"][last_stage], OUTPUT_TIMES)
            stalled += 0 if threshold is None else int((rows["max_tbt_s"][ended] > threshold).sum())
    told = (summary.get("simulator") or summary.get("engine") or {}).get("batches", batches)
    if told != batches:
        raise InputError(f"{path} holds {batches:,} batches, summary.json says {told:,}: they are not of one run")
    decode = states["num_decodes"].over(busy, all_replicas=True)
    first_tokens = np.searchsorted(np.sort(np.asarray(first_token_s) - start_s), output_s, side="right")
    return Timeline(
        edges_s=edges, output_s=output_s, output_tokens=np.cumsum(decoded) + first_tokens, decode_tokens=decode,
        prefill_tokens=np.maximum(0.0, states["num_tokens"].over(busy, all_replicas=True) - decode),
        kv_percent=100 * states["kv_blocks"].over(busy) / blocks[:, None],
        num_running=states["num_running"].over(busy), num_waiting=states["num_waiting"].over(busy),
        max_tbt_s=gaps.longest, median_tbt_s=gaps.medians(), stall_threshold_s=threshold,
        batches=batches, stalled_batches=stalled, peak_kv_percent=100 * peak_kv,
        predicted_batches=predicted, outside_range=outside,
    )  # fmt: skip


def _check(path: Path, rows: Columns, stages: Array) -> None:
    """Raise InputError for a batch on a stage that the run has not, or at a time that is none."""
    replica, stage = rows["replica"], rows["stage"]
    wrong = (replica < 0) | (replica >= len(stages)) | (stage < 0)
    wrong |= stage >= stages[np.clip(replica, 0, len(stages) - 1)]
    wrong |= ~np.isfinite(rows["start_s"]) | ~np.isfinite(rows["duration_s"])
    wrong |= (rows["start_s"] < 0) | (rows["duration_s"] < 0)
    if wrong.any():
        row = int(wrong.argmax())
        raise InputError(
            f"{path}: a batch of {rows['duration_s'][row]:g} s at {rows['start_s'][row]:g} s on stage {stage[row]} of "
            f"replica {replica[row]}: the run has no such batch"
        )


def chunks(file: pq.ParquetFile, columns: Sequence[str]) -> Iterator[Columns]:
    """Yield some columns of a table, so many rows at a time."""
    for chunk in file.iter_batches(CHUNK_ROWS, columns=columns):
        yield to_numpy(pa.Table.from_batches([chunk]))


def _bins(times: Array, edges: Array) -> tuple[Array, Array]:
    """Return the bin of each time, and the share of that bin that is still to come."""
    place = times * ((len(edges) - 1) / edges[-1])
    index = np.clip(place, 0, len(edges) - 2).astype(np.int64)
    return index, np.clip(index + 1 - place, 0.0, 1.0)


class _TimeMean:
    """The integral over each bin of a value that holds during intervals, for each replica, in value * bins.

    An interval adds its value to all that comes after its beginning and takes it away from all after its end. So only
    the two cells of its ends are touched, however many bins it spans.
    """

    def __init__(self, replicas: int, edges: Array) -> None:
        self.shape = (replicas, len(edges) - 1)
        self.inside, self.step = np.zeros((2, replicas * (len(edges) - 1)))

    def add(self, replica: Array, ends: Sequence[tuple[Array, Array]], values: Array) -> None:
        """Add intervals: their replicas, the bins and shares of their beginnings and of their ends, and values."""
        for sign, (index, share) in zip((1, -1), ends, strict=True):
            cells = replica * self.shape[1] + index
            self.inside += sign * np.bincount(cells, values * share, len(self.step))
            self.step += sign * np.bincount(cells, values, len(self.step))

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
