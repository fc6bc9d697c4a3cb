"""The engine's loop in real time: schedule, execute, commit.

The driver lives in *events*, an arrival or a batch's end, and takes them in the order of their times; whatever the
scheduler decides, it decides at such a time. When an arrival wakes an idle engine a little late, the batch has begun at
the arrival and takes that much longer. So the simulator, given the durations that were measured here, makes the same
decisions: an engine's run and its replay are batch for batch the same.

With `async_scheduling` the next batch is formed and launched while the last one is still computed, so that a GPU need
not wait for the host. A request that ends by a stop token is found out one batch late, and its extra token is dropped.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import compress
from math import inf, nan
from typing import Protocol

from engine.executor import Executor, Result, WorkerError
from engine.recorder import Recorder
from engine.request import Batch, Request
from engine.scheduler import Scheduler
from engine.sequences import Sequence, StepBuilder

SPIN_S = 300e-6  # the last of a wait is spent awake, for the system wakes a sleeper late


class Clock(Protocol):
    """Where a driver's time comes from."""

    def now(self) -> float:
        """Seconds, from any origin; what workers stamp their times with."""

    def sleep(self, seconds: float) -> None:
        """Let `seconds` pass."""


class RealClock:
    """The machine's monotonic clock, the same in every process."""

    def now(self) -> float:
        return time.perf_counter()

    def sleep(self, seconds: float) -> None:
        end = time.perf_counter() + seconds
        if seconds > SPIN_S:
            time.sleep(seconds - SPIN_S)
        while time.perf_counter() < end:
            pass


@dataclass(slots=True)
class _Flight:
    """A launched batch, and how things stood at the time."""

    batch: Batch
    number: int  # of its step
    launched_at: float
    num_running: int
    num_waiting: int
    at_limit: list[Request] | None = None  # who gets its last token, if the batch is committed ahead of its end


