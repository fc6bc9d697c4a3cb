"""What the page about a calibration shows, as small arrays: held-out errors, measured beside predicted, efficiency.

record = read_calibration(calibration, catalog.device("a40"), [frame])
print(record.kinds[0].held_out["mape"], record.kinds[0].range_words)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.specs import DeviceSpec
from engine.tables import Array
from simulator.predictor import gemm
from simulator.predictor.attention import AttentionDecode, AttentionPrefill, kernel_names
from simulator.predictor.calibration import KINDS, Calibration, columns_of
from simulator.predictor.collectives import AllReduce, Send
from simulator.predictor.elementwise import Elementwise
from simulator.predictor.gemm import Gemm
from simulator.predictor.kinds import KindModel

if TYPE_CHECKING:
    import pandas as pd

NAMES = {
    "gemm": "Dense layers (GEMM)",
    "elementwise": "Elementwise",
    "attention_prefill": "Attention, prefill",
    "attention_decode": "Attention, decode",
    "all_reduce": "All-reduce",
    "send": "Send",
}
MOST_POINTS = 1500  # of a scatter
MOST_BINS = 10
FEWEST_IN_BIN = 5
MOST_CURVES = 4
MOST_ON_CURVE = 80
FEWEST_ON_CURVE = 5


@dataclass(frozen=True, eq=False)
class Scatter:
    """Measured and predicted times, (points,) each: every so-manieth of `total` rows in order of time."""

    measured_s: Array
    predicted_s: Array
    total: int
    fitted: int  # rows of sources that the model was fitted to
    devices: list[str]


@dataclass(frozen=True, eq=False)
class SizeErrors:
    """Errors as fractions by measured time, (bins,) each."""

    centre_s: Array
    median: Array
    p95: Array
    bias: Array
    count: Array


@dataclass(frozen=True, eq=False)
class Efficiency:
    """How near to the device's limits one shape comes as its size grows, (points,) each."""

    label: str
    size: Array
    measured: Array
    predicted: Array


@dataclass(frozen=True, eq=False)
class KindRecord:
    """One kind of operator. `held_out` is the calibration's own record of errors."""

    kind: str
    name: str
    learned_on: str
    carried_over: bool
    rows: int
    held_out: Mapping[str, Any]
    left_out: str
    covers: float
    meant_to_cover: float
    provenance: Mapping[str, Any]
    range_words: list[str]
    scatter: Scatter | None = None
    by_size: SizeErrors | None = None
    efficiency: list[Efficiency] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class CalibrationRecord:
    """All that the page shows."""

    device: DeviceSpec
    kinds: list[KindRecord]
    lacking: list[str]  # names of the kinds that the calibration does not have


def read_calibration(
    calibration: Calibration, device: DeviceSpec, frames: Sequence[pd.DataFrame] = ()
) -> CalibrationRecord:
    """The record of a calibration; `frames` are measured tables to hold beside its predictions."""
    kinds = []
    for kind, model in calibration.models.items():
        record = calibration.records[kind]
        scatter, by_size, efficiency = None, None, list[Efficiency]()
        if (rows := comparable(model, record, frames)) is not None:
            columns = _columns(model, rows)
            measured, predicted = rows["time_ms"].to_numpy(float) / 1e3, model.seconds(columns)
            chosen = spread_evenly(measured)
            scatter = Scatter(
                measured[chosen],
                predicted[chosen],
                len(rows),
                int(rows["source"].isin(record["provenance"]["sources"]).sum()),
                sorted(str(name) for name in rows["device"].unique()),
            )
            by_size = errors_by_size(measured, predicted)
            efficiency = efficiencies(model, rows, columns, measured, predicted)
        kinds.append(
            KindRecord(
                kind=kind,
                name=NAMES[kind],
                learned_on=record["learned_on"],
                carried_over=record["learned_on"] != calibration.device,
                rows=record["provenance"]["rows"],
                held_out=record["held_out"],
                left_out=left_out(kind, record),
                covers=record["interval"]["covers"],
                meant_to_cover=record["interval"]["meant_to_cover"],
                provenance=record["provenance"],
                range_words=range_words(model),
                scatter=scatter,
                by_size=by_size,
                efficiency=efficiency,
            )
        )
    return CalibrationRecord(device, kinds, [NAMES[kind] for kind in KINDS if kind not in calibration.models])


