"""A rank's place in the replica, and what it says to the others: all-reduce and gather in its stage, sends between."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from engine.specs import ParallelSpec


@dataclass(frozen=True)
class Rank:
    """Rank `rank` of a replica: stage s of the pipeline is ranks s*tp .. (s+1)*tp - 1."""

    rank: int
    parallel: ParallelSpec

    @property
    def tp_size(self) -> int:
        return self.parallel.tensor_parallel_size

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp_size

    @property
    def stage(self) -> int:
        return self.rank // self.tp_size

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.parallel.pipeline_parallel_size - 1


class Links:
    """The collectives of one rank. With one rank nothing is sent and torch.distributed is not needed."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self._group: dist.ProcessGroup | None = None
        self._sending: list[tuple[dist.Work, Tensor]] = []
        if rank.tp_size > 1:
            for stage in range(rank.parallel.pipeline_parallel_size):  # every rank makes every group, in one order
                members = list(range(stage * rank.tp_size, (stage + 1) * rank.tp_size))
                group = dist.new_group(members)
                if stage == rank.stage:
                    self._group = group

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the ranks of this stage, in place."""
        if self._group is not None:
            dist.all_reduce(tensor, group=self._group)
        return tensor

    def gather_columns(self, tensor: Tensor) -> Tensor:
        """(m, n) on each rank of the stage -> (m, n * tp_size), on all of them."""
        if self._group is None:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.rank.tp_size)]
        dist.all_gather(parts, tensor.contiguous(), group=self._group)
        return torch.cat(parts, dim=-1)

    def send(self, hidden: Tensor) -> None:
        """Send `hidden` to the next stage without waiting for it to get there."""
        self._sending = [(work, kept) for work, kept in self._sending if not work.is_completed()]
        work = dist.isend(hidden, self.rank.rank + self.rank.tp_size)
        assert work is not None
        self._sending.append((work, hidden))  # a tensor must outlive its send

    def receive(self, hidden: Tensor) -> Tensor:
        """Fill `hidden` with what the previous stage sent."""
        dist.recv(hidden, self.rank.rank - self.rank.tp_size)
        return hidden
