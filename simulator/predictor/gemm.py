"""Dense layers: the time of (m, k) x (k, n) in 16 bits, learned as a multiple of the roofline.

What makes a matrix multiplication slower than the roofline is mostly geometry: how full the tiles and the waves of
tiles over the GPU's SMs are, and how sizes divide by powers of two (the library picks its kernel by that). Those are
the features, so that what is learned on some models' layers carries over to others'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from engine.results.tables import Array
from engine.specs import DeviceSpec
from engine.specs.model import QUANTIZED_BYTES
from profiler.kinds import Gemm as Operator
from simulator.predictor.forest import Forest
from simulator.predictor.kind import RowsModel, Site

if TYPE_CHECKING:
    import pandas as pd

# cuBLAS's usual tiles (rows, columns) and the share of the peak that each attains at its best: rules of thumb, which
# the forests correct
TILES = (
    (64, 64, 0.55), (128, 64, 0.66), (64, 128, 0.66), (128, 128, 0.78), (128, 256, 0.85), (256, 128, 0.85),
    (96, 128, 0.74), (192, 128, 0.82), (64, 256, 0.74),
)  # fmt: skip
SPLITS = (1, 2, 4, 8)  # ways that a kernel may cut k (split-K), so that few tiles fill the SMs
LAUNCH_S, SPLIT_S, DRAM_SHARE = 2.5e-6, 3e-6, 0.87
WIDTH = 2  # bytes of an element
WIDEN_ROWS, WIDEN_LANES, WIDEN_HZ = 128, 128, 1.5e9  # of a tile, of a multiprocessor, about what the cards run at
FOREST: dict[str, Any] = {"trees": 18, "max_leaf_nodes": 2000, "max_features": 0.6}


SMALL = 4000  # rows up to which weight shapes keep their own measurements; of more, forests know enough


def widened(k: int, n: int, rows: Array, device: DeviceSpec) -> Array:
    """Seconds to widen (k, n) weights to 16 bits in the multiplying kernel, an estimate.

    Each weight takes an instruction (two for a pair: a shift with a mask, and a fused multiply-add) in each of the
    passes over the rows, WIDEN_ROWS at a time, on all lanes of the multiprocessors. It is added to the products'
    time; behind the reading of the weights it hides.
    """
    return np.asarray(np.ceil(rows / WIDEN_ROWS) * (k * n / (device.num_sms * WIDEN_LANES * WIDEN_HZ)))


class Gemm(RowsModel[Operator]):
    """The geometric mean of two forests: on log(measured / roofline) and on log(measured / tile time).

    In a profile of a few models a weight shape (k, n) that was measured is interpolated between its own rows.
    """

    kind: ClassVar[str] = "gemm"
    columns: ClassVar[tuple[str, ...]] = ("m", "k", "n")
    family: ClassVar[str] = "linear"

    @classmethod
    def groups(cls, rows: pd.DataFrame) -> pd.Series:
        """Whole models; of rows without one, whole weight shapes."""
        return rows["model"].fillna(rows["k"].astype(str) + "x" + rows["n"].astype(str)).astype(str)

    @classmethod
    def shared_shapes(cls, rows: pd.DataFrame) -> pd.Series | None:
        """Weight shapes (k, n), which models share: a model left out is partly known."""
        return rows["k"].astype(str) + "x" + rows["n"].astype(str)

    @classmethod
    def data_sheet(cls, op: Operator, site: Site, rows: Array) -> Array:
        """Quantised weights are read in their format; see `widened` for those that are computed with in 16 bits."""
        flops = 2.0 * rows * op.k * op.n
        byte = site.weight_width if op.dtype is None else QUANTIZED_BYTES[op.dtype]
        traffic = rows * (op.k + op.n) * site.width + op.k * op.n * byte
        rate, widening = site.flops, np.zeros(1)
        fp8 = site.device.peak_fp8_flops
        if op.dtype in ("fp8", "fp8_block") and fp8 is not None:
            rate = fp8 * site.device.matmul_efficiency
        elif op.dtype is not None:
            widening = widened(op.k, op.n, rows, site.device)
        return np.asarray(op.count * np.maximum(flops / rate + widening, traffic / site.bandwidth))

    def applies(self, op: Operator, site: Site) -> bool:
        """Only 16 bits were measured."""
        return op.dtype is None

    def fit(self, frame: pd.DataFrame) -> Self:
        rows = frame.groupby(["m", "k", "n"], as_index=False)["time_ms"].median()  # models share shapes
        m, k, n = (rows[name].to_numpy(float) for name in self.columns)
        log_s = np.log(rows["time_ms"].to_numpy(float) / 1e3)
        self.limits_ = [(float(size.min()), float(size.max())) for size in (m, k, n)]
        plain, tiled, log_tile = features(m, k, n, self.device)
        self.forest_ = Forest.fit(plain, log_s - np.log(roofline(m, k, n, self.device)), **FOREST)
        self.tile_forest_ = Forest.fit(tiled, log_s - log_tile, **FOREST)
        self.curves_: dict[tuple[int, int], tuple[Array, Array]] = {}  # log m, log(measured / roofline)
        log_ratio = np.maximum(log_s - np.log(roofline(m, k, n, self.device)), 0.0)
        shapes = sorted(set(zip(k.astype(int).tolist(), n.astype(int).tolist(), strict=True)))
        for shape in shapes if len(frame) <= SMALL else []:
            mine = (k == shape[0]) & (n == shape[1])
            if mine.sum() > 1:
                self.curves_[shape] = _rounded(np.log(m[mine])), _rounded(log_ratio[mine])
        return self

    def seconds(self, columns: Mapping[str, Array]) -> Array:
        """Predicted times; past the measured sizes the multiple of the roofline stays what it is at the edge."""
        m, k, n = (np.asarray(columns[name], float) for name in self.columns)
        edges = zip((m, k, n), self.limits_, strict=True)
        in_m, in_k, in_n = (np.clip(size, low, high) for size, (low, high) in edges)
        plain, tiled, log_tile = features(in_m, in_k, in_n, self.device)
        log_roofline = np.log(roofline(in_m, in_k, in_n, self.device))
        log_ratio = (self.forest_.predict(plain) + self.tile_forest_.predict(tiled) + log_tile - log_roofline) / 2
        for (of_k, of_n), (log_m, own) in self.curves_.items():
            mine = (k == of_k) & (n == of_n)
            log_ratio[mine] = np.interp(np.log(m[mine]), log_m, own)
        return roofline(m, k, n, self.device) * np.exp(np.maximum(log_ratio, 0.0))

    def in_range(self, columns: Mapping[str, Array]) -> Array:
        inside = np.ones(len(columns["m"]), dtype=bool)
        for name, (low, high) in zip(self.columns, self.limits_, strict=True):
            inside &= (low <= columns[name]) & (columns[name] <= high)
        return inside

    def to_json(self) -> dict[str, Any]:
        curves = [
            {"k": k, "n": n, "log_m": log_m.tolist(), "log_ratio": log_ratio.tolist()}
            for (k, n), (log_m, log_ratio) in self.curves_.items()
        ]
        return {
            "limits": [list(limits) for limits in self.limits_],
            **({"curves": curves} if curves else {}),
            "forest": self.forest_.to_lines(),
            "tile_forest": self.tile_forest_.to_lines(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], device: DeviceSpec) -> Self:
        model = cls(device)
        model.limits_ = [(low, high) for low, high in data["limits"]]
        model.forest_ = Forest.from_lines(data["forest"])
        model.tile_forest_ = Forest.from_lines(data["tile_forest"])
        model.curves_ = {
            (curve["k"], curve["n"]): (np.array(curve["log_m"]), np.array(curve["log_ratio"]))
            for curve in data.get("curves", [])
        }
        return model


def _rounded(values: Array) -> Array:
    """To what their text keeps."""
    return np.array([float(f"{value:.5g}") for value in values])


def roofline(m: Array, k: Array, n: Array, device: DeviceSpec) -> Array:
    """Seconds at the device's peak rates: the longer of the arithmetic and of moving the operands once."""
    traffic = WIDTH * (m * k + k * n + m * n)
    seconds: Array = np.maximum(2 * m * k * n / device.peak_flops, traffic / device.memory_bandwidth)
    return seconds


