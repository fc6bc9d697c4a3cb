"""`windtunnel plan`: its search against brute force, its bounds against simulations, its answer and its errors."""

import json
from collections.abc import Mapping
from dataclasses import replace
from math import ceil, inf
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_examples import random_examples
from typer.testing import CliRunner

import cli.main
import windtunnel as wt
from engine.errors import InputError
from engine.results.slo import SLO
from engine.workload.workload import WorkloadSpec, make_workload
from simulator.cluster import deploy
from studies.capacity.search import find_capacity
from studies.capacity.trial import Trial, at_rate, simulated_trial
from studies.jobs.pool import in_turn
from studies.pages.report import write_page
from studies.plan.answer import limits
from studies.plan.bounds import replica_bound
from studies.plan.planner import MOST_TRIES, Candidate, Planner
from studies.plan.smallest import smallest_fleet
from windtunnel.plan_point import Point
from windtunnel.prices import prices

KEYS = {
    "device", "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "engine",
    "max_num_batched_tokens", "max_num_seqs", "quantization", "replicas", "gpus", "usd_per_hour",
    "usd_per_million_output_tokens", "usd_per_million_total_tokens", "capacity_per_replica", "met", "provenance",
}  # fmt: skip
RATE = 150
SMALL = [
    "plan", "--model", "microsoft/phi-2", "--workload", "fixed", "--input-len", "300", "--output-len", "30",
    "--devices", "a100_sxm,l40s", "--gpu-price", "a100_sxm=1.5,l40s=0.9", "--request-rate", str(RATE),
    "--num-prompts", "60", "--tensor-parallel-size", "1", "--pipeline-parallel-size", "1",
    "--max-num-batched-tokens", "128,512", "--uncertainty", "2", "--workers", "1",
    "--slo", "p99_ttft<=1", "--slo", "p99_tbt<=50ms",
]  # fmt: skip


