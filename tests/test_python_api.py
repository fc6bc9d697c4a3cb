"""The Python API: the command line's settings and results, as functions and DataFrames."""

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import windtunnel as wt
from cli.main import run as command
from studies.capacity import search as studies_search
from windtunnel.settings import FileConfig

ROOT = Path(__file__).parents[1]
SMALL: dict[str, Any] = {"model": "Mistral-7B-v0.1", "device": "a100", "max_model_len": 4096, "num_prompts": 60}
LOAD: dict[str, Any] = {**SMALL, "request_rate": 3.0, "slo": ["p99_tbt<=0.1"]}
SLOS = ["p99_tbt<=0.1", "p50_scheduling_delay<=2"]
FLAGS = ["--model", "Mistral-7B-v0.1", "--device", "a100", "--max-model-len", "4096", "--num-prompts", "60"]


def without_times(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary without what differs between two equal runs."""
    return {key: value for key, value in summary.items() if key != "simulator"}


def test_the_command_and_the_function_make_the_same_run(tmp_path: Path) -> None:
    code, message = command(
        ["simulate", *FLAGS, "--request-rate", "3", "--slo", "p99_tbt<=0.1", "--output-dir", str(tmp_path / "command")]
    )
    assert (code, message) == (0, "")
    wt.simulate(**LOAD, output_dir=tmp_path / "function")
    for name in ("config.yaml", "requests.parquet", "iterations.parquet"):
        assert (tmp_path / "command" / name).read_bytes() == (tmp_path / "function" / name).read_bytes()
    names = {path.name for path in (tmp_path / "command").iterdir()}
    assert {path.name for path in (tmp_path / "function").iterdir()} == names
    first, second = (
        json.loads((tmp_path / each / "summary.json").read_text("utf-8")) for each in ("command", "function")
    )
    assert without_times(first) == without_times(second)
    assert set(first["simulator"]) == set(second["simulator"])


def test_a_run_in_memory_is_the_run_in_a_folder(tmp_path: Path) -> None:
    memory = wt.simulate(**LOAD)
    wt.simulate(**LOAD, output_dir=str(tmp_path / "out"))
    folder = wt.load(tmp_path / "out")
    assert isinstance(folder, wt.Run)
    assert (memory.folder, folder.folder) == (None, tmp_path / "out")
    assert memory.config == folder.config
    assert without_times(memory.summary) == without_times(folder.summary)
    assert len(memory.requests) == 60 and len(memory.iterations) > 60
    pd.testing.assert_frame_equal(memory.requests, folder.requests)
    pd.testing.assert_frame_equal(memory.iterations, folder.iterations)
    assert repr(memory) == "<Run: 60 requests, 1 x mistralai/Mistral-7B-v0.1 on a100_pcie>"


def test_a_config_runs_again_and_keywords_win_over_a_file(tmp_path: Path) -> None:
    first = wt.simulate(**LOAD, seed=3, output_dir=tmp_path / "a")
    again = wt.simulate(**first.config)
    pd.testing.assert_frame_equal(first.requests, again.requests)
    fewer = wt.simulate(config=tmp_path / "a" / "config.yaml", num_prompts=7)
    assert fewer.config == {**first.config, "num_prompts": 7}
    assert fewer.summary["completed"] == 7


def test_groups_of_replicas_share_the_other_keywords() -> None:
    groups = [{"count": 2}, {"device": "h100", "scheduler": "vllm"}]
    run = wt.simulate(**LOAD, replicas=groups, router="least_outstanding_tokens")
    found = [(each["device"], each["scheduler"]) for each in run.summary["replicas"]]
    assert found == [("a100_pcie", "sarathi")] * 2 + [("h100_sxm", "vllm")]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> wt.Search:
    return wt.search(**SMALL, slo=SLOS, tolerance=0.2, output_dir=tmp_path_factory.mktemp("search") / "out")


def test_a_search_finds_what_the_command_finds(searched: wt.Search, tmp_path: Path) -> None:
    flags = [*FLAGS, "--slo", SLOS[0], "--slo", SLOS[1], "--tolerance", "0.2"]
    assert command(["search", *flags, "--output-dir", str(tmp_path / "out")]) == (0, "")
    other = wt.load(tmp_path / "out")
    assert isinstance(other, wt.Search)
    assert (other.capacity, other.outcome, other.binding_slo) == (
        searched.capacity, "found", searched.binding_slo
    )  # fmt: skip
    columns = ["rate", "met", "margin", "binding_slo"]
    pd.testing.assert_frame_equal(other.trials[columns], searched.trials[columns])
    met = searched.trials[searched.trials["met"]]
    assert searched.capacity == met["rate"].max() > 0
    missed = searched.trials.loc[~searched.trials["met"], "rate"]
    assert missed.min() <= searched.capacity * 1.2


def test_a_search_in_memory_is_the_search_in_a_folder(searched: wt.Search) -> None:
    memory = wt.search(**SMALL, slo=SLOS, tolerance=0.2)
    assert memory.folder is None and searched.folder is not None
    assert memory.capacity == searched.capacity
    assert memory.trials["folder"].isna().all()
    run = wt.load(searched.trials["folder"][0])
    assert isinstance(run, wt.Run) and run.config["request_rate"] == pytest.approx(searched.trials["rate"][0])


def test_a_search_resumes_and_refuses_another_ones_folder(searched: wt.Search, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**SMALL, "slo": SLOS, "output_dir": searched.folder}

    def refuse(*arguments: object) -> None:
        raise AssertionError("a trial was simulated again")

    monkeypatch.setattr("windtunnel.capacity.simulated_trial", refuse)
    assert wt.search(**settings, tolerance=0.2).summary == searched.summary
    with pytest.raises(wt.InputError, match="other settings: give another output_dir"):
        wt.search(**settings, tolerance=0.1)


def test_the_defaults_are_the_command_lines() -> None:
    for function, own in (
        (wt.simulate, {"config", "output_dir"}),
        (wt.search, {"config", "output_dir", "tolerance", "seeds"}),
    ):
        parameters = inspect.signature(function).parameters
        assert set(parameters) == {*FileConfig.model_fields, *own}
        for name, field in FileConfig.model_fields.items():
            assert parameters[name].default == field.get_default(call_default_factory=True)
    assert inspect.signature(wt.search).parameters["tolerance"].default == studies_search.TOLERANCE
    assert inspect.signature(wt.search).parameters["seeds"].default is None


@pytest.mark.parametrize(
    ("function", "settings", "complaint"),
    [
        (wt.simulate, {"tp": 2}, "unknown keyword 'tp': did you mean 'tensor_parallel_size'?"),
        (wt.simulate, {"request_rates": 2}, "unknown keyword 'request_rates': did you mean 'request_rate'?"),
        (wt.simulate, {"tolerance": 0.1}, "unknown keyword 'tolerance'"),
        (wt.search, {"ouput_dir": "x"}, "unknown keyword 'ouput_dir': did you mean 'output_dir'?"),
        (wt.simulate, {"request_rate": "fast"}, "request_rate 'fast': give a number"),
        (wt.simulate, {"max_num_seqs": 0}, "max_num_seqs=0: give a whole number above 0"),
        (wt.simulate, {"workload": "azure_con"}, "unknown workload 'azure_con': did you mean 'azure_conv'"),
        (wt.simulate, {"device": None}, "no device given: add device NAME"),
        (wt.simulate, {"replicas": [{"devise": "h100"}]}, "unknown key in replicas[0] 'devise'"),
        (wt.search, {"slo": []}, "no SLO to search by: add slo"),
        (wt.search, {"tolerance": 2.0}, "tolerance 2.0: give a share"),
        (wt.simulate, {"config": "nowhere.yaml"}, "can't read nowhere.yaml"),
    ],
)
def test_errors_name_the_keyword(function: Callable[..., Any], settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(wt.InputError, match=re.escape(complaint)) as caught:
        function(**{**LOAD, **settings})
    assert "--" not in str(caught.value)


def test_folders_without_a_finished_run_are_refused(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    for place, complaint in (
        (tmp_path / "none", "is missing"), (tmp_path / "summary.json", "is a file"), (tmp_path, "it lacks config.yaml"),
    ):  # fmt: skip
        with pytest.raises(wt.InputError, match=complaint):
            wt.load(place)
    (tmp_path / "search.json").write_text("{")
    with pytest.raises(wt.InputError, match=r"search\.json is not JSON .* it is damaged"):
        wt.load(tmp_path)


def test_importing_is_quick() -> None:
    code = (
        "import sys, windtunnel; "
        "print([name for name in ('torch', 'pandas', 'simpy', 'plotly', 'sklearn', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python-api.md").read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 6
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/python-api.md", "exec"), names)
    assert names["run"].summary["completed"] == 200
    assert names["at_capacity"].config["request_rate"] == pytest.approx(names["found"].capacity)
    assert names["message"] == "unknown keyword 'tp': did you mean 'tensor_parallel_size'?"