def tile_times(m: Array, k: Array, n: Array, device: DeviceSpec) -> Array:
    """Seconds of the arithmetic by kernel, (rows, tiles x splits): waves of tiles over the SMs, each at its share.

    A wave takes as long as one tile on an SM, however few of the SMs have one.
    """
    times = []
    for rows, across, share in TILES:
        tiles = np.ceil(m / rows) * np.ceil(n / across)
        for split in SPLITS:
            waves = np.ceil(tiles * split / device.num_sms)
            tile = 2 * rows * across * (k / split) / (device.peak_flops * share / device.num_sms)
            reduction = SPLIT_S + 4 * split * m * n / device.memory_bandwidth if split > 1 else 0.0
            times.append(waves * tile + reduction)
    return np.stack(times, axis=1)


def features(m: Array, k: Array, n: Array, device: DeviceSpec) -> tuple[Array, Array, Array]:
    """What the time depends on beyond the roofline, (rows, features); the same with the kernels' times; log tile time.

    The tile time is that of the fastest kernels (a soft minimum) with memory traffic and launch.
    """
    flops, traffic = 2 * m * k * n, WIDTH * (m * k + k * n + m * n)
    columns = [np.log2(value) for value in (m, k, n, flops, traffic, flops / traffic)]
    columns.append(np.log2(roofline(m, k, n, device)))
    columns.append(np.log2(flops / device.peak_flops / (traffic / device.memory_bandwidth)))
    for rows, across, _ in TILES:
        per_sm = np.ceil(m / rows) * np.ceil(n / across) / device.num_sms
        columns.append(m * n / (np.ceil(per_sm) * device.num_sms * rows * across))  # how full the waves are
        columns.append(np.log2(per_sm))
    columns += [m / (np.ceil(m / size) * size) for size in (8, 16, 32, 64, 96, 128, 192, 256)]
    columns += [size / (np.ceil(size / step) * step) for step in (64, 128, 256) for size in (k, n)]
    kernels = tile_times(m, k, n, device)
    fastest = kernels.min(axis=1)
    slower = np.log(kernels / fastest[:, None])
    arithmetic = fastest * np.exp(-np.log(np.mean(np.exp(-12 * slower), axis=1)) / 12)
    log_tile = np.log(np.cbrt(arithmetic**3 + (traffic / (DRAM_SHARE * device.memory_bandwidth)) ** 3) + LAUNCH_S)
    against = log_tile - np.log(roofline(m, k, n, device))

    def stack(parts: list[Array]) -> Array:
        return np.column_stack(parts).astype(np.float32).astype(float)  # as scikit-learn compares them

    return stack(columns), stack([*columns, against, slower]), log_tile
