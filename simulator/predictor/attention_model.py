"""What the kinds of attention share: a sum of physical terms for each kernel, and forests that correct it.

A kernel's time is a sum of terms with coefficients from 0 times the exponential of a forest's correction, and never
below the roofline divided by the best share of it that the kernel attained (more than all of it where what was read
stayed in the cache). Beyond what the kernel was measured at the correction is held at its value at the edge and the
terms go on. Rows of several kernels (the table's `backend` and `kernel`) may be fitted together: head configurations
measured with one kernel and cached prefixes with another both carry over, and `kernel` says whose times to predict. On
a device that was not measured the coefficients and corrections of another predict, with its own peak rates: launches,
among the coefficients, take as long there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import numpy as np

from engine.errors import InputError, unknown
from engine.results.tables import Array
from engine.specs import DeviceSpec
from profiler.kinds import Attention
from simulator.predictor.forest import Forest, WrittenForest
from simulator.predictor.kind import KindModel, Site

if TYPE_CHECKING:
    import pandas as pd

Columns = Mapping[str, Array]
AttentionOp = TypeVar("AttentionOp", bound=Attention)

WIDTH = 2  # bytes of a 16-bit element
KV_FP8 = "cache fp8"  # how the dtype of rows with an 8-bit KV cache ends
HEADS = ("num_heads", "num_kv_heads", "head_dim")


class AttentionModel(KindModel[AttentionOp]):
    """What both phases share: a nonnegative sum of terms for each kernel, and forests that correct it.

    Args:
        device: whose peak rates bound the times; the device that was measured.
        kernel: whose times to predict, one of `kernels_`; None takes the one measured with most head configurations.
    """

    family: ClassVar[str] = "attention"
    pooled: ClassVar[bool] = True  # head configurations and cached prefixes were measured on different cards
    held_out: ClassVar[tuple[str, str]]  # the size held out where a kernel has one head configuration: word and column
    sizes: ClassVar[tuple[str, ...]]  # those of `extent` beyond whose measured range the correction is held
    trees: ClassVar[int] = 10
    leaves: ClassVar[int] = 700  # of a tree
    prefix_leaves: ClassVar[int] = 100

    def __init__(self, device: DeviceSpec, kernel: str | None = None) -> None:
        super().__init__(device)
        self.kernel = kernel
        self.kv_width = WIDTH

    @classmethod
    def variant(cls, rows: pd.DataFrame) -> pd.Series:
        cached = rows["dtype"].astype("string").fillna("").str.endswith(KV_FP8)
        return cached.map({True: "kv_fp8", False: ""}).astype(str)

    @classmethod
    def variant_of(cls, op: Attention, site: Site) -> str:
        return "kv_fp8" if site.kv_width == 1 else ""

    @classmethod
    def carried_by(cls, learned_on: DeviceSpec, device: DeviceSpec) -> DeviceSpec:
        """Attention is mostly the multiprocessors' work: where these are alike, what was learned holds as it is.

        Measured under vLLM 0.14 on both, an H200's prompts take 0.99 of the time that an H100's do. What a faster
        memory changes for decodes is in `AttentionDecode.times`.
        """
        alike = all(
            getattr(learned_on, name) == getattr(device, name) for name in ("peak_flops", "num_sms", "clock_hz")
        )
        return learned_on if alike else device

    @classmethod
    def groups(cls, rows: pd.DataFrame) -> pd.Series:
        """Head configurations; where a kernel was measured with one alone, its chunk lengths or batch sizes."""
        heads = rows["num_heads"].astype(str) + "/" + rows["num_kv_heads"].astype(str) + " heads"
        kernel = rows["source"].astype(str)
        alone = heads.groupby(kernel).transform("nunique") == 1
        word, size = cls.held_out
        return heads.where(~alone, f"{word} " + rows[size].astype(str)).astype(str)

    def columns_of(self, rows: pd.DataFrame) -> dict[str, Array]:
        kernels = kernel_names(rows)
        known = np.where(np.isin(kernels, list(self.kernels_)), kernels, self.kernel or self.default_)
        return {**super().columns_of(rows), "kernel": known}

    def asked(self, columns: Mapping[str, Any], count: int, site: Site) -> dict[str, Array]:
        asked = super().asked(columns, count, site)
        return asked | {"kernel": np.full(count, site.kernel)} if site.kernel in self.kernels_ else asked

    def _edges(self, name: str, grid: Array) -> Array:
        """The grid, and where kernels' measurements of a size begin and end."""
        edges: Array = np.union1d(grid, [edge for kernel in self.kernels_.values() for edge in kernel["range"][name]])
        return edges

    def _most(self, op: Attention, site: Site, sizes: Array, **columns: Any) -> int:
        """The largest of `sizes` that lies within what the site's kernel was measured at; 0 if none does."""
        known = self.in_range(self.asked(op.heads | columns, len(sizes), site))
        return int(sizes[known].max()) if known.any() else 0

    def terms(self, columns: Columns) -> Array:
        """Seconds (rows, terms) at the device's peak rates that add up to a time; none falls as a size grows."""
        raise NotImplementedError

    def terms_of(self, columns: Columns) -> Array:
        """Which terms (terms,) a kernel measured at these rows can have coefficients of."""
        raise NotImplementedError

    def features(self, columns: Columns) -> Array:
        """What the forest sees of a row, (rows, features)."""
        raise NotImplementedError

    def extent(self, columns: Columns) -> dict[str, Array]:
        """The sizes whose ranges say what a kernel was measured at."""
        raise NotImplementedError

    def work(self, columns: Columns) -> tuple[Array, Array]:
        """FLOPs and bytes that no kernel can do without, (rows,) each."""
        raise NotImplementedError

    def fit(self, frame: pd.DataFrame) -> Self:
        columns = floats({name: frame[name].to_numpy() for name in self.columns})
        seconds, names = frame["time_ms"].to_numpy(float) / 1e3, kernel_names(frame)
        if not len(seconds):
            raise InputError(f"no rows of {self.kind} to learn from: give a table that has some")
        self._check_population(frame, names)
        heads = np.stack([columns[name] for name in HEADS], axis=1)
        group, weights = np.unique(heads, axis=0, return_inverse=True)[1].ravel(), np.ones(len(seconds))
        self.kernels_: dict[str, dict[str, Any]] = {}
        configurations = {}
        terms, kernels = self.terms(columns), np.zeros(len(seconds), int)
        for number, name in enumerate(sorted(set(names.tolist()))):
            mine = names == name
            own = {column: values[mine] for column, values in columns.items()}
            counts = np.bincount(group[mine])
            weights[mine] = 1 / np.sqrt(counts[group[mine]])  # a configuration measured densely must not drown others
            configurations[name] = (int((counts > 0).sum()), int(mine.sum()))
            self.kernels_[name] = {
                "configurations": configurations[name][0],
                "rows": configurations[name][1],
                "best": float(f"{(self._roofline(own) / seconds[mine]).max():.4g}"),
                "terms": _coefficients(terms[mine], seconds[mine], weights[mine], self.terms_of(own)),
                "range": {size: span(values) for size, values in self.extent(own).items()},
            }
            kernels[mine] = number
        self.default_ = max(configurations, key=lambda name: configurations[name])
        self.heads_ = {name: sorted({int(value) for value in columns[name]}) for name in HEADS}
        self.groups_ = span(columns["num_heads"] / columns["num_kv_heads"])
        self.forest_: Forest | WrittenForest | None = None
        self.prefix_forest_: Forest | WrittenForest | None = None
        self.prefix_range_: dict[str, list[float]] = {}
        self._correct(columns, np.log(seconds / self._base(columns, kernels)), kernels, weights / weights.mean())
        return self

    def _check_population(self, frame: pd.DataFrame, names: Array) -> None:
        """Learn the bytes of a cached element. Raises InputError for a kernel's rows of several dtypes or versions."""
        for column in ("dtype", "software"):
            for name in set(names.tolist()) if column in frame else ():
                found = sorted({str(value) for value in frame[column][names == name].dropna()})
                if len(found) > 1:
                    raise InputError(
                        f"{self.kind} rows of {name} are of several {column}s ({', '.join(found)}): fit each by itself"
                    )
        if "dtype" in frame:
            variants = set(self.variant(frame))
            if len(variants) > 1:
                raise InputError(f"{self.kind} rows are of several KV dtypes: fit each by itself")
            self.kv_width = 1 if "kv_fp8" in variants else WIDTH

    def _correct(self, columns: Columns, residual: Array, kernels: Array, weights: Array) -> None:
        """Learn the correction from the logarithms of measured over base."""
        self.forest_ = self._forest(self._seen(columns, kernels), residual, weights, self.leaves)

    def _forest(self, x: Array, y: Array, weights: Array, leaves: int) -> Forest:
        most = leaves * len(self.heads_["head_dim"])
        return Forest.fit(x, y, weights=weights, trees=self.trees, max_leaf_nodes=most)

    def _base(self, columns: Columns, kernels: Array) -> Array:
        """Seconds by the terms alone, from the roofline up."""
        coefficients = np.array([kernel["terms"] for kernel in self.kernels_.values()])
        return larger((self.terms(columns) * coefficients[kernels]).sum(axis=1), self._roofline(columns))

    def _roofline(self, columns: Columns) -> Array:
        """Seconds (rows,) that the device's peak rates allow."""
        flops, traffic = self.work(columns)
        return larger(flops / self.device.peak_flops, traffic / self.device.memory_bandwidth)

    def _seen(self, columns: Columns, kernels: Array) -> Array:
        """The forest's input: the features within the measured range, and the kernel."""
        seen = [self.features(self._clipped(columns, kernels)), kernels]
        if len(self.heads_["head_dim"]) > 1:
            seen.append(np.log2(columns["head_dim"]))
        return np.column_stack(seen)

    def _clipped(self, columns: Columns, kernels: Array) -> dict[str, Array]:
        """The rows with their sizes held at the edges of the range that their kernel was measured over."""
        return {**columns, **{name: self._held(name, columns[name], kernels) for name in self.sizes}}

    def _held(self, size: str, values: Array, kernels: Array) -> Array:
        limits = np.array([kernel["range"][size] for kernel in self.kernels_.values()])[kernels.astype(int)]
        return np.asarray(np.clip(values, limits[:, 0], limits[:, 1]))

    def _correction(self, columns: Columns, kernels: Array) -> Array:
        assert self.forest_ is not None
        return self.forest_.predict(self._seen(columns, kernels))

    def seconds(self, columns: Columns) -> Array:
        """Predicted times, (rows,). A column "kernel" of names in `kernels_` takes the place of `kernel`."""
        numbers = floats({name: columns[name] for name in self.columns})
        numbers = dict(zip(numbers, np.broadcast_arrays(*numbers.values()), strict=True))
        kernels = self._asked(columns, len(numbers["num_heads"]))
        best = np.array([kernel["best"] for kernel in self.kernels_.values()])
        predicted = self._base(numbers, kernels) * np.exp(self._correction(numbers, kernels))
        return larger(predicted, self._roofline(numbers) / best[kernels])

    def _asked(self, columns: Columns, count: int) -> Array:
        """The number of each row's kernel, (count,). Raises InputError for one that was not measured."""
        names, chosen = list(self.kernels_), np.array(self.kernel or self.default_)
        asked = np.broadcast_to(columns.get("kernel", chosen), count)
        for name in set(asked.tolist()) - set(names):
            raise unknown(f"{self.kind} kernel", str(name), names)
        return np.searchsorted(names, asked.astype(str))

    def in_range(self, columns: Columns) -> Array:
        """Rows of a size that the kernel asked for was measured at, with heads within those of all kernels together."""
        numbers = floats({name: columns[name] for name in self.columns})
        numbers = dict(zip(numbers, np.broadcast_arrays(*numbers.values()), strict=True))
        kernels = self._asked(columns, len(numbers["num_heads"]))
        within = np.isin(numbers["head_dim"], self.heads_["head_dim"])
        for name in ("num_heads", "num_kv_heads"):
            within &= inside(numbers[name], span(np.array(self.heads_[name])))
        within &= inside(numbers["num_heads"] / numbers["num_kv_heads"], self.groups_)
        extent = self.extent(numbers)
        boxes = [
            np.all([inside(extent[size], limits) for size, limits in kernel["range"].items()], axis=0)
            for kernel in self.kernels_.values()
        ]
        return np.asarray(within & np.array(boxes)[kernels, np.arange(len(kernels))])

    def to_json(self) -> dict[str, Any]:
        return {
            "kernel": self.kernel,
            "kv_width": self.kv_width,
            "default": self.default_,
            "kernels": self.kernels_,
            "heads": self.heads_,
            "groups": self.groups_,
            "forest": self.forest_.to_lines() if self.forest_ else [],
            "prefix_forest": self.prefix_forest_.to_lines() if self.prefix_forest_ else [],
            **({"prefix_range": self.prefix_range_} if self.prefix_forest_ else {}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], device: DeviceSpec) -> Self:
        self = cls(device, data["kernel"])
        self.default_, self.kernels_, self.heads_ = data["default"], data["kernels"], data["heads"]
        self.groups_, self.kv_width = data["groups"], data["kv_width"]
        self.forest_ = WrittenForest(data["forest"])
        self.prefix_forest_ = WrittenForest(data["prefix_forest"]) if data["prefix_forest"] else None
        self.prefix_range_ = data.get("prefix_range", {})
        return self


