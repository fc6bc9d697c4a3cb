"""What the pages about calibrations say of each kind of operator: names, what was held out, curves, measured ranges.

page_of("gemm").range_words(calibration.models["gemm"])
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from engine.results.tables import Array
from simulator.predictor import gemm
from simulator.predictor.attention_model import kernel_names
from simulator.predictor.calibration import kind_name
from simulator.predictor.kind import KindModel
from studies.words import size

if TYPE_CHECKING:
    import pandas as pd

Curves = tuple[Array, Array, Array]  # of each row: what to divide by its time, its size, and its curve ("": none)


class KindPage:
    """What there is to say of a kind; the methods get its estimator."""

    name: str
    size: str  # the title of the axis of sizes
    target: ClassVar[float | None] = None  # of the mean held-out error
    shapes: ClassVar[str] = "shape"  # what tells the curves of efficiency apart
    moved: str | None = None  # where curves are of bandwidth: the bytes over the time; else of the roofline
    cached: ClassVar[bool] = False  # whether times may lie below the roofline
    left: ClassVar[str] = ""  # what was held out together, where that is always the same

    def left_out(self, record: Mapping[str, Any]) -> str:
        """Return what was held out together, in words."""
        return self.left

    def comparable(self, model: Any, rows: pd.DataFrame) -> pd.DataFrame:
        """Return the rows, of those of this kind, that the model predicts as they are."""
        return rows

    def columns(self, model: KindModel[Any], rows: pd.DataFrame) -> dict[str, Array]:
        """Return the model's columns, each row with the kernel that it was measured with."""
        return model.columns_of(rows)

    def limits(self, model: Any, rows: pd.DataFrame, columns: Mapping[str, Array]) -> Curves:
        """Return what the curves of efficiency are drawn from."""
        raise NotImplementedError

    def range_words(self, model: Any) -> list[str]:
        """Return the sizes that the model was learned from, a line for each kernel or layout."""
        raise NotImplementedError


class _Gemm(KindPage):
    name, size, shapes = "Dense layers (GEMM)", "Rows m", "k and n"

    def left_out(self, record: Mapping[str, Any]) -> str:
        return "whole weight shapes (k, n)" if re.fullmatch(r"\d+x\d+", _worst(record)) else "whole models"

    def limits(self, model: Any, rows: pd.DataFrame, columns: Mapping[str, Array]) -> Curves:
        m, k, n = (np.asarray(columns[name], float) for name in ("m", "k", "n"))
        labels = [f"{of_k:.0f} \N{MULTIPLICATION SIGN} {of_n:.0f}" for of_k, of_n in zip(k, n, strict=True)]
        return gemm.roofline(m, k, n, model.device, model.dtype), m, np.array(labels, dtype=object)

    def range_words(self, model: Any) -> list[str]:
        return [", ".join(f"{name} {_span(limits)}" for name, limits in zip("mkn", model.limits_, strict=True))]


class _Elementwise(KindPage):
    name, size, shapes, cached = "Elementwise", "Bytes moved", "operator", True

    def left_out(self, record: Mapping[str, Any]) -> str:
        return "whole models" if "/" in _worst(record) else "whole operators"

    def limits(self, model: Any, rows: pd.DataFrame, columns: Mapping[str, Array]) -> Curves:
        moved = np.asarray(columns["rows"], float) * np.asarray(columns["bytes_per_row"], float)
        labels = [str(name).replace("_", " ") for name in columns["operator"]]
        return moved / model.device.memory_bandwidth, moved, np.array(labels, dtype=object)

    def range_words(self, model: Any) -> list[str]:
        return [f"{name.replace('_', ' ')}: {_bytes(limits)}" for name, limits in model.range_.items()]


class _Attention(KindPage):
    shapes = "query/KV heads and kernel"
    held_out: ClassVar[str]  # sizes, where a kernel was measured with one head configuration

    def left_out(self, record: Mapping[str, Any]) -> str:
        if len(record["provenance"]["sources"]) > 1:
            return f"head configurations; {self.held_out} of a source that has only one"
        return "head configurations" if re.fullmatch(r"\d+/\d+( heads)?", _worst(record)) else self.held_out

    def limits(self, model: Any, rows: pd.DataFrame, columns: Mapping[str, Array]) -> Curves:
        numbers = {name: np.asarray(columns[name], float) for name in model.columns}
        flops, traffic = model.work(numbers)
        limit = np.maximum(flops / model.device.peak_flops, traffic / model.device.memory_bandwidth)
        kernels = [name.split("/")[0] for name in kernel_names(rows)]
        both = zip(numbers["num_heads"], numbers["num_kv_heads"], kernels, strict=True)
        heads = [f"{h:.0f}/{kv:.0f} heads, {kernel.replace('_', ' ')}" for h, kv, kernel in both]
        return limit, *self.sizes_and_labels(numbers, np.array(heads, dtype=object))

    def sizes_and_labels(self, numbers: Mapping[str, Array], heads: Array) -> tuple[Array, Array]:
        """Return sizes and curves of rows with these heads."""
        raise NotImplementedError

    def range_words(self, model: Any) -> list[str]:
        words = {"kv_bytes": "KV cache", "length": "KV tokens a request", "tokens": "new tokens in all"}
        heads = [f"{name.replace('_', ' ')} {', '.join(map(str, values))}" for name, values in model.heads_.items()]
        lines = ["; ".join(heads)]
        for kernel, known in model.kernels_.items():
            sizes = [
                f"{words.get(name, name.replace('_', ' '))} {(_bytes if name == 'kv_bytes' else _span)(limits)}"
                for name, limits in known["range"].items()
            ]
            count = known["configurations"]
            several = f"{count} head configuration{'s' * (count != 1)}"
            lines.append(f"{kernel.replace('_', ' ')} ({several}): {', '.join(sizes)}")
        return lines


