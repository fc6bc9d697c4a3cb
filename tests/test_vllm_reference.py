"""Our scheduler gives the batches that vLLM's own gave in recordings of three versions, and the benchmark can tell."""

import importlib.util
import json
import lzma
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RECORDED = Path(__file__).parent / "vllm_reference"
CASE = "0.33.0/cached_async_95"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vllm_reference", ROOT / "benchmarks" / "vllm_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one recording, to be altered."""
    (tmp_path / CASE).parent.mkdir()
    for path in RECORDED.glob(f"{CASE}.*"):
        shutil.copy(path, (tmp_path / CASE).parent)
    workload = json.loads((RECORDED / f"{CASE}.json").read_text("utf-8"))["workload"]
    (tmp_path / "workloads").mkdir()
    shutil.copy(RECORDED / "workloads" / f"{workload}.jsonl.xz", tmp_path / "workloads")
    return tmp_path


def rewrite(path: Path, change: Callable[[list[Any]], None]) -> None:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    change(rows)
    with lzma.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_every_recording_is_equal(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main([str(RECORDED)]) == 0
    lines = capsys.readouterr().out.splitlines()
    count = len(list(RECORDED.glob("*/*.json")))
    assert lines[-1] == f"{count} of {count} equal" and count >= 30
    assert {line.split()[0] for line in lines[:-1]} == {"0.12.0", "0.15.1", "0.33.0"}


def test_the_recordings_have_what_is_hard() -> None:
    cases = [json.loads(path.read_text("utf-8")) for path in RECORDED.glob("*/*.json")]
    for version in ("0.15.1", "0.33.0"):
        own = [case for case in cases if case["vllm"] == version]
        for on in (False, True):
            assert any(case["async_scheduling"] and case["enable_prefix_caching"] == on for case in own)
            assert any(not case["async_scheduling"] and case["enable_prefix_caching"] == on for case in own)
        options = {option for case in own for option in case["scheduler"]}
        assert {"long_prefill_token_threshold", "policy"} <= options
        assert sum(case["preemptions"] for case in own) > 100
    assert {"watermark", "scheduler_reserve_full_isl", "long_prefill_token_threshold_adaptive"} <= options


def _another_count(rows: list[Any]) -> None:
    entry = next(entry for row in rows[1:] for entry in row.get("b", []) if isinstance(entry, list) and entry[1] > 1)
    entry[1] -= 1


def _another_order(rows: list[Any]) -> None:
    next(row for row in rows if len(row.get("b", [])) > 2)["b"].reverse()


def _more_free(rows: list[Any]) -> None:
    next(row for row in rows if row.get("free"))["free"] += 1


def _a_preemption(rows: list[Any]) -> None:
    rows[5]["pre"] = [0]


def _later(rows: list[Any]) -> None:
    rows[0]["t"] += 2000


def _one_step_less(rows: list[Any]) -> None:
    del rows[-1]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_another_count, "entries differ: vLLM's alone [("),
        (_another_order, "entries differ: another order"),
        (_more_free, "free is "),
        (_a_preemption, "step 5: pre is [0] in vLLM, [] here"),
        (_later, "step 0: at "),
        (_one_step_less, "vLLM has 1447 steps, ours 1448"),
    ],
)
def test_an_altered_step_is_reported(
    benchmark: ModuleType,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[list[Any]], None],
    told: str,
) -> None:
    rewrite(folder / f"{CASE}.steps.jsonl.xz", change)
    assert benchmark.main([str(folder)]) == 1
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{CASE.replace('/', ' ')}: ") and "DIFFERENT" in first and told in first
    assert last == "0 of 1 equal"


@pytest.mark.parametrize("key", ["first_ns", "last_ns", "preemptions", "admissions"])
def test_an_altered_request_is_reported(
    benchmark: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    def change(rows: list[Any]) -> None:
        rows[7][key] = [[0, 16]] if key == "admissions" else rows[7][key] + 1001

    rewrite(folder / f"{CASE}.requests.jsonl.xz", change)
    assert benchmark.main([str(folder)]) == 1
    assert f"DIFFERENT: request 7: {key}" in capsys.readouterr().out


def test_other_settings_give_other_schedules(
    benchmark: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / f"{CASE}.json"
    recorded = json.loads(path.read_text("utf-8"))
    assert benchmark.main([str(folder)]) == 0
    others = [
        {"num_gpu_blocks": recorded["num_gpu_blocks"] - 1},
        {"enable_prefix_caching": False},
        {"async_scheduling": False},
        {"scheduler": {"scheduler_reserve_full_isl": False}},
        {"vllm": "0.15.1"},
    ]
    for other in others:
        path.write_text(json.dumps({**recorded, **other}), "utf-8")
        assert benchmark.main([str(folder)]) == 1, other
        assert "DIFFERENT" in capsys.readouterr().out.splitlines()[-2], other


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"scheduler": {"max_num_active_seqs": 3}}, "unsupported settings: max_num_active_seqs"),
        ({"speculative_tokens": 2}, "unsupported settings: speculative_tokens"),
        ({"vllm": "0.11.2"}, "vLLM 0.11.2 is older than the rules that are known (0.12)"),
        ({"workload": "lost"}, "FileNotFoundError"),
        ({"num_gpu_blocks": 20}, "InputError: request "),
    ],
)
def test_what_cannot_be_compared_is_not_equal(
    benchmark: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], told: str
) -> None:
    path = folder / f"{CASE}.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **change}), "utf-8")
    assert benchmark.main([str(folder)]) == 1
    first, last = capsys.readouterr().out.splitlines()
    assert "NOT COMPARED" in first and told in first and last == "0 of 1 equal"


def test_an_empty_folder_and_an_empty_recording_are_not_equal(
    benchmark: ModuleType, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert benchmark.main([str(empty)]) == 1
    assert capsys.readouterr().out == "0 of 0 equal\n"
    rewrite(folder / f"{CASE}.steps.jsonl.xz", list.clear)
    assert benchmark.main([str(folder)]) == 1
    assert "NOT COMPARED: ValueError: the recording is empty" in capsys.readouterr().out


def test_a_case_is_chosen_by_name(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main([str(RECORDED), "--case", "cached_async_81"]) == 0
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith("0.12.0 cached_async_81: ") and second.startswith("0.15.1 cached_async_81: ")
    assert last == "2 of 2 equal"
    assert benchmark.main([str(RECORDED), "--case", "unknown"]) == 1
    assert capsys.readouterr().out == "0 of 0 equal\n"
