"""What a user, a file or a neighbour may do wrong: one line that names it, exit code 2, and nothing left behind."""

import builtins
import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cli.main import run
from engine.documents import MOST_DEPTH, given_path, parse_json, parse_yaml
from engine.engine_preset import preset
from engine.errors import MOST_WORDS, DiskFullError, InputError
from engine.results.files import write_whole
from engine.results.folders import cant_write, made, owned
from engine.specs import catalog, hf_config
from engine.specs.checks import file_name
from engine.specs.device_folder import CALIBRATIONS, profile_settings
from engine.workload import lengths
from engine.workload.traces import read_trace
from simulator.predictor import calibration as store
from simulator.predictor.calibration_file import check_file
from studies.capacity.sweep import MOST_POINTS, name_of, points
from studies.jobs.pool import in_turn, work_off
from studies.measured.readers import read as read_measured
from studies.pages.compare_record import read_side
from windtunnel.capacity import kept, open_search, read_search_file
from windtunnel.run_config import hashes
from windtunnel.settings import FileConfig, load

ROOT = Path(__file__).parents[1]
few = settings(
    max_examples=40, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SIMULATE = ["simulate", "--model", "Mistral-7B-v0.1", "--device", "a100", "--max-model-len", "4096", "--num-prompts",
            "20", "--request-rate", "2"]  # fmt: skip
PLAN = ["plan", "--model", "Mistral-7B-v0.1", "--devices", "a100", "--gpu-price", "2", "--max-model-len", "4096",
        "--num-prompts", "20", "--request-rate", "1", "--slo", "p99_tbt<=0.1", "--workers", "1"]  # fmt: skip
LLAMA = {"model_type": "llama", "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4,
         "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 1000, "rms_norm_eps": 1e-5,
         "max_position_embeddings": 4096, "hidden_act": "silu", "rope_scaling": None, "quantization_config": None,
         "sliding_window": None, "layer_types": None, "tie_word_embeddings": False}  # fmt: skip
DEVICE = {"name": "x", "description": "d", "peak_flops": 312e12, "memory_bandwidth": 1.5e12, "memory_bytes": 80 * 10**9,
          "matmul_efficiency": 0.8, "attention_efficiency": 0.6, "bandwidth_efficiency": 0.8, "network": "pcie",
          "source": "s", "num_sms": 108, "clock_hz": 1e9}  # fmt: skip
ENGINE = {"base": "windtunnel", "reserve_gib": 1, "gpu_memory_utilization": 0.9, "limits": [], "graphs": {},
          "host": {"iteration_s": 1e-3, "sequence_s": 0.0, "layer_s": 0.0}, "scheduler": {}}  # fmt: skip
LENGTHS = {"name": "n", "source": "s", "max_total": None, "levels": [0, 1], "prompt": [1, 10], "output": [[1, 10]]}
ODD: list[Any] = [None, True, -1, 0, 1.5, 1e-300, 1e308, 10**18, 10**30, 10**400, float("nan"), float("inf"), "", "x",
                  "../../x", "\0", [], [1], [[]], {}, {"a": 1}, {"weights": 5}]  # fmt: skip
values = st.sampled_from(ODD) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def told(read: Callable[[], Any]) -> str:
    """Return the error of reading something: "" if it could be read. Anything but an InputError in a line is raised."""
    try:
        read()
    except InputError as error:
        said = str(error)
    else:
        return ""
    assert len(said.splitlines()) == 1, said
    return said


# -- documents ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [
    "[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000, "[" * (MOST_DEPTH + 2) + "]" * (MOST_DEPTH + 2),
    "1" * 5000, "[" + "1" * 41 + "]", '"\\ud800"', '{"\\udc00": 1}', "[NaN]", "[1e400]", "\0", "",
])  # fmt: skip
def test_json_beyond_the_limits_is_told_in_a_line(text: str) -> None:
    assert told(lambda: parse_json(text, "a.json", "mend it")).startswith("a.json ")


