"""What moves tokens between the ranks that share a layer's experts.

All-gather and reduce-scatter are half a ring all-reduce each: n - 1 steps, in each of which a rank sends one rank's
rows. An all-to-all sends each row's copies at once, over the slowest link between the ranks. Curves are learned where a
calibration's tables have such messages; none that ships does.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import numpy as np

from engine.results.tables import Array
from profiler.expert_kinds import AllGather as AllGatherOperator
from profiler.expert_kinds import AllToAll as AllToAllOperator
from profiler.expert_kinds import Exchange
from profiler.expert_kinds import ReduceScatter as ReduceScatterOperator
from simulator.predictor.collectives import Collective
from simulator.predictor.kind import RowsModel, Site

ExchangeOp = TypeVar("ExchangeOp", bound=Exchange)


class _Exchange(Collective[ExchangeOp], RowsModel[ExchangeOp]):
    """A message whose ranks are the operator's, not those of tensor parallelism."""

    @classmethod
    def data_sheet(cls, op: ExchangeOp, site: Site, rows: Array) -> Array:
        link, steps = site.network.link(0, op.span - 1), op.num_ranks - 1
        return np.asarray(op.count * steps * (link.latency_s + op.at(rows)["num_bytes"] / link.bandwidth_bytes_per_s))

    def applies(self, op: ExchangeOp, site: Site) -> bool:
        return site.network.name in self.networks_

    def times(self, op: ExchangeOp, site: Site, rows: Array) -> Array:
        nodes = -(-op.span // site.network.gpus_per_node)
        columns: dict[str, Any] = {**op.at(rows), "num_ranks": op.num_ranks, "network": site.network.name}
        columns["ranks_per_node"] = max(1, op.num_ranks // nodes)
        return np.asarray(op.count * self.seconds(self.asked(columns, len(rows), site)))

    def _moved(self, ranks: int) -> float:
        return ranks - 1.0

    def _steps(self, ranks: int) -> float:
        return ranks - 1.0


class AllGather(_Exchange[AllGatherOperator]):
    """`num_bytes` of each rank to every other."""

    kind: ClassVar[str] = "all_gather"


class ReduceScatter(_Exchange[ReduceScatterOperator]):
    """The sum of what all ranks have for a rank, `num_bytes`, to each."""

    kind: ClassVar[str] = "reduce_scatter"


class AllToAll(_Exchange[AllToAllOperator]):
    """`num_bytes` that leave each rank, for all others."""

    kind: ClassVar[str] = "all_to_all"

    @classmethod
    def data_sheet(cls, op: AllToAllOperator, site: Site, rows: Array) -> Array:
        link = site.network.link(0, op.span - 1)
        return np.asarray(op.count * (link.latency_s + op.at(rows)["num_bytes"] / link.bandwidth_bytes_per_s))

    def _moved(self, ranks: int) -> float:
        return 1.0

    def _steps(self, ranks: int) -> float:
        return 1.0
