"""How sure a capacity is: over other workloads and drawn errors, and which of several capacities can't be told apart.

found = drawn_capacity(lambda rate: trial_of(seed, rate), 4.2, tolerance=0.025)
print(range_of_draws(4.2, [found], 0.025))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Any

from simulator.predictor.uncertainty import interval
from studies.capacity.search import find_capacity
from studies.capacity.trial import Trial

DRAWS = 4  # of a workload and of errors of the predicted times, by default: what they span is meant to cover 60 %
BELOW, BEYOND = 0.5, (1.1, 1.25)  # shares of the capacity at which runs to their end show latency against load
LONGER, FAR_BELOW = 4, 8.0  # times the requests, where a capacity was not seen to be sustained; how far below it
COARSE = 0.05  # as precise as the ends of a range have to be
STEPS = (1.05, 1.1, 1.25, 1.5, 2.0, inf)  # of the bracket, from a capacity that is known

Range = tuple[float, float]


def drawn_capacity(
    run: Callable[[float], Trial], start: float, tolerance: float, arrivals_per_request: float = 1.0
) -> float:
    """Return the capacity of a draw (arrivals/s), searched from the rate `start`: `run` makes its trial at a rate."""
    return find_capacity(run, start, max(tolerance, COARSE), STEPS, arrivals_per_request).qps


def range_of_draws(capacity: float, drawn: Sequence[float], tolerance: float) -> dict[str, float]:
    """Return low, mid and high of a capacity, of which that of each draw is known; mid is the capacity itself.

    As a capacity is known to its tolerance, the high end is that much above what was met.
    """
    coarse = max(tolerance, COARSE)
    low = interval(drawn)["low"] if drawn else capacity
    high = interval([value * (1 + coarse) for value in drawn])["high"] if drawn else 0.0
    return {"low": min(low, capacity), "mid": capacity, "high": max(high, capacity * (1 + tolerance))}


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
        return f"{drawn['draws']} draws of seeds and predictor errors, {100 * drawn['covers']:.0f} % range"
    return f"{row['seeds']} seeds" if row.get("intervals") else ""


def sustained_in_words(row: Mapping[str, Any]) -> str:
    """Return why a capacity may not hold for more requests, and what was seen of those; "" of one that is sustained."""
    if not (why := row.get("unsteady")):
        return ""
    found = row.get("sustained_qps")
    if found is None:
        more = "with more requests (--num-prompts) the capacity may be lower"
    elif found:
        more = f"over {LONGER} times the requests {found:.3g} {row.get('rate_of', 'requests')}/s hold"
    else:
        more = f"over {LONGER} times the requests no rate near it holds"
    return f"{why.removesuffix('; raise --num-prompts')}; {more}"


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
