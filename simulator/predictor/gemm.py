"""Dense layers: the time of (m, k) x (k, n), learned as a multiple of what the device's data sheet leads one to expect.

What makes a matrix multiplication slower than the roofline is mostly geometry: how full the tiles and the waves of
tiles over the GPU's SMs are, and how sizes divide by powers of two (the library picks its kernel by that). A base says
what that costs, in six constants of a device and dtype (`Base`: a launch, shares of the peak rates); a forest corrects
it by the same geometry, so that what is learned on some models' layers carries over to others'. On a device that was
not measured the constants of others predict, with its own peak rates: a launch takes as long there.

Operands are of 16 bits, or weights of 8 (fp8, fp8_block) at twice the rate, with 16-bit activations in and out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from engine.errors import InputError
from engine.results.tables import Array
from engine.specs import DeviceSpec
from engine.specs.model import QUANTIZED_BYTES
from profiler.kinds import Gemm as Operator
from simulator.predictor.forest import Forest, WrittenForest
from simulator.predictor.kind import RowsModel, Site, slower_clock

if TYPE_CHECKING:
    import pandas as pd

# cuBLAS's usual tiles (rows, columns) and the share of the peak that each attains at its best: rules of thumb, which
# the base's constants scale and the forest corrects
TILES = (
    (64, 64, 0.55), (128, 64, 0.66), (64, 128, 0.66), (128, 128, 0.78), (128, 256, 0.85), (256, 128, 0.85),
    (96, 128, 0.74), (192, 128, 0.82), (64, 256, 0.74), (32, 64, 0.42), (64, 32, 0.42), (32, 32, 0.3), (16, 64, 0.3),
    (32, 128, 0.5), (128, 32, 0.5), (16, 128, 0.4),
)  # fmt: skip
FILLED = TILES[:9]  # whose waves the forest sees
SPLITS = (1, 2, 4, 8, 16)  # ways that a kernel may cut k (split-K), so that few tiles fill the SMs
SPLIT_S = 2e-6  # at CLOCK_HZ
WIDTH = 2  # bytes of an element of the activations
EIGHT_BITS = ("fp8", "fp8_block")  # weights of one byte, multiplied at twice the 16-bit rate
COPIES = 6  # of the weights, which measurements take in turn: those that fit in the cache together stay there
STEEP = 4.0
WIDEN_ROWS, WIDEN_LANES, WIDEN_HZ = 128, 128, 1.5e9  # of a tile, of a multiprocessor, about what the cards run at
FOREST: dict[str, Any] = {"trees": 18, "max_leaf_nodes": 3000, "max_features": 1.0}
BOOSTED: dict[str, Any] = {
    **{"trees": 100, "max_leaf_nodes": 400, "learning_rate": 0.1, "max_features": 0.3, "min_samples_leaf": 5}
}
LARGE = 20_000  # rows of a table from which on boosted trees do better on weight shapes left out
CLIFFS = 64 << 20  # bytes of a cache that weights of whole layers fit in, or just don't: random thresholds blur it
OF_MODELS: dict[str, Any] = {"trees": 36, "max_leaf_nodes": 2000, "max_features": 0.6}  # of tables of few weight shapes
SMALL = 4000  # rows up to which weight shapes keep their own measurements; of more, the forest knows enough
FEWEST = 200  # rows that a base is fitted to; fewer take the usual one


@dataclass(frozen=True)
class Base:
    """The constants of the time that geometry costs: `launch_s` + the p-norm of arithmetic and memory traffic.

    `launch_s` is that at CLOCK_HZ: it takes as many cycles everywhere. `arithmetic` and `traffic` multiply the times at
    the peak rates, `tiled` is the share (in the logarithm) of the tiles' waves in the arithmetic, `cache_rate` the
    bytes/s that each SM reads of weights that stay in the cache.
    """

    launch_s: float = 2.752e-6  # the defaults are of several devices together (simulator.predictor.carried)
    arithmetic: float = 0.7797
    traffic: float = 1.268
    cache_rate: float = 2.178e10
    norm: float = 3.093
    tiled: float = 1.0

    @classmethod
    def fit(cls, m: Array, k: Array, n: Array, seconds: Array, device: DeviceSpec, dtype: str) -> Base:
        """The constants that are nearest to measured times, in the logarithm and robustly; rounded to their text."""
        from scipy.optimize import least_squares

        every = np.linspace(0, len(m) - 1, min(len(m), SMALL)).astype(int)
        found_parts = work_of(m[every], k[every], n[every], device, dtype)
        measured = np.log(seconds[every])

        def left(values: Array) -> Array:
            return np.asarray(np.log(cls._scaled(values).of(found_parts, device)) - measured)

        first, low, high = [2.5, 0.8, 1.25, 2.0, 3.0, 0.9], [0.2, 0.2, 0.8, 0.2, 1.0, 0.0], [20, 4, 4, 20, 8, 1]
        found = least_squares(left, first, bounds=(low, high), loss="soft_l1", f_scale=0.1).x
        return cls(*(float(f"{value:.4g}") for value in astuple(cls._scaled(found))))

    @classmethod
    def _scaled(cls, values: Array) -> Base:
        launch, arithmetic, traffic, rate, norm, tiled = (float(value) for value in values)
        return cls(launch * 1e-6, arithmetic, traffic, rate * 1e10, norm, tiled)

    def of(self, parts: Parts, device: DeviceSpec) -> Array:
        """Seconds (rows,)."""
        cached = parts.in_cache * device.memory_bandwidth / (device.num_sms * self.cache_rate)
        moved = parts.traffic * (self.traffic * (1 - parts.in_cache) + cached)
        work = self.arithmetic * np.exp(self.tiled * np.log(parts.tiles) + (1 - self.tiled) * np.log(parts.arithmetic))
        norm = self.norm
        return np.asarray(self.launch_s * slower_clock(device) + (work**norm + moved**norm) ** (1 / norm))


@dataclass(frozen=True)
class Parts:
    """Seconds (rows,) at the peak rates: the arithmetic, by tiles, and the traffic; and whether weights are cached."""

    arithmetic: Array
    tiles: Array
    traffic: Array
    in_cache: Array


def widened(k: int, n: int, rows: Array, device: DeviceSpec) -> Array:
    """Seconds to widen (k, n) weights to 16 bits in the multiplying kernel, an estimate.

    Each weight takes an instruction (two for a pair: a shift with a mask, and a fused multiply-add) in each of the
    passes over the rows, WIDEN_ROWS at a time, on all lanes of the multiprocessors. It is added to the products'
    time; behind the reading of the weights it hides.
    """
    return np.asarray(np.ceil(rows / WIDEN_ROWS) * (k * n / (device.num_sms * WIDEN_LANES * WIDEN_HZ)))


class Gemm(RowsModel[Operator]):
    """A forest on log(measured / base).

    In a profile of a few models a weight shape (k, n) that was measured is interpolated between its own rows.
    """

    kind: ClassVar[str] = "gemm"
    columns: ClassVar[tuple[str, ...]] = ("m", "k", "n")
    family: ClassVar[str] = "linear"
    launch_s: ClassVar[float] = 3e-6

    def __init__(self, device: DeviceSpec, dtype: str = "bfloat16") -> None:
        super().__init__(device)
        self.dtype = dtype

    @property
    def may_fall(self) -> bool:
        """In 8 bits: vLLM chooses those kernels by rows, and 17 of them take up to 40 % longer than 64."""
        return self.dtype in EIGHT_BITS

    @classmethod
    def variant(cls, rows: pd.DataFrame) -> pd.Series:
        return rows["dtype"].astype("string").map({name: name for name in EIGHT_BITS}).fillna("").astype(str)

    @classmethod
    def variant_of(cls, op: Operator, site: Site) -> str:
        """The format of the operator's weights where it has measurements of its own; int4 and the like have none."""
        return op.dtype if op.dtype in EIGHT_BITS else ""

    @classmethod
    def groups(cls, rows: pd.DataFrame) -> pd.Series:
        """Whole models; of rows without one, whole weight shapes."""
        return rows["model"].fillna(rows["k"].astype(str) + "x" + rows["n"].astype(str)).astype(str)

    @classmethod
    def shared_shapes(cls, rows: pd.DataFrame) -> pd.Series | None:
        """Weight shapes (k, n), which models share: a model left out is partly known."""
        if rows["model"].isna().all():
            return None  # groups are shapes
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
        """Only the format that was measured; 16 bits are 16 bits."""
        return (self.dtype if self.dtype in EIGHT_BITS else None) == op.dtype

    def fit(self, frame: pd.DataFrame) -> Self:
        dtypes = sorted(set(frame["dtype"].dropna()) if "dtype" in frame else ())
        quantised = [name for name in dtypes if name in EIGHT_BITS]
        if quantised and len(dtypes) > 1:
            raise InputError(f"gemm rows of {' and '.join(dtypes)} are not one population: fit each by itself")
        self.dtype = quantised[0] if quantised else self.dtype
        rows = frame.groupby(["m", "k", "n"], as_index=False)["time_ms"].median()  # models share shapes
        m, k, n = (rows[name].to_numpy(float) for name in self.columns)
        seconds = rows["time_ms"].to_numpy(float) / 1e3
        log_s = np.log(seconds)
        self.limits_ = [(float(size.min()), float(size.max())) for size in (m, k, n)]
        enough = len(seconds) >= FEWEST
        self.base_ = Base.fit(m, k, n, seconds, self.device, self.dtype) if enough else Base()
        found, log_base = features(m, k, n, self.device, self.dtype, self.base_)
        of_models = "model" in frame and frame["model"].notna().any()
        left = log_s - log_base
        # 16-bit products are cuBLAS's, which picks among many kernels; those of 8 bits have few
        many = self.dtype not in EIGHT_BITS and (len(rows) >= LARGE or self.device.cache_bytes >= CLIFFS)
        self.forest_: Forest | WrittenForest = (
            Forest.boost(found, left, **BOOSTED)
            if many and not of_models
            else Forest.fit(found, left, **(OF_MODELS if of_models else FOREST))
        )
        self.least_ = float(f"{min(1.0, (seconds / self.roofline_of(m, k, n)).min()):.4g}")
        self.curves_: dict[tuple[int, int], tuple[Array, Array]] = {}  # log m, log(measured / roofline)
        log_ratio = np.maximum(log_s - np.log(self.roofline_of(m, k, n)), 0.0)
        shapes = sorted(set(zip(k.astype(int).tolist(), n.astype(int).tolist(), strict=True)))
        for shape in shapes if len(frame) <= SMALL else []:
            mine = (k == shape[0]) & (n == shape[1])
            if mine.sum() > 1:
                self.curves_[shape] = _rounded(np.log(m[mine])), _rounded(log_ratio[mine])
        return self

    def roofline_of(self, m: Array, k: Array, n: Array) -> Array:
        """Seconds at the device's peak rates, (rows,)."""
        return roofline(m, k, n, self.device, self.dtype)

    def seconds(self, columns: Mapping[str, Array]) -> Array:
        """Predicted times, as measured: below the roofline only as far as measured, where weights stay in the cache.

        Past the measured sizes the correction stays what it is at the edge, and the base goes on.
        """
        m, k, n = (np.asarray(columns[name], float) for name in self.columns)
        edges = zip((m, k, n), self.limits_, strict=True)
        in_m, in_k, in_n = (np.clip(size, low, high) for size, (low, high) in edges)
        found, _ = features(in_m, in_k, in_n, self.device, self.dtype, self.base_)
        own = np.exp(self.forest_.predict(found)) * self.base_.of(
            work_of(m, k, n, self.device, self.dtype), self.device
        )
        least = self.roofline_of(m, k, n)
        for (of_k, of_n), (log_m, log_ratio) in self.curves_.items():
            mine = (k == of_k) & (n == of_n)
            own[mine] = least[mine] * np.exp(np.interp(np.log(m[mine]), log_m, log_ratio))
        return np.asarray(np.maximum(own, least * self.least_))

    def times(self, op: Operator, site: Site, rows: Array) -> Array:
        """Seconds as learned, and no less than the roofline: between two iterations weights leave the cache.

        Nor faster than the device sustains where that is known: tables time a product for some milliseconds, prompts
        keep the card at its power limit.
        """
        m, k, n = np.asarray(rows, float), np.full(len(rows), float(op.k)), np.full(len(rows), float(op.n))
        least = roofline(m, k, n, site.device, self.dtype)
        device = site.device
        sustained = device.sustained_fp8_flops if self.dtype in EIGHT_BITS else device.sustained_flops
        if sustained is not None:
            least = np.maximum(least, 2 * m * k * n / sustained)
        return np.asarray(np.maximum(super().times(op, site, rows), op.count * least))

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
            "dtype": self.dtype,
            "limits": [list(limits) for limits in self.limits_],
            "base": asdict(self.base_),
            "least": self.least_,
            **({"curves": curves} if curves else {}),
            "forest": self.forest_.to_lines(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], device: DeviceSpec) -> Self:
        model = cls(device, data["dtype"])
        model.limits_ = [(low, high) for low, high in data["limits"]]
        model.base_ = Base(**data["base"])
        model.least_ = data["least"]
        model.forest_ = WrittenForest(data["forest"])
        model.curves_ = {
            (curve["k"], curve["n"]): (np.array(curve["log_m"]), np.array(curve["log_ratio"]))
            for curve in data.get("curves", [])
        }
        return model


