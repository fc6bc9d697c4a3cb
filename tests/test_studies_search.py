"""The capacity search against queues whose capacity is known, the verdicts of trials, and confirming on 'hardware'."""

from dataclasses import replace
from itertools import repeat
from math import inf, log2
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_examples import random_examples

from engine.errors import InputError
from engine.results.metric_table import METRICS
from engine.results.slo import SLO
from engine.results.tables import Array
from engine.specs import SchedulerSpec
from engine.workload.workload import Workload, WorkloadSpec, make_workload
from simulator.cluster import Deployment, deploy, simulate
from simulator.predictor.base import FixedTable
from studies.capacity.search import Capacity, bracket, confirm, find_capacity, gpu_hours
from studies.capacity.trial import Trial, at_rate, guess, hopeless, judged, simulated_trial, time_limit

SECONDS = 0.01  # of a batch of one token


def one_server(**limits: Any) -> Deployment:
    """A replica that computes one token at a time, each in SECONDS."""
    spec = {"max_num_seqs": 1, "max_num_batched_tokens": 1, "max_model_len": 2048, "watermark": 0.0, **limits}
    return deploy(
        "microsoft/phi-2", "a100", scheduler=SchedulerSpec(**spec), num_gpu_blocks_override=10_000,
        predictor=FixedTable([[0.0, SECONDS]]),
    )  # fmt: skip


def waits(arrived: Array) -> Array:
    """Waiting times at one server of constant service, first come first served (Lindley 1952)."""
    wait = np.zeros(len(arrived))
    for i in range(1, len(arrived)):
        wait[i] = max(0.0, wait[i - 1] + SECONDS - (arrived[i] - arrived[i - 1]))
    return wait


def trial(rate: float, met: bool, margin: float = 1.0) -> Trial:
    return Trial(rate, met, margin, "p99_tbt<=0.1s", {"duration": 10.0, "request_throughput": 7.0})


# -- known capacities ------------------------------------------------------------------------------------------------


def test_the_capacity_of_an_m_d_1_queue() -> None:
    """Mean wait in M/D/1 is load * service / (2 (1 - load)): 7.5 ms at a load of 0.6, so 60 requests/s."""
    spec = WorkloadSpec(lengths="fixed", input_len="1", output_len="1", request_rate=1.0, num_prompts=12_000)
    slos = [SLO.parse("mean_scheduling_delay<=7.5ms")]
    server = one_server()
    found = find_capacity(lambda rate: simulated_trial(at_rate(spec, rate), [server], slos, rate), 30.0, 0.01)
    assert found.outcome == "found"
    assert found.qps == pytest.approx(60.0, rel=0.05)
    assert found.binding == "mean_scheduling_delay<=0.0075s"
    # and of these very arrivals, by another's arithmetic
    assert waits(at_rate(spec, found.qps).arrived_at).mean() <= 7.5e-3
    assert waits(at_rate(spec, found.qps * 1.0101).arrived_at).mean() > 7.5e-3


@given(st.floats(1e-2, 1e2), st.sampled_from([0.1, 0.025, 0.005]))
def test_a_threshold_is_found_within_the_tolerance(capacity: float, tolerance: float) -> None:
    found = find_capacity(lambda rate: trial(rate, rate <= capacity), 1.0, tolerance)
    assert found.outcome == "found"
    assert found.qps <= capacity < found.qps * (1 + tolerance) * (1 + 1e-9)
    assert found.best is not None and found.best.rate == found.qps
    assert len(found.trials) <= 5 + log2(1000 / tolerance) + 2
    assert len({each.rate for each in found.trials}) == len(found.trials)


