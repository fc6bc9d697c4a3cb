"""selfcheck on a CPU, on a machine that lacks what a GPU node may lack."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from stand_in_cuda import stand_in

from engine.runtime.engine_spec import DECODE_GRAPHS
from engine.scheduling.policies import resolve
from engine.scheduling.request import BatchShape
from engine.specs import ParallelSpec, SchedulerSpec, catalog
from profiler.importers import read_source
from profiler.operators import inventory
from profiler.points import Limits
from profiler.timer import CudaTimer
from simulator.cluster import deploy
from simulator.predictor.calibration import save
from simulator.predictor.calibration_fit import fit
from studies import selfcheck

ROOT = Path(__file__).parents[1]
LACKING = ("pydantic", "plotly", "ray", "pyarrow", "datasketches", "rich", "typer", "yaml", "hypothesis")
BLOCKER = f"""
import sys

class Lacking:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {LACKING!r}:
            raise ModuleNotFoundError(f"no module named {{name}} on this node", name=name)

sys.meta_path.insert(0, Lacking())
"""


def node(arguments: list[str], tmp_path: Path, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """A command where some packages are not installed."""
    (tmp_path / "site").mkdir(exist_ok=True)
    (tmp_path / "site" / "sitecustomize.py").write_text(BLOCKER)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)]),
                   "OMP_NUM_THREADS": "1", "WINDTUNNEL_CACHE_DIR": str(tmp_path / "cache")}  # fmt: skip
    return subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=timeout
    )


def test_the_node_really_lacks_them(tmp_path: Path) -> None:
    for name in LACKING:
        assert node(["-c", f"import {name}"], tmp_path).returncode != 0


def test_profile_fit_and_validation_leave_a_few_files(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from types import SimpleNamespace; from studies import selfcheck; "
        "selfcheck.PATIENCE = 100; selfcheck.time = SimpleNamespace(perf_counter=lambda: 0.0); "  # at any load
        "selfcheck.LEAST_S['cpu'] = dict.fromkeys(selfcheck.STEPS, 1.0); "
        "raise SystemExit(0 if selfcheck.selfcheck('cpu', 6, Path('out'), ('profile', 'validate')) else 1)"
    )
    done = node(["-c", code], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "results: out"
    assert any(line.startswith("validate") and "capacity" in line for line in lines)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) <= 8
    assert all(path.stat().st_size < 16 << 20 for path in files)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert all(step["ok"] for step in summary["steps"].values())
    results = json.loads((tmp_path / "out" / "validation.json").read_text())
    assert [load["load"] for load in results["loads"]] == [0.5, 0.85, 0.95]
    assert all(load["replay"]["same"] for load in results["loads"])
    from studies.pages.validation import validation_page  # back home, where plotly is

    assert "</html>" in validation_page(results).write(tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--device", "cpu", "--budget", "soon", "--output-dir", "x"], "--budget 'soon'"),
        (["--device", "tpu", "--output-dir", "x"], "invalid choice"),
        (["--device", "cpu", "--output-dir", "site"], "is not empty"),
        (
            ["--device", "cpu", "--budget", "90s", "--output-dir", "x"],
            "--budget 90s is too short on cpu: give at least",
        ),
        (["--budget", "5m", "--output-dir", "x"], "--budget 300s is too short on cuda: give at least"),
    ],
)
def test_bad_settings_are_reported_at_once(
    arguments: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "x").touch()
    try:
        code = selfcheck.main(arguments)
    except SystemExit as ended:  # argparse
        code = int(ended.code or 0)
    assert code == 2 and complaint in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


def test_the_command_needs_none_of_them(tmp_path: Path) -> None:
    done = node(["-m", "cli", "selfcheck", "--device", "cpu", "--budget", "soon", "--output-dir", "x"], tmp_path)
    assert done.returncode == 2 and "--budget 'soon'" in done.stderr


def test_the_least_budget_gives_every_step_its_least() -> None:
    for device, least in selfcheck.LEAST_S.items():
        budget = selfcheck.least_budget(device)
        shares = {step: budget * share / sum(selfcheck.STEPS.values()) for step, share in selfcheck.STEPS.items()}
        assert all(shares[step] >= needed - 1e-9 for step, needed in least.items())
        assert any(shares[step] == pytest.approx(needed) for step, needed in least.items())
        assert selfcheck.least_budget(device, ("profile",)) == pytest.approx(least["profile"])
        assert budget <= 540  # what is given by default


@pytest.mark.parametrize(
    ("printed", "code", "result"),
    [
        (b"one done\ntwo done\n", None, "out of time after 20 s, it got to: two done"),
        (None, None, "out of time after 20 s, while it was starting: give profile more of a longer --budget"),
        ("three\nall 7 measured\n", 0, "all 7 measured"),
        ("half\nno GPU\n", 1, "failed (1): no GPU"),
        ("", 3, "failed (3): it printed nothing"),
    ],
)
def test_a_step_reports_what_it_did(
    printed: bytes | str | None, code: int | None, result: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stands_in(command: list[str], **settings: Any) -> SimpleNamespace:
        assert command[1:] == ["-m", "studies.selfcheck", "--device", "cpu", "--budget", "20.0", "--output-dir",
                               str(tmp_path), "--step", "profile"]  # fmt: skip
        if code is None:
            raise subprocess.TimeoutExpired(command, settings["timeout"], output=printed)
        return SimpleNamespace(stdout=printed, returncode=code)

    monkeypatch.setattr(subprocess, "run", stands_in)
    found = selfcheck._run_step("profile", "cpu", 20.0, tmp_path)
    assert found == {"ok": code == 0, "result": result}


def test_after_a_step_that_fails_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = {"profile": {"ok": False, "result": "failed (1): no luck"}, "tests": {"ok": True, "result": "9 passed"}}
    monkeypatch.setattr(selfcheck, "_run_step", lambda step, device, seconds, folder: dict(lines[step]))
    assert not selfcheck.selfcheck("cpu", 300, tmp_path / "out", ("profile", "tests"))
    steps = json.loads((tmp_path / "out" / "summary.json").read_text())["steps"]
    assert {name: (step["ok"], step["result"]) for name, step in steps.items()} == {
        name: (line["ok"], line["result"]) for name, line in lines.items()
    }
    shown = capsys.readouterr().out
    assert "failed (1): no luck" in shown and "9 passed" in shown


def test_a_gpu_is_profiled_and_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in for one: its times mean nothing, but everything that a GPU's profile has is there."""
    model = replace(selfcheck.SMALL, num_layers=2, hidden_size=128, intermediate_size=256, num_attention_heads=4,
                    num_key_value_heads=2, head_dim=32, vocab_size=500)  # fmt: skip
    limits = Limits(max_tokens=32, max_requests=4, max_length=64, kv_tokens=1024)
    scheduler = SchedulerSpec(max_num_batched_tokens=32, max_num_seqs=4, max_model_len=64, block_size=256)
    case = replace(selfcheck.CASES["cuda"], model=model, limits=limits, scheduler=scheduler)
    monkeypatch.setitem(selfcheck.CASES, "cuda", case)
    monkeypatch.setattr(CudaTimer, "BUDGET_S", 0.001)
    with stand_in(monkeypatch):
        said = selfcheck.profile_step("cuda", selfcheck.SETTLE_S + 60, tmp_path)
    assert said.endswith("measurements on NVIDIA H200")
    tables = read_source("profile", tmp_path / "profile")
    wanted = {op.name for op in inventory(model, ParallelSpec(), 0)} | {"layer_launch", "iteration_overhead"}
    assert wanted <= set(tables["operator"])
    calibration = fit(catalog.device("h200"), [tables], on_progress=lambda line: None)
    save(calibration, tmp_path / "h200", catalog.device("h200"))
    (tmp_path / "h200" / "profile.json").write_bytes((tmp_path / "profile" / "profile.json").read_bytes())
    deployment = deploy(model, str(tmp_path / "h200"), scheduler=resolve(scheduler, 64), num_gpu_blocks_override=20)
    assert deployment.host is not None and deployment.device.name == "h200_sxm"
    assert deployment.host.layer_s > 0 and deployment.host.graph_decodes == max(DECODE_GRAPHS)
    assert "estimate" not in deployment.predictor.description
    assert deployment.predictor.stage_time(BatchShape(3, 3, 60, (), 3, 3), 0) > 0
