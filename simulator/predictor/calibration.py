"""A device's calibration: a learned estimator for each kind of operator, where it came from, how well it predicts.

It is kept as a folder of JSON files, one a kind, each with its provenance, the range it was measured over and its error
on data that was held out: readable, diffable, and the same to the last bit when it is fitted to the same tables again.

    calibration = fit(catalog.device("a40"), [read_source("vidur", "vidur/data/profiling", "a40")])
    save(calibration, Path("calibration_data/a40"))
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine import catalog
from engine.device_folder import HOST_FILE, broken_host, folder_of, host_record, known_devices
from engine.errors import InputError
from engine.specs import DeviceSpec
from engine.tables import Array
from simulator.predictor.attention import AttentionDecode, AttentionPrefill, kernel_names
from simulator.predictor.collectives import HOST_BOUND, AllReduce, Send
from simulator.predictor.elementwise import Elementwise
from simulator.predictor.gemm import Gemm
from simulator.predictor.host import OVERHEAD, HostFit, fit_overhead
from simulator.predictor.kinds import KindModel

if TYPE_CHECKING:
    import pandas as pd

KINDS: dict[str, type[KindModel]] = {
    model.kind: model for model in (Gemm, Elementwise, AttentionPrefill, AttentionDecode, AllReduce, Send)
}
POOLED = ("attention_prefill", "attention_decode")  # learned from every table given, of whichever device of the family
FOLDS = 6
LONG_S = 20e-6  # shorter times are mostly launch and rounding; errors are also given without them
INTERVAL = 0.9  # share of the held-out measurements that a prediction interval is made to cover


def groups(kind: str, rows: pd.DataFrame) -> pd.Series:
    """What must stay together when data is held out, for else the same shape stands on both sides: one name a row.

    Whole models (of GEMMs without one, whole weight shapes), head configurations, message sizes. Where a kernel was
    measured with one head configuration alone, its chunk lengths (prefill) or batch sizes (decode).
    """
    if kind == "gemm":
        return rows["model"].fillna(rows["k"].astype(str) + "x" + rows["n"].astype(str)).astype(str)
    if kind == "elementwise":
        return rows["model"].fillna(rows["operator"]).astype(str)
    if kind in ("all_reduce", "send"):
        return rows["num_bytes"].astype(str) + " bytes"
    heads = rows["num_heads"].astype(str) + "/" + rows["num_kv_heads"].astype(str) + " heads"
    kernel = rows["source"].astype(str)
    alone = heads.groupby(kernel).transform("nunique") == 1
    size = rows["chunk"] if kind == "attention_prefill" else rows["batch_size"]
    name = "chunk " if kind == "attention_prefill" else "batch "
    return heads.where(~alone, name + size.astype(str)).astype(str)


@dataclass(frozen=True)
class Calibration:
    """What is known of a device. `records` holds, for each kind, its provenance and held-out errors."""

    device: str
    models: dict[str, KindModel]
    records: dict[str, dict[str, Any]]
    host: HostFit | None = None  # measured with the operators, where whole iterations were

    def interval(self, kind: str, seconds: float) -> tuple[float, float]:
        """Factors (low, high) on a predicted time of `kind` between which INTERVAL of the held-out measurements lay."""
        bands = self.records[kind]["interval"]["bands"]
        band = next((band for band in bands if seconds <= band["up_to_s"]), bands[-1])
        return band["low"], band["high"]


def gather(frames: Sequence[pd.DataFrame], device: DeviceSpec) -> dict[str, pd.DataFrame]:
    """The rows to learn each kind from.

    Attention is learned from all tables, for head configurations and cached prefixes were measured on different cards
    of a family. Any other kind comes from the first table that has it for this device.
    """
    import pandas as pd

    found = {}
    for kind in KINDS:
        rows = [_of_kind(frame, kind) for frame in frames]
        own = [part for part in rows if len(part) and (part["device"] == device.name).all()]
        chosen = [part for part in rows if len(part)] if kind in POOLED else own[:1]
        if chosen:
            found[kind] = pd.concat(chosen, ignore_index=True)
    if not found:
        names = sorted({name for frame in frames for name in frame["device"].unique()})
        raise InputError(f"no measurements of {device.name} in the sources given: they are of {', '.join(names)}")
    return found


def _of_kind(frame: pd.DataFrame, kind: str) -> pd.DataFrame:
    """The rows of a kind that are times of the GPU; collectives launched eagerly are mostly the host's."""
    return frame[(frame["kind"] == kind) & ~frame["backend"].isin(HOST_BOUND)]


def learn(device: DeviceSpec, frames: Sequence[pd.DataFrame]) -> dict[str, KindModel]:
    """A model of every kind that the tables have. Raises InputError if they have nothing for this device."""
    return {kind: KINDS[kind](_learned_on(device, rows)).fit(rows) for kind, rows in gather(frames, device).items()}


