"""Reads what `windtunnel profile` measured: the folder of a finished session."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from engine.errors import InputError
from engine.specs.device_folder import profile_settings
from profiler import table
from profiler.session import OPERATORS, SAMPLES


def read(place: Path, device: str | None, network: str | None) -> pd.DataFrame:
    """The operators of a session, with `device` to check against; `network` names that of the collectives."""
    if (place / SAMPLES).is_file() and not (place / OPERATORS).is_file():
        raise InputError(f"the profile in {place} is not finished: give its 'windtunnel profile' command again")
    frame = table.read(place / OPERATORS if place.is_dir() else place)
    found = str(frame["device"].iloc[0])
    if device is not None and device != found:
        raise InputError(f"{place} was measured on {found}, not on {device}: give --device {found}, or another source")
    frame.attrs["devices"] = [found]
    if place.is_dir():
        frame.attrs["graph_decodes"] = profile_settings(place)["provenance"].get("graph_decodes", 0)
    if network is not None:
        frame["network"] = frame["network"].where(frame["network"].isna(), network)
    return frame
