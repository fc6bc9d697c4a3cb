"""What the page about a calibration shows, as small arrays: held-out errors, measured beside predicted, efficiency.

kinds = read_calibration(calibration, [frame])
print(kinds[0].record["held_out"]["mape"], kinds[0].range_words)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.results.tables import Array
from simulator.predictor.calibration import Calibration, kind_name
from simulator.predictor.kind import KindModel
from studies.calibration.kinds import PAGES, KindPage, page_of

if TYPE_CHECKING:
    import pandas as pd

MOST_POINTS = 1500  # of a scatter
MOST_BINS = 10
FEWEST_IN_BIN = 5
MOST_CURVES = 4
MOST_ON_CURVE = 80
FEWEST_ON_CURVE = 5


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
class Drawn:
    """Measured and predicted times, (points,) each: every so-manieth of `total` rows in order of time."""

    measured_s: Array
    predicted_s: Array
    total: int
    fitted: int  # rows of sources that the model was fitted to
    devices: list[str]
    by_size: SizeErrors
    efficiency: list[Efficiency]


@dataclass(frozen=True, eq=False)
class KindRecord:
    """One kind of operator. `record` is the calibration's own, `page` what there is to say about the kind."""

    kind: str
    page: KindPage
    record: Mapping[str, Any]
    carried_over: bool
    range_words: list[str]
    drawn: Drawn | None  # None without measured rows


def read_calibration(calibration: Calibration, frames: Sequence[pd.DataFrame] = ()) -> list[KindRecord]:
    """Return the record of each kind in a calibration; `frames` are measured tables to hold beside its predictions."""
    kinds = []
    for kind, model in calibration.models.items():
        record, page = calibration.records[kind], page_of(kind)
        drawn = None
        if (rows := comparable(model, record, frames)) is not None:
            columns = page.columns(model, rows)
            measured, predicted = rows["time_ms"].to_numpy(float) / 1e3, model.seconds(columns)
            chosen = spread_evenly(measured)
            drawn = Drawn(
                measured[chosen], predicted[chosen], len(rows),
                int(rows["source"].isin(record["provenance"]["sources"]).sum()),
                sorted(map(str, rows["device"].unique())),
                errors_by_size(measured, predicted),
                efficiencies(*page.limits(model, rows, columns), measured, predicted),
            )  # fmt: skip
        carried_over = record["learned_on"] != calibration.device
        kinds.append(KindRecord(kind, page, record, carried_over, page.range_words(model), drawn))
    return kinds


def lacking(calibration: Calibration) -> list[str]:
    """Return the names of the kinds that a calibration does not have."""
    known = {kind_name(name) for name in calibration.models}
    return [page.name for kind, page in PAGES.items() if kind not in known]


def comparable(model: KindModel[Any], record: Mapping[str, Any], frames: Sequence[pd.DataFrame]) -> pd.DataFrame | None:
    """Return the rows of `frames` that a model predicts as they are: of its kind, its devices and its networks."""
    import pandas as pd

    facts, parts = record["provenance"], []
    for frame in frames:
        mine = frame[frame["kind"] == model.kind]
        mine = mine[mine["dtype"].isin(facts["dtypes"]) | mine["dtype"].isna()]
        parts.append(page_of(model.kind).comparable(model, mine[mine["device"].isin(facts["measured_on"])]))
    parts = [part for part in parts if len(part)]
    return pd.concat(parts, ignore_index=True) if parts else None


def spread_evenly(values: Array, most: int = MOST_POINTS) -> Array:
    """Return indices of at most `most` values, evenly among all in rising order."""
    order: Array = np.argsort(values, kind="stable")
    if len(values) <= most:
        return order
    chosen: Array = order[np.linspace(0, len(values) - 1, most).astype(int)]
    return chosen


def errors_by_size(measured: Array, predicted: Array) -> SizeErrors:
    """Return errors in bins of equal width in the logarithm of the measured time; sparse bins are left out."""
    relative = predicted / measured - 1
    logs = np.log(measured)
    edges = np.linspace(logs.min(), logs.max() + 1e-9, MOST_BINS + 1)
    number = np.clip(np.searchsorted(edges, logs, side="right") - 1, 0, MOST_BINS - 1)
    found = []
    for i in range(MOST_BINS):
        off = relative[number == i]
        if len(off) >= min(FEWEST_IN_BIN, len(measured)):
            centre, (median, p95) = np.exp((edges[i] + edges[i + 1]) / 2), np.percentile(np.abs(off), [50, 95])
            found.append((centre, median, p95, off.mean(), len(off)))
    return SizeErrors(*(np.array(column, dtype=float) for column in zip(*found, strict=True)))


def efficiencies(limit: Array, size: Array, labels: Array, measured: Array, predicted: Array) -> list[Efficiency]:
    """Return a few shapes by size: the limit over the time (the roofline, or for collectives bytes/s on the bus).

    All are (rows,): what to divide by a row's time, its size, and the name of its curve ("": none).
    """
    names = sorted({label for label in labels if label})
    counts = {name: len(np.unique(size[labels == name])) for name in names}
    enough = [name for name, count in counts.items() if count >= max(FEWEST_ON_CURVE, max(counts.values()) / 2)]
    enough.sort(key=lambda name: float(np.median((limit / size)[labels == name])))
    chosen = [enough[i] for i in np.unique(np.linspace(0, len(enough) - 1, MOST_CURVES).astype(int))] if enough else []
    curves = []
    for name in chosen:
        mine = labels == name
        every = np.unique(size[mine])
        points = every[spread_evenly(every, MOST_ON_CURVE)]
        sides = (
            np.array([np.median((limit / times)[mine & (size == point)]) for point in points])
            for times in (measured, predicted)
        )
        curves.append(Efficiency(name, points, *sides))
    return curves
