"""Dependencies: each has bounds, what is locked lies within them, and the lowest versions work.

The last takes minutes and an index to install from: WINDTUNNEL_TEST_LOWEST=1 pytest tests/test_dependencies.py
"""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
LEFT_OUT = ("flash-attn",)  # which no one installs but on a GPU, and `dev` does not bring
COMMANDS = (
    ("simulate", "--model", "Mistral-7B-v0.1", "--device", "a100", "--num-prompts", "50", "--request-rate", "2",
     "--max-model-len", "4096", "--output-dir", "run"),
    ("report", "run"),
    ("search", "--model", "Mistral-7B-v0.1", "--device", "h100", "--num-prompts", "50", "--max-model-len", "4096",
     "--slo", "p99_tbt<=0.1", "--output-dir", "search"),
    ("report", "search"),
    ("calibrate", "show", "--device", "a100_sxm"),
    ("simulate", "--config", "run/config.yaml", "--trace", "trace.csv", "--num-prompts", "2", "--output-dir",
     "replay"),
)  # fmt: skip


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def bounds(requirement: str) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """Return a requirement's name, lowest version, and the first that is too high."""
    found = re.fullmatch(r"([\w-]+)>=([\d.]+),<([\d.]+)", requirement)
    assert found is not None, f"{requirement}: give NAME>=LOWEST,<TOO_HIGH"
    return found[1].lower().replace("_", "-"), numbers(found[2]), numbers(found[3])


def requirements() -> list[str]:
    every = [*PROJECT["dependencies"], *(each for extra in EXTRAS.values() for each in extra)]
    return [each for each in every if not each.startswith("windtunnel[") and "==" not in each]


def test_every_dependency_has_bounds_and_the_locked_one_lies_within() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    locked = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert sorted(locked) == list(locked)
    for requirement in requirements():
        name, lowest, too_high = bounds(requirement)
        assert lowest < too_high, requirement
        if name not in LEFT_OUT:
            assert lowest <= numbers(locked[name]) < too_high, f"{requirement}, and {locked[name]} is locked"
    for requirement in (each for extra in EXTRAS.values() for each in extra if "==" in each):
        name, version = requirement.split("==")
        assert locked[name] == version


def test_ci_installs_what_is_locked() -> None:
    assert "-c constraints.txt -e '.[dev]'" in (ROOT / "tests" / "run.sh").read_text("utf-8")


@pytest.mark.skipif("WINDTUNNEL_TEST_LOWEST" not in os.environ, reason="takes minutes, and a package index")
def test_the_lowest_versions_install_and_work(tmp_path: Path) -> None:
    def run(*command: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr[-2000:]}"

    (tmp_path / "trace.csv").write_text("num_prefill_tokens,num_decode_tokens,arrived_at\n100,5,0\n90,7,1\n")
    run(sys.executable, "-m", "venv", "lowest")
    python = str(tmp_path / "lowest" / "bin" / "python")
    lowest = [re.sub(r">=([\d.]+),<.*", r"==\1", each) for each in PROJECT["dependencies"]]
    run(python, "-m", "pip", "install", "-q", *lowest)
    run(python, "-m", "pip", "install", "-q", "--no-deps", "-e", str(ROOT))
    for command in COMMANDS:
        run(python, "-m", "cli", *command)
