"""What importers share: finding files, reading their numbers, combining repeated rows, choosing one device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from engine.errors import InputError
from engine.specs import catalog
from profiler import table

DEVICES = {name: (name,) for name in catalog.DEVICES if name != "cpu"} | {
    "a100": ("a100_pcie", "a100_sxm"), "h100": ("h100_sxm",), "h200": ("h200_sxm",)
}  # fmt: skip


class OtherDeviceError(InputError):
    """There are tables, of other devices than the one asked for."""


@dataclass
class Part:
    """The rows of one file and device, not yet validated, and what there is to say about them."""

    rows: pd.DataFrame
    devices: tuple[str, ...]  # that it may be of, the likeliest first; none: its place does not tell
    notes: list[str] = field(default_factory=list)


def find(place: Path, suffix: str, wanted: str) -> list[Path]:
    """The file itself, or all files of that suffix below a folder; InputError if there is none."""
    if place.is_file():
        return [place]
    if not place.exists():
        raise InputError(f"there is no {place}: give a folder with {wanted}, or one such file")
    if files := sorted(place.rglob(f"*{suffix}")):
        return files
    raise nothing_known(place, wanted)


def nothing_known(place: Path, wanted: str) -> InputError:
    """The error for a place without any table that the importer knows."""
    return InputError(f"{place} holds no table that is known here: looked for {wanted}")


def shorten(path: Path, anchors: Iterable[str]) -> str:
    """The part of the path that says which file of the public layout it is: from an anchor on, or its last two."""
    at = [index for index, part in enumerate(path.parts) if part in anchors]
    return "/".join(path.parts[at[-1] :] if at else path.parts[-2:])


def devices_of_path(path: Path) -> tuple[str, ...]:
    """The devices that a folder's or file's name starts with (`a40`, `a40_pairwise_nvlink`), nearest the file first."""
    for part in (path.stem, *reversed(path.parts[-4:-1])):
        for name in (part.casefold(), part.casefold().split("_")[0]):
            if name in DEVICES:
                return DEVICES[name]
    return ()


def column(frame: pd.DataFrame, name: str, path: Path) -> NDArray[np.float64]:
    """A column of a CSV file that has a number >= 0 in every row (n,); an InputError names the line that has none."""
    values = table.numbers(frame, name, str(path), "line")
    table.reject(frame, name, np.isnan(values), "is not a number: complete the row or delete it", str(path), "line")
    table.reject(frame, name, ~(np.isfinite(values) & (values >= 0)), "is not a size or a time", str(path), "line")
    return values


def combine(rows: pd.DataFrame) -> pd.DataFrame:
    """One row for rows that measure the same: their median, and the larger of their spread and that among them."""
    rows = rows.assign(spread_ms=rows.get("spread_ms", np.nan))
    keys = [name for name in table.key() if name in rows]
    same = rows.groupby(keys, dropna=False, sort=False).ngroup().to_numpy()
    groups = rows.groupby(same)
    first = rows[~pd.Series(same).duplicated().to_numpy()].reset_index(drop=True)
    spread = np.fmax(groups["spread_ms"].median().to_numpy(), groups["time_ms"].std().to_numpy())
    return first.assign(
        time_ms=groups["time_ms"].median().to_numpy(), spread_ms=spread, repeats=groups.size().to_numpy()
    )


def finish(part: Part, name: str) -> Part:
    """The part without times of 0 and with repeated rows combined; notes say how many there were of each."""
    above = part.rows["time_ms"] > 0
    rows = combine(part.rows[above])
    if dropped := int((~above).sum()):
        part.notes.append(f"{name}: {dropped} times of 0, below the resolution of the measurement, left out")
    if combined := int((rows["repeats"] > 1).sum()):
        part.notes.append(f"{name}: {combined} shapes are measured more than once: medians")
    return Part(rows, part.devices, part.notes)


def known_as(device: str) -> str:
    """The catalog's name of a device, which may have others there; one that it lacks is known by its own."""
    return catalog.device(device).name if catalog.is_name("device", device) else device


def choose_device(found: Iterable[tuple[str, ...]], device: str | None, place: Path) -> str:
    """The one device to import: `device` if it is there, else the only one found; InputError lists the choice."""
    found = set(found)
    if device is not None:
        chosen = known_as(device)
        if () in found or any(chosen in devices for devices in found):
            return chosen
        raise OtherDeviceError(
            f"{place} holds tables of {_names(found)}, none of {chosen}: name one of them as the device"
        )
    if () in found:
        raise InputError(f"the folders of {place} don't tell the device: name it (device=...)")
    if len(first := {devices[0] for devices in found}) == 1:
        return first.pop()
    raise InputError(f"{place} holds tables of {_names(found)}: choose one (device=...)")


def assemble(parts: Iterable[Part], device: str, found: Iterable[tuple[str, ...]], place: Path) -> pd.DataFrame:
    """The calibration table of all parts that may be of `device`, of those of the devices that were `found`.

    `attrs["notes"]` has the parts' notes, `attrs["devices"]` the names of the devices.
    """
    mine = [part for part in parts if not part.devices or device in part.devices]
    rows = pd.concat([part.rows for part in mine], ignore_index=True).assign(device=device)
    result = table.validate(rows, f"the import of {place}")
    notes = [note for part in mine for note in part.notes]
    if others := {name for part in mine for name in part.devices} - {device}:
        notes.append(f"taken to be of {device}; its place does not tell it from {', '.join(sorted(others))}")
    result.attrs.update(notes=notes, devices=sorted({name for devices in found for name in devices}))
    return result


def _names(found: Iterable[tuple[str, ...]]) -> str:
    return ", ".join(sorted({devices[0] for devices in found if devices}))
