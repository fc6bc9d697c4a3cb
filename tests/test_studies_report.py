"""A run's report shows what its tables say, on one page that needs nothing else."""

import json
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from engine.results.metrics import QUANTILES, describe
from engine.results.recorder import ITERATION_COLUMNS
from engine.results.slo import SLO
from engine.specs import ParallelSpec, SchedulerSpec
from engine.workload.workload import WorkloadSpec, make_workload
from simulator.cluster import deploy, simulate
from studies.pages.figures import value_axis
from studies.pages.page import LIBRARY
from studies.pages.report import write_page
from studies.pages.run import times_source, verdict, write_report
from studies.pages.run_figures import panels, stage_shares
from studies.pages.run_record import read_record
from studies.pages.run_requests import MOST_BATCHES, _hits
from studies.pages.run_timeline import STALL_FACTOR, read_timeline

SLOS = ("p99_tbt<=0.02", "p99_ttft<=100", "mean_e2e<=0.001", "p50_scheduling_delay<=2")


def make_run(
    folder: Path,
    *,
    replicas: int = 1,
    stages: int = 1,
    policy: str = "sarathi",
    slos: tuple[str, ...] = SLOS,
    **workload: Any,
) -> Path:
    """The folder of a small simulated run."""
    folder.mkdir(parents=True, exist_ok=True)
    parallel = ParallelSpec(pipeline_parallel_size=stages)
    scheduler = SchedulerSpec(policy=policy)
    kind = deploy("microsoft/phi-2", "a100", parallel=parallel, scheduler=scheduler, predictor="roofline")
    requests = make_workload(WorkloadSpec(**workload))
    run = simulate(requests, [kind] * replicas, slos=[SLO.parse(slo) for slo in slos], folder=folder)
    summary = {**run.summary, "version": "9.9.9"}
    (folder / "summary.json").write_text(json.dumps(summary))
    config = {
        "model": "microsoft/phi-2",
        "request_rate": workload.get("request_rate"),
        "slo": list(slos),
        "note": "<b>&",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def steady(**changes: Any) -> dict[str, Any]:
    return {"lengths": "azure_conv", "request_rate": 12.0, "num_prompts": 80, "max_model_len": 2048, **changes}


@pytest.fixture(scope="module")
def pipelined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two replicas of three stages."""
    return make_run(tmp_path_factory.mktemp("pipelined"), replicas=2, stages=3, **steady())


class Page(HTMLParser):
    """What of a page matters here."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: list[str] = []
        self.ids: set[str] = set()
        self.words: list[str] = []
        self.scripts: dict[str, str] = {}
        self._inside: list[tuple[str, str]] = []
        self.feed(html)
        self.close()
        self.text = " ".join(" ".join(self.words).replace("\N{NO-BREAK SPACE}", " ").split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.ids.add(values.get("id") or "")
        self.references += [
            values[name] or "" for name in ("src", "href", "data", "srcset", "action") if name in values
        ]
        if tag in ("script", "style", "title"):
            self._inside.append((tag, values.get("id") or ""))

    def handle_endtag(self, tag: str) -> None:
        if self._inside and self._inside[-1][0] == tag:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.words.append(data)
        elif self._inside[-1][0] == "script" and self._inside[-1][1]:
            self.scripts[self._inside[-1][1]] = self.scripts.get(self._inside[-1][1], "") + data


def read_page(folder: Path) -> Page:
    path = write_report(folder)
    assert path == folder / "report.html"
    assert path.stat().st_size < 700e3
    return Page(path.read_text(encoding="utf-8"))


def time_mean(start: np.ndarray, end: np.ndarray, value: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Mean of `value` over the time in each bin that intervals cover, from their overlaps with every bin."""
    overlap = np.minimum(end[:, None], edges[1:]) - np.maximum(start[:, None], edges[:-1])
    overlap = np.maximum(overlap, 0.0)
    time = overlap.sum(axis=0)
    return np.divide((overlap * value[:, None]).sum(axis=0), time, out=np.zeros(len(time)), where=time > 1e-9)


def test_states_are_time_weighted_means_of_the_first_stage(pipelined: Path) -> None:
    record = read_record(pipelined)
    timeline, edges = record.timeline, record.timeline.edges_s
    table = pq.read_table(pipelined / "iterations.parquet").to_pandas()
    origin = pq.read_table(pipelined / "requests.parquet")["arrived_s"].to_numpy().min()
    first = table[table.stage == 0]
    assert len(first) > 100
    assert timeline.batches == len(first) == record.summary["simulator"]["batches"]
    assert len(edges) - 1 == 240

    start, end = first.start_s.to_numpy() - origin, (first.start_s + first.duration_s).to_numpy() - origin
    decodes, tokens = first.num_decodes.to_numpy(), first.num_tokens.to_numpy()
    np.testing.assert_allclose(timeline.decode_tokens, time_mean(start, end, decodes, edges), atol=1e-6)
    np.testing.assert_allclose(timeline.prefill_tokens, time_mean(start, end, tokens - decodes, edges), atol=1e-5)
    for replica in range(2):
        own = (first.replica == replica).to_numpy()
        for column, found in (
            (100 * first.kv_blocks / record.summary["replicas"][replica]["num_gpu_blocks"], timeline.kv_percent),
            (first.num_running, timeline.num_running),
            (first.num_waiting, timeline.num_waiting),
        ):
            expected = time_mean(start[own], end[own], column.to_numpy()[own], edges)
            np.testing.assert_allclose(found[replica], expected, atol=1e-6)
    peak = 100 * (first.kv_blocks / record.summary["replicas"][0]["num_gpu_blocks"]).max()
    assert timeline.peak_kv_percent == pytest.approx(peak)


def test_gaps_are_binned_where_they_ended(pipelined: Path) -> None:
    timeline = read_record(pipelined).timeline
    table = pq.read_table(pipelined / "iterations.parquet").to_pandas()
    ended = table[(table.stage == 2) & (table.max_tbt_s > 0)]
    assert len(ended) > 100
    index = np.searchsorted(timeline.edges_s, (ended.start_s + ended.duration_s).to_numpy(), side="right") - 1
    index = np.minimum(index, len(timeline.max_tbt_s) - 1)
    gaps = ended.max_tbt_s.to_numpy()
    for i in range(len(timeline.max_tbt_s)):
        own = gaps[index == i]
        if len(own):
            assert timeline.max_tbt_s[i] == own.max()
            assert timeline.median_tbt_s[i] == pytest.approx(np.sort(own)[(len(own) - 1) // 2], rel=0.0101)
        else:
            assert np.isnan(timeline.max_tbt_s[i]) and np.isnan(timeline.median_tbt_s[i])


def test_whole_prompts_stall_decodes(tmp_path: Path) -> None:
    record = read_record(make_run(tmp_path, policy="vllm_v0", **steady(request_rate=30.0)))
    gaps = pq.read_table(tmp_path / "iterations.parquet")["max_tbt_s"].to_numpy()
    threshold = STALL_FACTOR * record.summary["median_itl_ms"] / 1e3
    assert record.timeline.stalled_batches == (gaps > threshold).sum() > 0
    (panel,) = [panel for _, group in panels(record) for panel in group if panel.title.endswith("tokens over time")]
    assert f"{record.timeline.stalled_batches} of {record.timeline.batches:,} batches" in panel.caption
    stalls = [trace for trace in panel.figure.data if trace.name == "longest, a stall"]
    assert len(stalls[0].y) == (record.timeline.max_tbt_s > threshold).sum()


def test_distributions(pipelined: Path) -> None:
    record = read_record(pipelined)
    requests = pq.read_table(pipelined / "requests.parquet").to_pandas()
    e2e = np.sort((requests.last_token_s - requests.arrived_s).to_numpy())
    values_s = {metric: values for metric, (_, values) in record.latencies.items()}
    assert values_s["e2e"][0] == e2e[0]
    assert values_s["e2e"][-1] == e2e[-1]
    p99 = values_s["ttft"][list(QUANTILES).index(0.99)]
    assert 1e3 * p99 == pytest.approx(record.summary["p99_ttft_ms"])
    assert 1e3 * values_s["tbt"][-1] == pytest.approx(record.summary["max_itl_ms"])
    assert record.arrival_rate == pytest.approx(79 / (requests.arrived_s.max() - requests.arrived_s.min()))


def test_page_needs_nothing_but_the_plot_library_beside_it(pipelined: Path) -> None:
    page = read_page(pipelined)
    assert page.references == [LIBRARY]
    assert page.tags.count("script") == 3
    assert "link" not in page.tags and "img" not in page.tags
    html = (pipelined / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in html  # so a browser fetches nothing either
    assert "plotly.js v" in (pipelined / LIBRARY).read_text(encoding="utf-8") and "plotly.js v" not in html
    figures = json.loads(page.scripts["figures"])
    assert len(figures) == 11
    assert set(figures) <= page.ids


def test_a_standalone_page_has_the_library_in_it(pipelined: Path, tmp_path: Path) -> None:
    path = write_page([pipelined], tmp_path / "alone.html", standalone=True)
    html = path.read_text(encoding="utf-8")
    assert [each.name for each in tmp_path.iterdir()] == ["alone.html"]
    assert Page(html).references == [] and html.count("plotly.js v") == 1


def test_a_page_of_2000_requests_is_light(tmp_path: Path) -> None:
    folder = make_run(tmp_path, stages=2, **steady(num_prompts=2000, request_rate=60.0))
    path = write_report(folder)
    assert 100e3 < path.stat().st_size < 700e3


def test_requests_are_drawn_from_the_table(pipelined: Path) -> None:
    record = read_record(pipelined)
    table = pq.read_table(pipelined / "requests.parquet").to_pandas()
    origin = table.arrived_s.min()
    took = table.last_token_s - table.arrived_s
    slowest = table.loc[took.sort_values(ascending=False, kind="stable").index[:20]]
    rows = record.requests.slowest
    assert list(rows["id"]) == list(slowest.request_id)
    np.testing.assert_allclose(rows["e2e_s"], took[slowest.index])
    np.testing.assert_allclose(rows["waited_s"], slowest.scheduled_s - slowest.arrived_s)
    np.testing.assert_allclose(rows["arrived_s"], slowest.arrived_s - origin)
    np.testing.assert_allclose(record.requests.ttft_s, table.first_token_s - table.arrived_s, rtol=1e-6)
    assert list(record.requests.prompt_tokens) == list(table.prompt_tokens)
    figures = {panel.title: panel.figure for _, group in panels(record) for panel in group}
    bars = figures["The slowest requests"].data
    np.testing.assert_allclose(sum(np.array(trace.x) for trace in bars), rows["e2e_s"])
    dots = figures["TTFT by prompt length"].data[0]
    assert len(dots.x) == len(table)


def test_the_excerpt_is_around_the_longest_gap(pipelined: Path) -> None:
    excerpt = read_record(pipelined).excerpt
    assert excerpt is not None and excerpt.stages == 3
    table = pq.read_table(pipelined / "iterations.parquet").to_pandas()
    longest = table.loc[table.max_tbt_s.idxmax()]
    origin = pq.read_table(pipelined / "requests.parquet")["arrived_s"].to_numpy().min()
    assert excerpt.gap_s == longest.max_tbt_s and excerpt.replica == longest.replica
    assert excerpt.time_s == pytest.approx(longest.start_s + longest.duration_s - origin)
    own = table[table.replica == excerpt.replica]
    for stage in range(3):
        starts = excerpt.rows["start_s"][excerpt.rows["stage"] == stage]
        every = np.sort(own[own.stage == stage].start_s.to_numpy()) - origin
        assert len(starts) == min(MOST_BATCHES, len(every))
        first = np.flatnonzero(np.isclose(every, starts[0]))[0]
        np.testing.assert_allclose(starts, every[first : first + len(starts)])  # no batch is left out between


def test_prefix_hits_by_time(tmp_path: Path) -> None:
    prompts, hits = np.array([100, 100, 300, 500]), np.array([0, 50, 300, 0])
    scheduled = np.array([0.0, 1.0, 9.0, 10.0])
    edges, percent = _hits(scheduled, prompts, hits)
    assert (edges[0], edges[-1]) == (0.0, 10.0) and len(percent) == len(edges) - 1 == 4
    assert percent[0] == pytest.approx(25.0) and percent[-1] == pytest.approx(37.5)
    assert np.isnan(percent[1:3]).all()
    record = read_record(make_run(tmp_path, **steady(num_prompts=5)))
    assert "Prefix-cache hits over time" not in {panel.title for _, group in panels(record) for panel in group}


def test_page_says_the_verdict_and_every_slo(pipelined: Path) -> None:
    page = read_page(pipelined)
    summary = read_record(pipelined).summary
    said = verdict(summary)
    assert [tone for tone, _ in said[1:]] == ["good" if slo["met"] else "bad" for slo in summary["slos"]]
    assert {tone for tone, _ in said[1:]} == {"good", "bad"}
    assert [text.lower() for _, text in said] == [text.lower() for text in describe(summary)]
    for _, text in said:
        assert text in page.text
    assert all(slo in page.text for slo in SLOS)
    assert "phi-2 on 6 \N{MULTIPLICATION SIGN} a100_pcie" in page.text
    assert "2 replicas of windtunnel, TP1-PP3, under the sarathi scheduler (token budget 512)" in page.text
    assert "80 requests (azure_conv) at 12 requests/s" in page.text
    assert "An estimate" in page.text and summary["replicas"][0]["predictor"] in page.text
    assert "<b>&" in page.text  # of the configuration, escaped
    assert "windtunnel simulate --config config.yaml" in page.text and "Windtunnel 9.9.9" in page.text


def test_measured_runs_and_predictions_out_of_range_say_so(tmp_path: Path) -> None:
    folder = make_run(tmp_path, **steady(num_prompts=5))
    table = pq.read_table(folder / "iterations.parquet")
    false = pa.array(np.zeros(len(table), dtype=bool))
    outside = table.set_column(table.column_names.index("in_range"), "in_range", false)
    pq.write_table(outside, folder / "iterations.parquet")
    assert f"{len(table):,} batches (100 %) are outside" in times_source(read_record(folder))[2]
    pq.write_table(
        outside.set_column(table.column_names.index("predicted"), "predicted", false), folder / "iterations.parquet"
    )
    assert times_source(read_record(folder))[1] == "Measured"


def test_stages_add_up_and_many_are_summarised(pipelined: Path) -> None:
    record = read_record(pipelined)
    entries = stage_shares(record)
    assert [label for label, _ in entries] == [f"replica {i}, stage {j}" for i in range(2) for j in range(3)]
    for i, replica in enumerate(record.summary["replicas"]):
        for j in range(3):
            work, bubble, idle = stage_shares(record)[3 * i + j][1][:, 0]
            assert work == pytest.approx(replica["stage_utilization"][j])
            assert work + bubble + idle == pytest.approx(1)
            assert bubble / (work + bubble) == pytest.approx(replica["stage_bubbles"][j])
    record.summary["replicas"] *= 10
    assert [label for label, _ in stage_shares(record)] == [f"stage {j}, 20 replicas" for j in range(3)]


@pytest.mark.parametrize(
    ("workload", "settings", "expected"),
    [
        (
            {"lengths": "fixed", "input_len": 100, "output_len": 20, "arrival": "burst", "num_prompts": 1},
            {},
            "serving 1 request",
        ),
        (
            {"lengths": "fixed", "input_len": 100, "output_len": 1, "arrival": "burst", "num_prompts": 30},
            {},
            "no gap between tokens",
        ),
        (
            {"lengths": "fixed", "input_len": 9, "output_len": 1, "arrival": "burst", "num_prompts": 1},
            {},
            "came at once",
        ),
        (steady(request_rate=100.0, num_prompts=200), {"replicas": 64}, "64 replicas"),
        (steady(), {"slos": ()}, "No SLO was set"),
        (steady(), {"stages": 4}, "PP4"),
    ],
)
def test_unusual_runs(tmp_path: Path, workload: dict[str, Any], settings: dict[str, Any], expected: str) -> None:
    folder = make_run(tmp_path, **settings, **workload)
    page = read_page(folder)
    assert expected in page.text
    assert " nan" not in page.text.lower()
    assert set(json.loads(page.scripts["figures"])) <= page.ids


def test_reading_takes_little_memory(tmp_path: Path) -> None:
    """Of a table of more than 200 MB only a little is ever in memory."""
    rows = 4_000_000
    path = tmp_path / "iterations.parquet"
    schema = pa.schema([(name, pa.from_numpy_dtype(kind)) for name, kind in ITERATION_COLUMNS.items()])
    block: dict[str, Any] = {name: np.ones(rows // 20, dtype=np.int32) for name in schema.names}
    block |= {"replica": block["replica"] * 0, "stage": block["stage"] * 0}
    with pq.ParquetWriter(path, schema) as writer:
        for i in range(20):
            block["start_s"] = np.arange(i * rows // 20, (i + 1) * rows // 20) * 0.01
            block["duration_s"] = block["max_tbt_s"] = np.full(rows // 20, 0.01)
            table = pa.table({name: pa.array(block[name]).cast(schema.field(name).type) for name in block})
            writer.write_table(table.select(schema.names).cast(schema))
    assert table.nbytes * 20 > 200e6
    summary = {"replicas": [{"num_gpu_blocks": 10, "stage_utilization": [1.0]}], "median_itl_ms": 10.0}
    pool, before = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        timeline = read_timeline(path, summary, 0.0, rows * 0.01)
        numpy_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)
    assert timeline.batches == rows
    np.testing.assert_allclose(timeline.kv_percent, 10.0)
    assert 0 < pool.max_memory() < 40e6
    assert 0 < numpy_bytes < 60e6


def test_unfinished_folder_is_refused(tmp_path: Path) -> None:
    folder = make_run(tmp_path, **steady(num_prompts=3))
    (folder / "iterations.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="iterations"):
        write_report(folder)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(("low", "high"), [(1.1, 1.3), (0.3, 1.1), (1.2, 5.0), (0.05, 0.9), (10, 400), (1, 3e4)])
def test_a_logarithmic_axis_has_ticks_enough_within_it(low: float, high: float) -> None:
    axis = value_axis(np.array([low, high]), logarithmic=True)
    ticks = np.log10(axis["tickvals"])
    assert 4 <= len(ticks) <= 10
    assert axis["range"][0] <= ticks.min() and ticks.max() <= axis["range"][1]
