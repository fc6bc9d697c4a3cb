"""`windtunnel simulate` as a user meets it: a process, its output, its exit code and the folder it leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from cli.main import run
from cli.output import progress_bar
from studies.pages.page import LIBRARY
from windtunnel.settings import read_file

BASE = ["--model", "Mistral-7B-v0.1", "--device", "a100", "--max-model-len", "8192"]
LONG = [*BASE, "--request-rate", "2", "--num-prompts", "300000"]
SMALL = [*BASE, "--request-rate", "2", "--num-prompts", "40"]


def windtunnel(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cli", *arguments], cwd=cwd, capture_output=True, text=True, timeout=120
    )


def test_a_run_leaves_its_folder_and_ends_with_the_report(tmp_path: Path) -> None:
    done = windtunnel(
        "simulate", *SMALL, "--slo", "p99_tbt<=0.1", "--slo", "p50_ttft<=1ms", "--chrome-trace", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress bar in a pipe
    report = Path(done.stdout.splitlines()[-1].removeprefix("report: "))
    folder = tmp_path / report.parent
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.yaml",
        "summary.json",
        "requests.parquet",
        "iterations.parquet",
        "report.html",
        LIBRARY,
        "trace.json",
    }
    assert "p50_ttft<=0.001s is missed" in done.stdout
    assert "times: calibrated on measurements of a100_pcie" in done.stdout
    summary = json.loads((folder / "summary.json").read_text())
    requests, iterations = pq.read_table(folder / "requests.parquet"), pq.read_table(folder / "iterations.parquet")
    assert summary["completed"] == requests.num_rows == 40
    assert summary["total_output_tokens"] == sum(requests["output_tokens"].to_pylist())
    assert summary["simulator"]["batches"] == iterations.num_rows
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert len([event for event in events if event["ph"] == "X"]) == iterations.num_rows


def test_the_summary_has_the_keys_of_vllms_benchmark(tmp_path: Path) -> None:
    done = windtunnel("simulate", *SMALL, "--json", "--output-dir", "out", cwd=tmp_path)
    summary = json.loads(done.stdout.splitlines()[-1])
    counts = "duration completed failed total_input_tokens total_output_tokens request_throughput request_goodput"
    wanted = [*counts.split(), "output_throughput", "total_token_throughput"]
    wanted += [f"{s}_{m}_ms" for s in ("mean", "median", "std", "p99") for m in ("ttft", "tpot", "itl", "e2el")]
    assert set(wanted) <= set(summary)
    assert {"batches", "startup_seconds", "loop_seconds", "peak_rss_bytes"} <= set(summary["simulator"])
    assert len(done.stdout.splitlines()) == 1


def test_the_config_of_a_run_runs_it_again(tmp_path: Path) -> None:
    first = windtunnel("simulate", *SMALL, "--seed", "7", "--output-dir", "a", cwd=tmp_path)
    again = windtunnel("simulate", "--config", "a/config.yaml", "--output-dir", "b", cwd=tmp_path)
    assert first.returncode == again.returncode == 0, again.stderr
    for name in ("requests.parquet", "iterations.parquet", "config.yaml"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_estimate_is_called_one(tmp_path: Path) -> None:
    done = windtunnel("simulate", *SMALL, "--predictor", "roofline", "--output-dir", "out", cwd=tmp_path)
    assert "times: roofline estimate" in done.stdout
    assert "estimate" in json.loads((tmp_path / "out" / "summary.json").read_text())["replicas"][0]["predictor"]


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    settings = {"model": "microsoft/phi-2", "device": "a40", "request-rate": 1.0, "num_prompts": 5, "seed": 1}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    done = windtunnel("simulate", "--config", "run.yaml", "--num-prompts", "7", "--output-dir", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert (config["num_prompts"], config["device"], config["max_num_batched_tokens"]) == (7, "a40", 512)


def test_a_cluster_of_two_kinds(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "model: mistralai/Mistral-7B-v0.1\ndevice: a100\nrequest_rate: 4\nnum_prompts: 60\nmax_model_len: 4096\n"
        "router: least_outstanding_tokens\n"
        "replicas:\n  - count: 2\n  - {device: h100, scheduler: vllm}\n"
    )
    done = windtunnel("simulate", "--config", "run.yaml", "--json", "--output-dir", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    replicas = json.loads(done.stdout)["replicas"]
    assert [(r["device"], r["scheduler"]) for r in replicas] == [("a100_pcie", "sarathi")] * 2 + [("h100_sxm", "vllm")]
    assert "out" in done.stderr  # the words go to stderr, the JSON stands alone
    again = windtunnel("simulate", "--config", "out/config.yaml", "--output-dir", "again", cwd=tmp_path)
    assert again.returncode == 0, again.stderr


def test_a_plugin_adds_a_policy(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from engine.scheduling.policies import POLICIES, VLLM\nclass Mine(VLLM):\n    pass\nPOLICIES['mine'] = Mine\n"
    )
    done = windtunnel(
        "simulate", *SMALL, "--plugin", "mine.py", "--scheduler", "mine", "--output-dir", "o", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


def test_too_long_requests_are_dropped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("num_prefill_tokens,num_decode_tokens\n100,10\n5000,10\n200,20\n")
    done = windtunnel(
        "simulate", "--model", "Mistral-7B-v0.1", "--device", "a100", "--max-model-len", "4096", "--trace", "t.csv",
        "--request-rate", "1", "--json", "--output-dir", "out", cwd=tmp_path,
    )  # fmt: skip
    summary = json.loads(done.stdout)
    assert (summary["completed"], summary["dropped"], summary["failed"]) == (2, 1, 0)


def test_a_folder_named_like_a_device_is_not_taken_for_it(tmp_path: Path) -> None:
    for name in ("a100", "azure_conv", "mistralai/Mistral-7B-v0.1", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "my_gpu.yaml").write_text(
        "{description: mine, peak_flops: 4e14, memory_bandwidth: 3e12, memory_bytes: 96e9, matmul_efficiency: 0.7, "
        "attention_efficiency: 0.5, bandwidth_efficiency: 0.8, network: pcie, source: a test}"
    )
    (tmp_path / "run.yaml").write_text(
        "model: mistralai/Mistral-7B-v0.1\nworkload: azure_conv\nrequest_rate: 4\nnum_prompts: 30\n"
        "replicas: [{device: a100}, {device: my_gpu.yaml, max-num-seqs: 64}]\n"
    )
    first = windtunnel("simulate", "--config", "run.yaml", "--output-dir", "out", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    again = windtunnel("simulate", "--config", "../out/config.yaml", "--output-dir", "o", cwd=tmp_path / "elsewhere")
    assert again.returncode == 0, again.stderr
    summaries = [json.loads((tmp_path / path / "summary.json").read_text()) for path in ("out", "elsewhere/o")]
    assert summaries[0]["replicas"] == summaries[1]["replicas"]


def test_the_current_folder_may_take_the_results_if_it_is_empty(tmp_path: Path) -> None:
    done = windtunnel("simulate", *SMALL, "--output-dir", ".", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "summary.json").exists()


def test_what_a_setting_does_not_do_is_said(tmp_path: Path) -> None:
    flags = [
        "--scheduler",
        "orca",
        "--max-num-batched-tokens",
        "512",
        "--max-num-seqs",
        "8",
        "--max-model-len",
        "65536",
    ]
    done = windtunnel("simulate", *SMALL, *flags, "--json", "--output-dir", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (replica,) = json.loads(done.stdout)["replicas"]
    assert replica["max_num_batched_tokens"] is None
    for note in replica["notes"]:
        assert f"note: {note}" in done.stderr
    assert "no token budget" in done.stderr
    assert "--max-model-len 65536 is past the 32768 positions" in done.stderr


BAD = {
    "unknown model": (["--model", "mistralai/Mistral-7B-v0.l"], "Mistral-7B-v0.1"),
    "unknown device": (["--device", "a1000"], "a100"),
    "unknown scheduler": (["--scheduler", "sarati"], "sarathi"),
    "unknown router": (["--router", "robin"], "round_robin"),
    "unknown predictor": (["--predictor", "rooflines"], "roofline"),
    "unknown workload": (["--workload", "azure_con"], "unknown --workload 'azure_con': did you mean 'azure_conv'"),
    "unknown host overhead": (["--host-overhead", "none"], "known are auto"),
    "TP that does not divide": (["--tensor-parallel-size", "3"], "--tensor-parallel-size=3"),
    "TP of zero": (["--tensor-parallel-size", "0"], "--tensor-parallel-size=0"),
    "no replicas": (["--num-replicas", "0"], "--num-replicas 0"),
    "model too large": (["--model", "tiiuae/falcon-180B"], "--tensor-parallel-size"),
    "negative rate": (["--request-rate", "-1"], "-1"),
    "zero rate": (["--request-rate", "0"], "0"),
    "no number": (["--request-rate", "fast"], "--request-rate 'fast': give a number"),
    "no whole number": (["--num-replicas", "2.5"], "--num-replicas '2.5': give a whole number"),
    "neither true nor false": (["--async-scheduling", "maybe"], "--async-scheduling 'maybe': give true or false"),
    "no device's name": (["--device", "cuda"], "name the GPU"),
    "no requests": (["--num-prompts", "0"], "0"),
    "unknown SLO": (["--slo", "p99_tbtt<=1"], "tbtt"),
    "SLO without a bound": (["--slo", "p99_tbt"], "p99_tbt"),
    "missing trace": (["--trace", "nowhere.csv"], "nowhere.csv"),
    "empty trace": (["--trace", "empty.csv"], "empty.csv"),
    "truncated trace": (["--trace", "truncated.csv"], "line 3"),
    "no numbers in the trace": (["--trace", "words.csv"], "words.csv"),
    "longer than the KV cache": (["--num-gpu-blocks-override", "10"], "KV cache"),
    "prompt over vllm's budget": (
        ["--scheduler", "vllm_v0", "--max-num-batched-tokens", "512"],
        "--max-num-batched-tokens 512",
    ),
    "budget below the sequences": (["--max-num-batched-tokens", "64"], "--max-num-seqs 128"),
    "folder in use": (["--output-dir", "used"], "used"),
    "folder is a file": (["--output-dir", "empty.csv"], "empty.csv"),
    "unknown key": (["--config", "bad.yaml"], "request_rate"),
    "no such config": (["--config", "nowhere.yaml"], "nowhere.yaml"),
    "unknown flag": (["--request-rates", "1"], "simulate --help)"),
    "missing plugin": (["--plugin", "nowhere.py"], "nowhere.py"),
    "utilization over 1": (["--gpu-memory-utilization", "1.5"], "1.5"),
    "empty group": (["--config", "group.yaml"], "replicas[0] count 0"),
    "flag and group": (["--config", "both.yaml"], "--device a100 and replicas[0]"),
    "ignored chunk schedule": (["--chunk-schedule-low", "128"], "--chunk-schedule-low 128"),
    "negative seed": (["--seed", "-1"], "-1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_error_and_exit_code_2(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "words.csv").write_text("num_prefill_tokens,num_decode_tokens\nmany,few\n")
    (tmp_path / "truncated.csv").write_text("num_prefill_tokens,num_decode_tokens\n10,10\n12")
    (tmp_path / "bad.yaml").write_text("request_rat: 3\n")
    (tmp_path / "group.yaml").write_text("replicas: [{count: 0}]\n")
    (tmp_path / "both.yaml").write_text("replicas: [{device: h100}]\n")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "precious.txt").write_text("keep me")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    arguments, told = BAD[case]
    defaults = {"--model": "Mistral-7B-v0.1", "--device": "a100", "--max-model-len": "8192", "--request-rate": "2"}
    defaults |= {"--num-prompts": "40"} if "--trace" not in arguments else {}
    for flag in arguments[::2]:
        defaults.pop(flag, None)
    code, message = run(["simulate", *[word for pair in defaults.items() for word in pair], *arguments])
    assert code == 2, message
    assert told in message and len(message.splitlines()) == 1
    assert capsys.readouterr() == ("", "")
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert (tmp_path / "used" / "precious.txt").read_text() == "keep me"


def test_bad_input_is_one_line_of_the_process(tmp_path: Path) -> None:
    done = windtunnel("simulate", *SMALL, "--device", "a1000", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown device 'a1000': did you mean") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_leaves_no_folder(number: int, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", "simulate", *LONG, "--output-dir", "deep/out"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("deep/.out.partial-*/iterations.parquet")) and time.monotonic() < deadline:
        time.sleep(0.05)  # until it is in the middle of the run
    assert list(tmp_path.glob("deep/.out.partial-*/iterations.parquet")), "it never got to the middle of the run"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import pyarrow.parquet as pq, cli.__main__\n"
        "class Full(pq.ParquetWriter):\n"
        "    def __init__(self, path, schema, **options):\n"
        "        super().__init__(open('/dev/full', 'wb', buffering=0), schema, **options)\n"
        "pq.ParquetWriter = Full\n"
        f"cli.__main__.main({['simulate', *SMALL, '--output-dir', 'out']!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_setting(tmp_path: Path) -> None:
    from windtunnel.settings import RunConfig

    done = subprocess.run(
        [sys.executable, "-m", "cli", "simulate", "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    for name in RunConfig.model_fields:
        assert f"--{name.replace('_', '-')}" in done.stdout


def test_long_work_says_how_far_it_is_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for every, said in ((0.0, ["serving 3/10 requests", "serving 4/10 requests"]), (3600.0, [])):
        monkeypatch.setattr("cli.output.LINE_S", every)
        with progress_bar("requests") as progress:
            task = progress.add_task("serving", total=10)
            progress.update(task, completed=3)
            progress.advance(task)
        assert capsys.readouterr().err.splitlines() == said


def test_a_range_in_a_file_is_a_range(tmp_path: Path) -> None:
    """YAML's numbers to the base 60 would make 65 of 1:5."""
    path = tmp_path / "run.yaml"
    path.write_text("turns: 1:5\ninput-len: 1:50\nrequest_rate: 2.5\nnum_prompts: 7\n")
    assert read_file(path) == {"turns": "1:5", "input_len": "1:50", "request_rate": 2.5, "num_prompts": 7}


def test_the_printed_summary_has_memory_preemptions_and_the_steady_window(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        "simulate",
        "--model",
        "Mistral-7B-v0.1",
        "--device",
        "a100",
        "--max-model-len",
        "2048",
        "--engine",
        "vllm@0.15",
    ]
    flags += [
        "--random-input-len",
        "400",
        "--random-output-len",
        "200",
        "--num-prompts",
        "60",
        "--max-concurrency",
        "20",
    ]
    assert run([*flags, "--num-gpu-blocks-override", "300", "--output-dir", str(tmp_path / "tight")]) == (0, "")
    shown = " ".join(capsys.readouterr().out.split())
    summary = json.loads((tmp_path / "tight" / "summary.json").read_text("utf-8"))
    assert summary["preemptions"] > 0
    assert f"full; {summary['preemptions']:,} preemptions, which threw" in shown
    assert "KV cache at most 100% full" in shown or "KV cache at most 99" in shown
    assert "TTFT P50" in shown and "% busy" in shown
    assert run([*flags, "--output-dir", str(tmp_path / "roomy")]) == (0, "")
    assert "preemptions" not in capsys.readouterr().out
