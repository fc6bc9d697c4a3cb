"""What to measure, and in which order: every operator of some models, at sizes that spread over the range of use.

The points of an operator come farthest first: whatever budget there is, what was measured spans the range and lies as
evenly in it (by the logarithms of sizes) as so many points can.
"""

from __future__ import annotations

from collections.abc import Iterator

from engine.specs import ModelSpec, ParallelSpec
from profiler.grids import Limits, Point, farthest_first, steps
from profiler.kinds import KINDS, registered
from profiler.operators import inventory

__all__ = ["Limits", "Point", "farthest_first", "message_points", "points"]


def points(model: ModelSpec, tensor_parallel_size: int, limits: Limits) -> Iterator[Point]:
    """Yield the points of one rank of a model, the most informative first; none of operators between ranks."""
    queues = []
    for op in inventory(model, ParallelSpec(tensor_parallel_size=tensor_parallel_size), 0):
        registered(op)
        for place, point in enumerate(op.points(limits)):
            queues.append((place / op.share, {"operator": op.name, "kind": op.kind, **point}))
    queues.sort(key=lambda entry: entry[0])  # stable: in the inventory's order where equal
    for _, point in queues:
        yield {**point, "model": model.name, "tensor_parallel_size": tensor_parallel_size}


def message_points(model: ModelSpec, num_ranks: int, limits: Limits) -> Iterator[Point]:
    """Yield the sizes of a model's messages between so many ranks, of every kind that is measured over that many."""
    kinds = [kind for kind in KINDS.values() if kind.measured_between(num_ranks)]
    for (tokens,) in farthest_first([(size,) for size in steps(1, limits.max_tokens)]):
        for kind in kinds:
            yield {"operator": kind.kind, "kind": kind.kind, **kind.message(model, tokens)}
