"""Grids of sizes to measure: how large batches are, sizes within that, and the order in which to take them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import dist, log2

Point = dict[str, int | float | str]  # the columns of `profiler.table` that say what is measured


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How large batches are: tokens, requests, tokens of a request, and cached tokens of all of them."""

    max_tokens: int
    max_requests: int
    max_length: int
    kv_tokens: int


def farthest_first(sizes: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """`sizes` from the largest and the smallest on, each next one the farthest (in logarithms) from all before it."""
    left = sorted(set(sizes))
    places = {size: tuple(log2(each + 1) for each in size) for size in left}
    chosen: list[tuple[int, ...]] = []
    gap = dict.fromkeys(left, float("inf"))
    while left:
        best = max(left, key=lambda size: (gap[size], places[size]))
        chosen.append(best)
        left.remove(best)
        for size in left:
            gap[size] = min(gap[size], dist(places[size], places[best]))
    return chosen


def steps(first: int, most: int, coarse: bool = False) -> list[int]:
    """Powers of 2 from `first` to `most`, the steps halfway between them unless coarse, and `most` itself."""
    sizes = {most}
    size = first
    while size <= most:
        sizes.add(size)
        if not coarse and size >= 2 and size * 3 // 2 <= most:
            sizes.add(size * 3 // 2)
        size *= 2
    return sorted(sizes)
