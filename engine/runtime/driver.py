"""The engine's loop: schedule, execute, commit.

    driver.submit(sequence)                    # a server: when a request comes in
    while driver.unfinished: driver.step()     # launch what can be, wait for one batch, give its tokens out
    driver.run(sequences)                      # a workload: the same, each sequence at its time of arrival

The driver lives in *events*, an arrival or a batch's end, and takes them in the order of their times; whatever the
scheduler decides, it decides at such a time. When an arrival wakes an idle engine a little late, the batch has begun at
the arrival and takes that much longer. So the simulator, given the durations that were measured here, makes the same
decisions: an engine's run and its replay are batch for batch the same.

With asynchronous scheduling the next batch is formed and launched while the last one is still computed, so that a GPU
need not wait for the host. A request that ends by a stop token is found out one batch late, and its extra token is
dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import compress
from math import inf, nan
from time import perf_counter, sleep
from typing import Protocol

from engine.errors import InputError
from engine.results.recorder import Recorder
from engine.runtime.executor import Executor, Result, WorkerError
from engine.runtime.sequences import Sequence, StepBuilder
from engine.scheduling.request import Batch
from engine.scheduling.scheduler import Scheduler

SPIN_S = 300e-6  # the last of a wait is spent awake, for the system wakes a sleeper late


class Clock(Protocol):
    """Where a driver's time comes from."""

    def now(self) -> float:
        """Seconds, from any origin; what workers stamp their times with."""

    def sleep_until(self, time: float) -> None:
        """Let the time pass until `now` would give `time`, if that is still to come."""


class RealClock:
    """The machine's monotonic clock, the same in every process."""

    def now(self) -> float:
        return perf_counter()

    def sleep_until(self, time: float) -> None:
        left = time - perf_counter()
        if left > SPIN_S:
            sleep(left - SPIN_S)
        while perf_counter() < time:
            pass