def left_out(kind: str, record: Mapping[str, Any]) -> str:
    """What was held out together, in words."""
    worst = record["held_out"].get("groups_over_20us", {}).get("worst_is", "")
    if kind == "gemm":
        return "whole weight shapes (k, n)" if re.fullmatch(r"\d+x\d+", worst) else "whole models"
    if kind == "elementwise":
        return "whole models" if "/" in worst else "whole operators"
    if kind in ("all_reduce", "send"):
        return "message sizes"
    sizes = "chunk lengths" if kind == "attention_prefill" else "batch sizes"
    one = re.fullmatch(r"\d+/\d+( heads)?", worst)
    several = len(record["provenance"]["sources"]) > 1
    if several:
        return f"head configurations; {sizes} of a source that has only one"
    return "head configurations" if one else sizes


def comparable(model: KindModel, record: Mapping[str, Any], frames: Sequence[pd.DataFrame]) -> pd.DataFrame | None:
    """The rows of `frames` that a model predicts as they are: of its kind, its devices and its networks."""
    import pandas as pd

    parts = [frame[frame["kind"] == model.kind] for frame in frames]
    parts = [part[part["device"].isin(record["provenance"]["measured_on"])] for part in parts]
    if isinstance(model, AllReduce | Send):
        parts = [part[[_measured_layout(model, row) for row in _layouts(part)]] for part in parts]
    parts = [part for part in parts if len(part)]
    return pd.concat(parts, ignore_index=True) if parts else None


def _layouts(rows: pd.DataFrame) -> list[tuple[str, str]]:
    return list(zip(rows["network"].astype(str), rows["backend"].astype(str), strict=True))


def _measured_layout(model: AllReduce | Send, row: tuple[str, str]) -> bool:
    network, kernel = row
    return bool(model.rows_.get(kernel, {}).get(network))


def _columns(model: KindModel, rows: pd.DataFrame) -> dict[str, Array]:
    """The model's columns, each row with the kernel that it was measured with."""
    columns = columns_of(model, rows)
    if isinstance(model, AllReduce | Send):
        columns["kernel"] = rows["backend"].astype(str).to_numpy(object)
    return columns


def spread_evenly(values: Array, most: int = MOST_POINTS) -> Array:
    """Indices of at most `most` values, evenly among all in rising order."""
    order: Array = np.argsort(values, kind="stable")
    if len(values) <= most:
        return order
    chosen: Array = order[np.linspace(0, len(values) - 1, most).astype(int)]
    return chosen


def errors_by_size(measured: Array, predicted: Array) -> SizeErrors:
    """Errors in bins of equal width in the logarithm of the measured time; sparse bins are left out."""
    relative = predicted / measured - 1
    logs = np.log(measured)
    edges = np.linspace(logs.min(), logs.max() + 1e-9, MOST_BINS + 1)
    number = np.clip(np.searchsorted(edges, logs, side="right") - 1, 0, MOST_BINS - 1)
    found = [
        (
            np.exp((edges[i] + edges[i + 1]) / 2),
            np.median(np.abs(relative[mine])),
            np.percentile(np.abs(relative[mine]), 95),
            relative[mine].mean(),
            mine.sum(),
        )
        for i in range(MOST_BINS)
        if (mine := number == i).sum() >= min(FEWEST_IN_BIN, len(measured))
    ]
    return SizeErrors(*(np.array(column, dtype=float) for column in zip(*found, strict=True)))


# -- efficiency ----------------------------------------------------------------------------------------------------


def efficiencies(
    model: KindModel, rows: pd.DataFrame, columns: Mapping[str, Array], measured: Array, predicted: Array
) -> list[Efficiency]:
    """A few shapes by size: the roofline over the time, or for collectives bytes/s on the bus."""
    limit, size, labels = _limits(model, rows, columns)
    counts: dict[str, int] = {}
    for name in sorted({label for label in labels if label}):
        counts[name] = len(np.unique(size[labels == name]))
    enough = [name for name, count in counts.items() if count >= max(FEWEST_ON_CURVE, max(counts.values()) / 2)]
    enough.sort(key=lambda name: float(np.median((limit / size)[labels == name])))
    chosen = [enough[i] for i in np.unique(np.linspace(0, len(enough) - 1, MOST_CURVES).astype(int))] if enough else []
    curves = []
    for name in chosen:
        mine = labels == name
        every = np.unique(size[mine])
        points = every[spread_evenly(every, MOST_ON_CURVE)]
        pairs = [
            [float(np.median((limit / times)[mine & (size == point)])) for times in (measured, predicted)]
            for point in points
        ]
        curves.append(Efficiency(name, points, *np.array(pairs).T))
    return curves


