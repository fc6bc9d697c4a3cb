"""One table of metrics: an entry that is added to it is everywhere, and what is not in it is an error everywhere."""

import re
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from cli.output import print_summary
from engine.errors import InputError
from engine.results.metric_table import METRICS, REQUEST_COLUMNS, Metric, add_metric, drawn_metrics, find_metric
from engine.results.metrics import latencies, meets, summarize, summary_key, tbt_percentiles
from engine.results.recorder import Recorder, Run, request_row
from engine.results.run_folder import write_summary
from engine.results.slo import SLO
from engine.scheduling.request import Request
from engine.specs import SchedulerSpec
from engine.workload.workload import Workload
from simulator.cluster import deploy, simulate
from simulator.predictor.base import FixedTable
from studies.capacity.trial import hopeless, simulated_trial
from studies.pages.run import write_report

DOCS = Path(__file__).parents[1] / "docs"
RNG = np.random.default_rng(5)
LOAD = Workload("some", np.cumsum(RNG.exponential(0.05, 60)), RNG.integers(1, 30, 60), RNG.integers(1, 12, 60), 0)
SERVER = deploy(
    "microsoft/phi-2", "a100", num_gpu_blocks_override=10_000,
    predictor=FixedTable([[0.01 + 0.001 * i for i in range(20)]]),
    scheduler=SchedulerSpec(max_num_seqs=4, max_num_batched_tokens=16, max_model_len=2048, watermark=0.0),
)  # fmt: skip


@pytest.fixture
def table() -> Iterator[None]:
    """The table, put back afterwards."""
    before = dict(METRICS)
    try:
        yield
    finally:
        METRICS.clear()
        METRICS.update(before)


def decode_time(**changes: Any) -> Metric:
    entry: dict[str, Any] = {
        "key": "decode_time",
        "name": "decode time",
        "definition": "last token - first token",
        "value": lambda row: row["last_token_s"] - row["first_token_s"],
        "aliases": ("decoding",),
        "least_tokens": 2,
        "title": "Time of the decodes",
    }
    return Metric(**(entry | changes))


def run(*slos: str, folder: Path | None = None) -> Run:
    return simulate(LOAD, [SERVER], slos=[SLO.parse(text) for text in slos], folder=folder)


def decode_times(requests: dict[str, Any]) -> Any:
    """By other means: the gaps of a request are as many as its tokens but one, and add up to this."""
    several = requests["output_tokens"] > 1
    return (requests["last_token_s"] - requests["first_token_s"])[several]


# -- one entry is all it takes ---------------------------------------------------------------------------------------


def test_a_new_entry_is_in_the_summary_in_goodput_and_an_slo(table: None) -> None:
    without = run("p90_e2e<=0.2")
    add_metric(decode_time())
    within = run("p90_e2e<=0.2", "p90_decoding<=0.08")
    steady = {key for key in within.summary if key.startswith("steady_") and "decode_time" in key}
    assert "steady_median_decode_time_ms" in steady
    new = {key: value for key, value in within.summary.items() if "decode_time" in key and key not in steady}
    expected = decode_times(within.requests)
    assert 10 < len(expected) < len(LOAD)
    assert set(new) == {
        f"{name}_decode_time_ms" for name in ("mean", "std", "max", "median", "p90", "p95", "p99", "p99.9")
    }
    assert new["mean_decode_time_ms"] == pytest.approx(1e3 * expected.mean())
    assert new["p90_decode_time_ms"] == pytest.approx(1e3 * np.percentile(expected, 90))
    unchanged = (
        set(within.summary) - set(new) - steady - {"slos", "requests_meeting_slos", "request_goodput", "simulator"}
    )
    assert {key: without.summary[key] for key in unchanged} == {key: within.summary[key] for key in unchanged}
    verdict = within.summary["slos"][1]
    assert verdict["slo"] == "p90_decode_time<=0.08s"
    assert verdict["value_s"] == pytest.approx(np.percentile(expected, 90))
    both = run("p90_decode_time<=0.08").summary["requests_meeting_slos"]
    assert both == (expected <= 0.08).sum() + (len(LOAD) - len(expected))  # one token: nothing to object to
    assert 0 < both < len(LOAD)


@pytest.mark.parametrize("statistic", ["mean", "p50", "max"])
def test_a_new_entry_gives_a_trial_up_early(table: None, statistic: str) -> None:
    add_metric(decode_time())
    value_s = run().summary[summary_key(statistic, "decode_time")] / 1e3
    missed, met = (SLO("decode_time", statistic, share * value_s) for share in (0.5, 1.001))
    early = simulated_trial(LOAD, [SERVER], [missed], 1.0)
    assert not early.met and early.summary["stopped_early"] == str(missed)
    assert early.summary["completed"] < len(LOAD)
    assert simulated_trial(LOAD, [SERVER], [met], 1.0).met


def test_a_new_entry_is_printed_and_drawn(table: None, tmp_path: Path) -> None:
    add_metric(decode_time())
    made = run("p90_decode_time<=0.08", folder=tmp_path)
    write_summary(tmp_path, made.summary)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": "microsoft/phi-2"}))
    console = Console(width=200, record=True, file=StringIO())
    summary = {key: value for key, value in made.summary.items() if key != "simulator"}  # how long it took
    print_summary(summary, [1], tmp_path, console)
    row = next(line for line in console.export_text().splitlines() if line.strip().startswith("decode time"))
    assert row.split()[2] == f"{made.summary['mean_decode_time_ms'] / 1e3:.4g}"
    page = write_report(tmp_path).read_text("utf-8")
    assert "decode time" in page and "Time of the decodes" in page


