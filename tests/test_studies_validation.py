"""A validation compares what it says it compares: every number against one worked out by hand."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from engine.executors.start import start
from engine.results.metrics import QUANTILES
from engine.results.recorder import Run
from engine.results.tables import Columns
from engine.runtime.engine_spec import EngineSpec
from engine.scheduling.request import BatchShape
from engine.specs import HostOverhead, SchedulerSpec, catalog
from engine.workload.workload import Workload, WorkloadSpec, make_workload
from simulator.cluster import Deployment, deploy, simulate
from simulator.predictor.base import RuntimePredictor
from studies.pages.page import LIBRARY
from studies.pages.validation import validation_page, verdicts
from studies.validation.compare import Pair, compare, in_words, run_pair
from studies.validation.record import MOST_POINTS, curves, judge

SCHEDULER = SchedulerSpec(max_num_batched_tokens=32, max_num_seqs=8, max_model_len=64)
HOST = HostOverhead(name="made_up", iteration_s=0.002, sequence_s=0.0, layer_s=0.0, source="made up")
HOST_S = 0.003  # what it really was


class ByKind(RuntimePredictor):
    """A time (s) for each kind of batch; notes the shapes that it is asked for."""

    def __init__(self, decodes: float, prompts: float, hybrid: float) -> None:
        self.times = decodes, prompts, hybrid
        self.shapes: list[BatchShape] = []

    def stage_time(self, shape: BatchShape, stage: int) -> float:
        self.shapes.append(shape)
        return self.times[bool(shape.prefills) * (1 + bool(shape.num_decodes))]


def make_deployment(predictor: RuntimePredictor) -> Deployment:
    found = deploy("microsoft/phi-2", "a100", scheduler=SCHEDULER, num_gpu_blocks_override=64, predictor=predictor)
    return replace(found, host=HOST)


def make_workload_of(num_prompts: int, rate: float) -> Workload:
    return make_workload(
        WorkloadSpec(lengths="fixed", input_len=40, output_len=12, request_rate=rate, num_prompts=num_prompts)
    )


def simulated_pair(workload: Workload, engine: ByKind, predicted: Deployment) -> Pair:
    """A pair whose engine is a simulation with other times."""
    ours = simulate(workload, [replace(predicted, predictor=engine)], repeats=False)
    theirs = simulate(workload, [predicted])
    assert ours.iterations is not None and theirs.iterations is not None
    compute_s = ours.iterations["duration_s"] - HOST_S
    return Pair(ours, theirs, ours.iterations, theirs.iterations, list(engine.shapes), compute_s)


@pytest.fixture(scope="module")
def pair_and_result() -> tuple[Pair, Deployment, dict[str, Any]]:
    """Decodes are predicted 10 % too long, prompts 10 % too short, hybrid batches 25 % too long."""
    workload = make_workload_of(40, 20.0)
    deployment = make_deployment(ByKind(0.0110, 0.0180, 0.0250))
    pair = simulated_pair(workload, ByKind(0.010, 0.020, 0.020), deployment)
    return pair, deployment, compare(pair, deployment, workload)


def test_errors_of_iterations_by_kind_and_what_they_add(
    pair_and_result: tuple[Pair, Deployment, dict[str, Any]],
) -> None:
    pair, _, result = pair_and_result
    decodes = sum(not shape.prefills for shape in pair.shapes)
    prompts = sum(bool(shape.prefills) and not shape.num_decodes for shape in pair.shapes)
    hybrid = len(pair.shapes) - decodes - prompts
    assert min(decodes, prompts, hybrid) > 3
    found = result["iterations"]
    for name, count, error in (
        ("decodes alone", decodes, 0.1),
        ("prompts alone", prompts, -0.1),
        ("hybrid", hybrid, 0.25),
    ):
        of_kind = found["by_kind"][name]
        assert of_kind["count"] == count
        assert of_kind["bias"] == pytest.approx(error, rel=1e-3)
        assert of_kind["mape"] == of_kind["p50"] == of_kind["p95"] == pytest.approx(abs(error), rel=1e-3)
    count = len(pair.shapes)
    assert found["count"] == count and found["in_range"] == 1
    assert found["mape"] == pytest.approx((0.1 * (decodes + prompts) + 0.25 * hybrid) / count, rel=1e-3)
    assert found["bias"] == pytest.approx((0.1 * (decodes - prompts) + 0.25 * hybrid) / count, rel=1e-3)
    total = 0.01 * decodes + 0.02 * (prompts + hybrid)
    # of the time that ranks took: predicted less 2 ms against measured less 3 ms
    assert found["contributions"] == pytest.approx(
        {
            "decodes alone": decodes * (0.009 - 0.007) / total,
            "prompts alone": prompts * (0.016 - 0.017) / total,
            "hybrid": hybrid * (0.023 - 0.017) / total,
            "host": count * (0.002 - 0.003) / total,
        }
    )
    assert sum(found["contributions"].values()) == pytest.approx(found["bias_of_time"])
    assert found["bias_of_time"] == pytest.approx((0.011 * decodes + 0.018 * prompts + 0.025 * hybrid) / total - 1)


def test_without_a_host_the_kinds_make_up_the_whole_error(
    pair_and_result: tuple[Pair, Deployment, dict[str, Any]],
) -> None:
    pair, deployment, _ = pair_and_result
    found = compare(pair, replace(deployment, host=None), make_workload_of(40, 20.0))
    parts = found["iterations"]["contributions"]
    assert set(parts) == {"decodes alone", "prompts alone", "hybrid"}
    assert sum(parts.values()) == pytest.approx(found["iterations"]["bias_of_time"])
    assert found["largest"].startswith("the time of ")


def test_a_replay_with_measured_durations_is_the_same_run(
    pair_and_result: tuple[Pair, Deployment, dict[str, Any]],
) -> None:
    pair, _, result = pair_and_result
    assert result["replay"]["same"] and result["replay"]["engine"] == len(pair.shapes)
    assert not result["batches"]["same"]  # with other durations requests come in at other batches


@pytest.mark.parametrize(
    ("parts", "total", "said"),
    [
        ({"hybrid": 0.02, "host": -0.051}, -0.031, "the host's part of iterations is predicted too short by 5.1 %"),
        ({"hybrid": 0.02, "host": 0.01}, 0.03, "the ranks' work in hybrid batches is predicted too long by 2.0 %"),
        ({"decodes alone": -0.02}, -0.02, "the time of batches of decodes alone is predicted too short by 2.0 %"),
    ],
)
def test_the_largest_part_in_words(parts: dict[str, float], total: float, said: str) -> None:
    words = in_words({"iterations": {"contributions": parts, "bias_of_time": total}})
    assert words.startswith(said)
    assert words.endswith(f"the largest part of an error of {100 * total:+.1f} %")


# -- tables written by hand ----------------------------------------------------------------------------------------

PROMPT, DECODE = (10, 0, 1), (1, 1, 0)  # tokens, decodes, prompts
SHAPES = [BatchShape(10, 0, 0, ((10, 0),), 1, 0), BatchShape(1, 1, 11, (), 1, 1), BatchShape(1, 1, 12, (), 1, 1)]


def hand_written(batches: list[tuple[int, int, int]], others: list[tuple[int, int, int]]) -> Pair:
    """A pair of runs with these batches (10 ms each) and four made-up requests, those simulated in another order."""
    return Pair(
        engine=Run(made_up_summary(1.0), made_up_requests([1.0, 2.0, 3.0, 4.0]), None),
        simulated=Run(made_up_summary(1.1), made_up_requests([2.0, 4.0, 6.0, 9.0], order=[2, 0, 3, 1]), None),
        iterations=table_of(batches),
        simulated_iterations=table_of(others),
        shapes=SHAPES,
        compute_s=np.full(len(batches), 0.008),
    )


def table_of(batches: list[tuple[int, int, int]]) -> Columns:
    tokens, decodes, prompts = (np.array(column) for column in zip(*batches, strict=True))
    count = len(batches)
    return {"stage": np.zeros(count, dtype=np.int16), "start_s": 0.5 + 0.01 * np.arange(count),
            "duration_s": np.full(count, 0.01), "num_tokens": tokens, "num_decodes": decodes,
            "num_prefills": prompts}  # fmt: skip


def made_up_requests(ttft: list[float], order: list[int] | None = None) -> Columns:
    ids = np.array(order or range(len(ttft)))
    arrived = 0.25 * ids
    first = arrived + np.array(ttft)[ids]
    return {"request_id": ids, "arrived_s": arrived, "scheduled_s": arrived, "first_token_s": first,
            "last_token_s": first + 1.0, "output_tokens": np.full(len(ids), 3)}  # fmt: skip


def made_up_summary(scale: float) -> dict[str, Any]:
    gaps = [(0.0, 0.1 * scale), (0.5, 0.2 * scale), (0.99, 0.4 * scale), (1.0, 0.5 * scale)]
    return {"duration": 4.0, "mean_ttft_ms": 2500 * scale, "median_ttft_ms": 2000.0, "p99_ttft_ms": 3970 / scale,
            "mean_itl_ms": 200 * scale, "p99_itl_ms": 400 * scale, "mean_e2el_ms": 0.0, "request_throughput": 1.0,
            "output_throughput": 3 / scale, "total_token_throughput": 13.0, "tbt_quantiles_s": gaps}  # fmt: skip


ONE_REQUEST = Workload("one", np.zeros(1), np.array([10]), np.array([3]), 0)


def test_latencies_and_throughput_by_hand() -> None:
    pair = hand_written([PROMPT, DECODE, DECODE], [PROMPT, DECODE, DECODE])
    result = compare(pair, make_deployment(ByKind(0.01, 0.01, 0.01)), ONE_REQUEST)
    ttft = result["latencies"]["ttft"]
    assert ttft["mean"] == {"engine_s": 2.5, "simulated_s": pytest.approx(2.75), "error": pytest.approx(0.1)}
    assert ttft["p50"]["error"] == 0 and ttft["p99"]["error"] == pytest.approx(1 / 1.1 - 1)
    assert "p90" not in ttft
    # requests by their ids: sums of products of (-1.5, -0.5, 0.5, 1.5) and (-3.25, -1.25, 0.75, 3.75)
    assert ttft["pearson_r"] == pytest.approx(11.5 / (5 * 26.75) ** 0.5)
    assert result["latencies"]["e2e"]["mean"]["error"] is None  # nothing is no share of 0
    assert "pearson_r" not in result["latencies"]["tbt"]  # gaps are not of one request each
    assert result["latencies"]["tbt"]["p99"]["error"] == pytest.approx(0.1)
    errors = {name: each["error"] for name, each in result["throughput"].items()}
    assert errors == {"request_throughput": 0, "output_throughput": pytest.approx(1 / 1.1 - 1),
                      "total_token_throughput": 0}  # fmt: skip
    assert result["requests"] == 1 and result["engine_s"] == 4.0
    json.dumps(result, allow_nan=False)


def test_where_batches_first_differ() -> None:
    deployment = make_deployment(ByKind(0.01, 0.01, 0.01))
    engine = [PROMPT, DECODE, DECODE]
    for simulated, same, first, at_s in (
        (engine, True, None, None),
        ([PROMPT, DECODE, (2, 2, 0)], False, 2, 0.52),
        ([(9, 0, 1), DECODE, DECODE], False, 0, 0.5),
        ([*engine, DECODE], False, 3, None),  # the engine has no fourth batch that could begin
        ([PROMPT, DECODE], False, 2, 0.52),
    ):
        found = compare(hand_written(engine, simulated), deployment, ONE_REQUEST)
        assert found["batches"] == {"engine": 3, "simulated": len(simulated), "same": same, "first_difference": first,
                                    "at_s": None if at_s is None else pytest.approx(at_s)}  # fmt: skip
        assert found["replay"]["same"]


def test_an_engine_that_schedules_otherwise_is_found_by_the_replay() -> None:
    deployment = make_deployment(ByKind(0.01, 0.01, 0.01))
    chunked = [(6, 0, 1), (4, 0, 1), DECODE]
    found = compare(hand_written(chunked, chunked), deployment, ONE_REQUEST)
    assert found["batches"]["same"]
    assert not found["replay"]["same"] and found["replay"]["first_difference"] == 0
    short = hand_written([PROMPT, DECODE], [PROMPT, DECODE])
    found = compare(replace(short, shapes=SHAPES[:2]), deployment, ONE_REQUEST)
    assert not found["replay"]["same"] and "more batches than were measured" in found["replay"]["why"]


# -- the record ----------------------------------------------------------------------------------------------------


def test_curves_hold_quantiles_and_the_batches_times() -> None:
    pair = hand_written([PROMPT, DECODE, DECODE], [PROMPT, DECODE, DECODE])
    drawn = curves(pair, make_deployment(ByKind(0.0123456, 0.02, 0.03)))
    assert set(drawn) == {"ttft", "tbt", "e2e", "iterations"}
    middle = list(QUANTILES).index(0.5)
    assert len(drawn["ttft"]["engine"]) == len(drawn["tbt"]["simulated"]) == len(QUANTILES)
    assert [drawn["ttft"]["simulated"][i] for i in (0, middle, -1)] == [2, 5, 9]
    assert [drawn["e2e"]["engine"][i] for i in (0, middle, -1)] == [2, 3.5, 5]
    assert [drawn["tbt"]["simulated"][i] for i in (0, middle // 2, middle, -1)] == [0.11, 0.165, 0.22, 0.55]
    assert drawn["iterations"] == {
        "measured_ms": [10.0, 10.0, 10.0],
        "predicted_ms": [20.0, 12.346, 12.346],
        "kind": ["prompts alone", "decodes alone", "decodes alone"],
    }


def test_curves_without_gaps_and_with_many_batches() -> None:
    count = 2 * MOST_POINTS
    pair = hand_written([PROMPT] + [DECODE] * (count - 1), [PROMPT])
    lone = replace(pair.engine, summary={**pair.engine.summary, "tbt_quantiles_s": []})
    pair = replace(pair, engine=lone, shapes=[SHAPES[0], *[SHAPES[1]] * (count - 1)])
    drawn = curves(pair, make_deployment(ByKind(0.01, 0.02, 0.03)))
    assert "tbt" not in drawn
    assert {len(column) for column in drawn["iterations"].values()} == {MOST_POINTS}
    prompts = drawn["iterations"]["kind"].count("prompts alone")
    assert drawn["iterations"]["predicted_ms"].count(20.0) == prompts <= 1


# -- judgements and the page ---------------------------------------------------------------------------------------


def made_up_load(load: float | None, error: float, throughput: float = 0.0) -> dict[str, Any]:
    """A load all of whose latencies are off by `error`."""
    of_kind = {"count": 90, "mape": 0.0321, "p50": 0.02, "p95": 0.0876, "bias": -0.0123}
    value = {"engine_s": 0.5, "simulated_s": 0.5 * (1 + error), "error": error}
    statistics = dict.fromkeys(("mean", "p50", "p90", "p99"), value)
    return {
        "load": load,
        "request_rate": None if load is None else 10 * load,
        "requests": 777,
        "engine_s": 12.5,
        "iterations": {**of_kind, "bias_of_time": -0.0456, "in_range": 0.875, "by_kind": {"hybrid": of_kind},
                       "contributions": {"hybrid": -0.0414, "host": -0.0042}},
        "batches": {"engine": 90, "simulated": 91, "same": False, "first_difference": 17, "at_s": 1.25},
        "replay": {"engine": 90, "simulated": 90, "same": True, "first_difference": None, "at_s": None},
        "latencies": {"ttft": {**statistics, "pearson_r": 0.987}, "tbt": {}, "e2e": {"mean": value}},
        "throughput": {"request_throughput": {"engine": 5.0, "simulated": 5.0, "error": 0.0},
                       "output_throughput": {"engine": 50.0, "simulated": 50.0, "error": throughput}},
        "largest": "the ranks' work in hybrid batches is predicted too short by 4.1 % of it all",
        "curves": {"ttft": {"engine": (1 + QUANTILES).tolist(), "simulated": (1 + 2 * QUANTILES).tolist()},
                   "iterations": {"measured_ms": [1.0, 2.0], "predicted_ms": [1.1, 2.1], "kind": ["hybrid"] * 2}},
    }  # fmt: skip


def made_up_results(*loads: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "model": "some/model-7b",
        "device": "h100",
        "hardware": "a card <b>",
        "engine": "bfloat16",
        "scheduler": "sarathi",
        "workload": "azure_conv",
        "host_overhead": {"iteration_s": 0.00123, "sequence_s": 4.56e-6},
        "operators": {"gemm": {"count": 1234, "mape": 0.0234, "p50": 0.01, "p95": 0.07, "bias": 0.0045}},
        "loads": list(loads),
        "capacity": {"engine": 11.5, "simulated": 12.25, "error": 0.0652},
        **changes,
    }


class Page(HTMLParser):
    """A page's text, its cells and chips by their class, and what it refers to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.marked, self.references, self._class = "", [], [], ""  # type: ignore[var-annotated]
        self._script = False
        self.figures = 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self._script = tag in ("script", "style")
        self._class = found.get("class") or "" if tag in ("li", "td") else ""
        self.figures += found.get("class") == "figure"
        self.references += [found[name] for name in ("src", "href") if name in found]

    def handle_data(self, data: str) -> None:
        words = data.replace("\N{NO-BREAK SPACE}", " ")
        if not self._script:
            self.text += words
            if self._class:
                self.marked.append((self._class, words))
                self._class = ""


