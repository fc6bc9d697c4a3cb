"""How long collectives take: a rising curve of seconds against bytes for each layout that was measured.

A layout is a network, a number of ranks and how many of them share a node. Other rank counts come from the measured
ones by the ring's formula (Patarasuk & Yuan 2009), in which each rank moves 2(n-1)/n of the message. Eager rows of
vLLM's own all-reduce are left out: there the host's launch is in the time.

    AllReduce(device).fit(rows).seconds({"num_bytes": sizes, "num_ranks": 4, "ranks_per_node": 4, "network": "pcie"})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self, TypeVar

import numpy as np

from engine.errors import InputError, unknown
from engine.results.tables import Array
from engine.specs import DeviceSpec
from profiler.kind import OfRows
from profiler.kinds import AllReduce as AllReduceOperator
from profiler.kinds import Send as SendOperator
from simulator.predictor.curves import Curve
from simulator.predictor.kind import KindModel, RowsModel, SendModel, Site

if TYPE_CHECKING:
    import pandas as pd

HOST_BOUND = ("vllm_eager",)  # backends whose times contain the host's launch
KNOTS_PER_OCTAVE = 4


# On a switch: seconds to launch, and by the logarithm of the ranks; bytes on the bus; a mean of both in between. Fitted
# to ai-dynamo/aiconfigurator's tables of A100, H100 and H200 by benchmarks/cold_start.py, which reports the errors.
SWITCHED = {"vllm_graph": (3.724e-6, 3.825e-7, 1.055, 0.9553), "nccl": (1.851e-6, 4.549e-6, 0.997, 1.097)}


# What vLLM calls by the message's size (distributed/device_communicators/all_reduce_utils.py): its own kernel below
# OWN_UP_TO bytes by the number of ranks, PyTorch's symmetric memory with multicast below MULTICAST_UP_TO, else NCCL.
MIB = 1 << 20
HOPPER = "nvswitch_h100"
OWN_UP_TO = {2: 64 * MIB, 4: 32 * MIB, 6: MIB // 2, 8: MIB // 4}  # on HOPPER
OWN_UP_TO_ELSEWHERE = 8 * MIB
MULTICAST_UP_TO = {6: 64 * MIB, 8: 64 * MIB}  # on HOPPER
# Seconds, and seconds a byte: a line through the times of 0.5 to 64 MiB on 8 H100s that vLLM's pull request 42324
# publishes (symm_mem_multimem; within 5 % of each). None of our tables has this kernel.
MULTICAST = (8.6e-6, 4.64e-12)


def on_a_switch(num_bytes: Array, ranks: Any, rate: float, constants: tuple[float, ...]) -> Array:
    """Seconds (rows,) of an all-reduce among ranks that reach each other at `rate` bytes/s; 0 for one rank."""
    base, by_ranks, traffic, mixed = constants
    launch, moved = base + by_ranks * np.log2(ranks), 2 * (ranks - 1) / ranks * num_bytes / rate
    return np.where(ranks > 1, launch + traffic * moved + mixed * np.sqrt(launch * moved), 0.0)


class Layout(NamedTuple):
    """What a curve is of; `ranks_per_node` below `num_ranks` spans nodes."""

    network: str
    num_ranks: int
    ranks_per_node: int

    @property
    def spans(self) -> bool:
        return self.ranks_per_node < self.num_ranks


MessageOp = TypeVar("MessageOp", bound=OfRows)


class Collective(KindModel[MessageOp]):
    """Curves by kernel (the table's `backend`) and layout.

    Args:
        device: what the ranks are.
        kernel: whose times to predict, one of `kernels_`; None takes the one with most measurements on the network.
            nccl is what an engine calls by default, vllm_graph vLLM's own kernels up to 8 MiB in a CUDA graph.
    """

    columns: ClassVar[tuple[str, ...]] = ("num_bytes", "num_ranks", "ranks_per_node", "network")
    family: ClassVar[str] = "communication"

    def __init__(self, device: DeviceSpec, kernel: str | None = None) -> None:
        super().__init__(device)
        self.kernel = kernel

    @classmethod
    def usable(cls, rows: pd.DataFrame) -> pd.DataFrame:
        """Without collectives that were launched eagerly: those times are mostly the host's."""
        return rows[~rows["backend"].isin(HOST_BOUND)]

    @classmethod
    def groups(cls, rows: pd.DataFrame) -> pd.Series:
        """Message sizes."""
        return rows["num_bytes"].astype(str) + " bytes"

    def columns_of(self, rows: pd.DataFrame) -> dict[str, Array]:
        columns = super().columns_of(rows)
        kernels = rows["backend"].fillna("").to_numpy(str)
        if np.isin(kernels, self.kernels_).all():
            columns["kernel"] = kernels
        return columns

    def comparable(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Those of networks that were measured."""
        return rows[rows["network"].isin(self.networks_)]

    def limits(self, operators: Sequence[MessageOp], site: Site) -> dict[str, int]:
        return {}  # a curve goes on in proportion to the bytes

    def fit(self, frame: pd.DataFrame) -> Self:
        backends = frame["backend"].astype("string").fillna("unnamed") if "backend" in frame else None
        kernels = np.full(len(frame), "unnamed") if backends is None else backends.to_numpy(str)
        used = ~np.isin(kernels, HOST_BOUND)
        if not used.any():
            raise InputError(f"no rows of {self.kind} to learn from: give some that are not eager")
        sizes, layouts, _ = _read({name: frame[name].to_numpy() for name in self.columns})
        seconds = frame["time_ms"].to_numpy(float) / 1e3
        self.curves_: dict[str, dict[Layout, Curve]] = {}
        self.rows_: dict[str, dict[str, int]] = {}
        self.range_: dict[str, dict[Layout, list[float]]] = {}
        for kernel in sorted(set(kernels[used].tolist())):
            curves, limits, counts = {}, {}, dict[str, int]()
            of_kernel = kernels == kernel
            for number, layout in enumerate(layouts.every):
                mine = of_kernel & (layouts.number == number)
                if mine.any():
                    curves[layout] = Curve.fit(sizes[mine], seconds[mine], knots_per_octave=KNOTS_PER_OCTAVE)
                    limits[layout] = [float(sizes[mine].min()), float(sizes[mine].max())]
                    counts[layout.network] = counts.get(layout.network, 0) + int(mine.sum())
            self.curves_[kernel], self.range_[kernel], self.rows_[kernel] = curves, limits, counts
        return self

    @property
    def kernels_(self) -> list[str]:
        """The kernels that were measured."""
        return list(self.curves_)

    def _networks_of(self, kernel: str) -> set[str]:
        return {layout.network for layout in self.curves_.get(kernel, {})}

    @property
    def networks_(self) -> list[str]:
        """The networks that were measured; `seconds` raises InputError for any other."""
        return sorted({layout.network for curves in self.curves_.values() for layout in curves})

    def seconds(self, columns: Mapping[str, Array]) -> Array:
        """Predicted times, (rows,); 0 for one rank. A column "kernel" takes the place of `kernel`."""
        sizes, layouts, kernels = _read(columns)
        result = np.zeros(len(sizes))
        for number, layout in enumerate(layouts.every):
            for kernel in {None} if kernels is None else set(kernels.tolist()):
                mine = layouts.number == number
                if kernel is not None:
                    mine &= kernels == kernel
                if layout.num_ranks > 1 and mine.any():
                    result[mine] = self._seconds(layout, self._chosen(layout.network, kernel), sizes[mine])
        return result

    def _chosen(self, network: str, kernel: str | None) -> str:
        if network not in self.networks_:
            raise unknown(f"network of measured {self.kind}", network, self.networks_)
        kernel = kernel or self.kernel
        if kernel is None:
            return max(self.rows_, key=lambda name: self.rows_[name].get(network, 0))
        if not self.rows_.get(kernel, {}).get(network):
            known = [name for name, rows in self.rows_.items() if network in rows]
            raise unknown(f"{self.kind} kernel on {network}", kernel, known)
        return kernel

    def _seconds(self, layout: Layout, kernel: str, sizes: Array) -> Array:
        curves = self.curves_[kernel]
        if layout in curves:
            return curves[layout].of_messages(sizes)
        known = [other for other in curves if other.network == layout.network]
        alike = [other for other in known if other.spans == layout.spans] or known
        alike.sort(key=lambda other: other.num_ranks)
        below = [other for other in alike if other.num_ranks <= layout.num_ranks]
        above = [other for other in alike if other.num_ranks > layout.num_ranks]
        if below and above and below[-1].num_ranks < layout.num_ranks:
            few, many = below[-1], above[0]
            share = np.log(layout.num_ranks / few.num_ranks) / np.log(many.num_ranks / few.num_ranks)
            low, high = (np.log(self._carried(curves, one, layout, sizes)) for one in (few, many))
            return np.asarray(np.exp(low + share * (high - low)))
        return self._carried(curves, below[-1] if below else above[0], layout, sizes)

    def _carried(self, curves: dict[Layout, Curve], measured: Layout, layout: Layout, sizes: Array) -> Array:
        """The times of a layout by those of another with the same links."""
        curve, moved, steps = curves[measured], self._moved, self._steps
        latency = curve.seconds[0]
        same_load = curve.of_messages(sizes * moved(layout.num_ranks) / moved(measured.num_ranks)) - latency
        return np.asarray(latency * steps(layout.num_ranks) / steps(measured.num_ranks) + same_load)

    def _moved(self, ranks: int) -> float:
        """Share of the message that each rank sends."""
        raise NotImplementedError

    def _steps(self, ranks: int) -> float:
        """Messages one after another, which a small message's time grows with."""
        raise NotImplementedError

    def in_range(self, columns: Mapping[str, Array]) -> Array:
        sizes, layouts, _ = _read(columns)
        within = np.zeros(len(sizes), dtype=bool)
        for number, layout in enumerate(layouts.every):
            if layout.network not in self.networks_:
                continue
            limits = self.range_[self._chosen(layout.network, None)].get(layout)
            if limits is not None:
                mine = layouts.number == number
                within[mine] = (sizes[mine] >= limits[0]) & (sizes[mine] <= limits[1])
        return within

    def to_json(self) -> dict[str, Any]:
        curves = [
            {
                "kernel": kernel,
                **layout._asdict(),
                "range_bytes": self.range_[kernel][layout],
                **curve.to_json(),
            }
            for kernel, layouts in self.curves_.items()
            for layout, curve in layouts.items()
        ]
        return {"kernel": self.kernel, "rows": self.rows_, "curves": curves}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], device: DeviceSpec) -> Self:
        self = cls(device, data["kernel"])
        self.rows_ = data["rows"]
        self.curves_, self.range_ = {kernel: {} for kernel in self.rows_}, {kernel: {} for kernel in self.rows_}
        for item in data["curves"]:
            layout = Layout(*(item[name] for name in Layout._fields))
            self.curves_[item["kernel"]][layout] = Curve.from_json(item)
            self.range_[item["kernel"]][layout] = item["range_bytes"]
        return self


