"""`windtunnel calibrate fit | show | evaluate`: fit a device's calibration, print it, evaluate it on other tables."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from engine.errors import InputError
from engine.results.folders import owned
from engine.specs import DeviceSpec, catalog
from engine.specs.device_folder import CALIBRATIONS, PROFILE_FILE
from profiler.importers import SOURCES, Selection, read_source
from profiler.importers.common import OtherDeviceError
from simulator.predictor import calibration as store
from simulator.predictor import calibration_errors, calibration_fit
from simulator.predictor.check import check_iterations, profiled_device, profiled_models, read_iterations
from simulator.predictor.kinds import KINDS
from studies.calibration.kinds import page_of

if TYPE_CHECKING:
    import pandas as pd

UNFINISHED = ".calibration.part"  # folder of the files of a calibration until all are written
_POOLED = [name for name, kind in KINDS.items() if kind.pooled]


def read(text: str, device: DeviceSpec, select: Selection | None = None) -> pd.DataFrame:
    """Return the tables of a source, `KIND:DIR` or `DIR`: of `device` if it has any, else of its only device."""
    kind, colon, place = text.partition(":")
    if not colon or kind not in SOURCES:
        place = text
        kind = _kind_of(Path(text))
    try:
        return read_source(kind, place, device=device.name, select=select)
    except OtherDeviceError:
        return read_source(kind, place, select=select)  # of another device, which is reported where it matters


def selection(software: Sequence[str] | None, dtype: str | None, kv_dtype: str | None, window: int) -> Selection:
    """Return which measurements to take, of what was given on the command line."""
    for text in software or ():
        if not all(text.partition("@")[::2]):
            raise InputError(f"software {text!r}: give an engine and its version, such as vllm@0.14")
    return Selection(tuple(software or ()), dtype, kv_dtype, window)


def _kind_of(place: Path) -> str:
    """Return the kind of source that a folder or file looks like."""
    if (place / PROFILE_FILE).is_file():
        return "profile"
    return "aiconfigurator" if any(_files(place, ".parquet")) else "vidur"


def _has_attention(frame: pd.DataFrame) -> bool:
    return bool(frame["kind"].isin(_POOLED).any())


def _attention_elsewhere(text: str, frame: pd.DataFrame, device: DeviceSpec, select: Selection) -> list[pd.DataFrame]:
    """Return the attention of the first other device that a source has, where `frame` is all it has of `device`."""
    for other in catalog.DEVICES.values():
        if other.name not in frame.attrs["devices"] or other.name == device.name:
            continue
        if _has_attention(found := read(text, other, select)):
            return [found[found["kind"].isin(_POOLED)]]
    return []


def _files(place: Path, suffix: str) -> list[Path]:
    return [place] if place.suffix == suffix else list(place.rglob(f"*{suffix}")) if place.is_dir() else []


def fit(
    device_name: str | None, sources: Sequence[str], output_dir: Path | None, select: Selection | None = None
) -> None:
    """Fit a calibration to sources and write it; `device_name` None is the device of a profile."""
    select = select or Selection()
    if not sources:
        raise InputError("no source given: add --source profile:DIR, vidur:DIR or aiconfigurator:DIR")
    profiles = [Path(text.removeprefix("profile:")) for text in sources if text.startswith("profile:")]
    if device_name is None and not profiles:
        hint = next(
            (f" (a profile is --source profile:{text})" for text in sources if _kind_of(Path(text)) == "profile"), ""
        )
        raise InputError(f"no device given: add --device NAME{hint}")
    device = profiled_device(profiles[0]) if device_name is None else catalog.device(device_name)
    for place in profiles:  # what is damaged is said before anything is written
        read_iterations(place)
        profiled_models(place)
    shipped = CALIBRATIONS / device.name
    if versions := [text for text in select.software if not text.startswith("nccl@")]:
        engine, _, version = versions[0].partition("@")
        shipped /= f"{engine}@{'.'.join(version.split('.')[:2])}"
    folder = output_dir or (profiles[0] / "calibration" if profiles else shipped)
    with owned(folder):
        unfinished = folder / UNFINISHED
        shutil.rmtree(unfinished, ignore_errors=True)  # of a fit that was killed
        there = {path.name for path in folder.iterdir() if path.is_file()}
        ours = {name for name in there if store.kind_name(name) in KINDS and name.endswith(".json")} | {
            *store.NOT_KINDS
        }
        if foreign := sorted(there - ours):
            raise InputError(
                f"{folder} holds {foreign[0]}, which does not belong to a calibration: give another --output-dir"
            )
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        frames = [read(source, device, select) for source in sources]
        if not any(_has_attention(frame[frame["device"] == device.name]) for frame in frames):
            for source, frame in zip(sources, frames.copy(), strict=True):
                if not _has_attention(frame):
                    frames += _attention_elsewhere(source, frame, device, select)
        for frame in frames:
            for note in frame.attrs.get("notes", []):
                console.print(f"note: {note}", style="dim")
        calibration = calibration_fit.fit(device, frames, on_progress=lambda line: console.print(f"fitting {line}"))
        if there:
            console.print(f"replacing the calibration in {folder}")
        try:
            written = store.save(calibration, unfinished, None if folder == shipped else device)
            if profiles:
                shutil.copyfile(
                    profiles[0] / PROFILE_FILE, unfinished / PROFILE_FILE
                )  # where and with what it was done
                written.add(PROFILE_FILE)
            for name in written:  # once all are there: half a calibration would look like a whole one
                (unfinished / name).replace(folder / name)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        for name in there - written:  # of the fit before
            (folder / name).unlink()
    show_calibration(calibration)
    for place in profiles:
        for name, errors in check_iterations(replace(device, calibration=str(folder)), place).items():
            console.print(
                f"whole iterations of {name}: {errors['count']:,}, mean error {errors['mape']:.1%}, "
                f"median {errors['p50']:.1%}, P95 {errors['p95']:.1%}, bias {errors['bias']:+.1%}"
            )
    print(f"calibration: {folder}")


def show(device_name: str, software: str | None = None) -> None:
    """Print the calibration of a device, as of an engine's version where it has several."""
    device = catalog.device(device_name)
    show_calibration(store.load_of(device, software))


