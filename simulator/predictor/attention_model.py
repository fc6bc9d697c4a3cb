"""What the kinds of attention share: a sum of physical terms for each kernel, and forests that correct it.

A kernel's time is a sum of terms with coefficients from 0 times the exponential of a forest's correction, and never
below the roofline divided by the best share of it that the kernel attained. Beyond what was measured the correction is
held at its value at the edge and the terms go on. Rows of several kernels (the table's `backend` and `kernel`) may be
fitted together: head configurations measured with one kernel and cached prefixes with another both carry over, and
`kernel` says whose times to predict.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import numpy as np

from engine.errors import InputError, unknown
from engine.results.tables import Array
from engine.specs import DeviceSpec
from profiler.kinds import Attention
from simulator.predictor.forest import Forest
from simulator.predictor.kind import KindModel, Site

if TYPE_CHECKING:
    import pandas as pd

Columns = Mapping[str, Array]
AttentionOp = TypeVar("AttentionOp", bound=Attention)

WIDTH = 2  # bytes of a 16-bit element
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

    def carried_over(self, op: Attention, site: Site, pairs: Array, tokens: Array, kv_tokens: Array) -> Array:
        """What to multiply the times with that were learned on another device: the ratio of the rooflines.

        `pairs` counts the (query, key) pairs, `tokens` the queries, `kv_tokens` the keys that are read.
        """
        flops = 4.0 * pairs * op.num_heads * op.head_dim
        traffic = 4.0 * (tokens * op.num_heads + kv_tokens * op.num_kv_heads) * op.head_dim

        def least(device: DeviceSpec) -> Array:
            seconds: Array = np.maximum(flops / device.peak_flops, traffic / device.memory_bandwidth)
            return seconds

        ratio: Array = least(site.device) / least(self.device)
        return ratio

    def _edges(self, name: str, grid: Array) -> Array:
        """The grid, and where kernels' measurements of a size begin and end."""
        edges: Array = np.union1d(grid, [edge for kernel in self.kernels_.values() for edge in kernel["range"][name]])
        return edges

    def _most(self, op: Attention, sizes: Array, **columns: Any) -> int:
        """The largest of `sizes` that lies within what was measured; 0 if none does."""
        full = {name: np.broadcast_to(np.asarray(value), len(sizes)) for name, value in (op.heads | columns).items()}
        known = self.in_range({name: full[name] for name in self.columns})
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
                "best": float(f"{min(1.0, (self._roofline(own) / seconds[mine]).max()):.4g}"),
                "terms": _coefficients(terms[mine], seconds[mine], weights[mine], self.terms_of(own)),
                "range": {size: span(values) for size, values in self.extent(own).items()},
            }
            kernels[mine] = number
        self.default_ = max(configurations, key=lambda name: configurations[name])
        self.heads_ = {name: sorted({int(value) for value in columns[name]}) for name in HEADS}
        self.groups_ = span(columns["num_heads"] / columns["num_kv_heads"])
        self.range_ = {name: span(values) for name, values in self.extent(columns).items()}
        self.forest_: Forest | None = None
        self.prefix_forest_: Forest | None = None
        self._correct(columns, np.log(seconds / self._base(columns, kernels)), kernels, weights / weights.mean())
        return self

    def _correct(self, columns: Columns, residual: Array, kernels: Array, weights: Array) -> None:
        """Learn the correction from the logarithms of measured over base."""
        self.forest_ = self._forest(self._seen(columns, kernels), residual, weights, self.leaves)

    def _forest(self, x: Array, y: Array, weights: Array, leaves: int) -> Forest:
        return Forest.fit(x, y, weights=weights, trees=self.trees, max_leaf_nodes=leaves)

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
        return np.column_stack([self.features(self._clipped(columns)), kernels])

    def _clipped(self, columns: Columns) -> dict[str, Array]:
        """The rows with their sizes held at the edges of the measured range."""
        return {**columns, **{name: held(columns[name], self.range_[name]) for name in self.sizes}}

    def _correction(self, columns: Columns, kernels: Array) -> Array:
        assert self.forest_ is not None
        return self.forest_.predict(self._seen(columns, kernels))

    def seconds(self, columns: Columns) -> Array:
        """Predicted times, (rows,). A column "kernel" of names in `kernels_` takes the place of `kernel`."""
        numbers = floats({name: columns[name] for name in self.columns})
        numbers = dict(zip(numbers, np.broadcast_arrays(*numbers.values()), strict=True))
        names, chosen = list(self.kernels_), np.array(self.kernel or self.default_)
        asked = np.broadcast_to(columns.get("kernel", chosen), len(numbers["num_heads"]))
        for name in set(asked.tolist()) - set(names):
            raise unknown(f"{self.kind} kernel", str(name), names)
        kernels = np.searchsorted(names, asked.astype(str))
        best = np.array([kernel["best"] for kernel in self.kernels_.values()])
        predicted = self._base(numbers, kernels) * np.exp(self._correction(numbers, kernels))
        return larger(predicted, self._roofline(numbers) / best[kernels])

    def in_range(self, columns: Columns) -> Array:
        """Rows of a size that some kernel was measured at, with heads within those of all kernels together."""
        numbers = floats({name: columns[name] for name in self.columns})
        numbers = dict(zip(numbers, np.broadcast_arrays(*numbers.values()), strict=True))
        within = np.isin(numbers["head_dim"], self.heads_["head_dim"])
        for name in ("num_heads", "num_kv_heads"):
            within &= inside(numbers[name], span(np.array(self.heads_[name])))
        within &= inside(numbers["num_heads"] / numbers["num_kv_heads"], self.groups_)
        extent = self.extent(numbers)
        boxes = [
            np.all([inside(extent[size], limits) for size, limits in kernel["range"].items()], axis=0)
            for kernel in self.kernels_.values()
        ]
        return np.asarray(within & np.any(boxes, axis=0))

    def to_json(self) -> dict[str, Any]:
        return {
            "kernel": self.kernel,
            "default": self.default_,
            "kernels": self.kernels_,
            "heads": self.heads_,
            "groups": self.groups_,
            "range": self.range_,
            "forest": self.forest_.to_lines() if self.forest_ else [],
            "prefix_forest": self.prefix_forest_.to_lines() if self.prefix_forest_ else [],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], device: DeviceSpec) -> Self:
        self = cls(device, data["kernel"])
        self.default_, self.kernels_, self.heads_ = data["default"], data["kernels"], data["heads"]
        self.groups_, self.range_ = data["groups"], data["range"]
        self.forest_ = Forest.from_lines(data["forest"])
        self.prefix_forest_ = Forest.from_lines(data["prefix_forest"]) if data["prefix_forest"] else None
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