# -- the search --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(1, 80), st.integers(1, 3), st.integers(1, 80))
def test_the_smallest_fleet_is_found_from_any_guess(needed: int, likely: int, step: int, most: int) -> None:
    asked = []

    def holds(replicas: int) -> bool:
        asked.append(replicas)
        return replicas >= needed

    found = smallest_fleet(holds, likely, step=step)
    fewest = step * ceil(needed / step)
    assert found.replicas is not None and found.replicas % step == 0
    assert fewest <= found.replicas <= max(fewest, 1.03 * fewest)
    assert len(set(asked)) == len(asked)
    bounded = smallest_fleet(holds, likely, step=step, most=most)
    assert (bounded.replicas is None) == (most // step * step < fewest)


def test_what_limits_a_fleet_is_told_by_the_load_beyond_its_capacity() -> None:
    candidate = Candidate("a", "a100_sxm", 1.0, {"layout": [1, 1, 1]}, outcome="holds")
    candidate.replica = {"max_num_seqs": 64, "max_num_batched_tokens": 512}
    candidate.batch = {"full_s": 0.09}
    held = {"binding_slo": "p99_tbt<=0.1s", "met": True, "holds": True, "rate": 2.0, "summary": {}}

    def said(**beyond: Any) -> str:
        over = {**held, "rate": 3.0, "holds": False, **beyond}
        candidate.draws = {0: {"qps": 2.0, "binding_slo": over["binding_slo"], "trials": [held, over]}}
        return limits(candidate)

    assert said(met=False).startswith("TBT by the chunk") and "90 ms" in said(met=False)
    assert said(summary={"steady_utilization": 1.0}).startswith(
        "Throughput: with 3 requests/s a replica the queue grows"
    )
    assert said(summary={"peak_kv_utilization": 0.99}).startswith("The KV cache")
    assert said(met=False, binding_slo="p99_ttft<=1s").startswith("TTFT by queueing")


class Truth:
    """Points whose smallest fleets are known, with bounds that are as loose as asked."""

    def __init__(self, needed: list[int], loose: list[float], alone: list[bool]) -> None:
        self.needed, self.loose, self.alone = needed, loose, alone
        self.sized = 0

    def work(self, job: Mapping[str, Any]) -> dict[str, Any]:
        i = job["point"]
        needed = self.needed[i] if self.alone[i] else inf
        if job["what"] == "bound":
            carried = 100.0 / self.needed[i]
            most, likely = (carried * (1 + self.loose[i] / part) for part in (1, 3))
            return {"status": "done", "most": most, "likely": likely, "replica": {"num_gpus": job["gpus"]},
                    "step": 1, "notes": [], "tokens": [1.0, 1.0]}  # fmt: skip
        if job["what"] == "size":
            self.sized += 1
            found = smallest_fleet(lambda n: n >= needed, job["likely"], least=job["least"], most=job["most"],
                                   possible=lambda: self.alone[i])  # fmt: skip
            outcome = "holds" if found.replicas else "dismissed" if self.alone[i] else "none"
            return {"status": "done", "outcome": outcome, "replicas": found.replicas, "too_few": found.too_few,
                    "trial": {"margin": 0.5}, "missed": None}  # fmt: skip
        if job["what"] == "draw":
            return {"status": "done", "qps": 100.0 / needed, "trials": []}
        trial = {"margin": 2.0, "holds": True, "replicas": job.get("replicas")}
        return {"status": "done", "trial": trial, "batch": {}, "curve": []}


@random_examples(100)
@given(
    st.lists(
        st.tuples(st.integers(1, 39), st.floats(0, 3), st.booleans(), st.integers(1, 8), st.sampled_from([1, 2, 5]),
                  st.sampled_from("abc")),
        min_size=1, max_size=12,
    )
)  # fmt: skip
def test_what_is_dismissed_would_not_have_won(points: list[tuple[int, float, bool, int, int, str]]) -> None:
    """Against brute force: every point's smallest fleet, the cheapest of them."""
    truth = Truth([p[0] for p in points], [p[1] for p in points], [p[2] for p in points])
    candidates = [
        Candidate(str(i), device, float(price), {"point": i, "gpus": gpus, "layout": [gpus, 1, 1]})
        for i, (_, _, _, gpus, price, device) in enumerate(points)
    ]
    planner = Planner(candidates, rate=100.0, draws=2)
    for number, result in in_turn(truth.work, planner.jobs()):
        planner.take(number, result)
    cheapest = min((needed * gpus * price for needed, _, alone, gpus, price, _ in points if alone), default=None)
    if cheapest is None:
        assert not planner.holding and planner.best is not None
        return
    best = planner.best
    assert best is not None and best.outcome == "holds"
    assert best.usd_per_hour == cheapest
    low, mid, high = best.capacity(100.0)
    assert low <= mid <= high
    second, kind = planner.runner_up, (points[int(best.name)][5], points[int(best.name)][3])
    if len(points) <= MOST_TRIES + 1 and second is not None and (points[int(second.name)][5], second.gpus) != kind:
        nearest = (n * g * p for n, _, alone, g, p, device in points if alone and (device, g) != kind)
        assert second.usd_per_hour == min(nearest), "the next in price of another device or layout"
    for each in planner.candidates:
        if each.outcome == "dismissed":
            assert each.fewest <= truth.needed[int(each.name)], "its bound is not one"
            assert each.usd_per_hour >= cheapest


def test_bounds_spare_most_of_the_work() -> None:
    needed = [10 + 3 * i for i in range(12)]
    truth = Truth(needed, [0.2] * 12, [True] * 12)
    candidates = [Candidate(str(i), "a", 1.0, {"point": i, "gpus": 1, "layout": [i, 1, 1]}) for i in range(12)]
    planner = Planner(candidates, rate=100.0, draws=2)
    for number, result in in_turn(truth.work, planner.jobs()):
        planner.take(number, result)
    assert truth.sized <= 6


@pytest.mark.parametrize("budget", [256, 2048])
@pytest.mark.parametrize("slos", [["p99_ttft<=2"], ["p99_ttft<=3", "p99_tbt<=45ms"]])
def test_no_simulated_capacity_is_above_its_bound(budget: int, slos: list[str]) -> None:
    kind = deploy("mistralai/Mistral-7B-v0.1", "a100_sxm", engine="vllm@0.15",
                  scheduler={"max_num_batched_tokens": budget, "max_model_len": 4096})  # fmt: skip
    spec = WorkloadSpec(lengths="uniform", input_len="200:1200", output_len="20:200", request_rate=1.0, num_prompts=250,
                        max_model_len=4096)  # fmt: skip
    goals = [SLO.parse(text) for text in slos]
    bound = replica_bound(kind, make_workload(spec), goals)

    def run(rate: float) -> Trial:
        trial = simulated_trial(at_rate(spec, rate), [kind], goals, rate)
        return replace(trial, met=trial.holds)  # as a plan judges: a short run ends before a queue that grows is late

    found = find_capacity(run, bound.likely, 0.1)
    assert 0 < found.qps <= bound.most
    assert found.qps > 0.3 * bound.most or len(slos) > 1  # and the bound says something


# -- the command -------------------------------------------------------------------------------------------------------


Planned = tuple[Path, dict[str, Any], str]  # its folder, its last line, all that it printed


def small_plan(folder: Path, *more: str) -> Planned:
    """Plan the small space with short trials."""
    short = {"FLEET_S": 6.0, "DRAW_S": 6.0, "CURVE_S": 3.0, "CURVE": (0.5, 1.0), "TOLERANCE": 0.5}
    with pytest.MonkeyPatch.context() as patched:
        for name, value in short.items():
            patched.setattr(f"windtunnel.plan_point.{name}", value)
        done = CliRunner().invoke(cli.main.app, [*SMALL, *more, "--output-dir", str(folder), "--json"])
    assert done.exit_code == 0, done.output
    return folder, json.loads(done.stdout.splitlines()[-1]), done.output


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Planned:
    return small_plan(tmp_path_factory.mktemp("plan") / "small")


def test_the_best_is_that_of_an_exhaustive_search(planned: Planned, tmp_path: Path) -> None:
    _, found, _ = planned
    _, every, _ = small_plan(tmp_path / "every", "--exhaustive")
    assert all(row["met"] for row in every["candidates"])  # each was sized to its end
    assert not all(row["met"] for row in found["candidates"])  # and some were not worth it
    assert found["best"] == every["best"]
    needed = {name_of(row): row["replicas"] for row in every["candidates"]}
    for row in found["candidates"]:
        assert row["replicas"] <= needed[name_of(row)] and (
            row["met"] or row["usd_per_hour"] > found["best"]["usd_per_hour"]
        )


def name_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["device"], row["max_num_batched_tokens"]


def test_the_json_line_is_a_bill_that_adds_up(planned: Planned) -> None:
    _, found, _ = planned
    assert set(found) == {"best", "candidates"}
    assert len(found["candidates"]) == 4
    for row in found["candidates"]:
        assert set(row) == KEYS
        low, mid, high = row["capacity_per_replica"]
        assert 0 <= low <= mid <= high
        price = {"a100_sxm": 1.5, "l40s": 0.9}[row["device"]]
        assert row["gpus"] == row["replicas"] * row["tensor_parallel_size"] * row["pipeline_parallel_size"]
        assert row["usd_per_hour"] == pytest.approx(row["gpus"] * price)
        assert row["usd_per_million_output_tokens"] == pytest.approx(row["usd_per_hour"] / (RATE * 30 * 3600) * 1e6)
        assert row["usd_per_million_total_tokens"] == pytest.approx(row["usd_per_hour"] / (RATE * 330 * 3600) * 1e6)
        assert row["engine"].startswith("vllm@") and "latest" not in row["engine"]
        assert row["provenance"].startswith("calibrated")
    best = found["best"]
    assert best == found["candidates"][0] and best["met"]
    assert best["usd_per_hour"] == min(row["usd_per_hour"] for row in found["candidates"] if row["met"])
    assert best["replicas"] * best["capacity_per_replica"][2] >= RATE


def test_the_answer_comes_first_and_the_fleet_holds(planned: Planned) -> None:
    folder, found, output = planned
    best = found["best"]
    printed = [line for line in output.splitlines() if " of 4)" not in line and "finalists (" not in line]
    assert f"{best['replicas']} replica" in printed[0] and best["device"] in printed[0]
    for word in ("per million tokens", "headroom", "Runner-up", "TTFT", best["engine"]):
        assert word in output
    run = wt.simulate(config=folder / "best.yaml", num_prompts=600)
    assert len(run.summary["replicas"]) == best["replicas"]
    assert all(each["met"] for each in run.summary["slos"])


def test_the_same_command_resumes_without_simulating(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any, **more: Any) -> None:
        raise AssertionError("simulated again")

    monkeypatch.setattr(Point, "trial", never)
    folder, found, _ = planned
    again = CliRunner().invoke(cli.main.app, [*SMALL, "--output-dir", str(folder), "--json"])
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout.splitlines()[-1]) == found
    other = CliRunner().invoke(cli.main.app, [*SMALL, "--output-dir", str(folder), "--seed", "1"])
    assert isinstance(other.exception, InputError) and "other settings" in str(other.exception)


