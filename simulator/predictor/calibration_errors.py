"""How well a calibration predicts: errors on tables and on folds that were held out, and the intervals from those."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import InputError
from engine.results.tables import Array
from simulator.predictor.calibration import INTERVAL, Calibration
from simulator.predictor.kind import KindModel
from simulator.predictor.kinds import check_kinds

if TYPE_CHECKING:
    import pandas as pd

LONG_S = 20e-6  # shorter times are mostly launch and rounding; errors are also given without them


def errors(measured: Array, predicted: Array) -> dict[str, Any]:
    """Count, and absolute percentage errors as fractions: mean (mape), median (p50), p95; signed mean (bias)."""
    known = np.isfinite(predicted)
    if not known.any():
        return {"count": 0}
    relative = predicted[known] / measured[known] - 1
    absolute = np.abs(relative)
    return {
        "count": int(known.sum()),
        "mape": short(absolute.mean()),
        "p50": short(np.percentile(absolute, 50)),
        "p95": short(np.percentile(absolute, 95)),
        "bias": short(relative.mean()),
    }


def rows_of(model: type[KindModel[Any]], frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a model's kind that are times of the GPU."""
    return model.usable(frame[frame["kind"] == model.kind])


def evaluate(calibration: Calibration, frames: Sequence[pd.DataFrame]) -> dict[str, dict[str, Any]]:
    """The errors of a calibration on tables, by kind; those of longer times apart.

    Raises InputError for a kind that nobody knows, and where there is nothing to compare.
    """
    import pandas as pd

    rows = pd.concat(list(frames), ignore_index=True)
    check_kinds(rows["kind"].unique(), "the tables to compare with")
    result = {}
    for kind, model in calibration.models.items():
        mine = model.comparable(rows_of(type(model), rows))
        mine = mine[(model.variant(mine) == kind.partition(".")[2]).to_numpy(bool)].reset_index(drop=True)
        if not len(mine):
            continue
        columns = model.columns_of(mine)
        measured, predicted = mine["time_ms"].to_numpy(float) / 1e3, model.seconds(columns)
        long = measured > LONG_S
        record = calibration.records.get(kind)
        covered = {} if record is None else {"covers": short(_covered(calibration, kind, measured, predicted).mean())}
        result[kind] = {
            **errors(measured, predicted),
            **covered,
            "learned_on": calibration.learned_on(kind),
            "measured_on": ", ".join(sorted(mine["device"].unique())),
            "in_range": short(np.mean(model.in_range(columns))),
            "over_20us": errors(measured[long], predicted[long]),
        }
    if not result:
        kinds = ", ".join(sorted(rows["kind"].unique()))
        raise InputError(f"nothing to compare: learned {', '.join(calibration.models)}, the tables hold {kinds}")
    return result


def _covered(calibration: Calibration, kind: str, measured: Array, predicted: Array) -> Array:
    """Which measured times, (rows,), lie within the intervals of the predicted ones."""
    limits = np.array([calibration.interval(kind, float(seconds)) for seconds in predicted])
    return np.asarray((measured >= predicted * limits[:, 0]) & (measured <= predicted * limits[:, 1]))


def held_out(names: pd.Series, folds: Array, measured: Array, predicted: Array) -> dict[str, Any]:
    """Errors over all held-out rows, over the longer ones, and by what was left out together."""
    long = measured > LONG_S
    by_group = {
        str(name): found["mape"]
        for name in sorted(names.unique())
        if (found := errors(measured[mine := long & (names == name).to_numpy()], predicted[mine]))["count"]
    }
    worst = max(by_group, key=lambda name: by_group[name], default="")
    return {
        "folds": int(folds.max() + 1),
        **errors(measured, predicted),
        "over_20us": errors(measured[long], predicted[long]),
        "groups_over_20us": {
            "count": len(by_group),
            "mean": short(np.mean(list(by_group.values()))) if by_group else None,
            "worst": by_group.get(worst),
            "worst_is": worst,
            **({"each": by_group} if len(by_group) <= 8 else {}),
        },
    }


def interval(measured: Array, predicted: Array, folds: Array) -> dict[str, Any]:
    """Quantiles of measured / predicted over the held-out rows, by predicted time; their coverage, each fold judged by
    the quantiles of the others."""
    known = np.isfinite(predicted)
    ratio, time, fold = (measured / predicted)[known], predicted[known], folds[known]
    tail = (1 - INTERVAL) / 2
    edges = np.unique(np.quantile(time, [0.25, 0.5, 0.75, 1.0])) if len(time) else np.array([1.0])
    band = np.minimum(np.searchsorted(edges, time), len(edges) - 1)

    def limits(rows: Array) -> tuple[float, float]:
        values = ratio[rows] if rows.any() else ratio
        low, high = np.quantile(values, [tail, 1 - tail])
        return float(low), float(high)

    inside = np.zeros(len(ratio), dtype=bool)
    for each in np.unique(fold):
        for i in range(len(edges)):
            mine = (fold == each) & (band == i)
            low, high = limits((fold != each) & (band == i))
            inside[mine] = (ratio[mine] >= low) & (ratio[mine] <= high)
    bands = []
    for i, edge in enumerate(edges):
        low, high = limits(band == i)
        bands.append({"up_to_s": short(edge), "low": short(low), "high": short(high)})
    return {"meant_to_cover": INTERVAL, "covers": short(inside.mean()), "bands": bands}


def short(number: Any) -> float:
    """Four significant digits: what is kept must not depend on the last bit."""
    return float(f"{float(number):.4g}")
