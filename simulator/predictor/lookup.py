"""A stage's times, looked up in the tables of a deployment: what the simulation asks for every batch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import ceil, inf

import numpy as np

from engine.results.tables import Array
from engine.scheduling.request import BatchShape
from engine.specs import HostOverhead
from simulator.predictor.grids import CHUNKS, LENGTHS, MOST_REQUESTS, MOST_ROWS, PREFIXES, PROMPTS

UNLIMITED = 1 << 62  # of what no kind of operator limits
BatchTime = Callable[[BatchShape], float]


@dataclass(frozen=True)
class StageParts:
    """Seconds of one stage's operators over the grids, (operators, points): what StageTables adds up."""

    tokens: Array
    sampled: Array
    prefill: Array
    decode: Array
    send: Array


@dataclass(frozen=True)
class StageTables:
    """Seconds of one stage. `tokens` (MOST_ROWS + 1,) and `sampled` (MOST_REQUESTS + 1,) by rows; `prefill` (prompts,
    chunks, prefixes) of so many equal prompts; `decode` (MOST_REQUESTS + 1, lengths) by the cached tokens of each;
    `send` (MOST_ROWS + 1,) by tokens, to the next stage."""

    tokens: Array
    sampled: Array
    prefill: Array
    decode: Array
    send: Array


@dataclass(frozen=True)
class Limits:
    """The largest batch that lies within what was measured; all 0 where some operator was not measured at all."""

    tokens: int
    chunk: int
    prefix: int
    requests: int
    kv_tokens: int
    length: int  # cached tokens of one decoding request

    def hold(self, shape: BatchShape) -> bool:
        tokens, decodes, kv, prefills, _, _ = shape
        if tokens > self.tokens or decodes > self.requests or kv > self.kv_tokens or kv > decodes * self.length:
            return False
        for chunk, prefix in prefills:  # noqa: SIM110 - asked for every batch, and all() is slow
            if chunk > self.chunk or prefix > self.prefix:
                return False
        return True

    @classmethod
    def together(cls, every: Iterable[Mapping[str, int]]) -> Limits:
        """Return the limits within all of these, each of which may leave fields out."""
        own = list(every)
        names = [field.name for field in fields(cls)]
        return cls(**{name: min((each.get(name, UNLIMITED) for each in own), default=UNLIMITED) for name in names})