def test_latencies_may_be_off_by_more_near_the_capacity() -> None:
    for load, error, met in ((0.5, 0.049, True), (0.94, -0.051, False), (0.95, -0.099, True), (0.95, 0.101, False),
                             (None, 0.051, False)):  # fmt: skip
        judged = judge(made_up_load(load, error))
        names = ["Iterations", *(name for name in ("TTFT", "TBT", "E2E") for _ in range(2)), "Throughput"]
        assert [each.what for each in judged] == names
        found = {(each.what, each.statistic): each for each in judged}
        assert found["TTFT", "P50"].met is found["TTFT", "P99"].met is met
        assert found["TBT", "P99"].met is None and found["E2E", "P50"].error is None
        assert found["Iterations", "mean error"].met  # 3.2 %


def test_verdicts_are_of_the_load_that_is_furthest_from_its_target() -> None:
    # 9 % are less of what is allowed at 95 % load than 6 % are at half of it
    lines = verdicts(made_up_results(made_up_load(0.5, -0.06), made_up_load(0.95, 0.09, throughput=-0.021)))
    assert lines == [
        ("unsure", "12.5 % of the batches are outside the calibrated range: their times are extrapolated"),
        ("good", "Iterations: mean error 3.2 % at 50 % load (target 5 %)"),
        ("bad", "TTFT: P50 -6.0 % at 50 % load (target 5 %)"),
        ("unsure", "TBT: nothing to compare"),
        ("unsure", "E2E: nothing to compare"),
        ("bad", "Throughput: -2.1 % at 95 % load (target 2 %)"),
        ("good", "Replay: the same batches"),
    ]
    other = made_up_load(None, 0.01)
    other["replay"] = {"same": False, "first_difference": None, "why": "it ended early"}
    assert verdicts(made_up_results(other))[2] == ("good", "TTFT: P50 +1.0 % (target 5 %)")
    assert verdicts(made_up_results(other))[-1] == ("bad", "Replay: other batches")
    for inside, first in ((0.0, ("bad", "100 % of the batches are outside")), (0.95, ("good", "Iterations: mean"))):
        load = made_up_load(0.5, 0.01)
        load["iterations"] = {**load["iterations"], "in_range": inside}
        tone, words = verdicts(made_up_results(load))[0]
        assert (tone, words.startswith(first[1])) == (first[0], True)


