"""What a run leaves behind: one row a request, one row a batch and stage, and the gaps between output tokens.

The engine's driver and the simulator's replica report to the same Recorder, in seconds on their own clock, so a
simulated and a measured run have the same tables. Rows are kept in plain lists and turned into Arrow tables a block at
a time; with a folder given, the blocks go straight to `requests.parquet` and `iterations.parquet`, so that a
long run takes little more memory than its requests' own columns.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import sub
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.results.metric_table import REQUEST_COLUMNS
from engine.results.metrics import Gaps, grouped_percentile
from engine.results.tables import Columns, open_parquet, to_arrow
from engine.scheduling.request import Batch, Request

if TYPE_CHECKING:
    import pyarrow.parquet as pq

ITERATION_COLUMNS: dict[str, type[np.generic]] = {
    "replica": np.int32,
    "stage": np.int16,
    "start_s": np.float64,
    "duration_s": np.float64,
    "num_tokens": np.int32,
    "num_decodes": np.int32,
    "num_prefills": np.int32,
    "kv_blocks": np.int32,  # in use by the replica once the batch has its own
    "num_running": np.int32,  # requests that hold KV blocks
    "num_waiting": np.int32,  # requests in the queue
    "prefix_hit_tokens": np.int32,  # that requests found in the cache when they were admitted; on the first stage
    "max_tbt_s": np.float64,  # longest gap that a token of this batch ended; NaN but on the last stage
    "predicted": np.bool_,  # or measured
    "in_range": np.bool_,  # of what the predictor was calibrated on
}


def request_row(request: Request) -> dict[str, float]:
    """What a finished request has in each of `REQUEST_COLUMNS`: the numbers that a Recorder's table has of it."""
    assert request.scheduled_at is not None, f"{request} has finished and was never scheduled"
    times = request.token_times
    numbers = (
        request.arrived_at, request.scheduled_at, times[0], times[-1], request.prompt_tokens,
        len(times) - request.late_first_token, request.preemptions,
    )  # fmt: skip
    return dict(zip(REQUEST_COLUMNS, numbers, strict=True))


_MOST_STAGES = 1 << 15
REQUEST_ROWS = 1 << 14  # requests that are written at a time


class _Table:
    """Blocks of rows of the same columns: kept, or written to a Parquet file as they come."""

    def __init__(self, path: Path | None, together: list[_Table]) -> None:
        self.path = path
        self.together = together  # the tables of a run: when one can't be written, the disk is full for all of them
        together.append(self)
        self.writer: pq.ParquetWriter | None = None
        self.blocks: list[Columns] = []

    def add(self, block: Columns) -> None:
        if self.path is None:
            self.blocks.append(block)
            return
        import pyarrow.parquet as pq

        table = to_arrow(block)
        if self.writer is None:
            self.writer = pq.ParquetWriter(self.path, table.schema, compression="zstd")
        with self._given_up_together():
            self.writer.write_table(table)

    @contextmanager
    def _given_up_together(self) -> Iterator[None]:
        """Write no more after an error: a writer that is thrown away would try again, and print that it can't."""
        try:
            yield
        except OSError:
            for table in self.together:
                if table.writer is not None:
                    table.writer.is_open = False
            raise

    def close(self) -> None:
        if self.writer is not None:
            with self._given_up_together():
                self.writer.close()

    def read(self, names: list[str]) -> Iterator[Columns]:
        """Yield the columns of `names`, a block of rows at a time; call after `close`."""
        if self.path is None:
            yield from self.blocks
        elif self.writer is not None:
            for batch in open_parquet(self.path).iter_batches(columns=names):
                yield {name: np.from_dlpack(batch[name]) for name in names}  # to_numpy() would import pandas


@dataclass(frozen=True)
class Run:
    """A finished run. With a folder the iterations are in its `iterations.parquet`, and None here."""

    summary: dict[str, Any]
    requests: Columns
    iterations: Columns | None


