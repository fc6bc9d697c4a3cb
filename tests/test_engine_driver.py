"""The engine's loop against fake workers in virtual time: what it decides, what it records, and its replay."""

from typing import Any

import pandas as pd
import pytest
from fake_workers import LENGTHS, expected, serve
from hypothesis import given
from hypothesis import strategies as st
from replaying import assert_same_times, composition, replay

from engine.errors import InputError
from engine.runtime.executor import SamplingParams, WorkerError
from engine.scheduling.policies import POLICIES
from engine.scheduling.scheduler import Scheduler

CASES = st.tuples(LENGTHS, st.sampled_from(sorted(POLICIES)), st.integers(1, 3), st.integers(14, 30))


def settings_of(policy: str) -> dict[str, Any]:
    return {"max_num_batched_tokens": 64} if policy == "vllm_v0" else {}


@given(CASES)
def test_every_request_gets_its_own_tokens(case: tuple[Any, str, int, int]) -> None:
    lengths, policy, stages, num_blocks = case
    served = serve(lengths, policy, stages, 64 if policy in ("orca", "request_level") else num_blocks,
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
    if policy in ("orca", "request_level"):
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
    num_blocks = 64 if policy in ("orca", "request_level") else num_blocks
    served = serve(lengths, policy, stages, num_blocks, spec=settings_of(policy))
    assert served.batches
    scheduler = Scheduler(served.driver.scheduler.spec, num_blocks, max_in_flight=stages)
    simulated, recorder = replay(lengths, served.recorder, scheduler)
    assert composition(simulated) == composition(served.batches)
    assert_same_times(recorder, served.recorder)


@given(LENGTHS, st.sampled_from(sorted(POLICIES)), st.integers(14, 30))
def test_the_simulator_replays_a_run_that_was_scheduled_ahead(lengths: Any, policy: str, num_blocks: int) -> None:
    num_blocks = 64 if policy in ("orca", "request_level") else num_blocks
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
    with pytest.raises(InputError, match="schedules nothing although 2 requests are not finished"):
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


def test_a_callback_may_abort_whoever_it_sees() -> None:
    served = serve([(0.0, 4, 5), (0.0, 4, 2), (0.0, 4, 5)], run=False)
    driver, seen = served.driver, []

    def on_token(sequence: Any, token: int) -> None:
        seen.append(sequence.request.id)
        if sequence.request.id == 0 and seen.count(0) == 2:
            driver.abort(0)
            driver.abort(1)  # whose last token comes in this very batch
        if seen.count(2) == 5:
            driver.abort(2)  # too late

    driver.on_token = on_token
    driver.run(served.sequences)
    assert [sequence.finish_reason for sequence in served.sequences] == ["abort", "abort", "length"]
    assert seen.count(0) == 2 and seen.count(1) == 1 and seen.count(2) == 5
    assert driver.scheduler.kv_cache.num_used == 0


def test_a_second_request_of_one_id_is_refused() -> None:
    served = serve([(0.0, 4, 3)], run=False)
    served.driver.submit(served.sequences[0])
    with pytest.raises(InputError, match="request 0 is here already"):
        served.driver.submit(served.sequences[0])
