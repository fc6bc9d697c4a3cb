"""Makes the tables of a deployment: asks each operator's estimator over the grids, once, and adds up.

Everything that depends on a number of rows alone becomes a table by that number; attention becomes two grids, of chunk
and prefix for prompts and of requests and cached tokens for decodes. All are made monotone (more work never takes less
time), for trees are not, but for operators that were measured to fall. What the calibration lacks, the roofline of its
kind estimates.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from engine.results.tables import Array
from engine.scheduling.request import BatchShape
from engine.specs import DeviceSpec, HostOverhead, ModelSpec, NetworkSpec, ParallelSpec
from profiler.kind import Operator
from profiler.operators import inventory
from simulator.predictor.calibration import Calibration, in_words, named
from simulator.predictor.carried import SOURCE
from simulator.predictor.grids import CHUNKS, LENGTHS, MOST_REQUESTS, MOST_ROWS, PREFIXES, PROMPTS, REQUESTS, ROWS
from simulator.predictor.kind import KindModel, Site
from simulator.predictor.kinds import Sorted, kind_of, sort_out
from simulator.predictor.lookup import BatchTime, Limits, StageParts, StageTables

ROWS_OF = ("tokens", "sampled")  # what a number of rows may be of
PROMPT_POINTS = len(PROMPTS) * len(CHUNKS) * len(PREFIXES)
DECODE_POINTS = len(REQUESTS) * len(LENGTHS)


class TableMaker:
    """Fills the tables of one deployment from a calibration. Raises LookupError for an operator of an unknown kind.

    Args:
        kernel: whose measurements of attention to take, where they are; None takes the kernel measured most.
        engine: whose all-reduce to take (`vllm@0.14`), where it has its own; None takes the one measured most.
    """

    def __init__(
        self,
        calibration: Calibration,
        model: ModelSpec,
        device: DeviceSpec,
        network: NetworkSpec,
        parallel: ParallelSpec,
        kernel: str | None = None,
        engine: str | None = None,
    ) -> None:
        self.calibration, self.parallel = calibration, parallel
        self.models: dict[str, KindModel[Any]] = calibration.models
        tp, stages = parallel.tensor_parallel_size, range(parallel.pipeline_parallel_size)
        self.sites = [Site(device, network, model, tp, stage * tp, kernel, engine) for stage in stages]
        every = [inventory(model, parallel, stage) for stage in stages]
        self.operators = [[part for op in stage for part in self._as_measured(op)] for stage in every]
        self.sorted: list[Sorted] = [sort_out(operators) for operators in self.operators]

    def _as_measured(self, op: Operator) -> tuple[Operator, ...]:
        """An operator, or its parts where only these were measured."""
        whole = self.models.get(op.kind)  # the kinds with parts have one population
        if whole is None or whole.names(op):
            return (op,)
        parts = [(part, self.models.get(part.kind)) for part in op.parts]
        return op.parts if any(model is not None and model.names(part) for part, model in parts) else (op,)

    def name(self, op: Operator, stage: int) -> str:
        """Return the estimator of an operator, by its name among `models`."""
        return named(op.kind, kind_of(op).variant_of(op, self.sites[stage]))

    def knows(self, op: Operator, stage: int) -> bool:
        """Return whether an operator's time is learned."""
        model = self.models.get(self.name(op, stage))
        return model is not None and model.applies(op, self.sites[stage])

    def parts(self, stage: int) -> StageParts:
        """Return the times of one stage's operators over the grids, each by itself."""
        every = self.sorted[stage]
        by = {rows: [self.by_rows(op, stage, ROWS) for op, _ in every.rows if op.rows == rows] for rows in ROWS_OF}
        return StageParts(
            _stacked(by["tokens"], len(ROWS)),
            _stacked(by["sampled"], len(ROWS)),
            _stacked([self._prompts(op, kind, stage) for op, kind in every.prompts], PROMPT_POINTS),
            _stacked([self._decodes(op, kind, stage) for op, kind in every.decodes], DECODE_POINTS),
            _stacked([self._sends(op, stage) for op, _ in every.sends], len(ROWS)),
        )

    def stage(self, stage: int, parts: StageParts | None = None, host: HostOverhead | None = None) -> StageTables:
        """Return the tables of one stage, of its `parts` if they are known, by the factors of `host`."""
        known = self.parts(stage) if parts is None else parts
        every = self.sorted[stage]

        def added(times: Array, operators: list[Any], falling: bool = False) -> Array:
            total = np.zeros(times.shape[1])
            for seconds, op in zip(times, operators, strict=True):
                name = self.name(op, stage)
                if falling == (name in self.models and self.models[name].may_fall):
                    factor = 1.0 if host is None else host.factor(name)
                    total += seconds if factor == 1.0 else factor * seconds
            return total

        def spread(times: Array, rows: str, most: int) -> Array:
            operators = [op for op, _ in every.rows if op.rows == rows]
            return _spread(added(times, operators), most, added(times, operators, falling=True))

        return StageTables(
            spread(known.tokens, "tokens", MOST_ROWS),
            spread(known.sampled, "sampled", MOST_REQUESTS),
            _rising_prompts(added(known.prefill, [op for op, _ in every.prompts])),
            _rising_decodes(added(known.decode, [op for op, _ in every.decodes])),
            _spread(added(known.send, [op for op, _ in every.sends]), MOST_ROWS),
        )

    def by_rows(self, op: Any, stage: int, rows: Array) -> Array:
        """Return seconds of all runs of an operator, for each number of rows (at least 1)."""
        seconds: Array = self._source(op, stage)(rows)
        return seconds

    def batch_times(self, stage: int, host: HostOverhead) -> list[BatchTime]:
        """Return what gives the seconds of each operator whose time is of the whole batch, by the factors of `host`."""
        found: list[BatchTime] = []
        for op, _ in self.sorted[stage].batches:
            source, factor = self._source(op, stage), host.factor(self.name(op, stage))
            found.append(source if factor == 1.0 else partial(_times, factor, source))
        return found

    def _source(self, op: Any, stage: int) -> Callable[..., Any]:
        """What gives an operator's seconds: its fitted model, or the roofline of its kind."""
        model: Any = self.models[self.name(op, stage)] if self.knows(op, stage) else None
        kind: Any = kind_of(op)
        return partial(kind.roofline if model is None else model.times, op, self.sites[stage])

    def _prompts(self, op: Any, kind: Any, stage: int) -> Array:
        """Seconds of equal prompts by (how many, chunk, prefix), (PROMPT_POINTS,)."""
        axes = np.meshgrid(PROMPTS, CHUNKS, PREFIXES, indexing="ij")
        prompts, chunks, prefixes = (grid.ravel() for grid in axes)
        if self.knows(op, stage):
            return np.asarray(self._source(op, stage)(prompts, chunks, prefixes))
        site, sizes = self.sites[stage], zip(chunks[: axes[0][0].size], prefixes, strict=False)
        each = np.array([kind.data_sheet(op, site, int(chunk), int(prefix)) for chunk, prefix in sizes])
        return np.asarray(np.outer(PROMPTS, each).ravel() + op.count * kind.launch_floor(op, site))

    def _decodes(self, op: Any, kind: Any, stage: int) -> Array:
        """Seconds of decodes by (number of requests, cached tokens of each), (DECODE_POINTS,)."""
        requests, lengths = (grid.ravel() for grid in np.meshgrid(REQUESTS, LENGTHS, indexing="ij"))
        return np.asarray(self._source(op, stage)(requests, kind.seen(op, requests, requests * lengths)))

    def _sends(self, op: Any, stage: int) -> Array:
        """Seconds to send a batch to the next stage, by its tokens."""
        times = self._source(op, stage)
        return np.asarray(times(ROWS) if self.knows(op, stage) else [times(int(rows)) for rows in ROWS])

    def limits(self) -> Limits:
        """Return the largest batch of which every operator lies within what was measured."""
        every = [(op, stage) for stage, operators in enumerate(self.operators) for op in operators]
        if not all(self.knows(op, stage) for op, stage in every):
            return Limits(0, 0, 0, 0, 0, 0)
        of_name: dict[str, list[Operator]] = {}
        for op, stage in every:
            of_name.setdefault(self.name(op, stage), []).append(op)
        return Limits.together(self.models[name].limits(mine, self.sites[0]) for name, mine in of_name.items())

    def describe(self, host: HostOverhead) -> str:
        """Return one line for reports: what was measured, what was carried over or estimated."""
        device, network = self.sites[0].device, self.sites[0].network
        measured = device.measured_as or device.name
        text = f"calibrated on measurements of {measured} ({network.name}, host overhead {host.name})"
        if measured != device.name:
            text += f", by the memory of {device.name}"
        if not self.calibration.records:
            return (
                f"an estimate for {device.name} ({network.name}, host overhead {host.name}) by its data sheet, with "
                f"floors and efficiencies carried over from {SOURCE}; nothing in it is measured"
            )
        every = [(op, stage) for stage, operators in enumerate(self.operators) for op in operators]
        used = sorted({self.name(op, stage) for op, stage in every if self.knows(op, stage)})
        if software := self.calibration.software_of(used):
            text += f"; operators of {software}"
        carried = {name: self.calibration.learned_on(name) for name in used}
        carried = {name: where for name, where in carried.items() if where != measured}
        if carried:
            families = " and ".join(sorted({self.models[name].family for name in carried}))
            text += f"; {families} carried over from {', '.join(sorted(set(carried.values())))}"
        lacking = sorted({self.name(op, stage) for op, stage in every if not self.knows(op, stage)})
        if lacking:
            text += f"; an estimate from the data sheet: {', '.join(in_words(name) for name in lacking)}"
        for warning in self.calibration.warnings(used):
            text += f"; {warning}"
        return text