@pytest.mark.parametrize("text", [
    "{a: " * 3000, "a: " + "1" * 5000, '"\\ud800"', "&a [*a]", "&a {b: *a}", "d: 2020-99-99", "? [a]\n: b", "\0", "{",
    "a: &a [1,1,1,1,1,1,1,1,1,1]\nb: &b [" + "*a," * 9 + "]\nc: &c [" + "*b," * 9 + "]\nd: &d [" + "*c," * 9
    + "]\ne: &e [" + "*d," * 9 + "]\nf: [" + "*e," * 9 + "]", "!!python/object/apply:os.system ['id']",
])  # fmt: skip
def test_yaml_beyond_the_limits_is_told_in_a_line(text: str) -> None:
    assert told(lambda: parse_yaml(text, "a.yaml", "mend it")).startswith("a.yaml ")


@few
@given(st.text(max_size=40) | st.binary(max_size=40).map(lambda data: data.decode("latin-1")))
def test_any_text_is_a_document_or_an_error(text: str) -> None:
    for parse in (parse_json, parse_yaml):
        told(lambda parse=parse: parse(text, "a", "mend it"))


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/urandom", "/dev/null", ".", "a\0b", "x" * 5000])
def test_what_is_no_file_is_not_read(path: str) -> None:
    for arguments in (["--model", path], ["--trace", path], ["--config", path], ["--device", path]):
        done = run([*SIMULATE, *arguments, "--output-dir", "never"])
        assert done[0] == 2 and len(done[1].splitlines()) == 1, (arguments, done)


@few
@given(key=st.sampled_from(sorted(LLAMA)), value=values,
       kind=st.sampled_from(["llama", "mixtral", "qwen3_moe", "gemma2", "falcon", "phi", "qwen"]))  # fmt: skip
