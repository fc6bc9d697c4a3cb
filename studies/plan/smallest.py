"""The smallest fleet that holds: how many replicas behind the router meet every SLO at the target rate.

found = smallest_fleet(lambda replicas: trial_of(replicas).met, likely=12, most=20)
print(found.replicas, found.too_few)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

CLOSE = 0.025  # a fleet within this share of the smallest is taken for it: 1 replica of fewer than 40
GROWTH = 1.3  # of each step to bracket it
MOST_STEPS = 24


@dataclass(frozen=True)
class Smallest:
    """`replicas` hold and `too_few` do not; None where none was seen to. Both are multiples of the step."""

    replicas: int | None
    too_few: int | None


def smallest_fleet(
    holds: Callable[[int], bool],
    likely: int,
    *,
    least: int = 1,
    most: int | None = None,
    step: int = 1,
    possible: Callable[[], bool] = lambda: True,
) -> Smallest:
    """Search the fewest replicas that hold, from a `likely` number.

    Args:
        least: fewer can't hold, whatever is simulated.
        most: more are of no interest; where these do not hold, `replicas` is None after one trial.
        step: replicas come in multiples of it.
        possible: asked once, after a fleet that did not hold: whether any would.
    """
    floor = step * max(1, ceil(least / step))
    top = None if most is None else most // step * step
    if top is not None and top < floor:
        return Smallest(None, top)
    count = max(floor, step * ceil(likely / step))
    if top is not None and count > 0.8 * top:
        count = top  # one trial says whether it is worth it
    low, high = floor - step, None  # known not to hold, to hold
    for _ in range(MOST_STEPS):
        if holds(count):
            high = count
        else:
            first, low = low < floor, count
            if count == top or (first and high is None and not possible()):
                return Smallest(None, low)
        if high is None:
            count = step * ceil(max(count * GROWTH, count + step) / step)
            count = count if top is None else min(count, top)
            continue
        if high - low <= max(step, CLOSE * high):
            break
        guess = high / GROWTH if low == floor - step and high > 2 * floor else (low + high) / 2
        count = min(max(step * round(guess / step), low + step), high - step)
    return Smallest(high, low or None)
