"""A device's calibration: a learned estimator for each kind of operator, where it came from, how well it predicts.

It is kept as a folder of JSON files, one a kind (`gemm.json`), or a population of a kind (`gemm.fp8.json`), each with
its provenance, the range it was measured over and its error on data that was held out: readable, diffable, and the same
to the last bit when it is fitted to the same tables again. A device that was measured under several versions of an
engine has such a folder for each (`h100_sxm/vllm@0.14`); what one version lacks is taken from the nearest other.

    calibration = load(Path("calibration_data/a40"), catalog.device("a40"))
    calibration.models["gemm"].seconds({"m": ..., "k": ..., "n": ...})
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engine.documents import read_json
from engine.errors import InputError
from engine.results.files import write_whole
from engine.specs import DeviceSpec, catalog
from engine.specs.checks import version_numbers
from engine.specs.device_folder import HOST_FILE, PROFILE_FILE, folder_of, host_record, known_devices
from simulator.predictor.host import HostFit
from simulator.predictor.kind import KindModel
from simulator.predictor.kinds import KINDS, check_kinds

try:
    from simulator.predictor.calibration_file import check_file, check_host
except ModuleNotFoundError:  # pydantic, which a GPU node may lack: there a calibration is read that was made there

    def check_file(kind: str, data: Any, where: str) -> None:
        """Raise InputError unless a file has its parts; what is in them is not checked."""
        parts = ("provenance", "held_out", "interval", "model")
        whole = isinstance(data, dict) and {"device", "learned_on"} <= set(data)
        if not whole or not all(isinstance(data.get(name), dict) for name in parts):
            raise InputError(f"{where} is no calibration: fit it again")

    def check_host(data: Any, where: str) -> None:
        """Check nothing: the overhead itself is checked where it is read."""


POOR = 0.2  # mean held-out error above which a fit is not to be relied on
INTERVAL = 0.9  # share of the held-out measurements that a prediction interval is made to cover
NOT_KINDS = (HOST_FILE, catalog.DEVICE_FILE, PROFILE_FILE)  # files of a calibration that are of no kind of operator


@dataclass(frozen=True)
class Calibration:
    """What is known of a device, by kind and population (`named`). `records` holds provenance and held-out errors.

    `software` says which version's folder each is from, where a device has several.
    """

    device: str
    models: dict[str, KindModel[Any]]
    records: dict[str, dict[str, Any]]
    host: HostFit | None = None  # measured with the operators, where whole iterations were
    software: Mapping[str, str] = field(default_factory=dict)

    def learned_on(self, name: str) -> str:
        """Return the device that an estimator was learned on."""
        return self.models[name].learned_on

    def software_of(self, names: Iterable[str]) -> str:
        """Return the engine versions of estimators in words; "" where the device has one calibration."""
        of: dict[str, list[str]] = {}
        for name in names:
            if name in self.software:
                of.setdefault(self.software[name], []).append(name)
        most = sorted(of, key=lambda each: (-len(of[each]), each))
        others = [f"{', '.join(in_words(name) for name in of[each])} of {each}" for each in most[1:]]
        return f"{most[0]}{f' ({chr(59).join(others)})' if others else ''}" if most else ""

    def warnings(self, names: Iterable[str]) -> list[str]:
        """Return what is wrong with estimators: poor fits, and measurements that are doubtful themselves."""
        found = []
        for name in names:
            record = self.records.get(name, {})
            if (error := record.get("held_out", {}).get("mape", 0.0)) > POOR:
                found.append(f"POOR FIT: {in_words(name)} is off by {error:.0%} on data that was held out")
            if doubt := record.get("provenance", {}).get("doubtful"):
                found.append(f"DOUBTFUL: {in_words(name)}: {doubt}")
        return found

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
    write_whole(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def named(kind: str, variant: str) -> str:
    """Return the name of an estimator among `Calibration.models`: of a kind, or of a population of it."""
    return f"{kind}.{variant}" if variant else kind


def kind_name(name: str) -> str:
    """Return the kind that an estimator is of."""
    return name.partition(".")[0]


def in_words(name: str) -> str:
    """Return the name of an estimator for people: "attention decode (fp8 KV cache)"."""
    kind, _, variant = name.partition(".")
    variant = {"kv_fp8": "fp8 KV cache"}.get(variant, variant)
    return f"{kind.replace('_', ' ')}{f' ({variant})' if variant else ''}"


def load(folder: Path, device: DeviceSpec, software: str | None = None) -> Calibration:
    """The calibration in `folder`, of an engine's version (`vllm@0.14`) where there are several.

    The nearest version is taken, of None the latest; what it lacks comes from the next nearest. Raises InputError for a
    folder without a calibration, a broken file or an unknown kind.
    """
    models: dict[str, KindModel[Any]] = {}
    records: dict[str, dict[str, Any]] = {}
    origin: dict[str, str] = {}
    for place in [folder, *by_nearness(folder, software)]:
        paths = [path for path in sorted(place.glob("*.json")) if path.name not in NOT_KINDS]
        check_kinds(sorted({kind_name(path.stem) for path in paths}), str(place))
        order = {kind: i for i, kind in enumerate(KINDS)}
        for path in sorted(paths, key=lambda each: (order[kind_name(each.stem)], each.stem)):
            if path.stem in models:
                continue
            models[path.stem], records[path.stem] = _load_kind(path, device)
            if place != folder:
                origin[path.stem] = place.name
    if not models:
        raise InputError(
            f"{folder} holds no calibration: fit one with 'windtunnel calibrate fit --device {device.name}'"
        )
    order = {kind: i for i, kind in enumerate(KINDS)}
    names = sorted(models, key=lambda name: (order[kind_name(name)], name))
    every = {name: models[name] for name in names}, {name: records[name] for name in names}
    return Calibration(device.name, *every, _load_host(folder), origin)


def _load_kind(path: Path, device: DeviceSpec) -> tuple[KindModel[Any], dict[str, Any]]:
    hint = "fit it again"
    try:
        data = read_json(path, hint)
    except InputError as error:
        raise InputError(f"{path} is no calibration ({str(error).removesuffix(f': {hint}')}): {hint}") from None
    check_file(kind_name(path.stem), data, str(path))
    kind, where = KINDS[kind_name(path.stem)], catalog.DEVICES.get(str(data["learned_on"]))
    sheet = kind.carried_by(where, device) if where is not None and where.name != device.name else device
    try:
        model = kind.from_json(data.pop("model"), sheet)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:  # of a kind that a plugin brings
        raise InputError(f"{path} is no calibration ({type(error).__name__}: {error}): {hint}") from None
    model.learned_on = data["learned_on"]
    if data["device"] not in (device.name, device.measured_as):
        raise InputError(f"{path} is of {data['device']}, not of {device.name}: fit it for this device")
    return model, {name: value for name, value in data.items() if name not in ("device", "kind")}


def by_nearness(folder: Path, software: str | None) -> list[Path]:
    """The folders of engine versions in a device's folder, the one to take first.

    Versions of the engine asked for come first, of them the one asked for, then older ones before newer by distance;
    None asks for the latest.
    """
    found = [path for path in folder.iterdir() if path.is_dir() and "@" in path.name] if folder.is_dir() else []
    engine, _, version = (software or "").partition("@")
    wanted = version_numbers(version)

    def rank(path: Path) -> tuple[Any, ...]:
        own, _, number = path.name.partition("@")
        mine = version_numbers(number)
        newest = tuple(-part for part in mine)
        if own != engine or not wanted:
            return (1, False, 0, newest, own)
        distance = (abs(mine[0] - wanted[0]) * 1000 + abs((*mine, 0)[1] - (*wanted, 0)[1])) if mine else 0
        return (0, mine > wanted and distance > 0, distance, newest, own)

    return sorted(found, key=rank)


def load_of(device: DeviceSpec, software: str | None = None) -> Calibration:
    """The calibration of a device: its own, or what ships under its name. InputError if there is none."""
    folder = folder_of(device)
    if folder is None:
        known = ", ".join(known_devices()) or "none yet"
        raise InputError(
            f"no calibration for device {device.name!r} (there are: {known}): give a calibration's folder, or fit one "
            "with 'windtunnel calibrate fit'"
        )
    return load(folder, device, software)


def _load_host(folder: Path) -> HostFit | None:
    record = host_record(folder)
    if record is None:
        return None
    check_host({name: value for name, value in record.items() if name != "overhead"}, str(folder / HOST_FILE))
    return HostFit(**record)


def fingerprint(folder: Path) -> str:
    """A hash of the contents of a calibration's files."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.json")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
