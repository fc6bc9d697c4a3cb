"""How long a GPU takes for calls.

The calls to time are a rotation, one a layer say, so that no call finds its weights in a cache that would not hold them
in a whole model.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice, pairwise

import torch

from profiler.timing import Timing

Call = Callable[[], object]


class CudaTimer:
    """A GPU's own time between events, with the launches queued ahead so that it never waits for the host."""

    LEAD_S = 100e-6  # of sleep on the GPU for each launch that is queued behind it
    BUDGET_S = 0.05
    LEAST, MOST = 8, 64

    def __init__(self) -> None:
        start, end = self._event(), self._event()
        torch.cuda._sleep(1_000_000)
        start.record()
        torch.cuda._sleep(10_000_000)
        end.record()
        torch.cuda.synchronize()
        self._cycles_per_s = 10_000_000 / (start.elapsed_time(end) / 1e3)

    def measure(self, calls: Sequence[Call]) -> Timing:
        """The time of one of `calls`, taken in turns."""
        with torch.inference_mode():
            rotation = cycle(calls)
            for call in islice(rotation, max(2, len(calls))):  # compiles, chooses kernels, fills pools
                call()
            torch.cuda.synchronize()
            once = max(self._run(rotation, self.LEAST))
            count = max(self.LEAST, min(self.MOST, int(self.BUDGET_S / max(once, 1e-7))))
            return _timing(self._run(rotation, count))

    def _run(self, rotation: Iterator[Call], count: int) -> list[float]:
        """Seconds of each of `count` calls."""
        events = [self._event() for _ in range(count + 1)]
        torch.cuda._sleep(int(self.LEAD_S * count * self._cycles_per_s))
        events[0].record()
        for event, call in zip(events[1:], rotation, strict=False):
            call()
            event.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairwise(events)]

    @staticmethod
    def _event() -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)


def _timing(seconds: list[float]) -> Timing:
    return Timing(statistics.median(seconds), statistics.pstdev(seconds), len(seconds))
