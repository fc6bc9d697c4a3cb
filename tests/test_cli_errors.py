"""What the command line says when something is wrong: one line, and the exit code."""

from pathlib import Path

import pytest

from cli.main import run
from engine.scheduling.policies import POLICIES

BASE = ["--model", "Mistral-7B-v0.1", "--device", "a100", "--max-model-len", "8192", "--num-prompts", "20"]
SIMULATE = ["simulate", *BASE, "--request-rate", "2"]
POLICY = """
from engine.errors import InputError
from engine.scheduling.policies import POLICIES, VLLM


class Mine(VLLM):
    def plan(self, scheduler):
        return self.worse(scheduler)

    def worse(self, scheduler):
        {fault}


POLICIES["mine"] = Mine
"""


# -- plugins -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ("return 1 / 0", 1, "plugin mine.py line 11: ZeroDivisionError: division by zero"),
        ("raise InputError('mine: give less')", 2, "plugin mine.py line 11: mine: give less"),
        ("raise OSError(5, 'no luck')", 1, "plugin mine.py line 11: OSError: [Errno 5] no luck"),
        ("return scheduler.admit(None)", 1, "plugin mine.py line 11: AttributeError: 'NoneType' object has no"),
    ],
)
def test_a_plugins_error_shows_its_own_frames(
    fault: str,
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(POLICY.format(fault=fault))
    try:
        done = run([*SIMULATE, "--plugin", "mine.py", "--scheduler", "mine", "--output-dir", "out"])
    finally:
        POLICIES.pop("mine", None)
    assert done[0] == code and done[1].startswith(message) and len(done[1].splitlines()) == 1
    frames = capsys.readouterr().err.splitlines()
    assert [line.strip() for line in frames if line.startswith("  File")] == [
        'File "mine.py", line 8, in plan', 'File "mine.py", line 11, in worse',
    ]  # fmt: skip
    assert len(frames) <= 6 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "code", "message", "frames"),
    [
        ("x = 1\ny = unknown\n", 1, "plugin mine.py line 2: NameError: name 'unknown' is not defined", 1),
        ("def f(:\n", 1, "plugin mine.py: SyntaxError: invalid syntax (mine.py line 1)", 0),
        ("from engine.specs import catalog\ncatalog.device('a1000')\n", 2, "plugin mine.py line 2: unknown device", 1),
    ],
)
def test_a_plugin_that_cannot_be_loaded(
    text: str, code: int, message: str, frames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(text)
    done = run([*SIMULATE, "--plugin", "mine.py"])
    assert done[0] == code and done[1].startswith(message)
    assert capsys.readouterr().err.count("  File") == frames
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


def test_a_defect_of_windtunnel_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **settings: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("cli.simulate.Simulation.of", broken)
    with pytest.raises(ZeroDivisionError, match="a defect"):
        run(SIMULATE)
