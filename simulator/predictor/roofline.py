"""The roofline predictor: an estimate from the data sheet, for any device that has one.

An operator takes a launch and the longer of its FLOPs over the peak rate and its bytes over the memory bandwidth, each
times the efficiency that the device spec states (Williams et al. 2009, "Roofline"); the attention of all prompts of a
batch is one launch, that of all decodes another; collectives take latency + bytes over bandwidth; a stage takes the
longer of that sum and the host's time to launch its layers. Nothing here is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from engine.scheduling.request import BatchShape
from engine.specs import DeviceSpec, HostOverhead, ModelSpec, NetworkSpec, ParallelSpec
from profiler.operators import inventory
from simulator.predictor import calibration as store
from simulator.predictor.base import RuntimePredictor
from simulator.predictor.kind import KindModel, Site
from simulator.predictor.kinds import Sorted, sort_out
from simulator.predictor.uncertainty import SHEET, UNKNOWN, estimate


class Roofline(RuntimePredictor):
    """Spec-sheet estimate of each stage's time for one model, on one device, under one parallel layout."""

    def __init__(
        self,
        model: ModelSpec,
        device: DeviceSpec,
        network: NetworkSpec,
        parallel: ParallelSpec,
        host: HostOverhead,
    ) -> None:
        self._replica = (model, device, network, parallel)
        self.description = (
            f"roofline estimate from the data sheet of {device.name} ({network.name}, host overhead {host.name}); "
            f"nothing in it is measured"
        )
        self.stages = [
            _stage(model, device, network, parallel, host, stage) for stage in range(parallel.pipeline_parallel_size)
        ]
        self.errors = {name: estimate(SHEET.get(store.kind_name(name), UNKNOWN)) for name in self._names()}

    def _names(self) -> Iterator[str]:
        for stage in self.stages:
            for op, kind in stage.operators.every:
                yield named(op, kind, stage.site)

    def for_host(self, host: HostOverhead) -> Roofline:
        return Roofline(*self._replica, host)

    def stage_time(self, shape: BatchShape, stage: int) -> float:
        return self.stage_times(shape, stage, 1)[0]

    def stage_times(self, shape: BatchShape, stage: int, repeats: int) -> list[float]:
        return self.stages[stage].times(shape, repeats)

    def send_time(self, shape: BatchShape, stage: int) -> float:
        return self.stages[stage].send_time(shape.num_tokens)


class _Stage:
    """A stage's times, tabulated by the number of rows as far as they have been asked for."""

    def __init__(self, operators: Sorted, site: Site, host: HostOverhead, layers: int, ranks: int, stage: int) -> None:
        self.operators, self.site, self.host = operators, site, host
        self.layers, self.ranks, self.stage = layers, ranks, stage
        decodes = [(self.factor(op, kind), *kind.data_sheet(op, site)) for op, kind in operators.decodes]
        self.decode_launch = self.launches(operators.decodes)
        self.prefill_launch = self.launches(operators.prompts)
        self.decode_per_request = sum(factor * per_request for factor, per_request, _ in decodes)
        self.decode_per_kv_token = sum(factor * per_kv_token for factor, _, per_kv_token in decodes)
        self.prefill_time = _sum([
            _scaled(self.factor(op, kind), partial(kind.data_sheet, op, site)) for op, kind in operators.prompts
        ])  # fmt: skip
        self.tables: dict[str, list[float]] = {"tokens": [], "sampled": []}

    def factor(self, op: Any, kind: type[KindModel[Any]]) -> float:
        """Return the factor that the engine's operators of a kind have."""
        factor: float = self.host.factor(named(op, kind, self.site))
        return factor

    def launches(self, operators: Sequence[tuple[Any, Any]]) -> float:
        """Return the seconds of the launches of operators."""
        every = (self.factor(op, kind) * op.count * kind.launch_floor(op, self.site) for op, kind in operators)
        return float(sum(every))

    def times(self, shape: BatchShape, repeats: int) -> list[float]:
        """Seconds of the batch and of its next repeats: the longer of GPU and launch, and the host time not hidden."""
        tokens, decodes, kv, prefills, sampled, growth = shape
        in_graph = not prefills and decodes <= self.host.graph_decodes
        launch, host = self.host.times(self.layers, decodes + len(prefills), self.ranks, self.stage, in_graph)
        launch += host
        gpu = (
            self.rows_time("tokens", self.host.padded(tokens))
            + self.rows_time("sampled", sampled)
            + self.decode_per_request * decodes
        )
        gpu += host + (self.decode_launch if decodes else 0.0) + (self.prefill_launch if prefills else 0.0)
        slope = self.decode_per_kv_token
        if not prefills:
            return [max(gpu + slope * (kv + i * growth), launch) for i in range(repeats)]
        times = []
        for i in range(repeats):
            attention = slope * (kv + i * growth)
            for chunk, prefix in prefills:
                attention += self.prefill_time(chunk, prefix + i * chunk)
            times.append(max(gpu + attention, launch))
        return times

    def rows_time(self, rows: str, count: int) -> float:
        """Seconds of every operator that depends on `count` rows (batch tokens, or sampled rows)."""
        table = self.tables[rows]
        if count >= len(table):
            size = max(1024, 2 * count)
            counts = np.arange(size)
            every = [
                self.factor(op, kind) * kind.roofline(op, self.site, counts)
                for op, kind in self.operators.rows
                if op.rows == rows
            ]
            times = sum(every, np.zeros(size))
            if rows == "sampled" and every:  # on the last stage
                times = times + self.host.sampling(self.site.model.vocab_size, counts)
            times[0] = 0.0  # an operator without rows is not run
            table = self.tables[rows] = times.tolist()
        return table[count]

    def send_time(self, tokens: int) -> float:
        """Seconds to send a batch's activations to the next stage."""
        return sum(
            (self.factor(op, kind) * kind.roofline(op, self.site, tokens) for op, kind in self.operators.sends), 0.0
        )


