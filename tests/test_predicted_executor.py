"""The engine's own driver, its steps as long as a predictor says, is the simulator's replica: batch for batch, bit for
bit."""

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_examples import random_examples
from random_runs import deployment, rows, with_async, workloads

from engine.results.recorder import Recorder, Run
from engine.runtime.driver import Clock, Driver, RealClock, VirtualClock
from engine.runtime.sequences import Sequence
from engine.scheduling.policies import POLICIES
from engine.scheduling.request import BatchShape, Request
from engine.workload.workload import Workload
from simulator.cluster import Deployment, simulate
from simulator.predicted_executor import PredictedExecutor
from simulator.predictor.base import RuntimePredictor


def driver_of(kind: Deployment, recorder: Recorder, clock: Clock) -> Driver:
    stages, window = kind.parallel.pipeline_parallel_size, kind.model.sliding_window
    executor = PredictedExecutor(kind.predictor, kind.num_kv_blocks, stages, window, clock)
    return Driver(kind.new_scheduler(), executor, recorder, clock=clock)


def drive(workload: Workload, kind: Deployment) -> Run:
    recorder = Recorder()
    driver = driver_of(kind, recorder, VirtualClock())
    driver.run(Sequence(request, [0] * request.prompt_tokens) for request in workload.requests())
    recorder.close()
    summary = {"busy_s": driver.busy_s, "occupied_s": driver.occupied_s}
    summary["recomputed_tokens"] = driver.scheduler.recomputed_tokens
    return Run(summary, recorder.requests(), recorder.iterations_kept())


@random_examples(100)
@given(
    requests=workloads,
    policy=st.sampled_from([*sorted(POLICIES), "dynamic"]),
    stages=st.sampled_from([1, 2, 3]),
    blocks=st.integers(21, 60),
    window=st.sampled_from([None, 16]),
    budget=st.sampled_from([6, 9, 24]),
    ahead=st.booleans(),
)
def test_the_driver_in_virtual_time_is_the_replica(  # type: ignore[no-untyped-def]
    requests, policy, stages, blocks, window, budget, ahead
) -> None:
    gaps, prompts, outputs = map(np.array, zip(*requests, strict=True))
    workload = Workload("random", np.cumsum(gaps).astype(float), prompts, outputs, 0)
    kind = with_async(deployment(policy, stages, blocks, window, budget=budget), ahead)
    driven, simulated = drive(workload, kind), simulate(workload, [kind])
    assert len(driven.requests["request_id"]) == len(workload)
    orders = [np.argsort(run.requests["request_id"]) for run in (driven, simulated)]
    for name, column in simulated.requests.items():
        np.testing.assert_array_equal(driven.requests[name][orders[0]], column[orders[1]], err_msg=name)
    assert rows(driven) == rows(simulated)
    (replica,) = simulated.summary["replicas"]
    assert driven.summary["recomputed_tokens"] == replica["recomputed_tokens"]
    assert driven.summary["occupied_s"] == pytest.approx(replica["occupied_s"], rel=1e-9)


def test_there_are_preemptions_in_such_runs() -> None:
    workload = Workload("burst", np.zeros(12), np.full(12, 20), np.full(12, 30), 0)
    for ahead in (False, True):
        run = drive(workload, with_async(deployment("sarathi", 1, 21), ahead))
        assert run.summary["recomputed_tokens"] > 0


class Steady(RuntimePredictor):
    def stage_time(self, shape: BatchShape, stage: int) -> float:
        return 0.02


def test_in_real_time_it_takes_as_long_as_predicted() -> None:
    base = deployment("sarathi", 1, 60)
    kind = replace(base, predictor=Steady())
    recorder = Recorder()
    driver = driver_of(kind, recorder, RealClock())
    started = time.perf_counter()
    driver.run(Sequence(Request(i, 0.0, 4, 10), [0] * 4) for i in range(2))
    took = time.perf_counter() - started
    recorder.close()
    assert took >= 0.2  # ten batches; there is no bound above, for the machine may be busy
    assert recorder.iterations_kept()["duration_s"].tolist() == [0.02] * 10
    np.testing.assert_allclose(recorder.requests()["last_token_s"], 0.2, rtol=1e-9)


def test_requests_are_submitted_and_aborted_between_steps() -> None:
    """As a server would: three requests, of which one is let go while it runs and one while it waits."""
    kind = deployment("sarathi", 1, 60, seqs=2)
    for ahead in (False, True):
        recorder = Recorder()
        driver = driver_of(with_async(kind, ahead), recorder, VirtualClock())
        tokens: dict[int, int] = dict.fromkeys(range(4), 0)

        def count(sequence: Sequence, token: int, tokens: dict[int, int] = tokens) -> None:
            tokens[sequence.request.id] += 1

        driver.on_token = count
        sequences = [Sequence(Request(i, 0.0, 5, 10), [0] * 5) for i in range(3)]
        for sequence in sequences:
            driver.submit(sequence)
        for _ in range(4):
            assert driver.step()
        assert (tokens[0], tokens[2]) == (4, 0) and len(driver.scheduler.waiting) == 1
        driver.abort(0)
        assert driver.unfinished == 2 and sequences[0].finish_reason == "abort"
        driver.step()
        assert sequences[2].request.row is not None  # it has the seat of the one that was let go
        driver.submit(Sequence(Request(3, driver.now, 5, 10), [0] * 5))
        driver.abort(3)
        driver.abort(3)  # unknown by now
        while driver.step():
            pass
        recorder.close()
        assert tokens == {0: 4, 1: 10, 2: 10, 3: 0}
        assert sorted(recorder.requests()["request_id"].tolist()) == [1, 2]
        assert recorder.requests()["output_tokens"].tolist() == [10, 10]
        scheduler = driver.scheduler
        assert not (driver.unfinished or scheduler.running or scheduler.waiting or scheduler.kv_cache.num_used)
        scheduler.kv_cache.check_integrity([])


@random_examples(100)
@given(
    jobs=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=8),
    policy=st.sampled_from(sorted(POLICIES)),
    stages=st.sampled_from([1, 2]),
    ahead=st.booleans(),
    aborts=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 7)), max_size=5),
)
def test_whatever_is_aborted_the_others_get_all_their_tokens(jobs, policy, stages, ahead, aborts) -> None:  # type: ignore[no-untyped-def]
    kind = deployment(policy, stages, 40)
    recorder = Recorder()
    driver = driver_of(with_async(kind, ahead), recorder, VirtualClock())
    for i, (prompt, output) in enumerate(jobs):
        driver.submit(Sequence(Request(i, 0.0, prompt, output), [0] * prompt))
    finished: set[int] = set()
    driver.on_finished = lambda sequence: finished.add(sequence.request.id)
    gone: set[int] = set()
    number = 0
    while driver.unfinished:
        for at, who in aborts:
            if at == number and who < len(jobs) and who not in finished:
                driver.abort(who)
                gone.add(who)
        if not driver.step():
            break
        number += 1
        running = driver.scheduler.running
        driver.scheduler.kv_cache.check_integrity(running)
        assert len({request.row for request in running}) == len(running)  # a row each
    recorder.close()
    table = recorder.requests()
    outputs = dict(zip(table["request_id"].tolist(), table["output_tokens"].tolist(), strict=True)) if table else {}
    assert outputs == {i: output for i, (_, output) in enumerate(jobs) if i not in gone}
    while driver.step():  # what was in flight when the last was aborted
        pass
    assert driver.scheduler.kv_cache.num_used == 0