class VirtualClock:
    """Time that passes only when somebody sleeps, from 0 on."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def sleep_until(self, time: float) -> None:
        self._now = max(self._now, time)


@dataclass(slots=True)
class _Flight:
    """A launched batch, and how things stood at the time."""

    batch: Batch
    number: int  # of its step
    launched_at: float
    num_running: int
    num_waiting: int


class Driver:
    """Runs sequences through one replica. Times are seconds since `start`.

    Args:
        scheduler: decides also how many batches are launched before the first has to be done.
        recorder: gets the same reports as from the simulator.
        replica: its number among the recorder's.
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
        seed: int = 0,
        replica: int = 0,
        on_token: Callable[[Sequence, int], None] | None = None,
        on_finished: Callable[[Sequence], None] | None = None,
        on_result: Callable[[Batch, Result], None] | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.recorder = recorder
        self.clock = clock or RealClock()
        self.replica = replica
        self.on_token = on_token
        self.on_finished = on_finished
        self.on_result = on_result
        self.num_stages = scheduler.num_stages
        self.busy_s = [0.0] * self.num_stages  # time that each stage has worked
        self.occupied_s = 0.0  # time with at least one request here
        self.now = 0.0  # of the event that is dealt with
        self.steps = StepBuilder(seed)  # and the sequences that are here
        self._flights: deque[_Flight] = deque()
        self._done: tuple[Result, float] | None = None  # of the oldest flight, and when it came
        self._stage_free = [0.0] * self.num_stages  # end of the newest batch on each stage
        self.origin = 0.0  # the clock at `start`
        self._occupied_since = 0.0
        kv_cache = scheduler.kv_cache
        self._hashed = kv_cache.block_size if kv_cache.prefix_caching else None  # tokens of a block that has a hash
        self._arrivals: Arrivals | None = None  # of `run`

    @property
    def unfinished(self) -> int:
        """Sequences that are here."""
        return len(self.steps.sequences)

    @property
    def in_flight(self) -> int:
        """Batches that are launched and not done."""
        return len(self._flights)

    def start(self) -> None:
        """Begin to count the time: now is 0."""
        self.origin = self.clock.now()

    def time(self) -> float:
        """Seconds since `start`."""
        return self.clock.now() - self.origin

    def submit(self, sequence: Sequence, at: float | None = None) -> None:
        """Take in a sequence that arrived `at` a time, by default now. Raises InputError if it could never run.

        It may enter the first batch that is formed from now on, by `step`. Another one here with its request's id
        raises InputError as well.
        """
        if sequence.request.id in self.steps.sequences:
            raise InputError(f"request {sequence.request.id} is here already: give another id")
        self.now = max(self.now, self.time() if at is None else at)
        if self._hashed is not None and sequence.request.block_hashes is None:
            sequence.request.block_hashes = sequence.block_hashes
            sequence.hash_blocks(self._hashed)
        self.scheduler.add(sequence.request)
        if not self.steps.sequences:
            self._occupied_since = self.now
        self.steps.add(sequence)

    def abort(self, id: int) -> None:
        """Let go of the sequence with a request's id, wherever it is; an id that is not here is passed over.

        What batches in flight make of it counts for nothing. It is not among the recorder's requests.
        """
        self._let_go(id, "abort")

    def stop(self, id: int, tokens: int | None = None) -> None:
        """End the sequence with a request's id, whose text is complete: as `abort`, but it counts as finished.

        Of what was generated meanwhile only the first `tokens` count, by default all.
        """
        sequence = self._let_go(id, "stop")
        if sequence is not None and sequence.request.token_times:
            if tokens is not None:
                del sequence.request.token_times[tokens:]
            self.recorder.finished(sequence.request, self.replica)

    def _let_go(self, id: int, reason: str) -> Sequence | None:
        sequence = self.steps.sequences.get(id)
        if sequence is None or sequence.finish_reason is not None:  # one that a callback hears of as finished
            return None
        self.now = max(self.now, self.time())
        sequence.finish_reason = reason
        if not sequence.request.finished:  # by the batch whose tokens are given out just now
            self.scheduler.abort(sequence.request)
        self._remove(sequence)
        if self._arrivals is not None:
            self._arrivals.finished(sequence, self.now)
        return sequence

    def step(self, until: float = inf) -> bool:
        """Launch what can be, wait for the oldest batch in flight, and give its tokens out.

        Returns False if nothing is in flight, and if a batch could join those in flight and `until` comes before the
        oldest one's end: what arrives then may start one. Raises WorkerError when a worker fails.
        """
        self.launch()
        if not self._flights:
            return False
        room = not self.scheduler.async_scheduling and len(self._flights) < self.num_stages
        if self._done is None:
            result = self._wait(until if room else inf)
            self._done = None if result is None else (result, self._end_of(result))
        if self._done is None or (room and until <= self._done[1]):
            return False
        result, ended_at = self._done
        self._done = None
        self._complete(result, ended_at)
        return True

    def launch(self) -> None:
        """Form and launch batches until as many are in flight as there may be, or nothing more can run."""
        if self.scheduler.async_scheduling and self._done is not None:
            return
        while (batch := self.scheduler.schedule()) is not None:
            counted = self.scheduler.max_in_flight > 1
            step = self.steps.build(batch, self.origin + self.now, counted=counted)
            running, waiting = len(self.scheduler.running), len(self.scheduler.waiting)
            self._flights.append(_Flight(batch, step.number, self.now, running, waiting))
            self.executor.launch(step)

    def run(self, sequences: Iterable[Sequence] | Arrivals) -> None:
        """Serve `sequences`, which come in order of arrival, each when its time has come, to their ends.

        `Arrivals` may also hang on what has ended. Raises InputError for a request that could never run and if the
        policy leaves requests waiting for ever, WorkerError when a worker fails.
        """
        arrivals = InOrder(sequences) if isinstance(sequences, Iterable) else sequences
        self._arrivals = arrivals
        self.start()
        while True:
            if not self.step(until=arrivals.next_at):
                if arrivals.next_at == inf:
                    break
                self.clock.sleep_until(self.origin + arrivals.next_at)
                self.now = max(self.now, arrivals.next_at)
            while arrivals.next_at <= self.now:
                self.submit(arrivals.pop(), self.now)
        if self.unfinished:
            raise InputError(
                f"the policy {self.scheduler.spec.policy} schedules nothing although {self.unfinished} requests are "
                "not finished: its plan() must give a batch while any can run"
            )

    # -- inside ----------------------------------------------------------------------------------------------------

    def _wait(self, until: float) -> Result | None:
        """The next result, or None if there is none at `until`."""
        result = self.executor.wait(None if until == inf else max(0.0, until - self.time()))
        if result is not None and result.number != self._flights[0].number:
            raise WorkerError(f"the result of step {result.number} came when {self._flights[0].number} was due")
        return result

    def _end_of(self, result: Result) -> float:
        """When a result came: now, or when it was predicted to."""
        return self.time() if result.stages is None else sum(result.stages[-1]) - self.origin

    def _complete(self, result: Result, time: float) -> None:
        """A batch is done, at `time`: commit it, record what it took, and give its tokens out."""
        flight = self._flights.popleft()
        starts, durations = self._stage_times(flight, result, time)
        self.now = starts[-1] + durations[-1]  # `time`, but for rounding, as the simulator will have it
        # a batch that was formed ahead begins when the one before ends
        self.recorder.scheduled(flight.batch, starts[0] if self.scheduler.async_scheduling else flight.launched_at)
        batch, wanted = _still_wanted(flight.batch)
        tokens = list(compress(result.tokens, wanted))
        max_tbt = self.recorder.completed(batch, [self.now])
        for stage in range(self.num_stages):
            self.busy_s[stage] += durations[stage]
            self.recorder.iterations(
                self.replica,
                stage,
                starts[stage : stage + 1],
                durations[stage : stage + 1],
                flight.batch,
                [flight.batch.kv_blocks],
                flight.num_running,
                flight.num_waiting,
                max_tbt if stage == self.num_stages - 1 else [nan],
                result.in_range,
            )
        if self.on_result is not None:
            self.on_result(flight.batch, result)
        sampled = [self.steps.sequences[request.id] for request in batch.sampled]
        if result.logprobs is not None:
            for sequence, logprobs in zip(sampled, compress(result.logprobs, wanted), strict=True):
                if logprobs is not None:
                    sequence.logprobs.append(logprobs)
        stopped = []
        for sequence, token in zip(sampled, tokens, strict=True):
            sequence.tokens.append(token)
            if self._hashed is not None and sequence.request.block_hashes is sequence.block_hashes:
                sequence.hash_blocks(self._hashed)
            if sequence.stops_at(token):
                stopped.append(sequence.request)
        self.scheduler.commit(flight.batch, stopped=stopped)
        for sequence in sampled:
            if sequence.finish_reason is not None:  # aborted by a callback
                continue
            token = sequence.tokens[-1]
            if sequence.request.finished:
                sequence.finish_reason = "stop" if sequence.stops_at(token) else "length"
            if self.on_token is not None:
                self.on_token(sequence, token)
            if sequence.request.finished and sequence.request.id in self.steps.sequences:  # no callback let it go
                self._remove(sequence)
                self.recorder.finished(sequence.request, self.replica)
                if self._arrivals is not None:
                    self._arrivals.finished(sequence, self.now)
                if self.on_finished is not None:
                    self.on_finished(sequence)

    def _remove(self, sequence: Sequence) -> None:
        """A sequence is not here any more."""
        self.steps.remove(sequence)
        if not self.steps.sequences:
            self.occupied_s += self.now - self._occupied_since

    def _stage_times(self, flight: _Flight, result: Result, time: float) -> tuple[list[float], list[float]]:
        """Start and duration on each stage, in the simulator's terms.

        A stage is taken from its first rank's start to its last rank's end, by one batch at a time. The first stage's
        time begins when the batch was launched, the last one's ends when the driver has the result: they include the
        way to the workers and back. A predictor's stages have their own times.
        """
        if result.stages is not None:
            return [stage.start - self.origin for stage in result.stages], [each.duration for each in result.stages]
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


