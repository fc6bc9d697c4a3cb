"""`windtunnel serve` as a process: started, asked by curl, told to end, and what it leaves."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import checkpoints
import httpx
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from cli.main import run

ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
SIMULATED = ("--simulate", "--model", "microsoft/phi-2", "--device", "a100", "--engine", "vllm@0.15")


@contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run the command on a free port; gives its URL and its process."""
    command = [sys.executable, "-m", "cli", "serve", *arguments, "--port", "0", "--output-dir", str(folder)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r" at (http://127\.0\.0\.1:\d+)/v1 ", line):
                break
        else:
            raise AssertionError("it ended before it served")
        yield found[1], process
    finally:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Return the exit code and what it printed on stderr since it serves."""
    _, said = process.communicate(timeout=120)
    return process.returncode, said


def curl(url: str, body: dict[str, object]) -> str:
    command = ["curl", "-sN", url, "-H", "content-type: application/json", "-d", json.dumps(body)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_a_simulated_server_answers_drains_and_leaves_a_run_that_simulates_the_same(tmp_path: Path) -> None:
    with serving(tmp_path / "run", *SIMULATED, "--num-replicas", "2") as (url, process):
        events = curl(
            f"{url}/v1/completions",
            {"prompt": "hello world!", "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}},
        ).strip().split("\n\n")  # fmt: skip
        assert events[-1] == "data: [DONE]"
        parts = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
        assert "".join(part["choices"][0]["text"] for part in parts[:-1]) == " the the the"
        assert parts[-1]["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
        with httpx.stream("POST", f"{url}/v1/completions", json={"prompt": [9] * 50, "max_tokens": 60, "stream": True},
                          timeout=60) as answer:  # fmt: skip
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert rest[-2:] == ["data: [DONE]", ""] and '"finish_reason":"length"' in rest[-4]
        code, said = ended(process)
    assert code == 0, said
    measured = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (measured["completed"], measured["total_output_tokens"], len(measured["replicas"])) == (2, 63, 2)
    assert any("4 bytes" in note for note in measured["workload_notes"])
    assert (tmp_path / "run" / "report.html").is_file()
    again = ["simulate", "--config", str(tmp_path / "run" / "config.yaml"), "--output-dir", str(tmp_path / "again")]
    assert run(again) == (0, "")
    simulated = json.loads((tmp_path / "again" / "summary.json").read_text())
    for key in ("mean_ttft_ms", "mean_tpot_ms", "p99_e2el_ms", "duration"):
        assert simulated[key] == pytest.approx(measured[key], rel=1e-9), key


def test_lengths_come_from_a_workload_and_nothing_served_is_no_run(tmp_path: Path) -> None:
    lengths = ("--workload", "fixed", "--input-len", "5", "--output-len", "4", "--time-scale", "20")
    named = ("--served-model-name", "mine", "--api-key", "k")
    with serving(tmp_path / "run", *SIMULATED, *lengths, *named) as (
        url,
        process,
    ):
        found = [
            httpx.post(f"{url}/v1/completions", headers={"authorization": "Bearer k"}, timeout=60,
                       json={"model": "mine", "prompt": "a", **more}).json()
            for more in ({"max_tokens": 9}, {"max_tokens": 9, "ignore_eos": True}, {"max_tokens": 2}, {})
        ]  # fmt: skip
        process.send_signal(signal.SIGINT)
        assert ended(process)[0] == 0
    told = [(each["usage"]["completion_tokens"], each["choices"][0]["finish_reason"]) for each in found]
    assert told == [(4, "stop"), (9, "length"), (2, "length"), (4, "stop")]
    with serving(tmp_path / "none", *SIMULATED) as (url, process):
        process.send_signal(signal.SIGTERM)
        code, said = ended(process)
    assert (code, "no request was finished" in said, (tmp_path / "none").exists()) == (0, True, False)


def test_our_own_engine_serves_and_leaves_its_run(tmp_path: Path) -> None:
    model = tmp_path / "model"
    checkpoints.write(model, "llama")
    vocabulary = {f"w{i}": i for i in range(checkpoints.VOCABULARY)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(model / "tokenizer.json"))
    settings = ("--model", str(model), "--device", "cpu", "--attention-backend", "sdpa", "--max-model-len", "64")
    with serving(tmp_path / "run", *settings) as (url, process):
        answer = httpx.post(f"{url}/v1/completions", timeout=60, json={
            "prompt": "w5 w7 w9", "max_tokens": 6, "temperature": 0, "ignore_eos": True}).json()  # fmt: skip
        assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}
        assert len(answer["choices"][0]["text"].split()) == 6
        process.send_signal(signal.SIGTERM)
        code, said = ended(process)
    assert code == 0, said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["engine"]["attention_backend"] == "sdpa" and summary["completed"] == 1
    assert pq.read_table(tmp_path / "run" / "iterations.parquet").num_rows == 6


def test_what_cannot_be_served_is_said(tmp_path: Path) -> None:
    folder = ["--output-dir", str(tmp_path / "run")]
    config = tmp_path / "model"
    config.mkdir()
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
             "num_attention_heads": 4, "max_position_embeddings": 64}  # fmt: skip
    (config / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    for arguments, word in (
        (["--model", "microsoft/phi-2", "--device", "cpu", "--time-scale", "2"], "2.0 needs --simulate"),
        (["--model", str(config), "--device", "cpu", "--load-format", "dummy"], "no tokenizer"),
        ([*SIMULATED, "--time-scale", "0"], "--time-scale 0"),
        ([*SIMULATED, "--max-queue", "0"], "--max-queue 0"),
        ([*SIMULATED, "--host", "no.such.host.invalid"], "can't listen at no.such.host.invalid:8000"),
        ([*SIMULATED, "--tokenizer", str(config)], "has no tokenizer.json"),
    ):
        code, error = run(["serve", *arguments, *folder])
        assert code == 2 and word in error, error
        assert not (tmp_path / "run").exists()