def _times(factor: float, source: BatchTime, shape: BatchShape) -> float:
    return factor * source(shape)


def _stacked(times: list[Array], points: int) -> Array:
    """Times of operators, (operators, points)."""
    return np.stack(times) if times else np.zeros((0, points))


def _rising_prompts(seconds: Array) -> Array:
    """Seconds by (prompts, chunk, prefix), never falling."""
    grid = seconds.reshape(len(PROMPTS), len(CHUNKS), len(PREFIXES))
    for axis in range(3):
        grid = np.maximum.accumulate(grid, axis=axis)
    return grid


def _rising_decodes(seconds: Array) -> Array:
    """Seconds by (number of requests from 0 on, cached tokens of each), never falling.

    More requests of a length, or longer ones; the same tokens in fewer requests may well take longer.
    """
    grid = seconds.reshape(len(REQUESTS), len(LENGTHS))
    grid = np.maximum.accumulate(np.maximum.accumulate(grid, axis=0), axis=1)
    every = np.arange(MOST_REQUESTS + 1)
    return np.stack([np.interp(every, REQUESTS, column) for column in grid.T], axis=1)


def _spread(values: Array, most: int, falling: Array | float = 0.0) -> Array:
    """A table by every number of rows from 0 (0 s) to `most`, linear between ROWS; but for `falling`, never falling."""
    table = np.interp(np.arange(most + 1), ROWS, np.maximum.accumulate(values) + falling)
    table[0] = 0.0
    return table