def _rounded(values: Array) -> Array:
    """To what their text keeps."""
    return np.array([float(f"{value:.5g}") for value in values])


def weight_format(dtype: str) -> str:
    """Return the name in tables of a model's weight dtype: fp8_e4m3 is fp8, per tensor or row; others are their own."""
    return "fp8" if dtype.startswith("fp8") and dtype not in EIGHT_BITS else dtype


def rates(device: DeviceSpec, dtype: str) -> tuple[float, int]:
    """Peak FLOP/s, and bytes of a weight, of a matrix product in `dtype`."""
    return (2 * device.peak_flops, 1) if dtype in EIGHT_BITS else (device.peak_flops, WIDTH)


def roofline(m: Array, k: Array, n: Array, device: DeviceSpec, dtype: str = "bfloat16") -> Array:
    """Seconds at the device's peak rates: the longer of the arithmetic and of moving the operands once."""
    peak, width = rates(device, dtype)
    traffic = WIDTH * (m * k + m * n) + width * k * n
    seconds: Array = np.maximum(2 * m * k * n / peak, traffic / device.memory_bandwidth)
    return seconds


def tile_times(m: Array, k: Array, n: Array, device: DeviceSpec, dtype: str = "bfloat16") -> Array:
    """Seconds of the arithmetic by kernel, (rows, tiles x splits): waves of tiles over the SMs, each at its share.

    A wave takes as long as one tile on an SM, however few of the SMs have one.
    """
    times, peak = [], rates(device, dtype)[0]
    for rows, across, share in TILES:
        tiles = np.ceil(m / rows) * np.ceil(n / across)
        for split in SPLITS:
            waves = np.ceil(tiles * split / device.num_sms)
            tile = 2 * rows * across * (k / split) / (peak * share / device.num_sms)
            reduction = (
                SPLIT_S * slower_clock(device) + 4 * split * m * n / device.memory_bandwidth if split > 1 else 0.0
            )
            times.append(waves * tile + reduction)
    return np.stack(times, axis=1)


