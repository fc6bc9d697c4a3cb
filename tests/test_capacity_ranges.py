"""Ranges of capacities: over seeds, which overlap, and the unit of a rate of conversations."""

import json
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import pytest
from command_line import windtunnel

import windtunnel as wt
from engine.errors import InputError
from studies.capacity.ranges import alike, curve_shares, drawn_capacity, range_of, range_of_draws, ranges_in_words
from studies.capacity.sweep import in_words
from studies.capacity.trial import Trial
from windtunnel.capacity import Draws

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

    drawn = [drawn_capacity(partial(run, seed), 4.0, 0.01) for seed in (1, 2)]
    found = range_of_draws(4.0, drawn, 0.01)
    assert found["mid"] == 4.0
    assert 3.0 / 1.05 <= found["low"] <= 3.0 and 5.5 <= found["high"] <= 5.5 * 1.051
    assert len(tried) < 25
    assert range_of_draws(4.0, [], 0.01) == {"low": 4.0, "mid": 4.0, "high": 4.04}
    assert range_of_draws(4.0, [5.0, 6.0], 0.01)["low"] == 4.0  # the capacity itself is in its range


def test_a_search_draws_errors_unless_it_is_told_how_many_seeds() -> None:
    assert Draws.of(None, None) == Draws(4, errors=True) and Draws.of(19, None) == Draws(19, errors=True)
    assert Draws.of(None, 3) == Draws(2, errors=False)
    with pytest.raises(InputError, match="--seeds 0"):
        Draws.of(None, 0)
    with pytest.raises(InputError, match="remove one"):
        Draws.of(19, 3)


def test_the_draws_of_a_search_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command finds what `wt.search` does, with prices; what was drawn is not drawn again."""
    settings = {"model": "microsoft/phi-2", "device": "a100", "workload": "fixed", "input_len": 100, "output_len": 10,
                "num_prompts": 60, "slo": "p99_ttft<=0.2"}  # fmt: skip
    alone = wt.search(**settings, tolerance=0.2).summary
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    command = ["search", *flags, "--tolerance=0.2", "--no-curve", "--gpu-price=2", "--json"]
    done = windtunnel(*command, "--output-dir", "one", "--workers", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["intervals"] == alone["intervals"] and found["uncertainty"] == alone["uncertainty"]
    assert found["uncertainty"]["draws"] == 4 and found["uncertainty"]["errors"][0]["gemm"] > 0
    low, high = found["requests_per_dollar_range"]
    assert low < found["requests_per_dollar"] < high and "price: " in done.stderr

    (tmp_path / "one" / "search.json").unlink()

    def never(*arguments: Any, **more: Any) -> None:
        raise AssertionError("simulated again")

    monkeypatch.setattr("windtunnel.capacity.simulated_trial", never)
    again = windtunnel(*command, "--output-dir", "one", "--workers", "1", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout.splitlines()[-1]) == found


def test_a_capacity_of_a_queue_that_grows_is_held_against_a_longer_run() -> None:
    """Few requests are all served before the queue is long: the rate that more of them hold is lower, and is told."""
    short = wt.search(**{**CHAT, "turns": 1}, slo="p99_ttft<=0.5", tolerance=0.1, seeds=1).summary
    assert short["unsteady"] and 0 < short["sustained_qps"] < short["max_qps_under_slo"]
    steady = wt.search(**{**CHAT, "turns": 1, "num_prompts": 600}, slo="p99_ttft<=0.2", tolerance=0.1, seeds=1).summary
    assert steady["unsteady"] is None and steady["sustained_qps"] is None


def test_what_overlaps_cannot_be_told_apart() -> None:
    ranges = [(7.0, 9.0), (6.0, 7.0), (5.0, 6.9), None, (9.0, inf)]
    assert alike(ranges, 0) == [1, 4] and alike(ranges, 2) == [1] and alike(ranges, 3) == []
    row = {"intervals": {"max_qps_under_slo": {"low": 1, "mid": 2, "high": 3}}, "seeds": 3}
    assert range_of(row) == (1.0, 3.0) and range_of(row | {"intervals": {}}) is None and range_of({}) is None
    assert ranges_in_words(row) == "3 seeds" and ranges_in_words({}) == ""
    drawn = row | {"uncertainty": {"draws": 19, "covers": 0.9}}
    assert ranges_in_words(drawn) == "19 draws of seeds and predictor errors, 90 % range"


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
