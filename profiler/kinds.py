"""The kinds of operators: what each one's work is, its columns in a table, its grid of points, and how it is measured.

A kind is a class and an operator an object of it. To add one, write the class, enter it in KINDS, and have
`profiler.operators.inventory` emit it; its estimator goes by the same name in `simulator.predictor.kinds`.

    Gemm("qkv_proj", 32, k=4096, n=6144).at(512)  # {"m": 512, "k": 4096, "n": 6144}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from engine.specs import ModelSpec
from profiler.expert_kinds import AllGather, AllToAll, Experts, ReduceScatter
from profiler.grids import Limits, Point, farthest_first, steps
from profiler.kind import Bench, Call, Form, OfRows, Operator, Sequences


@dataclass(frozen=True)
class Gemm(OfRows):
    """(rows, k) x (k, n)."""

    kind: ClassVar[str] = "gemm"
    columns: ClassVar[Mapping[str, Form]] = {"m": "whole", "k": "whole", "n": "whole"}
    share: ClassVar[float] = 2.0
    rows_column: ClassVar[str] = "m"

    k: int = 0
    n: int = 0
    dtype: str | None = None  # of the weights: in engine.specs.model.QUANTIZED_BYTES; None: 16 bits, as the model's

    def at(self, rows: Any) -> dict[str, Any]:
        return {"m": rows, "k": self.k, "n": self.n}

    @classmethod
    def calls(cls, bench: Bench, point: Point) -> list[Call]:
        return bench.gemm_calls(str(point["operator"]), int(point["m"]))


@dataclass(frozen=True)
class Elementwise(OfRows):
    """Reads and writes `bytes_per_row`."""

    kind: ClassVar[str] = "elementwise"
    columns: ClassVar[Mapping[str, Form]] = {"rows": "whole", "bytes_per_row": "whole"}

    bytes_per_row: int = 0

    def at(self, rows: Any) -> dict[str, Any]:
        return {"rows": rows, "bytes_per_row": self.bytes_per_row}

    @classmethod
    def calls(cls, bench: Bench, point: Point) -> list[Call]:
        return bench.elementwise_calls(str(point["operator"]), int(point["rows"]))


HEADS: Mapping[str, Form] = {"num_heads": "whole", "num_kv_heads": "whole", "head_dim": "whole"}


@dataclass(frozen=True)
class Attention(Operator):
    """`num_heads` query and `num_kv_heads` KV heads of `head_dim` on this rank."""

    share: ClassVar[float] = 4.0
    library: ClassVar[str] = "attention_backend"
    plans: ClassVar[bool] = True

    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    sliding_window: int | None = None
    windowed_apart: bool = False  # a window of some layers only: a batch's cached tokens are counted without it

    @property
    def heads(self) -> dict[str, int]:
        """The columns of a table that say which heads these are."""
        return {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads, "head_dim": self.head_dim}

    def longest(self, limits: Limits) -> int:
        """Return the most tokens of a request that are attended to."""
        return min(limits.max_length, self.sliding_window or limits.max_length)


@dataclass(frozen=True)
class AttentionPrefill(Attention):
    """`batch_size` requests that each compute `chunk` new tokens after `prefix` cached ones."""

    kind: ClassVar[str] = "attention_prefill"
    columns: ClassVar[Mapping[str, Form]] = {
        **{"batch_size": "whole", "chunk": "whole", "prefix": "whole from 0"},
        **HEADS,
    }

    def at(self, chunk: Any, prefix: Any) -> dict[str, Any]:
        """Return the columns of a table that say what one request's chunk is."""
        return {"batch_size": 1, "chunk": chunk, "prefix": prefix, **self.heads}

    def points(self, limits: Limits) -> Iterator[Point]:
        chunks = steps(1, min(limits.max_tokens, limits.max_length), coarse=True)
        prefixes = [0, *steps(16, max(16, self.longest(limits) - 1), coarse=True)]
        grid = [(c, p) for c in chunks for p in prefixes if c + p <= limits.max_length]
        for chunk, prefix in farthest_first(grid):
            yield self.at(chunk, prefix)

    @classmethod
    def calls(cls, bench: Bench, point: Point) -> list[Call]:
        chunk = int(point["chunk"])
        return bench.attention_calls([chunk], [chunk + int(point["prefix"])], 0)

    def batch(self, point: Point, longest: int) -> tuple[int, Sequences]:
        return 0, [(int(point["chunk"]), int(point["prefix"]))]

    def size(self, point: Point) -> tuple[Any, ...]:
        return point["chunk"], point["prefix"]

    def size_in(self, tokens: int, decodes: int, sequences: Sequences) -> tuple[Any, ...] | None:
        return sequences[0] if len(sequences) == 1 else None  # no point asks for several prompts


