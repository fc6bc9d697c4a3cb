"""How the GPUs of a replica are connected, and the time of a message by latency and bandwidth."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import InputError
from engine.specs.checks import check_fields


@dataclass(frozen=True)
class Link:
    """A connection between GPUs: the time of a message is latency_s + bytes / bandwidth (one GPU, one direction)."""

    latency_s: float
    bandwidth_bytes_per_s: float

    def __post_init__(self) -> None:
        check_fields(self, "latency_s", zero=True)
        check_fields(self, "bandwidth_bytes_per_s")


@dataclass(frozen=True, kw_only=True)
class NetworkSpec:
    """How the GPUs of a replica are connected; ranks fill a node before the next one begins.

    `node` connects any two GPUs of a node (NVSwitch or PCIe); where `pair` is given, a bridge connects ranks 2i and
    2i+1 instead. `internode` connects GPUs of different nodes.
    """

    name: str
    description: str
    gpus_per_node: int
    node: Link
    internode: Link
    pair: Link | None = None
    switched: bool = False  # whether a node's GPUs are on one switch (NVSwitch), each at its full rate to any other
    source: str

    def __post_init__(self) -> None:
        check_fields(self, "gpus_per_node", most=1 << 16)
        if self.pair is not None and self.gpus_per_node % 2:
            raise InputError(
                f"network {self.name}: gpus_per_node={self.gpus_per_node} is odd but `pair` bridges GPUs two by two: "
                "give an even number, or no pair"
            )

    def _direct(self, a: int, b: int) -> Link:
        if a // self.gpus_per_node != b // self.gpus_per_node:
            return self.internode
        return self.pair if self.pair is not None and a // 2 == b // 2 else self.node

    def link(self, first_rank: int, last_rank: int) -> Link:
        """The slowest link between neighbours among the ranks first..last, which a ring over them waits for."""
        if not 0 <= first_rank < last_rank:
            raise InputError(f"ranks {first_rank}..{last_rank} span no link: give 0 <= first_rank < last_rank")
        links = [self._direct(rank, rank + 1) for rank in range(first_rank, last_rank)]
        return min(links, key=lambda link: (link.bandwidth_bytes_per_s, -link.latency_s))

    def allreduce_time(self, num_bytes: int, first_rank: int, num_ranks: int) -> float:
        """Seconds of a ring all-reduce of `num_bytes` on each of `num_ranks` ranks from `first_rank`; 0 for one.

        Reduce-scatter and all-gather take n-1 steps each, and every step moves bytes/n (Patarasuk & Yuan 2009):
        2(n-1)/n * bytes / bandwidth + 2(n-1) * latency.
        """
        if num_ranks == 1:
            return 0.0
        link, steps = self.link(first_rank, first_rank + num_ranks - 1), 2 * (num_ranks - 1)
        return steps * (num_bytes / num_ranks / link.bandwidth_bytes_per_s + link.latency_s)

    def send_time(self, num_bytes: int, from_rank: int, to_rank: int) -> float:
        """Seconds to send `num_bytes` from one rank to another; 0 to itself."""
        if from_rank == to_rank:
            return 0.0
        link = self._direct(from_rank, to_rank)
        return link.latency_s + num_bytes / link.bandwidth_bytes_per_s
