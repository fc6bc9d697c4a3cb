"""What is known of one kind of operator: the base of the estimators, by what an operator's time depends on in a batch.

A kind derives from one of RowsModel, PromptModel, DecodeModel, SendModel and BatchModel, which say what it is asked:
`data_sheet` for the roofline, where nothing was measured, and `times` once it was fitted. Both give seconds of all runs
of an operator. Where they are tabulated, and looked up, is the same for every kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

import numpy as np

from engine.results.tables import Array
from engine.scheduling.request import BatchShape
from engine.specs import DeviceSpec, ModelSpec, NetworkSpec
from profiler.kind import OfRows, Operator
from simulator.predictor.grids import ROWS

if TYPE_CHECKING:
    import pandas as pd

Op = TypeVar("Op", bound=Operator)
RowsOp = TypeVar("RowsOp", bound=OfRows)


CLOCK_HZ = 1.98e9  # that launches are told at: they take as many cycles on every GPU


def slower_clock(device: DeviceSpec) -> float:
    """Return how much longer so many cycles take on a device than at CLOCK_HZ."""
    return CLOCK_HZ / device.clock_hz


@dataclass(frozen=True)
class Site:
    """Where an operator runs: a stage's first rank, of `model` on a device, among `tp` ranks.

    `kernel` is whose measurements of attention to take, where they are; `engine` (`vllm@0.14`) whose of collectives.
    """

    device: DeviceSpec
    network: NetworkSpec
    model: ModelSpec
    tp: int
    first_rank: int
    kernel: str | None = None
    engine: str | None = None

    @cached_property
    def width(self) -> int:
        """Bytes of an element of the activations."""
        return self.model.activation_itemsize

    @cached_property
    def weight_width(self) -> int:
        """Bytes of a weight."""
        return self.model.weight_itemsize

    @cached_property
    def kv_width(self) -> int:
        """Bytes of an element of a cached key or value."""
        return self.model.kv_cache_itemsize

    @cached_property
    def flops(self) -> float:
        """FLOP/s of matrix multiplications."""
        return self.device.peak_flops * self.device.matmul_efficiency

    @cached_property
    def attention_flops(self) -> float:
        return self.device.peak_flops * self.device.attention_efficiency

    @cached_property
    def bandwidth(self) -> float:
        """Bytes/s of memory."""
        return self.device.memory_bandwidth * self.device.bandwidth_efficiency

    @cached_property
    def ranks(self) -> dict[str, Any]:
        """The columns of a table that say over which ranks a stage's collectives go."""
        node = min(self.tp, self.network.gpus_per_node)
        return {"num_ranks": self.tp, "ranks_per_node": node, "network": self.network.name}


