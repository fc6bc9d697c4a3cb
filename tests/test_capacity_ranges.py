"""Ranges of capacities: over seeds, which overlap, and the unit of a rate of conversations."""

from math import inf
from typing import Any

import pytest

import windtunnel as wt
from studies.capacity.ranges import alike, curve_shares, over_seeds, range_of, ranges_in_words
from studies.capacity.sweep import in_words
from studies.capacity.trial import Trial

CHAT: dict[str, Any] = {
    "model": "microsoft/phi-2", "device": "a100", "workload": "fixed", "input_len": 100, "output_len": 20, "turns": 3,
    "num_prompts": 60, "max_model_len": 1024, "max_num_seqs": 4,
}  # fmt: skip


def test_a_range_is_from_the_lowest_to_the_highest_capacity_of_the_seeds() -> None:
    capacities = {1: 3.0, 2: 5.5}
    tried: list[tuple[int, float]] = []

    def run(seed: int, rate: float) -> Trial:
        tried.append((seed, rate))
        return Trial(rate, rate <= capacities[seed], 1.0, "p99_tbt<=0.1s", {"request_throughput": 1.0})

    found = over_seeds(run, 4.0, seeds=3, tolerance=0.01)
    assert found["mid"] == 4.0
    assert 3.0 / 1.05 <= found["low"] <= 3.0 and 5.5 <= found["high"] <= 5.5 * 1.051
    assert {seed for seed, _ in tried} == {1, 2} and len(tried) < 25
    assert over_seeds(run, 4.0, seeds=1, tolerance=0.01) == {"low": 4.0, "mid": 4.0, "high": 4.04}


def test_what_overlaps_cannot_be_told_apart() -> None:
    ranges = [(7.0, 9.0), (6.0, 7.0), (5.0, 6.9), None, (9.0, inf)]
    assert alike(ranges, 0) == [1, 4] and alike(ranges, 2) == [1] and alike(ranges, 3) == []
    row = {"intervals": {"max_qps_under_slo": {"low": 1, "mid": 2, "high": 3}}, "seeds": 3}
    assert range_of(row) == (1.0, 3.0) and range_of(row | {"intervals": {}}) is None and range_of({}) is None
    assert ranges_in_words(row) == "3 seeds" and ranges_in_words({}) == ""
    drawn = row | {"uncertainty": {"draws": 19, "covers": 0.9}}
    assert ranges_in_words(drawn) == "90 % of 19 draws of seeds and predictor errors"


def test_loads_beyond_the_capacity_are_simulated_and_one_below_where_none_is_known() -> None:
    assert curve_shares(10.0, [9.0, 9.9]) == [0.5, 1.1, 1.25] and curve_shares(10.0, [6.0]) == [1.1, 1.25]


def test_points_are_named_in_words() -> None:
    settings = {"model": "meta-llama/Llama-3-8B", "device": "h100", "tensor_parallel_size": 2, "scheduler": "vllm",
                "max_num_batched_tokens": 2048, "async_scheduling": False, "ramp_up": "1:2"}  # fmt: skip
    assert in_words(settings) == "Llama-3-8B, h100, TP2, vllm, budget 2,048, synchronous, ramp up 1:2"


@pytest.mark.parametrize(("slo", "outcome"), [("p99_ttft<=0.2", "found"), ("p99_ttft<=1000", "all")])
def test_a_rate_of_conversations_is_one(slo: str, outcome: str) -> None:
    found = wt.search(**CHAT, slo=slo, tolerance=0.2, seeds=2).summary
    assert found["outcome"] == outcome and found["rate_of"] == "conversations"
    assert f"{found['max_qps_under_slo']:.3g} conversations/s" in found["words"] and "requests/s" not in found["words"]
    if outcome == "all":  # a third of the requests begin one
        at_once = wt.simulate(**{**CHAT, "request_rate": inf}).summary
        assert found["max_qps_under_slo"] == pytest.approx(at_once["request_throughput"] / 3, rel=0.2)
        assert "intervals" not in found
    else:
        low, high = found["intervals"]["max_qps_under_slo"]["low"], found["intervals"]["max_qps_under_slo"]["high"]
        assert low <= found["max_qps_under_slo"] <= high
        rates = [load["rate"] for load in found["loads"]]
        assert rates == sorted(rates) and rates[-1] == pytest.approx(1.25 * found["max_qps_under_slo"])
