"""Metrics: hand-computed examples, naive numpy on random ones, and whether the saturation verdict can be trusted."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_examples import random_examples

from engine.results.metrics import (
    SKETCH_K,
    Columns,
    Gaps,
    describe,
    grouped_percentile,
    latencies,
    meets,
    saturation,
    statistics,
    summarize,
    tbt_percentiles,
)
from engine.results.slo import SLO


def columns(rows: list[tuple[float, float, list[float]]], prompt: int = 10) -> tuple[Columns, Gaps]:
    """What a Recorder would give for requests of (arrival, first scheduled, times of the output tokens)."""
    gaps = Gaps()
    longest, p50 = [], []
    for _, _, tokens in rows:
        own = np.array([after - before for before, after in pairwise(tokens)])
        gaps.add(own)
        longest.append(own.max() if len(own) else np.nan)
        p50.append(np.median(own) if len(own) else np.nan)
    table: Columns = {
        "arrived_s": np.array([arrived for arrived, _, _ in rows]),
        "scheduled_s": np.array([scheduled for _, scheduled, _ in rows]),
        "first_token_s": np.array([tokens[0] for _, _, tokens in rows]),
        "last_token_s": np.array([tokens[-1] for _, _, tokens in rows]),
        "prompt_tokens": np.full(len(rows), prompt),
        "output_tokens": np.array([len(tokens) for _, _, tokens in rows]),
        "preemptions": np.zeros(len(rows), dtype=int),
        "max_tbt_s": np.array(longest),
        "p50_tbt_s": np.array(p50),
    }
    return table, gaps


# Two requests: A arrives at 0, runs from 1, tokens at 2, 3, 5; B arrives at 1, runs from 1.5, its only token at 4.
TWO = [(0.0, 1.0, [2.0, 3.0, 5.0]), (1.0, 1.5, [4.0])]


def test_each_latency_by_hand() -> None:
    table, _ = columns(TWO)
    values = latencies(table)
    assert values["ttft"].tolist() == [2.0, 3.0]
    assert values["e2e"].tolist() == [5.0, 3.0]
    assert values["scheduling_delay"].tolist() == [1.0, 0.5]
    assert values["tpot"][0] == 1.5  # (5 - 2) / 2
    assert np.isnan(values["tpot"][1])  # one token has no time per further token
    assert values["normalized_latency"].tolist() == [5 / 3, 3.0]
    assert set(values) == {"ttft", "e2e", "scheduling_delay", "tpot", "normalized_latency"}


def test_the_summary_of_two_requests_by_hand() -> None:
    table, gaps = columns(TWO)
    slos = [SLO.parse("p50_ttft<=2.2"), SLO.parse("max_tbt<=2"), SLO.parse("mean_e2e<=4")]
    summary = summarize(table, gaps, slos, num_arrived=3, num_dropped=4)
    expected = {
        "duration": 5.0,  # from the first arrival to the last token
        "completed": 2,
        "failed": 1,
        "dropped": 4,
        "total_input_tokens": 20,
        "total_output_tokens": 4,
        "request_throughput": 0.4,
        "output_throughput": 0.8,
        "total_token_throughput": 4.8,
        "mean_ttft_ms": 2500.0,
        "median_ttft_ms": 2500.0,
        "p90_ttft_ms": 2900.0,
        "p99_ttft_ms": 2990.0,
        "std_ttft_ms": 500.0,
        "mean_tpot_ms": 1500.0,  # of A alone
        "mean_itl_ms": 1500.0,  # gaps 1 and 2
        "p90_itl_ms": 1900.0,
        "max_itl_ms": 2000.0,
        "std_itl_ms": 500.0,
        "mean_e2el_ms": 4000.0,
        "mean_scheduling_delay_ms": 750.0,
        "median_normalized_latency_ms": 1e3 * (5 / 3 + 3) / 2,
        "preemptions": 0,
        "requests_meeting_slos": 0,  # A: E2E 5 > 4; B: TTFT 3 > 2.2
        "request_goodput": 0.0,
    }
    assert {key: summary[key] for key in expected} == pytest.approx(expected)
    assert [(slo["value_s"], slo["met"]) for slo in summary["slos"]] == [(2.5, False), (2.0, True), (4.0, True)]
    assert "p50_ttft<=2.2s is missed: 2.5 s" in describe(summary)


def test_a_run_begins_with_its_first_arrival() -> None:
    late = [(arrived + 7, scheduled + 7, [time + 7 for time in tokens]) for arrived, scheduled, tokens in TWO]
    now, then = (summarize(*columns(rows), [], num_arrived=2, num_dropped=0) for rows in (TWO, late))
    numbers = [key for key, value in now.items() if isinstance(value, int | float)]
    assert len(numbers) > 30
    assert {key: now[key] for key in numbers} == pytest.approx({key: then[key] for key in numbers})


def test_a_run_of_one_token_requests_has_no_tpot_and_no_gaps() -> None:
    table, gaps = columns([(0.0, 0.0, [1.0]), (1.0, 1.0, [3.0])])
    summary = summarize(table, gaps, [SLO.parse("p50_tbt<=0.001")], num_arrived=2, num_dropped=0)
    assert not [key for key in summary if "tpot" in key or "itl" in key]
    assert summary["slos"][0] == {"slo": "p50_tbt<=0.001s", "value_s": None, "met": True}
    assert describe(summary)[1] == "p50_tbt<=0.001s is met: there is no such value"


@pytest.mark.parametrize("text", ["p99.0_ttft<=0.001", "p090_ttft<=0.001", "p99.90_e2e<=0.001"])
def test_an_slo_is_judged_however_its_percentile_is_written(text: str) -> None:
    table, gaps = columns(TWO)
    (verdict,) = summarize(table, gaps, [SLO.parse(text)], num_arrived=2, num_dropped=0)["slos"]
    assert verdict["value_s"] is not None
    assert not verdict["met"]


def test_a_summary_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no request finished"):
        summarize({}, Gaps(), [], num_arrived=3, num_dropped=0)


# -- goodput -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slos", "good"),
    [
        ([], [True, True]),
        (["p99_ttft<=2"], [True, False]),  # at the threshold is within it
        (["mean_ttft<=2"], [True, False]),  # a request has one TTFT, whatever the statistic
        (["p99_ttft<=1.99"], [False, False]),
        (["max_tbt<=1.9"], [False, True]),  # B has no gap to object to
        (["p50_tbt<=1.5"], [True, True]),
        (["p50_tbt<=1.4"], [False, True]),
        (["mean_tbt<=1.49"], [False, True]),
        (["mean_tbt<=1.5"], [True, True]),
        (["p90_tpot<=1.4"], [False, True]),
        (["p90_e2e<=4"], [False, True]),
        (["p50_scheduling_delay<=0.7"], [False, True]),
        (["max_normalized_latency<=2"], [True, False]),
        (["p99_ttft<=2", "p90_e2e<=4"], [False, False]),
    ],
)
def test_which_requests_meet_the_slos(slos: list[str], good: list[bool]) -> None:
    table, _ = columns(TWO)
    assert meets(table, [SLO.parse(text) for text in slos]).tolist() == good


def test_goodput_counts_requests_not_slos() -> None:
    rows = [(float(i), float(i), [i + 0.1 * (1 + i % 5), i + 2.0]) for i in range(20)]  # TTFT 0.1 ... 0.5
    table, gaps = columns(rows)
    summary = summarize(table, gaps, [SLO.parse("p99_ttft<=0.35")], num_arrived=20, num_dropped=0)
    assert summary["requests_meeting_slos"] == 12
    assert summary["request_goodput"] == pytest.approx(12 / 21)
    assert not summary["slos"][0]["met"]


def test_the_recorder_is_asked_for_the_percentiles_that_goodput_needs() -> None:
    slos = [SLO.parse(text) for text in ("p99_tbt<=1", "p50_itl<=1", "p90_ttft<=1", "mean_tbt<=1", "p99_tbt<=2")]
    assert tbt_percentiles(slos) == (50.0, 99.0)


# -- percentiles -------------------------------------------------------------------------------------------------------

floats = st.floats(-1e6, 1e6, allow_nan=False, width=32)


@random_examples(200)
@given(
    groups=st.lists(st.lists(floats, max_size=30), min_size=1, max_size=12),
    percentiles=st.lists(st.sampled_from([0.0, 1.0, 50.0, 90.0, 99.0, 99.9, 100.0]), min_size=1, max_size=4),
)
def test_percentiles_of_groups_are_those_of_numpy(groups: list[list[float]], percentiles: list[float]) -> None:
    values = np.array([value for group in groups for value in group])
    before = values.copy()
    results = grouped_percentile(values, np.array([len(group) for group in groups]), percentiles)
    assert len(results) == len(percentiles)
    for result, percentile in zip(results, percentiles, strict=True):
        naive = [np.percentile(group, percentile) if group else np.nan for group in groups]
        np.testing.assert_allclose(result, naive, rtol=1e-12, atol=1e-9)
    np.testing.assert_array_equal(values, before)


@random_examples(100)
@given(blocks=st.lists(st.lists(st.floats(0, 1e3, width=32), max_size=40), min_size=1, max_size=6))
def test_gaps_kept_exactly_have_numpys_statistics(blocks: list[list[float]]) -> None:
    gaps = Gaps()
    for block in blocks:
        gaps.add(np.array(block))
    every = np.array([value for block in blocks for value in block])
    table = gaps.statistics([50.0, 99.9])
    if not len(every):
        assert table == {}
        return
    naive = {"mean": every.mean(), "max": every.max(), "p50": np.median(every), "p99.9": np.percentile(every, 99.9)}
    assert {key: table[key] for key in naive} == pytest.approx(naive, rel=1e-9, abs=1e-12)
    assert table["std"] == pytest.approx(every.std(), rel=1e-6, abs=1e-5 * (1 + every.max()))
    assert gaps.count == len(every)
    assert gaps.method == "exact"


def test_statistics_names_its_percentiles() -> None:
    assert statistics(np.array([1.0, 3.0]), [50.0, 99.9]) == pytest.approx(
        {"mean": 2.0, "std": 1.0, "max": 3.0, "p50": 2.0, "p99.9": 2.998}
    )
    assert statistics(np.array([]), [50.0]) == {}


@pytest.mark.parametrize("seed", range(4))
def test_the_sketch_keeps_percentiles_within_the_rank_error_it_states(seed: int) -> None:
    rng = np.random.default_rng(seed)
    every = rng.lognormal(-3, 1.5, 400_000)
    exact, sketch = Gaps(), Gaps(exact=False)
    for block in np.array_split(every, 37):
        exact.add(block)
        sketch.add(block)
    percentiles = [50.0, 90.0, 95.0, 99.0, 99.9]
    ordered = np.sort(every)
    table, truth = sketch.statistics(percentiles), exact.statistics(percentiles)
    for percentile in percentiles:
        rank = np.searchsorted(ordered, table[f"p{percentile:g}"]) / len(ordered)
        assert abs(rank - percentile / 100) < 0.001  # "within 0.1 %"
    assert [table[key] for key in ("mean", "std", "max")] == pytest.approx(
        [every.mean(), every.std(), every.max()], rel=1e-9
    )
    assert truth["p50"] == np.median(every)
    assert SKETCH_K == 4096
    assert "KLL" in sketch.method
    stated = float(sketch.method.split()[-1].removesuffix("%")) / 100
    assert stated <= 0.001


# -- saturation --------------------------------------------------------------------------------------------------------


def one_server(load: float, count: int, seed: int, cv: float = 1.0) -> Columns:
    """Arrivals and starts of service at one server with service time 1 (Lindley's recursion, unrolled)."""
    rng = np.random.default_rng([seed, count])
    arrived = np.cumsum(rng.gamma(1 / cv**2, cv**2, count)) / load
    begun = np.arange(count)
    begun = begun + np.maximum.accumulate(arrived - begun)
    return {"arrived_s": arrived, "scheduled_s": begun, "last_token_s": begun + 1.0}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("load", "growing"), [(0.7, False), (0.9, False), (1.1, True), (1.5, True)])