class KindModel(Generic[Op]):
    """An estimator of the time of one kind of operator.

    `__init__` only stores; `fit` learns attributes that end in an underscore and returns self. Times are seconds,
    columns are those of `profiler.table` (`columns` names the ones that matter), one array entry a row.
    """

    kind: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    family: ClassVar[str] = "other"  # linear, attention, communication or other, for reports
    pooled: ClassVar[bool] = False  # learned from every table given, of whichever device of the family
    launch_s: ClassVar[float] = 0.0  # of one run without any work, at CLOCK_HZ

    def __init__(self, device: DeviceSpec) -> None:
        self.device = device
        self.learned_on = device.name  # another device where its measurements are carried over to this one

    @property
    def may_fall(self) -> bool:
        """Whether more rows may take less time, because they were measured to."""
        return False

    # -- learning

    @classmethod
    def usable(cls, rows: pd.DataFrame) -> pd.DataFrame:
        """Return the rows, of those of this kind, that are times of the GPU."""
        return rows

    @classmethod
    def variant(cls, rows: pd.DataFrame) -> pd.Series:
        """Return one name a row of the population that it belongs to, each with an estimator of its own; "" mostly."""
        import pandas as pd

        return pd.Series("", rows.index)

    @classmethod
    def variant_of(cls, op: Op, site: Site) -> str:
        """Return the population, of `variant`, that an operator is predicted by."""
        return ""

    @classmethod
    def groups(cls, rows: pd.DataFrame) -> pd.Series:
        """Return one name a row; rows of a name are held out together, for else a shape stands on both sides."""
        raise NotImplementedError

    @classmethod
    def shared_shapes(cls, rows: pd.DataFrame) -> pd.Series | None:
        """Return one name a row of a shape that several `groups` may share; None where they can't.

        Errors are then also of shapes that are in no row of the fit.
        """
        return None

    def fit(self, frame: pd.DataFrame) -> Self:
        """Learn from the rows of this kind of a calibration table."""
        raise NotImplementedError

    def seconds(self, columns: Mapping[str, Array]) -> Array:
        """Predicted times, (rows,): positive, and never below what the device's peak rates allow."""
        raise NotImplementedError

    def in_range(self, columns: Mapping[str, Array]) -> Array:
        """Which rows lie within what was measured, (rows,) of truth values."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """What was learned, as plain lists, numbers and text, to be written and read again."""
        raise NotImplementedError

    @classmethod
    def from_json(cls, data: Mapping[str, Any], device: DeviceSpec) -> Self:
        """The model of `to_json`, predicting the same to the last bit."""
        raise NotImplementedError

    @classmethod
    def carried_by(cls, learned_on: DeviceSpec, device: DeviceSpec) -> DeviceSpec:
        """Return the data sheet by which what was learned on one device predicts another: the other's, mostly."""
        return device

    # -- tables beside it

    def columns_of(self, rows: pd.DataFrame) -> dict[str, Array]:
        """Return the columns that the model wants, as arrays; and each row's kernel, where it tells kernels apart."""
        return {name: rows[name].to_numpy() for name in self.columns}

    def comparable(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Return the rows, of those of this kind, that the model can predict."""
        return rows

    # -- a deployment's operators

    @classmethod
    def launch_floor(cls, op: Op, site: Site) -> float:
        """Return the seconds of one run without any work, which the roofline adds to those of its work."""
        return cls.launch_s * slower_clock(site.device) if site.device.runs_on == "cuda" else 0.0

    def names(self, op: Operator) -> bool:
        """Return whether this very operator was measured, and not only others of its kind."""
        return True

    def applies(self, op: Op, site: Site) -> bool:
        """Return whether what was measured is of such a site."""
        return True

    def asked(self, columns: Mapping[str, Any], count: int, site: Site) -> dict[str, Array]:
        """Return the model's `columns`, (count,) each; a column that is given may be one value for all rows."""
        return {name: np.broadcast_to(np.asarray(columns[name]), count) for name in self.columns}

    def limits(self, operators: Sequence[Op], site: Site) -> dict[str, int]:
        """Return the most of a batch that is within what was measured for all these: fields of `lookup.Limits`.

        What is not named is not limited.
        """
        raise NotImplementedError


class RowsModel(KindModel[RowsOp]):
    """A kind whose time depends on a number of rows: the batch's tokens, or the rows that are sampled."""

    @classmethod
    def data_sheet(cls, op: RowsOp, site: Site, rows: Array) -> Array:
        """Return seconds by the data sheet, for each number of rows."""
        raise NotImplementedError

    @classmethod
    def roofline(cls, op: RowsOp, site: Site, rows: Array) -> Array:
        """Return seconds by the data sheet, with the launches."""
        return np.asarray(cls.data_sheet(op, site, rows) + op.count * cls.launch_floor(op, site))

    def times(self, op: RowsOp, site: Site, rows: Array) -> Array:
        """Return seconds as learned, for each number of rows (from 1)."""
        columns = {"operator": op.name, **op.at(rows), **site.ranks}
        return np.asarray(op.count * self.seconds(self.asked(columns, len(rows), site)))

    def limits(self, operators: Sequence[RowsOp], site: Site) -> dict[str, int]:
        inside = np.ones(len(ROWS), dtype=bool)
        for op in operators:
            if op.rows == "tokens":
                inside &= self.in_range(self.asked({"operator": op.name, **op.at(ROWS), **site.ranks}, len(ROWS), site))
        return {"tokens": int(ROWS[inside].max()) if inside.any() else 0}


class PromptModel(KindModel[Op]):
    """A kind whose time depends on the prompts of a batch, each by its chunk and its prefix: one kernel's work.

    By the data sheet it is the sum over them and one launch. As learned it is known of equal prompts (`times`), and
    `lookup.StageTimes` puts that of unlike ones together.
    """

    @classmethod
    def data_sheet(cls, op: Op, site: Site, chunk: int, prefix: int) -> float:
        """Return seconds by the data sheet, by plain arithmetic: it is asked for every prompt of every batch."""
        raise NotImplementedError

    @classmethod
    def roofline(cls, op: Op, site: Site, chunk: int, prefix: int) -> float:
        """Return seconds by the data sheet of a batch with one prompt, with the launches."""
        return cls.data_sheet(op, site, chunk, prefix) + op.count * cls.launch_floor(op, site)

    def times(self, op: Op, site: Site, prompts: Array, chunks: Array, prefixes: Array) -> Array:
        """Return seconds as learned, (rows,), of so many prompts together, each of a chunk after a prefix."""
        raise NotImplementedError


class DecodeModel(KindModel[Op]):
    """A kind whose time depends on the number of decodes and on their cached tokens in all."""

    @classmethod
    def data_sheet(cls, op: Op, site: Site) -> tuple[float, float]:
        """Return seconds by the data sheet for each decode, and for each cached token."""
        raise NotImplementedError

    @classmethod
    def roofline(cls, op: Op, site: Site, requests: Array, kv_tokens: Array) -> Array:
        """Return seconds by the data sheet, with the launches, (rows,)."""
        per_request, per_kv_token = cls.data_sheet(op, site)
        seconds = per_request * requests + per_kv_token * cls.seen(op, requests, kv_tokens)
        return np.asarray(seconds + op.count * cls.launch_floor(op, site))

    @classmethod
    def seen(cls, op: Op, requests: Array, kv_tokens: Array) -> Array:
        """Return how many of the batch's cached tokens the operator attends to."""
        return kv_tokens

    @classmethod
    def straight(cls, op: Op) -> bool:
        """Return whether its time is a straight line in the cached tokens."""
        return True

    def times(self, op: Op, site: Site, requests: Array, kv_tokens: Array) -> Array:
        """Return seconds as learned, (rows,)."""
        raise NotImplementedError


class SendModel(KindModel[RowsOp]):
    """A kind that carries a batch's tokens to the next stage: no part of a stage's time."""

    @classmethod
    def data_sheet(cls, op: RowsOp, site: Site, tokens: int) -> float:
        """Return seconds by the data sheet."""
        raise NotImplementedError

    @classmethod
    def roofline(cls, op: RowsOp, site: Site, tokens: int) -> float:
        """Return seconds by the data sheet, with the launches."""
        return cls.data_sheet(op, site, tokens) + op.count * cls.launch_floor(op, site)

    def times(self, op: RowsOp, site: Site, tokens: Array) -> Array:
        """Return seconds as learned, for each number of tokens (from 1)."""
        raise NotImplementedError


class BatchModel(KindModel[Op]):
    """A kind whose time is of the whole batch: asked for each one, not tabulated. Batches are then stepped singly."""

    @classmethod
    def data_sheet(cls, op: Op, site: Site, shape: BatchShape) -> float:
        """Return seconds by the data sheet; 0 where the operator has nothing to do in the batch."""
        raise NotImplementedError

    @classmethod
    def roofline(cls, op: Op, site: Site, shape: BatchShape) -> float:
        """Return seconds by the data sheet, with the launches where there is anything to do."""
        seconds = cls.data_sheet(op, site, shape)
        return seconds + op.count * cls.launch_floor(op, site) if seconds else 0.0

    def times(self, op: Op, site: Site, shape: BatchShape) -> float:
        """Return seconds as learned; 0 where the operator has nothing to do in the batch."""
        raise NotImplementedError