def fit(device: DeviceSpec, frames: Sequence[pd.DataFrame], on_progress: Callable[[str], None] = print) -> Calibration:
    """Learn every kind that the tables have, and measure its error on folds that are held out in turn.

    Raises InputError if the tables have nothing for this device.
    """
    records = {}
    for kind, rows in gather(frames, device).items():
        learned_on = _learned_on(device, rows)
        on_progress(f"{kind}: {len(rows):,} rows, measured on {learned_on.name}")
        names = groups(kind, rows)
        folds = _folds(names)
        predicted = np.full(len(rows), np.nan)
        for fold in range(folds.max() + 1):
            out = folds == fold
            if not out.all():
                model = KINDS[kind](learned_on).fit(rows[~out].reset_index(drop=True))
                predicted[out] = model.seconds(columns_of(model, rows[out]))
        measured = rows["time_ms"].to_numpy(float) / 1e3
        records[kind] = {
            "learned_on": learned_on.name,
            "provenance": _provenance(rows),
            "held_out": _held_out(names, folds, measured, predicted),
        }
        if kind == "gemm" and names.nunique() > 1:
            # models share weight shapes, so a model left out is partly known: once more without those
            predicted = _without_shared_shapes(KINDS[kind](learned_on), rows, folds)
            records[kind]["held_out_new_shapes"] = _held_out(names, folds, measured, predicted)
        records[kind]["interval"] = _interval(measured, predicted, folds)
    overheads = [frame for frame in frames if (frame["operator"] == OVERHEAD).any()]
    host = fit_overhead(overheads[0], name=f"measured_{device.name}") if overheads else None
    return Calibration(device.name, learn(device, frames), records, host)


def _without_shared_shapes(model: KindModel, rows: pd.DataFrame, folds: Array) -> Array:
    """Predictions of GEMMs whose weight shapes (k, n) are in no row of the fit."""
    shape = rows["k"].astype(str) + "x" + rows["n"].astype(str)
    predicted = np.full(len(rows), np.nan)
    for fold in range(folds.max() + 1):
        out = folds == fold
        seen = ~out & ~shape.isin(shape[out]).to_numpy()
        if seen.any():
            model.fit(rows[seen].reset_index(drop=True))
            predicted[out] = model.seconds(columns_of(model, rows[out]))
    return predicted


def _learned_on(device: DeviceSpec, rows: pd.DataFrame) -> DeviceSpec:
    """The device itself where it was measured, else the one that most rows are of."""
    names = rows["device"].value_counts()
    return device if device.name in names.index else catalog.device(str(names.index[0]))


def columns_of(model: KindModel, rows: pd.DataFrame) -> dict[str, Array]:
    """The columns that a model wants, as arrays; and whose kernel each row is, where the model knows them all."""
    columns: dict[str, Array] = {name: rows[name].to_numpy() for name in model.columns}
    if isinstance(model, AttentionPrefill | AttentionDecode):
        kernels = kernel_names(rows)
        columns["kernel"] = np.where(np.isin(kernels, list(model.kernels_)), kernels, model.kernel or model.default_)
    elif isinstance(model, AllReduce | Send):
        kernels = rows["backend"].fillna("").to_numpy(str)
        if np.isin(kernels, model.kernels_).all():
            columns["kernel"] = kernels
    return columns


def errors(measured: Array, predicted: Array) -> dict[str, Any]:
    """Count, and absolute percentage errors as fractions: mean (mape), median (p50), p95; signed mean (bias)."""
    known = np.isfinite(predicted)
    if not known.any():
        return {"count": 0}
    relative = predicted[known] / measured[known] - 1
    absolute = np.abs(relative)
    return {
        "count": int(known.sum()),
        "mape": _short(absolute.mean()),
        "p50": _short(np.percentile(absolute, 50)),
        "p95": _short(np.percentile(absolute, 95)),
        "bias": _short(relative.mean()),
    }


def evaluate(calibration: Calibration, frames: Sequence[pd.DataFrame]) -> dict[str, dict[str, Any]]:
    """The errors of a calibration on tables, by kind; those of longer times apart."""
    import pandas as pd

    rows = pd.concat(list(frames), ignore_index=True)
    result = {}
    for kind, model in calibration.models.items():
        mine = _of_kind(rows, kind).reset_index(drop=True)
        if isinstance(model, AllReduce | Send):
            mine = mine[mine["network"].isin(model.networks_)].reset_index(drop=True)
        if not len(mine):
            continue
        columns = columns_of(model, mine)
        measured, predicted = mine["time_ms"].to_numpy(float) / 1e3, model.seconds(columns)
        long = measured > LONG_S
        result[kind] = {
            **errors(measured, predicted),
            "learned_on": model.device.name,
            "measured_on": ", ".join(sorted(mine["device"].unique())),
            "in_range": _short(np.mean(model.in_range(columns))),
            "over_20us": errors(measured[long], predicted[long]),
        }
    if not result:
        kinds = ", ".join(sorted(rows["kind"].unique()))
        raise InputError(f"nothing to compare: learned {', '.join(calibration.models)}, the tables hold {kinds}")
    return result


