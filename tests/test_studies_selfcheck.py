"""selfcheck on a CPU, on a machine that lacks what a GPU node may lack."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

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


def node(arguments: list[str], tmp_path: Path, timeout: float = 200) -> subprocess.CompletedProcess[str]:
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


def test_profile_fit_and_validation_fit_into_a_budget_and_a_few_files(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from studies.selfcheck import selfcheck; "
        "raise SystemExit(0 if selfcheck('cpu', 30, Path('out'), ('profile', 'validate')) else 1)"
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
    assert sum(step["seconds"] for step in summary["steps"].values()) < 47
    results = json.loads((tmp_path / "out" / "validation.json").read_text())
    assert [load["load"] for load in results["loads"]] == [0.5, 0.85, 0.95]
    assert all(load["replay"]["same"] for load in results["loads"])
    from studies.pages.validation import write_validation  # back home, where plotly is

    assert "</html>" in write_validation(results, tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["--device", "cpu", "--budget", "soon", "--output-dir", "x"], 2, "--budget 'soon'"),
        (["--device", "tpu", "--output-dir", "x"], 2, "invalid choice"),
        (["--device", "cpu", "--output-dir", "site"], 2, "is not empty"),
    ],
)
def test_bad_settings_are_told(arguments: list[str], code: int, complaint: str, tmp_path: Path) -> None:
    done = node(["-m", "cli", "selfcheck", *arguments], tmp_path)
    assert done.returncode == code
    assert complaint in done.stderr


def test_a_step_that_runs_out_of_time_or_fails_is_said_and_the_others_go_on(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from studies.selfcheck import selfcheck; "
        "raise SystemExit(0 if selfcheck('cpu', 12, Path('out'), ('benchmark', 'validate')) else 1)"
    )
    done = node(["-c", code], tmp_path)
    assert done.returncode == 1
    steps = json.loads((tmp_path / "out" / "summary.json").read_text())["steps"]
    assert not steps["benchmark"]["ok"] and "out of time" in steps["benchmark"]["result"]
    assert not steps["validate"]["ok"]  # there is no profile
    assert (tmp_path / "out" / "benchmark.txt").exists()


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
    assert deployment.host is not None and deployment.device.name == "h200"
    assert deployment.host.layer_s > 0 and deployment.host.graph_decodes == max(DECODE_GRAPHS)
    assert "estimate" not in deployment.predictor.description
    assert deployment.predictor.stage_time(BatchShape(3, 3, 60, (), 3, 3), 0) > 0