def test_page_says_the_numbers_and_needs_only_the_plot_library(tmp_path: Path) -> None:
    results = made_up_results(made_up_load(0.5, 0.0789), made_up_load(0.95, 0.0789), version="9.9.9")
    path = validation_page(results).write(tmp_path / "new" / "validation.html")
    assert sorted(each.name for each in path.parent.iterdir()) == [LIBRARY, "validation.html"]
    page = Page(path)
    assert page.references == [LIBRARY] and "default-src 'none'" in path.read_text(encoding="utf-8")
    assert page.figures == 4  # one distribution and the batches' times of each load
    for verdict in verdicts(results):
        assert verdict in page.marked
    assert page.marked.count(("bad", "+7.9 %")) == 4  # P50 and P99 at half the capacity, in both tables
    assert page.marked.count(("good", "+7.9 %")) == 4  # allowed at 95 %
    for words in ("model-7b on h100", "a card <b>", "At 50 % load, 5 requests/s", "777 requests in 12.5 s",
                  "Engine", "500 ms", "539 ms", "TTFT 0.987", "87.5 % within the calibrated range",
                  "-4.6 %", "-4.1 %", "-0.4 %", "8.8 %", "The first 17 are the same; then, from 1.25 s into the run",
                  "Dense layers (GEMM)", "1,234", "2.3 %", "+6.5", "11.5 requests/s on the engine, 12.2 simulated",
                  "1.23 ms an iteration and 4.56 µs a sequence", "Windtunnel 9.9.9", "Targets",
                  "No request has more than one output token"):  # fmt: skip
        assert words in page.text, words
    assert "GPUs" not in page.text and " nan" not in page.text.lower()


