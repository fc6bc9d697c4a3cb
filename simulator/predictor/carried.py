"""Estimates of a GPU without any measurement: floors and efficiencies carried over by rule from those that have some.

The constants below were fitted to ai-dynamo/aiconfigurator's tables of vLLM 0.14 in 16 bits on A100, H100, H200 (SXM)
and L40S together (benchmarks/cold_start.py fits them again, and reports the errors with each device left out in turn).
Work takes its time at the device's own peak rates, over a share that is the same everywhere. A launch, and what each
head or step of a loop takes beside its work, takes as many clock cycles everywhere: never a ratio of rooflines. Of
prefills the constants are of FlashAttention 3 where tensor cores are of Hopper's kind or later, else of its version 2.

    calibration = carried(catalog.device("b200"))
    calibration.models["gemm"].seconds({"m": ..., "k": ..., "n": ...})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from engine.results.tables import Array
from engine.specs import DeviceSpec
from profiler.kinds import AllReduce, AttentionDecode, AttentionPrefill, Elementwise, Gemm
from simulator.predictor import collectives, elementwise, gemm
from simulator.predictor.calibration import Calibration
from simulator.predictor.kind import DecodeModel, KindModel, PromptModel, RowsModel, Site, slower_clock

WIDTH, HELD = 2, 4.0  # bytes of an element; how sharply what exceeds the cache leaves it
HEADS = ("num_heads", "num_kv_heads", "head_dim")
HOPPER = 3000  # FLOP per SM and cycle, from which on attention is FlashAttention 3
SOURCE = "A100, H100, H200 and L40S"


def tensor_cores(device: DeviceSpec) -> str:
    """Return whose prefill constants a device has, by its FLOP per SM and cycle."""
    return "hopper" if device.peak_flops / device.num_sms / device.clock_hz >= HOPPER else "others"


class Estimate(KindModel[Any]):
    """What the estimates share: nothing of them is within what was measured."""

    def in_range(self, columns: Mapping[str, Array]) -> Array:
        return np.zeros(len(next(iter(columns.values()))), dtype=bool)

    def limits(self, operators: Sequence[Any], site: Site) -> dict[str, int]:
        return dict.fromkeys(("tokens", "chunk", "prefix", "requests", "kv_tokens", "length"), 0)


class CarriedGemm(Estimate, RowsModel[Gemm]):
    """The base of `gemm.Gemm` with the constants of other devices."""

    kind: ClassVar[str] = "gemm"
    columns: ClassVar[tuple[str, ...]] = ("m", "k", "n")
    family: ClassVar[str] = "linear"

    def __init__(self, device: DeviceSpec, dtype: str = "bfloat16", base: gemm.Base | None = None) -> None:
        super().__init__(device)
        self.dtype, self.base = dtype, base or gemm.Base()

    def seconds(self, columns: Mapping[str, Array]) -> Array:
        m, k, n = (np.asarray(columns[name], float) for name in self.columns)
        return self.base.of(gemm.work_of(m, k, n, self.device, self.dtype), self.device)


class _CarriedAttention(Estimate):
    family: ClassVar[str] = "attention"
    constants: tuple[float, ...]

    def __init__(self, device: DeviceSpec, kv_width: int = WIDTH, constants: tuple[float, ...] | None = None) -> None:
        super().__init__(device)
        self.kv_width = kv_width
        self.constants = constants or self.usual(device)

    @classmethod
    def usual(cls, device: DeviceSpec) -> tuple[float, ...]:
        """Return the constants of a device that was not measured."""
        raise NotImplementedError

    def _moved(self, traffic: Array, share: float, rate: float) -> Array:
        """Seconds of memory traffic in bytes, (rows,), from the cache as far as it fits there."""
        device = self.device
        held = 1 / (1 + (traffic / device.cache_bytes) ** HELD) if device.cache_bytes else np.zeros(len(traffic))
        cached = traffic / (device.num_sms * rate)
        return np.asarray((1 - held) * share * traffic / device.memory_bandwidth + held * cached)


class CarriedPrefill(_CarriedAttention, PromptModel[AttentionPrefill]):
    """Launch + the tiles of 128 queries by 64 keys that the mask shows + the longest loop over keys + traffic.

    Of prompts of one token the query heads that share a KV head fill a tile together, as the kernels swap them.
    """

    kind: ClassVar[str] = "attention_prefill"
    columns: ClassVar[tuple[str, ...]] = ("batch_size", "chunk", "prefix", *HEADS)

    @classmethod
    def usual(cls, device: DeviceSpec) -> tuple[float, ...]:
        return PREFILL[tensor_cores(device)]

    def seconds(self, columns: Mapping[str, Array]) -> Array:
        b, c, p, h, kv, d = np.broadcast_arrays(*(np.asarray(columns[name], float) for name in self.columns))
        launch, share, traffic, loop, rate = self.constants
        tile = 4 * 128 * 64 * d / self.device.peak_flops  # seconds of one on the whole device
        rows = np.where(c == 1, kv * np.ceil(h / kv / 128), h * np.ceil(c / 128))
        tiles = b * rows * (p / 64 + np.ceil(c / 64) / 2 + 0.5)
        moved = self._moved(2 * d * b * (WIDTH * c * h + self.kv_width * (p + c) * kv), traffic, rate)
        longest = np.ceil((p + c) / 64) * self.device.num_sms
        return np.asarray(launch * slower_clock(self.device) + tile * (tiles / share + loop * longest) + moved)

    def times(self, op: AttentionPrefill, site: Site, prompts: Array, chunks: Array, prefixes: Array) -> Array:
        window = op.sliding_window
        seen = prefixes if window is None else np.minimum(prefixes, window)
        columns = self.asked({**op.at(chunks, seen), "batch_size": prompts}, len(chunks), site)
        return np.asarray(op.count * self.seconds(columns))


class CarriedDecode(_CarriedAttention, DecodeModel[AttentionDecode]):
    """Launch + traffic + a little for each query head, and for each cached token of a request."""

    kind: ClassVar[str] = "attention_decode"
    columns: ClassVar[tuple[str, ...]] = ("batch_size", "kv_tokens", *HEADS)

    @classmethod
    def usual(cls, device: DeviceSpec) -> tuple[float, ...]:
        return DECODE

    def seconds(self, columns: Mapping[str, Array]) -> Array:
        b, tokens, h, kv, d = np.broadcast_arrays(*(np.asarray(columns[name], float) for name in self.columns))
        launch, traffic, rate, head, token = self.constants
        fixed = (launch + head * b * h + token * tokens / b) * slower_clock(self.device)
        moved = self._moved(2 * d * (WIDTH * b * h + self.kv_width * tokens * kv), traffic, rate)
        return np.asarray(fixed + moved)

    def times(self, op: AttentionDecode, site: Site, requests: Array, kv_tokens: Array) -> Array:
        return np.asarray(op.count * self.seconds(self.asked(op.at(requests, kv_tokens), len(kv_tokens), site)))


class CarriedElementwise(Estimate, RowsModel[Elementwise]):
    """The roofline with a launch."""

    kind: ClassVar[str] = "elementwise"
    columns: ClassVar[tuple[str, ...]] = elementwise.Elementwise.columns

    def times(self, op: Elementwise, site: Site, rows: Array) -> Array:
        return elementwise.Elementwise.roofline(op, site, rows)


class CarriedAllReduce(Estimate, RowsModel[AllReduce]):
    """The roofline, which on a switch is of kernels that were measured on others."""

    kind: ClassVar[str] = "all_reduce"
    columns: ClassVar[tuple[str, ...]] = collectives.AllReduce.columns
    family: ClassVar[str] = "communication"

    def times(self, op: AllReduce, site: Site, rows: Array) -> Array:
        return collectives.AllReduce.data_sheet(op, site, rows)


# launch s, share of the peak, traffic, loop, bytes/s of the cache by SM
PREFILL = {
    "hopper": (1.14e-5, 0.6592, 2.925, 1.102, 1.305e10),
    "others": (7.896e-6, 0.5575, 1.51, 0.5957, 1.415e10),
}
DECODE = (1.169e-5, 1.225, 1.686e10, 2.073e-9, 6.841e-10)  # launch s, traffic, cache's bytes/s by SM, s a head, a token


def carried(device: DeviceSpec) -> Calibration:
    """Return the estimates of a device's operators. The cache is taken to hold nothing from one layer to the next."""
    device = replace(device, cache_bytes=0)
    models: dict[str, KindModel[Any]] = {
        "gemm": CarriedGemm(device),
        **{f"gemm.{name}": CarriedGemm(device, name) for name in gemm.EIGHT_BITS},
        "elementwise": CarriedElementwise(device),
        "attention_prefill": CarriedPrefill(device),
        "attention_prefill.kv_fp8": CarriedPrefill(device, 1),
        "attention_decode": CarriedDecode(device),
        "attention_decode.kv_fp8": CarriedDecode(device, 1),
        "all_reduce": CarriedAllReduce(device),
    }
    for model in models.values():
        model.learned_on = SOURCE
    return Calibration(device.name, models, {})
