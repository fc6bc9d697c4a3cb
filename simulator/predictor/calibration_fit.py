"""Fits a calibration: gathers the rows of each kind from the tables given, learns from them, and holds folds out.

calibration = fit(catalog.device("a40"), [read_source("vidur", "vidur/data/profiling", "a40")])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import InputError
from engine.results.tables import Array
from engine.specs import DeviceSpec, catalog
from simulator.predictor.calibration import Calibration, in_words, kind_name, named
from simulator.predictor.calibration_errors import held_out, interval, rows_of, short
from simulator.predictor.gemm import EIGHT_BITS
from simulator.predictor.host import OVERHEAD, fit_overhead
from simulator.predictor.kind import KindModel
from simulator.predictor.kinds import KINDS, check_kinds

if TYPE_CHECKING:
    import pandas as pd

FOLDS, FEW_FOLDS = 6, 3
LARGE, MANY_GROUPS = 20_000, 50  # rows and groups beyond which there are few folds
PREFIX_RULE = (
    "not measured: a cached token costs a tile of queries what a visible one of the prompt does. On the A100 "
    "table that has prefixes (microsoft/vidur, a100_pcie, chunk lengths held out) the rule is off by 6 % of an"
    " operator's time, by 16 % of what the prefix adds"
)


def gather(frames: Sequence[pd.DataFrame], device: DeviceSpec) -> dict[str, pd.DataFrame]:
    """Return the rows to learn each kind from, each population of it by itself (`calibration.named`).

    A pooled kind is learned from all tables, of whichever device; any other comes from the first table that has it for
    this device. Raises InputError for a kind that nobody knows, and if the tables have nothing for this device.
    """
    import pandas as pd

    for frame in frames:
        check_kinds(frame["kind"].unique(), "the tables to learn from")
    found: dict[str, pd.DataFrame] = {}
    for kind, model in KINDS.items():
        parts: dict[str, list[pd.DataFrame]] = {}
        for rows in (rows_of(model, frame) for frame in frames):
            for variant, part in rows.groupby(model.variant(rows)) if len(rows) else ():
                parts.setdefault(str(variant), []).append(part)
        for variant in sorted(parts):
            own = [part for part in parts[variant] if (part["device"] == device.name).all()]
            chosen = parts[variant] if model.pooled else own[:1]
            if chosen:
                found[named(kind, variant)] = pd.concat(chosen, ignore_index=True)
    if not found:
        names = sorted({name for frame in frames for name in frame["device"].unique()})
        raise InputError(f"no measurements of {device.name} in the sources given: they are of {', '.join(names)}")
    return found


def learn(device: DeviceSpec, frames: Sequence[pd.DataFrame]) -> dict[str, KindModel[Any]]:
    """A model of every kind that the tables have. Raises InputError if they have nothing for this device."""
    return {name: _learned(name, device, rows) for name, rows in gather(frames, device).items()}


def _learned(name: str, device: DeviceSpec, rows: pd.DataFrame) -> KindModel[Any]:
    """A model that predicts `device`: by its own data sheet, wherever it was learned, or as its kind is carried."""
    kind, where = KINDS[kind_name(name)], _learned_on(device, rows)
    model = kind(where).fit(rows)
    if where != device:
        model = kind.from_json(model.to_json(), kind.carried_by(where, device))
        model.learned_on = where.name
    return model


def fit(device: DeviceSpec, frames: Sequence[pd.DataFrame], on_progress: Callable[[str], None] = print) -> Calibration:
    """Learn every kind that the tables have, and measure its error on folds that are held out in turn.

    Raises InputError if the tables have nothing for this device, or too little of a kind to hold any of it out.
    """
    records: dict[str, dict[str, Any]] = {}
    for kind, rows in gather(frames, device).items():
        learned_on, model_of = _learned_on(device, rows), KINDS[kind_name(kind)]
        if len(rows) < 2:
            raise InputError(
                f"{in_words(kind)}: one row is too few to hold some out and measure an error: profile for longer "
                f"(--budget), or add tables that have more"
            )
        on_progress(f"{in_words(kind)}: {len(rows):,} rows, measured on {learned_on.name}")
        names = model_of.groups(rows)
        folds = _folds(names)
        predicted = np.full(len(rows), np.nan)
        for fold in range(folds.max() + 1):
            out = folds == fold
            if not out.all():
                model = model_of(learned_on).fit(rows[~out].reset_index(drop=True))
                predicted[out] = model.seconds(model.columns_of(rows[out]))
        measured = rows["time_ms"].to_numpy(float) / 1e3
        records[kind] = {
            "learned_on": learned_on.name,
            "provenance": _provenance(rows),
            "held_out": held_out(names, folds, measured, predicted),
        }
        shapes = model_of.shared_shapes(rows)
        if shapes is not None and names.nunique() > 1:
            anew = _without_shared_shapes(model_of(learned_on), rows, shapes, folds)
            if np.isfinite(anew).any():  # not all groups have the same shapes
                predicted = anew
                records[kind]["held_out_new_shapes"] = held_out(names, folds, measured, predicted)
        records[kind]["interval"] = interval(measured, predicted, folds)
    overheads = [frame for frame in frames if (frame["operator"] == OVERHEAD).any()]
    host = fit_overhead(overheads[0], name=f"measured_{device.name}") if overheads else None
    return Calibration(device.name, learn(device, frames), records, host)


def _without_shared_shapes(model: KindModel[Any], rows: pd.DataFrame, shape: pd.Series, folds: Array) -> Array:
    """Predictions of rows whose `shape` is in no row of the fit."""
    predicted = np.full(len(rows), np.nan)
    for fold in range(folds.max() + 1):
        out = folds == fold
        seen = ~out & ~shape.isin(shape[out]).to_numpy()
        if seen.any():
            model.fit(rows[seen].reset_index(drop=True))
            predicted[out] = model.seconds(model.columns_of(rows[out]))
    return predicted


def _learned_on(device: DeviceSpec, rows: pd.DataFrame) -> DeviceSpec:
    """The device itself where it was measured, else the one that most rows are of."""
    names = rows["device"].value_counts()
    return device if device.name in names.index else catalog.device(str(names.index[0]))


# -- inside --------------------------------------------------------------------------------------------------------


def _folds(names: pd.Series) -> Array:
    """A fold for each row; rows of a group share it. As many folds as groups, FOLDS at most; of one group, by row.

    Of a large table of many groups there are FEW_FOLDS: it takes long, and half of it knows almost as much.
    """
    order = {name: i for i, name in enumerate(sorted(names.unique()))}
    if len(order) == 1:
        return np.arange(len(names)) % FOLDS
    most = FEW_FOLDS if len(names) > LARGE and len(order) > MANY_GROUPS else FOLDS
    return np.array([order[name] % min(most, len(order)) for name in names])


def _doubt(rows: pd.DataFrame) -> str | None:
    """What is known to be wrong with measurements."""
    quantised = (rows["kind"] == "gemm") & rows["dtype"].isin(EIGHT_BITS)
    if (quantised & rows["software"].fillna("").str.startswith("vllm 0.14")).any():
        return "8-bit products of vLLM 0.14 took twice as long as those of 0.19 on the devices measured under both"
    return None


def _provenance(rows: pd.DataFrame) -> dict[str, Any]:
    """Where rows came from, in words and counts."""

    def each(name: str) -> list[str]:
        return sorted(str(value) for value in rows[name].dropna().unique())

    spread = (rows["spread_ms"] / rows["time_ms"]).median()
    return {
        "rows": len(rows),
        "sources": each("source"),
        "measured_on": each("device"),
        "kernels": sorted({*each("backend"), *each("kernel")}),
        "software": each("software"),
        "dates": each("date"),
        "dtypes": each("dtype"),
        **({"doubtful": doubt} if (doubt := _doubt(rows)) else {}),
        **({"prefixes": PREFIX_RULE} if (rows["prefix"].notna() & (rows["prefix"] == 0)).all() else {}),
        "median_relative_spread": short(spread) if np.isfinite(spread) else None,
    }
