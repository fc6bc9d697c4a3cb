"""How long a layer's experts take: sorted tokens through grouped matrix products, learned as a multiple of a model.

The model: the weights of every expert that a token is sent to are read, each expert's tokens are rounded up to tiles,
the longer of the two counts; then what the kernels read and write of the tokens' rows, and a launch for each kernel.
Forests, one for each format of the weights, learn log(measured / model) on features that carry over between models.

    Experts(catalog.device("h100")).fit(rows).seconds({"expert_tokens": ..., "hidden_size": ..., ...})
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import numpy as np

from engine.errors import InputError
from engine.results.tables import Array
from engine.specs import DeviceSpec, catalog
from engine.specs.model import EXPERT_LOADS, QUANTIZED_BYTES
from profiler import expert_load
from profiler.expert_kinds import Experts as Operator
from simulator.predictor.forest import Forest
from simulator.predictor.grids import MOST_ROWS
from simulator.predictor.kind import RowsModel, Site

if TYPE_CHECKING:
    import pandas as pd

WIDTH = 2  # bytes of an element of the activations
KERNELS, LAUNCH_S = 5, 3e-6  # sort, up, activation, down, sum
TILES = (16, 64, 128)  # rows of a tile, by the tokens of an expert
TILE_EDGES = (24, 96)  # tokens an expert from which on the next larger tile is taken
DRAM_SHARE, FLOPS_SHARE = 0.85, 0.7  # of the peaks, in the model that the forests correct
ATTAINED = {  # share of the roofline that vLLM 0.19's kernels attain: medians of measurements on H100 (mxfp4: H200)
    "bfloat16": 0.92,
    "fp8": 0.86,
    "fp8_block": 0.73,
    "int4": 0.24,  # weights are widened to 16 bits in the kernel
    "mxfp4": 0.5,
}
FOREST: dict[str, Any] = {"trees": 12, "max_leaf_nodes": 500, "max_features": 1.0, "min_samples_leaf": 2}
_PLAIN = {"bfloat16": 2, "float16": 2, "float32": 4}  # bytes of a weight; float32 is what CPUs are profiled in


class Work(NamedTuple):
    """What experts of a rank do with a batch's tokens, (rows,) each."""

    routed: Array  # rows that they get
    top: Array  # rows of the busiest one
    touched: Array  # experts that get any
    tiles: tuple[Array, Array, Array]  # rows with each expert's rounded up to tiles of TILES


