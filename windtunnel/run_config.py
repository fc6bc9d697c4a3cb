"""The `config.yaml` of a run: its settings with everything that was left open filled in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from engine import engine_preset
from engine.documents import given_path
from engine.errors import InputError
from engine.replica_spec import ReplicaSpec
from engine.specs import catalog
from engine.workload.workload import DEFAULT_LENGTHS
from windtunnel.settings import FileConfig, underscored

_FILES: dict[str, str | tuple[str, ...]] = {  # settings that may be files, which are by their endings
    "trace": "",
    "tokenizer": "",
    "workload": ".json",
    "engine": engine_preset.FILES,
}


def resolved(config: FileConfig, kinds: list[ReplicaSpec], num_prompts: int) -> dict[str, Any]:
    """Return the settings with defaults filled in and files by their full path, so that they run again anywhere."""
    values = config.model_dump(mode="json")
    values["num_prompts"] = num_prompts
    if config.trace is None:
        values["workload"] = config.workload or DEFAULT_LENGTHS
    if config.replicas:
        del values["num_replicas"]
        values["replicas"] = [
            full_paths(underscored(group) | {key: value for key, value in kind.settings().items() if value is not None})
            for group, kind in zip(config.replicas, kinds, strict=True)
        ]
    else:
        (kind,) = kinds
        values |= kind.settings()
    values["plugin"] = [str(path.resolve()) for path in config.plugin]
    return {key: value for key, value in full_paths(values).items() if value not in (None, "", [])}


def hashes(values: Iterable[Any]) -> dict[str, str]:
    """Return hashes of the files that settings name, by their paths; of a folder those of its JSON files."""
    found = {}
    for value in values:
        try:
            path = given_path(str(value))
            for file in sorted(path.glob("*.json")) if path.is_dir() else [path] if path.is_file() else []:
                found[str(file)] = hashlib.sha256(file.read_bytes()).hexdigest()
        except (OSError, InputError):  # it is no path
            continue
    return found


def full_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with each file by its full path; a known name is no file, whatever this folder holds."""
    full = dict(settings)
    for key in ("model", "device", "network"):
        if full.get(key) and not catalog.is_name(key, full[key]):
            full[key] = str(given_path(full[key]).resolve())
    for key, endings in _FILES.items():
        if full.get(key) and str(full[key]).endswith(endings):
            full[key] = str(given_path(full[key]).resolve())
    return full
