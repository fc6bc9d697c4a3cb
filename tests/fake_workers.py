"""Fake workers in virtual time, and the engine's driver over them: what tests of its decisions share."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st

from engine.results.recorder import Recorder
from engine.runtime.driver import Driver
from engine.runtime.executor import LAST_SAMPLED, RankTime, Result, Step, WorkerError
from engine.runtime.sequences import Sequence
from engine.scheduling.policies import resolve
from engine.scheduling.request import Batch, Request
from engine.scheduling.scheduler import Scheduler
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
