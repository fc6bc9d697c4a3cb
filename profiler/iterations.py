"""Whole iterations of the engine, as its driver runs them: what the host adds, and a check of what operators add up to.

Small bursts of requests make batches of every kind: prompts in chunks, hybrids, decodes of few and many. Of each batch
the driver's duration and the rank's own time are kept; the difference is the host's.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from engine.replica_spec import ReplicaSpec
from engine.results.recorder import Recorder
from engine.runtime.driver import Clock, Driver
from engine.runtime.executor import Executor, Result, Step
from engine.runtime.sequences import Sequence
from engine.scheduling.request import Batch, BatchShape, Request
from profiler.grids import Limits, farthest_first
from profiler.timing import Timing

OUTPUT = 24  # tokens of each request
COLUMNS = (
    *("model", "num_tokens", "num_decodes", "decode_kv_tokens", "prefills", "num_sampled"),
    *("duration_ms", "compute_ms", "schedule_ms", "build_step_ms", "prepare_inputs_ms", "process_outputs_ms"),
)
LEAST_S = 1e-6  # a table's times are above 0, and what the host adds may be hidden altogether
STAGES = ("schedule", "build_step", "prepare_inputs", "process_outputs")  # of the host's work on an iteration


def bursts(limits: Limits) -> list[tuple[int, int]]:
    """(requests, prompt tokens) that are within the limits together, farthest first."""
    requests = [1 << i for i in range(limits.max_requests.bit_length())]
    prompts = [1 << i for i in range(3, limits.max_length.bit_length())]
    fit = [
        (count, prompt)
        for count in requests
        for prompt in prompts
        if prompt + OUTPUT <= limits.max_length and count * (prompt + OUTPUT) <= limits.kv_tokens * 0.9
    ]
    return [(count, prompt) for count, prompt in farthest_first(fit)]


def run_burst(
    count: int,
    prompt: int,
    replica: ReplicaSpec,
    executor: Executor,
    clock: Clock | None = None,
) -> list[dict[str, Any]]:
    """The iterations (rows of COLUMNS) of `count` requests of `prompt` tokens that arrive at once."""
    scheduler = replica.new_scheduler(executor.num_blocks)
    recorder = Recorder(predicted=False)
    done: list[tuple[Batch, Result]] = []
    seconds: dict[str, list[float]] = {"schedule": [], "build_step": [], "launch": []}  # of each batch
    driver = Driver(
        scheduler,
        _Watched(executor, seconds["launch"]),
        recorder,
        clock=clock,
        on_result=lambda batch, result: done.append((batch, result)),
    )
    scheduler.schedule = _timed(scheduler.schedule, seconds["schedule"])  # type: ignore[method-assign]
    driver.steps.build = _timed(driver.steps.build, seconds["build_step"])  # type: ignore[method-assign]
    driver.run(_sequences(count, prompt, replica.model.vocab_size))
    recorder.close()
    durations = recorder.iterations_kept()["duration_s"].tolist()
    parts = zip(done, durations, *seconds.values(), strict=True)
    return [_row(batch, result, *spent) for (batch, result), *spent in parts]


def _row(batch: Batch, result: Result, duration: float, schedule: float, build: float, launch: float) -> dict[str, Any]:
    shape = batch.shape
    compute = result.times[0].end - result.times[0].start
    host = {
        "schedule": schedule,
        "build_step": build,
        "prepare_inputs": max(0.0, launch - compute),  # on a CPU launching computes
        "process_outputs": max(0.0, duration - schedule - build - max(launch, compute)),
    }
    return {
        "num_tokens": shape.num_tokens,
        "num_decodes": shape.num_decodes,
        "decode_kv_tokens": shape.decode_kv_tokens,
        "prefills": " ".join(f"{chunk}@{prefix}" for chunk, prefix in shape.prefills),
        "num_sampled": shape.num_sampled,
        "duration_ms": 1e3 * duration,
        "compute_ms": 1e3 * compute,
        **{f"{name}_ms": 1e3 * spent for name, spent in host.items()},
    }


def shape_of(row: Mapping[str, Any]) -> BatchShape:
    """The batch of a row of COLUMNS."""
    pairs = (pair.split("@") for pair in str(row["prefills"] or "").split())
    return BatchShape(
        num_tokens=int(row["num_tokens"]),
        num_decodes=int(row["num_decodes"]),
        decode_kv_tokens=int(row["decode_kv_tokens"]),
        prefills=tuple((int(chunk), int(prefix)) for chunk, prefix in pairs),
        num_sampled=int(row["num_sampled"]),
        decode_kv_growth=int(row["num_decodes"]),
    )


def host_points(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, int, Timing]]:
    """Component of the host's work, sequences of the batch, and its time: `iteration_overhead` is what an iteration
    takes beyond the rank's own time, the others are what that is made of and may be hidden behind a GPU's work."""
    seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in rows:
        sequences = int(row["num_decodes"]) + len(str(row["prefills"]).split())
        seconds["iteration_overhead", sequences].append((row["duration_ms"] - row["compute_ms"]) / 1e3)
        for name in STAGES:
            seconds[name, sequences].append(row[f"{name}_ms"] / 1e3)
    for (name, sequences), values in sorted(seconds.items()):
        middle = max(statistics.median(values), LEAST_S)
        yield name, sequences, Timing(middle, statistics.pstdev(values), len(values))


def _sequences(count: int, prompt: int, vocab_size: int) -> Iterator[Sequence]:
    rng = np.random.default_rng(count * 1_000_003 + prompt)
    for i in range(count):
        yield Sequence(Request(i, 0.0, prompt, OUTPUT), rng.integers(0, vocab_size, prompt).tolist())


class _Watched:
    """An executor whose launches are timed."""

    def __init__(self, executor: Executor, seconds: list[float]) -> None:
        self._executor, self._seconds = executor, seconds
        self.num_blocks, self.hardware = executor.num_blocks, executor.hardware
        self.attention_backend = executor.attention_backend

    def launch(self, step: Step) -> None:
        start = time.perf_counter()
        self._executor.launch(step)
        self._seconds.append(time.perf_counter() - start)

    def wait(self, timeout: float | None) -> Result | None:
        return self._executor.wait(timeout)

    def close(self) -> None:
        self._executor.close()


def _timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """`function`, which also notes how long it took whenever it gives something."""

    def timed(*arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        value = function(*arguments, **named)
        if value is not None:
            seconds.append(time.perf_counter() - start)
        return value

    return timed