def work_of(m: Array, k: Array, n: Array, device: DeviceSpec, dtype: str) -> Parts:
    peak, width = rates(device, dtype)
    kernels = tile_times(m, k, n, device, dtype)
    fastest = kernels.min(axis=1)
    slower = np.log(kernels / fastest[:, None])
    tiles = fastest * np.exp(-np.log(np.mean(np.exp(-12 * slower), axis=1)) / 12)  # a soft minimum
    weights, activations = width * k * n, WIDTH * m * (k + n)
    cached = np.zeros(len(m))
    if device.cache_bytes:
        held = (COPIES * weights + activations) / device.cache_bytes
        cached = 1 / (1 + held**STEEP)
    return Parts(2 * m * k * n / peak, tiles, (weights + activations) / device.memory_bandwidth, cached)


def features(m: Array, k: Array, n: Array, device: DeviceSpec, dtype: str, base: Base) -> tuple[Array, Array]:
    """What the time depends on beyond the base, (rows, features); and the logarithm of the base."""
    peak, width = rates(device, dtype)
    flops, traffic = 2 * m * k * n, WIDTH * m * (k + n) + width * k * n
    least, parts = roofline(m, k, n, device, dtype), work_of(m, k, n, device, dtype)
    columns = [np.log2(value) for value in (m, k, n, flops, traffic, flops / traffic, m * n, m * k, k * n, n / k)]
    columns.append(np.log2(least))
    columns.append(np.log2(flops / peak / (traffic / device.memory_bandwidth)))
    for rows, across, _ in FILLED:
        per_sm = np.ceil(m / rows) * np.ceil(n / across) / device.num_sms
        columns.append(m * n / (np.ceil(per_sm) * device.num_sms * rows * across))  # how full the waves are
        columns.append(np.log2(per_sm))
    columns += [m / (np.ceil(m / size) * size) for size in (8, 16, 32, 64, 96, 128, 192, 256)]
    columns += [size / (np.ceil(size / step) * step) for step in (64, 128, 256) for size in (k, n)]
    kernels = tile_times(m, k, n, device, dtype)
    slower = np.log(kernels / kernels.min(axis=1)[:, None])[:, : len(FILLED) * len(SPLITS)]
    log_base = np.log(base.of(parts, device))
    columns += [log_base - np.log(least), np.log2(parts.tiles), parts.in_cache, *slower.T]
    return np.column_stack(columns).astype(np.float32).astype(float), log_base  # as scikit-learn compares them
