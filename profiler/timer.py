"""How long calls take, with the device in the state in which the engine uses it.

The calls to time are a rotation, one a layer say, so that no call finds its weights in a cache that would not hold them
in a whole model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle, islice, pairwise
from typing import Protocol

import torch

from profiler.timing import Timing

Call = Callable[[], object]


class Timer(Protocol):
    """Times calls on one kind of device."""

    def measure(self, calls: Sequence[Call]) -> Timing:
        """The time of one of `calls`, taken in turns."""

    def drift(self) -> float:
        """How much longer things take now than they are timed to: 1 on a device that keeps its speed."""


class CpuTimer:
    """Wall-clock time on a processor whose speed drifts: a fixed product is timed beside every sample.

    Times are scaled to the speed of the processor at which that product takes `reference_s`.
    """

    SAMPLE_S = 200e-6  # at least this long, for the clock and the call to weigh nothing
    BUDGET_S = 0.02
    LEAST, MOST = 7, 60  # samples

    def __init__(self, reference_s: float | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self._left = torch.randn(160, 160, generator=generator)
        self._right = torch.randn(160, 160, generator=generator)
        self._reference()
        self.reference_s = reference_s or statistics.median(self._reference() for _ in range(200))

    def measure(self, calls: Sequence[Call]) -> Timing:
        with torch.inference_mode():
            rotation = cycle(calls)
            first = _elapsed(islice(rotation, len(calls))) / len(calls)
            again = _elapsed(islice(rotation, len(calls))) / len(calls)
            once = min(first, again)
            inner = max(1, int(self.SAMPLE_S / once) + 1)
            samples = max(self.LEAST, min(self.MOST, int(self.BUDGET_S / (inner * once))))
            seconds = []
            before = self._reference()
            for _ in range(samples):
                elapsed = _elapsed(islice(rotation, inner)) / inner
                after = self._reference()
                seconds.append(elapsed * 2 * self.reference_s / (before + after))
                before = after
        return _timing(seconds)

    def drift(self) -> float:
        return statistics.median(self._reference() for _ in range(20)) / self.reference_s

    def _reference(self) -> float:
        start = time.perf_counter()
        torch.mm(self._left, self._right)
        return time.perf_counter() - start


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
        with torch.inference_mode():
            rotation = cycle(calls)
            for call in islice(rotation, max(2, len(calls))):  # compiles, chooses kernels, fills pools
                call()
            torch.cuda.synchronize()
            once = max(self._run(rotation, self.LEAST))
            count = max(self.LEAST, min(self.MOST, int(self.BUDGET_S / max(once, 1e-7))))
            return _timing(self._run(rotation, count))

    def drift(self) -> float:
        return 1.0

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


def _elapsed(calls: Iterable[Call]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - start


def _timing(seconds: list[float]) -> Timing:
    return Timing(statistics.median(seconds), statistics.pstdev(seconds), len(seconds))