def test_a_server_is_saturated_above_its_capacity_only(load: float, growing: bool, seed: int) -> None:
    verdict = saturation(one_server(load, 5000, seed))
    assert verdict["growing"] is growing
    assert verdict["verdict"].startswith("saturated" if growing else "sustained")
    if growing:  # of every arrival, 1 - 1/load is not carried
        assert verdict["growth"] == pytest.approx(1 - 1 / load, abs=0.04)


def alarms(load: float, count: int, seeds: int = 200, cv: float = 1.0) -> float:
    return float(np.mean([bool(saturation(one_server(load, count, seed, cv))["growing"]) for seed in range(seeds)]))


@pytest.mark.parametrize(("load", "count"), [(0.5, 300), (0.7, 300), (0.9, 1000), (0.9, 2000)])
def test_a_sustained_load_is_seldom_called_saturated(load: float, count: int) -> None:
    assert alarms(load, count) <= 0.05


@pytest.mark.parametrize(
    ("load", "count", "cv"), [(0.9, 300, 1.0), (0.95, 1000, 1.0), (0.7, 300, 3.0), (0.9, 2000, 3.0)]
)
def test_noise_is_not_taken_for_growth(load: float, count: int, cv: float) -> None:
    assert alarms(load, count, cv=cv) <= 0.055


