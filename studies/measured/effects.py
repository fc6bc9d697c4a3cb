"""What assumptions matter: some of the points predicted again with other plausible values.

A source lists values that its rows might have had instead (`alternatives`). A closed loop of fixed lengths locks into
patterns that sub-millisecond delays set, so its TTFT is predicted with several of those, too, and reported as a spread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine.workload.workload import WorkloadSpec
from studies.measured.point import LATENCIES, Point
from studies.measured.sources import Alternative, source

MOST = 4  # points of a source that are predicted again, for each alternative
DELAYS_S = (0.0002, 0.0005, 0.001)  # that a client takes between an answer and the next request
LOCK_IN = "a client that takes 0.2, 0.5 or 1 ms to send the next request"


@dataclass(frozen=True)
class Variant:
    """A point as it might have been instead, and the number of the point that it is of."""

    instead: str
    number: int
    point: Point


def variants(points: Sequence[Point], given: Mapping[str, Any]) -> list[Variant]:
    """Return what to predict again: of each source at most MOST points, from the cheaper ones, evenly chosen."""
    found = []
    for name in dict.fromkeys(point.source for point in points if point.source):
        mine = sorted((i for i, point in enumerate(points) if point.source == name), key=lambda i: _cost(points[i]))
        mine = mine[: max(1, len(mine) * 3 // 4)]
        chosen = [mine[i * len(mine) // min(MOST, len(mine))] for i in range(min(MOST, len(mine)))]
        for number in chosen:
            point = points[number]
            for alternative in source(name).alternatives:
                if (other := _changed(point, alternative, given)) is not None:
                    found.append(Variant(alternative.instead, number, other))
            if isinstance(point.workload, WorkloadSpec) and point.workload.max_concurrency:
                for delay in DELAYS_S:
                    workload = replace(point.workload, client_overhead_s=delay)
                    found.append(Variant(LOCK_IN, number, replace(point, workload=workload)))
    return found


def effects(
    tried: Sequence[Variant], before: Mapping[int, Mapping[str, Any]], after: Sequence[Mapping[str, Any] | None]
) -> list[dict[str, Any]]:
    """Return how predictions change: of each alternative the mean change, as a share, or of a lock-in the spread.

    `before` has the prediction of each point by its number, `after` that of each variant, None where it can't be run.
    """
    found = []
    for instead in dict.fromkeys(variant.instead for variant in tried):
        pairs = [
            (variant.number, result)
            for variant, result in zip(tried, after, strict=True)
            if variant.instead == instead and result is not None and variant.number in before
        ]
        if not pairs:
            continue
        spread, changes = instead == LOCK_IN, dict[str, float]()
        for measure in LATENCIES:
            ratios: dict[int, list[float]] = {}
            for number, result in pairs:
                if measure in result and measure in before[number]:
                    ratios.setdefault(number, []).append(result[measure] / before[number][measure] - 1)
            if ratios:
                spans = [max(0.0, *each) - min(0.0, *each) if spread else each[0] for each in ratios.values()]
                changes[measure] = float(np.mean(spans))
        points = len({number for number, _ in pairs})
        found.append({"instead": instead, "points": points, "spread": spread, **changes})
    return found


def _changed(point: Point, alternative: Alternative, given: Mapping[str, Any]) -> Point | None:
    """The point under an alternative; None where it was asked for otherwise, or changes nothing."""
    if any(name in given or point.settings.get(name) == value for name, value in alternative.settings.items()):
        return None
    other = replace(point, settings={**point.settings, **alternative.settings})
    spec = point.workload
    if not isinstance(spec, WorkloadSpec) or not spec.max_concurrency:
        return other if alternative.settings else None
    if alternative.requests_per_user is not None:
        other = replace(other, workload=replace(spec, num_prompts=alternative.requests_per_user * spec.max_concurrency))
    if alternative.first_wave_left_out:
        other = replace(other, warmup_requests=spec.max_concurrency)
    return other


def _cost(point: Point) -> float:
    """Requests times their length: what a simulation takes goes with it."""
    spec = point.workload
    if not isinstance(spec, WorkloadSpec):
        return float(len(spec))
    return float(spec.num_prompts or 0) * (point.output_tokens or 1)
