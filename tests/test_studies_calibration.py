"""The page and the text about calibrations say what their records say."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from engine.specs import catalog
from profiler import table
from simulator.predictor.calibration import Calibration
from simulator.predictor.calibration_fit import fit
from studies.calibration.accuracy import accuracy_markdown, targets
from studies.calibration.kinds import page_of
from studies.calibration.record import errors_by_size, lacking, read_calibration, spread_evenly
from studies.pages.calibration import write_calibration_report
from studies.pages.page import LIBRARY
from studies.words import percent

DEVICE = catalog.device("a40")
HEADS = ((32, 8, 128), (16, 16, 128), (64, 8, 128))


def measured(device: str) -> pd.DataFrame:
    """A few hundred made-up rows, a source for each kind."""
    rng, rows = np.random.default_rng(0), []

    def add(kind: str, operator: str, seconds: float, **shape: Any) -> None:
        time_ms = 1e3 * (5e-6 + seconds) * float(np.exp(rng.normal(0, 0.03)))
        source = f"made/up {kind} <b>"
        rows.append({"kind": kind, "operator": operator, "time_ms": time_ms, "device": device, "source": source,
                     "backend": "nccl" if kind in ("all_reduce", "send") else "torch", "software": "none 1.0",
                     **shape})  # fmt: skip

    for model, hidden in (("x/small", 1024), ("x/middle", 2048), ("x/large", 4096)):
        for m in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048):
            for n in (hidden, 3 * hidden):
                traffic = 2 * (m * hidden + hidden * n + m * n)
                add("gemm", "mlp", max(2 * m * hidden * n / 1e14, traffic / 5e11), model=model, m=m, k=hidden, n=n)
            for operator in ("input_norm", "mlp_activation"):
                add("elementwise", operator, m * 4 * hidden / 5e11, model=model, rows=m, bytes_per_row=4 * hidden)
    for heads, kv, dim in HEADS:
        shape = {"num_heads": heads, "num_kv_heads": kv, "head_dim": dim}
        for size in (64, 128, 256, 512, 1024, 2048):
            for batch in (1, 4):
                prefill = 4 * batch * heads * dim * size * size / 2 / 7e13
                add("attention_prefill", "attention_prefill", prefill, batch_size=batch, chunk=size, prefix=0, **shape)
                read = 4 * kv * dim * batch * size / 5e11
                add("attention_decode", "attention_decode", read, batch_size=batch, kv_tokens=batch * size, **shape)
    for size in 2 ** np.arange(10, 26):
        layout = {"num_bytes": int(size), "num_ranks": 2, "ranks_per_node": 2, "network": "pairwise_nvlink_a40"}
        add("all_reduce", "all_reduce", size / 4e10, **layout)
        add("send", "send", size / 5e10, **layout)
    return table.validate(pd.DataFrame(rows), "made up")


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    return measured("a40")


@pytest.fixture(scope="module")
def calibration(frame: pd.DataFrame) -> Calibration:
    return fit(DEVICE, [frame], on_progress=lambda line: None)


class Page(HTMLParser):
    """The tags, text and inline scripts of a page, and whatever it refers to outside itself."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: set[str] = set()
        self.references: list[str] = []
        self.scripts: dict[str, str] = {}
        self.text = ""
        self._script: str | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.ids |= {found["id"] or ""} if "id" in found else set()
        self.references += [str(found[name]) for name in ("src", "href", "srcset", "action") if name in found]
        self._script = str(found.get("id", "")) if tag == "script" else None

    def handle_endtag(self, tag: str) -> None:
        self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is None:
            self.text += data.replace("\u00a0", " ")
        else:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data


def test_record_holds_what_was_measured_and_predicted(calibration: Calibration, frame: pd.DataFrame) -> None:
    kinds = read_calibration(calibration, [frame])
    assert [kind.kind for kind in kinds] == list(calibration.models) and len(kinds) == 6
    assert lacking(calibration) == ["Experts", "All-gather", "Reduce-scatter", "All-to-all"]
    for kind in kinds:
        rows = frame[frame["kind"] == kind.kind]
        assert kind.record["provenance"]["rows"] == len(rows) and not kind.carried_over
        assert kind.drawn is not None
        assert kind.drawn.total == kind.drawn.fitted == len(rows)
        assert sorted(kind.drawn.measured_s) == pytest.approx(sorted(rows["time_ms"] / 1e3))
        assert (np.abs(np.log(kind.drawn.predicted_s / kind.drawn.measured_s)) < 0.7).all()
        assert kind.range_words and kind.drawn.efficiency
    gemm, reduces = kinds[0], next(kind for kind in kinds if kind.kind == "all_reduce")
    assert gemm.drawn is not None and reduces.drawn is not None
    assert gemm.range_words == ["m 1 to 2,048, k 1,024 to 4,096, n 1,024 to 12,288"]
    curve = next(curve for curve in gemm.drawn.efficiency if curve.label.startswith("4096"))
    n = int(curve.label.split()[-1])
    (row,) = frame[(frame["k"] == 4096) & (frame["n"] == n) & (frame["m"] == 2048)].itertuples()
    assert curve.size[-1] == 2048
    assert curve.measured[-1] == pytest.approx(2 * 2048 * 4096 * n / DEVICE.peak_flops / (row.time_ms / 1e3))
    reduce = reduces.drawn.efficiency[0]
    time_s = frame[frame["kind"] == "all_reduce"]["time_ms"].iloc[-1] / 1e3
    assert reduce.measured[-1] == pytest.approx(2**25 / time_s)  # of two ranks each sends every byte once