@dataclass(frozen=True)
class AttentionDecode(Attention):
    """`batch_size` requests of one new token that attend to `kv_tokens` in all, their own included."""

    kind: ClassVar[str] = "attention_decode"
    columns: ClassVar[Mapping[str, Form]] = {"batch_size": "whole", "kv_tokens": "whole", **HEADS}

    def seen(self, batch_size: Any, kv_tokens: Any) -> Any:
        """Return how many of a batch's cached tokens these layers attend to: at most a window of each request.

        Where all layers have the window the batch counts them so already.
        """
        if not self.windowed_apart or self.sliding_window is None:
            return kv_tokens
        return np.minimum(kv_tokens, batch_size * self.sliding_window)

    def at(self, batch_size: Any, kv_tokens: Any) -> dict[str, Any]:
        """Return the columns of a table that say what so many decodes are."""
        return {"batch_size": batch_size, "kv_tokens": kv_tokens, **self.heads}

    def points(self, limits: Limits) -> Iterator[Point]:
        lengths = steps(16, max(16, self.longest(limits)), coarse=True)
        batches = steps(1, limits.max_requests, coarse=True)
        grid = [(b, length) for b in batches for length in lengths if b * length <= limits.kv_tokens]
        for batch, length in farthest_first(grid):
            yield self.at(batch, batch * length)

    @classmethod
    def calls(cls, bench: Bench, point: Point) -> list[Call]:
        batch = int(point["batch_size"])
        return bench.attention_calls([1] * batch, [int(point["kv_tokens"]) // batch] * batch, batch)

    def batch(self, point: Point, longest: int) -> tuple[int, Sequences]:
        batch, length = int(point["batch_size"]), int(point["kv_tokens"]) // int(point["batch_size"])
        return batch, [(1, length - 1)] * batch

    def size(self, point: Point) -> tuple[Any, ...]:
        return point["batch_size"], point["kv_tokens"]

    def size_in(self, tokens: int, decodes: int, sequences: Sequences) -> tuple[Any, ...] | None:
        return decodes, sum(chunk + prefix for chunk, prefix in sequences)


@dataclass(frozen=True)
class Message(OfRows):
    """A message of `bytes_per_row` a row: `num_bytes` on each of `num_ranks` ranks, `ranks_per_node` on a node."""

    columns: ClassVar[Mapping[str, Form]] = {
        **{"num_bytes": "whole", "num_ranks": "whole", "ranks_per_node": "whole", "network": "text"},
    }
    library: ClassVar[str] = "collectives"
    waits: ClassVar[bool] = False  # whether a rank that is early waits in it, so that the last one's time counts
    messages: ClassVar[int] = 1  # that one `exchange` sends one after the other

    bytes_per_row: int = 0

    def at(self, rows: Any) -> dict[str, Any]:
        return {"num_bytes": rows * self.bytes_per_row}

    def points(self, limits: Limits) -> Iterator[Point]:
        return iter(())

    @classmethod
    def message(cls, model: ModelSpec, tokens: int) -> Point:
        return {"num_bytes": tokens * model.hidden_size * model.activation_itemsize}

    @classmethod
    def exchange(cls, dist: Any, tensor: Any, rank: int) -> None:
        """Send it once between all ranks; `dist` is torch.distributed."""
        raise NotImplementedError


@dataclass(frozen=True)
class AllReduce(Message):
    """The sum over the ranks of a tensor-parallel group."""

    kind: ClassVar[str] = "all_reduce"
    waits: ClassVar[bool] = True

    @classmethod
    def measured_between(cls, num_ranks: int) -> bool:
        return True

    @classmethod
    def exchange(cls, dist: Any, tensor: Any, rank: int) -> None:
        dist.all_reduce(tensor)


@dataclass(frozen=True)
class Send(Message):
    """Activations for the next pipeline stage; timed there and back."""

    kind: ClassVar[str] = "send"
    messages: ClassVar[int] = 2

    @classmethod
    def measured_between(cls, num_ranks: int) -> bool:
        return num_ranks == 2  # a message has two ends

    @classmethod
    def exchange(cls, dist: Any, tensor: Any, rank: int) -> None:
        if rank == 0:
            dist.send(tensor, 1)
            dist.recv(tensor, 1)
        elif rank == 1:
            dist.recv(tensor, 0)
            dist.send(tensor, 0)


KINDS: dict[str, type[Operator]] = {
    each.kind: each
    for each in (
        *(Gemm, Elementwise, AttentionPrefill, AttentionDecode, AllReduce, Send),
        *(Experts, AllGather, ReduceScatter, AllToAll),
    )
}


def registered(op: Operator) -> type[Operator]:
    """Return the kind of an operator of an inventory. Raises LookupError for one that is not in KINDS."""
    if op.kind not in KINDS:
        known = ", ".join(sorted(KINDS))
        raise LookupError(f"operator {op.name!r} is of kind {op.kind!r}, which profiler.kinds lacks (known: {known})")
    return KINDS[op.kind]
