"""What a kind of operator says of itself: its work, its columns in a table, its points, and how it is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.specs import ModelSpec
from profiler.grids import Limits, Point, farthest_first, steps

Form = Literal["text", "whole", "whole from 0", "number", "number from 0"]  # what a column holds; else above 0
Rows = Literal["tokens", "sampled"]
Call = Callable[[], object]
Sequences = list[tuple[int, int]]  # (chunk, prefix) of each sequence of a batch


class Bench(Protocol):
    """What `Workbench` offers a kind to make its calls from: the engine's modules, and inputs in turns."""

    decoder: Any

    def attention_calls(self, chunks: list[int], kv_lens: list[int], decodes: int) -> list[Call]: ...
    def gemm_calls(self, name: str, rows: int) -> list[Call]: ...
    def elementwise_calls(self, name: str, rows: int) -> list[Call]: ...
    def expert_calls(self, chosen: NDArray[np.int64]) -> list[Call]: ...
    def in_turns(self, modules: Sequence[Any], run: Callable[..., object], rows: int, width: int) -> list[Call]: ...


@dataclass(frozen=True)
class Operator:
    """One operator, run `count` times an iteration. A subclass is a kind; its fields are the work of one run.

    `rows` says what the operator's rows are, for those that have any: the batch's tokens, or the rows that are sampled.
    """

    kind: ClassVar[str]
    columns: ClassVar[Mapping[str, Form]]  # of a table: those that a row of this kind can't do without
    share: ClassVar[float] = 1.0  # points for each one of an elementwise operator
    library: ClassVar[str] = "torch"  # that runs it, or the entry of a session's provenance that names it
    plans: ClassVar[bool] = False  # whether planning the attention of a batch is a part of it

    name: str
    count: int
    rows: Rows = "tokens"
    parts: tuple[Operator, ...] = ()  # what it is where it is not run as one

    # -- on one rank

    def points(self, limits: Limits) -> Iterator[Point]:
        """Yield the sizes to measure, the most informative first; none of what runs between ranks."""
        raise NotImplementedError

    @classmethod
    def calls(cls, bench: Bench, point: Point) -> list[Call]:
        """Return what to time at a point: calls to take in turns."""
        raise NotImplementedError

    def batch(self, point: Point, longest: int) -> tuple[int, Sequences]:
        """Return decodes, and every sequence, of a batch in which the operator runs at the point's size.

        A sequence has at most `longest` tokens.
        """
        raise NotImplementedError

    def size(self, point: Point) -> tuple[Any, ...]:
        """Return what tells a point from the operator's others."""
        raise NotImplementedError

    def size_in(self, tokens: int, decodes: int, sequences: Sequences) -> tuple[Any, ...] | None:
        """Return the `size` at which the operator runs in a batch; None where no point asks for that."""
        raise NotImplementedError

    # -- between ranks

    @classmethod
    def measured_between(cls, num_ranks: int) -> bool:
        """Return whether it is a message between ranks that is measured over so many."""
        return False

    @classmethod
    def message(cls, model: ModelSpec, tokens: int) -> Point:
        """Return the size of a model's message for so many tokens."""
        raise NotImplementedError


@dataclass(frozen=True)
class OfRows(Operator):
    """An operator whose time depends on the batch through one number of rows."""

    rows_column: ClassVar[str] = "rows"

    def at(self, rows: Any) -> dict[str, Any]:
        """Return the columns of a table that say what so many rows (a number or an array) are."""
        raise NotImplementedError

    def points(self, limits: Limits) -> Iterator[Point]:
        most = limits.max_tokens if self.rows == "tokens" else limits.max_requests
        for (rows,) in farthest_first([(size,) for size in steps(1, most)]):
            yield self.at(rows)

    def batch(self, point: Point, longest: int) -> tuple[int, Sequences]:
        rows = int(point[self.rows_column])
        if self.rows == "sampled":
            return rows, [(1, 0)] * rows
        whole, rest = divmod(rows, longest)
        return 0, [(longest, 0)] * whole + [(rest, 0)] * (rest > 0)

    def size(self, point: Point) -> tuple[Any, ...]:
        return (point[self.rows_column],)

    def size_in(self, tokens: int, decodes: int, sequences: Sequences) -> tuple[Any, ...] | None:
        return (tokens if self.rows == "tokens" else len(sequences),)
