"""Sweeps: their points, who works them off, what is said of one that fails, and the search's door."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import sweep_work
import yaml
from command_line import windtunnel as in_this_process

from engine.errors import InputError
from studies.capacity.sweep import mark_pareto, name_of, points
from studies.jobs.pool import work_off

MODEL = ["--model", "Mistral-7B-v0.1", "--device", "a100", "--max-model-len", "4096", "--num-prompts", "200"]
QUICK = ["--seeds", "1", "--no-curve"]
FEW = ["--seeds", "2", "--no-curve"]
PRICES = ["--gpu-price", "a100=2,h100=4"]
SLOS = ["--slo", "p99_tbt<=0.1", "--slo", "p50_scheduling_delay<=2"]
SWEEP = {
    "model": "mistralai/Mistral-7B-v0.1", "max_model_len": 4096, "num_prompts": 60,
    "slo": ["p99_tbt<=0.1", "p50_scheduling_delay<=2"],
    "sweep": {
        "deployment": [{"device": "a100"}, {"device": "h100", "max_num_seqs": 64}],
        "scheduler": ["sarathi", "vllm"],
    },
}  # fmt: skip


def environment(cwd: Path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "WINDTUNNEL_CACHE_DIR": str(cwd / "cache")}


def windtunnel(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cli", *arguments], cwd=cwd, env=environment(cwd), capture_output=True, text=True,
        timeout=180,
    )  # fmt: skip


# -- points ----------------------------------------------------------------------------------------------------------


def test_points_are_the_product_of_what_varies() -> None:
    found = points(SWEEP["sweep"], "file")  # type: ignore[arg-type]
    assert found == [
        {"device": "a100", "scheduler": "sarathi"},
        {"device": "a100", "scheduler": "vllm"},
        {"device": "h100", "max_num_seqs": 64, "scheduler": "sarathi"},
        {"device": "h100", "max_num_seqs": 64, "scheduler": "vllm"},
    ]
    assert [name_of(point) for point in found[1:3]] == ["a100,vllm", "h100,64,sarathi"]
    assert name_of({"model": "01-ai/Yi-34B", "slo": ["p99_tbt<=0.1", "p50_ttft<=2"]}) == (
        "Yi-34B,p99_tbt__0.1+p50_ttft__2"
    )


@pytest.mark.parametrize("varied", [{}, [], {"scheduler": "sarathi"}, {"scheduler": []}, {"seed": [1, 1]}])
def test_what_does_not_vary_is_told(varied: Any) -> None:
    with pytest.raises(InputError, match=r"file\.yaml: sweep"):
        points(varied, "file.yaml")


def test_the_front_is_of_those_that_no_other_beats() -> None:
    rows = [{"a": a, "b": b} for a, b in itertools.product((1.0, 2.0, 3.0), (1.0, 2.0, 3.0))]
    rows.append({"a": 9.0, "b": None})
    mark_pareto(rows, more=("a",), less=("b",))
    assert [(row["a"], row["b"]) for row in rows if row["pareto"]] == [(3.0, 1.0)]
    trade = [{"a": 1.0, "b": 1.0}, {"a": 2.0, "b": 2.0}, {"a": 2.0, "b": 2.0}, {"a": 1.5, "b": 2.0}]
    mark_pareto(trade, more=("a",), less=("b",))
    assert [row["pareto"] for row in trade] == [True, True, True, False]


# -- who works them off ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_every_point_gets_its_answer_whatever_becomes_of_the_others(workers: int) -> None:
    every = [{"do": 2}, {"do": "refuse"}, {"do": "fail"}, {"do": "die"}, {"do": 5}]
    found = dict(work_off(sweep_work.work, every, workers))
    assert found[0] == {"status": "done", "value": 4}
    assert found[1] == {"status": "refused", "error": "it does not fit"}
    assert found[2]["status"] == "crashed" and "ZeroDivisionError: in a policy" in found[2]["error"]
    assert found[3]["status"] == "crashed" and "SIGKILL" in found[3]["error"]
    assert found[4] == {"status": "done", "value": 25}


def test_each_slot_has_its_own_environment() -> None:
    every = [{"do": "slot"}] * 4
    found = dict(work_off(sweep_work.work, every, 2, lambda slot: {"SLOT": str(slot)}))
    assert {row["value"] for row in found.values()} == {"0", "1"}


def test_points_that_are_broken_off_leave_nothing_half_written(tmp_path: Path) -> None:
    rest = work_off(sweep_work.work, [{"do": "run", "folder": str(tmp_path / "run")}, {"do": 3}], 2)
    assert next(rest) == (1, {"status": "done", "value": 9})
    end = time.monotonic() + 30
    while not list(tmp_path.glob(".run.partial-*/begun")):
        assert time.monotonic() < end
        time.sleep(0.02)
    rest.close()  # type: ignore[attr-defined]
    assert list(tmp_path.iterdir()) == []


def test_a_point_may_have_processes_of_its_own() -> None:
    assert dict(work_off(sweep_work.work, [{"do": "child"}], 1)) == {0: {"status": "done"}}


# -- the door --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search and a finished sweep."""
    folder = tmp_path_factory.mktemp("search")
    done = in_this_process("search", *MODEL, *SLOS, "--output-dir", "one", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "one.json").write_text(done.stdout.splitlines()[-1])
    (folder / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
    done = in_this_process("search", "--sweep", "sweep.yaml", *PRICES, *FEW, "--output-dir", "many", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "many.txt").write_text(done.stdout)
    return folder


def test_a_search_leaves_its_trials_as_runs(searched: Path) -> None:
    result = json.loads((searched / "one.json").read_text())
    assert result["max_qps_under_slo"] > 0.5
    spread = result["intervals"]["max_qps_under_slo"]
    assert (
        spread["low"] <= spread["mid"] == result["max_qps_under_slo"] <= spread["high"]
        and result["uncertainty"]["draws"] == 4
    )
    assert spread["low"] < spread["high"] < 2 * spread["low"]
    beyond = [load for load in result["loads"] if load["rate"] > 1.09 * result["max_qps_under_slo"]]
    assert len(beyond) >= 2 and all(set(load["slos"]) == set(result["slos"]) for load in result["loads"])
    assert not any(load["met"] for load in beyond if load["rate"] > 1.2 * result["max_qps_under_slo"])
    assert result["binding_slo"] in result["slos"]
    for trial in result["trials"]:
        folder = Path(trial["folder"])
        names = {path.name for path in folder.iterdir()}
        assert {"summary.json", "config.yaml", "requests.parquet", "iterations.parquet"} <= names
        summary = json.loads((folder / "summary.json").read_text())
        met = "stopped_early" not in summary and all(slo["met"] for slo in summary["slos"])
        assert met == trial["met"]
    rates = [trial["rate"] for trial in result["trials"] if trial["met"]]
    assert max(rates) == result["max_qps_under_slo"]
    over = min(trial["rate"] for trial in result["trials"] if not trial["met"])
    assert over <= result["max_qps_under_slo"] * 1.0251
    config = f"{result['trials'][0]['folder']}/config.yaml"
    again = in_this_process("simulate", "--config", config, "--output-dir", "again", "--json", cwd=searched)
    assert again.returncode == 0, again.stderr


def test_a_sweep_gives_a_table_with_per_gpu_and_per_dollar(searched: Path) -> None:
    rows = json.loads((searched / "many" / "sweep.json").read_text())["points"]
    assert [row["name"] for row in rows] == ["a100,sarathi", "a100,vllm", "h100,64,sarathi", "h100,64,vllm"]
    for row in rows:
        assert row["status"] == "done"
        price = 2 if row["device"] == "a100_pcie" else 4
        assert row["requests_per_dollar"] == pytest.approx(row["max_qps_under_slo"] * 3600 / price)
    assert rows[0]["max_qps_under_slo"] > rows[1]["max_qps_under_slo"]  # no stalls
    assert any(row["pareto"] for row in rows)
    table = (searched / "many.txt").read_text()
    assert "requests/$" in table and "h100,64,vllm" in table
    assert "ranges: over 2 seeds" in table and "calibrated" in table
    trials = [Path(trial["folder"]) for row in rows for trial in row["trials"]]
    assert {path.name for trial in trials for path in trial.iterdir()} == {"config.yaml", "summary.json"}


def test_a_killed_sweep_goes_on_to_the_same_table(searched: Path) -> None:
    command = [
        "search",
        "--sweep",
        "sweep.yaml",
        "--gpu-price",
        "a100=2,h100=4",
        *FEW,
        "--workers",
        "1",
        "--output-dir",
        "killed",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", *command], cwd=searched, env=environment(searched), stdout=subprocess.DEVNULL
    )
    end = time.monotonic() + 60
    while not list((searched / "killed").glob("points/*/trials/[0-9]*/summary.json")):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (searched / "killed" / "sweep.json").exists()
    done = in_this_process(*command, cwd=searched)
    assert done.returncode == 0, done.stderr

    def rows(name: str) -> Any:
        found = json.loads((searched / name / "sweep.json").read_text())["points"]
        return json.loads(json.dumps(found).replace(f"/{name}/", "/"))

    assert rows("killed") == rows("many")


def test_a_capacity_that_few_requests_alone_allow_is_told(searched: Path) -> None:
    few = [*MODEL[:-1], "60", "--slo", "p99_ttft<=4", "--tolerance", "0.1", *QUICK]
    done = in_this_process("search", *few, "--output-dir", "few", cwd=searched)
    assert done.returncode == 0, done.stderr
    result = json.loads((searched / "few" / "search.json").read_text())
    assert result["outcome"] == "found" and result["unsteady"]
    assert "note: the run at the capacity" in done.stdout and "over 4 times the requests" in done.stdout
    plenty = [*MODEL[:-1], "1500", *SLOS, "--tolerance", "0.1", *QUICK]
    done = in_this_process("search", *plenty, "--output-dir", "plenty", cwd=searched)
    assert done.returncode == 0, done.stderr
    assert json.loads((searched / "plenty" / "search.json").read_text())["unsteady"] is None
    assert "note:" not in done.stdout


def test_a_search_with_other_settings_leaves_the_folder_alone(searched: Path) -> None:
    before = sorted(path.name for path in (searched / "one" / "trials").iterdir())
    done = in_this_process("search", *MODEL, "--slo", "p99_tbt<=0.2", "--output-dir", "one", cwd=searched)
    assert done.returncode == 2 and "other settings" in done.stderr
    assert sorted(path.name for path in (searched / "one" / "trials").iterdir()) == before


def test_a_search_is_of_what_its_file_said(searched: Path) -> None:
    """A file that was edited meanwhile is another search, whatever its path."""
    file = searched / "run.yaml"
    settings = {key: value for key, value in SWEEP.items() if key != "sweep"} | {"device": "a100"}
    command = ["search", "--config", "run.yaml", *QUICK, "--output-dir", "of-a-file"]
    for slo, code in (("p99_tbt<=0.1", 0), ("p99_tbt<=0.1", 0), ("p99_tbt<=0.2", 2)):
        file.write_text(yaml.safe_dump({**settings, "slo": [slo]}))
        done = in_this_process(*command, cwd=searched)
        assert done.returncode == code, done.stderr
    assert "other settings" in done.stderr


def test_points_that_cannot_be_are_refused_and_crashes_are_crashes(searched: Path) -> None:
    (searched / "policy.py").write_text(
        "from engine.scheduling.policies import POLICIES, Sarathi\n\n"
        "class Broken(Sarathi):\n"
        "    def plan(self, scheduler):\n"
        "        raise ZeroDivisionError('in a policy')\n\n"
        "POLICIES['broken'] = Broken\n"
    )
    sweep = {**SWEEP, "plugin": ["policy.py"], "sweep": {
        "point": [{"device": "a100", "tensor_parallel_size": 3}, {"device": "a100", "scheduler": "broken"},
                  {"device": "a100"}],
    }}  # fmt: skip
    (searched / "mixed.yaml").write_text(yaml.safe_dump(sweep))
    done = windtunnel("search", "--sweep", "mixed.yaml", *QUICK, "--output-dir", "mixed", cwd=searched)
    assert done.returncode == 1
    rows = json.loads((searched / "mixed" / "sweep.json").read_text())["points"]
    assert [row["status"] for row in rows] == ["refused", "crashed", "done"]
    assert "tensor_parallel_size=3" in rows[0]["error"]
    assert "ZeroDivisionError: in a policy" in rows[1]["error"]
    assert "crashed" in done.stdout and "refused" in done.stdout
    assert "max_qps_under_slo" not in rows[1]


@pytest.fixture
def tiny(searched: Path) -> Path:
    """A folder with a model that this machine's engine can run."""
    (searched / "tiny").mkdir(exist_ok=True)
    (searched / "tiny" / "config.json").write_text(json.dumps({
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 256, "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
    }))  # fmt: skip
    return searched


def test_a_capacity_is_confirmed_on_this_machines_engine(tiny: Path) -> None:
    done = windtunnel(
        "search", "--model", "tiny", "--load-format", "dummy", "--device", "cpu", "--max-model-len", "128",
        "--max-num-batched-tokens", "32", "--max-num-seqs", "4", "--num-gpu-blocks-override", "200",
        "--workload", "fixed", "--input-len", "20",
        "--output-len", "10", "--num-prompts", "30", "--slo", "p50_scheduling_delay<=0.01", "--confirm", *QUICK,
        "--tolerance", "0.2", "--output-dir", "confirmed", "--json", cwd=tiny,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    confirmed = result["confirmed"]
    assert confirmed["predicted_qps"] == result["max_qps_under_slo"]
    assert 2 <= len(confirmed["trials"]) <= 12
    assert confirmed["gpu_hours_saved"] == pytest.approx(result["plain_search_gpu_hours"] - confirmed["gpu_hours"])
    first = Path(confirmed["trials"][0]["folder"])
    assert json.loads((first / "summary.json").read_text())["engine"]["hardware"] == confirmed["hardware"]
    assert "confirmed" in done.stderr and "CPU-hours" in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("search: the engine at ")]
    assert len(said) == len(confirmed["trials"])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([*MODEL], "no SLO to search by"),
        ([*MODEL, *SLOS, "--confirm"], "no weights on this machine"),
        ([*MODEL, *SLOS, "--tolerance", "2"], "tolerance 2"),
        ([*MODEL, *SLOS, "--gpu-price", "0"], "--gpu-price '0'"),
        ([*MODEL, *SLOS, "--gpu-price", "a100=two"], "a100=two"),
        ([*MODEL, *SLOS, "--workers", "0"], "--workers 0"),
        ([*MODEL, *SLOS, "--arrival", "burst"], "--arrival burst"),
        ([*MODEL, *SLOS, "--tensor-parallel-size", "3"], "tensor_parallel_size=3"),
        ([*MODEL, *SLOS, "--confirm", "--top-k", "0"], "--top-k"),
        ([*MODEL, *SLOS, "--confirm", "--num-replicas", "2"], "--num-replicas 1"),
        (["--sweep", "nowhere.yaml"], "nowhere.yaml"),
        (["--sweep", "sweep.yaml", "--config", "x.yaml"], "remove one"),
        (["--sweep", "sweep.yaml", "--scheduler", "orca"], "varies scheduler"),
        (["--sweep", "misspelt.yaml"], "unknown key in misspelt.yaml 'max_model_lenn'"),
    ],
)
def test_bad_searches_are_told_in_a_line(searched: Path, arguments: list[str], complaint: str) -> None:
    (searched / "misspelt.yaml").write_text("max_model_lenn: 8192\nsweep: {scheduler: [sarathi]}\n")
    done = in_this_process("search", *arguments, "--output-dir", "never", cwd=searched)
    assert done.returncode == 2, done.stderr
    assert complaint.replace("_", "-") in done.stderr.replace("_", "-")
    assert len(done.stderr.strip().splitlines()) == 1