def test_a_models_config_with_any_value_is_a_model_or_an_error(key: str, value: Any, kind: str, tmp_path: Path) -> None:
    mixture = {"num_local_experts": 8, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    config = {**LLAMA, "model_type": kind, **(mixture if kind in ("mixtral", "qwen3_moe") else {}), key: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    told(lambda: hf_config.read(tmp_path).num_parameters)


@few
@given(key=st.sampled_from([*DEVICE, "peak_fp8_flops", "cache_bytes"]), value=values)
def test_a_device_file_with_any_value_is_a_device_or_an_error(key: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "d.yaml").write_text(yaml.safe_dump({**DEVICE, key: value}))
    told(lambda: catalog.device(str(tmp_path / "d.yaml")))


@few
@given(key=st.sampled_from([*ENGINE, "graph_sizes", "kernels", "profile_run"]), inner=st.booleans(), value=values)
def test_an_engine_file_with_any_value_is_an_engine_or_an_error(
    key: str, inner: bool, value: Any, tmp_path: Path
) -> None:
    names = {"host": "iteration_s", "scheduler": "max_num_seqs", "graphs": "largest", "profile_run": "base_bytes"}
    held = {**ENGINE.get(key, {}), names[key]: value} if inner and key in names else value
    (tmp_path / "e.yaml").write_text(yaml.safe_dump({**ENGINE, key: held}))
    told(lambda: preset(str(tmp_path / "e.yaml"), catalog.device("a100")).scheduler_spec({}))


@few
@given(key=st.sampled_from(sorted(LENGTHS)), value=values)
def test_a_length_distribution_with_any_value_is_one_or_an_error(key: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "l.json").write_text(json.dumps({**LENGTHS, key: value}))
    told(lambda: lengths.load(str(tmp_path / "l.json")))


VLLM = {"mean_ttft_ms": 50.0, "mean_tpot_ms": 10.0, "completed": 10, "output_throughput": 100.0, "duration": 10.0,
        "total_input_tokens": 1000, "total_output_tokens": 100, "request_rate": 1.0, "max_concurrency": None,
        "num_prompts": 10, "mean_e2el_ms": 500.0, "input_lens": [100] * 10, "output_lens": [10] * 10,
        "ttfts": [0.05] * 10, "itls": [[0.01] * 9] * 10}  # fmt: skip


@few
@given(key=st.sampled_from(sorted(VLLM)), value=values)
def test_a_benchmarks_result_with_any_value_is_one_or_an_error(key: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps({**VLLM, key: value}))
    told(lambda: read_measured(tmp_path / "r.json", {"model": "Mistral-7B-v0.1", "device": "a100"}))


@settings(few, max_examples=20)
@given(data=st.data(), value=values, kind=st.sampled_from(["summary.json", "config.yaml"]))
def test_a_measured_run_with_any_value_is_one_or_an_error(
    data: Any, value: Any, kind: str, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished / "one", tmp_path / "run", dirs_exist_ok=True)
    document = yaml.safe_load((tmp_path / "run" / kind).read_text("utf-8"))
    damaged = {**document, data.draw(st.sampled_from([*document, "server", "num_replicas", "turns"])): value}
    (tmp_path / "run" / kind).write_text(json.dumps(damaged))
    told(lambda: read_measured(tmp_path / "run", {}))


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where the values of a document are, the first two of each list."""
    yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, each in inner:
        yield from places(each, (*at, key))


def changed(document: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    copy = dict(document) if isinstance(document, dict) else list(document)
    copy[place[0]] = changed(document[place[0]], place[1:], value)
    return copy


KINDS_OF_FILES = {path.stem: json.loads(path.read_text("utf-8")) for path in (CALIBRATIONS / "a100_sxm").glob("*.json")}


@few
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS_OF_FILES)), value=values)
def test_a_calibrations_file_with_any_value_is_one_or_an_error(data: Any, kind: str, value: Any) -> None:
    document = KINDS_OF_FILES[kind]
    place = data.draw(st.sampled_from(list(places(document))))
    damaged = changed(document, place, value)
    said = told(lambda: check_file(kind, damaged, "gemm.json"))
    if not said:  # what passes can be predicted with
        device = catalog.device("a100_sxm")
        told(lambda: store.KINDS[kind].from_json(damaged["model"], device))


@pytest.mark.parametrize(("kind", "place", "value"), [
    ("elementwise", ("model", "pooled", "seconds", 0), -1.0), ("elementwise", ("model", "pooled", "bytes", 1), 1.0),
    ("all_reduce", ("model", "curves", 0, "seconds"), []), ("gemm", ("model",), None), ("gemm", (), []),
    ("gemm", (), {}),
    ("send", ("interval", "bands"), []), ("gemm", ("model", "base", "norm"), 0.0),
])  # fmt: skip
def test_curves_and_errors_of_a_calibration_are_checked(kind: str, place: tuple[Any, ...], value: Any) -> None:
    damaged = changed(KINDS_OF_FILES[kind], place, value)
    assert "is no calibration" in told(lambda: check_file(kind, damaged, "x.json"))


@pytest.mark.parametrize("text", ["null", "[]", "{}", '{"identity": {"dtype": 5}}', "{", "5"])
def test_a_damaged_profile_is_told(text: str, tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_text(text)
    assert str(tmp_path / "profile.json") in told(lambda: profile_settings(tmp_path))


# -- sizes and values --------------------------------------------------------------------------------------------------

SIZES = [name for name, field in FileConfig.model_fields.items() if "int" in str(field.annotation)]


@few
@given(name=st.sampled_from(SIZES), value=st.sampled_from([-1, 0, 1 << 31, 10**12, 10**27, 10**400]) | st.integers())
def test_a_size_without_bound_is_refused_before_it_is_made(name: str, value: int) -> None:
    flags = {"model": "Mistral-7B-v0.1", "device": "a100", "chunk_schedule": "dynamic", "request_rate": 1.0}

    def resolved() -> None:
        config = load(None, flags | {name: str(value)}, FileConfig)
        for group in config.groups():
            group.replica_spec()
        config.workload_spec(4096)

    told(resolved)


@pytest.mark.parametrize("arguments", [
    ["--num-replicas", str(10**27)],
    ["--chunk-schedule", "dynamic", "--chunk-schedule-stages", str(10**11), "--chunk-schedule-low", "32",
     "--chunk-schedule-high", "512", "--chunk-schedule-max-tokens", "4096"],
    ["--tensor-parallel-size", str(10**30)], ["--max-num-seqs", str(10**18)], ["--priorities", f"{10**30}=1"],
    ["--client-overhead-ms", "1e308", "--max-concurrency", "2"], ["--engine", "vllm@" + "9" * 5000],
])  # fmt: skip
def test_sizes_say_what_they_may_be(arguments: list[str]) -> None:
    code, said = run([*SIMULATE, *arguments])
    assert code == 2 and len(said.splitlines()) == 1 and len(said) < 400
    assert arguments[0] in said or arguments[-2] in said or "vllm" in said


@pytest.mark.parametrize("text", ["request_rate: true", "replicas: [{count: 100000000000}]", "seed: true", "5",
                                  'model: "\\ud800"', "num_prompts: false"])  # fmt: skip
def test_a_config_with_such_a_value_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    code, said = run(["simulate", "--device", "a100", "--config", str(tmp_path / "c.yaml")])
    assert code == 2 and len(said.splitlines()) == 1


@pytest.mark.parametrize("tolerance", ["1e-17", "nan", "0", "1e-300"])
def test_a_tolerance_that_cannot_be_reached_is_refused(tolerance: str) -> None:
    done = run(["search", *SIMULATE[1:-2], "--slo", "p99_tbt<=1", "--tolerance", tolerance, "--output-dir", "never"])
    assert (done[0] == 2 and done[1].startswith("tolerance ")) or "--tolerance" in done[1]


def test_a_sweep_of_too_many_points_is_refused_before_they_are_made() -> None:
    varied = {"max_num_seqs": list(range(1, 3001)), "max_num_batched_tokens": list(range(1, 3001))}
    with pytest.raises(InputError, match=rf"9,000,000 points: give at most {MOST_POINTS:,}"):
        points(varied, "s.yaml")


def test_a_table_of_too_many_columns_is_refused(tmp_path: Path) -> None:
    names = ",".join(f"c{i}" for i in range(300_000))
    (tmp_path / "t.csv").write_text(f"{names}\n{names}\n")
    assert "300,000 columns" in told(lambda: read_trace(tmp_path / "t.csv"))


@pytest.mark.parametrize(("arguments", "said"), [
    (["profile", "--models", "Mistral-7B-v0.1", "--device", "cpu", "--max-model-len", "0"], "--max-model-len 0"),
    (["profile", "--models", "Mistral-7B-v0.1", "--device", "cpu", "--tensor-parallel-sizes", "\u00b2"], "--tensor"),
    (["profile", "--models", "Mistral-7B-v0.1", "--device", "cpu", "--budget", "9" * 400 + "h"], "--budget"),
    (["validate", "--model", "Mistral-7B-v0.1", "--device", "cpu", "--load-format", "dummy", "--request-rate", "1",
      "--num-prompts", "5", "--router", "x"], "unknown router 'x'"),
    (["search", *SIMULATE[1:-2], "--slo", "p99_tbt<=1", "--router", "x"], "unknown router 'x'"),
    (["search", *SIMULATE[1:-2], "--slo", "p99_tbt<=1", "--gpu-price", "1" + "0" * 400], "--gpu-price"),
    (["study", "run", "capacity", "--num-prompts", str(10**20)], "--num-prompts"),
])  # fmt: skip
def test_values_are_checked_before_anything_is_written(arguments: list[str], said: str, tmp_path: Path) -> None:
    code, message = run([*arguments, "--output-dir", str(tmp_path / "out")])
    assert code == 2 and said in message and not (tmp_path / "out").exists()


# -- paths -------------------------------------------------------------------------------------------------------------


@few
@given(st.text(max_size=300))
def test_a_name_that_becomes_a_path_stays_where_it_is_put(name: str) -> None:
    if not told(lambda: file_name("device", name)):
        assert Path("runs", name).name == name and Path("runs", name).parent == Path("runs")
    point = name_of({"model": name, "device": "../../x"})
    if not told(lambda: file_name("the point", point)):
        assert Path("runs", point).parent == Path("runs")


def test_a_device_of_a_wandering_name_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("d.yaml").write_text(yaml.safe_dump({**DEVICE, "name": "../../../x"}))
    code, said = run([*SIMULATE, "--device", "d.yaml"])
    assert code == 2 and "'../../../x'" in said and [path.name for path in tmp_path.iterdir()] == ["d.yaml"]


BAD_FOLDERS = ("file", "file/out", "x" * 300, "link", "full", "/dev/null", "/".join(["a" * 200] * 30))


@pytest.mark.parametrize("command", [
    SIMULATE, ["search", *SIMULATE[1:-2], "--slo", "p99_tbt<=0.1"], ["study", "run", "generation_stalls"],
    ["search", *SIMULATE[1:-2], "--slo", "p99_tbt<=0.1", "--sweep", "s.yaml"],
    ["validate", "--against", "r.csv", *SIMULATE[1:5]], ["profile", "--models", "Mistral-7B-v0.1", "--device", "cpu"],
    ["calibrate", "fit", "--device", "a100_sxm", "--source", "vidur:r.csv"], PLAN,
    ["serve", "--simulate", *SIMULATE[1:5], "--port", "0"],
], ids=lambda command: "-".join(command[:2]))  # fmt: skip
def test_a_folder_that_cannot_be_one_is_refused_by_every_command(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    Path("r.csv").write_text("arrived_at_s,input_tokens,output_tokens,ttft_s,e2e_s\n0,5,5,0.1,0.2\n")
    Path("s.yaml").write_text("sweep: {max_num_seqs: [1, 2]}\n")
    Path("full").mkdir()
    Path("full/mine").touch()
    Path("link").symlink_to("nowhere")
    before = sorted(map(str, tmp_path.rglob("*")))
    for folder in BAD_FOLDERS:
        code, said = run([*command, "--output-dir", folder])
        assert (code, said.count("\n")) == (2, 0), (folder, code, said)
        assert said.endswith("give another --output-dir") and said.count("give another") == 1, (folder, said)
    assert sorted(map(str, tmp_path.rglob("*"))) == before


@pytest.mark.parametrize("command", [["truth"], ["accuracy"], ["report", "--device", "a100_sxm"]])
def test_an_output_that_cannot_be_a_file_is_refused_before_the_work(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output in (tmp_path / "file" / "o.md", tmp_path / ("x" * 300), tmp_path):
        code, said = run(["calibrate", *command, "--output", str(output)])
        assert code == 2 and said.endswith("give another --output"), said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("command", [
    SIMULATE, ["search", *SIMULATE[1:-2], "--slo", "p99_tbt<=0.1"],
    ["study", "run", "generation_stalls", "--num-prompts", "5", "--workers", "1"],
    ["validate", "--against", "r.csv", *SIMULATE[1:5]],
    ["report", "one", "two", "--output", "DISK/page.html"],
    ["calibrate", "accuracy", "--output", "DISK/page.md"],
    ["calibrate", "report", "--device", "a40", "--output", "DISK/page.html"],
], ids=lambda command: "-".join(command[:2]))  # fmt: skip
def test_a_full_disk_is_told_with_what_to_do(
    command: list[str], small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.csv").write_text("arrived_at_s,input_tokens,output_tokens,ttft_s,e2e_s\n0,5,5,0.1,0.2\n")
    for name, run_of in (("one", "one"), ("two", "other")):
        Path(name).symlink_to(finished / run_of)
    output = [] if "--output" in command else ["--output-dir", "DISK/out"]
    code, said = run([word.replace("DISK", str(small_disk)) for word in [*command, *output]])
    assert code == 2 and "No space left on device: free some space, or " in said and len(said.splitlines()) == 1, said
    assert not [path for path in small_disk.rglob("*") if path.name.startswith(".") or path.suffix in (".html", ".md")]
    assert not [path for path in small_disk.rglob("*") if path.is_dir() and not any(path.iterdir())]


def fills(job: str) -> dict[str, Any]:
    """A job that finds the disk full, as a point of a sweep may."""
    if job == "here":
        raise OSError(errno.ENOSPC, "No space left on device", "results.json")
    raise cant_write(Path("out"), OSError(errno.ENOSPC, "No space left on device"))


@pytest.mark.parametrize("job", ["here", "there"])
def test_a_full_disk_is_no_result_of_a_job(job: str) -> None:
    with pytest.raises(DiskFullError, match="No space left on device: free some space"):
        list(in_turn(fills, [job, job]))


def test_no_jobs_are_done_at_once() -> None:
    assert list(work_off(fills, [], workers=2)) == []  # of a sweep that was killed when every point was finished


def test_no_file_takes_the_place_of_a_device(tmp_path: Path) -> None:
    device = tmp_path / "device"
    os.mkfifo(device)
    code, said = run(["calibrate", "accuracy", "--output", str(device)])
    assert code == 2 and "it is a device or a pipe: give another --output" in said and device.is_fifo()
    with pytest.raises(FileExistsError):
        write_whole(device, "x")


@few
@given(st.text(max_size=30) | st.sampled_from(["~nobody-of-that-name/x", "\ud800", "a\0b", "x" * 5000]))
def test_any_text_is_a_path_or_an_error(text: str) -> None:
    if not told(lambda: given_path(text)):
        os.fsencode(given_path(text))
    device = catalog.device("a100")
    for read in (catalog.model, catalog.device, lambda name: preset(name, device), lambda name: hashes([name])):
        with contextlib.suppress(InputError):
            read(text)


@pytest.mark.parametrize("text", ["~nobody-of-that-name/x", "\ud800", "a\0b", "\x1b[2J", "x" * 5000])
def test_an_error_is_a_line_that_can_be_printed_and_read(text: str) -> None:
    for arguments in (
        [*SIMULATE, "--model", text],
        [*PLAN, "--trace", text, "--output-dir", "never"],
        ["report", text],
    ):
        code, said = run(arguments)
        assert code == 2 and said.isprintable() and len(said) <= MOST_WORDS + 5, said


# -- neighbours --------------------------------------------------------------------------------------------------------

SEARCH = ["search", *SIMULATE[1:-2], "--slo", "p99_tbt<=0.1"]


def test_the_second_into_a_folder_is_told_who_has_it(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("sweep: {max_num_seqs: [1, 2]}\n")
    holder = "import sys; from pathlib import Path; from engine.results.folders import owned\n" \
             "with owned(Path(sys.argv[1])): print('mine', flush=True); sys.stdin.read()"  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen([sys.executable, "-c", holder, str(tmp_path / "out")], env=environment, text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert first.stdout is not None and first.stdout.readline() == "mine\n"
    for command in (
        SEARCH,
        ["study", "run", "capacity"],
        ["profile", "--models", "Mistral-7B-v0.1", "--device", "cpu"],
        [*SEARCH, "--sweep", str(tmp_path / "s.yaml")],
        PLAN,
        ["calibrate", "fit", "--device", "a100_sxm", "--source", "vidur:nowhere"],
        SIMULATE,
    ):
        code, said = run([*command, "--output-dir", str(tmp_path / "out")])
        assert code == 2 and f"out is in use by process {first.pid} (" in said, said
    first.kill()
    first.wait()
    with owned(tmp_path / "out"):  # the lock has died with its process
        assert list((tmp_path / "out").iterdir()) == []


@few
@given(steps=st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["in", "out", "fail", "write"])), max_size=12))
def test_a_folder_has_one_owner_whatever_the_order(steps: list[tuple[str, str]], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.rmtree(folder, ignore_errors=True)
    inside: dict[str, Any] = {}
    results = False
    for who, what in steps:
        if what == "in" and who not in inside:
            owner = owned(folder, ours=("settings.json",))
            if inside:
                assert f"is in use by process {os.getpid()} (" in told(owner.__enter__)
                continue
            owner.__enter__()
            (folder / "settings.json").write_text("{}")
            inside[who] = owner
        elif what == "write" and who in inside:
            (folder / "result.json").write_text("{}")
            results = True
        elif what == "out" and who in inside:
            inside.pop(who).__exit__(None, None, None)
            results = True  # a folder that was left well stays, whatever is in it
        elif what == "fail" and who in inside:
            with contextlib.suppress(ZeroDivisionError):
                inside.pop(who).__exit__(ZeroDivisionError, ZeroDivisionError(), None)
        assert folder.is_dir() == bool(inside or results), steps
    for owner in inside.values():
        owner.__exit__(None, None, None)


def test_a_new_folder_without_results_is_removed_again(tmp_path: Path) -> None:
    def fails(folder: Path, name: str) -> None:
        with owned(folder, ours=("settings.json",)):
            (folder / name).write_text("{}")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails(tmp_path / "a" / "b", "settings.json")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError):
        fails(tmp_path / "a", "result.json")
    assert (tmp_path / "a" / "result.json").is_file()
    assert made(tmp_path / "a") == []


def test_a_failure_leaves_no_empty_folder_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "result.json").write_text("{}")

    def fails() -> None:
        with owned(tmp_path):
            (tmp_path / "points" / "8" / "draws").mkdir(parents=True)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "result.json"]


def test_a_damaged_search_is_told_when_it_resumes(tmp_path: Path) -> None:
    def opened() -> None:
        with open_search(tmp_path, {"a": 1}):
            pass

    opened()
    (tmp_path / "search.json").touch()
    (tmp_path / "1").mkdir()
    readers: dict[str, Callable[[], Any]] = {
        "settings.json": opened,
        "search.json": lambda: read_search_file(tmp_path / "search.json"),
        "1/summary.json": lambda: kept(tmp_path, 1.0, lambda rate, folder: {}),
    }
    for name, read_again in readers.items():
        for text in ("", "null", "[]", "{}", "5", "[" * 5000, '{"slos": 5}', '{"slos": [5]}', '{"status": "done"}'):
            (tmp_path / name).write_text(text)
            assert told(read_again), (name, text)


# -- reports -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, count in (("one", "20"), ("other", "30")):
        assert run([*SIMULATE, "--num-prompts", count, "--output-dir", str(folder / name)]) == (0, "")
    return folder


def with_column(path: Path, name: str, value: float, rows: int | None = None) -> None:
    """Set a column of a table to a value in its first row, and keep so many rows."""
    table = pq.read_table(path)[: rows if rows is not None else None].to_pydict()
    if rows != 0:
        table[name][0] = value
    pq.write_table(pa.table(table, schema=pq.read_schema(path)), path)


@pytest.mark.parametrize(("doctor", "said"), [
    (lambda run, other: shutil.copy(other / "iterations.parquet", run), "they are not of one run"),
    (lambda run, other: shutil.copy(other / "requests.parquet", run), "they are not of one run"),
    (lambda run, other: with_column(run / "requests.parquet", "arrived_s", 0.0, rows=0), "holds no request"),
    (lambda run, other: with_column(run / "requests.parquet", "first_token_s", float("nan")), "no run has that"),
    (lambda run, other: with_column(run / "requests.parquet", "last_token_s", -5.0), "no run has that"),
    (lambda run, other: with_column(run / "iterations.parquet", "duration_s", -1.0), "the run has no such batch"),
    (lambda run, other: with_column(run / "iterations.parquet", "start_s", float("nan")), "the run has no such batch"),
    (lambda run, other: with_column(run / "iterations.parquet", "replica", 7), "the run has no such batch"),
    (lambda run, other: (run / "config.yaml").write_text("5"), "holds no settings"),
    (lambda run, other: (run / "iterations.parquet").write_bytes(b"\xff" * 999), "can't be read as a run"),
])  # fmt: skip
def test_a_doctored_run_is_refused(
    doctor: Callable[[Path, Path], Any], said: str, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished / "one", tmp_path / "run")
    doctor(tmp_path / "run", finished / "other")
    code, message = run(["report", str(tmp_path / "run")])
    assert code == 2 and said in message and len(message.splitlines()) == 1


@settings(few, max_examples=4)
@given(data=st.data(), value=values)
def test_a_run_with_any_value_in_its_summary_is_drawn_or_refused(data: Any, value: Any, finished: Path) -> None:
    summary = json.loads((finished / "one" / "summary.json").read_text("utf-8"))
    place = data.draw(st.sampled_from([place for place in places(summary) if place]))
    try:
        (finished / "one" / "summary.json").write_text(json.dumps(changed(summary, place, value)))
        code, message = run(["report", str(finished / "one")])
        assert code in (0, 2) and len(message.splitlines()) == code // 2, (place, value, message)
    finally:
        (finished / "one" / "summary.json").write_text(json.dumps(summary))


NUMBERS = {"requests": ["arrived_s", "scheduled_s", "first_token_s", "last_token_s", "prompt_tokens", "output_tokens",
                        "preemptions", "prefix_hit_tokens"],
           "iterations": ["start_s", "duration_s", "replica", "stage", "num_tokens", "num_decodes", "kv_blocks",
                          "num_running", "max_tbt_s"]}  # fmt: skip
RUN_OF_NUMBERS = [(table, column) for table, columns in NUMBERS.items() for column in columns]


@settings(few, max_examples=20)
@given(
    place=st.sampled_from(RUN_OF_NUMBERS),
    value=st.sampled_from([float("nan"), float("inf"), -1.0, -1e9, 0.0, 1e300, 2.0**31 - 1]) | st.floats(),
)
def test_a_run_with_any_number_in_its_tables_is_read_or_refused(
    place: tuple[str, str], value: float, finished: Path, tmp_path: Path
) -> None:
    table, column = place
    path = tmp_path / "run" / f"{table}.parquet"
    shutil.copytree(finished / "one", tmp_path / "run", dirs_exist_ok=True)
    if pq.read_schema(path).field(column).type not in (pa.float64(), pa.float32()):
        value = int(max(-(2.0**15), min(value, 2.0**15 - 1))) if value == value else 0  # what the column can hold
    with_column(path, column, value)
    told(lambda: read_side(tmp_path / "run", "run"))


def test_a_cell_that_a_spreadsheet_would_run_is_escaped() -> None:
    template = (ROOT / "studies" / "pages" / "template.html").read_text("utf-8")
    (pattern,) = re.findall(r"const plain = .*?/(\^\[.*?\])/", template)
    assert "line.map(plain).map(cell)" in template
    assert all(re.match(pattern, text) for text in ("=1+1", "+1", "-cmd", "@sum", "\tx", "\rx"))
    assert not re.match(pattern, "Mistral-7B = x")


# -- plugins -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["import sys; sys.exit()", "import sys; sys.exit(3)", "raise SystemExit", "raise GeneratorExit",
             "import sys; sys.exit('x\\ny')", "raise BaseException('x')"]
)  # fmt: skip
def test_a_plugin_does_not_end_the_command(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.py").write_text(text)
    code, said = run([*SIMULATE, "--plugin", "p.py"])
    assert code == 1 and said.startswith("plugin p.py line 1: ") and len(said.splitlines()) == 1


ERRORS = sorted(
    name for name, kind in vars(builtins).items()
    if isinstance(kind, type) and issubclass(kind, BaseException) and not issubclass(kind, KeyboardInterrupt | Warning)
)  # fmt: skip


@few
@given(name=st.sampled_from(ERRORS), words=st.none() | st.booleans() | st.integers() | st.text(max_size=20))
def test_whatever_a_plugin_raises_is_one_line_with_its_name(name: str, words: Any, tmp_path: Path) -> None:
    path = tmp_path / "p.py"
    path.write_text(f"def f():\n    raise {name}({words!r})\nf()\n", encoding="utf-8")
    code, said = run([*SIMULATE, "--plugin", str(path)])
    assert code == 1 and said.startswith(f"plugin {path} line ") and len(said.splitlines()) == 1, said


def test_a_router_that_exits_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from simulator.router import ROUTERS

    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.py").write_text(
        "import sys\nfrom simulator.router import ROUTERS\nROUTERS['away'] = lambda rng: lambda *_: sys.exit(0)\n"
    )
    try:
        code, said = run([*SIMULATE, "--plugin", "p.py", "--router", "away", "--num-replicas", "2"])
    finally:
        ROUTERS.pop("away", None)
    assert code == 1 and said.startswith("plugin p.py line 3: SystemExit: 0")


# -- faults ------------------------------------------------------------------------------------------------------------


def test_a_search_that_is_killed_resumes_to_the_same_capacity() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "faults.py"), "--times", "1", "--only", "search"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "1 of 1 commands stand it"), done.stdout
