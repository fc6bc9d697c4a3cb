"""Keeps the tables of deployments: a cache that can't be read or written costs time, nothing else."""

from __future__ import annotations

import hashlib
import os
import tempfile
import zipfile
from dataclasses import fields
from functools import cache
from pathlib import Path

import numpy as np

from engine import specs
from profiler import kinds, operators
from simulator.predictor import lookup
from simulator.predictor.lookup import StageTables

_TABLES = tuple(field.name for field in fields(StageTables))


def cache_folder() -> Path:
    """Return where tables are kept."""
    return Path(os.environ.get("WINDTUNNEL_CACHE_DIR") or Path.home() / ".cache" / "windtunnel")


@cache
def code_hash() -> str:
    """A hash of the code that makes the tables."""
    own, *others = (Path(module.__file__ or "") for module in (lookup, kinds, operators, specs))
    files = [*sorted(own.parent.glob("*.py")), *others]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


def read(path: Path, stages: int) -> list[StageTables] | None:
    """Return the tables of the stages; None where there are none that can be read."""
    try:
        with np.load(path) as data:
            return [StageTables(*(data[f"{name}{i}"] for name in _TABLES)) for i in range(stages)]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def write(path: Path, tables: list[StageTables]) -> None:
    """Keep the tables of the stages, if the place can be written to."""
    arrays = {f"{name}{i}": getattr(table, name) for i, table in enumerate(tables) for name in _TABLES}
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