class StageTimes:
    """One stage's tables as lists, and the look-ups."""

    def __init__(self, tables: StageTables, host: HostOverhead, layers: int, ranks: int, stage: int) -> None:
        self.tokens: list[float] = tables.tokens.tolist()
        for tokens in range((host.graph_sizes or (0,))[-1], 0, -1):  # of a padded batch, as long as the graph takes
            self.tokens[tokens] = self.tokens[host.padded(tokens)]
        self.sampled: list[float] = tables.sampled.tolist()
        self.prefill = tables.prefill
        self.prefill_slopes = np.diff(tables.prefill, axis=2) / np.diff(PREFIXES)
        self.prefill_rows: dict[int, list[Segment]] = {}  # of one prompt, by its chunk
        self.prompts_rows: dict[int, list[list[tuple[float, float]]]] = {}  # by the chunk, then the number of prompts
        self.decode = tables.decode
        self.decode_rows: dict[int, list[Segment]] = {}
        self.send: list[float] = tables.send.tolist()
        # by the number of sequences: what the host adds is a straight line
        self.hides = host.hidden
        open_host = replace(host, hidden=False)
        self.launch, self.added = open_host.times(layers, 0, ranks, stage)
        self.added_per_sequence = open_host.times(layers, 1, ranks, stage)[1] - self.added
        if host.hidden:  # the GPU's time is no shorter than the host's
            self.serial, self.serial_per_sequence = self.added, self.added_per_sequence
            self.added, self.added_per_sequence = (0.0 if stage else host.exposed_s), 0.0
        self.graph_decodes = host.graph_decodes

    def times(self, shape: BatchShape, repeats: int) -> list[float]:
        """Seconds of the batch and of its next repeats."""
        tokens, decodes, kv, prefills, sampled, growth = shape
        added = self.added + self.added_per_sequence * (decodes + len(prefills))
        if tokens <= MOST_ROWS and sampled <= MOST_REQUESTS:
            fixed = self.tokens[tokens] + self.sampled[sampled] + added
        else:
            fixed = at(self.tokens, tokens) + at(self.sampled, sampled) + added
        launch = added if not prefills and decodes <= self.graph_decodes else self.launch + added
        if self.hides:
            launch = max(launch, self.serial + self.serial_per_sequence * (decodes + len(prefills)) + added)
        low = slope = start = 0.0
        if decodes:  # attention is linear in the cached tokens between the grid's points
            row = self.decode_rows.get(decodes) or self.decode_row(decodes)
            low, slope, start, end = row[bisect_right(_LENGTH_STARTS, kv / decodes) - 1]
            if repeats > 1 and kv + (repeats - 1) * growth >= end:
                inside = ceil((end - kv) / growth)
                return self.times(shape, inside) + self.times(shape.after(inside), repeats - inside)
        if repeats == 1 and len(prefills) < 2:
            seconds = fixed + (low + slope * (kv - start))
            if prefills:  # bilinear between the grid's points
                ((chunk, prefix),) = prefills
                prefill_row = self.prefill_rows.get(chunk) or self.prefill_row(chunk)
                one, each, begin, _ = prefill_row[bisect_right(_PREFIX_STARTS, prefix) - 1]
                seconds += one + each * (prefix - begin)
            return [seconds if seconds > launch else launch]
        if not prefills:
            if fixed + low >= launch:  # the GPU is the slower one from here on
                return [fixed + (low + slope * (kv + i * growth - start)) for i in range(repeats)]
            return [max(fixed + (low + slope * (kv + i * growth - start)), launch) for i in range(repeats)]
        if len(prefills) == 1:
            ((chunk, prefix),) = prefills
            prefill_row = self.prefill_rows.get(chunk) or self.prefill_row(chunk)
        times = []
        for i in range(repeats):
            if len(prefills) > 1:
                prefill = self.together([(chunk, prefix + i * chunk) for chunk, prefix in prefills] if i else prefills)
            else:  # bilinear between the grid's points
                one, each, begin, _ = prefill_row[bisect_right(_PREFIX_STARTS, prefix) - 1]
                prefill = one + each * (prefix - begin)
                prefix += chunk
            seconds = fixed + (low + slope * (kv + i * growth - start)) + prefill
            times.append(seconds if seconds > launch else launch)
        return times

    def decode_row(self, requests: int) -> list[Segment]:
        """Attention of that many decodes, by their cached tokens."""
        values = self.decode[min(requests, MOST_REQUESTS)] * max(1.0, requests / MOST_REQUESTS)
        row = self.decode_rows[requests] = _segments(values, requests * LENGTHS)
        return row

    def together(self, prompts: Sequence[tuple[int, int]]) -> float:
        """Attention of several prompts' (chunk, prefix), which are one kernel's work.

        Of equal prompts the time is known by their number. Of unlike ones each has its share of the time that as much
        work would take if it were all of its like: prompt i, with the work w_i of W in all, w_i / W of the time of
        W / w_i such prompts. A prompt's work is its share of the time of the most prompts together.
        """
        works, places = [], []
        for chunk, prefix in prompts:
            rows = self.prompts_rows.get(chunk) or self._of_prompts(chunk)
            place = bisect_right(_PREFIX_STARTS, prefix) - 1
            past = prefix - _PREFIX_STARTS[place]
            value, slope = rows[-1][place]
            works.append(value + slope * past)
            places.append((rows, place, past))
        total, seconds = sum(works), 0.0
        if not total:
            return 0.0
        for (rows, place, past), work in zip(places, works, strict=True):
            count = total / work if work else _MOST_PROMPTS
            i = bisect_right(_PROMPT_STARTS, count) - 1
            if i < 0:
                i = 0
            value, slope = rows[i][place]
            few = value + slope * past
            if count < _MOST_PROMPTS:
                value, slope = rows[i + 1][place]
                few += (value + slope * past - few) * (count - _PROMPTS[i]) / (_PROMPTS[i + 1] - _PROMPTS[i])
            else:
                few *= count / _MOST_PROMPTS
            seconds += few * work / total
        return seconds

    def prefill_row(self, chunk: int) -> list[Segment]:
        """Attention of one prompt's chunk, by its prefix."""
        values, slopes = (grid.tolist() for grid in self._of_chunk(chunk, 0))
        row = self.prefill_rows[chunk] = list(zip(values, slopes, _PREFIX_STARTS, _PREFIX_ENDS, strict=True))
        return row

    def _of_prompts(self, chunk: int) -> list[list[tuple[float, float]]]:
        """Attention of each number of PROMPTS of a chunk, by their prefix: value and slope of each segment."""
        values, slopes = (grid.tolist() for grid in self._of_chunk(chunk, slice(None)))
        pairs = zip(values, slopes, strict=True)
        rows = self.prompts_rows[chunk] = [list(zip(value, slope, strict=True)) for value, slope in pairs]
        return rows

    def _of_chunk(self, chunk: int, prompts: int | slice) -> tuple[Array, Array]:
        """Values and slopes of the segments by prefix, for some of PROMPTS: linear between the grid's chunks."""
        i = min(bisect_right(_CHUNKS, chunk) - 1, len(_CHUNKS) - 2)
        across = (chunk - _CHUNKS[i]) / (_CHUNKS[i + 1] - _CHUNKS[i])
        values, slopes = (
            grid[..., i, :] + across * (grid[..., i + 1, :] - grid[..., i, :])
            for grid in (self.prefill[prompts, :, :-1], self.prefill_slopes[prompts])
        )
        return values, slopes


