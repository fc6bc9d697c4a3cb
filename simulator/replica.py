"""One replica in simulated time: the engine's scheduler in front of a pipeline of stages.

A batch passes the stages in order. A stage takes one batch at a time, in the order they arrive, and a batch reaches the
next stage when the stage before is done and its activations are sent (the sending stage goes on meanwhile). So a batch
starts on a stage at max(its arrival there, the end of the batch before it).

With asynchronous scheduling a batch is formed when the one before begins (as vLLM V1 does): two are in flight, one of
them computed, and what arrives during a batch misses the next one too.

Fast-forward: while nothing comes in, the batches in flight mostly repeat themselves, each with one more token per
request. `Batch.repeats` says how often that is certain. The replica works out all those completions at once, sleeps
until the last of them, and commits them together; an arrival cuts this short where its batch could first be formed.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from heapq import heappush
from itertools import accumulate
from math import inf, nan
from typing import Any

import simpy
from simpy.events import NORMAL, EventPriority

from engine.results.recorder import Recorder
from engine.scheduling.request import Batch, BatchShape, Request
from engine.scheduling.scheduler import Scheduler
from simulator.predictor.base import RuntimePredictor

MOST_REPEATS = 256  # repeats worked out at once


class Clock(simpy.Environment):
    """SimPy's environment with events at absolute times, which a delay would round."""

    def at(self, time: float, priority: EventPriority = NORMAL) -> simpy.Event:
        """An event at `time`. At equal times URGENT ones (arrivals) come before NORMAL ones (completions)."""
        event = simpy.Event(self)
        event._ok, event._value = True, None
        heappush(self._queue, (time, priority, next(self._eid), event))
        return event

    def again(self, event: simpy.Event, time: float, callbacks: list[Callable[[simpy.Event], Any]]) -> None:
        """Let `event`, which is happening, happen once more at `time`: another one would take longer to make."""
        event.callbacks = callbacks
        heappush(self._queue, (time, NORMAL, next(self._eid), event))


class _Flight:
    """A batch in flight: its coming completions and, for each stage, when it starts there and for how long."""

    __slots__ = (
        "batch",
        "durations",
        "ends",
        "in_range",
        "kv_blocks",
        "max_tbt",
        "num_running",
        "num_waiting",
        "starts",
    )

    def __init__(self, batch: Batch, in_range: bool, num_running: int, num_waiting: int) -> None:
        self.batch = batch
        self.in_range = in_range
        self.kv_blocks = batch.kv_blocks
        self.num_running = num_running
        self.num_waiting = num_waiting
        self.max_tbt: list[float] = []
        self.ends: list[float] = []
        self.starts: list[list[float]] = []
        self.durations: list[list[float]] = []