class Experts(RowsModel[Operator]):
    """A forest for each format of the weights, on log(measured / model).

    Not usable are times below what the memory could deliver of the weights: a benchmark that runs one layer
    again and again finds them in the cache, and a model's next layer does not.
    """

    kind: ClassVar[str] = "moe"
    columns: ClassVar[tuple[str, ...]] = (
        *("expert_tokens", "hidden_size", "expert_width", "local_experts", "num_experts", "top_k", "expert_load"),
        "dtype",
    )
    family: ClassVar[str] = "linear"

    @classmethod
    def groups(cls, rows: pd.DataFrame) -> pd.Series:
        """What a rank has of a layer: hidden size, width, experts and how many a token passes."""
        hidden, width, experts, top_k = (
            rows[name].astype(str) for name in ("hidden_size", "expert_width", "local_experts", "top_k")
        )
        return hidden + "x" + width + "x" + experts + "x" + top_k

    @classmethod
    def data_sheet(cls, op: Operator, site: Site, rows: Array) -> Array:
        grid = _grid(rows)
        columns = {name: np.broadcast_to(np.asarray(value), len(grid)) for name, value in op.at(grid).items()}
        weights = op.matrices * op.hidden * op.width
        byte, flops, attained = _format(op.dtype, site.device)
        work = work_of(columns)
        read = work.touched * weights * byte / site.bandwidth
        product = 2 * weights * _in_tiles(work) / (flops * site.device.matmul_efficiency)
        moved = _moved(columns, work) / site.bandwidth
        seconds = np.maximum(read, product) / attained + moved
        return np.asarray(op.count * np.interp(rows, grid, np.maximum.accumulate(seconds)))

    @classmethod
    def launch_floor(cls, op: Operator, site: Site) -> float:
        return KERNELS * LAUNCH_S

    @classmethod
    def roofline(cls, op: Operator, site: Site, rows: Array) -> Array:
        """Return seconds by the data sheet, with the launches of kernels that wait for each other."""
        return np.asarray(cls.data_sheet(op, site, rows) + op.count * cls.launch_floor(op, site))

    @classmethod
    def usable(cls, rows: pd.DataFrame) -> pd.DataFrame:
        """Those whose format is known, and that took at least what reading their weights from memory takes."""
        rows = rows[rows["dtype"].isin([*_PLAIN, *QUANTIZED_BYTES])]
        kept = np.ones(len(rows), dtype=bool)
        for name in rows["device"].unique():
            if name in catalog.DEVICES:
                mine = (rows["device"] == name).to_numpy()
                columns = {column: rows[column].to_numpy()[mine] for column in cls.columns}
                bound = cls(catalog.DEVICES[name]).bound(columns)
                kept[mine] = rows["time_ms"].to_numpy(float)[mine] / 1e3 >= bound
        return rows[kept]

    def fit(self, frame: pd.DataFrame) -> Self:
        if not len(frame):
            raise InputError("no rows of experts to learn from: give a table that has some")
        self.forests_: dict[str, Forest | list[str]] = {}
        self.range_: dict[str, dict[str, list[float]]] = {}
        columns = {name: frame[name].to_numpy() for name in self.columns}
        seconds = frame["time_ms"].to_numpy(float) / 1e3
        x, log_model, _ = self._features(columns)
        for dtype in sorted(set(columns["dtype"].tolist())):
            mine = columns["dtype"] == dtype
            self.forests_[dtype] = Forest.fit(x[mine], np.log(seconds[mine]) - log_model[mine], **FOREST)
            sizes = {name: columns[name][mine].astype(float) for name in self.columns[:6]}
            self.range_[dtype] = {name: [float(size.min()), float(size.max())] for name, size in sizes.items()}
        return self

    def seconds(self, columns: Mapping[str, Array]) -> Array:
        x, log_model, bound = self._features(columns)
        dtypes = np.broadcast_to(np.asarray(columns["dtype"], dtype=object), len(x))
        result = np.full(len(x), np.nan)
        for dtype in set(dtypes.tolist()):
            mine = dtypes == dtype
            result[mine] = np.exp(self._forest(_learned_as(dtype)).predict(x[mine]) + log_model[mine])
        return np.asarray(np.maximum(result, bound))

    def bound(self, columns: Mapping[str, Array]) -> Array:
        """Return the seconds that the peaks of memory and arithmetic allow at the least, (rows,)."""
        return self._features(columns)[2]

    def times(self, op: Operator, site: Site, rows: Array) -> Array:
        gated = 3 / op.matrices  # measured of gated experts: others have two of three matrices
        grid = _grid(rows)
        seconds = np.maximum.accumulate(super().times(op, site, grid)) / gated
        return np.asarray(np.interp(rows, grid, seconds))

    def applies(self, op: Operator, site: Site) -> bool:
        return _learned_as(op.dtype) in self.forests_

    def comparable(self, rows: pd.DataFrame) -> pd.DataFrame:
        learned = np.array([_learned_as(dtype) in self.forests_ for dtype in rows["dtype"].tolist()], dtype=bool)
        return rows[learned]

    def in_range(self, columns: Mapping[str, Array]) -> Array:
        count = len(np.atleast_1d(columns["expert_tokens"]))
        dtypes = np.broadcast_to(np.asarray(columns["dtype"], dtype=object), count)
        within = np.zeros(count, dtype=bool)
        for dtype in set(dtypes.tolist()):
            ranges = self.range_.get(_learned_as(dtype))
            if ranges is None:
                continue
            inside = dtypes == dtype
            for name, (low, high) in ranges.items():
                values = np.asarray(columns[name], float)
                inside = inside & (values >= low) & (values <= high)
            within |= inside
        return within

    def to_json(self) -> dict[str, Any]:
        forests = {dtype: self._forest(dtype).to_lines() for dtype in self.forests_}
        return {"forests": forests, "range": self.range_}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], device: DeviceSpec) -> Self:
        self = cls(device)
        self.forests_ = dict(data["forests"])  # read when they are asked for: a deployment has one format
        self.range_ = data["range"]
        return self

    def _forest(self, dtype: str) -> Forest:
        found = self.forests_[dtype]
        if isinstance(found, list):
            found = self.forests_[dtype] = Forest.from_lines(found)
        return found

    def _features(self, columns: Mapping[str, Array]) -> tuple[Array, Array, Array]:
        """What the time depends on beyond the model, (rows, features); log model; the least that the peaks allow."""
        count = len(np.atleast_1d(columns["expert_tokens"]))
        whole = {name: np.broadcast_to(np.asarray(columns[name]), count) for name in self.columns}
        tokens, hidden, width, local, every, top_k = (whole[name].astype(float) for name in self.columns[:6])
        work = work_of(whole)
        formats = [_format(dtype, self.device) for dtype in whole["dtype"].tolist()]
        byte, flops = (np.array([each[i] for each in formats]) for i in (0, 1))
        weights = 3 * hidden * width
        bandwidth = self.device.memory_bandwidth
        read, product = work.touched * weights * byte / bandwidth, 2 * weights * _in_tiles(work) / flops
        terms = [read / DRAM_SHARE, product / FLOPS_SHARE, _moved(whole, work) / bandwidth / DRAM_SHARE]
        model = np.maximum(terms[0], terms[1]) + terms[2] + KERNELS * LAUNCH_S
        routed, touched = np.maximum(work.routed, 0.01), np.maximum(work.touched, 0.01)
        loads = np.array([EXPERT_LOADS.index(load) for load in whole["expert_load"].tolist()])
        logs = [
            *(tokens, routed / touched, np.maximum(work.top, 0.01), touched, hidden, width, local, tokens * top_k),
            *(every / top_k, every / local, touched * hidden * width, model),
            *(np.maximum(term, 1e-12) / model for term in terms),
            *(np.gcd(size.astype(int), most) for size, most in ((width, 256), (hidden, 1024))),
        ]
        plain = [width / (np.ceil(width / tile) * tile) for tile in (64, 128)]
        plain += [rows / routed for rows in work.tiles]
        plain += [width % size == 0 for size in (8, 16, 32, 64, 128)]  # else the kernels' loads are narrow
        plain.append(local == every)
        x = np.column_stack([*(np.log2(each) for each in logs), *plain, loads])
        bound = np.maximum(read, 2 * weights * work.routed / flops)
        return x.astype(np.float32).astype(float), np.log(model), bound