class Recorder:
    """Collects a run.

    Args:
        folder: where the two Parquet files go; None keeps the iterations in memory (`iterations`).
        tbt_percentiles: percentiles of a request's own token gaps to keep for each request (for goodput).
        exact_gaps: keep every gap between tokens, or a quantile sketch of them.
        predicted: whether the durations come from a predictor or from a clock.
    """

    def __init__(
        self,
        folder: Path | None = None,
        tbt_percentiles: Sequence[float] = (),
        exact_gaps: bool = True,
        predicted: bool = True,
        block_rows: int = 1 << 16,
    ) -> None:
        self.tbt_percentiles = tuple(tbt_percentiles)
        self.predicted = predicted
        self.block_rows = block_rows
        self.gaps = Gaps(exact_gaps)
        self.num_batches = 0
        self.peak_kv_blocks: dict[int, int] = {}  # by replica: the most in use at once
        self._requests: list[tuple[Request, int]] = []
        self._request_tokens = 0
        self._request_blocks: list[Columns] = []
        self._unwritten = 0  # of these, the last
        tables: list[_Table] = []
        self._request_table = _Table(folder and folder / "requests.parquet", tables)
        self._iteration_table = _Table(folder and folder / "iterations.parquet", tables)
        self._clear_iterations()

    # -- what a driver reports -------------------------------------------------------------------------------------

    def scheduled(self, batch: Batch, now: float) -> None:
        """`batch` was formed at `now`."""
        for request, _ in batch.chunks:
            if request.scheduled_at is None:
                request.scheduled_at = now

    def completed(self, batch: Batch, times: list[float]) -> list[float]:
        """`batch` ended at `times` (once for each repeat). Returns the longest TBT of each."""
        oldest = first = times[0]
        new = array("d", times)
        for request in batch.decodes:
            token_times = request.token_times
            if token_times and token_times[-1] < oldest:
                oldest = token_times[-1]
            token_times += new
        for request in batch.completing:
            if request.token_times:  # recomputed after a preemption
                oldest = min(oldest, request.token_times[-1])
            request.token_times.append(first)
        if not batch.decodes:
            return [first - oldest] + [0.0] * (len(times) - 1)
        return [first - oldest, *map(sub, times[1:], times)]

    def iterations(
        self,
        replica: int,
        stage: int,
        starts: list[float],
        durations: list[float],
        batch: Batch,
        kv_blocks: list[int],
        num_running: int,
        num_waiting: int,
        max_tbt: list[float],
        in_range: bool,
    ) -> None:
        """`batch` ran on `stage` of `replica` at `starts`, for `durations` seconds: one row for each repeat."""
        hits, shape = batch.prefix_hit_tokens, batch.shape
        if hits:
            batch.prefix_hit_tokens = 0  # repeats find nothing, and the next stages no more
        self._starts.fromlist(starts)
        self._durations.fromlist(durations)
        self._kv_blocks.fromlist(kv_blocks)
        self._max_tbt.fromlist(max_tbt)
        self._rows.append(
            (
                len(starts),
                replica,
                stage,
                shape.num_tokens,
                shape.num_decodes,
                len(shape.prefills),
                num_running,
                num_waiting,
                in_range,
                hits,
            )
        )
        if len(self._starts) >= self.block_rows:
            self._flush_iterations()

    def finished(self, request: Request, replica: int) -> None:
        """`request` got its last token."""
        self._requests.append((request, replica))
        self._request_tokens += len(request.token_times)
        if self._request_tokens >= self.block_rows:
            self._flush_requests()

    def close(self) -> None:
        """Write what is left. The tables are complete after this."""
        self._flush_requests()
        self._write_requests()
        self._flush_iterations()
        self._request_table.close()
        self._iteration_table.close()

    # -- what it collected -----------------------------------------------------------------------------------------

    def requests(self) -> Columns:
        """One array a column, one entry a finished request; call after `close`."""
        blocks = self._request_blocks
        return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]} if blocks else {}

    def iterations_kept(self) -> Columns:
        """The iterations of a run that was kept in memory, a row each and stage; call after `close`."""
        blocks = self._iteration_table.blocks
        return {
            name: np.concatenate([block[name] for block in blocks]) if blocks else np.empty(0, dtype=kind)
            for name, kind in ITERATION_COLUMNS.items()
        }

    def read_iterations(self, names: list[str]) -> Iterator[Columns]:
        """Yield the columns of `names` of the iterations, a block of rows at a time; call after `close`."""
        return self._iteration_table.read(names)

    def busy_share(self, window: tuple[float, float] | None) -> dict[tuple[int, int], float]:
        """Share of `window` (s) that each (replica, stage) worked; empty without a window. Call after `close`."""
        found: dict[tuple[int, int], float] = {}
        if window is None:
            return found
        start, end = window
        for block in self._iteration_table.read(["replica", "stage", "start_s", "duration_s"]):
            ends = block["start_s"] + block["duration_s"]
            inside = np.clip(np.minimum(ends, end) - np.maximum(block["start_s"], start), 0, None)
            places, which = np.unique(block["replica"] * _MOST_STAGES + block["stage"], return_inverse=True)
            for place, busy in zip(places.tolist(), np.bincount(which, inside).tolist(), strict=True):
                key = divmod(place, _MOST_STAGES)
                found[key] = found.get(key, 0.0) + busy / (end - start)
        return {key: min(1.0, share) for key, share in found.items()}

    # -- inside ----------------------------------------------------------------------------------------------------

    def _clear_iterations(self) -> None:
        self._starts = array("d")
        self._durations = array("d")
        self._kv_blocks = array("i")
        self._max_tbt = array("d")
        self._rows: list[tuple[int, int, int, int, int, int, int, int, bool, int]] = []

    def _flush_iterations(self) -> None:
        if not self._rows:
            return
        rows = np.array(self._rows, dtype=np.int32)
        repeats = rows[:, 0]
        names = ("replica", "stage", "num_tokens", "num_decodes", "num_prefills", "num_running", "num_waiting")
        columns: dict[str, Any] = {name: np.repeat(rows[:, i], repeats) for i, name in enumerate(names, start=1)}
        hits = np.zeros(len(self._starts), dtype=np.int32)
        hits[np.cumsum(repeats) - repeats] = rows[:, 9]
        columns["prefix_hit_tokens"] = hits
        columns["in_range"] = np.repeat(rows[:, 8] != 0, repeats)
        columns["start_s"] = np.frombuffer(self._starts)
        columns["duration_s"] = np.frombuffer(self._durations)
        columns["kv_blocks"] = np.frombuffer(self._kv_blocks, dtype=np.int32)
        columns["max_tbt_s"] = np.frombuffer(self._max_tbt)
        columns["predicted"] = np.full(len(self._starts), self.predicted)
        columns["stage"] = columns["stage"].astype(np.int16)
        self.num_batches += int(np.count_nonzero(columns["stage"] == 0))
        for replica in np.unique(rows[:, 1]).tolist():
            peak = int(columns["kv_blocks"][columns["replica"] == replica].max())
            self.peak_kv_blocks[replica] = max(peak, self.peak_kv_blocks.get(replica, 0))
        self._iteration_table.add({name: columns[name] for name in ITERATION_COLUMNS})
        self._clear_iterations()

    def _write_requests(self) -> None:
        """Write the blocks that are not written yet as one: each takes some 10 KiB until the file is closed."""
        if not self._unwritten:
            return
        blocks = self._request_blocks[-self._unwritten :]
        whole = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
        self._request_blocks[-self._unwritten :] = [whole]
        self._request_table.add(whole)
        self._unwritten = 0

    def _flush_requests(self) -> None:
        if not self._requests:
            return
        rows = np.array(
            [
                (
                    r.id,
                    replica,
                    r.arrived_at,
                    r.scheduled_at,
                    r.prompt_tokens,
                    r.preemptions,
                    len(r.token_times),
                    r.prefix_hit_tokens,
                    r.priority,
                    r.late_first_token,
                )
                for r, replica in self._requests
            ]
        )
        counts = rows[:, 6].astype(np.int64)
        times = np.frombuffer(b"".join([r.token_times for r, _ in self._requests]))
        last = np.cumsum(counts) - 1
        first = last - counts + 1
        ends_gap = np.ones(len(times), dtype=bool)
        ends_gap[first] = False  # the first token of a request ends no gap
        late = rows[:, 9].astype(np.int64)
        ends_gap[first[late > 0] + 1] = False  # nor does the one that comes an iteration after the prompt's end
        gaps = np.diff(times, prepend=0.0)[ends_gap]
        self.gaps.add(gaps)
        columns: Columns = {
            "request_id": rows[:, 0].astype(np.int64),
            "replica": rows[:, 1].astype(np.int32),
            "arrived_s": rows[:, 2],
            "scheduled_s": rows[:, 3],
            "first_token_s": times[first],
            "last_token_s": times[last],
            "prompt_tokens": rows[:, 4].astype(np.int32),
            "output_tokens": (counts - late).astype(np.int32),
            "preemptions": rows[:, 5].astype(np.int32),
            "prefix_hit_tokens": rows[:, 7].astype(np.int32),  # of its prompt, when it was first admitted
            "priority": rows[:, 8].astype(np.int64),  # the lowest first
        }
        groups = counts - 1 - late  # gaps of each request
        columns["max_tbt_s"] = grouped_percentile(gaps, groups, [100.0])[0]
        if self.tbt_percentiles:
            tables = grouped_percentile(gaps, groups, self.tbt_percentiles)
            for percentile, values in zip(self.tbt_percentiles, tables, strict=True):
                columns[f"p{percentile:g}_tbt_s"] = values
        self._request_blocks.append(columns)
        self._unwritten += 1
        if sum(len(block["arrived_s"]) for block in self._request_blocks[-self._unwritten :]) >= REQUEST_ROWS:
            self._write_requests()
        self._requests = []
        self._request_tokens = 0