class _AttentionPrefill(_Attention):
    name, size, target = "Attention, prefill", "Chunk (tokens)", 0.05
    held_out = "chunk lengths"

    def sizes_and_labels(self, numbers: Mapping[str, Array], heads: Array) -> tuple[Array, Array]:
        return numbers["chunk"], np.where((numbers["prefix"] > 0) | (numbers["batch_size"] > 1), "", heads)


class _AttentionDecode(_Attention):
    name, size, target = "Attention, decode", "KV tokens of the batch", 0.04
    held_out = "batch sizes"

    def sizes_and_labels(self, numbers: Mapping[str, Array], heads: Array) -> tuple[Array, Array]:
        batch, kv_tokens = numbers["batch_size"], numbers["kv_tokens"]
        shown = np.full(len(heads), "", dtype=object)
        for name in set(heads.tolist()):
            usual = _richest(batch[heads == name], kv_tokens[heads == name])
            shown[(heads == name) & (batch == usual)] = f"{name}, batch {usual:.0f}"
        return kv_tokens, shown


class _Message(KindPage):
    """Messages between ranks, of which each sends `share` of so many, or the whole."""

    target, left = 0.10, "message sizes"

    def __init__(
        self, name: str, size: str, moved: str = "bytes", share: Callable[[Array], Array] = np.ones_like
    ) -> None:
        self.name, self.size, self.moved, self.share = name, size, moved, share

    def comparable(self, model: Any, rows: pd.DataFrame) -> pd.DataFrame:
        layouts = zip(rows["network"].astype(str), rows["backend"].astype(str), strict=True)
        return rows[[bool(model.rows_.get(kernel, {}).get(network)) for network, kernel in layouts]]

    def columns(self, model: KindModel[Any], rows: pd.DataFrame) -> dict[str, Array]:
        return {**model.columns_of(rows), "kernel": rows["backend"].astype(str).to_numpy(object)}

    def limits(self, model: Any, rows: pd.DataFrame, columns: Mapping[str, Array]) -> Curves:
        sizes, ranks, on_node = (np.asarray(columns[name], float) for name in model.columns if name != "network")
        names = [
            f"{int(n)} ranks{'' if on >= n else f', {int(on)} a node'}, {str(network).replace('_', ' ')}, {kernel}"
            for n, on, network, kernel in zip(ranks, on_node, columns["network"], columns["kernel"], strict=True)
        ]
        return self.share(ranks) * sizes, sizes, np.array(names, dtype=object)

    def range_words(self, model: Any) -> list[str]:
        return [
            f"{kernel.replace('_', ' ')}, {layout.num_ranks} ranks with {layout.ranks_per_node} a node on "
            f"{layout.network.replace('_', ' ')}: {_bytes(limits)}"
            for kernel, layouts in model.range_.items()
            for layout, limits in layouts.items()
        ]


class _Moe(KindPage):
    name, size, shapes, target = "Experts", "Tokens", "hidden size, width, experts of a rank and top-k; format", 0.10
    left = "whole shapes (hidden size, width, experts of a rank, top-k)"

    def limits(self, model: Any, rows: pd.DataFrame, columns: Mapping[str, Array]) -> Curves:
        names = ("hidden_size", "expert_width", "local_experts", "top_k", "dtype", "expert_load")
        shapes = zip(*(columns[name].tolist() for name in names), strict=True)
        labels = [f"{h} x {w}, {e} experts, top {k}, {dtype}, {load}" for h, w, e, k, dtype, load in shapes]
        return model.bound(columns), np.asarray(columns["expert_tokens"], float), np.array(labels, dtype=object)

    def range_words(self, model: Any) -> list[str]:
        return [
            f"{dtype}: " + ", ".join(f"{name.replace('_', ' ')} {_span(limits)}" for name, limits in sizes.items())
            for dtype, sizes in model.range_.items()
        ]


_RING = "bytes that each rank sends in a ring"
PAGES: dict[str, KindPage] = {
    "gemm": _Gemm(),
    "elementwise": _Elementwise(),
    "attention_prefill": _AttentionPrefill(),
    "attention_decode": _AttentionDecode(),
    "all_reduce": _Message("All-reduce", "Bytes on each rank", _RING, lambda ranks: 2 * (ranks - 1) / ranks),
    "send": _Message("Send", "Bytes"),
    "moe": _Moe(),
    "all_gather": _Message("All-gather", "Bytes of each rank", _RING, lambda ranks: ranks - 1),
    "reduce_scatter": _Message("Reduce-scatter", "Bytes of each rank", _RING, lambda ranks: ranks - 1),
    "all_to_all": _Message("All-to-all", "Bytes that leave each rank"),
}


def page_of(kind: str) -> KindPage:
    """Return what there is to say of a kind, or of a population of it. Raises LookupError for one not in PAGES."""
    kind = kind_name(kind)
    if kind not in PAGES:
        raise LookupError(f"nothing to say of operators of kind {kind!r}: enter it in studies.calibration.kinds.PAGES")
    return PAGES[kind]


def _worst(record: Mapping[str, Any]) -> str:
    """Return the group with the largest held-out error."""
    return str(record["held_out"].get("groups_over_20us", {}).get("worst_is", ""))


def _richest(groups: Array, sizes: Array) -> float:
    """Return the largest group among those with about as many different sizes as any."""
    counts = {float(group): len(np.unique(sizes[groups == group])) for group in np.unique(groups)}
    return max(group for group, count in counts.items() if count >= max(counts.values()) / 2)


def _span(limits: Sequence[float]) -> str:
    low, high = limits
    return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"


def _bytes(limits: Sequence[float]) -> str:
    return " to ".join(size(value, binary=True) for value in limits)