def save(calibration: Calibration, folder: Path, device: DeviceSpec | None = None) -> set[str]:
    """Write a file for each kind, and for the host; a folder that is there is replaced file by file.

    With `device` its data sheet too, so that the folder can be given as the device. Returns the files' names.
    """
    files: dict[str, dict[str, Any]] = {}
    for kind, model in calibration.models.items():
        data = {"device": calibration.device, "kind": kind, **calibration.records[kind], "model": model.to_json()}
        files[f"{kind}.json"] = data
    if calibration.host is not None:
        files[HOST_FILE] = {"device": calibration.device, **asdict(calibration.host)}
    if device is not None:
        files[catalog.DEVICE_FILE] = {k: v for k, v in asdict(device).items() if k != "calibration"}
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        _write(folder / name, data)
    return set(files)


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def load(folder: Path, device: DeviceSpec) -> Calibration:
    """The calibration in `folder`. Raises InputError for a folder without one, and for a broken file."""
    models, records = {}, {}
    for kind, model in KINDS.items():
        path = folder / f"{kind}.json"
        if not path.exists():
            continue
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            learned_on = device if data["learned_on"] == device.name else catalog.device(data["learned_on"])
            models[kind] = model.from_json(data.pop("model"), learned_on)
            for name in ("provenance", "held_out", "interval"):
                data[name]  # a KeyError is told below
            records[kind] = {name: value for name, value in data.items() if name not in ("device", "kind")}
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise InputError(f"{path} is no calibration ({type(error).__name__}: {error}): fit it again") from None
        if data["device"] != device.name:
            raise InputError(f"{path} is of {data['device']}, not of {device.name}: fit it for this device")
    if not models:
        raise InputError(
            f"{folder} holds no calibration: fit one with 'windtunnel calibrate fit --device {device.name}'"
        )
    return Calibration(device.name, models, records, _load_host(folder))


def load_of(device: DeviceSpec) -> Calibration:
    """The calibration of a device: its own, or what ships under its name. InputError if there is none."""
    folder = folder_of(device)
    if folder is None:
        known = ", ".join(known_devices()) or "none yet"
        raise InputError(
            f"no calibration for device {device.name!r} (there are: {known}): give a calibration's folder, or fit one "
            "with 'windtunnel calibrate fit'"
        )
    return load(folder, device)


def _load_host(folder: Path) -> HostFit | None:
    record = host_record(folder)
    try:
        return None if record is None else HostFit(**record)
    except TypeError as error:
        raise broken_host(folder, error) from None


def fingerprint(folder: Path) -> str:
    """A hash of the contents of a calibration's files."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.json")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


# -- inside --------------------------------------------------------------------------------------------------------


def _folds(names: pd.Series) -> Array:
    """A fold for each row; rows of a group share it. As many folds as groups, FOLDS at most; of one group, by row."""
    order = {name: i for i, name in enumerate(sorted(names.unique()))}
    if len(order) == 1:
        return np.arange(len(names)) % FOLDS
    return np.array([order[name] % min(FOLDS, len(order)) for name in names])


def _held_out(names: pd.Series, folds: Array, measured: Array, predicted: Array) -> dict[str, Any]:
    """Errors over all held-out rows, over the longer ones, and by what was left out together."""
    long = measured > LONG_S
    by_group = {
        str(name): errors(measured[long & mine], predicted[long & mine])["mape"]
        for name in sorted(names.unique())
        if (mine := (names == name).to_numpy())[long].any()
    }
    worst = max(by_group, key=lambda name: by_group[name], default="")
    return {
        "folds": int(folds.max() + 1),
        **errors(measured, predicted),
        "over_20us": errors(measured[long], predicted[long]),
        "groups_over_20us": {
            "count": len(by_group),
            "mean": _short(np.mean(list(by_group.values()))) if by_group else None,
            "worst": by_group.get(worst),
            "worst_is": worst,
            **({"each": by_group} if len(by_group) <= 8 else {}),
        },
    }


def _interval(measured: Array, predicted: Array, folds: Array) -> dict[str, Any]:
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
        bands.append({"up_to_s": _short(edge), "low": _short(low), "high": _short(high)})
    return {"meant_to_cover": INTERVAL, "covers": _short(inside.mean()), "bands": bands}


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
        "median_relative_spread": _short(spread) if np.isfinite(spread) else None,
    }


def _short(number: Any) -> float:
    """Four significant digits: what is kept must not depend on the last bit."""
    return float(f"{float(number):.4g}")