def kernel_names(frame: pd.DataFrame) -> Array:
    """`backend/kernel` of each row, (rows,) of text: what `kernels_` are called."""
    parts = [
        frame[name].astype("string").fillna("").to_numpy(str) if name in frame else np.full(len(frame), "")
        for name in ("backend", "kernel")
    ]
    return np.array(["/".join(filter(None, row)) or "unnamed" for row in zip(*parts, strict=True)])


def _coefficients(terms: Array, seconds: Array, weights: Array, usable: Array) -> list[float]:
    """Coefficients from 0 of the terms that sum to the times, by least squares of the relative errors."""
    from sklearn.linear_model import LinearRegression

    used = np.flatnonzero(usable)
    model = LinearRegression(positive=True, fit_intercept=False)
    scale = (terms[:, used] / seconds[:, None]).max(axis=0)
    scale[scale == 0] = 1
    model.fit(terms[:, used] / seconds[:, None] / scale, np.ones(len(seconds)), sample_weight=weights)
    found = np.zeros(terms.shape[1])
    found[used] = model.coef_ / scale
    return [float(f"{value:.5g}") for value in found]


def floats(columns: Columns) -> dict[str, Array]:
    return {name: np.atleast_1d(np.asarray(values, dtype=np.float64)) for name, values in columns.items()}


def span(values: Array) -> list[float]:
    return [float(values.min()), float(values.max())]


def inside(values: Array, limits: list[float]) -> Array:
    return np.asarray((values >= limits[0]) & (values <= limits[1]))


def held(values: Array, limits: list[float]) -> Array:
    return np.asarray(np.clip(values, limits[0], limits[1]))


def larger(a: Array, b: Array) -> Array:
    return np.asarray(np.maximum(a, b))
