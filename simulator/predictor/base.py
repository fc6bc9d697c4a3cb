"""What the simulator asks of a runtime predictor: how long a batch takes on each pipeline stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from engine.scheduling.request import BatchShape

if TYPE_CHECKING:
    from engine.specs import HostOverhead
    from simulator.predictor.uncertainty import KindError


class RuntimePredictor:
    """Base of the predictors. Override `stage_time`, and whatever else you know better.

    A predictor must give the same answer each time: the simulator asks for
    many repeats at once where it can.
    """

    #: One line for reports: where the times come from.
    description = "a user's own predictor"
    #: How far the times of each kind of operator may be off, by its name (`simulator.predictor.uncertainty`).
    errors: Mapping[str, KindError] = MappingProxyType({})

    def stage_time(self, shape: BatchShape, stage: int) -> float:
        """Seconds that a batch occupies `stage`."""
        raise NotImplementedError

    def stage_times(self, shape: BatchShape, stage: int, repeats: int) -> list[float]:
        """`stage_time` of a batch and of its next `repeats` - 1 repeats (`shape.after(1)`, ...)."""
        return [self.stage_time(shape.after(i), stage) for i in range(repeats)]

    def send_time(self, shape: BatchShape, stage: int) -> float:
        """Seconds from the end of a batch on `stage` until the next stage has its activations."""
        return 0.0

    def for_host(self, host: HostOverhead) -> RuntimePredictor:
        """Return the predictor of the same replica with another host overhead, as far as it heeds one."""
        return self

    def in_range(self, shape: BatchShape) -> bool:
        """Whether the batch lies within what the predictor was calibrated on."""
        return True


class FixedTable(RuntimePredictor):
    """Times looked up by the number of tokens in the batch; batches past the table's end take its last entry.

    Args:
        seconds: for each stage, the time of a batch of 0, 1, 2, ... tokens.
        send_seconds: time to send a batch from one stage to the next.
    """

    description = "a fixed table of times by number of tokens"

    def __init__(self, seconds: Sequence[Sequence[float]], send_seconds: float = 0.0) -> None:
        self.seconds = [list(stage) for stage in seconds]
        self.send_seconds = send_seconds

    def stage_time(self, shape: BatchShape, stage: int) -> float:
        table = self.seconds[stage]
        return table[min(shape.num_tokens, len(table) - 1)]

    def stage_times(self, shape: BatchShape, stage: int, repeats: int) -> list[float]:
        return [self.stage_time(shape, stage)] * repeats

    def send_time(self, shape: BatchShape, stage: int) -> float:
        return self.send_seconds

    def in_range(self, shape: BatchShape) -> bool:
        return shape.num_tokens < len(self.seconds[0])
