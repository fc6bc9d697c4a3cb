"""How long attention takes, learned from measurements of head configurations and kernels unlike those predicted.

A kernel's time is a sum of physical terms with coefficients from 0 (launch, the longest loop over KV tiles, the work
of all tiles over the multiprocessors, bytes) times the exponential of a forest's correction, and never below the
roofline divided by the best share of it that the kernel attained. The terms follow FlashAttention-2 (Dao 2023, section
3.2): a thread block computes a tile of query rows of one head and loops over the KV in tiles; grouped-query decoding
packs the heads of a group into a tile and splits the KV over thread blocks (Flash-Decoding), multi-head decoding does
neither. Beyond what was measured the correction is held at its value at the edge and the terms go on, so times rise
with chunk, prefix, KV length and batch. Within, the trees' steps are small but not monotone.

Rows of several kernels (the table's `backend` and `kernel`) may be fitted together: head configurations measured with
one kernel and cached prefixes with another both carry over, and `kernel` says whose times to predict.

    AttentionDecode(device).fit(rows).seconds({"batch_size": ..., "kv_tokens": ..., "num_heads": ..., ...})
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from engine.errors import InputError, unknown
from engine.specs import DeviceSpec
from engine.tables import Array
from simulator.predictor.forest import Forest
from simulator.predictor.kinds import KindModel

if TYPE_CHECKING:
    import pandas as pd

Columns = Mapping[str, Array]

QUERY_TILE, KV_TILE = 128, 64  # rows and KV tokens of a FlashAttention-2 tile at head_dim 128
WIDTH = 2  # bytes of a 16-bit element
HEADS = ("num_heads", "num_kv_heads", "head_dim")


class _Attention(KindModel):
    """What both phases share: a nonnegative sum of terms for each kernel, and forests that correct it.

    Args:
        device: whose peak rates bound the times; the device that was measured.
        kernel: whose times to predict, one of `kernels_`; None takes the one measured with most head configurations.
    """

    sizes: ClassVar[tuple[str, ...]]  # those of `extent` beyond whose measured range the correction is held
    trees: ClassVar[int] = 10
    leaves: ClassVar[int] = 700  # of a tree
    prefix_leaves: ClassVar[int] = 100

    def __init__(self, device: DeviceSpec, kernel: str | None = None) -> None:
        super().__init__(device)
        self.kernel = kernel

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
        columns = _floats({name: frame[name].to_numpy() for name in self.columns})
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
                "range": {size: _range(values) for size, values in self.extent(own).items()},
            }
            kernels[mine] = number
        self.default_ = max(configurations, key=lambda name: configurations[name])
        self.heads_ = {name: sorted({int(value) for value in columns[name]}) for name in HEADS}
        self.groups_ = _range(columns["num_heads"] / columns["num_kv_heads"])
        self.range_ = {name: _range(values) for name, values in self.extent(columns).items()}
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
        return _larger((self.terms(columns) * coefficients[kernels]).sum(axis=1), self._roofline(columns))

    def _roofline(self, columns: Columns) -> Array:
        """Seconds (rows,) that the device's peak rates allow."""
        flops, traffic = self.work(columns)
        return _larger(flops / self.device.peak_flops, traffic / self.device.memory_bandwidth)

    def _seen(self, columns: Columns, kernels: Array) -> Array:
        """The forest's input: the features within the measured range, and the kernel."""
        return np.column_stack([self.features(self._clipped(columns)), kernels])

    def _clipped(self, columns: Columns) -> dict[str, Array]:
        """The rows with their sizes held at the edges of the measured range."""
        return {**columns, **{name: _held(columns[name], self.range_[name]) for name in self.sizes}}

    def _correction(self, columns: Columns, kernels: Array) -> Array:
        assert self.forest_ is not None
        return self.forest_.predict(self._seen(columns, kernels))

    def seconds(self, columns: Columns) -> Array:
        """Predicted times, (rows,). A column "kernel" of names in `kernels_` takes the place of `kernel`."""
        numbers = _floats({name: columns[name] for name in self.columns})
        numbers = dict(zip(numbers, np.broadcast_arrays(*numbers.values()), strict=True))
        names, chosen = list(self.kernels_), np.array(self.kernel or self.default_)
        asked = np.broadcast_to(columns.get("kernel", chosen), len(numbers["num_heads"]))
        for name in set(asked.tolist()) - set(names):
            raise unknown(f"{self.kind} kernel", str(name), names)
        kernels = np.searchsorted(names, asked.astype(str))
        best = np.array([kernel["best"] for kernel in self.kernels_.values()])
        predicted = self._base(numbers, kernels) * np.exp(self._correction(numbers, kernels))
        return _larger(predicted, self._roofline(numbers) / best[kernels])

    def in_range(self, columns: Columns) -> Array:
        """Rows of a size that some kernel was measured at, with heads within those of all kernels together."""
        numbers = _floats({name: columns[name] for name in self.columns})
        numbers = dict(zip(numbers, np.broadcast_arrays(*numbers.values()), strict=True))
        within = np.isin(numbers["head_dim"], self.heads_["head_dim"])
        for name in ("num_heads", "num_kv_heads"):
            within &= _inside(numbers[name], _range(np.array(self.heads_[name])))
        within &= _inside(numbers["num_heads"] / numbers["num_kv_heads"], self.groups_)
        extent = self.extent(numbers)
        boxes = [
            np.all([_inside(extent[size], limits) for size, limits in kernel["range"].items()], axis=0)
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


class AttentionPrefill(_Attention):
    """Prompts: `batch_size` requests that each compute `chunk` tokens after `prefix` cached ones, under a causal mask.

    A kernel that was measured without prefixes is taken to skip what the mask hides, as current ones do; of one with
    prefixes the measurements tell. One forest corrects the times of prompts without a prefix; a small second one says
    what a prefix changes beyond the terms, and is shared by the kernels.
    """

    kind: ClassVar[str] = "attention_prefill"
    columns: ClassVar[tuple[str, ...]] = ("batch_size", "chunk", "prefix", *HEADS)
    sizes: ClassVar[tuple[str, ...]] = ("batch_size", "chunk", "prefix")

    def seconds(self, columns: Columns) -> Array:
        """Predicted times. To a kernel that was measured without prefixes one adds at most what it adds to another."""
        predicted = super().seconds(columns)
        measured = [name for name, kernel in self.kernels_.items() if kernel["range"]["prefix"][1] > 0]
        asked = np.broadcast_to(columns.get("kernel", np.array(self.kernel or self.default_)), len(predicted))
        prefix = np.broadcast_to(np.asarray(columns["prefix"], float), len(predicted))
        capped = (prefix > 0) & ~np.isin(asked, measured)
        if not measured or not capped.any():
            return predicted
        like = np.full(len(predicted), measured[0])
        whole = {**columns, "prefix": np.zeros(len(predicted))}
        added = super().seconds({**columns, "kernel": like}) - super().seconds({**whole, "kernel": like})
        most = super().seconds({**whole, "kernel": asked}) + np.maximum(added, 0.0)
        return _larger(np.where(capped, np.minimum(predicted, most), predicted), self._roofline(_floats(columns)))

    def work(self, columns: Columns) -> tuple[Array, Array]:
        b, c, p, h, kv, d = (columns[name] for name in self.columns)
        return 4 * b * h * d * (c * p + c * (c + 1) / 2), 2 * WIDTH * d * b * (c * h + (p + c) * kv)

    def _tiles(self, columns: Columns) -> tuple[Array, Array, Array, Array]:
        """Thread blocks; KV tiles of the longest one; KV tiles of all that the mask shows, and that it hides."""
        b, c, p, h, _, _ = (columns[name] for name in self.columns)
        rows = np.ceil(c / QUERY_TILE)
        blocks, longest = rows * b * h, np.ceil((p + c) / KV_TILE)
        hidden = blocks * (rows - 1) / 2 * (QUERY_TILE / KV_TILE)
        return blocks, longest, blocks * longest - hidden, hidden

    def terms(self, columns: Columns) -> Array:
        b, c, _, h, kv, d = (columns[name] for name in self.columns)
        blocks, longest, shown, hidden = self._tiles(columns)
        processors = self.device.num_sms
        tile = 4 * QUERY_TILE * KV_TILE * d * processors / self.device.peak_flops  # seconds of one on a multiprocessor
        new = 2 * WIDTH * b * c * (h + kv) * d / self.device.memory_bandwidth  # cached KV is read behind the arithmetic
        work = [longest * tile, shown / processors * tile, blocks / processors * tile, hidden / processors * tile]
        return np.stack([np.ones(len(b)), new, *work], axis=1)

    def terms_of(self, columns: Columns) -> Array:
        usable = np.ones(6, dtype=bool)
        usable[5] = (columns["prefix"] > 0).any()  # without prefixes, hidden and shown work can't be told apart
        return usable

    def features(self, columns: Columns) -> Array:
        b, c, _, h, kv, _ = (columns[name] for name in self.columns)
        blocks, longest, shown, _ = self._tiles(columns)
        flops, traffic = self.work(columns)
        waves, roof = blocks / self.device.num_sms, self._roofline(columns)
        logs = [b, c, h, kv, h / kv, longest, shown, waves, longest / shown, roof, flops / traffic, b * h]
        filled = [waves / np.ceil(waves), c / (np.ceil(c / 128) * 128), c / (np.ceil(c / 64) * 64)]
        return np.stack([*(np.log2(values) for values in logs), *filled], axis=1)

    def extent(self, columns: Columns) -> dict[str, Array]:
        b, c, p = (columns[name] for name in self.sizes)
        return {"batch_size": b, "chunk": c, "prefix": p, "length": p + c, "tokens": b * c}

    def _correct(self, columns: Columns, residual: Array, kernels: Array, weights: Array) -> None:
        first, later = columns["prefix"] == 0, columns["prefix"] > 0
        if not first.any():
            first = np.ones(len(residual), dtype=bool)
        x = self._seen(_without_prefix(columns), kernels)
        self.forest_ = self._forest(x[first], residual[first], weights[first], self.leaves)
        if later.any():
            left = (residual - self.forest_.predict(x))[later]
            x = self._of_prefix(columns)[later]
            self.prefix_forest_ = self._forest(x, left, weights[later], self.prefix_leaves)

    def _of_prefix(self, columns: Columns) -> Array:
        """The second forest's input."""
        c, p = (_held(columns[name], self.range_[name]) for name in ("chunk", "prefix"))
        rows = np.ceil(c / QUERY_TILE)
        logs = [c, p + 1, p + c, rows * (p + c)]
        return np.stack([*(np.log2(values) for values in logs), p / (p + c), c / (rows * QUERY_TILE)], axis=1)

    def _correction(self, columns: Columns, kernels: Array) -> Array:
        correction = super()._correction(_without_prefix(columns), kernels)
        if self.prefix_forest_ is not None:
            correction += np.where(columns["prefix"] > 0, self.prefix_forest_.predict(self._of_prefix(columns)), 0.0)
        return correction


class AttentionDecode(_Attention):
    """Decodes: `batch_size` requests of one new token each that attend to `kv_tokens` in all, their own included.

    Times rise with the KV length of a request at a given batch, and with the batch at a given length. They may fall
    with the batch at a given `kv_tokens`: multi-head kernels use a thread block a head, however long the KV.
    """

    kind: ClassVar[str] = "attention_decode"
    columns: ClassVar[tuple[str, ...]] = ("batch_size", "kv_tokens", *HEADS)
    sizes: ClassVar[tuple[str, ...]] = ("batch_size", "length")

    def work(self, columns: Columns) -> tuple[Array, Array]:
        b, kv_tokens, h, kv, d = (columns[name] for name in self.columns)
        return 4 * h * d * kv_tokens, 2 * WIDTH * d * (b * h + kv_tokens * kv)

    def _shape(self, columns: Columns) -> tuple[Array, Array, Array, Array]:
        """KV tokens of a request; whether the KV is split; thread blocks before splitting; parts of a KV."""
        b, kv_tokens, h, kv, _ = (columns[name] for name in self.columns)
        length, blocks, split = np.maximum(1.0, kv_tokens / b), b * kv, h > kv
        parts = np.clip(self.device.num_sms / blocks, 1, np.maximum(1, np.ceil(length / KV_TILE) / 2))
        return length, split, blocks, np.where(split, parts, 1.0)

    def terms(self, columns: Columns) -> Array:
        b, kv_tokens, h, kv, d = (columns[name] for name in self.columns)
        length, split, blocks, parts = self._shape(columns)
        bandwidth, processors = self.device.memory_bandwidth, self.device.num_sms
        tile = 2 * WIDTH * KV_TILE * d * processors / bandwidth  # seconds to read one tile's share of the bandwidth
        tiles = np.ceil(length / KV_TILE)
        waves = np.ceil(blocks / processors)
        terms = [
            np.ones(len(b)),
            2 * WIDTH * d * kv_tokens * kv / bandwidth,
            ~split * tiles * tile,
            ~split * waves * tiles * tile,
            split * tiles / parts * tile,
            split * waves * tiles / parts * tile,
            2 * WIDTH * d * b * h / bandwidth,
            split * 4 * d * b * h * parts / bandwidth,  # partial results are combined in 32 bits
        ]
        return np.stack(terms, axis=1)

    def terms_of(self, columns: Columns) -> Array:
        return np.ones(8, dtype=bool)

    def features(self, columns: Columns) -> Array:
        b, _, h, kv, _ = (columns[name] for name in self.columns)
        length, split, blocks, _ = self._shape(columns)
        _, traffic = self.work(columns)
        processors = self.device.num_sms
        waves = np.ceil(blocks / processors)
        sequence = np.where(split, np.maximum(blocks * length / processors, 1), waves * length)
        work = blocks * np.ceil(length / 128) / processors
        logs = [b, length, h / kv, blocks, b * h, traffic, sequence, waves, np.ceil(length / 64), work]
        filled = [split, blocks / processors / waves, np.minimum(1, blocks / processors)]
        return np.stack([*(np.log2(values) for values in logs), *filled], axis=1)

    def extent(self, columns: Columns) -> dict[str, Array]:
        b, kv_tokens, _, kv, d = (columns[name] for name in self.columns)
        return {"batch_size": b, "length": kv_tokens / b, "kv_bytes": 2 * WIDTH * kv_tokens * kv * d}

    def _clipped(self, columns: Columns) -> dict[str, Array]:
        b = _held(columns["batch_size"], self.range_["batch_size"])
        length = _held(columns["kv_tokens"] / columns["batch_size"], self.range_["length"])
        return {**columns, "batch_size": b, "kv_tokens": b * length}


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


def _floats(columns: Columns) -> dict[str, Array]:
    return {name: np.atleast_1d(np.asarray(values, dtype=np.float64)) for name, values in columns.items()}


def _without_prefix(columns: Columns) -> dict[str, Array]:
    return {**columns, "prefix": np.zeros_like(columns["prefix"])}


def _range(values: Array) -> list[float]:
    return [float(values.min()), float(values.max())]


def _inside(values: Array, limits: list[float]) -> Array:
    return np.asarray((values >= limits[0]) & (values <= limits[1]))


def _held(values: Array, limits: list[float]) -> Array:
    return np.asarray(np.clip(values, limits[0], limits[1]))


def _larger(a: Array, b: Array) -> Array:
    return np.asarray(np.maximum(a, b))
