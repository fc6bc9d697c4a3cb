"""Files that are written whole or not at all, so that an interrupted write leaves nothing that looks finished."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from engine.documents import shown
from engine.errors import InputError
from engine.results.folders import FULL, unfinished


def write_whole(path: Path, text: str) -> None:
    """Write a text file beside its place, then move it there. Raises OSError, also where a device or a pipe is."""
    _check_replaceable(path)
    part = unfinished(path)
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in FULL:  # which does not say where
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def check_output(path: Path, flag: str = "--output") -> None:
    """Raise InputError unless a file can be written to a path, whose folder is there: before the work that fills it."""
    part = unfinished(path)
    try:
        _check_replaceable(path)
        part.touch()
        part.unlink()
    except (OSError, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise InputError(f"can't write {shown(path)}: {why}: give another {flag}") from None


def _check_replaceable(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():  # moving a file there would remove a device, such as /dev/null
        raise FileExistsError(errno.EEXIST, "it is a device or a pipe", str(path))


def write_json(path: Path, values: Any) -> None:
    """Write values as JSON. Raises ValueError for a number that JSON does not have."""
    write_whole(path, json.dumps(values, indent=2, allow_nan=False) + "\n")
