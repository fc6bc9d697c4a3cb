"""Leaves out measurements that no neighbour and no roofline supports: a table of a sweep has some that went wrong.

A sweep measures a grid. A row's neighbours are the next smaller and larger sizes along each axis, all else being the
same; times over the roofline of neighbours are alike, for kernels change their efficiency from one size to the next by
tens of per cent at most. A row is left out where, by that measure, it took more than `FACTOR` times as long as its
neighbours' median and as all of them but one (which may be wrong itself), and as the data sheet lets it take with a
launch; or where it is as much faster than they are, and faster than the data sheet allows.

No cache shortens arithmetic. Where more than `IMPOSSIBLE` of a population (a kind, its dtype, kernel, software and head
size) took less time than its arithmetic at the card's peak, something else was timed than the table says, and all of
the population is left out: that its other rows can be believed is nothing that the table tells.

    part = without_outliers(part, catalog.device("h100_sxm"))
    print(part.notes)
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from engine.specs import DeviceSpec
from profiler.importers.common import Part

FACTOR = 2.0
RUN_FACTOR = 3.0  # where two neighbours are as far off
LAUNCH_S = 5e-6  # generous: no time below it is judged to be too long
FEWEST = 4  # neighbours that a judgement needs
NAMED = 5  # rows that a note names
IMPOSSIBLE = 0.02  # share of rows above the peak rate from which on nothing of a population is believed
AXES = {
    "gemm": ("m", "k", "n"),
    "attention_prefill": ("batch_size", "chunk", "num_heads", "num_kv_heads"),
    "attention_decode": ("batch_size", "kv_tokens", "num_heads", "num_kv_heads"),
}
_BYTES = {"fp8": 1, "fp8_block": 1}
_POPULATION = ("dtype", "backend", "kernel", "software", "head_dim")  # columns that are no axis


def without_outliers(part: Part, device: DeviceSpec, window: int = 0) -> Part:
    """Return the part without outliers and impossible populations, which notes name.

    `window` is attention's sliding window in tokens, 0 for none.
    """
    rows, notes = part.rows.reset_index(drop=True), list(part.notes)
    impossible, remarks = _impossible(rows, device, window)
    rows, notes = rows[~impossible].reset_index(drop=True), notes + remarks
    wrong = np.zeros(len(rows), dtype=bool)
    for kind, axes in AXES.items():
        mine = (rows["kind"] == kind).to_numpy(bool)
        if mine.any():
            wrong[mine] = outliers(rows[mine], axes, device)
    for source, bad in rows[wrong].groupby("source"):
        worst = bad.sort_values("time_ms", ascending=False).head(NAMED)
        named = "; ".join(_words(row) for _, row in worst.iterrows())
        more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        notes.append(
            f"{source}: {len(bad)} outlier{'s' * (len(bad) > 1)} left out, which no neighbour supports: {named}{more}"
        )
    return Part(rows[~wrong].reset_index(drop=True), part.devices, notes)


def _impossible(rows: pd.DataFrame, device: DeviceSpec, window: int) -> tuple[NDArray[np.bool_], list[str]]:
    """Return the rows, (rows,), of populations that the card can't have computed, and a note of each."""
    found, notes = np.zeros(len(rows), dtype=bool), []
    for kind in ("gemm", "attention_prefill"):
        mine = np.flatnonzero(rows["kind"] == kind)
        if not len(mine):
            continue
        above = arithmetic(rows.iloc[mine], device, window) / (rows["time_ms"].to_numpy(float)[mine] / 1e3)
        population = _population(rows.iloc[mine])
        for number in np.unique(population):
            these, ratio = mine[population == number], above[population == number]
            if (ratio > 1).mean() > IMPOSSIBLE:
                found[these] = True
                one = rows.iloc[these[int(ratio.argmax())]]
                of = f" of head size {int(one['head_dim'])}" if one.get("head_dim", 0) > 0 else ""
                notes.append(
                    f"{one['source']}: all {len(these):,} rows of {one['dtype']} {kind}{of} left out: "
                    f"{(ratio > 1).sum():,} are faster than the card's peak arithmetic ({_words(one)}: "
                    f"{ratio.max():.3g} times), so something else was timed"
                )
    return found, notes