@given(st.floats(0.5, 2.0), st.integers(0, 1000))
def test_a_noisy_verdict_gives_a_capacity_within_the_noise(capacity: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    found = find_capacity(lambda rate: trial(rate, rate <= capacity * rng.uniform(0.9, 1.1)), 1.0)
    assert 0.85 * capacity <= found.qps <= 1.15 * capacity


def test_slos_that_nothing_meets_and_that_everything_meets_are_both_said() -> None:
    none = find_capacity(lambda rate: trial(rate, False), 5.0)
    assert (none.outcome, none.qps) == ("none", 0.0)
    assert "no rate meets p99_tbt<=0.1s, not even one request at a time" in none.describe()
    some = find_capacity(lambda rate: trial(rate, rate <= 3.0), 5.0)
    assert " conversations/s within the SLOs" in some.describe("conversations")
    every = find_capacity(lambda rate: trial(rate, True), 5.0)
    assert (every.outcome, every.qps) == ("all", 7.0)  # the throughput of all requests at once
    assert "even all requests at once" in every.describe()
    assert max(len(none.trials), len(every.trials)) <= 4


def test_a_crash_is_no_missed_slo() -> None:
    def run(rate: float) -> Trial:
        if rate > 1.5:
            raise ZeroDivisionError("in a policy")
        return trial(rate, True)

    with pytest.raises(ZeroDivisionError):
        find_capacity(run, 1.0)


def test_a_wrong_tolerance_is_told() -> None:
    with pytest.raises(InputError, match=r"tolerance 0\.0"):
        find_capacity(lambda rate: trial(rate, True), 1.0, 0.0)


@given(st.floats(1e-3, 1e3), st.sampled_from([1.05, 1.5, 2.0]), st.sampled_from([0.5, 0.05, 0.005]))
def test_a_bracket_is_as_tight_as_its_tolerance_or_open(edge: float, step: float, tolerance: float) -> None:
    tried: list[float] = []

    def met(rate: float) -> bool:
        tried.append(rate)
        return rate <= edge

    low, high = bracket(met, 1.0, steps=repeat(step), far=50.0, tolerance=tolerance)
    assert len(set(tried)) == len(tried) and min(tried) >= 1 / 50 and max(tried) <= 50
    if low is None or high is None:
        assert (low, high) == ((50.0, None) if edge >= 50 else (None, 1 / 50))
    else:
        assert low <= edge < high <= low * (1 + tolerance) * (1 + 1e-9)
        assert low in tried and high in tried
    few = bracket(met, 1.0, steps=repeat(step), far=50.0, tolerance=tolerance, most=3)
    assert few.low is None or few.low <= edge
    assert few.high is None or few.high > edge


@pytest.mark.parametrize("edge", [1e-9, 0.97, 1.02, 1e9])
def test_a_bracket_tries_no_more_rates_than_it_may(edge: float) -> None:
    tried: list[float] = []

    def met(rate: float) -> bool:
        tried.append(rate)
        return rate <= edge

    bracket(met, 1.0, steps=repeat(1.01), far=9.0, tolerance=1e-6, most=7)
    assert len(tried) == 7


# -- verdicts --------------------------------------------------------------------------------------------------------

SLOS = st.lists(
    st.tuples(
        st.sampled_from(["p50", "p90", "p99", "mean", "max"]),
        st.sampled_from(list(METRICS)),
        st.floats(0.005, 2.0),
    ).map(lambda parts: SLO(parts[1], parts[0], parts[2])),
    min_size=1, max_size=3,
)  # fmt: skip


@random_examples(60)
@given(
    SLOS,
    st.lists(st.tuples(st.floats(0, 0.3), st.integers(1, 30), st.integers(1, 12)), min_size=2, max_size=40),
)
def test_a_trial_that_is_given_up_would_have_failed(slos: list[SLO], rows: list[tuple[float, int, int]]) -> None:
    gaps, prompts, outputs = (np.array(column) for column in zip(*rows, strict=True))
    workload = Workload("random", np.cumsum(gaps).astype(float), prompts, outputs, 0)
    server = one_server(max_num_seqs=4, max_num_batched_tokens=16)
    server = replace(server, predictor=FixedTable([[0.01 + 0.001 * i for i in range(20)]]))
    whole = simulate(workload, [server], slos=slos).summary
    early = simulated_trial(workload, [server], slos, 1.0)
    assert early.met == all(each["met"] for each in whole["slos"])
    if "stopped_early" in early.summary:
        missed = {each["slo"] for each in whole["slos"] if not each["met"]}
        assert early.summary["stopped_early"] in missed
        assert early.margin == inf


def test_a_trial_ends_at_its_time_limit_and_is_judged_by_what_finished() -> None:
    spec = WorkloadSpec(lengths="fixed", input_len="1", output_len="1", request_rate=1.0, num_prompts=3000)
    slos, server, rate = [SLO.parse("p50_scheduling_delay<=1")], [one_server()], 105.0
    whole = simulated_trial(at_rate(spec, rate), server, slos, rate)  # the queue grows by 5 requests/s
    stop = time_limit(2.0, hopeless(slos, at_rate(spec, rate)))
    cut = judged(simulate(at_rate(spec, rate), server, slos=slos, stop=stop).summary, rate)
    assert cut.summary["duration"] == pytest.approx(2.0, abs=0.05) and cut.met
    assert cut.summary["completed"] < 0.1 * whole.summary["completed"]


def test_hopeless_trials_are_cut_short() -> None:
    spec = WorkloadSpec(lengths="fixed", input_len="1", output_len="4", request_rate=1.0, num_prompts=4000)
    server, slos = one_server(), [SLO.parse("p50_scheduling_delay<=0.5")]
    overloaded = at_rate(spec, 100.0)  # four times what it sustains
    early = simulated_trial(overloaded, [server], slos, 100.0)
    whole = simulate(overloaded, [server], slos=slos)
    assert not early.met and early.summary["stopped_early"] == "p50_scheduling_delay<=0.5s"
    assert early.summary["duration"] < 0.6 * whole.summary["duration"]


def test_the_same_requests_come_at_every_rate() -> None:
    spec = WorkloadSpec(request_rate=1.0, num_prompts=50)
    slow, fast = at_rate(spec, 1.0), at_rate(spec, 4.0)
    np.testing.assert_array_equal(slow.prompt_tokens, fast.prompt_tokens)
    np.testing.assert_allclose(slow.arrived_at, 4 * fast.arrived_at)
    gamma = at_rate(replace(spec, arrival="gamma", arrival_cv=3.0), 2.0)
    assert np.diff(gamma.arrived_at).std() > 2 * np.diff(at_rate(spec, 2.0).arrived_at).std()


def test_the_guess_lies_near_the_capacity() -> None:
    spec = WorkloadSpec(lengths="fixed", input_len="1", output_len="4", request_rate=1.0, num_prompts=1000)
    assert guess(spec, [one_server()]) == pytest.approx(0.7 * 25, rel=0.02)


def test_a_verdict_names_what_binds() -> None:
    spec = WorkloadSpec(lengths="fixed", input_len="1", output_len="4", request_rate=5.0, num_prompts=200)
    slos = [SLO.parse("p99_e2e<=1"), SLO.parse("p50_tbt<=0.009")]
    run = simulate(make_workload(spec), [one_server()], slos=slos)
    found = judged(run.summary, 5.0)
    assert not found.met
    assert found.binding == "p50_tbt<=0.009s"
    assert found.margin == pytest.approx(SECONDS / 0.009, rel=1e-3)
    with pytest.raises(InputError, match="no SLO to search by"):
        judged(simulate(make_workload(spec), [one_server()]).summary, 5.0)


def test_a_capacity_is_plain_json() -> None:
    found = find_capacity(lambda rate: trial(rate, rate < 3, inf if rate >= 3 else 0.5), 1.0).to_json()
    assert found["max_qps_under_slo"] < 3
    assert found["trials"][1]["margin"] in (0.5, None)
    empty = Capacity("none", 0.0, "x", 0.1, ())
    assert empty.best is None


# -- confirming ------------------------------------------------------------------------------------------------------


def test_a_right_prediction_takes_two_runs() -> None:
    found = confirm(lambda rate: trial(rate, rate <= 2.03), 2.0)
    assert [round(each.rate, 3) for each in found.trials] == [2.0, 2.1]
    assert (found.qps, found.missed_at) == (2.0, pytest.approx(2.1))
    assert found.settled
    assert found.error == 0.0
    below = confirm(lambda rate: trial(rate, rate <= 1.95), 2.0)
    assert [round(each.rate, 3) for each in below.trials] == [2.0, 1.905]
    assert below.error == pytest.approx(0.05)


@given(st.floats(0.26, 3.9))
def test_a_wrong_prediction_is_followed_to_the_capacity(capacity: float) -> None:
    found = confirm(lambda rate: trial(rate, rate <= capacity), 1.0)
    assert found.qps <= capacity
    assert found.missed_at is not None and found.missed_at > capacity
    assert found.missed_at <= found.qps * 1.0501
    assert len(found.trials) <= 12


def test_hardware_that_meets_nothing_has_no_capacity() -> None:
    found = confirm(lambda rate: trial(rate, False), 1.0)
    assert found.qps == 0.0 and found.error is None
    assert found.to_json()["confirmed_qps"] == 0.0 and not found.settled
    assert min(each.rate for each in found.trials) == 0.25  # a run at a lower rate takes that much longer


def test_a_capacity_that_was_not_reached_is_not_settled() -> None:
    found = confirm(lambda rate: trial(rate, True), 1.0)
    assert not found.settled and found.missed_at is None and found.qps == 4


def test_gpu_hours_count_every_gpu() -> None:
    assert gpu_hours([trial(1.0, True), trial(2.0, False)], 4) == pytest.approx(20 * 4 / 3600)