def _grid(rows: Array) -> Array:
    """Return numbers of tokens that reach as far as `rows`, between which a time is taken to be straight."""
    most = max(float(np.max(rows, initial=1)), float(MOST_ROWS))
    return np.unique(np.geomspace(1, most, 121).round())


def work_of(columns: Mapping[str, Array]) -> Work:
    """Return what the experts of each row of a table's columns do."""
    names = ("expert_tokens", "num_experts", "top_k", "local_experts", "expert_load")
    rows = zip(*(np.asarray(columns[name]).tolist() for name in names), strict=True)
    every = [_work(str(load), int(t), int(e), int(k), int(e) // int(local)) for t, e, k, local, load in rows]
    routed, top, touched, *tiles = np.array(every, dtype=float).reshape(-1, 3 + len(TILES)).T
    return Work(routed, top, touched, (tiles[0], tiles[1], tiles[2]))


@lru_cache(maxsize=1 << 16)
def _work(load: str, tokens: int, num_experts: int, top_k: int, ranks: int) -> tuple[float, ...]:
    spread = expert_load.loads(load, tokens, num_experts, top_k, ranks)
    in_tiles = (expert_load.padded(spread, tile) for tile in TILES)
    return float(spread.sum()), float(spread[0]), expert_load.touched(spread), *in_tiles


def _in_tiles(work: Work) -> Array:
    """Rows in the tiles that are taken for so many tokens an expert."""
    each = work.routed / np.maximum(work.touched, 1e-9)
    return np.where(each < TILE_EDGES[0], work.tiles[0], np.where(each < TILE_EDGES[1], work.tiles[1], work.tiles[2]))


def _moved(columns: Mapping[str, Array], work: Work) -> Array:
    """Bytes of tokens' rows that the kernels read and write.

    Activation and sum pass over every row of the batch, whichever rank its expert is on.
    """
    passed = np.asarray(columns["expert_tokens"], float) * columns["top_k"]
    hidden, width = np.asarray(columns["hidden_size"], float), np.asarray(columns["expert_width"], float)
    return np.asarray((passed * (6 * width + 2 * hidden) + work.routed * hidden) * WIDTH)


def _format(dtype: str, device: DeviceSpec) -> tuple[float, float, float]:
    """Bytes of a weight, peak FLOP/s, and the share of the roofline that is attained."""
    narrow = dtype in ("fp8", "fp8_block") and device.peak_fp8_flops is not None
    flops = device.peak_fp8_flops if narrow and device.peak_fp8_flops else device.peak_flops
    byte = QUANTIZED_BYTES[dtype] if dtype in QUANTIZED_BYTES else _PLAIN[dtype]
    return byte, flops, ATTAINED.get(_learned_as(dtype), ATTAINED["bfloat16"])


def _learned_as(dtype: str) -> str:
    """The format whose measurements are taken: 16 bits are 16 bits."""
    return "bfloat16" if _PLAIN.get(dtype) == 2 else dtype
