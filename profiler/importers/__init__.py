"""Reads measurements, our own and those that others published in their native form, as calibration tables.

python -c "from profiler.importers import read_source; print(read_source('vidur', 'vidur/data/profiling', 'a40'))"
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from engine.documents import given_path
from engine.errors import unknown
from profiler.importers import aiconfigurator, profile, vidur
from profiler.importers.aiconfigurator import Selection

__all__ = ["SOURCES", "Selection", "read_source"]

SOURCES: dict[str, Callable[[Path, str | None, str | None], pd.DataFrame]] = {
    "vidur": vidur.read,
    "aiconfigurator": aiconfigurator.read,
    "profile": profile.read,
}
SELECTS = "aiconfigurator"  # the source that holds several versions of several frameworks


def read_source(
    kind: str,
    folder: str | Path,
    device: str | None = None,
    network: str | None = None,
    select: Selection | None = None,
) -> pd.DataFrame:
    """The measurements of one device below `folder` (a repository's data, a part of them, or one file).

    `device` chooses among the devices found, or names the one of files whose place does not tell; `network` names the
    network of the collectives instead of what their place tells; `select` chooses software, dtypes and window where a
    source has several. `attrs["notes"]` lists what was left out, combined or assumed, `attrs["devices"]` the devices
    that it has, or that its folders name. Raises InputError if there is no such table, or what is wrong with it.
    """
    if kind not in SOURCES:
        raise unknown("source", kind, SOURCES)
    place = given_path(folder).resolve()
    if kind == SELECTS:
        return aiconfigurator.read(place, device, network, select)
    return SOURCES[kind](place, device, network)
