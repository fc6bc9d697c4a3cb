"""How long a GPU takes for calls.

The calls to time are a rotation, one a layer say, so that no call finds its weights in a cache that would not hold them
in a whole model.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice, pairwise
from math import ceil

import torch

from profiler.timing import Timing

Call = Callable[[], object]


class CudaTimer:
    """A GPU's own time between events, with the launches queued ahead so that it never waits for the host.

    Short calls are timed several at a time, as an event takes the GPU a microsecond or two itself.
    """

    LEAD_S = 100e-6  # of sleep on the GPU for each launch that is queued behind it
    GROUP_S = 100e-6  # between two events at least
    BUDGET_S = 0.05
    LEAST, MOST = 8, 64  # groups
    WARM_UP_CYCLES = 400_000_000  # 0.2 s at 2 GHz: an idle GPU's clock is low, and takes tens of ms to rise

    def __init__(self) -> None:
        start, end = self._event(), self._event()
        torch.cuda._sleep(self.WARM_UP_CYCLES)
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
            once = max(statistics.median(self._run(rotation, self.LEAST, 1)), 1e-7)
            group = min(self.MOST, ceil(self.GROUP_S / once))
            count = max(self.LEAST, min(self.MOST, int(self.BUDGET_S / (max(once, self.LEAD_S) * group))))
            return _timing(self._run(rotation, count, group))

    def _run(self, rotation: Iterator[Call], count: int, group: int) -> list[float]:
        """Seconds of a call in each of `count` groups."""
        events = [self._event() for _ in range(count + 1)]
        torch.cuda._sleep(int(self.LEAD_S * count * group * self._cycles_per_s))
        events[0].record()
        for event in events[1:]:
            for call in islice(rotation, group):
                call()
            event.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 / group for start, end in pairwise(events)]

    @staticmethod
    def _event() -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)


def _timing(seconds: list[float]) -> Timing:
    return Timing(statistics.median(seconds), statistics.pstdev(seconds), len(seconds))
