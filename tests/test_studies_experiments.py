"""Studies: their files are checked, their records are right on small runs, their verdicts can fail, and they resume."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli.main import run as command
from engine.errors import InputError
from engine.specs import SchedulerSpec
from engine.workload.workload import Workload
from simulator.cluster import Deployment, deploy, simulate
from simulator.predictor.base import FixedTable
from studies.capacity.search import FINE, fine_capacity
from studies.jobs.cache import claimed
from studies.pages.study import claims_table, little_in_words
from studies.published import library as studies
from studies.published.experiment import PAPER_HOST, PLACEBOS, Claim, Experiment
from studies.published.judge import choices, judge, judge_all, spearman, tally
from studies.published.library import load, names, read, reduced
from studies.published.operation_split import batch_shape
from studies.published.points import Point, expand
from studies.published.run import StudyCrashedError, run
from studies.published.tasks import batches, completions, compute

SMALL = """
title: Small
source: Figure 0
shows: Nothing much.
drawing: over_rate
setups:
  Mistral-7B: {model: mistralai/Mistral-7B-v0.1, device: a100}
workloads:
  chat: {lengths: openchat_sharegpt4, max_model_len: 8192}
blocks:
  - task: run
    setups: [Mistral-7B]
    workloads: [chat]
    rates: [1, 2]
    num_prompts: 20
    schedulers:
      vllm: {policy: vllm}
      sarathi: {policy: sarathi, max_num_batched_tokens: 512}
claims:
  - says: vLLM's tail is longer
    source: Figure 0
    compare: order
    of: ["Mistral-7B/chat/2/vllm:p99_tbt", "Mistral-7B/chat/2/sarathi:p99_tbt"]
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# -- files ---------------------------------------------------------------------------------------------------------


def test_every_study_loads_and_has_points_and_published_claims() -> None:
    assert len(names()) == 11
    for name in names():
        found = load(name)
        points = expand(found, "sarathi_osdi24")
        assert points and found.claims
        assert len({point.id for point in points}) == len(points)


