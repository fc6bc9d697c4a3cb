"""Reads measurements, our own and those that others published in their native form, as calibration tables.

python -c "from profiler.importers import read_source; print(read_source('vidur', 'vidur/data/profiling', 'a40'))"
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from engine.errors import unknown
from profiler.importers import aiconfigurator, profile, vidur

SOURCES: dict[str, Callable[[Path, str | None, str | None], pd.DataFrame]] = {
    "vidur": vidur.read,
    "aiconfigurator": aiconfigurator.read,
    "profile": profile.read,
}


def read_source(kind: str, folder: str | Path, device: str | None = None, network: str | None = None) -> pd.DataFrame:
    """The measurements of one device below `folder` (a repository's data, a part of them, or one file).

    `device` chooses among the devices found, or names the one of files whose place does not tell; `network` names the
    network of the collectives instead of what their place tells. `attrs["notes"]` lists what was left out, combined or
    assumed. Raises InputError if there is no such table, or what is wrong with it.
    """
    if kind not in SOURCES:
        raise unknown("source", kind, SOURCES)
    return SOURCES[kind](Path(folder).expanduser().resolve(), device, network)
