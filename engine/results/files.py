"""Files that are written whole or not at all, so that an interrupted write leaves nothing that looks finished."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from engine.documents import shown
from engine.errors import InputError


def write_whole(path: Path, text: str) -> None:
    """Write a text file beside its place, then move it there."""
    unfinished = _unfinished(path)
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def check_output(path: Path, flag: str = "--output") -> None:
    """Raise InputError unless a file can be written to a path, whose folder is there: before the work that fills it."""
    unfinished = _unfinished(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        unfinished.touch()
        unfinished.unlink()
    except (OSError, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise InputError(f"can't write {shown(path)}: {why}: give another {flag}") from None


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.part") if path.name else path


def write_json(path: Path, values: Any) -> None:
    """Write values as JSON. Raises ValueError for a number that JSON does not have."""
    write_whole(path, json.dumps(values, indent=2, allow_nan=False) + "\n")