def test_the_capacity_study_is_the_papers() -> None:
    points = expand(load("capacity"), "sarathi_osdi24")
    assert len(points) == 48 and {point.num_prompts for point in points} == {2048}
    by_id = {point.id: point for point in points}
    assert by_id["LLaMA2-70B/chat/relaxed/sarathi"].scheduling.max_num_batched_tokens == 1536  # type: ignore[union-attr]
    assert by_id["Falcon-180B/arxiv/strict/orca"].scheduling.max_num_seqs == 8  # type: ignore[union-attr]
    assert by_id["Yi-34B/arxiv/relaxed/vllm"].slos == ("p99_tbt<=1", "p50_scheduling_delay<=2")
    assert all(point.time_limit_s == 1800 for point in points)
    asked = {of.rpartition(":")[0] for claim in load("capacity").claims for of in claim.of}
    assert {point.id for point in points if point.fine} == {id for id in asked if id.startswith(("Mistral", "Yi"))}
    assert {point.id for point in expand(load("capacity"), "sarathi_osdi24", seeds=3) if point.seeds == 3} == asked
    modern = expand(load("capacity"), "cuda_graphs", seeds=3)
    assert {point.id for point in modern} == asked and all(point.seeds == 3 and not point.fine for point in modern)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("drawing:", "drawin:", "unknown key in small.yaml, drawin: 'drawin': did you mean 'drawing'?"),
        ("policy: vllm", "polcy: vllm", "did you mean 'policy'"),
        ("rates: [1, 2]", "rates: [1, two]", "blocks.0.rates.1 'two'"),
        ("policy: vllm", "policy: vlm", "unknown policy in blocks.0 'vlm': did you mean 'vllm'"),
        ("setups: [Mistral-7B]", "setups: [Mistral]", "unknown setup in blocks.0 'Mistral'"),
        ("workloads: [chat]", "workloads: [chats]", "unknown workload in blocks.0 'chats'"),
        ("    rates: [1, 2]\n", "", "needs rates"),
        ("Mistral-7B-v0.1,", "Mistral-7B-v0.9,", "unknown model"),
        ("chat/2/vllm:p99_tbt", "chat/3/vllm:p99_tbt", "unknown point in claim"),
        ("chat/2/vllm:p99_tbt", "chat/2/vllm:p98_tbt", "did you mean 'p99_tbt'"),
        ("claims:", 'marks: {"Mistral-7B/chat/3/vllm:p99_tbt": 1.0}\nclaims:', "unknown point in marks"),
        ("compare: order", "compare: ratio", "ratio needs 2 values and a published number"),
        ("compare: order", "compare: orderly", "claims.0.compare"),
        ("title: Small\n", "", "title"),
    ],
)
def test_a_wrong_file_is_told_by_its_key(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in SMALL
    with pytest.raises(InputError) as error:
        read(written(tmp_path, SMALL.replace(old, new, 1)))
    assert said in str(error.value)


def test_a_file_that_is_no_mapping_or_no_yaml_is_told(tmp_path: Path) -> None:
    for text, said in (("- 1", "holds no study"), ("a: [", "is not YAML")):
        with pytest.raises(InputError, match=said):
            read(written(tmp_path, text))
    with pytest.raises(InputError, match=r"can't read .*: give a study's file"):
        read(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="did you mean 'capacity'"):
        load("capasity")


def test_a_reduced_study_has_the_models_asked_for() -> None:
    whole = load("capacity")
    fewer = reduced(whole, "mistral", 40)
    points = expand(fewer, PAPER_HOST)
    assert {point.id.split("/")[0] for point in points} == {"Mistral-7B"} and len(points) == 12
    assert {point.num_prompts for point in points} == {40}
    with pytest.raises(InputError, match="Mistral-7B, Yi-34B"):
        reduced(whole, "GPT", None)
    with pytest.raises(InputError, match="--num-prompts 1"):
        reduced(whole, None, 1)


# -- records -------------------------------------------------------------------------------------------------------


def toy(policy: str) -> Deployment:
    """10 ms a token."""
    times = FixedTable([[0.01 * tokens for tokens in range(300)]])
    spec = SchedulerSpec(policy=policy, max_num_batched_tokens=256, max_num_seqs=8, max_model_len=256)
    return deploy("microsoft/phi-2", "a100", scheduler=spec, num_gpu_blocks_override=64, predictor=times)


def two_requests() -> Workload:
    """One decodes from 0.1 s on; the other's prompt of 100 tokens comes meanwhile."""
    arrived, prompts, outputs = np.array([0.0, 0.2]), np.array([10, 100]), np.array([40, 2])
    return Workload("two", arrived, prompts, outputs, 0)


def test_completions_count_every_decode() -> None:
    deployment = toy("vllm_v0")
    line = completions(simulate(two_requests(), [deployment]).iterations, deployment)
    assert line["decodes"][0] == 0 and line["decodes"][-1] == 39 + 1  # all but the first tokens
    assert np.all(np.diff(line["decodes"]) >= 0)


def test_the_batches_of_a_run_are_described() -> None:
    deployment = toy("vllm_v0")
    shown = batches(simulate(two_requests(), [deployment]).iterations, deployment)
    assert shown["count"] == 2 + 39 and shown["with_prompts"] == pytest.approx(2 / 41)
    assert shown["mean_tokens"] == pytest.approx((110 + 40) / 41)
    assert shown["p50_s"] == pytest.approx(0.01) and shown["p50_with_prompts_s"] == pytest.approx((0.1 + 1.0) / 2)
    assert shown["peak_kv"] == pytest.approx(9 / 64)  # 7 blocks for 101 tokens, 2 for the other's


def test_a_chunked_prompt_takes_the_time_of_its_chunks() -> None:
    found = {point.id: point for point in expand(load("chunking_overhead"), "cuda_graphs")}
    chunked = found["Yi-34B/2047/512"]
    seconds = compute(chunked)["values"]["seconds"]
    one = compute(replace(chunked, prompt=512, chunk=0))["values"]["seconds"]
    assert 3 * one < seconds < 6 * one


def test_the_preset_of_the_paper_runs_at_the_papers_settings() -> None:
    (point,) = [p for p in expand(load("scheduler_ablation"), PAPER_HOST) if p.id == "Yi-34B/arxiv/0.5/hybrid-only"]
    replica = point.deployment().replica
    assert replica.gpu_memory_utilization == 0.85 and replica.engine.name == "sarathi-osdi24"
    assert replica.scheduler.policy == "sarathi" and replica.scheduler.max_num_batched_tokens == 16384
    assert replica.scheduler.late_first_token and replica.scheduler.preempt_for_every_decode
    modern = replace(point, host="cuda_graphs").deployment().replica
    assert not modern.scheduler.late_first_token and not modern.scheduler.preempt_for_every_decode


def test_a_run_ends_at_its_time_limit_with_what_has_finished() -> None:
    study = load("hybrid_parallelism")
    (point,) = [p for p in expand(study, "cuda_graphs") if p.id == "TP4-PP2/chat/0.75/8"]
    short = replace(point, num_prompts=60, time_limit_s=30.0)
    whole = compute(replace(short, time_limit_s=None))["values"]["duration"]
    assert 20 < compute(short)["values"]["duration"] < 60 < whole


@pytest.mark.parametrize("name", PLACEBOS)
def test_a_placebo_changes_the_times_and_nothing_else(name: str) -> None:
    (point,) = [p for p in expand(load("scheduler_ablation"), PAPER_HOST) if p.id == "Yi-34B/chat/1/both"]
    ours, theirs = point.deployment(), replace(point, host=name).deployment()
    assert ours.replica == theirs.replica and ours.num_kv_blocks == theirs.num_kv_blocks
    shape = batch_shape(1024, 0, 0)
    assert theirs.predictor.stage_time(shape, 0) == theirs.predictor.stage_time(shape, 0)
    assert abs(theirs.predictor.stage_time(shape, 0) / ours.predictor.stage_time(shape, 0) - 1) > 0.3


@pytest.mark.parametrize("name", PLACEBOS)
def test_a_placebo_has_kinds_of_operators_that_add_up(name: str) -> None:
    (point,) = [p for p in expand(load("batch_times"), name) if p.id == "Yi-34B/prefill/1024"]
    theirs, ours = compute(point)["values"], compute(replace(point, host=PAPER_HOST))["values"]
    parts = [theirs[part] for part in ("linear", "attention", "communication", "other", "host")]
    assert sum(parts) == pytest.approx(theirs["total"], rel=1e-9) and min(parts) > 0
    assert abs(theirs["linear"] / ours["linear"] - 1) > 0.3
    assert theirs["linear_per_token"] == theirs["linear"] / 1024


def test_the_parts_of_an_operator_split_add_up() -> None:
    points = expand(load("operation_split"), "sarathi_osdi24")
    for place in ("Mistral-7B/prefill/1024", "Yi-34B/decode/16"):
        (point,) = [point for point in points if point.id == place]
        values = compute(point)["values"]
        parts = sum(values[part] for part in ("linear", "attention", "communication", "other", "host"))
        assert parts == pytest.approx(values["total"], rel=1e-9)
        assert all(values[part] >= 0 for part in values)
        assert (values["communication"] > 0) == place.startswith("Yi")


@pytest.mark.parametrize("start", [0.5, 1.99, 2.0, 2.3, 7.0])
def test_the_fine_search_ends_at_the_edge(start: float) -> None:
    asked: list[float] = []

    def met(rate: float) -> bool:
        asked.append(rate)
        return rate <= 2.0

    found = fine_capacity(met, start)
    assert found <= 2.0 < found * (1 + FINE) and met(found)
    assert len(asked) == len(set(asked)) + 1  # none twice, but for the line above
    assert fine_capacity(lambda rate: False, start) == 0.0


# -- verdicts ------------------------------------------------------------------------------------------------------


def claims(*given: dict[str, Any]) -> Experiment:
    made = [Claim(says=f"claim {i}", source="Figure 0", **each) for i, each in enumerate(given)]
    return Experiment(title="", source="", shows="", drawing="table", setups={}, blocks=[], claims=made)


def records(**values: float) -> dict[str, dict[str, Any]]:
    return {name: {"values": {"qps": value}, "facts": f"facts of {name}"} for name, value in values.items()}


def test_verdicts_of_each_comparison_agree_and_fail() -> None:
    study = claims(
        {"compare": "ratio", "published": 2.0, "of": ["a:qps", "b:qps"]},
        {"compare": "ratio", "published": 3.0, "of": ["a:qps", "b:qps"]},
        {"compare": "value", "published": 1.0, "of": ["b:qps"]},
        {"compare": "value", "published": 2.0, "reading": 0.1, "of": ["b:qps"]},
        {"compare": "order", "of": ["a:qps", "b:qps"]},
        {"compare": "order", "of": ["b:qps", "a:qps"]},
        {"compare": "up_to", "published": 4.2, "of": ["a:qps", "b:qps", "b:qps", "c:qps"]},
        {"compare": "order", "of": ["a:qps", "z:qps"]},
    )
    verdicts = judge(study, records(a=2.1, b=1.0, c=0.25))
    yes, no = "agrees", "disagrees"
    assert [each.verdict for each in verdicts] == [yes, no, yes, no, yes, no, yes, "not run"]
    assert verdicts[0].off == pytest.approx(0.05)
    assert verdicts[1].sentence() == "claim 1: published 3 times, ours 2.1 times (-30.0 %): disagrees"
    assert verdicts[3].published == "2 ± 10.0 %"
    assert verdicts[4].ours == "a 2.1 > b 1" and verdicts[5].ours == "a 2.1 > b 1"  # by name, highest first
    assert verdicts[7].sentence() == "claim 7: not run"
    assert [str(each) for each in tally(verdicts)] == ["1 of 2 orders", "2 of 3 ratios", "1 of 2 absolute values"]


def test_a_claim_may_depend_on_the_draw() -> None:
    study = claims(
        {"compare": "value", "published": 1.0, "of": ["a:qps"]}, {"compare": "order", "of": ["a:qps", "b:qps"]}
    )
    found = {
        "a": {"values": {"qps": 1.1}, "draws": {"qps": [1.1, 1.0, 1.3]}, "facts": "crowded"},
        "b": {"values": {"qps": 0.9}, "facts": ""},
    }
    value, order = judge(study, found)
    assert value.verdict == "depends on the draw" and value.ours == "1.1 [1 to 1.3]" and "crowded" in value.explanation
    assert order.verdict == "agrees"
    assert str(tally([value, order])[1]) == "0 of 1 absolute values (1 by the draw)"


def test_an_order_names_what_its_numbers_are_of_with_each_draws_range() -> None:
    places = {"m/chat/1/vllm": [3.0, 2.0, 4.0], "m/chat/0.5/vllm": [1.0, 1.0, 1.0]}
    found = {place: {"values": {"qps": 0.0}, "draws": {"qps": draws}, "facts": ""} for place, draws in places.items()}
    found |= {place: records(a=value)["a"] for place, value in (("m/512/256", 2.0), ("m/512/whole", 1.0))}
    found |= {place: records(a=value)["a"] for place, value in (("m/decode/1", 2.0), ("m/prefill/64", 1.0))}
    names = [["m/chat/1/vllm:qps", "m/chat/0.5/vllm:qps"], ["m/512/256:qps", "m/512/whole:qps"],
             ["m/decode/1:qps", "m/prefill/64:qps"]]  # fmt: skip
    study = claims(*({"compare": "order", "of": of} for of in names))
    assert [each.ours for each in judge(study, found)] == [
        "at 1/s: 3 [2 to 4] > at 0.5/s: 1", "chunk 256: 2 > whole 1", "1 decode: 2 > prompt of 64 tokens: 1",
    ]  # fmt: skip


def test_a_claim_that_a_placebo_passes_is_marked() -> None:
    study = claims(
        {"compare": "order", "of": ["a:qps", "b:qps"]}, {"compare": "value", "published": 2.0, "of": ["a:qps"]}
    )
    found = {PAPER_HOST: records(a=2.0, b=1.0), PLACEBOS[0]: records(a=9.0, b=1.0), PLACEBOS[1]: records(a=0.5, b=1.0)}
    order, value = judge_all(study, found)[PAPER_HOST]
    assert order.placebos == PLACEBOS[:1] and order.says_little and not value.says_little
    assert little_in_words([order, value]).endswith("saying little of the predictor: 1 of the 2 that agree")
    assert little_in_words([order]).endswith("all of the 1 that agree") and little_in_words([value]) == ""
    rows = claims_table({PAPER_HOST: [order, value]})
    assert "class='unsure'>a 2" in rows and "class='good'>2 (" in rows  # green is what a placebo fails


def test_what_a_host_overhead_was_fitted_to_is_no_claim_of_it() -> None:
    study = claims({"compare": "value", "published": 1.0, "fitted": True, "of": ["a:qps"]})
    assert judge(study, records(a=1.0), "sarathi_osdi24_fig2")[0].verdict == "fitted"
    assert judge(study, records(a=1.0), PAPER_HOST)[0].verdict == "agrees"
    assert tally(judge(study, records(a=1.0), "sarathi_osdi24_fig2")) == []


def test_a_miss_is_explained_by_the_runs_and_by_which_side_is_off() -> None:
    study = claims(
        {"compare": "ratio", "published": 4.0, "of": ["a:qps", "b:qps"]},
        {"compare": "value", "published": 0.5, "of": ["b:qps"]},
    )
    ratio, value = judge(study, records(a=2.0, b=1.0))
    assert ratio.explanation.startswith("a has qps 2: facts of a")
    assert "b has qps 1 where 0.5 was published (+100 %): facts of b" in ratio.explanation
    assert value.explanation == "b has qps 1: facts of b"
    assert all(each.explanation == "" for each in judge(study, records(a=2.0, b=0.5)))


def test_equal_values_are_in_no_order_and_nothing_divides_by_zero() -> None:
    study = claims(
        {"compare": "order", "of": ["a:qps", "b:qps"]},
        {"compare": "ratio", "published": 2.0, "of": ["a:qps", "c:qps"]},
    )
    order, ratio = judge(study, records(a=1.0, b=1.0, c=0.0))
    assert order.verdict == "disagrees" and order.ours == "a 1 = b 1"
    assert ratio.verdict == "disagrees" and ratio.off is None and "no bound" in ratio.ours


def test_rank_correlation_is_scipys() -> None:
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    for _ in range(20):
        first, second = rng.integers(0, 5, 8).astype(float), rng.normal(size=8)
        assert spearman(first, second) == pytest.approx(spearmanr(first, second).statistic)
    assert spearman(np.ones(3), np.arange(3.0)) is None


def test_the_regret_of_a_wrong_choice() -> None:
    found = {
        "m/chat/strict/vllm": {"values": {"qps": 1.02}, "fine_qps": 1.0},
        "m/chat/strict/sarathi": {"values": {"qps": 1.0}, "fine_qps": 1.25},
        "m/chat/relaxed/vllm": {"values": {"qps": 1.0}, "fine_qps": 1.0},
        "m/chat/relaxed/sarathi": {"values": {"qps": 2.0}, "fine_qps": 2.0},
    }
    wrong, right = choices(found)
    assert (wrong.chosen, wrong.best, wrong.spearman) == ("vllm", "sarathi", pytest.approx(-1.0))
    assert wrong.regret == pytest.approx(0.2) and wrong.worst_error == pytest.approx(0.2)
    assert (right.chosen, right.regret, right.spearman) == ("sarathi", 0.0, pytest.approx(1.0))


# -- runs ----------------------------------------------------------------------------------------------------------


def test_a_resumed_study_is_an_uninterrupted_one_whatever_the_number_of_workers(tmp_path: Path) -> None:
    study = read(written(tmp_path, SMALL))
    whole = run(study, ["cuda_graphs"], tmp_path / "whole", workers=1)
    assert whole == run(study, ["cuda_graphs"], tmp_path / "two", workers=2)
    done: list[str] = []

    def some(point: Point) -> dict[str, Any]:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(point.id)
        return compute(point)

    with pytest.raises(KeyboardInterrupt):
        run(study, ["cuda_graphs"], tmp_path / "killed", workers=1, work=some)
    rest: list[str] = []
    again = run(study, ["cuda_graphs"], tmp_path / "killed", workers=1, work=lambda p: rest.append(p.id) or compute(p))
    assert len(rest) == 2 and not set(rest) & set(done)
    assert json.dumps(again) == json.dumps(whole)


def broken(point: Point) -> dict[str, Any]:
    if point.id.endswith("2/vllm"):
        raise ZeroDivisionError("by nothing")
    if point.id.endswith("1/vllm") and point.host == "eager":
        os.kill(os.getpid(), signal.SIGKILL)
    return {"values": {"p99_tbt": 1.0}, "facts": ""}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_crash_is_a_crash_and_the_others_are_kept(tmp_path: Path, workers: int) -> None:
    study = read(written(tmp_path, SMALL))
    with pytest.raises(StudyCrashedError) as error:
        run(study, ["cuda_graphs"], tmp_path / "run", workers=workers, work=broken)
    (crash,) = error.value.crashes
    assert crash.point == "Mistral-7B/chat/2/vllm" and crash.error == "ZeroDivisionError: by nothing"
    assert "broken" in crash.trace
    assert len(list((tmp_path / "run" / "points").glob("*.json"))) == 3


def test_a_worker_that_is_killed_is_a_crash_too(tmp_path: Path) -> None:
    study = read(written(tmp_path, SMALL))
    with pytest.raises(StudyCrashedError, match="its process ended with SIGKILL"):
        run(study, ["eager"], tmp_path / "run", workers=2, work=broken)


def test_a_record_that_is_damaged_or_of_another_point_is_not_taken(tmp_path: Path) -> None:
    study = read(written(tmp_path, SMALL))
    run(study, ["cuda_graphs"], tmp_path, workers=1, work=broken_never)
    first = sorted((tmp_path / "points").glob("*.json"))[0]
    first.write_text("{", encoding="utf-8")
    computed: list[str] = []
    run(study, ["cuda_graphs"], tmp_path, workers=1, work=lambda p: computed.append(p.id) or broken_never(p))
    assert len(computed) == 1
    point = expand(study, "cuda_graphs")[0]
    assert len({point.key(), replace(point, num_prompts=21).key(), replace(point, host="eager").key()}) == 3


def broken_never(point: Point) -> dict[str, Any]:
    return {"values": {"p99_tbt": 1.0}, "facts": ""}


def test_a_folder_is_one_studys(tmp_path: Path) -> None:
    for _ in range(2):
        with claimed(tmp_path / "a", "capacity"):
            pass
    with pytest.raises(InputError, match="holds the study capacity"), claimed(tmp_path / "a", "iso_qps"):
        pass
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").touch()
    with pytest.raises(InputError, match="holds no study"), claimed(tmp_path / "b", "capacity"):
        pass


# -- the door ------------------------------------------------------------------------------------------------------


def test_the_list_names_every_study(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["study", "list"]) == (0, "")
    said = capsys.readouterr().out
    assert all(name in said for name in names())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["capacity", "--confirm"], "use windtunnel search --confirm"),
        (["capasity"], "did you mean 'capacity'"),
        (["capacity", "--model", "GPT"], "--model GPT"),
        (["capacity", "--host-overhead", "slow"], "unknown host overhead 'slow'"),
        (["capacity", "--workers", "0"], "--workers 0"),
        (["capacity", "--num-prompts", "0"], "--num-prompts 0"),
        (["capacity", "--seeds", "0"], "--seeds 0"),
        (["capacity", "--model", "Yi", "--record", "r.json"], "is for whole studies"),
        (["all", "--json"], "run a study by its name"),
        (["capacity", "--json", "--markdown"], "remove one"),
    ],
)
def test_what_cannot_be_run_is_told(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, message = command(["study", "run", *arguments])
    assert code == 2 and said in message
    assert not list(tmp_path.iterdir())


REDUCED = {"operation_split", "piggybacking", "capacity", "iso_qps", "chunk_size_tradeoff"}  # that have a Mistral-7B


@pytest.mark.parametrize("name", studies.names())
def test_each_study_runs_from_end_to_end(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = "Mistral" if name in REDUCED else "TP4-PP2" if name == "hybrid_parallelism" else "Yi"
    seeds = "2" if name == "scheduler_ablation" else "1"
    flags = ["--model", model, "--num-prompts", "16", "--host-overhead", "cuda_graphs", "--seeds", seeds]
    out = tmp_path / "out"
    code, message = command(["study", "run", name, *flags, "--workers", "1", "--output-dir", str(out), "--json"])
    assert (code, message) == (0, "")
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["study"] == name and "16 requests" in results["reduced"]
    verdicts = results["judgements"]["cuda_graphs"]
    assert any(each["verdict"] != "not run" for each in verdicts)
    assert {key: results[key] for key in results if key != "output_dir"} == json.loads(
        (out / "results.json").read_text("utf-8")
    )
    page = (out / "report.html").read_text("utf-8")
    assert load(name).title.replace("'", "&#x27;") in page and "reduced" in page
    assert "http://" not in page.split("<script>")[0]
    assert not list(out.glob(".*"))


def test_both_host_overheads_are_on_one_page_and_in_markdown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    flags = ["--model", "Mistral", "--workers", "1", "--output-dir", str(out), "--markdown"]
    assert command(["study", "run", "piggybacking", *flags]) == (0, "")
    text = capsys.readouterr().out
    assert "| claim | published | the paper's engine | fitted to Figure 2 | a modern engine |" in text
    page = (out / "report.html").read_text("utf-8")
    assert "a modern engine" in page and "The paper&#x27;s engine" in page


def test_a_crash_at_the_door_writes_no_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Point) -> Deployment:
        raise RuntimeError("no luck")

    monkeypatch.setattr(Point, "deployment", fails)
    out = tmp_path / "out"
    code, _ = command(["study", "run", "piggybacking", "--workers", "1", "--output-dir", str(out)])
    assert code == 1
    said = capsys.readouterr().err
    assert "Mistral-7B/1 on sarathi_osdi24 crashed: RuntimeError: no luck" in said
    assert not (out / "report.html").exists() and not (out / "results.json").exists()


def test_ctrl_c_leaves_no_half_written_page(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = "import sys; from cli.__main__ import main; main(sys.argv[1:])"
    arguments = ["study", "run", "iso_qps", "--model", "Mistral", "--workers", "2", "--output-dir", str(out)]
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(out.glob("points/*.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and "interrupted" in said and "Traceback" not in said
    assert not list(out.glob("*.html")) and not list(out.glob("**/.*"))
