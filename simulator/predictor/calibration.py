"""A device's calibration: a learned estimator for each kind of operator, where it came from, how well it predicts.

It is kept as a folder of JSON files, one a kind, each with its provenance, the range it was measured over and its error
on data that was held out: readable, diffable, and the same to the last bit when it is fitted to the same tables again.

    calibration = load(Path("calibration_data/a40"), catalog.device("a40"))
    calibration.models["gemm"].seconds({"m": ..., "k": ..., "n": ...})
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.errors import InputError
from engine.specs import DeviceSpec, catalog
from engine.specs.device_folder import HOST_FILE, PROFILE_FILE, broken_host, folder_of, host_record, known_devices
from simulator.predictor.host import HostFit
from simulator.predictor.kind import KindModel
from simulator.predictor.kinds import KINDS, check_kinds

INTERVAL = 0.9  # share of the held-out measurements that a prediction interval is made to cover
NOT_KINDS = (HOST_FILE, catalog.DEVICE_FILE, PROFILE_FILE)  # files of a calibration that are of no kind of operator


@dataclass(frozen=True)
class Calibration:
    """What is known of a device. `records` holds, for each kind, its provenance and held-out errors."""

    device: str
    models: dict[str, KindModel[Any]]
    records: dict[str, dict[str, Any]]
    host: HostFit | None = None  # measured with the operators, where whole iterations were

    def interval(self, kind: str, seconds: float) -> tuple[float, float]:
        """Factors (low, high) on a predicted time of `kind` between which INTERVAL of the held-out measurements lay."""
        bands = self.records[kind]["interval"]["bands"]
        band = next((band for band in bands if seconds <= band["up_to_s"]), bands[-1])
        return band["low"], band["high"]


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
    """The calibration in `folder`. Raises InputError for a folder without one, a broken file or an unknown kind."""
    check_kinds(sorted({path.stem for path in folder.glob("*.json") if path.name not in NOT_KINDS}), str(folder))
    models: dict[str, KindModel[Any]] = {}
    records: dict[str, dict[str, Any]] = {}
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
