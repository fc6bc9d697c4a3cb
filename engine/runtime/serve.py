"""A workload served by the engine in real time, written down as the simulator writes its runs.

    executor = start(spec)
    run = serve(workload, replica, executor, folder=folder)

Prompts are random tokens and every request runs to the output length that the workload gives it.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from engine.replica_spec import ReplicaSpec
from engine.results.batch_metrics import batch_metrics
from engine.results.metrics import memory_and_steady_use, prefix_use, replica_use, summarize, tbt_percentiles
from engine.results.recorder import Recorder, Run
from engine.results.slo import SLO
from engine.results.tables import Columns, to_arrow
from engine.runtime.driver import Clock, Driver
from engine.runtime.executor import Executor, RankTime, Result
from engine.runtime.sequences import Sequence as TokenSequence
from engine.scheduling.request import Batch, Request
from engine.scheduling.scheduler import Scheduler
from engine.workload.workload import Workload

WARM_UP = (4, 16)  # requests, and output tokens of each


def serve(
    workload: Workload,
    replica: ReplicaSpec,
    executor: Executor,
    *,
    seed: int = 0,
    slos: Sequence[SLO] = (),
    folder: Path | None = None,
    on_progress: Callable[[int], None] | None = None,
    on_batch: Callable[[Batch, Sequence[RankTime]], None] | None = None,
    clock: Clock | None = None,
) -> Run:
    """Serve `workload` as its requests arrive, after a warm-up that is not recorded.

    The executor says how many KV blocks there are; everything else is the replica's.

    With a folder the tables go there, even if the run fails: beside the simulator's `requests.parquet` and
    `iterations.parquet` also `ranks.parquet`, when each rank computed each batch, which `on_batch` is told as well.
    Raises InputError for a request that could never run, before anything is served, and WorkerError when a worker
    fails.
    """
    scheduler, vocab_size = replica.new_scheduler(executor.num_blocks), replica.model.vocab_size
    workload.check_fits(scheduler)
    warm_up(replica.new_scheduler(executor.num_blocks), executor, vocab_size, clock)
    recorder = Recorder(folder, tbt_percentiles(slos), predicted=False)
    ranks = _RankTimes()
    finished = 0

    def on_finished(sequence: TokenSequence) -> None:
        nonlocal finished
        finished += 1
        if on_progress is not None:
            on_progress(finished)

    def on_result(batch: Batch, result: Result) -> None:
        ranks.add(result, driver.origin)
        if on_batch is not None:
            on_batch(batch, result.times)

    driver = Driver(
        scheduler,
        executor,
        recorder,
        clock=clock,
        seed=seed,
        on_finished=on_finished,
        on_result=on_result,
    )
    try:
        driver.run(Sender(workload, vocab_size, seed))
    finally:
        recorder.close()
        if folder is not None:
            import pyarrow.parquet as pq

            pq.write_table(to_arrow(ranks.columns()), folder / "ranks.parquet", compression="zstd")
    requests = recorder.requests()
    of_batches = batch_metrics(recorder, requests)
    summary = summarize(requests, recorder.gaps, slos, len(workload), workload.num_dropped, workload.client)
    summary["workload"] = workload.name
    summary["trace_failures"] = workload.num_failed
    summary["workload_notes"] = workload.notes_on([replica.scheduler])
    summary["router"] = "none"
    busy = recorder.busy_share(summary.get("steady_window_s"))
    stages = [busy.get((0, stage), 0.0) for stage in range(len(driver.busy_s))] if busy else ()
    peak = recorder.peak_kv_blocks.get(0, 0)
    summary["replicas"] = [replica_use(scheduler, driver.busy_s, driver.occupied_s, summary["duration"], peak, stages)]
    summary |= of_batches
    summary |= prefix_use(summary["replicas"]) | memory_and_steady_use(summary["replicas"])
    summary["engine"] = {
        "batches": recorder.num_batches,
        "hardware": executor.hardware,
        "attention_backend": executor.attention_backend,
        "num_gpu_blocks": executor.num_blocks,
        "async_scheduling": replica.async_scheduling,
    }
    return Run(summary, requests, None if folder else recorder.iterations_kept())


class Sender:
    """A workload's requests as sequences of random tokens, sent when its client sends them.

    A request's tokens depend on the seed and its id alone; with a content, on the seed and the content's streams. A
    turn of a conversation goes on from the tokens that were really generated in the turn before.
    """

    def __init__(self, workload: Workload, vocab_size: int, seed: int) -> None:
        self._client = workload.sender()
        self._vocab_size, self._seed = vocab_size, seed
        self._before = {} if workload.after is None else dict(enumerate(workload.after.tolist()))
        self._followed = set(self._before.values())
        self._ended: dict[int, list[int]] = {}  # tokens of the turns that others follow, by id

    @property
    def next_at(self) -> float:
        return self._client.next_at

    def pop(self) -> TokenSequence:
        request = self._client.pop()
        before = self._ended.pop(self._before.get(request.id, -1), [])
        known = [*before] if len(before) <= request.prompt_tokens else []  # else it is a prompt of its own
        return TokenSequence(request, self._tokens(request, known))

    def _tokens(self, request: Request, tokens: list[int]) -> list[int]:
        """The prompt of a request that begins with `tokens`."""
        if request.content is None:
            return tokens + self._draw([request.id], len(tokens), request.prompt_tokens)
        for stream, start, end in request.content.pieces(request.prompt_tokens):
            if end > len(tokens):
                tokens += self._draw([abs(stream), 1 + (stream < 0)], max(start, len(tokens)), end)
        return tokens

    def finished(self, sequence: TokenSequence, time: float) -> None:
        if sequence.request.id in self._followed:
            self._ended[sequence.request.id] = sequence.tokens
        self._client.finished(sequence.request, time)

    def _draw(self, name: list[int], start: int, end: int) -> list[int]:
        """Tokens start..end-1 of an endless row of them."""
        rng = np.random.default_rng([self._seed, *name])
        drawn: list[int] = rng.integers(0, self._vocab_size, end)[start:].tolist()
        return drawn


def _sequences(requests: Iterator[Request], vocab_size: int) -> Iterator[TokenSequence]:
    """The requests with random prompts."""
    for request in requests:
        rng = np.random.default_rng(request.id)
        yield TokenSequence(request, rng.integers(0, vocab_size, request.prompt_tokens).tolist())


def warm_up(scheduler: Scheduler, executor: Executor, vocab_size: int, clock: Clock | None) -> None:
    """Run a few requests of the largest prompts, for what is slow only once: compiling, allocating, page faults."""
    spec = scheduler.spec
    count, output = WARM_UP
    length = spec.max_model_len or 0
    room = scheduler.kv_cache.num_blocks - scheduler.kv_cache.watermark_blocks
    length = min(length, room * spec.block_size // count, spec.max_num_batched_tokens or length)
    output = min(output, length - 1)
    if output < 1:
        return
    requests = [Request(i, 0.0, length - output, output) for i in range(count)]
    driver = Driver(scheduler, executor, Recorder(predicted=False), clock=clock)
    driver.run(_sequences(iter(requests), vocab_size))


class _RankTimes:
    """When each rank computed each batch."""

    def __init__(self) -> None:
        self._batches, self._ranks = array("q"), array("i")
        self._starts, self._durations = array("d"), array("d")

    def add(self, result: Result, origin: float) -> None:
        for time in result.times:
            self._batches.append(result.number - 1)
            self._ranks.append(time.rank)
            self._starts.append(time.start - origin)
            self._durations.append(time.end - time.start)

    def columns(self) -> Columns:
        """batch (its place in the run), rank, start_s and duration_s of its work."""
        columns = {
            "batch": self._batches,
            "rank": self._ranks,
            "start_s": self._starts,
            "duration_s": self._durations,
        }
        return {name: np.array(column) for name, column in columns.items()}
