"""Jobs and what they leave: processes that are reused or not, records that are kept, files that are whole."""

from pathlib import Path

import pytest
import sweep_work

from engine.results.files import write_json, write_whole
from studies.jobs.cache import Cache
from studies.jobs.pool import in_turn, work_off


def test_a_process_is_reused_only_if_asked_for() -> None:
    jobs = [{"do": "pid"}] * 4
    fresh, reused = (
        [row["value"] for _, row in work_off(sweep_work.work, jobs, 1, reuse=reuse)] for reuse in (False, True)
    )
    assert len(set(fresh)) == 4 and len(set(reused)) == 1


def test_a_process_that_dies_is_replaced_and_its_job_is_the_one_that_crashed() -> None:
    jobs = [{"do": "pid"}, {"do": "die"}, {"do": "pid"}, {"do": "refuse"}, {"do": "fail"}, {"do": 3}]
    found = dict(work_off(sweep_work.work, jobs, 1, reuse=True))
    assert [found[i]["status"] for i in range(6)] == ["done", "crashed", "done", "refused", "crashed", "done"]
    assert found[0]["value"] != found[2]["value"] and "SIGKILL" in found[1]["error"] and found[5]["value"] == 9


def test_jobs_in_turn_answer_as_processes_do() -> None:
    jobs = [{"do": 2}, {"do": "refuse"}, {"do": "fail"}]
    ours, theirs = dict(in_turn(sweep_work.work, jobs)), dict(work_off(sweep_work.work, jobs, 2))
    for each in (*ours.values(), *theirs.values()):
        each.pop("traceback", None)
    assert ours == theirs


def test_records_are_kept_and_damaged_ones_are_none(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "points")
    assert cache.read("a") is None
    cache.write("a", {"values": {"qps": 1.5}})
    assert Cache(tmp_path / "points").read("a") == {"values": {"qps": 1.5}}
    for text in ("{", "[1]", ""):
        (tmp_path / "points" / "a.json").write_text(text)
        assert cache.read("a") is None


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "half \ud800")
    assert path.read_text() == '{\n  "a": 1\n}\n' and list(tmp_path.iterdir()) == [path]
