"""Files that are written whole or not at all, so that an interrupted write leaves nothing that looks finished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Write a text file beside its place, then move it there."""
    unfinished = path.with_name(f".{path.name}.part")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_json(path: Path, values: Any) -> None:
    """Write values as JSON. Raises ValueError for a number that JSON does not have."""
    write_whole(path, json.dumps(values, indent=2, allow_nan=False) + "\n")