@pytest.mark.parametrize(("load", "count", "least"), [(1.1, 1000, 0.85), (1.2, 300, 0.85), (1.5, 300, 0.97)])
def test_an_overload_is_seldom_missed(load: float, count: int, least: float) -> None:
    assert alarms(load, count) >= least


def test_a_slight_overload_shows_in_most_long_runs() -> None:
    assert alarms(1.03, 5000) >= 0.6
    assert alarms(1.05, 5000) >= 0.85


def test_evenly_spaced_arrivals_show_the_slightest_overload() -> None:
    assert alarms(1.05, 1000, seeds=3, cv=0.01) == 1
    assert alarms(0.95, 1000, seeds=3, cv=0.01) == 0


def test_no_verdict_without_a_trend_to_judge() -> None:
    burst = {"arrived_s": np.zeros(100), "scheduled_s": np.arange(100.0)}
    assert saturation(burst)["growing"] is None
    assert "at once" in saturation(burst)["verdict"]
    assert saturation(one_server(2.0, 20, 0))["growing"] is None
    assert "too few requests (20)" in saturation(one_server(2.0, 20, 0))["verdict"]


def test_a_burst_of_load_that_ends_before_it_fills_the_server_is_no_verdict() -> None:
    """1000 requests/s for 0.1 s: nobody waits for a first batch, but no server carries that."""
    arrived = np.arange(120) / 1000
    requests = {"arrived_s": arrived, "scheduled_s": arrived + 0.0005, "last_token_s": arrived + 16.6}
    verdict = saturation(requests)
    assert verdict["growing"] is None
    assert "took 16.6 s" in verdict["verdict"]


