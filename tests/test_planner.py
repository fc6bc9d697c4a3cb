"""`windtunnel plan` where fleets grow and jobs crash, what its answer says, and devices and engines of one's own."""

import gc
import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from device_files import DEVICE_YAML
from hypothesis import given
from hypothesis import strategies as st
from random_examples import random_examples
from typer.testing import CliRunner

import cli.main
import windtunnel as wt
import windtunnel.planning
from engine.errors import InputError
from engine.specs.catalog import DEVICE_FILE, device
from engine.specs.device_folder import CALIBRATIONS
from studies.jobs.pool import answered, in_turn
from studies.pages.plan_figures import dots
from studies.plan.answer import against, limits
from studies.plan.planner import Candidate, Planner
from studies.plan.smallest import smallest_fleet
from windtunnel.plan_point import work
from windtunnel.planning import make_plan
from windtunnel.prices import prices

RATE = 100.0
TRIAL = {"margin": 0.5, "binding_slo": "p99_ttft<=2s", "summary": {}}


class Fleets:
    """Points that need so many replicas by a slice of the fleet, and so many by the whole; some of their jobs crash."""

    def __init__(self, points: list[dict[str, Any]]) -> None:
        self.points = points
        self.whole: set[tuple[int, int]] = set()  # points and replicas that were simulated whole

    def work(self, job: Mapping[str, Any]) -> dict[str, Any]:
        i, what = job["point"], job["what"]
        point = self.points[i]
        if what == point["crash"]:
            raise RuntimeError(f"broken {i}")
        if what == "bound":
            most = RATE / point["needs"] * point["loose"]
            return {"status": "done", "most": most, "likely": most / 1.1, "replica": {"num_gpus": point["gpus"]},
                    "step": 1, "notes": [], "tokens": [1.0, 1.0]}  # fmt: skip
        if what == "size":
            found = smallest_fleet(lambda n: point["alone"] and n >= point["needs"], job["likely"], least=job["least"],
                                   most=job["most"], possible=lambda: point["alone"])  # fmt: skip
            outcome = "holds" if found.replicas else "dismissed" if point["alone"] else "none"
            return {"status": "done", "outcome": outcome, "replicas": found.replicas, "too_few": found.too_few,
                    "trial": TRIAL if found.replicas else None}  # fmt: skip
        if what == "draw":
            return {"status": "done", "qps": RATE / point["needs"], "trials": []}
        if what == "alone":
            return {"status": "done", "trial": {**TRIAL, "margin": 2.0 + i, "binding_slo": "p99_tbt<=0.1s"}}
        if what == "finish":
            self.whole.add((i, job["replicas"]))
        holds = point["alone"] and job["replicas"] >= point["needs"] + point["more"]
        return {"status": "done", "trial": {**TRIAL, "holds": holds, "replicas": job["replicas"]}, "batch": {},
                "curve": []}  # fmt: skip


def _point(needs: int = 5, **values: Any) -> dict[str, Any]:
    return {"needs": needs, "more": 0, "loose": 1.5, "alone": True, "crash": "", "gpus": 1, "price": 1.0, "device": "a",
            **values}  # fmt: skip


def _planner(points: list[dict[str, Any]]) -> Planner:
    candidates = [
        Candidate(str(i), each["device"], each["price"], {"point": i, "layout": [each["gpus"], 1, i]})
        for i, each in enumerate(points)
    ]
    return Planner(candidates, rate=RATE, draws=2)


def _planned(points: list[dict[str, Any]]) -> tuple[Planner, Fleets]:
    fleets, planner = Fleets(points), _planner(points)
    for number, result in in_turn(fleets.work, planner.jobs()):
        planner.take(number, result)
    return planner, fleets


_POINTS = st.fixed_dictionaries(
    {
        "needs": st.integers(1, 30),
        "more": st.sampled_from([0, 0, 1, 4]),
        "loose": st.floats(1.001, 3),
        "alone": st.sampled_from([True, True, True, False]),
        "crash": st.sampled_from(["", "", "", "", "bound", "size", "finish", "draw", "curve", "alone"]),
        "gpus": st.integers(1, 4),
        "price": st.sampled_from([1.0, 2.0]),
        "device": st.sampled_from("ab"),
    }
)


