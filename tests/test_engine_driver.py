"""The engine's loop against fake workers in virtual time: what it decides, what it records, and its replay."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from replaying import assert_same_times, composition, replay

from engine.driver import Driver
from engine.errors import InputError
from engine.executor import LAST_SAMPLED, RankTime, Result, SamplingParams, Step, WorkerError
from engine.policies import POLICIES, resolve
from engine.recorder import Recorder
from engine.request import Batch, Request
from engine.scheduler import Scheduler
from engine.sequences import Sequence
from engine.specs import SchedulerSpec

VOCABULARY = 1000


class VirtualTime:
    def __init__(self) -> None:
        self.time = 1234.5

    def now(self) -> float:
        return self.time

    def sleep_until(self, time: float) -> None:
        self.time = max(self.time, time)


class FakeWorkers:
    """Workers that keep the books real ones keep (block tables, newest tokens) and check that what they get is sane.

    The next token of a sequence depends on all tokens before it, so that a wrong or stale one changes the output.
    """

    num_blocks = 64
    attention_backend = hardware = "fake"

    def __init__(self, clock: VirtualTime, stages: int, block_size: int, seed: int = 0) -> None:
        self.clock, self.stages, self.block_size = clock, stages, block_size
        self.rng = np.random.default_rng(seed)
        self.table: dict[tuple[int, int], int] = {}
        self.cache: dict[tuple[int, int], int] = {}  # (block, offset) -> token
        self.last: dict[int, int] = {}
        self.free = [0.0] * stages
        self.results: deque[tuple[float, Result]] = deque()
        self.steps: list[Step] = []
        self.fail_after: int | None = None

    def launch(self, step: Step) -> None:
        self.steps.append(step)
        for row, offset, block in zip(*step.new_blocks, strict=True):
            self.table[int(row), int(offset)] = int(block)
        at, sequences = 0, []
        for row, start, chunk in zip(step.rows, step.starts, step.chunks, strict=True):
            for i in range(chunk):
                token = int(step.tokens[at])
                at += 1
                token = self.last[int(row)] if token == LAST_SAMPLED else token
                position = int(start) + i
                self.cache[self.table[int(row), position // self.block_size], position % self.block_size] = token
            length = int(start + chunk)
            sequences.append([self._cached(int(row), position) for position in range(length)])
        assert at == len(step.tokens)
        tokens = [next_token(sequences[i]) for i in step.sampled]
        self.last.update({int(step.rows[i]): token for i, token in zip(step.sampled, tokens, strict=True)})
        time, times = self.clock.now(), []
        for stage in range(self.stages):
            start = max(time, self.free[stage])
            self.free[stage] = time = start + self.rng.uniform(0.5, 1.5) * (0.01 + 1e-4 * len(step.tokens))
            times.append(RankTime(stage, start, time))
            time += 1e-3
        self.results.append((self.free[-1] + 5e-4, Result(step.number, tokens, times)))

    def _cached(self, row: int, position: int) -> int:
        return self.cache[self.table[row, position // self.block_size], position % self.block_size]

    def wait(self, timeout: float | None) -> Result | None:
        if self.fail_after is not None and len(self.steps) >= self.fail_after:
            raise WorkerError("rank 0 was killed by SIGKILL")
        at, result = self.results[0]
        if timeout is not None and at > self.clock.now() + timeout:
            self.clock.sleep_until(self.clock.now() + timeout)
            return None
        self.clock.sleep_until(at)
        self.results.popleft()
        return result

    def close(self) -> None:
        pass


def next_token(tokens: list[int]) -> int:
    return (sum(i * token for i, token in enumerate(tokens, 1)) + 7) % VOCABULARY


def expected(prompt: list[int], count: int, stop: frozenset[int] = frozenset()) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]


@dataclass
class Served:
    driver: Driver
    workers: FakeWorkers
    recorder: Recorder
    sequences: list[Sequence]
    batches: list[Batch] = field(default_factory=list)
    finished: list[int] = field(default_factory=list)


def serve(
    lengths: list[tuple[float, int, int]],
    policy: str = "sarathi",
    stages: int = 1,
    num_blocks: int = 64,
    stop: frozenset[int] = frozenset(),
    run: bool = True,
    async_scheduling: bool = False,
    spec: dict[str, Any] | None = None,
    **settings: Any,
) -> Served:
    defaults = {"max_num_batched_tokens": 16, "max_num_seqs": 4, "block_size": 4, "watermark": 0.0}
    scheduler_spec = resolve(
        SchedulerSpec(policy=policy, **{**defaults, "max_model_len": 64, **(spec or {})}),  # type: ignore[arg-type]
        64,
    )
    scheduler = Scheduler(scheduler_spec, num_blocks, max_in_flight=stages, async_scheduling=async_scheduling)
    clock = VirtualTime()
    workers = FakeWorkers(clock, stages, scheduler_spec.block_size)
    recorder = Recorder(predicted=False)
    sequences = [
        Sequence(Request(i, at, prompt, output), [(31 * i + j) % VOCABULARY for j in range(prompt)], stop_tokens=stop)
        for i, (at, prompt, output) in enumerate(lengths)
    ]
    driver = Driver(scheduler, workers, recorder, clock=clock, **settings)
    served = Served(driver, workers, recorder, sequences)
    driver.on_result = lambda batch, _: served.batches.append(batch)
    driver.on_finished = lambda sequence: served.finished.append(sequence.request.id)
    if run:
        driver.run(sequences)
        recorder.close()
    return served


LENGTHS = st.lists(st.tuples(st.floats(0, 0.2), st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=8).map(
    lambda rows: sorted(rows)
)
CASES = st.tuples(LENGTHS, st.sampled_from(sorted(POLICIES)), st.integers(1, 3), st.integers(14, 30))


def settings_of(policy: str) -> dict[str, Any]:
    return {"max_num_batched_tokens": 64} if policy == "vllm" else {}


@given(CASES)
def test_every_request_gets_its_own_tokens(case: tuple[Any, str, int, int]) -> None:
    lengths, policy, stages, num_blocks = case
    served = serve(lengths, policy, stages, 64 if policy in ("orca", "faster_transformer") else num_blocks,
                   spec=settings_of(policy))  # fmt: skip
    assert sorted(served.finished) == list(range(len(lengths)))
    for sequence, (_, prompt, output) in zip(served.sequences, lengths, strict=True):
        assert sequence.output == expected(sequence.tokens[:prompt], output)
        assert sequence.finish_reason == "length"
    served.driver.scheduler.kv_cache.check_integrity([])
    assert served.driver.scheduler.kv_cache.num_used == 0


@given(LENGTHS, st.sampled_from(sorted(POLICIES)), st.integers(14, 30), st.sets(st.integers(0, 999), max_size=300))
def test_scheduling_ahead_gives_the_same_tokens_with_stop_tokens_too(
    lengths: Any, policy: str, num_blocks: int, stop: set[int]
) -> None:
    if policy in ("orca", "faster_transformer"):
        num_blocks = 64
    served = serve(lengths, policy, 1, num_blocks, frozenset(stop), spec=settings_of(policy), async_scheduling=True)
    assert sorted(served.finished) == list(range(len(lengths)))
    for sequence, (_, prompt, output) in zip(served.sequences, lengths, strict=True):
        assert sequence.output == expected(sequence.tokens[:prompt], output, frozenset(stop))
        assert sequence.finish_reason == ("stop" if sequence.output[-1] in stop else "length")
        assert len(sequence.request.token_times) == len(sequence.output)
    scheduler = served.driver.scheduler
    assert scheduler.kv_cache.num_used == 0 and not scheduler.running and not scheduler.waiting


def test_preemption_really_happens_in_these_cases() -> None:
    served = serve([(0.0, 20, 12)] * 4, num_blocks=20)
    assert served.driver.scheduler.recomputed_tokens > 0
    ahead = serve([(0.0, 20, 12)] * 4, num_blocks=20, async_scheduling=True)
    assert ahead.driver.scheduler.recomputed_tokens > 0


@given(CASES)
def test_the_simulator_replays_a_run_batch_for_batch(case: tuple[Any, str, int, int]) -> None:
    lengths, policy, stages, num_blocks = case
    num_blocks = 64 if policy in ("orca", "faster_transformer") else num_blocks
    served = serve(lengths, policy, stages, num_blocks, spec=settings_of(policy))
    assert served.batches
    scheduler = Scheduler(served.driver.scheduler.spec, num_blocks, max_in_flight=stages)
    simulated, recorder = replay(lengths, served.recorder, scheduler)
    assert composition(simulated) == composition(served.batches)
    assert_same_times(recorder, served.recorder)


@given(LENGTHS, st.sampled_from(sorted(POLICIES)), st.integers(14, 30))
def test_the_simulator_replays_a_run_that_was_scheduled_ahead(lengths: Any, policy: str, num_blocks: int) -> None:
    num_blocks = 64 if policy in ("orca", "faster_transformer") else num_blocks
    served = serve(lengths, policy, 1, num_blocks, spec=settings_of(policy), async_scheduling=True)
    scheduler = Scheduler(served.driver.scheduler.spec, num_blocks, async_scheduling=True)
    simulated, recorder = replay(lengths, served.recorder, scheduler)
    assert composition(simulated) == composition(served.batches)
    assert_same_times(recorder, served.recorder)


def test_an_idle_engine_begins_at_the_arrival_and_counts_its_lateness_to_the_batch() -> None:
    served = serve([(1.0, 4, 2), (5.0, 4, 1)])
    table = pd.DataFrame(served.recorder.iterations_kept())
    assert table.start_s.tolist()[0] == 1.0
    assert 5.0 in table.start_s.tolist()
    assert not table.predicted.any()
    assert served.driver.occupied_s == pytest.approx(table.duration_s.sum())


def test_seeds_are_filled_in_once_and_differ() -> None:
    lengths = [(0.0, 4, 3)] * 3
    served = serve(lengths, run=False)
    for sequence in served.sequences[:2]:
        sequence.sampling = SamplingParams(temperature=1.0)
    served.driver.run(served.sequences)
    steps = [step for step in served.workers.steps if step.sampling is not None]
    assert steps
    seeds = {each.seed for step in steps for each in step.sampling or () if each.temperature}
    assert len(seeds) == 2 and None not in seeds


def test_a_request_that_never_fits_is_refused() -> None:
    with pytest.raises(InputError, match="max-model-len"):
        serve([(0.0, 60, 60)])


def test_a_policy_that_leaves_requests_waiting_is_told() -> None:
    served = serve([(0.0, 4, 3), (0.0, 4, 3)], run=False)
    schedule = served.driver.scheduler.schedule
    batches = iter(range(2))
    served.driver.scheduler.schedule = lambda: schedule() if next(batches, None) is not None else None  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="schedules nothing although 2 requests are not finished"):
        served.driver.run(served.sequences)


def test_a_dead_worker_ends_the_run_and_finished_requests_stay_on_record() -> None:
    served = serve([(0.0, 4, 1), (0.0, 4, 9)], run=False)
    served.workers.fail_after = 4
    with pytest.raises(WorkerError, match="rank 0 was killed"):
        served.driver.run(served.sequences)
    served.recorder.close()
    assert served.recorder.requests()["request_id"].tolist() == [0]


def test_scheduling_ahead_is_for_one_stage() -> None:
    with pytest.raises(ValueError, match="one pipeline stage"):
        serve([(0.0, 4, 1)], stages=2, async_scheduling=True)
