"""Pages of runs, searches and sweeps, one or several: what is read is what their files say; odd folders are told."""

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from engine.errors import InputError
from engine.results.files import write_json
from engine.results.slo import SLO
from engine.specs import ParallelSpec, SchedulerSpec
from engine.workload.workload import WorkloadSpec, make_workload
from simulator.cluster import Deployment, deploy, simulate
from studies.capacity.search import find_capacity
from studies.capacity.sweep import not_dominated
from studies.capacity.trial import at_rate, simulated_trial
from studies.pages.capacity_figures import MOST_BARS, capacity_bars, trials
from studies.pages.capacity_record import Point, Search, _point, read_search, read_sweep, responses, thresholds
from studies.pages.compare import run_panels
from studies.pages.compare_record import (
    bubbles,
    differing_settings,
    headline,
    kind_of,
    names_of,
    read_side,
    same_requests,
)
from studies.pages.page import LIBRARY
from studies.pages.report import write_page
from studies.pages.sweep_figures import heat_map, load_curves, trade_offs

SLOS = ("p99_tbt<=0.03", "p50_ttft<=0.1")
LOAD = WorkloadSpec(lengths="azure_conv", num_prompts=60, max_model_len=2048, request_rate=12.0)


def kind(policy: str, stages: int = 1) -> Deployment:
    return deploy("microsoft/phi-2", "a100", parallel=ParallelSpec(pipeline_parallel_size=stages),
                  scheduler=SchedulerSpec(policy=policy), predictor="roofline")  # fmt: skip


def make_run(folder: Path, policy: str = "sarathi", stages: int = 1, replicas: int = 1, **config: Any) -> Path:
    """The folder of a small simulated run."""
    folder.mkdir(parents=True)
    slos = [SLO.parse(slo) for slo in SLOS]
    run = simulate(make_workload(LOAD), [kind(policy, stages)] * replicas, slos=slos, folder=folder)
    write_json(folder / "summary.json", run.summary)
    (folder / "config.yaml").write_text(yaml.safe_dump({"scheduler": policy, "model": "<b>", "seed": 0, **config}))
    return folder


def make_search(folder: Path, policy: str) -> Path:
    """The folder of a small search, as the command leaves it."""
    slos = [SLO.parse(slo) for slo in SLOS]

    def trial(rate: float) -> Any:
        place = folder / "trials" / f"{rate:.6g}"
        place.mkdir(parents=True)
        made = simulated_trial(at_rate(LOAD, rate), [kind(policy)], slos, rate, place)
        write_json(place / "summary.json", made.summary)
        (place / "config.yaml").write_text(yaml.safe_dump({"scheduler": policy, "request_rate": rate}))
        return made

    capacity = find_capacity(trial, 10.0, tolerance=0.2)
    summary = capacity.best.summary if capacity.best else {}
    values = {
        **capacity.to_json(),
        "words": capacity.describe(),
        "slos": list(SLOS),
        "num_gpus": 1,
        "p99_tbt_ms": summary["p99_itl_ms"],
        "p50_ttft_ms": summary["median_ttft_ms"],
        "mean_tpot_ms": summary["mean_tpot_ms"],
        "output_throughput": summary["output_throughput"],
    }
    for each in values["trials"]:  # infinity is not JSON
        each["margin"] = None if each["margin"] == inf else each["margin"]
    write_json(folder / "search.json", values)
    return folder


def entry(name: str, qps: float | None, gpus: int = 1, tbt_ms: float = 50.0, **changes: Any) -> dict[str, Any]:
    """A point of a sweep; without a capacity one that crashed."""
    if qps is None:
        return {"name": name, "status": "crashed", "error": "ValueError: <b>boom</b>", "settings": {"device": name}}
    return {
        "name": name, "status": "done", "settings": {"device": name}, "max_qps_under_slo": qps, "outcome": "found",
        "binding_slo": "p99_tbt<=0.1s", "slos": ["p99_tbt<=0.1s"], "num_gpus": gpus, "output_throughput": 200 * qps,
        "p99_tbt_ms": tbt_ms, "p50_ttft_ms": 300.0, "mean_tpot_ms": 25.0, "requests_per_dollar": 1000 * qps / gpus,
        "device": name, "predictor": "calibrated on measurements of it", **changes,
    }  # fmt: skip