@random_examples(100)
@given(st.lists(_POINTS, min_size=1, max_size=8))
def test_the_cheapest_is_found_though_fleets_grow_and_jobs_crash(points: list[dict[str, Any]]) -> None:
    """Against brute force: the whole fleet of every point that can be simulated."""
    planner, fleets = _planned(points)
    usd = [
        (each["needs"] + each["more"]) * each["gpus"] * each["price"]
        for each in points
        if each["alone"] and each["crash"] not in ("bound", "size", "finish")
    ]
    best = planner.best
    if not usd:
        assert best is None or best.capacity(RATE) == [0, 0, 0]
        return
    assert best is not None and best.outcome == "holds" and best.usd_per_hour == min(usd)
    assert best.whole is not None and best.whole["holds"] and best.whole["replicas"] == best.replicas
    for each in planner.holding:
        assert each.trial or each.whole, "what grew was simulated before it is told to hold"
        if (int(each.name), each.count - 1) in fleets.whole:
            assert (int(each.name), each.count) in fleets.whole
    crashed = [each for each in planner.failed if each["status"] == "crashed"]
    assert all("RuntimeError" in each["traceback"] and "broken" in each["why"] for each in crashed)


@random_examples(60)
@given(st.lists(_POINTS, min_size=1, max_size=8), st.integers(1, 6), st.randoms(use_true_random=False))
def test_the_answer_is_the_same_however_many_processes_work(
    points: list[dict[str, Any]], workers: int, order: random.Random
) -> None:
    """Jobs under way end in any order; of what each finds, nothing may decide by when it came."""
    one, _ = _planned(points)
    fleets, planner = Fleets(points), _planner(points)
    jobs, under_way, given, left = planner.jobs(), {}, 0, True
    while left or under_way:
        while left and len(under_way) < workers:
            job = next(jobs, "none")
            left = job != "none"
            if not isinstance(job, dict):
                break
            under_way[given] = job
            given += 1
        if under_way:
            number = order.choice(list(under_way))
            planner.take(number, answered(fleets.work, under_way.pop(number)))
    assert (planner.best is None) == (one.best is None)
    for mine, its in zip(planner.candidates, one.candidates, strict=True):
        assert vars(mine) == vars(its)
    for who in (planner.best, planner.runner_up):
        assert who is None or who.name == (one.best if who is planner.best else one.runner_up).name  # type: ignore[union-attr]
    assert [each["name"] for each in planner.failed] == [each["name"] for each in one.failed]


def test_what_was_dismissed_against_a_fleet_that_grew_is_sized() -> None:
    points = [_point(10, more=3, loose=1.01), _point(11, loose=1.01), _point(12, loose=1.01, device="b")]
    planner, _ = _planned(points)
    assert planner.best is not None and (planner.best.name, planner.best.replicas) == ("1", 11)


def test_the_next_is_taken_where_the_best_crashes() -> None:
    planner, _ = _planned([_point(10, crash="finish"), _point(20, loose=1.01, gpus=2)])
    assert planner.best is not None and (planner.best.name, planner.best.outcome) == ("1", "holds")
    assert [each["what"] for each in planner.failed] == ["finish"]
    assert _planned([_point(10, crash="finish")])[0].best is None


def test_where_nothing_holds_no_capacity_is_claimed() -> None:
    planner, _ = _planned([_point(alone=False), _point(alone=False)])
    best = planner.best
    assert best is not None and best.whole is not None and best.name == "0"
    assert best.capacity(RATE) == [0, 0, 0]
    nothing = Candidate("n", "a", 1.0, {}, bound={"most": 0.0, "rate": RATE})
    assert nothing.capacity(RATE) == [0, 0, 0]


# -- the answer --------------------------------------------------------------------------------------------------------


def _candidate(replicas: int, usd: float = 1.0, **values: Any) -> Candidate:
    replica = {"num_gpus": 1, "device": "a", "engine": "e", "max_num_batched_tokens": 512, "max_num_seqs": 64,
               "quantization": "none", "predictor": "calibrated"}  # fmt: skip
    return Candidate("n", "a", usd, {"layout": [1, 1, 1]}, **{
        "outcome": "holds", "bound": {"most": None, "tokens": [1.0, 1.0], "rate": 40.0}, "replica": replica,
        "replicas": replicas, **values,
    })  # fmt: skip


