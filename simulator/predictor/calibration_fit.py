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
from simulator.predictor.calibration import Calibration
from simulator.predictor.calibration_errors import held_out, interval, rows_of, short
from simulator.predictor.host import OVERHEAD, fit_overhead
from simulator.predictor.kind import KindModel
from simulator.predictor.kinds import KINDS, check_kinds

if TYPE_CHECKING:
    import pandas as pd

FOLDS = 6


def gather(frames: Sequence[pd.DataFrame], device: DeviceSpec) -> dict[str, pd.DataFrame]:
    """Return the rows to learn each kind from.

    A pooled kind is learned from all tables, of whichever device; any other comes from the first table that has it for
    this device. Raises InputError for a kind that nobody knows, and if the tables have nothing for this device.
    """
    import pandas as pd

    for frame in frames:
        check_kinds(frame["kind"].unique(), "the tables to learn from")
    found = {}
    for kind, model in KINDS.items():
        rows = [rows_of(model, frame) for frame in frames]
        own = [part for part in rows if len(part) and (part["device"] == device.name).all()]
        chosen = [part for part in rows if len(part)] if model.pooled else own[:1]
        if chosen:
            found[kind] = pd.concat(chosen, ignore_index=True)
    if not found:
        names = sorted({name for frame in frames for name in frame["device"].unique()})
        raise InputError(f"no measurements of {device.name} in the sources given: they are of {', '.join(names)}")
    return found


def learn(device: DeviceSpec, frames: Sequence[pd.DataFrame]) -> dict[str, KindModel[Any]]:
    """A model of every kind that the tables have. Raises InputError if they have nothing for this device."""
    return {kind: KINDS[kind](_learned_on(device, rows)).fit(rows) for kind, rows in gather(frames, device).items()}


def fit(device: DeviceSpec, frames: Sequence[pd.DataFrame], on_progress: Callable[[str], None] = print) -> Calibration:
    """Learn every kind that the tables have, and measure its error on folds that are held out in turn.

    Raises InputError if the tables have nothing for this device.
    """
    records: dict[str, dict[str, Any]] = {}
    for kind, rows in gather(frames, device).items():
        learned_on = _learned_on(device, rows)
        on_progress(f"{kind}: {len(rows):,} rows, measured on {learned_on.name}")
        names = KINDS[kind].groups(rows)
        folds = _folds(names)
        predicted = np.full(len(rows), np.nan)
        for fold in range(folds.max() + 1):
            out = folds == fold
            if not out.all():
                model = KINDS[kind](learned_on).fit(rows[~out].reset_index(drop=True))
                predicted[out] = model.seconds(model.columns_of(rows[out]))
        measured = rows["time_ms"].to_numpy(float) / 1e3
        records[kind] = {
            "learned_on": learned_on.name,
            "provenance": _provenance(rows),
            "held_out": held_out(names, folds, measured, predicted),
        }
        shapes = KINDS[kind].shared_shapes(rows)
        if shapes is not None and names.nunique() > 1:
            predicted = _without_shared_shapes(KINDS[kind](learned_on), rows, shapes, folds)
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
    """A fold for each row; rows of a group share it. As many folds as groups, FOLDS at most; of one group, by row."""
    order = {name: i for i, name in enumerate(sorted(names.unique()))}
    if len(order) == 1:
        return np.arange(len(names)) % FOLDS
    return np.array([order[name] % min(FOLDS, len(order)) for name in names])


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
        "median_relative_spread": short(spread) if np.isfinite(spread) else None,
    }