class Driver:
    """Runs sequences through one replica.

    Args:
        recorder: gets the same reports as from the simulator; its times are seconds since `run` began.
        max_in_flight is the scheduler's: as many batches are launched before the first has to be done.
        async_scheduling: form the next batch while one is computed (one pipeline stage only).
        on_token, on_finished: called with a sequence when its next token, and its last, is known.
        on_result: called with each finished step.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        recorder: Recorder,
        *,
        clock: Clock | None = None,
        async_scheduling: bool = False,
        seed: int = 0,
        on_token: Callable[[Sequence, int], None] | None = None,
        on_finished: Callable[[Sequence], None] | None = None,
        on_result: Callable[[Batch, Result], None] | None = None,
    ) -> None:
        if async_scheduling and scheduler.max_in_flight > 1:
            raise ValueError("async scheduling is for one pipeline stage: several batches are in flight already")
        self.scheduler = scheduler
        self.executor = executor
        self.recorder = recorder
        self.clock = clock or RealClock()
        self.async_scheduling = async_scheduling
        self.on_token = on_token
        self.on_finished = on_finished
        self.on_result = on_result
        self.num_stages = scheduler.max_in_flight
        self.busy_s = [0.0] * self.num_stages  # time that each stage has worked
        self.occupied_s = 0.0  # time with at least one request here
        self.now = 0.0  # of the event that is dealt with
        self.steps = StepBuilder(scheduler.spec.max_num_seqs, seed)  # and the sequences that are here
        self._flights: deque[_Flight] = deque()
        self._stage_free = [0.0] * self.num_stages  # end of the newest batch on each stage
        self.origin = 0.0  # the clock when `run` began
        self._occupied_since = 0.0

    def run(self, sequences: Iterable[Sequence]) -> None:
        """Serve `sequences`, which come in order of arrival, each when its time has come, to their ends.

        Raises InputError for a request that could never run, WorkerError when a worker fails, RuntimeError if the
        policy leaves requests waiting for ever.
        """
        arrivals = _Arrivals(sequences)
        self.origin = self.clock.now()
        while True:
            self._launch()
            if not self._flights:
                if arrivals.next_at == inf:
                    self._check_finished()
                    return
                self._sleep_until(arrivals.next_at)
                self.now = arrivals.next_at
                self._admit(arrivals)
                continue
            room = not self.async_scheduling and len(self._flights) < self.num_stages
            result = self._wait(arrivals.next_at if room else inf)
            ended_at = arrivals.next_at if result is None else self._time()
            while room and arrivals.next_at <= ended_at:  # each arrival may start a batch
                self.now = arrivals.next_at
                self._admit(arrivals)
                self._launch()
                room = len(self._flights) < self.num_stages
            if result is not None:
                self._complete(result, ended_at)
                self._admit(arrivals)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _check_finished(self) -> None:
        if left := len(self.steps.sequences):
            raise RuntimeError(f"the policy {self.scheduler.spec.policy} schedules nothing although {left} requests "
                               "are not finished")  # fmt: skip

    def _time(self) -> float:
        return self.clock.now() - self.origin

    def _sleep_until(self, time: float) -> None:
        wait = time - self._time()
        if wait > 0:
            self.clock.sleep(wait)

    def _wait(self, until: float) -> Result | None:
        """The next result, or None if there is none at `until`."""
        result = self.executor.wait(None if until == inf else max(0.0, until - self._time()))
        if result is not None and result.number != self._flights[0].number:
            raise WorkerError(f"the result of step {result.number} came when {self._flights[0].number} was due")
        return result

    def _admit(self, arrivals: _Arrivals) -> None:
        """Add what has arrived by now."""
        while arrivals.next_at <= self.now:
            sequence = arrivals.pop()
            self.scheduler.add(sequence.request)
            if not self.steps.sequences:
                self._occupied_since = self.now
            self.steps.add(sequence)

    def _launch(self) -> None:
        """Form and launch batches until the pipeline is full or nothing more can run."""
        depth = self.num_stages + self.async_scheduling
        while len(self._flights) < depth:
            if self.async_scheduling and self._flights:
                self._commit_ahead(self._flights[-1])
            batch = self.scheduler.schedule()
            if batch is None:
                return
            step = self.steps.build(batch)
            running, waiting = len(self.scheduler.running), len(self.scheduler.waiting)
            self._flights.append(_Flight(batch, step.number, self.now, running, waiting))
            self.executor.launch(step)

    def _commit_ahead(self, flight: _Flight) -> None:
        """Commit a batch that is still computed: who reaches a limit is known, who meets a stop token is not."""
        if flight.at_limit is None:
            batch, unfinished = flight.batch, self.steps.sequences
            flight.at_limit = [r for r in batch.reaching_limit() if r.id in unfinished]
            self.scheduler.commit(batch, flight.at_limit)
            for request in _requests(batch):
                if request.id not in unfinished:  # it met a stop token when this batch was launched already
                    self.scheduler.drop(request)

    def _complete(self, result: Result, time: float) -> None:
        """A batch is done, at `time`: commit it, and record what it took."""
        flight = self._flights.popleft()
        starts, durations = self._stage_times(flight, result, time)
        self.now = starts[-1] + durations[-1]  # `time`, but for rounding, as the simulator will have it
        # a batch that was formed ahead begins when the one before ends
        self.recorder.scheduled(flight.batch, starts[0] if self.async_scheduling else flight.launched_at)
        batch, tokens = self._still_wanted(flight.batch, result.tokens)
        max_tbt = self.recorder.completed(batch, [self.now])
        for stage in range(self.num_stages):
            self.busy_s[stage] += durations[stage]
            self.recorder.iterations(
                0,
                stage,
                starts[stage : stage + 1],
                durations[stage : stage + 1],
                flight.batch,
                [flight.batch.kv_blocks],
                flight.num_running,
                flight.num_waiting,
                max_tbt if stage == self.num_stages - 1 else [nan],
                True,
            )
        if self.on_result is not None:
            self.on_result(flight.batch, result)
        at_limit = flight.batch.reaching_limit() if flight.at_limit is None else flight.at_limit
        ended = self._take_tokens([*batch.decodes, *batch.ending], tokens, {r.id for r in at_limit})
        if flight.at_limit is None:
            self.scheduler.commit(flight.batch, ended)
        else:
            launched = {r.id for other in self._flights for r in _requests(other.batch)}
            for request in ended:
                if request not in at_limit and request.id not in launched:
                    self.scheduler.drop(request)
        if ended and not self.steps.sequences:
            self.occupied_s += self.now - self._occupied_since

    def _still_wanted(self, batch: Batch, tokens: list[int]) -> tuple[Batch, list[int]]:
        """`batch` and its tokens without the requests that met a stop token in the batch before."""
        sampled = [*batch.decodes, *batch.ending]
        wanted = [r.id in self.steps.sequences for r in sampled]
        if all(wanted):
            return batch, tokens
        decodes = [r for r in batch.decodes if r.id in self.steps.sequences]
        ending = [r for r in batch.ending if r.id in self.steps.sequences]
        return replace(batch, decodes=decodes, ending=ending), list(compress(tokens, wanted))

    def _take_tokens(self, sampled: list[Request], tokens: list[int], at_limit: set[int]) -> list[Request]:
        """Give each sampled sequence its token. Returns the requests that are finished by it."""
        ended = []
        for request, token in zip(sampled, tokens, strict=True):
            sequence = self.steps.sequences[request.id]
            sequence.tokens.append(token)
            if token in sequence.stop_tokens:
                sequence.finish_reason = "stop"
            elif request.id in at_limit:
                sequence.finish_reason = "length"
            if self.on_token is not None:
                self.on_token(sequence, token)
            if sequence.finish_reason is not None:
                ended.append(request)
                self.steps.remove(sequence)
                self.recorder.finished(request, 0)
                if self.on_finished is not None:
                    self.on_finished(sequence)
        return ended

    def _stage_times(self, flight: _Flight, result: Result, time: float) -> tuple[list[float], list[float]]:
        """Start and duration on each stage, in the simulator's terms.

        A stage is taken from its first rank's start to its last rank's end, by one batch at a time. The first stage's
        time begins when the batch was launched, the last one's ends when the driver has the result: they include the
        way to the workers and back.
        """
        tp = len(result.times) // self.num_stages
        starts, durations = [], []
        for stage in range(self.num_stages):
            ranks = result.times[stage * tp : (stage + 1) * tp]
            start = min(each.start for each in ranks) - self.origin
            end = max(each.end for each in ranks) - self.origin
            if stage == 0:
                start = flight.launched_at
            if stage == self.num_stages - 1:
                end = time
            start = max(start, self._stage_free[stage])
            starts.append(start)
            durations.append(end - start)
            self._stage_free[stage] = end
        return starts, durations


def _requests(batch: Batch) -> list[Request]:
    return [*batch.decodes, *(request for request, _ in batch.prefills)]


class _Arrivals:
    """Sequences in order of arrival, with a look at when the next one comes."""

    def __init__(self, sequences: Iterable[Sequence]) -> None:
        self._iterator: Iterator[Sequence] = iter(sequences)
        self._next = next(self._iterator, None)

    @property
    def next_at(self) -> float:
        """When the next one arrives; infinity after the last."""
        return inf if self._next is None else self._next.request.arrived_at

    def pop(self) -> Sequence:
        found = self._next
        assert found is not None
        self._next = next(self._iterator, None)
        return found