def test_what_ran_on_a_cpu_is_held_to_no_target(tmp_path: Path) -> None:
    load = made_up_load(None, 0.2)
    load["batches"] = {**load["batches"], "first_difference": 0, "at_s": None}
    load["replay"] = {"engine": 9, "simulated": 8, "same": False, "first_difference": 3, "at_s": 0.1}
    changes: dict[str, Any] = {"device": "cpu", "capacity": None, "operators": {}, "host_overhead": None}
    page = Page(validation_page(made_up_results(load, **changes)).write(tmp_path / "validation.html"))
    assert ("plain", "TTFT: P50 +20.0 %") in page.marked and ("unsure", "On a CPU: held to no target") in page.marked
    assert "(target" not in page.text and not any(
        "%" in words for tone, words in page.marked if tone in ("good", "bad")
    )
    assert ("bad", "Replay: other batches") in page.marked and ("bad", "others") in page.marked
    assert "the errors are held to no target" in page.text and "Errors, held to no target" in page.text
    assert "The very first differs; then they differ" in page.text
    assert "forms other batches. The first 3 are the same" in page.text
    assert "No calibration" in page.text and "Capacity" not in page.text and "host overhead" not in page.text


# -- an engine -----------------------------------------------------------------------------------------------------


def test_a_pair_of_a_real_engine_and_the_simulator(tmp_path: Path) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 101, "hidden_size": 64,
              "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 96,
              "max_position_embeddings": 256}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = catalog.model(str(tmp_path / "config.json")).in_dtype("float32")
    deployment = deploy(model, "cpu", scheduler=SCHEDULER, num_gpu_blocks_override=32)
    spec = EngineSpec(
        model=model, folder=None, device="cpu", max_num_seqs=8, max_model_len=64,
        max_batch_tokens=32, block_size=16, parallel=deployment.parallel, num_blocks=32,
    )  # fmt: skip
    workload = make_workload_of(10, 100.0)
    executor = start(spec, "in_process")
    try:
        pair = run_pair(workload, deployment, executor, tmp_path / "runs")
    finally:
        executor.close()
    table = pq.read_table(tmp_path / "runs" / "engine" / "iterations.parquet")
    assert len(table) == len(pair.shapes) == len(pair.compute_s) > 20
    assert table["num_tokens"].to_pylist() == [shape.num_tokens for shape in pair.shapes]
    assert (pair.compute_s > 0).all() and (pair.compute_s <= pair.iterations["duration_s"] + 1e-6).all()
    result = compare(pair, deployment, workload)
    assert result["replay"]["same"]
    assert sum(result["iterations"]["contributions"].values()) == pytest.approx(result["iterations"]["bias_of_time"])
    results = made_up_results({"load": None, "request_rate": 100.0, **result, "curves": curves(pair, deployment)})
    page = Page(validation_page(json.loads(json.dumps(results))).write(tmp_path / "validation.html"))
    assert f"{result['batches']['engine']:,} batches" in page.text and page.figures == 4
