"""The kinds of operators that can be predicted: an estimator for each, under the name that it has in the profiler.

    KINDS["gemm"](catalog.device("a40")).fit(rows)

To add one, write an estimator (`simulator.predictor.kind` has the bases) and enter it in KINDS.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from engine.errors import unknown
from profiler.kind import Operator
from profiler.table import HOST
from simulator.predictor.attention import AttentionDecode, AttentionPrefill
from simulator.predictor.collectives import AllReduce, Send
from simulator.predictor.elementwise import Elementwise
from simulator.predictor.exchanges import AllGather, AllToAll, ReduceScatter
from simulator.predictor.experts import Experts
from simulator.predictor.gemm import Gemm
from simulator.predictor.kind import BatchModel, DecodeModel, KindModel, PromptModel, RowsModel, SendModel

KINDS: dict[str, type[KindModel[Any]]] = {
    model.kind: model
    for model in (
        *(Gemm, Elementwise, AttentionPrefill, AttentionDecode, AllReduce, Send),
        *(Experts, AllGather, ReduceScatter, AllToAll),
    )
}


def kind_of(op: Operator) -> type[KindModel[Any]]:
    """Return the estimator of an operator of an inventory. Raises LookupError for a kind that is not in KINDS."""
    if op.kind not in KINDS:
        known = ", ".join(sorted(KINDS))
        raise LookupError(
            f"operator {op.name!r} is of kind {op.kind!r}, which simulator.predictor.kinds lacks (known: {known})"
        )
    return KINDS[op.kind]


def check_kinds(names: Iterable[str], where: str) -> None:
    """Raise InputError for a kind, of rows or files of measured data, that nothing is learned from."""
    for name in names:
        if name not in KINDS and name != HOST:
            raise unknown(f"kind of operator in {where}", name, KINDS)


@dataclass(frozen=True)
class Sorted:
    """Operators with their estimators, by what their times depend on in a batch."""

    rows: list[tuple[Any, type[RowsModel[Any]]]] = field(default_factory=list)
    prompts: list[tuple[Any, type[PromptModel[Any]]]] = field(default_factory=list)
    decodes: list[tuple[Any, type[DecodeModel[Any]]]] = field(default_factory=list)
    sends: list[tuple[Any, type[SendModel[Any]]]] = field(default_factory=list)
    batches: list[tuple[Any, type[BatchModel[Any]]]] = field(default_factory=list)

    @property
    def every(self) -> list[tuple[Any, type[KindModel[Any]]]]:
        """All operators."""
        return [*self.rows, *self.prompts, *self.decodes, *self.sends, *self.batches]


def sort_out(operators: Iterable[Operator]) -> Sorted:
    """Return the operators by what their times depend on. Raises LookupError for a kind that is not in KINDS."""
    found = Sorted()
    for op in operators:
        kind = kind_of(op)
        if issubclass(kind, RowsModel):
            found.rows.append((op, kind))
        elif issubclass(kind, PromptModel):
            found.prompts.append((op, kind))
        elif issubclass(kind, DecodeModel):
            found.decodes.append((op, kind))
        elif issubclass(kind, SendModel):
            found.sends.append((op, kind))
        elif issubclass(kind, BatchModel):
            found.batches.append((op, kind))
        else:
            raise TypeError(f"{kind.__name__} derives from none of the models of simulator.predictor.kind")
    return found
