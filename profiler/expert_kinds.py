"""The kinds of operators that a mixture of experts adds: the experts of a layer, and what moves tokens between ranks.

A rank has `local_experts` of a layer's experts, each of `width` neurons: its share under expert or tensor parallelism.
What its batch's rows are sent to is shared by the `replicas` ranks of attention data parallelism, each with a batch of
its own that is taken to be as large: the experts see `replicas` times the rows. `windtunnel profile` measures a rank
with all experts, or a share of each one's width; what moves tokens between ranks is not measured by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from profiler.expert_load import deal, loads
from profiler.grids import Limits, Point
from profiler.kind import Bench, Call, Form, OfRows

EXPERT_COLUMNS: Mapping[str, Form] = {
    **{"hidden_size": "whole", "expert_width": "whole", "local_experts": "whole"},
    **{"num_experts": "whole", "top_k": "whole", "expert_load": "text"},
}


@dataclass(frozen=True)
class Experts(OfRows):
    """All that a layer's experts do with the tokens of a batch, routed already: sort, up, activation, down, sum."""

    kind: ClassVar[str] = "moe"
    columns: ClassVar[Mapping[str, Form]] = {"expert_tokens": "whole", **EXPERT_COLUMNS}
    rows_column: ClassVar[str] = "expert_tokens"
    library: ClassVar[str] = "experts"

    hidden: int = 0
    width: int = 0
    local_experts: int = 0
    num_experts: int = 0
    top_k: int = 0
    matrices: int = 3  # of an expert: gate, up and down, or up and down
    replicas: int = 1
    load: str = "balanced"
    dtype: str = "bfloat16"  # of the weights: of 16 bits, or a format of engine.specs.model.QUANTIZED_BYTES

    def at(self, rows: Any) -> dict[str, Any]:
        return {
            "expert_tokens": rows * self.replicas,
            "hidden_size": self.hidden,
            "expert_width": self.width,
            "local_experts": self.local_experts,
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "expert_load": self.load,
            "dtype": self.dtype,
        }

    @classmethod
    def calls(cls, bench: Bench, point: Point) -> list[Call]:
        tokens, num_experts, top_k = (int(point[name]) for name in ("expert_tokens", "num_experts", "top_k"))
        spread = loads(str(point["expert_load"]), tokens, num_experts, top_k, 1)
        return bench.expert_calls(deal(spread, tokens, top_k))


@dataclass(frozen=True)
class Exchange(OfRows):
    """A message between the `num_ranks` ranks that share a layer's experts; `span` ranks lie from first to last.

    Each rank gives, or gets, `bytes_per_row` a row of its own batch.
    """

    columns: ClassVar[Mapping[str, Form]] = {
        **{"num_bytes": "whole", "num_ranks": "whole", "ranks_per_node": "whole", "network": "text"},
    }
    rows_column: ClassVar[str] = "num_bytes"
    library: ClassVar[str] = "collectives"

    bytes_per_row: int = 0
    num_ranks: int = 1
    span: int = 1

    def at(self, rows: Any) -> dict[str, Any]:
        return {"num_bytes": rows * self.bytes_per_row}

    def points(self, limits: Limits) -> Iterator[Point]:
        return iter(())


@dataclass(frozen=True)
class AllGather(Exchange):
    """Every rank's rows to every rank: `num_bytes` from each."""

    kind: ClassVar[str] = "all_gather"


@dataclass(frozen=True)
class ReduceScatter(Exchange):
    """The sum over the ranks of all rows, to each rank its own: `num_bytes` to each."""

    kind: ClassVar[str] = "reduce_scatter"


@dataclass(frozen=True)
class AllToAll(Exchange):
    """Every rank's rows to the ranks that have their experts, or back: `num_bytes` leave each.

    Of each row `copies` leave its rank.
    """

    kind: ClassVar[str] = "all_to_all"

    copies: float = 1.0

    def at(self, rows: Any) -> dict[str, Any]:
        return {"num_bytes": rows * self.bytes_per_row * self.copies}