def _limits(model: KindModel, rows: pd.DataFrame, columns: Mapping[str, Array]) -> tuple[Array, Array, Array]:
    """Of each row: what to divide by its time, its size, and a label that rows of a curve share ("": none)."""
    numbers = {name: np.asarray(columns[name], float) for name in model.columns if name not in ("operator", "network")}
    if isinstance(model, Gemm):
        limit = gemm.roofline(numbers["m"], numbers["k"], numbers["n"], model.device)
        labels = [f"{k:.0f} \N{MULTIPLICATION SIGN} {n:.0f}" for k, n in zip(numbers["k"], numbers["n"], strict=True)]
        return limit, numbers["m"], np.array(labels, dtype=object)
    if isinstance(model, Elementwise):
        moved = numbers["rows"] * numbers["bytes_per_row"]
        labels = [str(name).replace("_", " ") for name in columns["operator"]]
        return moved / model.device.memory_bandwidth, moved, np.array(labels, dtype=object)
    if isinstance(model, AllReduce | Send):
        ranks = numbers["num_ranks"]
        shared = 2 * (ranks - 1) / ranks if isinstance(model, AllReduce) else np.ones(len(ranks))
        names = [
            f"{int(n)} ranks{'' if on >= n else f', {int(on)} a node'}, {str(network).replace('_', ' ')}, {kernel}"
            for n, on, network, kernel in zip(
                ranks, numbers["ranks_per_node"], columns["network"], columns["kernel"], strict=True
            )
        ]
        return shared * numbers["num_bytes"], numbers["num_bytes"], np.array(names, dtype=object)
    assert isinstance(model, AttentionPrefill | AttentionDecode)
    flops, traffic = model.work(numbers)
    limit = np.maximum(flops / model.device.peak_flops, traffic / model.device.memory_bandwidth)
    kernels = [name.split("/")[0] for name in kernel_names(rows)]
    heads: Array = np.array(
        [
            f"{h:.0f}/{kv:.0f} heads, {kernel.replace('_', ' ')}"
            for h, kv, kernel in zip(numbers["num_heads"], numbers["num_kv_heads"], kernels, strict=True)
        ],
        dtype=object,
    )
    batch = numbers["batch_size"]
    if isinstance(model, AttentionPrefill):
        return limit, numbers["chunk"], np.where((numbers["prefix"] > 0) | (batch > 1), "", heads)
    kv_tokens, shown = numbers["kv_tokens"], np.full(len(heads), "", dtype=object)
    for name in set(heads.tolist()):
        usual = _richest(batch[heads == name], kv_tokens[heads == name])
        shown[(heads == name) & (batch == usual)] = f"{name}, batch {usual:.0f}"
    return limit, kv_tokens, shown


def _richest(groups: Array, sizes: Array) -> float:
    """The largest group among those with about as many different sizes as any."""
    counts = {float(group): len(np.unique(sizes[groups == group])) for group in np.unique(groups)}
    return max(group for group, count in counts.items() if count >= max(counts.values()) / 2)


# -- what was measured, in words -----------------------------------------------------------------------------------


def range_words(model: KindModel) -> list[str]:
    """The sizes that a model was learned from, a line for each kernel or layout."""
    if isinstance(model, Gemm):
        return [", ".join(f"{name} {_span(limits)}" for name, limits in zip("mkn", model.limits_, strict=True))]
    if isinstance(model, Elementwise):
        return [f"{name.replace('_', ' ')}: {_bytes(limits)}" for name, limits in model.range_.items()]
    if isinstance(model, AllReduce | Send):
        return [
            f"{kernel.replace('_', ' ')}, {layout.num_ranks} ranks with {layout.ranks_per_node} a node on "
            f"{layout.network.replace('_', ' ')}: {_bytes(limits)}"
            for kernel, layouts in model.range_.items()
            for layout, limits in layouts.items()
        ]
    assert isinstance(model, AttentionPrefill | AttentionDecode)
    words = {"kv_bytes": "KV cache", "length": "KV tokens a request", "tokens": "new tokens in all"}
    lines = [
        "; ".join(f"{name.replace('_', ' ')} {', '.join(map(str, values))}" for name, values in model.heads_.items())
    ]
    for kernel, known in model.kernels_.items():
        sizes = [
            f"{words.get(name, name.replace('_', ' '))} {(_bytes if name == 'kv_bytes' else _span)(limits)}"
            for name, limits in known["range"].items()
        ]
        count = known["configurations"]
        heads = f"{count} head configuration{'s' * (count != 1)}"
        lines.append(f"{kernel.replace('_', ' ')} ({heads}): {', '.join(sizes)}")
    return lines


def _span(limits: Sequence[float]) -> str:
    low, high = limits
    return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"


def _bytes(limits: Sequence[float]) -> str:
    return " to ".join(_size(value) for value in limits)


def _size(num_bytes: float) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {unit}"
    return f"{num_bytes:.0f} B"
