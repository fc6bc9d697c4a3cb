"""The closed loop as a user walks it on a CPU: profile, fit, simulate, validate; and what may go wrong on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from command_line import windtunnel

from simulator.cluster import deploy
from studies.pages.page import LIBRARY

CONFIG = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 3, "vocab_size": 1024, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
SIZES = ["--max-model-len", "256", "--max-num-batched-tokens", "64", "--max-num-seqs", "8"]
LOAD = ["--workload", "uniform", "--input-len", "10:100", "--output-len", "10:40", "--num-prompts", "60"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model."""
    place = tmp_path_factory.mktemp("loop")
    (place / "tiny").mkdir()
    (place / "tiny" / "config.json").write_text(json.dumps(CONFIG))
    return place


@pytest.fixture(scope="module")
def folder(place: Path) -> Path:
    """A model, its profile on this machine, and the calibration fitted to that."""
    done = windtunnel(
        "profile", "--device", "cpu", "--models", "tiny", *SIZES, "--budget", "4s", "--output-dir", "profile",
        cwd=place,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "profile: profile"
    done = windtunnel("calibrate", "fit", "--source", "profile:profile", "--output-dir", "mine", cwd=place)
    assert done.returncode == 0, done.stderr
    assert "whole iterations of tiny" in done.stderr
    return place


def test_a_folder_with_something_else_is_no_place_for_a_calibration(folder: Path) -> None:
    (folder / "mine" / "send.json").write_text("{}")  # of a fit before, which had it
    for target, code, said in (("tiny", 2, "tiny holds config.json"), ("mine", 0, "replacing the calibration in mine")):
        done = windtunnel("calibrate", "fit", "--source", "profile:profile", "--output-dir", target, cwd=folder)
        assert done.returncode == code and said in done.stderr
    assert {path.name for path in (folder / "tiny").iterdir()} == {"config.json"}
    assert not (folder / "mine" / "send.json").exists()
    memory = json.loads((folder / "mine" / "device.json").read_text())["memory_bytes"]
    assert memory == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # this machine's


def test_the_calibration_of_a_profile_is_a_device(folder: Path) -> None:
    done = windtunnel(
        "simulate", "--model", "tiny", "--device", "mine", *SIZES, *LOAD, "--request-rate", "5", "--output-dir", "sim",
        cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "times: calibrated on measurements of cpu (shared_memory, host overhead measured_cpu)" in done.stdout
    config = yaml.safe_load((folder / "sim" / "config.yaml").read_text())
    assert config["device"] == str(folder / "mine")
    provenance = json.loads((folder / "mine" / "profile.json").read_text())["provenance"]
    assert provenance["source"].startswith("windtunnel profile on ")
    assert provenance["software"].startswith("torch ")
    assert provenance["date"] and provenance["threads"] == 1
    assert deploy(str(folder / "tiny"), str(folder / "mine")).model.dtype == "float32"  # as it was profiled


def test_a_validation_forms_the_same_batches_and_has_times_of_the_same_order(folder: Path) -> None:
    """How near the times come is a matter of a quiet machine, and of test_profiler_session on a synthetic one."""
    done = windtunnel(
        "validate", "--model", "tiny", "--load-format", "dummy", "--device", "mine", *SIZES, *LOAD, "--load", "0.5",
        "--output-dir", "validation", "--json", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    (load,) = results["loads"]
    assert load["replay"]["same"]
    assert load["iterations"]["in_range"] > 0.95
    for metric in ("tbt", "e2e"):
        assert -0.99 < load["latencies"][metric]["p50"]["error"] < 99  # other units would be further off
    target = folder / "validation"
    names = {path.name for path in target.iterdir()}
    assert names == {"burst", "load-0.5", "validation.json", "validation.html", "config.yaml", LIBRARY}
    assert {path.name for path in (target / "load-0.5").iterdir()} == {"engine", "simulated"}
    assert "largest" in load
    assert "</html>" in (target / "validation.html").read_text()


def test_a_calibration_of_another_machine_is_refused(folder: Path) -> None:
    other = folder / "other"
    subprocess.run(["cp", "-r", str(folder / "mine"), str(other)], check=True)
    settings = json.loads((other / "profile.json").read_text())
    settings["identity"]["hardware"] = "another processor"
    (other / "profile.json").write_text(json.dumps(settings))
    done = windtunnel(
        "validate", "--model", "tiny", "--load-format", "dummy", "--device", "other", *SIZES, *LOAD, "--request-rate",
        "5", "--output-dir", "refused", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 2
    assert "hardware 'another processor'" in done.stderr and "profile this machine" in done.stderr
    assert not (folder / "refused").exists()


def test_an_interrupted_profile_goes_on(folder: Path) -> None:
    command = ["profile", "--device", "cpu", "--models", "tiny", *SIZES, "--budget", "2s", "--output-dir", "begun"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", *command], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    samples = folder / "begun" / "samples.jsonl"
    end = time.monotonic() + 60
    while not (samples.exists() and samples.read_text().count("\n") > 20):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in stderr
    before = samples.read_text().splitlines()
    assert not (folder / "begun" / "operators.csv").exists()
    done = windtunnel("calibrate", "fit", "--source", "profile:begun", "--output-dir", "never", cwd=folder)
    assert done.returncode == 2 and "is not finished" in done.stderr
    done = windtunnel(*command, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert samples.read_text().splitlines()[: len(before)] == before
    assert (folder / "begun" / "operators.csv").exists()


@pytest.mark.parametrize("command", [["profile", "--models", "phi-2"], ["selfcheck"]])
def test_without_torch_it_says_what_to_install(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.executors.start.find_spec", lambda name: None)
    done = windtunnel(*command, "--device", "cpu", "--output-dir", "out", cwd=tmp_path)
    assert done.returncode == 2
    wanted = "error: this needs the package torch, which is not installed: pip install -e '.[engine]'"
    assert done.stderr.splitlines() == [wanted]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [["show"], ["report", "--output", "page.html"], ["evaluate", "--test", "profile"]])
def test_ones_own_calibration_is_shown_and_tried(folder: Path, command: list[str]) -> None:
    done = windtunnel("calibrate", *command, "--device", "mine", cwd=folder)
    assert done.returncode == 0, done.stderr
    if command[0] == "report":
        assert "Calibration of cpu" in (folder / "page.html").read_text()
    else:
        assert "attention decode" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--models", "tiny", "--budget", "soon"], "--budget 'soon'"),
        (["--models", "tiny", "--tensor-parallel-sizes", "two"], "--tensor-parallel-sizes 'two'"),
        (["--models", "tiny", "--tensor-parallel-sizes", "3"], "can be cut into 3 ranks"),
        (["--models", ","], "no model given"),
        (["--models", "nowhere"], "nowhere"),
        pytest.param(
            ["--models", "tiny", "--device", "a100"],
            "no GPU here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["--models", "tiny", "--dtype", "int4"], "int4"),
        (["--models", "tiny", "--attention-backend", "flash_attn"], "can't serve here"),
        (["--models", "tiny", "--max-num-seqs", "0"], "--max-num-seqs 0"),
        (["--models", "tiny", "--output-dir", "tiny"], "holds no profile"),
        (["--models", "tiny", "--max-model-len", "128", "--output-dir", "profile"], "holds a profile with"),
    ],
)
def test_bad_settings_are_told_in_a_line(folder: Path, arguments: list[str], complaint: str) -> None:
    defaults = [] if "--output-dir" in arguments else ["--output-dir", "never"]
    device = [] if "--device" in arguments else ["--device", "cpu"]
    done = windtunnel("profile", *device, *arguments, *defaults, cwd=folder)
    assert done.returncode == 2, done.stderr
    assert complaint in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (folder / "never").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--load", "half"], "--load 'half'"),
        (["--load", "0.5", "--against", "measured.csv"], "--load 0.5 has no meaning with --against"),
        (["--load", "0.5", "--request-rate", "3"], "--request-rate 3"),
        (["--load", "0.5", "--arrival", "static"], "--arrival static"),
        (["--load", "0.5", "--num-replicas", "2"], "--num-replicas 1"),
        (["--load", "0.5", "--device", "tiny"], "no calibration"),
        (["--load", "0.5", "--async-scheduling", "true", "--pipeline-parallel-size", "2"], "one pipeline stage"),
    ],
)
def test_bad_validations_are_told_in_a_line(folder: Path, arguments: list[str], complaint: str) -> None:
    device = [] if "--device" in arguments else ["--device", "mine"]
    base = ["--model", "tiny", "--load-format", "dummy", *SIZES, *LOAD, "--output-dir", "never"]
    done = windtunnel("validate", *base, *device, *arguments, cwd=folder)
    assert done.returncode == 2, done.stderr
    assert complaint in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (folder / "never").exists()
