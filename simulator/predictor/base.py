"""What the simulator asks of a runtime predictor: how long a batch takes on each pipeline stage."""

from __future__ import annotations

from collections.abc import Sequence

from engine.request import Batch


class RuntimePredictor:
    """Base of the predictors. Override `stage_time`, and whatever else you know better.

    A predictor depends on the batch's numbers alone and must give the same answer each time: the simulator asks for
    many repeats at once where it can.
    """

    #: One line for reports: where the times come from.
    description = "a user's own predictor"

    def stage_time(self, batch: Batch, stage: int, decode_kv_tokens: int) -> float:
        """Seconds that `batch` occupies `stage`, when its decodes attend to `decode_kv_tokens` tokens in all."""
        raise NotImplementedError

    def stage_times(self, batch: Batch, stage: int, repeats: int) -> Sequence[float]:
        """`stage_time` of the batch's next `repeats` runs, whose decodes attend to more and more tokens."""
        first, growth = batch.decode_kv_tokens, batch.decode_kv_growth
        return [self.stage_time(batch, stage, first + i * growth) for i in range(repeats)]

    def send_time(self, batch: Batch, stage: int) -> float:
        """Seconds from the end of `batch` on `stage` until the next stage has its activations."""
        return 0.0

    def in_range(self, batch: Batch) -> bool:
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

    def stage_time(self, batch: Batch, stage: int, decode_kv_tokens: int) -> float:
        table = self.seconds[stage]
        return table[min(batch.num_tokens, len(table) - 1)]

    def send_time(self, batch: Batch, stage: int) -> float:
        return self.send_seconds

    def in_range(self, batch: Batch) -> bool:
        return batch.num_tokens < len(self.seconds[0])
