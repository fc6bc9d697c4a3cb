"""docs/studies.md says what its record says, and the record what the studies give today."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli.main import run as command
from engine.specs import ParallelSpec, catalog
from simulator.predictor.learned import learned
from studies.pages.studies import JUDGES, render, scores
from studies.published.experiment import FITTED_HOST, MODERN_HOST, PAPER_HOST, PLACEBOS, SEEDS
from studies.published.fitted_host import PREFILL_MS, fit
from studies.published.library import kept, load, names
from studies.published.operation_split import batch_shape
from studies.published.run import run

ROOT = Path(__file__).parents[1]
PATH = ROOT / "docs" / "studies.json"
RECORD: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))


def test_the_page_is_that_of_its_record() -> None:
    assert PATH.with_suffix(".md").read_text(encoding="utf-8") == render(RECORD)


def test_the_record_has_whole_studies() -> None:
    assert set(RECORD) <= set(names())
    for name, entry in RECORD.items():
        assert entry["seeds"] == SEEDS
        assert PAPER_HOST in entry["records"]
        assert set(entry["records"]) <= {PAPER_HOST, MODERN_HOST, FITTED_HOST, *PLACEBOS}
        places = {of.rpartition(":")[0] for claim in load(name).claims for of in claim.of}
        assert places <= set(entry["records"][PAPER_HOST])


@pytest.mark.parametrize("name", ["chunking_overhead", "scheduler_ablation"])
def test_a_study_run_today_gives_what_the_record_says(name: str, tmp_path: Path) -> None:
    study, hosts = load(name), [PAPER_HOST, PLACEBOS[0]]
    found = kept(study, run(study, hosts, tmp_path, workers=1, seeds=SEEDS), SEEDS)
    for host in hosts:
        theirs = RECORD[name]["records"][host]
        assert set(theirs) == set(found["records"][host])
        for point, record in found["records"][host].items():
            assert record["values"] == pytest.approx(theirs[point]["values"], rel=1e-3), point


def test_the_fitted_host_overhead_is_what_the_fit_gives() -> None:
    iteration_s, sequence_s, errors = fit()
    host = catalog.host_overhead(FITTED_HOST)
    assert host.iteration_s == pytest.approx(iteration_s, rel=0.01)
    assert host.sequence_s == pytest.approx(sequence_s, rel=0.01)
    assert errors["after"] < 0.5 * errors["before"]


def test_the_presets_kernel_is_the_nearest_to_figure_2s_prompts() -> None:
    model, device, network = catalog.model("01-ai/Yi-34B"), catalog.device("a100"), catalog.network("pairwise_nvlink")
    host = catalog.host_overhead(PAPER_HOST)
    errors = {}
    for kernel in (host.attention_kernel, None):
        times = learned(model.in_dtype("float16"), device, network, ParallelSpec(tensor_parallel_size=2),
                        replace(host, attention_kernel=kernel))  # fmt: skip
        seconds = [times.stage_time(batch_shape(tokens, 0, 0), 0) for tokens in PREFILL_MS]
        errors[kernel] = np.abs(np.log(np.array(seconds) / (1e-3 * np.array(list(PREFILL_MS.values()))))).mean()
    assert errors[host.attention_kernel] < 0.07 < errors[None]


def test_the_preset_keeps_the_host_times_that_are_nearer_in_most_other_figures() -> None:
    nearer = []
    for name in JUDGES:
        if FITTED_HOST in RECORD.get(name, {"records": {}})["records"]:
            found = scores(RECORD, {name: load(name)})
            if found[PAPER_HOST].off:
                nearer.append(np.median(found[PAPER_HOST].off) < np.median(found[FITTED_HOST].off))
    assert len(nearer) >= 3 and np.mean(nearer) > 0.5


def test_a_run_adds_to_a_record_and_writes_its_page(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    for name in ("piggybacking", "chunking_overhead"):
        flags = ["--workers", "1", "--output-dir", str(tmp_path / name), "--record", str(path)]
        assert command(["study", "run", name, *flags]) == (0, "")
    assert list(json.loads(path.read_text("utf-8"))) == ["piggybacking", "chunking_overhead"]
    page = path.with_suffix(".md").read_text("utf-8")
    assert "## What chunks cost a prompt" in page and "Not in the record yet" in page
    path.write_text("[1]", encoding="utf-8")
    code, said = command(["study", "run", "piggybacking", "--record", str(path), "--output-dir", str(tmp_path / "x")])
    assert code == 2 and "is no record of studies" in said
