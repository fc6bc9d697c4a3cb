"""An engine whose steps take as long as a predictor says: its driver's loop without workers.

    driver = Driver(scheduler, PredictedExecutor(predictor, num_blocks=1000, clock=clock), recorder, clock=clock)

With a VirtualClock a run takes no time and gives what the simulator's replica gives; with a RealClock it takes as long
as the real one would, to stand in for an engine.
"""

from __future__ import annotations

from collections import deque
from math import inf

from engine.runtime.driver import Clock, RealClock
from engine.runtime.executor import RankTime, Result, StageTime, Step
from engine.scheduling.request import BatchShape
from simulator.predictor.base import RuntimePredictor


class PredictedExecutor:
    """Ranks of one replica, one a pipeline stage, that only take time.

    Args:
        num_blocks: KV blocks that it says it has.
        sliding_window: tokens that the model's attention looks back, if it is bounded.
        token: what every sampled token is.
    """

    attention_backend = "predicted"

    def __init__(
        self,
        predictor: RuntimePredictor,
        num_blocks: int,
        num_stages: int = 1,
        sliding_window: int | None = None,
        clock: Clock | None = None,
        token: int = 0,
    ) -> None:
        self.predictor = predictor
        self.num_blocks = num_blocks
        self.hardware = predictor.description
        self._clock = clock or RealClock()
        self._window = sliding_window
        self._token = token
        self._free = [0.0] * num_stages  # end of the newest step on each stage
        self._results: deque[tuple[float, Result]] = deque()  # and when each is due

    @property
    def due(self) -> float:
        """When the oldest step in flight ends (s of the clock); infinity without one."""
        return self._results[0][0] if self._results else inf

    def launch(self, step: Step) -> None:
        shape = shape_of(step, self._window)
        time, stages = step.launched_at, []
        for stage, free in enumerate(self._free):
            start = max(time, free)
            duration = self.predictor.stage_times(shape, stage, 1)[0]
            stages.append(StageTime(start, duration))
            self._free[stage] = end = start + duration
            time = end + self.predictor.send_time(shape, stage)
        times = [RankTime(stage, start, start + duration) for stage, (start, duration) in enumerate(stages)]
        in_range = self.predictor.in_range(shape)
        result = Result(step.number, [self._token] * len(step.sampled), times, stages=stages, in_range=in_range)
        self._results.append((end, result))

    def wait(self, timeout: float | None) -> Result | None:
        due, result = self._results[0]
        if timeout is not None and due > (until := self._clock.now() + timeout):
            self._clock.sleep_until(until)
            return None
        self._clock.sleep_until(due)
        self._results.popleft()
        return result

    def close(self) -> None:
        self._results.clear()


def shape_of(step: Step, sliding_window: int | None = None) -> BatchShape:
    """What a predictor sees of a step."""
    window = sliding_window or 1 << 62
    count = step.num_decodes
    starts, chunks = step.starts.tolist(), step.chunks.tolist()
    return BatchShape(
        num_tokens=len(step.tokens),
        num_decodes=count,
        decode_kv_tokens=sum(min(start + 1, window) for start in starts[:count]),
        prefills=tuple(zip(chunks[count:], starts[count:], strict=True)),
        num_sampled=len(step.sampled),
        decode_kv_growth=sum(start + 1 < window for start in starts[:count]),
    )
