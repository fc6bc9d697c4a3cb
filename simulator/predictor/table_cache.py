"""Keeps the times of deployments' operators over the grids.

A cache that can't be read or written costs time, nothing else.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import zipfile
from dataclasses import fields
from pathlib import Path

import numpy as np

from engine import specs
from profiler import grids, kind, kinds, operators
from simulator.predictor.kinds import KINDS
from simulator.predictor.lookup import StageParts

_TABLES = tuple(field.name for field in fields(StageParts))


def cache_folder() -> Path:
    """Return where tables are kept."""
    return Path(os.environ.get("WINDTUNNEL_CACHE_DIR") or Path.home() / ".cache" / "windtunnel")


def code_hash() -> str:
    """Return a hash of the code that makes the tables, with that of every kind of operator, wherever it is from."""
    modules = [kind, grids, operators, specs, *(sys.modules[each.__module__] for each in _kinds())]
    files = {Path(found) for module in modules if (found := module.__file__) is not None}
    every = sorted(files | set(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in every)).hexdigest()


def _kinds() -> list[type]:
    return [*kinds.KINDS.values(), *KINDS.values()]


def read(path: Path, stages: int) -> list[StageParts] | None:
    """Return the times of the stages' operators; None where there are none that can be read."""
    try:
        with np.load(path) as data:
            return [StageParts(*(data[f"{name}{i}"] for name in _TABLES)) for i in range(stages)]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def write(path: Path, parts: list[StageParts]) -> None:
    """Keep the times of the stages' operators, if the place can be written to."""
    arrays = {f"{name}{i}": getattr(part, name) for i, part in enumerate(parts) for name in _TABLES}
    partial: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npz", delete=False) as file:
            partial = Path(file.name)
            np.savez_compressed(file, **arrays)
        partial.replace(path)
    except OSError:  # a home that can't be written to: the tables are made again next time
        if partial is not None:
            partial.unlink(missing_ok=True)
