"""A run's folder: what becomes of it when the run ends well, fails, is interrupted or is killed."""

import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import InputError
from engine.results import run_folder as module
from engine.results.run_folder import InterruptedRunError, kept_if_interrupted, run_folder

KILLED = """
import os, signal, sys
from pathlib import Path
from engine.results.run_folder import run_folder
with run_folder(Path(sys.argv[1])) as folder:
    (folder / "half.txt").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(place: Path) -> set[str]:
    return {path.name for path in place.iterdir()}


def test_the_next_run_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out")], check=False)
    assert done.returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.partial-") and names(left) == {"half.txt"}
    with run_folder(tmp_path / "other"):
        assert left.exists()  # another run's
    with run_folder(tmp_path / "out") as folder:
        assert not left.exists()
        (folder / "whole.txt").write_text("whole")
    assert names(tmp_path) == {"out", "other"} and names(tmp_path / "out") == {"whole.txt"}


def overtaken(target: Path, other: Path) -> None:
    """A run into `target`, which another run takes meanwhile; `other` is the folder of one that is under way."""
    with run_folder(target) as folder:
        assert other.exists() and folder != other
        (folder / "mine.txt").write_text("second")
        target.mkdir()
        (target / "x").touch()


def test_a_run_that_is_under_way_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with run_folder(out) as first:
        (first / "mine.txt").write_text("first")
        with pytest.raises(InputError, match=r"taken meanwhile .* the results are in .*/out\.kept"):
            overtaken(out, first)
        assert (out / "x").exists()
        (out / "x").unlink()
    assert (out / "mine.txt").read_text() == "first"
    assert (tmp_path / "out.kept" / "mine.txt").read_text() == "second"


def test_names_with_special_characters_are_taken_as_they_are(tmp_path: Path) -> None:
    (tmp_path / ".out.partial-1").mkdir()
    (tmp_path / ".[o]ut.partial-1").mkdir()
    with run_folder(tmp_path / "[o]ut"):
        assert (tmp_path / ".out.partial-1").exists()
        assert not (tmp_path / ".[o]ut.partial-1").exists()


def test_nothing_is_taken_for_abandoned_where_there_are_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, what: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(module.fcntl, "flock", refuse)
    (tmp_path / ".out.partial-1").mkdir()
    with run_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == {"out", ".out.partial-1"}


def interrupted(target: Path, name: str) -> None:
    """A run that is interrupted when it has written the file `name`."""
    with run_folder(target) as folder, kept_if_interrupted(folder, target, "rows"):
        (folder / name).touch()
        raise KeyboardInterrupt


def test_an_interrupted_run_keeps_what_was_finished(tmp_path: Path) -> None:
    for number in ("", "2"):
        with pytest.raises(InterruptedRunError, match=f"what was finished is in .*/out.incomplete{number}$"):
            interrupted(tmp_path / "out", "rows")
        assert names(tmp_path / f"out.incomplete{number}") == {"rows"}
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "out", "other")
    assert names(tmp_path) == {"out.incomplete", "out.incomplete2"}
