"""What to measure, and in which order: every operator of some models, at sizes that spread over the range of use.

The points of an operator come farthest first: whatever budget there is, what was measured spans the range and lies as
evenly in it (by the logarithms of sizes) as so many points can.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import dist, log2

from engine.specs import ModelSpec, ParallelSpec
from profiler.operators import Operator, inventory

Point = dict[str, int | str]  # the columns of `profiler.table` that say what is measured
COLLECTIVES = ("all_reduce", "send")
SHARE = {"gemm": 2.0, "attention_prefill": 4.0, "attention_decode": 4.0}  # points of a kind for each elementwise one


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How large batches are: tokens, requests, tokens of a request, and cached tokens of all of them."""

    max_tokens: int
    max_requests: int
    max_length: int
    kv_tokens: int


def points(model: ModelSpec, tensor_parallel_size: int, limits: Limits) -> Iterator[Point]:
    """The points of one rank of a model, the most informative first; no collectives."""
    operators = inventory(model, ParallelSpec(tensor_parallel_size=tensor_parallel_size), 0)
    queues = []
    for op in operators:
        if op.kind not in COLLECTIVES:
            share = SHARE.get(op.kind, 1.0)
            queues += [(place / share, point) for place, point in enumerate(_of_operator(op, limits))]
    queues.sort(key=lambda entry: entry[0])  # stable: in the inventory's order where equal
    for _, point in queues:
        yield {**point, "model": model.name, "tensor_parallel_size": tensor_parallel_size}


def message_points(model: ModelSpec, num_ranks: int, limits: Limits) -> Iterator[Point]:
    """The sizes of a model's collectives over so many ranks."""
    width = model.hidden_size * model.activation_itemsize
    for tokens in farthest_first([(size,) for size in _sizes(1, limits.max_tokens)]):
        for kind in COLLECTIVES:
            yield {"operator": kind, "kind": kind, "num_bytes": tokens[0] * width}


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


def _of_operator(op: Operator, limits: Limits) -> Iterator[Point]:
    name: Point = {"operator": op.name, "kind": op.kind}
    if op.kind in ("gemm", "elementwise"):
        most = limits.max_tokens if op.rows == "tokens" else limits.max_requests
        for (rows,) in farthest_first([(size,) for size in _sizes(1, most)]):
            if op.kind == "gemm":
                yield {**name, "m": rows, "k": op.k, "n": op.n}
            else:
                yield {**name, "rows": rows, "bytes_per_row": op.bytes_per_row}
        return
    heads: Point = {"num_heads": op.num_heads, "num_kv_heads": op.num_kv_heads, "head_dim": op.head_dim}
    longest = min(limits.max_length, op.sliding_window or limits.max_length)
    if op.kind == "attention_prefill":
        chunks = _sizes(1, min(limits.max_tokens, limits.max_length), coarse=True)
        prefixes = [0, *_sizes(16, max(16, longest - 1), coarse=True)]
        grid = [(c, p) for c in chunks for p in prefixes if c + p <= limits.max_length]
        for chunk, prefix in farthest_first(grid):
            yield {**name, "batch_size": 1, "chunk": chunk, "prefix": prefix, **heads}
    else:
        lengths = _sizes(16, max(16, longest), coarse=True)
        batches = _sizes(1, limits.max_requests, coarse=True)
        grid = [(b, length) for b in batches for length in lengths if b * length <= limits.kv_tokens]
        for batch, length in farthest_first(grid):
            yield {**name, "batch_size": batch, "kv_tokens": batch * length, **heads}


def _sizes(first: int, most: int, coarse: bool = False) -> list[int]:
    """Powers of 2 from `first` to `most`, the steps halfway between them unless coarse, and `most` itself."""
    sizes = {most}
    size = first
    while size <= most:
        sizes.add(size)
        if not coarse and size >= 2 and size * 3 // 2 <= most:
            sizes.add(size * 3 // 2)
        size *= 2
    return sorted(sizes)