class Replica:
    """A replica and its life in the simulation.

    Args:
        on_finished: called with the requests that got their last token by a batch, if there are any.
        repeats: False single-steps every batch (the reference that fast-forwarding is tested against).
    """

    def __init__(
        self,
        env: Clock,
        index: int,
        scheduler: Scheduler,
        predictor: RuntimePredictor,
        recorder: Recorder,
        on_finished: Callable[[Sequence[Request]], None],
        repeats: bool = True,
    ) -> None:
        self.env = env
        self.index = index
        self.scheduler = scheduler
        self.predictor = predictor
        self.recorder = recorder
        self.on_finished = on_finished
        self.repeats = repeats
        self.async_scheduling = scheduler.async_scheduling
        self._reach = MOST_REPEATS  # repeats to work out: about twice as many as it came to last time
        self.num_stages = scheduler.num_stages
        self.outstanding_requests = 0
        self.busy_s = [0.0] * self.num_stages  # time that each stage has worked
        self.occupied_s = 0.0  # time with at least one request here
        self._occupied_since = 0.0
        self._tokens_in = 0  # of every request that came
        self._tokens_here = 0  # of those that are here, once they are finished
        self._tokens_done = 0
        self._stage_free = [0.0] * self.num_stages
        self._flights: list[_Flight] = []  # the next to complete first
        self._completions: list[float] = []  # that are planned; number j is of flight j % len(flights)
        self._last = 0  # number of the last completion that is planned
        self._num_running = self._num_waiting = self._kv_blocks = 0  # when these were planned
        self._next: simpy.Event | None = None  # what it sleeps until
        self._callbacks: list[Callable[[simpy.Event], Any]] = [self._wake]
        self._launching = False  # it sleeps until all have arrived that arrive now, not until the last completion

    # -- from outside ----------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """A request arrives, now."""
        self.scheduler.add(request)
        if not self.outstanding_requests:
            self._occupied_since = self.env.now
        self.outstanding_requests += 1
        self._tokens_in += request.max_total_tokens
        self._tokens_here += request.max_total_tokens
        self._distrust_repeats()
        if self._launching:  # it will be taken up with the others
            return
        if len(self._flights) < self.num_stages:  # there is room for it, and whatever else arrives now, at once
            if self._flights:
                self._settle(bisect_left(self._completions, self.env.now, hi=self._last))
                self._completions, self._last = [], 0
            self._launching = True
            self._sleep(self.env.now)
        elif self._last > 0:
            last = bisect_left(self._completions, self.env.now, hi=self._last)
            if last < self._last:
                self._last = last
                self._sleep(self._completions[last])

    @property
    def outstanding_tokens(self) -> int:
        """Tokens still to compute or to generate for the requests here."""
        done = bisect_left(self._completions, self.env.now, hi=min(self._last, len(self._completions)))
        planned = sum(self._flights[j % len(self._flights)].batch.shape.num_tokens for j in range(done))
        scheduler = self.scheduler
        return self._tokens_in + scheduler.recomputed_tokens - scheduler.prefix_hit_tokens - self._tokens_done - planned

    @property
    def kv_load(self) -> float:
        """Share of the KV cache that requests here hold, with the prompts that wait; a shared prefix counts for each.

        Above 1 where more wait than there is room for.
        """
        held = self._tokens_here - self.outstanding_tokens
        return kv_share(self.scheduler, held)

    # -- its life --------------------------------------------------------------------------------------------------

    def _sleep(self, until: float) -> None:
        """Wake up at `until`, not when it was to before."""
        self._next = self.env.at(until)
        self._next.callbacks = self._callbacks

    def _wake(self, event: simpy.Event) -> None:
        """Complete what was planned, or take up what has arrived; form the next batches and sleep on."""
        if event is not self._next:  # it has been cut short
            return
        completed = None
        if not self._launching:
            if self.num_stages > 1:
                self._settle(self._last)
            self._launching = True  # what a finished request sets off arrives before the next batch is formed
            completed = self._complete()
        self._launching = False
        self._launch(completed)
        if self._flights:
            self._plan()
            self.env.again(event, self._completions[self._last], self._callbacks)

    def _launch(self, completed: Batch | None = None) -> None:
        """Form batches until the pipeline is full or nothing more can run; `completed` has just left it."""
        scheduler = self.scheduler
        now = self.env.now
        while len(self._flights) < scheduler.max_in_flight:
            batch = scheduler.schedule()
            if self._flights and not _same(batch, completed):
                self._distrust_repeats()
            if batch is None:
                return
            completed = None
            if batch.chunks and not (self.async_scheduling and self._flights):
                self.recorder.scheduled(batch, now)
            in_range = self.predictor.in_range(batch.shape)
            flight = _Flight(batch, in_range, len(scheduler.running), len(scheduler.waiting))
            if self.num_stages > 1:
                durations = [self.predictor.stage_times(batch.shape, stage, 1)[0] for stage in range(self.num_stages)]
                self._pass(flight, now, durations)
            self._flights.append(flight)

    def _distrust_repeats(self) -> None:
        """Something came or changed that the batches in flight were formed without: each is formed anew next time."""
        for flight in self._flights:
            flight.batch.repeats = 1

    def _pass(self, flight: _Flight, time: float, durations: Sequence[float]) -> None:
        """Send a batch through the stages, from `time` on."""
        if not flight.starts:
            flight.starts = [[] for _ in durations]
            flight.durations = [[] for _ in durations]
        free = self._stage_free
        for stage, duration in enumerate(durations):
            start = max(time, free[stage])
            flight.starts[stage].append(start)
            flight.durations[stage].append(duration)
            free[stage] = end = start + duration
            self._check_times(flight.batch.shape, stage, [duration], end)
            time = end + self.predictor.send_time(flight.batch.shape, stage)
        flight.ends.append(end)

    def _plan(self) -> None:
        """Work out the completions until one that changes something."""
        flights = self._flights
        most = self._reach if self.repeats else 1
        if self.num_stages == 1:
            flight = flights[0]
            batch = flight.batch
            if not self.async_scheduling:
                repeats = min(batch.repeats, most)
            elif len(flights) == 2 and _follows(flights[1].batch, batch):
                repeats = min(flights[1].batch.repeats, most)
            else:
                repeats = 1
            durations = self.predictor.stage_times(batch.shape, 0, repeats)
            now = self.env._now
            ends = list(accumulate(durations, initial=now)) if repeats > 1 else [now, now + durations[0]]
            self._check_times(batch.shape, 0, durations, ends[-1])
            flight.durations = [durations]
            flight.ends = self._completions = ends[1:]
            ends.pop()
            flight.starts = [ends]
            self._last = repeats - 1
            return
        self._num_running = len(self.scheduler.running)
        self._num_waiting = len(self.scheduler.waiting)
        self._kv_blocks = self.scheduler.kv_cache.num_used
        runs = min(self.scheduler.rounds(), most, *(flight.batch.repeats for flight in flights))
        count = len(flights)
        self._completions = completions = [flight.ends[0] for flight in flights]
        self._last = (runs - 1) * count
        if runs > 1:
            stages = range(self.num_stages)
            durations_of = [
                list(zip(*(self.predictor.stage_times(flight.batch.shape, s, runs) for s in stages), strict=True))
                for flight in flights
            ]
            for j in range(self._last):
                flight = flights[j % count]
                self._pass(flight, completions[j], durations_of[j % count][j // count + 1])
                completions.append(flight.ends[-1])

    def _check_times(self, shape: BatchShape, stage: int, durations: Sequence[float], end: float) -> None:
        """Raise ValueError unless a predictor's answer is positive, finite numbers, which add up to `end`."""
        if not (min(durations) > 0 and end < inf):  # a NaN fails one of the two, wherever it stands
            raise ValueError(f"{self.predictor.description}: {list(durations)[:8]} s for {shape} on stage {stage}")

    def _settle(self, completions: int) -> None:
        """The first `completions` of those planned are past, each of their batches is in flight again, no more is."""
        flights = self._flights
        count = len(flights)
        newest = count + completions - 1  # launches are numbered on from the flights that this began with
        for stage in range(self.num_stages):
            flight, run = flights[newest % count], newest // count
            self._stage_free[stage] = flight.starts[stage][run] + flight.durations[stage][run]
        done = [(completions - b + count - 1) // count for b in range(count)]  # of each flight
        taken: list[int] = []  # the completions at whose relaunch a KV block was taken
        for b, flight in enumerate(flights):
            if done[b]:
                flight.max_tbt = self.recorder.completed(flight.batch, flight.ends[: done[b]])
                self._tokens_done += done[b] * flight.batch.shape.num_tokens
                taken += [(run - 1) * count + b for run in self.scheduler.advance(flight.batch, done[b])]
        taken.sort()
        for b, flight in enumerate(flights):
            if done[b]:
                relaunched = range(b, b + done[b] * count, count)
                kv_blocks = [flight.kv_blocks, *(self._kv_blocks + bisect_right(taken, j) for j in relaunched)]
                flight.kv_blocks = kv_blocks.pop()
                self._write(flight, 0, 1, kv_blocks[:1])  # launched before, the others meanwhile
                flight.num_running, flight.num_waiting = self._num_running, self._num_waiting
                self._write(flight, 1, done[b], kv_blocks[1:])
            for times in (flight.ends, *flight.starts, *flight.durations):
                times[:] = times[done[b] : done[b] + 1]  # what is in flight; later ones were planned, never launched
        self._flights = flights[completions % count :] + flights[: completions % count]

    def _complete(self) -> Batch:
        """The last completion that was planned: commit its batch, and let go of the requests that are finished."""
        flight = self._flights.pop(0)
        batch = flight.batch
        runs = self._last + 1 if self.num_stages == 1 else 1
        ends = flight.ends
        flight.max_tbt = self.recorder.completed(batch, ends if runs == len(ends) else ends[:runs])
        if self.async_scheduling:
            finished = self._complete_ahead(flight, runs)
        else:
            finished, taken = self.scheduler.commit(batch, repeats=runs)
            kv_blocks = [flight.kv_blocks] * runs
            if taken:
                more = [0] * runs  # than the run before had
                more[0] = flight.kv_blocks
                for run in taken:
                    more[run] += 1
                kv_blocks = list(accumulate(more))
            self._write(flight, 0, runs, kv_blocks)
        self._tokens_done += runs * batch.shape.num_tokens + len(finished)
        if len(self._completions) > (1 if self.num_stages == 1 else len(self._flights) + 1):  # it had looked ahead
            self._reach = min(max(8, 2 * self._last + 2), MOST_REPEATS)
        self._completions, self._last = [], 0
        if finished:
            self.outstanding_requests -= len(finished)
            if not self.outstanding_requests:
                self.occupied_s += self.env.now - self._occupied_since
            for request in finished:
                self._tokens_here -= request.max_total_tokens
                self.recorder.finished(request, self.index)
            self.on_finished(finished)
        return batch

    def _complete_ahead(self, flight: _Flight, runs: int) -> list[Request]:
        """Commit `runs` runs of a batch while the next one, formed ahead, begins; gives the finished requests."""
        if not self._flights:
            self._write(flight, 0, 1, [flight.kv_blocks])
            return self.scheduler.commit(flight.batch)[0]
        (following,) = self._flights
        more = [0] * runs  # KV blocks than the run before had
        more[0] = flight.kv_blocks
        if runs > 1:
            more[1] = following.kv_blocks - flight.kv_blocks
            for run in self.scheduler.advance(following.batch, runs - 1):
                if run + 1 < runs:
                    more[run + 1] += 1
        kv_blocks = list(accumulate(more))
        self._write(flight, 0, 1, kv_blocks[:1])
        if runs > 1:
            flight.num_running, flight.num_waiting = following.num_running, following.num_waiting
            self._write(flight, 1, runs, kv_blocks[1:])
            following.kv_blocks = following.batch.kv_blocks
        if following.batch.chunks:
            self.recorder.scheduled(following.batch, self.env.now)
        return self.scheduler.commit(flight.batch)[0]

    def _write(self, flight: _Flight, first: int, last: int, kv_blocks: list[int]) -> None:
        """Record the runs first..last-1 of a flight; `kv_blocks` has one entry for each."""
        for stage in range(self.num_stages):
            durations = flight.durations[stage][first:last]
            self.busy_s[stage] += durations[0] if len(durations) == 1 else sum(durations)
            self.recorder.iterations(
                self.index,
                stage,
                flight.starts[stage][first:last],
                durations,
                flight.batch,
                kv_blocks,
                flight.num_running,
                flight.num_waiting,
                flight.max_tbt[first:last] if stage == self.num_stages - 1 else [nan] * (last - first),
                flight.in_range,
            )


def kv_share(scheduler: Scheduler, held_tokens: int) -> float:
    """Return the share of a scheduler's KV blocks that so many tokens and the waiting prompts take."""
    waiting = sum([request.num_tokens for request in scheduler.waiting])
    cache = scheduler.kv_cache
    return (held_tokens + waiting) / (cache.num_blocks * cache.block_size)


def _same(batch: Batch | None, before: Batch | None) -> bool:
    """Whether `batch` runs the same requests as `before` did, with as many tokens each."""
    if batch is None or before is None:
        return batch is before
    return batch.decodes == before.decodes and batch.chunks == before.chunks


def _follows(batch: Batch, before: Batch) -> bool:
    """Whether `batch` is what a repeat of `before` would be."""
    return _same(batch, before) and batch.shape == before.shape.after(1)