def _still_wanted(batch: Batch) -> tuple[Batch, list[bool]]:
    """`batch` without the requests that met a stop token in the batch before, or were aborted; who of it is left."""
    wanted = [not request.finished for request in batch.sampled]
    if all(wanted):
        return batch, wanted
    decodes = [request for request in batch.decodes if not request.finished]
    completing = [request for request in batch.completing if not request.finished]
    return replace(batch, decodes=decodes, completing=completing), wanted


class Arrivals(Protocol):
    """Sequences as they arrive."""

    @property
    def next_at(self) -> float:
        """When the next one arrives; infinity if that hangs on one that has not ended, or none is left."""

    def pop(self) -> Sequence:
        """Take the next one."""

    def finished(self, sequence: Sequence, time: float) -> None:
        """A sequence has ended at `time`."""


class InOrder:
    """Sequences in order of arrival, with a look at when the next one comes."""

    def __init__(self, sequences: Iterable[Sequence]) -> None:
        self._iterator: Iterator[Sequence] = iter(sequences)
        self._next = next(self._iterator, None)

    @property
    def next_at(self) -> float:
        return inf if self._next is None else self._next.request.arrived_at

    def pop(self) -> Sequence:
        found = self._next
        assert found is not None
        self._next = next(self._iterator, None)
        return found

    def finished(self, sequence: Sequence, time: float) -> None:
        pass