def test_tables_of_other_sources_devices_and_networks(calibration: Calibration, frame: pd.DataFrame) -> None:
    other = frame.assign(source="elsewhere", network=frame["network"].where(frame["kind"] != "send", "unknown"))
    kinds = {kind.kind: kind for kind in read_calibration(calibration, [other])}
    assert kinds["gemm"].drawn is not None and kinds["gemm"].drawn.fitted == 0
    assert kinds["send"].drawn is None  # no curve of that network
    elsewhere = read_calibration(calibration, [frame.assign(device="h100")])
    assert all(kind.drawn is None and kind.range_words for kind in elsewhere)


def test_errors_by_size_and_even_spread() -> None:
    times = np.exp(np.linspace(np.log(1e-5), np.log(1e-2), 1000))
    errors = errors_by_size(times, times * np.where(times < 1e-3, 1.1, 0.8))
    assert errors.count.sum() == 1000 and len(errors.count) == 10
    assert errors.bias[0] == pytest.approx(0.1) and errors.bias[-1] == pytest.approx(-0.2)
    assert errors.median[-1] == pytest.approx(0.2) and errors.p95[0] == pytest.approx(0.1)
    chosen = times[::-1][spread_evenly(times[::-1], 11)]
    assert len(chosen) == 11 and chosen[0] == times[0] and chosen[-1] == times[-1]
    assert (np.diff(chosen) > 0).all()


def test_page_says_the_errors_and_needs_only_the_plot_library(
    calibration: Calibration, frame: pd.DataFrame, tmp_path: Path
) -> None:
    path = write_calibration_report(calibration, DEVICE, [frame], tmp_path / "new" / "a40.html")
    html = path.read_text(encoding="utf-8")
    assert len(html) < 2e6 and sorted(path.parent.iterdir()) == [path, path.parent / LIBRARY]
    page = Page(html)
    assert page.references == [LIBRARY] and "link" not in page.tags and "img" not in page.tags
    assert "default-src 'none'" in html and (path.parent / LIBRARY).is_file()
    figures = json.loads(page.scripts["figures"])
    assert len(figures) == 18 and set(figures) <= page.ids
    for record in calibration.records.values():
        for name, sign in (("mape", ""), ("p95", ""), ("bias", "+")):
            assert f"{100 * record['held_out'][name]:{sign}.1f} %" in page.text
    assert "held out" in page.text and "in-sample" in page.text
    assert "made/up gemm <b>" in page.text  # a source, escaped


def test_page_without_tables_has_no_figures_and_says_what_was_carried_over(
    calibration: Calibration, tmp_path: Path
) -> None:
    records = {**calibration.records, "attention_decode": {**calibration.records["attention_decode"]}}
    records["attention_decode"]["learned_on"] = "a100_sxm"
    records["gemm"] = {**records["gemm"], "held_out": {"folds": 1, "count": 0, "over_20us": {"count": 0}}}
    models = {kind: model for kind, model in calibration.models.items() if kind != "send"}
    changed = Calibration("a40", models, records)
    page = Page(write_calibration_report(changed, DEVICE, [], tmp_path / "a40.html").read_text(encoding="utf-8"))
    assert json.loads(page.scripts["figures"]) == {}
    assert "Carried over from a100_sxm, by the ratio of the rooflines: attention decode" in page.text
    assert "Not measured, estimated from the data sheet: send" in page.text
    assert "in-sample" not in page.text


def test_accuracy_text_holds_the_numbers_of_the_records(calibration: Calibration) -> None:
    text = accuracy_markdown([calibration])
    for kind, record in calibration.records.items():
        held_out = record["held_out"]
        start = f"| {page_of(kind).name} | {page_of(kind).left_out(record)} |"
        (line,) = [line for line in text.splitlines() if line.startswith(start)]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[2:4] == [f"{record['provenance']['rows']:,}", str(held_out["folds"])]
        assert cells[4:8] == [*(percent(held_out[name]) for name in ("mape", "p50", "p95")),
                              percent(held_out["bias"], sign=True)]  # fmt: skip
        assert cells[11] == percent(record["interval"]["covers"])
    for model, value in calibration.records["gemm"]["held_out"]["groups_over_20us"]["each"].items():
        assert f"| {model} | {percent(value)} |" in text
    assert all(len(line) <= 120 for line in text.splitlines() if not line.startswith("|"))
    assert not re.search(r"\d\n%", text)


def test_targets_are_judged_by_the_records(calibration: Calibration) -> None:
    found = {(kind, what): (value, target) for _, kind, what, value, target in targets([calibration])}
    groups = calibration.records["gemm"]["held_out"]["groups_over_20us"]
    assert found["gemm", "mean over models"] == (groups["mean"], 0.045)
    assert found["gemm", "worst model"] == (groups["worst"], 0.07)
    rows = [
        line for line in accuracy_markdown([calibration]).splitlines() if line.endswith(("| met |", "**missed** |"))
    ]
    assert [line.endswith("| met |") for line in rows] == [value <= target for value, target in found.values()]


def test_what_was_left_out_is_named(calibration: Calibration) -> None:
    said = {kind: page_of(kind).left_out(record) for kind, record in calibration.records.items()}
    assert said["gemm"] == said["elementwise"] == "whole models"
    assert said["attention_prefill"] == said["attention_decode"] == "head configurations"
    assert said["all_reduce"] == said["send"] == "message sizes"
    shapes = {"held_out": {"groups_over_20us": {"worst_is": "4096x1024"}}}
    assert page_of("gemm").left_out(shapes) == "whole weight shapes (k, n)"
