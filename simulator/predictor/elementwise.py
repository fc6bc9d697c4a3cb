"""How long memory-bound elementwise operators take: for each a rising curve of seconds against the bytes it moves.

The curve is the launch floor for small sizes and bytes over the bandwidth that the operator attains for large ones,
with the cache in between; it is learned, not assumed.

    Elementwise(device).fit(rows).seconds({"operator": names, "rows": rows, "bytes_per_row": widths})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from engine.errors import InputError
from engine.results.tables import Array
from engine.specs import DeviceSpec
from profiler.kind import Operator as AnyOperator
from profiler.kinds import Elementwise as Operator
from simulator.predictor.curves import Curve
from simulator.predictor.kind import RowsModel, Site

if TYPE_CHECKING:
    import pandas as pd

SAME_AS = {  # operators of the same kernel, where one of them was not measured
    "attention_residual_add": "mlp_residual_add",
    "mlp_residual_add": "attention_residual_add",
    "final_norm": "input_norm",
    "post_attention_norm": "input_norm",
    "input_norm": "post_attention_norm",
    "attention_residual_norm": "mlp_residual_norm",
    "mlp_residual_norm": "attention_residual_norm",
    "qk_norm": "input_norm",
    "kv_write": "rotary_kv_write",
    "branch_add": "mlp_residual_add",
}


class Elementwise(RowsModel[Operator]):
    """A curve an operator; one that was not measured takes that of SAME_AS, or the median curve of all."""

    kind: ClassVar[str] = "elementwise"
    columns: ClassVar[tuple[str, ...]] = ("operator", "rows", "bytes_per_row")
    launch_s: ClassVar[float] = 2e-6

    @classmethod
    def groups(cls, rows: pd.DataFrame) -> pd.Series:
        """Whole models; of rows without one, whole operators."""
        return rows["model"].fillna(rows["operator"]).astype(str)

    @classmethod
    def data_sheet(cls, op: Operator, site: Site, rows: Array) -> Array:
        return np.asarray(op.count * rows * op.bytes_per_row / site.bandwidth)

    def names(self, op: AnyOperator) -> bool:
        return self.knows(op.name)

    def limits(self, operators: Sequence[Operator], site: Site) -> dict[str, int]:
        return {}  # a curve goes on in proportion to the bytes: the linear layers of the same rows say how far

    def fit(self, frame: pd.DataFrame) -> Self:
        if not len(frame):
            raise InputError("no rows of elementwise operators to learn from: give a table that has some")
        names, sizes = self._read({name: frame[name].to_numpy() for name in self.columns})
        seconds = frame["time_ms"].to_numpy(float) / 1e3
        self.curves_: dict[str, Curve] = {}
        self.range_: dict[str, list[float]] = {}
        for name in sorted(set(names.tolist())):
            mine = names == name
            self.curves_[name] = Curve.fit(sizes[mine], seconds[mine])
            self.range_[name] = [float(sizes[mine].min()), float(sizes[mine].max())]
        # the knots of the pooled curve: every octave that all are asked about, extended where some end earlier
        octaves = np.exp2(np.arange(np.floor(np.log2(sizes.min())), np.ceil(np.log2(sizes.max())) + 1))
        every = np.array([curve(octaves) for curve in self.curves_.values()])
        self.pooled_ = Curve.of(octaves, np.median(every, axis=0))
        return self

    def seconds(self, columns: Mapping[str, Array]) -> Array:
        names, sizes = self._read(columns)
        result = np.zeros(len(sizes))
        for name in set(names.tolist()):
            mine = names == name
            result[mine] = self.curve(name)(sizes[mine])
        return np.maximum(result, sizes / self.device.memory_bandwidth)

    def knows(self, operator: str) -> bool:
        """Whether an operator, or one of the same kernel, was measured."""
        return self._known(operator) in self.curves_

    def curve(self, operator: str) -> Curve:
        """The curve that an operator is predicted by."""
        return self.curves_.get(self._known(operator), self.pooled_)

    def in_range(self, columns: Mapping[str, Array]) -> Array:
        names, sizes = self._read(columns)
        within = np.zeros(len(sizes), dtype=bool)
        for name in set(names.tolist()):
            low, high = self.range_.get(self._known(name), (np.inf, -np.inf))
            mine = names == name
            within[mine] = (sizes[mine] >= low) & (sizes[mine] <= high)
        return within

    def _known(self, operator: str) -> str:
        return operator if operator in self.curves_ else SAME_AS.get(operator, operator)

    @staticmethod
    def _read(columns: Mapping[str, Array]) -> tuple[Array, Array]:
        """Names and bytes moved, (rows,) each."""
        sizes = np.asarray(columns["rows"], np.float64) * np.asarray(columns["bytes_per_row"], np.float64)
        sizes = np.atleast_1d(sizes)
        return np.broadcast_to(np.asarray(columns["operator"], dtype=object), sizes.shape), sizes

    def to_json(self) -> dict[str, Any]:
        return {
            "curves": {name: curve.to_json() for name, curve in self.curves_.items()},
            "range_bytes": self.range_,
            "pooled": self.pooled_.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], device: DeviceSpec) -> Self:
        self = cls(device)
        self.curves_ = {name: Curve.from_json(curve) for name, curve in data["curves"].items()}
        self.range_ = data["range_bytes"]
        self.pooled_ = Curve.from_json(data["pooled"])
        return self