class AllReduce(Collective[AllReduceOperator], RowsModel[AllReduceOperator]):
    """All-reduce of `num_bytes` on each of `num_ranks` ranks.

    Among rank counts that were measured the logarithms of the times are interpolated, beyond them bytes follow the ring
    and the latency of small messages the depth of a tree, which NCCL prefers for them.
    """

    kind: ClassVar[str] = "all_reduce"

    @property
    def may_fall(self) -> bool:
        """Where vLLM goes over to multicast: its own kernel takes longer just below than that just above."""
        return HOPPER in self.networks_

    @classmethod
    def data_sheet(cls, op: AllReduceOperator, site: Site, rows: Array) -> Array:
        if site.network.switched and site.tp <= site.network.gpus_per_node:
            own = "vllm_graph" if (site.engine or "").startswith("vllm") else "nccl"
            rate = site.network.node.bandwidth_bytes_per_s
            return np.asarray(op.count * on_a_switch(rows * op.bytes_per_row, site.tp, rate, SWITCHED[own]))
        latency = site.network.allreduce_time(0, site.first_rank, site.tp)
        per_row = site.network.allreduce_time(op.bytes_per_row, site.first_rank, site.tp) - latency
        return np.asarray(op.count * (latency + rows * per_row))

    def asked(self, columns: Mapping[str, Any], count: int, site: Site) -> dict[str, Array]:
        """The columns, and the kernel that the engine calls for each size where its own was measured."""
        asked = super().asked(columns, count, site)
        own = f"{(site.engine or '').partition('@')[0]}_graph"
        if site.network.name not in self._networks_of(own):
            return asked
        most = OWN_UP_TO.get(site.tp, 0) if site.network.name == HOPPER else OWN_UP_TO_ELSEWHERE
        other = "nccl" if site.network.name in self._networks_of("nccl") else own
        return asked | {"kernel": np.where(asked["num_bytes"] < most, own, other)}

    def times(self, op: AllReduceOperator, site: Site, rows: Array) -> Array:
        """As learned, but for sizes that vLLM leaves to symmetric memory, which the tables lack."""
        seconds, sizes = super().times(op, site, rows), np.asarray(rows) * op.bytes_per_row
        if not (site.engine or "").startswith("vllm") or site.network.name != HOPPER:
            return seconds
        multicast = (sizes >= OWN_UP_TO.get(site.tp, 0)) & (sizes < MULTICAST_UP_TO.get(site.tp, 0))
        return np.where(multicast, op.count * (MULTICAST[0] + MULTICAST[1] * sizes), seconds)

    def applies(self, op: AllReduceOperator, site: Site) -> bool:
        """Only over links like those that were measured."""
        return site.network.name in self.networks_ and site.tp <= site.network.gpus_per_node

    def _moved(self, ranks: int) -> float:
        return 2 * (ranks - 1) / ranks

    def _steps(self, ranks: int) -> float:
        return float(np.log2(ranks))


