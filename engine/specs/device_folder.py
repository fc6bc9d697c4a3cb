"""What a device's folder says of it: its calibration's place, the dtype it was profiled in, its measured host overhead.

A calibration's folder may hold `profile.json` (what was profiled, where and with what) and `host.json` (the host
overhead fitted to measured iterations); `profiler.session` and `simulator.predictor.calibration` write them. The
calibrations that ship are folders of `calibration_data`, by device; one that was measured under several versions of an
engine holds a folder for each (`vllm@0.14`).

    python -c "from engine.specs import catalog, device_folder; print(device_folder.folder_of(catalog.device('a100')))"
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.documents import read_json
from engine.errors import InputError, unknown
from engine.specs import DeviceSpec, HostOverhead
from engine.specs.checks import build, short

CALIBRATIONS = Path(__file__).parents[2] / "calibration_data"
ENGINES = CALIBRATIONS / "engines"  # presets of engines, no device
PROFILE_FILE, HOST_FILE = "profile.json", "host.json"
_PROFILE_KEYS: dict[str, dict[str, tuple[type, type | None]]] = {  # that others read, and of what lists are
    "identity": {"dtype": (str, None), "models": (list, str), "shapes": (list, dict)},
    "provenance": {"device_spec": (dict, None)},
}


def known_devices() -> Mapping[str, Path]:
    """Return the devices whose calibration ships, and the folder of each."""
    folders = [path for path in sorted(CALIBRATIONS.glob("*")) if path != ENGINES]
    return {path.name: path for path in folders if any(path.glob("*.json")) or any(path.glob("*@*/*.json"))}


def folder_of(device: DeviceSpec) -> Path | None:
    """Return the folder of a device's calibration: its own, or what ships under its name; None if there is none.

    Raises InputError where it is said to be measured as a device that has none.
    """
    if device.calibration is not None:
        return Path(device.calibration)
    known = known_devices()
    if device.measured_as is not None and device.measured_as not in known:
        raise unknown("measured_as", device.measured_as, known)
    return known.get(device.measured_as or device.name)


def profile_settings(folder: Path) -> dict[str, Any]:
    """Read what a profile's session was told and where it ran: its `identity` and `provenance`.

    Raises InputError for a folder without a profile, and one that is damaged.
    """
    hint = "make one with 'windtunnel profile'"
    path = folder / PROFILE_FILE
    if not path.is_file():
        raise InputError(f"{folder} holds no profile (it has no {PROFILE_FILE}): {hint}")
    found: dict[str, Any] = read_json(path, hint)
    for part, keys in _PROFILE_KEYS.items():
        inner = found.get(part) if isinstance(found, dict) else None
        for key, (kind, of) in keys.items():
            value = inner.get(key) if isinstance(inner, dict) else None
            mixed = of is not None and isinstance(value, list) and not all(isinstance(each, of) for each in value)
            if not isinstance(value, kind) or mixed:
                raise InputError(f"{path} is no profile: its {part}.{key} is {short(value)}: {hint}")
    if len(found["identity"]["models"]) != len(found["identity"]["shapes"]):
        raise InputError(f"{path} is no profile: it has not one of the shapes for each of the models: {hint}")
    return found


def profiled_dtype(device: DeviceSpec) -> str | None:
    """Return the dtype that a device was profiled in; None where `windtunnel profile` did not profile it."""
    folder = folder_of(device)
    if folder is None or not (folder / PROFILE_FILE).is_file():
        return None
    found: str = profile_settings(folder)["identity"]["dtype"]
    return found


def host_record(folder: Path) -> dict[str, Any] | None:
    """Read `host.json`: the fitted `overhead` (a HostOverhead) and how well it fits; None where there is none.

    Raises InputError for a broken file.
    """
    path = folder / HOST_FILE
    if not path.exists():
        return None
    data = read_json(path, "fit it again")
    if not isinstance(data, dict) or "device" not in data:
        raise InputError(f"{path} is no host overhead: fit it again")
    overhead = build(HostOverhead, data.get("overhead"), f"{path}: overhead")
    return {name: value for name, value in data.items() if name != "device"} | {"overhead": overhead}


def measured_host(device: DeviceSpec) -> HostOverhead | None:
    """Return the host overhead that was measured with a device's calibration; None where none was."""
    folder = folder_of(device)
    record = host_record(folder) if folder is not None else None
    return record["overhead"] if record is not None else None
