"""What finished jobs leave in a folder, so that the same command resumes where it was stopped.

claim_folder(Path("runs/capacity"), "capacity")
cache = Cache(Path("runs/capacity/points"))
record = cache.read(name) or compute()
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.errors import InputError
from engine.results.files import write_json

MARKER = "study.json"  # says which study a folder is of


class Cache:
    """Records by name in a folder; the name has to say everything that the record depends on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def read(self, name: str) -> dict[str, Any] | None:
        """Return the record of that name; None where there is none, or a damaged one."""
        try:
            record = json.loads(self._file(name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) else None

    def write(self, name: str, record: dict[str, Any]) -> None:
        """Keep a record."""
        write_json(self._file(name), record)

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.json"


def claim_folder(folder: Path, name: str) -> None:
    """Make `folder` this study's. Raises InputError if it holds something else."""
    marker = folder / MARKER
    if folder.is_dir() and any(folder.iterdir()):
        try:
            held = json.loads(marker.read_text(encoding="utf-8"))["study"]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"output folder {folder} holds no study: give another --output-dir") from None
        if held != name:
            raise InputError(f"output folder {folder} holds the study {held}: give another --output-dir")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(marker, {"study": name})
    except OSError as error:
        raise InputError(f"can't write to {folder}: {error.strerror}: give another --output-dir") from None