class Send(Collective[SendOperator], SendModel[SendOperator]):
    """A message of `num_bytes` from one rank to another, on the same node where `ranks_per_node` is 2."""

    kind: ClassVar[str] = "send"

    @classmethod
    def data_sheet(cls, op: SendOperator, site: Site, tokens: int) -> float:
        last = site.first_rank + site.tp
        return op.count * site.network.send_time(tokens * op.bytes_per_row, site.first_rank, last)

    def applies(self, op: SendOperator, site: Site) -> bool:
        return site.network.name in self.networks_

    def times(self, op: SendOperator, site: Site, tokens: Array) -> Array:
        spans = (site.first_rank + site.tp) % site.network.gpus_per_node == 0  # the next stage begins on another node
        ends = {"num_ranks": 2, "ranks_per_node": 1 if spans else 2, "network": site.network.name}
        return np.asarray(op.count * self.seconds(self.asked({**op.at(tokens), **ends}, len(tokens), site)))

    def _moved(self, ranks: int) -> float:
        return 1.0

    def _steps(self, ranks: int) -> float:
        return 1.0


class _Layouts(NamedTuple):
    every: list[Layout]
    number: Array  # (rows,): which of them a row has


def _read(columns: Mapping[str, Array]) -> tuple[Array, _Layouts, Array | None]:
    """Bytes (rows,), layouts, and the kernels asked for if any."""
    sizes = np.atleast_1d(np.asarray(columns["num_bytes"], np.float64))
    names = [np.broadcast_to(np.asarray(columns[name], dtype=object), sizes.shape) for name in Layout._fields]
    rows = [Layout(str(network), int(ranks), int(node)) for network, ranks, node in zip(*names, strict=True)]
    every = sorted(set(rows))
    place = {layout: number for number, layout in enumerate(every)}
    kernels = None
    if "kernel" in columns:
        kernels = np.broadcast_to(np.asarray(columns["kernel"], dtype=object), sizes.shape)
    return sizes, _Layouts(every, np.array([place[layout] for layout in rows], dtype=int)), kernels