def load(rate: float, tbt_ms: float, tpot_ms: float = 25.0) -> dict[str, Any]:
    """A load of a point."""
    return {"rate": rate, "met": tbt_ms <= 100, "output_throughput": 200 * rate, "p50_ttft_ms": 300.0,
            "p99_tbt_ms": tbt_ms, "mean_tpot_ms": tpot_ms, "slos": {"p99_tbt<=0.1s": tbt_ms / 1e3}}  # fmt: skip


def spread(low: float, mid: float, high: float) -> dict[str, Any]:
    """The range of a capacity."""
    return {"seeds": 3, "intervals": {"max_qps_under_slo": {"low": low, "mid": mid, "high": high}}}


def make_sweep(folder: Path, *points: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    write_json(folder / "sweep.json", {"points": list(points), "gpu_price": 3.6})
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, two searches, a sweep."""
    place = tmp_path_factory.mktemp("folders")
    make_run(place / "sarathi")
    make_run(place / "piped", policy="vllm", stages=2, replicas=2, request_rate=12.5)
    make_search(place / "s-sarathi", "sarathi")
    make_search(place / "s-vllm", "vllm_v0")
    slow, fast = [load(1.0, 25, 20), load(2.0, 50, 40)], [load(2.5, 10, 20), load(5.0, 20, 40), load(6.25, 200, 50)]
    made = [
        entry("a100", 2.0, loads=slow, **spread(1.9, 2.0, 2.6)),
        entry("h100", 5.0, 2, 20.0, published=4.5, loads=fast, **spread(4.0, 5.0, 5.5)),
        entry("tpu", None),
    ]
    made.append(entry("l4", 0.0, outcome="none", output_throughput=None, p99_tbt_ms=None))
    make_sweep(place / "sweep", *made)
    return place


class Page(HTMLParser):
    """A page's text, references and figures, and which of these offer their data."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.html = path.read_text(encoding="utf-8")
        self.words: list[str] = []
        self.references: list[str] = []
        self.figures: set[str | None] = set()
        self.csv: set[str | None] = set()
        self._script = False
        self.feed(self.html)
        self.text = " ".join(" ".join(self.words).replace("\N{NO-BREAK SPACE}", " ").split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self._script = tag in ("script", "style")
        self.references += [tag for name in ("src", "href", "data", "srcset", "action") if name in values]
        if values.get("class") == "figure":
            self.figures.add(values["id"])
        if values.get("class") == "csv":
            self.csv.add(values["data-figure"])

    def handle_data(self, data: str) -> None:
        if not self._script:
            self.words.append(data)


def read_page(*folders: Path, output: Path | None = None) -> Page:
    page = Page(write_page(folders, output))
    assert page.references == ["script"] and (page.path.parent / LIBRARY).is_file()
    assert page.figures == page.csv != set()
    assert " nan" not in page.text.lower() and "infinity" not in page.text.lower()
    return page


# -- records -------------------------------------------------------------------------------------------------------


def test_output_tokens_by_each_time(place: Path) -> None:
    side = read_side(place / "piped", "piped")
    rows = pq.read_table(place / "piped" / "iterations.parquet").to_pandas()
    requests = pq.read_table(place / "piped" / "requests.parquet").to_pandas()
    start, last = requests.arrived_s.min(), rows[rows.stage == 1]
    assert side.record.summary["preemptions"] == 0
    for i in (0, 57, 199, 301, 399):
        now = start + side.record.timeline.output_s[i]
        decoded = last.num_decodes[last.start_s + last.duration_s <= now].sum()
        assert side.record.timeline.output_tokens[i] == decoded + (requests.first_token_s <= now).sum()
    timeline = side.record.timeline
    assert (
        timeline.output_tokens[-1] == side.record.summary["total_output_tokens"] == requests.output_tokens.sum() > 1000
    )


def test_settings_that_differ_and_the_headlines(place: Path) -> None:
    sides = [read_side(place / name, name) for name in ("sarathi", "piped")]
    differ = dict(differing_settings(sides))
    assert differ["scheduler"] == ["sarathi", "vllm"] and differ["request_rate"] == ["not set", "12.5"]
    assert "KV blocks" in differ and not {"model", "seed", "times"} & set(differ)
    assert same_requests(sides)
    lines = {line.name: line for line in headline(sides)}
    for i, side in enumerate(sides):
        assert lines["TBT, P99"].values[i] == pytest.approx(side.record.summary["p99_itl_ms"] / 1e3)
        assert lines["Output per device"].values[i] == side.record.summary["output_throughput"] / (1, 4)[i]
        assert lines["Output, steady window"].values[i] == side.record.summary["steady_output_throughput"]
    assert "Prefix cache hits" not in lines  # of runs without one
    sides[1].record.summary["prefix_hit_rate"] = 0.25
    assert {line.name: line.values for line in headline(sides)}["Prefix cache hits"] == [None, 25.0]
    replicas = sides[1].record.summary["replicas"]
    mean = np.mean([replica["stage_bubbles"] for replica in replicas], axis=0)
    assert len(replicas) == 2 and bubbles(sides[1].record) == pytest.approx(mean) and mean.max() > 0.01


def test_the_front_of_many_points() -> None:
    costs = np.random.default_rng(3).integers(0, 12, (80, 2)).astype(float)
    for mine, on_front in zip(costs.tolist(), not_dominated(costs), strict=True):
        beaten = any(x <= mine[0] and y <= mine[1] and [x, y] != mine for x, y in costs.tolist())
        assert on_front == (not beaten)


def test_a_search_has_the_margins_of_every_trial(place: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(place / "s-vllm", moved)
    search = read_search(moved, "s")
    written = {each["rate"]: each for each in json.loads((moved / "search.json").read_text())["trials"]}
    assert [trial.rate for trial in search.trials] == sorted(written)
    assert search.best is not None and search.best.is_relative_to(moved)
    assert float(search.best.name) == pytest.approx(search.point.qps or 0, rel=1e-5)
    given_up = [trial for trial in search.trials if trial.stopped_early]
    ended = [trial for trial in search.trials if not trial.stopped_early]
    assert given_up and ended
    for trial in given_up:
        assert trial.margins == {trial.stopped_early: inf} and trial.tbt_s is trial.ttft_s is None
    for trial in ended:
        assert set(trial.margins) == {str(SLO.parse(slo)) for slo in SLOS}
        assert max(trial.margins.values()) == pytest.approx(written[trial.rate]["margin"])
        assert trial.met == all(margin <= 1 for margin in trial.margins.values())
        assert trial.folder is not None
        summary = json.loads((trial.folder / "summary.json").read_text())
        assert trial.tbt_s == pytest.approx(summary["p99_itl_ms"] / 1e3)
    found = responses(read_side(search.best, "s"), search)
    assert len(found) == len(ended) > 1 and [point.words for point in found if point.is_run] == ["s"]
    assert responses(read_side(search.best, "s"), None) == [point for point in found if point.is_run]


def test_a_search_whose_trials_are_gone_still_has_its_rates(place: Path, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    values = json.loads((place / "s-vllm" / "search.json").read_text())
    values["trials"] = [{**each, "folder": None} for each in values["trials"]]
    values["confirmed"] = {"confirmed_qps": 3.25}
    write_json(tmp_path / "s" / "search.json", values)
    search = read_search(tmp_path / "s", "s")
    assert search.best is None and search.point.confirmed == 3.25
    assert all(trial.margins.keys() == {trial.binding} for trial in search.trials)
    page = read_page(tmp_path / "s")
    assert "The run at the capacity is not there" in page.text and "Confirmed 3.25 requests/s" in page.text


def test_points_of_a_sweep(place: Path) -> None:
    a100, h100, crashed, none = read_sweep(place / "sweep", "sw").points
    assert (a100.per_gpu, a100.tokens_per_gpu, a100.tbt_s) == (2.0, 400.0, 0.05)
    assert (h100.per_gpu, h100.tokens_per_gpu, h100.per_dollar, h100.published) == (2.5, 500.0, 2500.0, 4.5)
    assert crashed.qps is None and "boom" in crashed.error and crashed.per_gpu is None
    assert none.qps == 0.0 and none.tokens_per_gpu is None
    slos = [SLO.parse(text) for point in (a100, h100, crashed) for text in point.slos]
    assert thresholds(slos, "tbt", "p99") == [0.1] and thresholds(slos, "tbt", "p50") == []


# -- figures -------------------------------------------------------------------------------------------------------


def named(figure: Any) -> dict[str, Any]:
    return {trace.name: trace for trace in figure.data}


def test_runs_are_drawn_from_their_records(place: Path) -> None:
    sides = [read_side(place / name, name) for name in ("sarathi", "piped")]
    panels = {panel.title: panel for _, group in run_panels(sides, {}) for panel in group}
    assert len(panels) == 6
    ttft = named(panels["Time to first token (TTFT)"].figure)
    assert {"sarathi", "piped", "SLO p50_ttft<=0.1s"} == set(ttft)
    quantiles, values_s = sides[1].record.latencies["ttft"]
    np.testing.assert_allclose(ttft["piped"].y, 100 * quantiles)
    np.testing.assert_array_equal(ttft["piped"].x, 1e3 * values_s)  # shown in ms
    stages = named(panels["Pipeline bubbles"].figure)
    assert list(stages["sarathi"].x) == ["stage 0"] and list(stages["piped"].x) == ["stage 0", "stage 1"]
    assert named(panels["Output tokens over time"].figure)["piped"].y[-1] == sides[1].record.timeline.output_tokens[-1]
    spot = named(panels["Median TTFT against P99 TBT"].figure)["sarathi"]
    assert (1e3 * spot.x[0], 1e3 * spot.y[0]) == pytest.approx(
        [sides[0].record.summary[key] for key in ("p99_itl_ms", "median_ttft_ms")]
    )


def test_trials_are_drawn_against_their_thresholds(place: Path) -> None:
    one, other = (read_search(place / name, name) for name in ("s-sarathi", "s-vllm"))
    lines = named(trials([one]).figure)
    assert {"p99_tbt<=0.03s", "p50_ttft<=0.1s", "capacity"} <= set(lines)
    assert lines["capacity"].x[0] == one.point.qps
    for slo in ("p99_tbt<=0.03s", "p50_ttft<=0.1s"):
        expected = [(trial.rate, trial.margins[slo]) for trial in one.trials if not trial.stopped_early]
        assert list(zip(lines[slo].x, lines[slo].y, strict=True)) == expected
    both = named(trials([one, other]).figure)
    ended = [trial for trial in other.trials if not trial.stopped_early]
    ours = named(trials([one, other], {"s-sarathi": "#111111", "s-vllm": "#222222"}).figure)
    assert ours["s-vllm"].line.color == ours["capacity of s-vllm"].line.color == "#222222"
    assert list(both["s-vllm"].y) == [max(trial.margins.values()) for trial in ended]
    assert other.point.qps is not None and one.point.qps is not None
    low, high = 10 ** np.array(trials([one]).figure.layout.xaxis.range)
    assert low < one.point.qps < high < 10_000 == one.trials[-1].rate  # all at once is not among what is seen
    assert list(both["given up"].x) == [t.rate for search in (one, other) for t in search.trials if t.stopped_early]


def test_capacities_as_bars_with_what_was_published_and_their_ranges(place: Path) -> None:
    points = read_sweep(place / "sweep", "sw").points
    bars = named(capacity_bars(points).figure)
    names = ["h100", "a100", "tpu (crashed)", "l4"]  # the highest first
    assert list(bars["h100"].y) == list(bars["a100"].y) == names
    assert list(bars["h100"].x) == [5.0, None, None, None] and list(bars["a100"].x) == [None, 2.0, None, None]
    assert bars["h100"].marker.color != bars["a100"].marker.color
    assert list(bars["published"].x) == [4.5, None, None, None] and "confirmed on hardware" not in bars
    whiskers = bars["h100"].error_x
    assert (whiskers.array[0], whiskers.arrayminus[0]) == pytest.approx((0.5, 1.0)) and not bars[
        "published"
    ].error_x.array
    many = capacity_bars([points[0]] * MOST_BARS + [points[1]])
    own = capacity_bars(points, {"a100": "#111111", "h100": "#222222"}).figure.data[0]
    assert list(own.marker.color)[:2] == ["#222222", "#111111"]
    assert len(named(many.figure)["a100"].x) == MOST_BARS and named(many.figure)["h100"].x[0] == 5.0
    assert f"{MOST_BARS} highest of {MOST_BARS + 1}" in many.caption


def test_trade_offs_are_of_every_load(place: Path) -> None:
    points = read_sweep(place / "sweep", "sw").points
    price, fast, slow = trade_offs(points)
    speed = named(fast.figure)
    assert list(speed["a100"].x) == pytest.approx([50.0, 25.0]) and list(speed["a100"].y) == [200.0, 400.0]
    assert [each.split("<br>")[0] for each in speed["h100"].ids] == ["h100"] * 3
    assert list(speed["h100"].marker.size) == [6, 11, 6]  # the capacity is large
    assert list(speed["front"].x) == pytest.approx([25.0, 50.0]) and list(speed["front"].y) == [500.0, 250.0]
    assert [line.x0 for line in slow.figure.layout.shapes] == [pytest.approx(10.0)] and "the SLO" in slow.caption
    drawn = named(price.figure)
    assert list(drawn["a100"].y) == pytest.approx([3.6e6 / 3600 / 200, 3.6e6 / 3600 / 400])
    assert list(drawn["a100"].x) == pytest.approx([0.025, 0.05]) and price.title == "Price against P99 TBT"
    assert [each.figure for each in trade_offs(points[2:])[-2:]] == [None, None]
    unpriced = trade_offs([replace(points[0], usd_per_hour=None)])
    assert [each.title for each in unpriced] == [fast.title, slow.title]


def test_latency_is_drawn_beyond_the_capacity(place: Path) -> None:
    points = read_sweep(place / "sweep", "sw").points
    (panel,) = load_curves(points)
    lines = named(panel.figure)
    assert list(lines["h100"].x) == pytest.approx([1.25, 2.5, 3.125])  # by GPU
    assert list(lines["h100"].y) == pytest.approx([0.01, 0.02, 0.2])
    assert lines["h100"].marker.color[2] != lines["h100"].marker.color[1]  # an SLO is missed
    assert [line.y0 for line in panel.figure.layout.shapes] == [0.1]


def test_a_sweep_of_two_kinds_of_settings_is_a_map() -> None:
    keys = [(device, budget) for budget in (512, 2048) for device in ("a100", "h100", "l40s")]
    points = [
        _point(
            entry(f"{device},{budget}", 1.0 + i, settings={"device": device, "max_num_batched_tokens": budget}), "", "s"
        )
        for i, (device, budget) in enumerate(keys)
    ]
    (panel,) = heat_map(points[:-1])
    (cells,) = panel.figure.data
    assert list(cells.x) == ["budget 512", "budget 2,048"] and list(cells.y) == ["a100", "h100", "l40s"]
    assert [list(row) for row in cells.z] == [[1.0, 4.0], [2.0, 5.0], [3.0, None]]
    assert heat_map(points[:3]) == []


# -- pages ---------------------------------------------------------------------------------------------------------


def test_runs_side_by_side(place: Path, tmp_path: Path) -> None:
    page = read_page(place / "sarathi", place / "piped", output=tmp_path / "both.html")
    assert len(page.figures) == 6
    assert "sarathi and piped" in page.text and "phi-2 on 4 \N{MULTIPLICATION SIGN} a100_pcie, TP1-PP2" in page.text
    p99 = [read_side(place / name, name).record.summary["p99_itl_ms"] for name in ("sarathi", "piped")]
    assert f"({100 * (p99[1] / p99[0] - 1):+.{1 if abs(p99[1] / p99[0] - 1) < 0.9995 else 0}f} %)" in page.text
    assert "did not serve the same" not in page.text and str(place / "piped") in page.text


def test_a_run_beside_the_capacity_of_a_search(place: Path, tmp_path: Path) -> None:
    page = read_page(place / "sarathi", place / "s-vllm", output=tmp_path / "both.html")
    assert len(page.figures) == 8 and "Missed beyond it: p99_tbt<=0.03s (s-vllm)" in page.text


def test_searches_alone_and_side_by_side(place: Path, tmp_path: Path) -> None:
    page = read_page(place / "s-vllm")
    words = json.loads((place / "s-vllm" / "search.json").read_text())["words"]
    assert words in page.text and "at which p99_tbt<=0.03 and p50_ttft<=0.1" in page.text
    assert len(page.figures) == 1 + 11  # the trials, and the report of the run at the capacity
    assert (place / "s-vllm" / "report.html").is_file()
    assert len(read_page(place / "s-vllm", place / "s-sarathi", output=tmp_path / "both.html").figures) == 8
    values = json.loads((place / "s-vllm" / "search.json").read_text())
    for name, low, high in (("a", 1.0, 3.0), ("b", 2.0, 5.0)):
        (tmp_path / name).mkdir()
        write_json(
            tmp_path / name / "search.json", values | {"max_qps_under_slo": low + 1, **spread(low, low + 1, high)}
        )
    page = read_page(tmp_path / "a", tmp_path / "b", output=tmp_path / "alike.html")
    assert "The capacity of b can't be told apart from a: ranges overlap" in page.text


def test_sweeps_alone_and_beside_a_search(place: Path, tmp_path: Path) -> None:
    page = read_page(place / "sweep")
    assert "2 of 4 points have a capacity" in page.text and "1 crashed" in page.text
    assert "ValueError: <b>boom</b>" in page.text and "<b>boom" not in page.html  # it is escaped
    assert (
        "Most per GPU: h100: 2.5 requests/s (2 to 2.75 over 3 seeds), $2 per million output tokens ($1.82 to $2.5)."
        in page.text
    )
    assert "Can't be told apart from it, for their ranges overlap: a100" in page.text
    assert "do not rank" not in page.text and len(page.figures) == 7
    values = json.loads((place / "sweep" / "sweep.json").read_text())
    values["points"][0]["predictor"] = "roofline estimate"
    values["points"][0]["intervals"]["max_qps_under_slo"]["high"] = 1.95
    write_json(tmp_path / "sweep.json", values)
    unlike = read_page(tmp_path).text
    assert unlike.index("These rest on times of unlike kinds") < unlike.index("2 of 4 points have a capacity")
    assert "Most per GPU of those whose times are calibrated: h100: 2.5" in unlike
    assert "estimated (roofline): a100: 2 requests/s" in unlike and "told apart" not in unlike
    values["points"][0]["predictor"] = "calibrated"
    write_json(tmp_path / "sweep.json", values)
    assert "Its range over 3 seeds overlaps no other's; errors of the predicted times" in read_page(tmp_path).text
    both = read_page(place / "sweep", place / "s-vllm", output=tmp_path / "both.html")
    assert "sweep: h100" in both.text and len(both.figures) == 8


def test_a_run_writes_its_own_report_again(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(place / "sarathi", folder)
    for _ in range(2):
        assert "phi-2 on 1" in read_page(folder).text
    assert len(read_page(folder, output=tmp_path / "other.html").figures) == 11


def test_validations(tmp_path: Path) -> None:
    value = {"error": 0.07}
    load = {"load": 0.5, "iterations": {"mape": 0.03}, "throughput": {"a": {"error": -0.01}, "b": {"error": 0.0}},
            "latencies": {"ttft": {"p50": value, "p99": value}, "tbt": {}, "e2e": {}}}  # fmt: skip
    facts = {"model": "phi-2", "device": "h100", "hardware": "a card"}
    for name, loads in (("one", [load, {**load, "load": 0.97}]), ("two", [{**load, "load": None}])):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "validation.json", {**facts, "loads": loads})
    text = Page(write_page([tmp_path / "one", tmp_path / "two"], tmp_path / "both.html")).text
    assert "Error one, 50 % load one, 97 % load two Iterations mean error 3.0 % 3.0 % 3.0 %" in text
    html = (tmp_path / "both.html").read_text("utf-8")
    assert [*re.findall(r"<td class='(\w+)'>\+7\.0", html)] == ["bad", "good", "bad"] * 2


# -- what goes wrong -----------------------------------------------------------------------------------------------


def test_kinds(place: Path) -> None:
    assert [kind_of(place / name) for name in ("sarathi", "s-vllm", "sweep")] == ["run", "search", "sweep"]


def test_names_tell_folders_apart() -> None:
    assert names_of([Path("a/x"), Path("b/x")]) == ["a/x", "b/x"]
    assert names_of([Path("runs/one"), Path("runs/two")]) == ["one", "two"]
    assert names_of([Path("runs/" + "long" * 10), Path("runs/two")]) == ["A", "B"]
    with pytest.raises(InputError, match="a/x is there twice"):
        names_of([Path("a/x"), Path("b"), Path("a/../a/x")])
    with pytest.raises(InputError, match="27 folders are too many"):
        names_of([Path(str(i)) for i in range(27)])


def test_folders_that_are_none(place: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / ".run.partial-x").mkdir()
    (tmp_path / "run.incomplete").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "settings.json").write_text("{}")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.yaml").write_text("")
    for name, said in (
        ("none", "there is no folder"), ("empty", "no folder of a run"), (".run.partial-x", "half-written"),
        ("run.incomplete", "a failed run left"), ("begun", "unfinished search"), ("half", "lacks summary.json and"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            write_page([tmp_path / name])
    with pytest.raises(InputError, match="is a file"):
        write_page([place / "sarathi" / "summary.json"])


def test_files_that_cannot_be_read(place: Path, tmp_path: Path) -> None:
    for name, spoiled in (("summary.json", b"{"), ("requests.parquet", b"no"), ("config.yaml", b"a: [")):
        folder = tmp_path / name
        shutil.copytree(place / "sarathi", folder)
        (folder / name).write_bytes(spoiled)
        with pytest.raises(InputError, match=r"can't be read as a run|is not JSON|is not YAML"):
            write_page([folder], tmp_path / "out.html")
        with pytest.raises(InputError, match=r"can't be read as a run|is not JSON|is not YAML"):
            write_page([folder, place / "piped"], tmp_path / "out.html")
    for name in ("search", "sweep", "validation"):
        folder = tmp_path / name
        folder.mkdir()
        for text in ("[", "[]", "{}"):
            (folder / f"{name}.json").write_text(text)
            with pytest.raises(InputError, match=f"can't be read as a {name}|is not JSON|holds no object"):
                write_page([folder])
    (tmp_path / "sweep" / "sweep.json").write_text('{"points": []}')
    with pytest.raises(InputError, match="has no point"):
        write_page([tmp_path / "sweep"])
    assert not (tmp_path / "out.html").exists()


def test_what_does_not_go_together(place: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"sarathi \(a run\), \S*sweep \(a sweep\)"):
        write_page([place / "sarathi", place / "sweep"], tmp_path / "out.html")
    study = tmp_path / "study"
    study.mkdir()
    (study / "study.json").write_text("{}")
    with pytest.raises(InputError, match="unfinished study"):
        write_page([study])
    (study / "report.html").write_text("its page")
    with pytest.raises(InputError, match="a study, whose page stands alone"):
        write_page([study, place / "sarathi"], tmp_path / "out.html")
    assert write_page([study]) == study / "report.html"
    assert write_page([study], tmp_path / "copy.html").read_text() == "its page"


def test_nothing_is_overwritten(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = tmp_path / "taken.html"
    taken.write_text("mine")
    for output, said in (
        (taken, "exists: give another --output"), (tmp_path, "is a folder"), (tmp_path / "no" / "x.html", "no folder"),
        (place / "piped" / "summary.json", "exists"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            write_page([place / "sarathi"], output)
    monkeypatch.chdir(tmp_path)
    both = [place / "sarathi", place / "piped"]
    assert write_page(both) == Path("comparison.html")
    assert write_page(both) == Path("comparison.html")  # our own, made again
    (tmp_path / "comparison.html").write_text("somebody's")
    with pytest.raises(InputError, match=r"comparison\.html exists"):
        write_page(both)
    assert taken.read_text() == "mine"


def test_a_search_without_any_capacity(tmp_path: Path) -> None:
    trial = {"rate": 0.01, "met": False, "margin": None, "binding_slo": "p99_tbt<=0.001s", "stopped_early": None,
             "folder": None}  # fmt: skip
    values = {"max_qps_under_slo": 0.0, "outcome": "none", "binding_slo": "p99_tbt<=0.001s", "tolerance": 0.025,
              "trials": [trial], "slos": ["p99_tbt<=0.001s"]}  # fmt: skip
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
        write_json(folder / "search.json", values)
    search = read_search(folders[0], "a")
    assert isinstance(search, Search) and isinstance(search.point, Point) and search.best is None
    assert "no rate meets p99_tbt<=0.001s" in read_page(folders[0]).text
    assert "0 of 2 points have a capacity" in read_page(*folders, output=tmp_path / "both.html").text
