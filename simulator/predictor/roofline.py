"""The roofline predictor: an estimate from the data sheet, for any device that has one.

An operator takes the longer of its FLOPs over the peak rate and its bytes over the memory bandwidth, each times the
efficiency that the device spec states (Williams et al. 2009, "Roofline"); collectives take latency + bytes over
bandwidth; a stage takes the longer of that sum and the host's time to launch its layers. Nothing here is measured.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.request import BatchShape
from engine.specs import DeviceSpec, HostOverhead, ModelSpec, NetworkSpec, ParallelSpec
from engine.tables import Array
from profiler.operators import Operator, inventory
from simulator.predictor.base import RuntimePredictor


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
        self.description = (
            f"roofline estimate from the data sheet of {device.name} ({network.name}, host overhead {host.name}); "
            f"nothing in it is measured"
        )
        self.device = device
        self.network = network
        self.parallel = parallel
        self.host = host
        self.stages = [_Stage(self, model, stage) for stage in range(parallel.pipeline_parallel_size)]

    def stage_time(self, shape: BatchShape, stage: int) -> float:
        return self.stage_times(shape, stage, 1)[0]

    def stage_times(self, shape: BatchShape, stage: int, repeats: int) -> list[float]:
        return self.stages[stage].times(shape, repeats)

    def send_time(self, shape: BatchShape, stage: int) -> float:
        return self.stages[stage].send_time(shape.num_tokens)


class _Stage:
    """A stage's times, tabulated by the number of rows as far as they have been asked for."""

    def __init__(self, roofline: Roofline, model: ModelSpec, stage: int) -> None:
        device, parallel = roofline.device, roofline.parallel
        self.flops = device.peak_flops * device.matmul_efficiency
        self.attention_flops = device.peak_flops * device.attention_efficiency
        self.bandwidth = device.memory_bandwidth * device.bandwidth_efficiency
        self.network = roofline.network
        self.weight_width, self.width = model.weight_itemsize, model.activation_itemsize
        self.kv_width = model.kv_cache_itemsize
        self.tp = parallel.tensor_parallel_size
        self.first_rank = stage * self.tp
        operators = inventory(model, parallel, stage)
        self.by_rows = [op for op in operators if op.kind in ("gemm", "elementwise", "all_reduce")]
        (self.prefill,) = [op for op in operators if op.kind == "attention_prefill"]
        (decode,) = [op for op in operators if op.kind == "attention_decode"]
        self.send = next((op for op in operators if op.kind == "send"), None)
        # decode attention reads each cached token once, and a request's query and output once
        kv_bytes = 2 * decode.num_kv_heads * decode.head_dim * self.kv_width
        kv_flops = 4 * decode.num_heads * decode.head_dim
        self.decode_per_kv_token = decode.count * max(kv_bytes / self.bandwidth, kv_flops / self.attention_flops)
        self.decode_per_request = decode.count * 2 * decode.num_heads * decode.head_dim * self.width / self.bandwidth
        self.host = roofline.host
        self.stage = stage
        self.layers = parallel.stage_layers(model.num_layers)[stage]
        self.ranks = parallel.world_size
        self.tables: dict[str, list[float]] = {"tokens": [], "sampled": []}

    def times(self, shape: BatchShape, repeats: int) -> list[float]:
        """Seconds of the batch and of its next repeats: the longer of GPU and launch, and the host time not hidden."""
        tokens, decodes, kv, prefills, sampled, growth = shape
        launch, host = self.host.times(self.layers, decodes + len(prefills), self.ranks, self.stage)
        if not prefills and decodes <= self.host.graph_decodes:
            launch = 0.0
        launch += host
        gpu = self.rows_time("tokens", tokens) + self.rows_time("sampled", sampled) + self.decode_per_request * decodes
        gpu += host
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
            times = sum((self.operator_times(op, counts) for op in self.by_rows if op.rows == rows), np.zeros(size))
            times[0] = 0.0  # an operator without rows is not run
            table = self.tables[rows] = times.tolist()
        return table[count]

    def operator_times(self, op: Operator, rows: Array) -> Array:
        """Seconds of all `op.count` runs of an operator, for each number of rows."""
        if op.kind == "gemm":
            flops = 2.0 * rows * op.k * op.n
            traffic = rows * (op.k + op.n) * self.width + op.k * op.n * self.weight_width
            return op.count * np.maximum(flops / self.flops, traffic / self.bandwidth)
        if op.kind == "elementwise":
            return op.count * rows * op.bytes_per_row / self.bandwidth
        latency = self.network.allreduce_time(0, self.first_rank, self.tp)
        per_row = self.network.allreduce_time(op.bytes_per_row, self.first_rank, self.tp) - latency
        return op.count * (latency + rows * per_row)

    def prefill_time(self, chunk: int, prefix: int) -> float:
        """Seconds of causal attention of `chunk` tokens over themselves and `prefix` cached ones."""
        op = self.prefill
        flops: float = 4.0 * attended(chunk, prefix, op.sliding_window) * op.num_heads * op.head_dim
        kv_tokens = prefix + chunk if op.sliding_window is None else min(prefix + chunk, op.sliding_window + chunk)
        elements = chunk * op.num_heads * self.width + kv_tokens * op.num_kv_heads * self.kv_width
        traffic = 2.0 * elements * op.head_dim
        return op.count * max(flops / self.attention_flops, traffic / self.bandwidth)

    def send_time(self, tokens: int) -> float:
        """Seconds to send a batch's activations to the next stage."""
        if self.send is None:
            return 0.0
        return self.network.send_time(tokens * self.send.bytes_per_row, self.first_rank, self.first_rank + self.tp)


def attended(chunk: Any, prefix: Any, window: int | None) -> Any:
    """(query, key) pairs of `chunk` tokens over themselves and `prefix` cached ones, causal, perhaps in a window.

    Numbers or arrays, by plain arithmetic: it is asked for every prompt of every batch.
    """
    if window is None:
        return chunk * prefix + chunk * (chunk + 1) / 2
    full = prefix + chunk - window  # tokens that see a whole window: between none and all
    full = full * (full > 0)
    full = full - (full - chunk) * (full > chunk)
    rising = chunk - full  # tokens that see prefix+1, prefix+2, ...
    return full * window + rising * prefix + rising * (rising + 1) / 2