class SteppedTimes(StageTimes):
    """A stage with operators whose time is of the whole batch (`of_batch`): every repeat is asked for by itself."""

    def __init__(
        self,
        tables: StageTables,
        host: HostOverhead,
        layers: int,
        ranks: int,
        stage: int,
        of_batch: Sequence[BatchTime],
    ) -> None:
        super().__init__(tables, host, layers, ranks, stage)
        self.of_batch = of_batch
        self.kernel_launch, self.launch = self.launch, 0.0  # the GPU's time alone is looked up, and compared here
        self.hidden, self.hides = self.hides, False

    def times(self, shape: BatchShape, repeats: int) -> list[float]:
        return [self.time(shape.after(i)) for i in range(repeats)]

    def time(self, shape: BatchShape) -> float:
        """Seconds of one batch."""
        gpu = super().times(shape, 1)[0] + sum(seconds(shape) for seconds in self.of_batch)
        sequences = shape.num_decodes + len(shape.prefills)
        added = self.added + self.added_per_sequence * sequences
        launch = 0.0 if not shape.prefills and sequences <= self.graph_decodes else self.kernel_launch
        if self.hidden:
            launch = max(launch, self.serial + self.serial_per_sequence * sequences)
        return max(gpu, launch + added)


def stage_times(
    tables: StageTables, host: HostOverhead, layers: int, ranks: int, stage: int, of_batch: Sequence[BatchTime]
) -> StageTimes:
    """Return the look-ups of a stage."""
    if of_batch:
        return SteppedTimes(tables, host, layers, ranks, stage, of_batch)
    return StageTimes(tables, host, layers, ranks, stage)


Segment = tuple[float, float, float, float]  # of a piecewise linear function: value at its start, slope, start, end


def _segments(values: Array, grid: Array) -> list[Segment]:
    """The segments between the points of a grid; the last goes on for ever."""
    slopes = np.diff(values) / np.diff(grid)
    ends = [*grid[1:-1].tolist(), inf]
    return list(zip(values[:-1].tolist(), slopes.tolist(), grid[:-1].tolist(), ends, strict=True))


_LENGTH_STARTS: list[float] = [0.0, *LENGTHS[1:-1].tolist()]  # of the segments
_PREFIX_STARTS: list[float] = PREFIXES[:-1].tolist()
_PREFIX_ENDS: list[float] = [*PREFIXES[1:-1].tolist(), inf]
_CHUNKS: list[float] = CHUNKS.tolist()
_PROMPTS: list[float] = PROMPTS.tolist()
_PROMPT_STARTS: list[float] = _PROMPTS[:-1]
_MOST_PROMPTS: float = _PROMPTS[-1]


def at(table: list[float], rows: int) -> float:
    """An entry of a table by rows; past its end the last entry, in proportion."""
    if rows < len(table):
        return table[rows]
    return table[-1] * rows / (len(table) - 1)