class _SteppedStage(_Stage):
    """A stage with operators whose time is of the whole batch."""

    def times(self, shape: BatchShape, repeats: int) -> list[float]:
        return [self.time(shape.after(i)) for i in range(repeats)]

    def time(self, shape: BatchShape) -> float:
        """Seconds of one batch: the longer of GPU and launch, and the host time not hidden."""
        tokens, decodes, kv, prefills, sampled, _ = shape
        in_graph = not prefills and decodes <= self.host.graph_decodes
        launch, host = self.host.times(self.layers, decodes + len(prefills), self.ranks, self.stage, in_graph)
        gpu = self.rows_time("tokens", self.host.padded(tokens)) + self.rows_time("sampled", sampled)
        for op, kind in self.operators.decodes if decodes else ():
            seconds = kind.roofline(op, self.site, np.array([decodes]), np.array([kv]))[0]
            gpu += self.factor(op, kind) * float(seconds)
        gpu += sum(self.prefill_time(chunk, prefix) for chunk, prefix in prefills)
        gpu += self.prefill_launch if prefills else 0.0
        gpu += sum(self.factor(op, kind) * kind.roofline(op, self.site, shape) for op, kind in self.operators.batches)
        return max(gpu, launch) + host


def _stage(
    model: ModelSpec, device: DeviceSpec, network: NetworkSpec, parallel: ParallelSpec, host: HostOverhead, stage: int
) -> _Stage:
    tp, layers = parallel.tensor_parallel_size, parallel.stage_layers(model.num_layers)[stage]
    site = Site(device, network, model, tp, stage * tp, host.attention_kernel, host.kernels)
    operators = sort_out(inventory(model, parallel, stage))
    bent = any(not kind.straight(op) for op, kind in operators.decodes)
    kind_of_stage = _SteppedStage if operators.batches or bent else _Stage
    return kind_of_stage(operators, site, host, layers, parallel.world_size, stage)


def named(op: Any, kind: type[KindModel[Any]], site: Site) -> str:
    """Return the name of an operator's kind, with its population."""
    return store.named(op.kind, kind.variant_of(op, site))


def _scaled(factor: float, function: Callable[[int, int], float]) -> Callable[[int, int], float]:
    return function if factor == 1.0 else lambda chunk, prefix: factor * function(chunk, prefix)


def _sum(functions: list[Callable[[int, int], float]]) -> Callable[[int, int], float]:
    """The sum of functions of a chunk and a prefix; a single one as it is, for it is asked for every prompt."""
    if len(functions) == 1:
        return functions[0]
    return lambda chunk, prefix: sum((function(chunk, prefix) for function in functions), 0.0)