def show_calibration(calibration: store.Calibration) -> None:
    """Print a table of the kinds (rows, origin, held-out errors, coverage of the intervals) and the sources."""
    console = Console(highlight=False, soft_wrap=True, width=130)
    table = Table(box=None, title=f"{calibration.device}: errors on held-out data", title_justify="left")
    for column in ("operator", "measured on", "rows", "mean error", "median", "P95", "bias", "90 % interval covers"):
        table.add_column(column, justify="left" if column in ("operator", "measured on") else "right")
    for kind, record in calibration.records.items():
        held_out = record["held_out"]
        shares = [f"{held_out[name]:+.1%}" if name == "bias" else f"{held_out[name]:.1%}"
                  for name in ("mape", "p50", "p95", "bias")]  # fmt: skip
        rows = f"{record['provenance']['rows']:,}"
        version = f" ({calibration.software[kind]})" if kind in calibration.software else ""
        table.add_row(
            store.in_words(kind), record["learned_on"] + version, rows, *shares, f"{record['interval']['covers']:.0%}"
        )
    console.print(table)
    if calibration.host is not None:
        host = calibration.host.overhead
        launch = f"{1e6 * host.layer_s:.3g} us to launch a layer"
        if calibration.host.launch == "not measured":
            launch = "launching a layer was not measured (on a CPU it is in the operators' times)"
        console.print(
            f"host: {1e3 * host.iteration_s:.3g} ms an iteration + {1e6 * host.sequence_s:.3g} us a sequence "
            f"(held-out error {calibration.host.held_out_error:.1%}); {launch}; messages between ranks: not measured"
        )
    for warning in calibration.warnings(calibration.records):
        console.print(f"WARNING: {warning}", style="bold red")
    for kind, record in calibration.records.items():
        console.print(
            f"{store.in_words(kind)}: measured over {'; '.join(page_of(kind).range_words(calibration.models[kind]))}"
        )
        provenance = record["provenance"]
        sources = provenance["sources"]
        more = f" and {len(sources) - 3} more" if len(sources) > 3 else ""
        software = "; ".join(provenance["software"])
        console.print(f"    from {'; '.join(sources[:3])}{more} ({software})", style="dim")
        if rule := provenance.get("prefixes"):
            console.print(f"    prefixes {rule}", style="dim")


def evaluate(
    device_name: str, train: Sequence[str], test: Sequence[str], as_json: bool, select: Selection | None = None
) -> dict[str, Any]:
    """Fit to `train` (or take the calibration that ships), and print and return the errors on `test`."""
    device = catalog.device(device_name)
    if not test:
        raise InputError("no tables to test on: add --test DIR")
    if train:
        frames = [read(source, device, select) for source in train]
        calibration = calibration_fit.fit(device, frames, on_progress=lambda line: None)
    else:
        engines = [text for text in (select.software if select else ()) if not text.startswith("nccl@")]
        calibration = store.load_of(device, engines[0] if engines else None)
    tables = [read(source, device, select) for source in test]
    for note in [note for frame in tables for note in frame.attrs.get("notes", [])]:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"note: {note}", style="dim")
    operators = calibration_errors.evaluate(calibration, tables)
    result: dict[str, Any] = {"device": device.name, "operators": operators}
    if as_json:
        print(json.dumps(result))
    else:
        table = Table(box=None)
        for column in (
            "operator",
            "learned on",
            "measured on",
            "count",
            "mean error",
            "median",
            "P95",
            "bias",
            "in range",
            "90 % interval covers",
        ):
            table.add_column(column, justify="left" if column in ("operator", "learned on", "measured on") else "right")
        for kind, values in operators.items():
            shares = [f"{values[name]:+.1%}" if name == "bias" else f"{values[name]:.1%}"
                      for name in ("mape", "p50", "p95", "bias", "in_range", "covers")]  # fmt: skip
            table.add_row(
                store.in_words(kind), values["learned_on"], values["measured_on"], f"{values['count']:,}", *shares
            )
        console = Console(highlight=False, width=140, soft_wrap=True)
        console.print(table)
        for warning in calibration.warnings(operators):
            console.print(f"WARNING: {warning}", style="bold red")
    return result