def test_requests_that_pile_up_while_running_are_growth_if_any_waits() -> None:
    """Without a limit on the running requests the queue is empty and every request takes longer than the last."""
    arrived = np.arange(2000.0)
    requests = {"arrived_s": arrived, "scheduled_s": arrived, "last_token_s": arrived + 10 + 0.3 * arrived}
    verdict = saturation(requests)
    assert verdict["growing"] is None
    assert "nobody waits, but requests under way grow by" in verdict["verdict"]
    batch = {"max_tbt_s": np.full(2000, 0.05), "preemptions": np.zeros(2000)}
    assert saturation({**requests, **batch, "scheduled_s": arrived + 0.09})["growing"] is None  # within two batches
    assert saturation({**requests, **batch, "preemptions": np.eye(1, 2000)[0]})["growing"] is True
    verdict = saturation({**requests, **batch, "scheduled_s": arrived + 0.2})
    assert verdict["growing"] is True
    assert verdict["growth"] == pytest.approx(0.3 / 1.3, abs=0.03)


def test_bursts_that_queue_are_a_finding_of_their_own() -> None:
    summary = {"saturation": {"growing": False, "verdict": "sustained: fine"}, "slos": [],
               "median_scheduling_delay_ms": 10.0, "p99_scheduling_delay_ms": 28_000.0}  # fmt: skip
    found = "bursts queue: one request in a hundred waits 28 s or more for its first batch"
    assert describe(summary) == ["sustained: fine", found]
    assert describe({**summary, "p99_scheduling_delay_ms": 900.0}) == ["sustained: fine"]
    assert describe({**summary, "saturation": {"growing": True, "verdict": "saturated"}}) == ["saturated"]


@pytest.mark.parametrize("exact", [True, False])
def test_the_quantiles_of_the_gaps_are_those_of_numpy(exact: bool) -> None:
    values = np.random.default_rng(3).lognormal(-3, 1, 20_000)
    gaps = Gaps(exact)
    for part in np.array_split(values, 7):
        gaps.add(part)
    quantiles, seconds = map(np.array, zip(*gaps.quantiles(), strict=True))
    assert (quantiles[0], quantiles[-1]) == (0.0, 1.0)
    assert (np.diff(seconds) >= 0).all()
    if exact:
        np.testing.assert_allclose(seconds, np.quantile(values, quantiles), rtol=1e-12)
    else:  # by rank: the sketch promises 0.1 %
        ranks = np.searchsorted(np.sort(values), seconds) / len(values)
        assert np.abs(ranks - quantiles).max() < 0.002
