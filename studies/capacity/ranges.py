"""How sure a capacity is: over workloads of other seeds, and which of several capacities can't be told apart.

found = over_seeds(lambda seed, rate: trial_of(seed, rate), 4.2, seeds=3, tolerance=0.025)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import inf
from typing import Any

from studies.capacity.search import find_capacity
from studies.capacity.trial import Trial

BELOW, BEYOND = 0.5, (1.1, 1.25)  # shares of the capacity at which runs to their end show latency against load
COARSE = 0.05  # as precise as the ends of a range have to be
STEPS = (1.05, 1.1, 1.25, 1.5, 2.0, inf)  # of the bracket, from a capacity that is known

Range = tuple[float, float]


def over_seeds(
    run: Callable[[int, float], Trial], capacity: float, seeds: int, tolerance: float, arrivals_per_request: float = 1.0
) -> dict[str, float]:
    """Return low, mid and high of the capacity over `seeds` workloads.

    `run` makes the trial at a rate of a workload whose seed is that much higher; `capacity` is the first one's. As a
    capacity is known to the tolerance, the highest is that much above what was met.
    """
    coarse = max(tolerance, COARSE)
    low, high = [capacity], [capacity * (1 + tolerance)]
    for seed in range(1, seeds):
        found = find_capacity(partial(run, seed), capacity, coarse, STEPS, arrivals_per_request).qps
        low.append(found)
        high.append(found * (1 + coarse))
    return {"low": min(low), "mid": capacity, "high": max(high)}


def curve_shares(capacity: float, known: Sequence[float]) -> list[float]:
    """Return the shares of the capacity to simulate to their end, beside the rates where that is known."""
    low = [] if any(0.25 < rate / capacity < 0.75 for rate in known) else [BELOW]
    return [*low, *BEYOND]


def range_of(row: Mapping[str, Any], key: str = "max_qps_under_slo") -> Range | None:
    """Return lowest and highest of a result of a search; None where no range is known."""
    found = (row.get("intervals") or {}).get(key)
    return None if not found else (float(found["low"]), float(found["high"]))


def ranges_in_words(row: Mapping[str, Any]) -> str:
    """Return what the ranges of a search are over; "" where it has none."""
    if drawn := row.get("uncertainty"):
        return f"{100 * drawn['covers']:.0f} % of {drawn['draws']} draws of seeds and predictor errors"
    return f"{row['seeds']} seeds" if row.get("intervals") else ""


def alike(ranges: Sequence[Range | None], best: int) -> list[int]:
    """Return which others can't be told apart from one: their ranges overlap."""
    mine = ranges[best]
    if mine is None:
        return []
    return [
        i
        for i, each in enumerate(ranges)
        if i != best and each is not None and each[0] <= mine[1] and mine[0] <= each[1]
    ]
