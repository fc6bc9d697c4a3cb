"""How sure a result is: over other workloads and drawn errors, and which of several capacities can't be told apart.

found = drawn_capacity(lambda rate: trial_of(seed, rate), 4.2, tolerance=0.025)
print(range_of_draws(4.2, [found], 0.025))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import expm1, inf
from typing import Any

from engine.results.metrics import summary_key
from simulator.cluster import Deployment
from simulator.predictor.uncertainty import HOST_SECONDS, Z, covered, deviations, interval
from studies.capacity.search import find_capacity
from studies.capacity.trial import Trial

DRAWS = 4  # of a workload and of errors of the predicted times, by default: what they span is meant to cover 60 %
BELOW, BEYOND = 0.5, (1.1, 1.25)  # shares of the capacity at which runs to their end show latency against load
LONGER, FAR_BELOW = 4, 8.0  # times the requests, where a capacity was not seen to be sustained; how far below it
COARSE = 0.05  # as precise as the ends of a range have to be
STEPS = (1.05, 1.1, 1.25, 1.5, 2.0, inf)  # of the bracket, from a capacity that is known

LEADING = (
    *(summary_key(part, metric) for metric in ("ttft", "tpot", "tbt", "e2e") for part in ("mean", "p50", "p99")),
    "request_throughput", "output_throughput", "request_goodput",
)  # fmt: skip

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
    more = "with more requests (--num-prompts) the capacity may be lower"
    if (found := row.get("sustained_qps")) is not None:
        held = f"{found:.3g} {row.get('rate_of', 'requests')}/s hold" if found else "no rate near it holds"
        more = f"over {LONGER} times the requests {held}"
    return f"{why.removesuffix('; raise --num-prompts')}; {more}"


def alike(ranges: Sequence[Range | None], best: int) -> list[int]:
    """Return which others can't be told apart from one: their ranges overlap."""
    mine = ranges[best]
    if mine is None:
        return []
    others = ((i, each) for i, each in enumerate(ranges) if i != best and each is not None)
    return [i for i, (low, high) in others if low <= mine[1] and mine[0] <= high]


def intervals(summaries: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return low, mid and high of each leading result that every summary has."""
    values = {name: [summary.get(name) for summary in summaries] for name in LEADING}
    return {name: interval([*map(float, each)]) for name, each in values.items() if None not in each}  # type: ignore[arg-type]


def described(found: Mapping[str, Any], draws: int, errors: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return what a summary holds of ranges: them, what they are meant to cover, and the errors that were drawn."""
    return {"intervals": found, "uncertainty": {"draws": draws, "covers": covered(draws), "errors": list(errors)}}


def errors_in_words(deployment: Deployment) -> dict[str, float]:
    """Return how far each thing that is drawn may be off, as a share (90 %), the largest first; the host's as one."""
    found = deviations(deployment.replica, deployment.predictor.errors)
    hosts = [found.pop(name) for name in HOST_SECONDS if name in found]
    shares = {**found, **({"host": max(hosts)} if hosts else {})}
    return {name: round(expm1(Z * shares[name]), 4) for name in sorted(shares, key=lambda name: -shares[name])}
