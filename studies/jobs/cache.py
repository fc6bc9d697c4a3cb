"""What finished jobs leave in a folder, so that the same command resumes where it was stopped.

with claimed(Path("runs/capacity"), "capacity"):
    cache = Cache(Path("runs/capacity/points"))
    record = cache.kept(name, compute)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.documents import read_json
from engine.errors import InputError
from engine.results.files import write_json
from engine.results.folders import owned, remove_unfinished

MARKER = "study.json"  # says which study a folder is of


class Cache:
    """Records by name in a folder; the name has to say everything that the record depends on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def read(self, name: str) -> dict[str, Any] | None:
        """Return the record of that name; None where there is none, or a damaged one."""
        try:
            record = read_json(self._file(name), "")
        except InputError:
            return None
        return record if isinstance(record, dict) else None

    def write(self, name: str, record: dict[str, Any]) -> None:
        """Keep a record."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_json(self._file(name), record)

    def kept(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the record of that name, as JSON has it; make and keep it where there is none."""
        if (found := self.read(name)) is None:
            found = json.loads(json.dumps(make()))
            self.write(name, found)
        return found

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.json"


@contextmanager
def claimed(folder: Path, name: str) -> Iterator[None]:
    """Own a folder for a study. Raises InputError if it holds something else, or another process is at it."""
    marker = folder / MARKER
    with owned(folder, ours=(MARKER,)):
        if any(folder.iterdir()):
            try:
                held = read_json(marker, "")["study"]
            except (InputError, KeyError, TypeError):
                raise InputError(f"output folder {folder} holds no study: give another --output-dir") from None
            if held != name:
                raise InputError(f"output folder {folder} holds the study {held}: give another --output-dir")
        else:
            write_json(marker, {"study": name})
        remove_unfinished(folder)
        yield