def test_the_slo_that_lone_requests_miss_is_the_one_that_is_told() -> None:
    whole = {"margin": 90.0, "binding_slo": "p99_ttft<=2s", "summary": {}}
    alone = {"margin": 3.0, "binding_slo": "p99_tbt<=0.01s", "summary": {}}
    told = limits(_candidate(1, outcome="none", whole=whole, alone=alone))
    assert told.startswith("p99_tbt<=0.01s is missed even by requests that are alone, 3 times over")
    told = limits(_candidate(1, outcome="none", whole=whole, alone={**alone, "margin": 0.5}))
    assert "alone" not in told and "p99_ttft" in told


@pytest.mark.parametrize(
    ("step", "usd", "words"),
    [(1, 2.0, "hold with 5 replicas, 8 requests/s each"), (4, 2.0, "hold with 4 replicas, 10 requests/s each"),
     (1, 11.0, ""), (8, 2.0, "")],
)  # fmt: skip
def test_a_runner_up_would_have_to_hold_with_fewer_that_there_can_be(step: int, usd: float, words: str) -> None:
    told = " ".join(against(_candidate(10), _candidate(24, usd, step=step), 40.0))
    assert words in told and ("It would have" in told) == bool(words)


def test_a_gpus_tokens_are_of_the_whole_conversation() -> None:
    summary = {"total_output_tokens": 3000, "completed": 300}  # 10 a turn, 3 turns
    row = {"device": "a", "replicas": 2, "met": True, "tensor_parallel_size": 1, "pipeline_parallel_size": 1,
           "data_parallel_size": 1, "max_num_batched_tokens": None, "quantization": "none"}  # fmt: skip
    facts = {"replica": {"num_gpus": 2}, "usd_per_gpu_hour": 1.0, "tokens_per_arrival": [90.0, 30.0], "draws": [],
             "trial": {"summary": summary}}  # fmt: skip
    (dot,) = dots({"candidates": [row], "facts": [facts], "rate": 8.0, "slos": ["p99_ttft<=2"]})
    assert dot.gpu_tokens == 4 * 30 / 2


