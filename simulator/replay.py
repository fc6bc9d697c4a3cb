"""A run once more in simulated time, with the durations that were measured: does the simulator form the same batches?

deployment = replace(deployment, predictor=Measured(iterations, stages=1))
simulate(workload, [deployment], repeats=False)
"""

from __future__ import annotations

from collections import deque

from engine.results.tables import Columns
from engine.scheduling.request import BatchShape
from simulator.predictor.base import RuntimePredictor


class Measured(RuntimePredictor):
    """The durations of a run of one replica, batch after batch; to be asked once for each, so not for repeats.

    Args:
        iterations: the columns stage, start_s and duration_s of its `iterations.parquet`.
    """

    description = "measured durations, replayed"

    def __init__(self, iterations: Columns, stages: int) -> None:
        starts, durations = [], []
        for stage in range(stages):
            mine = iterations["stage"] == stage
            starts.append(iterations["start_s"][mine])
            durations.append(iterations["duration_s"][mine])
        self._durations = [deque(each.tolist()) for each in durations]
        self._sends = [
            deque((starts[stage + 1] - starts[stage] - durations[stage]).tolist()) for stage in range(stages - 1)
        ]

    def stage_time(self, shape: BatchShape, stage: int) -> float:
        if not self._durations[stage]:
            raise RuntimeError("the replay forms more batches than were measured: it is not the same run")
        return float(self._durations[stage].popleft())

    def send_time(self, shape: BatchShape, stage: int) -> float:
        return float(self._sends[stage].popleft()) if stage < len(self._sends) else 0.0