def outliers(rows: pd.DataFrame, axes: tuple[str, ...], device: DeviceSpec) -> NDArray[np.bool_]:
    """Return which rows of one kind, (rows,), their neighbours along `axes` and the roofline leave unsupported."""
    least = data_sheet(rows, device)
    seconds = rows["time_ms"].to_numpy(float) / 1e3
    ratio = np.log(seconds / (least + LAUNCH_S))
    around = neighbours(rows, axes, ratio)
    known = np.isfinite(around).sum(axis=1)
    nearest = np.sort(np.abs(around - ratio[:, None]), axis=1)  # NaN last
    ranked = np.where(known >= FEWEST, nearest[:, min(1, nearest.shape[1] - 1)], 0.0)
    middle = np.full(len(rows), np.nan)
    middle[known > 0] = np.nanmedian(around[known > 0], axis=1)
    limit = np.log(FACTOR)
    slow = (ratio - middle > limit) & (ratio > limit)
    # a run of bad rows along one axis supports itself: of products, judged along all three, by a larger factor
    far = np.where(known >= 2 * len(axes), nearest[:, min(2, nearest.shape[1] - 1)], 0.0) if len(axes) == 3 else 0.0
    run = slow & (far > np.log(RUN_FACTOR)) & (ratio - middle > np.log(RUN_FACTOR))
    fast = (middle - ratio > limit) & (seconds < least)
    return np.asarray(((ranked > limit) & (slow | fast)) | run)


def neighbours(rows: pd.DataFrame, axes: tuple[str, ...], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return `values` of each row's neighbours, (rows, 2 * axes): smaller and larger by axis, NaN where there is none.

    Several rows of one size differ in what is no axis (dtype, kernel, software), which neighbours share.
    """
    codes = {name: rows[name].to_numpy(float) for name in axes}
    if "kv_tokens" in codes:  # sweeps keep the length of a request
        codes["kv_tokens"] = codes["kv_tokens"] / codes["batch_size"]
    group = _population(rows)
    found = np.full((len(rows), 2 * len(axes)), np.nan)
    for place, axis in enumerate(axes):
        others = [codes[name] for name in axes if name != axis] + [group]
        order = np.lexsort([codes[axis], *others])
        same = np.ones(len(rows) - 1, dtype=bool)
        for other in others:
            same &= other[order][1:] == other[order][:-1]
        first, second = order[:-1][same], order[1:][same]
        found[first, 2 * place] = values[second]
        found[second, 2 * place + 1] = values[first]
    return found


def _population(rows: pd.DataFrame) -> NDArray[np.intp]:
    """Return a number for each row, (rows,), of what it shares with rows that it can be held against."""
    fixed = pd.Series("", rows.index, dtype="string")
    for name in _POPULATION:
        if name in rows:
            fixed = fixed + rows[name].astype("string").fillna("") + "|"
    return np.asarray(pd.factorize(fixed)[0])


def arithmetic(rows: pd.DataFrame, device: DeviceSpec, window: int = 0) -> NDArray[np.float64]:
    """Return seconds, (rows,), of the arithmetic of products or prefills at the device's peak rate."""
    c = {name: rows[name].to_numpy(float) for name in rows if pd.api.types.is_numeric_dtype(rows[name])}
    if str(rows["kind"].iloc[0]) == "gemm":
        width = rows["dtype"].map(_BYTES).fillna(2).to_numpy(float)
        return np.asarray(c["m"] * c["k"] * c["n"] * width / device.peak_flops)  # twice the rate in half the bytes
    seen = np.minimum(c["chunk"], window) if window else c["chunk"]  # without those that a window hides, or a prefix
    pairs = seen * (seen + 1) / 2 + (c["chunk"] - seen) * seen
    return np.asarray(4 * c["batch_size"] * pairs * c["num_heads"] * c["head_dim"] / device.peak_flops)


def data_sheet(rows: pd.DataFrame, device: DeviceSpec) -> NDArray[np.float64]:
    """Return seconds, (rows,), at the device's peak rates, of rows of one kind in AXES."""
    kind = str(rows["kind"].iloc[0])
    c = {name: rows[name].to_numpy(float) for name in rows if pd.api.types.is_numeric_dtype(rows[name])}
    if kind == "gemm":
        width = rows["dtype"].map(_BYTES).fillna(2).to_numpy(float)
        flops = 2 * c["m"] * c["k"] * c["n"] * width / 2  # twice the rate in half the bytes
        moved = width * c["k"] * c["n"] + 2 * c["m"] * (c["k"] + c["n"])
    else:
        b, h, kv, d = (c[name] for name in ("batch_size", "num_heads", "num_kv_heads", "head_dim"))
        if kind == "attention_prefill":
            tokens, pairs = b * c["chunk"], b * (c["chunk"] * c["prefix"] + c["chunk"] * (c["chunk"] + 1) / 2)
            cached = b * (c["prefix"] + c["chunk"])
        else:
            tokens, pairs, cached = b, c["kv_tokens"], c["kv_tokens"]
        width = np.where(rows["dtype"].astype("string").fillna("").str.contains("cache fp8"), 1, 2)
        flops, moved = 4 * pairs * h * d, 4 * tokens * h * d + 2 * width * cached * kv * d
    return np.asarray(np.maximum(flops / device.peak_flops, moved / device.memory_bandwidth))


def _words(row: pd.Series) -> str:
    sizes = ", ".join(f"{name} {int(row[name])}" for name in AXES[str(row["kind"])])
    return f"{row['dtype']} {row['kind']} {sizes}: {row['time_ms']:.4g} ms"
