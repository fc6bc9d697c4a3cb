"""What is learned of one kind of operator on one device: the interface of the estimators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from engine.specs import DeviceSpec
from engine.tables import Array

if TYPE_CHECKING:
    import pandas as pd


class KindModel:
    """An estimator of the time of one kind of operator.

    `__init__` only stores; `fit` learns attributes that end in an underscore and returns self. Times are seconds,
    columns are those of `profiler.table` (`columns` names the ones that matter), one array entry a row.
    """

    kind: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]

    def __init__(self, device: DeviceSpec) -> None:
        self.device = device

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
