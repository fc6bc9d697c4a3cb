"""What came of timing something."""

from __future__ import annotations

from typing import NamedTuple


class Timing(NamedTuple):
    """The median of `repeats` measurements, and their standard deviation."""

    seconds: float
    spread_s: float
    repeats: int