# -- devices and engines of one's own ----------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "model": "microsoft/phi-2", "workload": "fixed", "input_len": 200, "output_len": 20, "request_rate": 1,
    "num_prompts": 30, "slo": ["p99_ttft<=1", "p99_tbt<=50ms"], "uncertainty": 2,
}  # fmt: skip
ONE = {"tensor_parallel_size": [1], "pipeline_parallel_size": [1], "max_num_batched_tokens": [512]}


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The jobs of plans, none of which is done."""
    found: list[dict[str, Any]] = []

    def refuse(job: dict[str, Any]) -> dict[str, Any]:
        found.append(job)
        (Path(job["folder"]) / "trial.json").write_text("{}")  # there is something to resume
        raise InputError("not today")

    monkeypatch.setattr(windtunnel.planning, "work", refuse)
    return found


def _make(folder: Path, devices: list[str], varied: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return make_plan(SMALL, devices, {"": 1.0}, {**ONE, **(varied or {})}, folder=folder, workers=1)


def test_a_device_given_by_its_path_is_planned_with(tmp_path: Path, jobs: list[dict[str, Any]]) -> None:
    shutil.copytree(CALIBRATIONS / "a40", tmp_path / "mine")
    (tmp_path / "mine" / DEVICE_FILE).write_text(json.dumps(asdict(device("a40"))))
    with pytest.raises(InputError, match="not today"):
        _make(tmp_path / "plan", ["a40", str(tmp_path / "mine")])
    assert [job["settings"]["device"] for job in jobs] == ["a40", str(tmp_path / "mine")]
    assert len({job["name"] for job in jobs}) == 2


def test_engines_of_one_file_name_are_two_points(tmp_path: Path, jobs: list[dict[str, Any]]) -> None:
    engines = [tmp_path / folder / "e.yaml" for folder in "ab"]
    for i, path in enumerate(engines):
        path.parent.mkdir()
        path.write_text(f"base: vllm@0.15\nscheduler: {{max_num_seqs: {64 + i}}}\n")
    varied = {"engine": [str(path) for path in engines]}
    for _ in range(2):
        with pytest.raises(InputError, match="not today"):
            _make(tmp_path / "plan", ["a40"], varied)
    assert len(jobs) == 4 and len({job["name"] for job in jobs}) == 2
    engines[1].write_text("base: vllm@0.15\nscheduler: {max_num_seqs: 128}\n")
    with pytest.raises(InputError, match="holds a plan with other settings"):
        _make(tmp_path / "plan", ["a40"], varied)


def test_a_device_file_that_was_edited_is_another_plan(tmp_path: Path, jobs: list[dict[str, Any]]) -> None:
    card = tmp_path / "card.yaml"
    card.write_text(DEVICE_YAML)
    with pytest.raises(InputError, match="not today"):
        _make(tmp_path / "plan", [str(card)])
    card.write_text(DEVICE_YAML.replace("312e12", "400e12"))
    with pytest.raises(InputError, match="holds a plan with other settings"):
        _make(tmp_path / "plan", [str(card)])


def test_prices_may_name_a_device_by_its_file_or_the_name_in_it(tmp_path: Path) -> None:
    card = tmp_path / "card.yaml"
    card.write_text(DEVICE_YAML)
    assert prices("card=2,a40=1", [str(card)]) == {"card": 2.0, "a40": 1.0} == prices(f"{card}=2,a40=1")
    with pytest.raises(InputError, match="card"):
        prices("card=2")


@pytest.mark.parametrize("rate", [[10, 20], {"a": 1}])
def test_a_rate_that_is_no_number_is_told(tmp_path: Path, rate: Any) -> None:
    with pytest.raises(InputError, match="--request-rate"):
        make_plan({**SMALL, "request_rate": rate}, ["a40"], {"": 1.0}, ONE, folder=tmp_path / "plan")


def test_crashes_are_told_apart_and_the_rest_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a card of one's own, one that crashes, and one that has no room: the first is planned with, in full."""

    def some(job: dict[str, Any]) -> dict[str, Any]:
        if job["settings"]["device"] == "a40":
            raise RuntimeError("a bug")
        if job["settings"]["device"] == "l40s":
            raise InputError("no room")
        return work(job)

    for name in ("FLEET_S", "DRAW_S", "CURVE_S"):
        monkeypatch.setattr(f"windtunnel.plan_point.{name}", 1.0)
    monkeypatch.setattr(gc, "collect", lambda: 0)  # takes longer than such short trials
    monkeypatch.setattr(windtunnel.planning, "work", some)
    card, folder = tmp_path / "card.yaml", tmp_path / "plan"
    card.write_text(DEVICE_YAML)
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in SMALL.items() if key != "slo"]
    flags += [f"--slo={each}" for each in SMALL["slo"]] + [f"--{k.replace('_', '-')}={v[0]}" for k, v in ONE.items()]
    done = CliRunner().invoke(
        cli.main.app,
        ["plan", *flags, f"--devices={card},a40,l40s", "--gpu-price=card=2,a40=1,l40s=1", "--workers=1",
         f"--output-dir={folder}"],
    )  # fmt: skip
    assert done.exit_code == 1, done.output
    assert "CRASHED: a40" in done.output and "a bug" in done.output and "1 can't be (no room)" in done.output
    made = json.loads((folder / "plan.json").read_text())
    assert made["best"]["device"] == "card" and made["best"]["met"] and made["best"]["usd_per_hour"] % 2 == 0
    crash = next(each for each in made["refused"] if each["status"] == "crashed")
    assert "RuntimeError: a bug" in crash["traceback"]
    assert wt.simulate(config=folder / "best.yaml", num_prompts=20).summary["completed"] == 20


def test_what_a_plan_has_loaded_does_not_outlive_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bound_only(job: dict[str, Any]) -> dict[str, Any]:
        if job["what"] != "bound":
            raise InputError("not today")
        return work(job)

    monkeypatch.setattr(windtunnel.planning, "work", bound_only)
    card, folder = tmp_path / "card.yaml", tmp_path / "plan"
    for gib, words in ((48, "not today"), (1, "GiB"), (48, "not today")):
        card.write_text(DEVICE_YAML.replace("48e9", f"{gib}e9"))
        with pytest.raises(InputError, match=words):
            wt.plan(devices=str(card), gpu_price="card=2", output_dir=folder, **SMALL, **ONE)
        shutil.rmtree(folder, ignore_errors=True)


def test_where_every_point_crashes_the_traceback_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(job: dict[str, Any]) -> dict[str, Any]:
        raise RuntimeError("a bug")

    monkeypatch.setattr(windtunnel.planning, "work", broken)
    with pytest.raises(InputError, match=r"crashed: .*a bug.*failed\.json"):
        _make(tmp_path / "plan", ["a40"])
    assert "RuntimeError: a bug" in (tmp_path / "plan" / "failed.json").read_text()