def test_a_request_that_lacks_the_metric_is_not_in_its_mean(table: None) -> None:
    add_metric(decode_time(least_tokens=6))
    values = latencies(run().requests)["decode_time"]
    assert (np.isnan(values) == (run().requests["output_tokens"] < 6)).all()
    assert METRICS["decode_time"].count(LOAD.output_tokens) == (~np.isnan(values)).sum() > 0


# -- early stopping --------------------------------------------------------------------------------------------------


def finished(number: int, e2e: float) -> Request:
    request = Request(number, float(number), 1, 2)
    request.scheduled_at = float(number)
    request.token_times.extend([number + e2e / 2, number + e2e])
    return request


@pytest.mark.parametrize(
    ("lower_bound_s", "hopeless_after"),
    [(0.0, 2), (1.0, 1), (-3.0, 3), (None, None)],
)
def test_a_mean_is_hopeless_by_the_lower_bound_of_what_is_to_come(
    table: None, lower_bound_s: float | None, hopeless_after: int | None
) -> None:
    """Four requests may take 10 s in all (their mean 2.5 s), and each that finishes took 7.5 s."""
    add_metric(
        Metric(
            key="whole", name="whole", definition="last token - arrival", lower_bound_s=lower_bound_s,
            value=lambda row: row["last_token_s"] - row["arrived_s"],
        )
    )  # fmt: skip
    load = Workload("four", np.arange(4.0), np.ones(4, dtype=int), np.full(4, 2), 0)
    watch = hopeless([SLO("whole", "mean", 2.5)], load)
    after = next((count for count in (1, 2, 3) if watch(finished(count, 7.5)) is not None), None)
    assert after == hopeless_after


def test_what_a_search_watches_is_what_the_summary_has() -> None:
    """The same numbers to the last bit, of each metric and request."""
    seen: dict[int, dict[str, float]] = {}

    def keep(request: Request) -> None:
        seen[request.id] = request_row(request)

    done = simulate(LOAD, [SERVER], stop=keep)
    assert set(seen) == set(done.requests["request_id"].tolist()) and len(seen) == len(LOAD)
    columns = latencies(done.requests)
    assert set(columns) == {key for key, metric in METRICS.items() if not metric.per_gap}
    for place, number in enumerate(done.requests["request_id"].tolist()):
        row = seen[number]
        assert row == {name: done.requests[name][place] for name in REQUEST_COLUMNS}
        for key, values in columns.items():
            metric = METRICS[key]
            assert metric.value is not None
            if row["output_tokens"] >= metric.least_tokens:
                assert metric.value(row) == values[place]
            else:
                assert np.isnan(values[place])


# -- what is not in the table ----------------------------------------------------------------------------------------


def test_an_unknown_metric_is_one_error_everywhere(table: None) -> None:
    add_metric(decode_time())
    slo, done = SLO.parse("p90_decode_time<=1"), run()
    del METRICS["decode_time"]  # as in a process that did not load the plugin
    known = "known are e2e, e2el, itl, normalized_latency, scheduling_delay, tbt, tpot, ttft"
    for use in (
        lambda: find_metric("decode_time"),
        lambda: SLO("decode_time", "p90", 1.0),
        lambda: SLO.parse("p90_decode_time<=1"),
        lambda: summary_key("p90", "decode_time"),
        lambda: meets(done.requests, [slo]),
        lambda: summarize(done.requests, Recorder().gaps, [slo], len(LOAD), 0),
        lambda: tbt_percentiles([slo]),
        lambda: hopeless([slo], LOAD),
        lambda: simulated_trial(LOAD, [SERVER], [slo], 1.0),
    ):
        with pytest.raises(InputError, match=f"unknown metric 'decode_time': .*{known}"):
            use()


def test_a_metric_has_several_names() -> None:
    assert find_metric("itl") is find_metric("tbt") is METRICS["tbt"]
    assert SLO("itl", "p99", 0.1) == SLO.parse("p99_tbt<=0.1")
    assert summary_key("p50", "e2e") == summary_key("p50", "e2el") == "median_e2el_ms"


def test_names_are_taken_once_and_can_be_written_in_an_slo(table: None) -> None:
    with pytest.raises(InputError, match="'tbt' has the name 'itl', so choose another"):
        add_metric(decode_time(aliases=("itl",)))
    assert "decode_time" not in METRICS
    for name in ("Decode", "decode time", "", "decode<=1"):
        with pytest.raises(InputError, match="lower-case letters"):
            decode_time(key=name)
    add_metric(decode_time())
    add_metric(decode_time(name="again"))  # a plugin that is loaded twice
    assert METRICS["decode_time"].name == "again"


def test_the_metrics_are_those_of_the_documentation() -> None:
    words = " ".join((DOCS / "how-it-works.md").read_text("utf-8").split())
    settings = (DOCS / "settings.md").read_text("utf-8")
    assert list(METRICS) == ["ttft", "tbt", "tpot", "e2e", "scheduling_delay", "normalized_latency"]
    for metric in METRICS.values():
        name = metric.name[0].upper() + metric.name[1:]
        assert re.search(rf"{name}( \(alias \w+\))?: {re.escape(metric.definition)}\.", words), metric.key
        assert all(f"`{each}`" in settings for each in metric.names)
    assert [metric.key for metric in drawn_metrics()] == ["ttft", "tbt", "e2e"]