def test_the_page_starts_with_the_answer(planned: Planned) -> None:
    folder, found, _ = planned
    html = (folder / "report.html").read_text("utf-8")
    best = found["best"]
    answer = html.index(f"{best['replicas']} \N{MULTIPLICATION SIGN} {best['device']}")
    order = [
        html.index(words) for words in ("Why this one", "Price against latency", "Every candidate", "<summary>Settings")
    ]
    assert answer < order[0] and order == sorted(order)
    assert html.count("class='sort'") > 10 and "calibrated on measurements" in html
    assert write_page([folder], folder / "again.html").is_file()


def test_nothing_meets_the_objectives_and_the_closest_is_told(tmp_path: Path) -> None:
    arguments = [*SMALL[:-1], "p99_tbt<=1ms", "--request-rate", "5", "--max-num-batched-tokens", "512"]
    done = CliRunner().invoke(cli.main.app, [*arguments, "--output-dir", str(tmp_path / "none"), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["best"]["met"] and not any(row["met"] for row in found["candidates"])
    assert found["best"]["device"] == "a100_sxm"  # the faster of the two
    assert "No fleet meets the objectives" in done.output
    assert all(row["capacity_per_replica"] == [0, 0, 0] for row in found["candidates"])
    assert "p99_tbt<=0.001s is missed even by requests that are alone" in done.output


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (["--gpu-price", "a100_sxm=1.5"], "no price of l40s"),
        (["--gpu-price", "a100_sxm=1.5,l40s=-2"], "dollars per GPU-hour"),
        (["--gpu-price", "a100_sxm=1.5,l40s=0"], "dollars per GPU-hour"),
        (["--gpu-price", ""], "dollars per GPU-hour"),
        (["--devices", "a100_sxm,h900"], "h900"),
        (["--devices", ""], "--devices"),
        (["--device", "a40"], "both name devices"),
        (["--devices", "a100_sxm,,l40s"], "--devices"),
        (["--request-rate", "0"], "--request-rate 0"),
        (["--request-rate", "-3"], "--request-rate -3"),
        (["--request-rate", "inf"], "--request-rate inf"),
        (["--request-rate", "many"], "--request-rate many"),
        (["--tensor-parallel-size", "0,2"], "--tensor-parallel-size"),
        (["--max-num-batched-tokens", ","], "--max-num-batched-tokens"),
        (["--engine", "vllm@latest,nothing"], "nothing"),
        (["--quantization", "fp9"], "fp9"),
        (["--slo", "p99_speed<=2"], "p99_speed"),
        (["--router", "best"], "router"),
        (["--num-replicas", "3"], "--num-replicas 3"),
        (["--workers", "0"], "--workers 0"),
    ],
)
def test_bad_input_is_one_clear_line(changed: list[str], words: str, tmp_path: Path) -> None:
    code, message = cli.main.run([*SMALL, "--output-dir", str(tmp_path / "bad"), *changed])
    assert code == 2
    assert words in message and "\n" not in message
    assert not (tmp_path / "bad").exists()


def test_a_model_that_fits_nowhere_says_so(tmp_path: Path) -> None:
    code, message = cli.main.run(
        ["plan", "--model", "meta-llama/Meta-Llama-3-70B", "--devices", "l40s", "--gpu-price", "1",
         "--request-rate", "1", "--tensor-parallel-size", "1", "--slo", "p99_ttft<=9", "--workers", "1",
         "--output-dir", str(tmp_path / "no")]
    )  # fmt: skip
    assert code == 2 and "no point of the plan can run" in message and "GiB" in message


def test_prices_are_read_by_device_or_for_all() -> None:
    assert prices("2.5") == {"": 2.5} == prices(2.5)
    assert prices("h100=4, a100_sxm=2") == {"h100_sxm": 4.0, "a100_sxm": 2.0} == prices({"h100": 4, "a100_sxm": 2})
    with pytest.raises(InputError, match="two prices"):
        prices("h100=4,h100_sxm=3")
