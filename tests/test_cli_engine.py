"""`windtunnel generate` and `bench` as a user meets them: output, exit code, the folder that a run leaves."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import typer
import yaml
from command_line import windtunnel as in_this_process
from rich.progress import TaskID
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from cli.generate import _Stream
from cli.main import app, run
from cli.output import ProgressBar
from engine.replica_spec import resolve
from engine.runtime.engine_spec import EngineSpec
from engine.runtime.sequences import Sequence
from engine.scheduling.policies import POLICIES, largest_batch
from engine.scheduling.request import Request
from engine.server.text import load_tokenizer
from studies.pages.page import LIBRARY
from windtunnel.settings import EngineSettings

PROMPTS = ([5, 17, 90, 3, 44], [8], list(range(3, 60)))
LOAD = ["--workload", "uniform", "--input-len", "5:60", "--output-len", "2:9"]
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "cli", *arguments]


def windtunnel(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=cwd, capture_output=True, text=True, timeout=120, env=ENVIRONMENT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    checkpoints.write(folder, "llama")
    return folder


@pytest.fixture(scope="module")
def speaking(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with a tokenizer whose tokens are letters (and, past them, words of their own)."""
    speaking = shutil.copytree(folder, tmp_path_factory.mktemp("speaking") / "llama")
    words = ["<unk>", "<s>", "</s>", *"ĠabcdefghijklmnopqrstuvwxyzéÃ©"]
    words += [f"word{i}" for i in range(len(words), checkpoints.VOCABULARY)]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(words[:3])
    tokenizer.save(str(speaking / "tokenizer.json"))
    return Path(speaking)


@pytest.fixture(scope="module")
def continuations(folder: Path) -> list[list[int]]:
    """24 tokens after each of PROMPTS, by transformers."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    outputs = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        done = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        outputs.append(done[0, len(prompt) :].tolist())
    return outputs


def flags(prompts: tuple[list[int], ...]) -> list[str]:
    return [word for prompt in prompts for word in ("--prompt-token-ids", ",".join(map(str, prompt)))]


def generate(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    """What `generate --json` prints, run in this process."""
    assert run(["generate", "--device", "cpu", "--json", *arguments]) == (0, "")
    answers: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return answers


# -- generate ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [[], ["--tensor-parallel-size", "2"]], ids=["one rank", "two ranks"])
def test_several_prompts_go_on_as_in_transformers(
    folder: Path, continuations: list[list[int]], ranks: list[str], tmp_path: Path
) -> None:
    settings = ["--model", str(folder), "--device", "cpu", "--max-tokens", "24", "--ignore-eos", "--json", *ranks]
    one_or_more = windtunnel if ranks else in_this_process  # what ranks print does not come through this process
    done = one_or_more("generate", *settings, *flags(PROMPTS), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    answers = json.loads(done.stdout)
    assert [answer["prompt_token_ids"] for answer in answers] == list(PROMPTS)
    assert [answer["token_ids"] for answer in answers] == continuations
    assert {answer["finish_reason"] for answer in answers} == {"length"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("ranks", "temperature"), [("1", "1"), ("2", "0")])
def test_weights_that_are_no_numbers_are_told(folder: Path, ranks: str, temperature: str, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "damaged")
    tensors = load_file(tmp_path / "damaged" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, tmp_path / "damaged" / "model.safetensors")
    done = (in_this_process if ranks == "1" else windtunnel)(
        "generate", "--model", "damaged", "--device", "cpu", "--tensor-parallel-size", ranks, "--max-tokens", "4",
        "--temperature", temperature, *flags(PROMPTS), cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the model's logits are NaN") and "--dtype" in line


def test_the_end_token_ends_it_unless_ignored(
    folder: Path, continuations: list[list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    whole = continuations[0]
    end = next(token for i, token in enumerate(whole) if i >= 3 and token not in whole[:i])
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [99999, end]}))
    settings = ["--model", str(tmp_path / "model"), "--max-tokens", "24", *flags(PROMPTS[:1])]
    (stopped,) = generate(capsys, *settings)
    assert (stopped["token_ids"], stopped["finish_reason"]) == (whole[: whole.index(end) + 1], "stop")
    (ahead,) = generate(capsys, *settings, "--async-scheduling", "true")
    assert ahead == stopped
    (ignored,) = generate(capsys, *settings, "--ignore-eos")
    assert (ignored["token_ids"], ignored["finish_reason"]) == (whole, "length")
    (tmp_path / "model" / "generation_config.json").unlink()
    checkpoints.edit_config(tmp_path / "model", eos_token_id=end)  # then the config is asked
    assert generate(capsys, *settings)[0] == stopped


def test_text_comes_out_as_it_grows(speaking: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--model", str(speaking), "--max-tokens", "12"]
    (answer,) = generate(capsys, *settings, "--prompt", "hello you")
    tokenizer = Tokenizer.from_file(str(speaking / "tokenizer.json"))
    assert answer["prompt_token_ids"] == tokenizer.encode("hello you").ids
    assert answer["text"] == tokenizer.decode(answer["token_ids"])
    done = in_this_process("generate", *settings, "--device", "cpu", "--prompt", "hello you", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, answer["text"] + "\n", "")
    assert run(["generate", "--device", "cpu", *settings, "--prompt", "hello you", "--prompt", "and you"])[0] == 0
    assert capsys.readouterr().out.splitlines()[0] == answer["text"]


def test_half_a_character_is_not_printed(speaking: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codec = load_tokenizer(speaking)
    assert codec is not None
    tokenizer = codec.tokenizer
    tokens = tokenizer.encode("né")
    assert len(tokens) == 3  # the accented letter is two bytes, a token each
    sequence, stream = Sequence(Request(0, 0.0, 1, 4), [1]), _Stream(tokenizer)
    shown = []
    for token in [*tokens, 2, tokens[1]]:  # with an end token, and half a letter at the end
        sequence.tokens.append(token)
        stream(sequence, token)
        shown.append(capsys.readouterr().out)
    assert shown == ["n", "", "é", "", ""]
    stream.end(tokenizer.decode(sequence.output, skip_special_tokens=True))
    assert capsys.readouterr().out == "\N{REPLACEMENT CHARACTER}\n"


def test_a_seed_repeats_the_draws(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [
        "--model",
        str(folder),
        "--max-tokens",
        "16",
        "--temperature",
        "0.9",
        "--top-k",
        "50",
        "--top-p",
        "0.95",
    ]
    first = generate(capsys, *settings, *flags(PROMPTS), "--seed", "3")
    assert generate(capsys, *settings, *flags(PROMPTS), "--seed", "3") == first
    assert generate(capsys, *settings, *flags(PROMPTS), "--seed", "4") != first


def test_no_more_tokens_than_the_model_may_have(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--model", str(folder), "--max-model-len", "20", "--ignore-eos", "--max-tokens", "500"]
    (answer,) = generate(capsys, *settings, *flags(PROMPTS[:1]))
    assert (len(answer["token_ids"]), answer["finish_reason"]) == (15, "length")


def test_every_scheduler_and_type_says_the_same(
    folder: Path, continuations: list[list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--model", str(folder), "--max-tokens", "24", "--ignore-eos", *flags(PROMPTS)]
    for scheduler in sorted(POLICIES):
        answers = generate(capsys, *settings, "--scheduler", scheduler, "--block-size", "4")
        assert [answer["token_ids"] for answer in answers] == continuations, scheduler
    (answer,) = generate(capsys, "--model", str(folder), "--dtype", "bfloat16", *flags(PROMPTS[:1]))
    assert answer["token_ids"][0] == continuations[0][0]


# -- what may be wrong ---------------------------------------------------------------------------------------------

BAD_GENERATE = {  # arguments, and what the error must tell
    "no prompt": ([], "--prompt TEXT"),
    "no model": (["--model", "", "--prompt-token-ids", "1"], "--model"),
    "unknown model": (["--model", "nowhere", "--prompt-token-ids", "1"], "'nowhere'"),
    "empty folder": (["--model", "empty", "--prompt-token-ids", "1"], "empty/config.json"),
    "no weights": (["--model", "no_weights", "--prompt-token-ids", "1"], "safetensors"),
    "weights of another model": (["--model", "other", "--prompt-token-ids", "1"], "config.json"),
    "cut weights": (["--model", "cut", "--prompt-token-ids", "1"], "model.safetensors"),
    "a name without weights": (["--model", "Llama-2-7b-hf", "--prompt-token-ids", "1"], "--load-format dummy"),
    "the weights, not their folder": (["--model", "llama/model.safetensors", "--prompt-token-ids", "1"], "config.json"),
    "no tokenizer": (["--model", "no_weights", "--prompt", "hello"], "--prompt-token-ids"),
    "broken tokenizer": (["--model", "broken_tokenizer", "--prompt", "hello"], "tokenizer in broken_tokenizer"),
    "broken generation config": (["--model", "broken_generation", *flags(([1],))], "generation_config.json"),
    "empty text": (["--prompt", ""], "prompt 1 has no tokens"),
    "no ids": (["--prompt-token-ids", ""], "1,2,3"),
    "ids that are no numbers": (["--prompt-token-ids", "1,x"], "'1,x'"),
    "ids outside the vocabulary": (["--prompt-token-ids", "1,101"], "token id 101"),
    "negative ids": (["--prompt-token-ids=-1"], "token id -1"),
    "prompt too long": (["--prompt-token-ids", "1,2,3", "--max-model-len", "3"], "--max-model-len 3"),
    "prompt over the budget": (
        ["--prompt-token-ids", ",".join("1" * 200), "--scheduler", "vllm_v0", "--max-num-batched-tokens", "128"],
        "--max-num-batched-tokens 128",
    ),
    "no new tokens": (["--prompt-token-ids", "1", "--max-tokens", "0"], "--max-tokens 0"),
    "tokens in words": (["--prompt-token-ids", "1", "--max-tokens", "many"], "'many'"),
    "KV cache too small": (["--prompt-token-ids", "1", "--num-gpu-blocks-override", "2"], "--num-gpu-blocks-override"),
    "no KV cache": (["--prompt-token-ids", "1", "--num-gpu-blocks-override", "0"], "--num-gpu-blocks-override 0"),
    "KV cache past all memory": (
        ["--prompt-token-ids", "1", "--num-gpu-blocks-override", "9999999", "--block-size", "65536"],
        "--num-gpu-blocks-override 9999999",
    ),
    "unknown dtype": (["--prompt-token-ids", "1", "--dtype", "int4"], "'int4'"),
    "unknown device": (["--prompt-token-ids", "1", "--device", "tpu"], "'tpu'"),
    "unknown executor": (["--prompt-token-ids", "1", "--executor", "threads"], "in_process"),
    "unknown backend": (["--prompt-token-ids", "1", "--attention-backend", "flash"], "flash_attn"),
    "a backend that can't serve": (["--prompt-token-ids", "1", "--attention-backend", "torch_varlen"], "float32"),
    "unknown load format": (["--prompt-token-ids", "1", "--load-format", "gguf"], "'gguf'"),
    "unknown scheduler": (["--prompt-token-ids", "1", "--scheduler", "fcfs"], "'fcfs'"),
    "ranks in one process": (
        ["--prompt-token-ids", "1", "--executor", "in_process", "--tensor-parallel-size", "2"],
        "multiprocess",
    ),
    "heads that don't divide": (["--prompt-token-ids", "1", "--tensor-parallel-size", "3"], "--tensor-parallel-size"),
    "more stages than layers": (["--prompt-token-ids", "1", "--pipeline-parallel-size", "4"], "3 layers"),
    "ahead of pipeline stages": (
        ["--prompt-token-ids", "1", "--async-scheduling", "true", "--pipeline-parallel-size", "2"],
        "--async-scheduling true",
    ),
    "graphs of no size": (["--prompt-token-ids", "1", "--cudagraph-capture-sizes", "0"], "'0'"),
    "negative temperature": (["--prompt-token-ids", "1", "--temperature", "-1"], "temperature -1"),
    "no probability": (["--prompt-token-ids", "1", "--top-p", "0"], "--top-p 0"),
    "negative top k": (["--prompt-token-ids", "1", "--top-k", "-1"], "--top-k -1"),
    "negative seed": (["--prompt-token-ids", "1", "--seed", "-1"], "seed -1"),
    "no such port": (["--prompt-token-ids", "1", "--distributed-port", "70000"], "--distributed-port 70000"),
    "port in use": (["--prompt-token-ids", "1", "--distributed-port", "PORT", "--tensor-parallel-size", "2"], "PORT"),
    "utilization over 1": (["--prompt-token-ids", "1", "--gpu-memory-utilization", "1.5"], "1.5"),
    "unknown flag": (["--prompt-tokens-ids", "1"], "--prompt-token-ids"),
}

BAD_BENCH = {
    "no model": (["--model", ""], "--model"),
    "no device": (["--device", ""], "--device"),
    "no rate": (["--request-rate", ""], "--request-rate"),
    "replicas": (["--num-replicas", "2"], "--num-replicas 1"),
    "two kinds": (["--config", "kinds.yaml"], "one replica"),
    "unknown key": (["--config", "typo.yaml"], "enforce_eager"),
    "unknown predictor": (["--predictor", "learnt"], "learned"),
    "unknown router": (["--router", "fastest"], "round_robin"),
    "unknown overhead": (["--host-overhead", "none"], "cuda_graphs"),
    "unknown network": (["--network", "wifi"], "wifi"),
    "folder in use": (["--output-dir", "used"], "used"),
    "KV cache too small": (["--num-gpu-blocks-override", "1"], "KV cache"),
    "no KV cache": (["--num-gpu-blocks-override", "0"], "--num-gpu-blocks-override 0"),
    "too long for everything": (["--max-model-len", "5"], "--max-model-len"),
    "no weights": (["--model", "no_weights"], "safetensors"),
    "SLO without a bound": (["--slo", "p99_tbt"], "p99_tbt"),
    "missing plugin": (["--plugin", "nowhere.py"], "nowhere.py"),
    "negative seed": (["--seed", "-1"], "seed -1"),
    "executor": (["--executor", "threads"], "in_process"),
    "ranks in one process": (["--executor", "in_process", "--pipeline-parallel-size", "2"], "multiprocess"),
}


@pytest.fixture(scope="module")
def broken(speaking: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with models that have something wrong, and the sound one."""
    place = tmp_path_factory.mktemp("broken")
    for name in ("llama", "no_weights", "other", "cut", "broken_tokenizer", "broken_generation"):
        shutil.copytree(speaking, place / name)
    (place / "empty").mkdir()
    (place / "no_weights" / "model.safetensors").unlink()
    (place / "no_weights" / "tokenizer.json").unlink()
    checkpoints.edit_config(place / "other", intermediate_size=128)
    (place / "cut" / "model.safetensors").write_bytes((speaking / "model.safetensors").read_bytes()[:5000])
    (place / "broken_tokenizer" / "tokenizer.json").write_text("{")
    (place / "broken_generation" / "generation_config.json").write_text("[")
    (place / "used").mkdir()
    (place / "used" / "precious.txt").write_text("keep me")
    (place / "kinds.yaml").write_text("replicas: [{count: 1}, {scheduler: vllm}]\n")
    (place / "typo.yaml").write_text("enforce_eagerly: true\n")
    return place


def told(arguments: list[str], place: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the command line has to say; nothing may be printed or written."""
    before = sorted(place.rglob("*"))
    code, message = run(arguments)
    assert code == 2, message
    assert len(message.splitlines()) == 1
    assert capsys.readouterr().out == ""
    assert sorted(place.rglob("*")) == before
    return message


def with_defaults(arguments: list[str], defaults: dict[str, str]) -> list[str]:
    left = {flag: value for flag, value in defaults.items() if flag not in arguments[::2]}
    return [*(word for pair in left.items() for word in pair), *arguments]


@pytest.mark.parametrize("case", BAD_GENERATE)
def test_generate_tells_what_is_wrong(
    case: str, broken: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(broken)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        arguments, expected = BAD_GENERATE[case]
        arguments = [word.replace("PORT", port) for word in arguments]
        arguments = ["generate", *with_defaults(arguments, {"--model": "llama", "--device": "cpu"})]
        assert expected.replace("PORT", port) in told(arguments, broken, capsys)


@pytest.mark.parametrize("case", BAD_BENCH)
def test_bench_tells_what_is_wrong(
    case: str, broken: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(broken)
    arguments, expected = BAD_BENCH[case]
    defaults = {"--model": "llama", "--device": "cpu", "--request-rate": "50", "--num-prompts": "3"}
    arguments = ["bench", *LOAD, *with_defaults(arguments, {**defaults, "--output-dir": "out"})]
    assert expected in told(arguments, broken, capsys)
    assert (broken / "used" / "precious.txt").read_text() == "keep me"


@pytest.mark.parametrize("package", ["torch", "ray", "transformers"])
def test_a_missing_package_is_named(
    package: str, broken: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(broken)
    monkeypatch.setitem(sys.modules, package, None)
    extra = "cluster" if package == "ray" else "engine"
    what = ["llama", "--prompt", "hello"] if package == "transformers" else ["no_weights", *flags(([1],))]
    message = told(["generate", "--device", "cpu", "--executor", "ray", "--model", *what], broken, capsys)
    assert package in message and f"'.[{extra}]'" in message


def test_a_process_without_a_gpu_says_so(folder: Path, tmp_path: Path) -> None:
    settings = ["--model", str(folder), "--device", "h100", *LOAD, "--request-rate", "9", "--num-prompts", "3"]
    none_here = in_this_process if not torch.cuda.is_available() else windtunnel  # which hides what there is
    done = none_here("bench", *settings, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no GPU" in done.stderr and len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


# -- bench -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benched(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on two ranks, and beside it `simulated`, of the same settings."""
    place = tmp_path_factory.mktemp("runs")
    settings = ["--model", str(folder), "--device", "cpu", *LOAD, "--request-rate", "40", "--num-prompts", "30"]
    settings += ["--slo", "p99_tbt<=10", "--num-gpu-blocks-override", "50", "--pipeline-parallel-size", "2"]
    done = in_this_process("bench", *settings, "--chrome-trace", "--json", "--output-dir", "benched", cwd=place)
    assert done.returncode == 0, done.stderr
    (place / "stdout").write_text(done.stdout)
    (place / "stderr").write_text(done.stderr)
    done = in_this_process("simulate", "--config", "benched/config.yaml", "--output-dir", "simulated", cwd=place)
    assert (done.returncode, done.stderr) == (0, "")
    return place / "benched"


def read(path: Path) -> dict[str, Any]:
    table = pq.read_table(path)
    return {name: table[name].to_numpy() for name in table.column_names}


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def test_a_run_leaves_its_folder_and_says_what_was_measured(benched: Path) -> None:
    tables = {"requests.parquet", "iterations.parquet", "ranks.parquet"}
    names = {path.name for path in benched.iterdir()}
    assert names == {"config.yaml", "summary.json", "report.html", LIBRARY, "trace.json", *tables}
    (line,) = (benched.parent / "stdout").read_text().splitlines()
    assert json.loads(line) == summary_of(benched) | {"output_dir": "benched"}
    told = (benched.parent / "stderr").read_text()
    assert "times: measured on" in told and "float32, sdpa attention" in told
    assert "30 requests" in told and "p99_tbt<=10s is met" in told
    assert "easured on" in (benched / "report.html").read_text()


def test_the_summary_is_the_simulators_but_for_who_made_it(benched: Path) -> None:
    measured, simulated = summary_of(benched), summary_of(benched.parent / "simulated")
    assert set(measured) - {"engine"} == set(simulated) - {"simulator"}
    assert set(measured["replicas"][0]) == set(simulated["replicas"][0])
    same = ("completed", "total_input_tokens", "total_output_tokens", "workload", "dropped")
    assert {key: measured[key] for key in same} == {key: simulated[key] for key in same}
    limits = ("kv_cache_tokens", "num_gpu_blocks", "max_num_batched_tokens", "max_model_len", "parallel", "scheduler")
    assert {k: measured["replicas"][0][k] for k in limits} == {k: simulated["replicas"][0][k] for k in limits}
    assert measured["replicas"][0]["kv_cache_tokens"] == 800
    assert measured["engine"].items() >= {"num_gpu_blocks": 50, "dtype": "float32", "attention_backend": "sdpa"}.items()


def test_the_tables_hold_what_was_measured(benched: Path) -> None:
    requests, simulated = read(benched / "requests.parquet"), read(benched.parent / "simulated" / "requests.parquet")
    assert set(requests) == set(simulated)
    for name in ("prompt_tokens", "output_tokens", "arrived_s"):  # the same load
        by_id = [column[name][np.argsort(column["request_id"])] for column in (requests, simulated)]
        np.testing.assert_array_equal(*by_id)
    iterations, ranks = read(benched / "iterations.parquet"), read(benched / "ranks.parquet")
    batches = summary_of(benched)["engine"]["batches"]
    assert len(iterations["stage"]) == len(ranks["rank"]) == 2 * batches
    assert not iterations["predicted"].any()
    assert sorted(set(ranks["rank"])) == sorted(set(iterations["stage"])) == [0, 1]
    for stage in (0, 1):  # of one rank each
        rows, row = iterations["stage"] == stage, ranks["rank"] == stage
        np.testing.assert_array_equal(ranks["batch"][row], np.arange(batches))
        assert (ranks["duration_s"][row] > 0).all() and (iterations["duration_s"][rows] > 0).all()
        ends = [table["start_s"] + table["duration_s"] for table in (ranks, iterations)]
        assert (ends[0][row] <= ends[1][rows] + 1e-9).all()
    assert requests["last_token_s"].max() == pytest.approx(max(iterations["start_s"] + iterations["duration_s"]))


def test_the_config_of_a_run_runs_it_again(
    benched: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(benched.parent)
    assert run(["bench", "--config", "benched/config.yaml", "--output-dir", "again"]) == (0, "")
    assert capsys.readouterr().out.splitlines()[-1] == "report: again/report.html"
    config, again = (yaml.safe_load(Path(name, "config.yaml").read_text()) for name in ("benched", "again"))
    assert again == config
    assert (config["num_gpu_blocks_override"], config["async_scheduling"]) == (50, False)
    assert summary_of(Path("again"))["total_output_tokens"] == summary_of(benched)["total_output_tokens"]


def test_a_plugins_policy_and_dummy_weights_serve(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from engine.scheduling.policies import POLICIES, VLLM\nclass Mine(VLLM):\n    pass\nPOLICIES['mine'] = Mine\n"
    )
    shutil.copy(folder / "config.json", tmp_path)
    settings = ["--model", "config.json", "--load-format", "dummy", "--device", "cpu", "--async-scheduling", "true"]
    settings += ["--plugin", "mine.py", "--scheduler", "mine", "--cudagraph-capture-sizes", "4"]
    try:
        done = run(["bench", *settings, *LOAD, "--arrival", "burst", "--num-prompts", "10", "--output-dir", "out"])
    finally:
        POLICIES.pop("mine", None)
    assert done == (0, "")
    summary = summary_of(tmp_path / "out")
    assert summary["replicas"][0]["scheduler"] == "mine"
    assert summary["engine"].items() >= {"load_format": "dummy", "async_scheduling": True}.items()
    assert "1 x" in capsys.readouterr().out


def test_bench_has_the_flags_of_simulate_and_the_engines() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    options = {
        name: {option for parameter in commands[name].params for option in parameter.opts}
        for name in ("bench", "simulate")
    }
    engine = {f"--{name.replace('_', '-')}" for name in EngineSettings.model_fields}
    assert engine and not engine & options["simulate"]
    of_a_server = {"--url", "--endpoint", "--timeout", "--save-result", "--api-key", "--ignore-eos"}
    assert options["bench"] == options["simulate"] - {"--operator-times"} | engine | of_a_server


# -- when it breaks ----------------------------------------------------------------------------------------------------


def descendants(pid: int) -> list[int]:
    """The process's children, each followed by its own."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    children = [child for child, parent in parents.items() if parent == pid]
    return [each for child in children for each in (child, *descendants(child))]


def gone(pid: int) -> bool:
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


def wait_until(true: Any, what: str) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def start_serving(folder: Path, place: Path) -> subprocess.Popen[str]:
    """A run on two ranks that is in the middle of serving into `out`."""
    settings = ["--model", str(folder), "--device", "cpu", *LOAD, "--request-rate", "50", "--num-prompts", "100000"]
    process = subprocess.Popen(
        command("bench", *settings, "--tensor-parallel-size", "2", "--output-dir", "out"),
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    wait_until(lambda: list(place.glob(".out.partial-*/config.yaml")) or process.poll() is not None, "no start")
    time.sleep(1.5)  # past the warm-up
    assert process.poll() is None, process.communicate()[1]
    return process


def test_ctrl_c_keeps_what_was_finished_and_leaves_no_process(folder: Path, tmp_path: Path) -> None:
    process = start_serving(folder, tmp_path)
    others = descendants(process.pid)
    assert len(others) >= 3  # two ranks and who started them
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, "")
    (kept,) = tmp_path.iterdir()
    assert errors == f"error: interrupted: what was finished is in {kept}\n" and kept.name == "out.incomplete"
    assert len(read(kept / "requests.parquet")["request_id"]) > 0
    wait_until(lambda: all(gone(pid) for pid in others), "a process is left")


def test_an_interrupted_run_keeps_its_finished_requests(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update, finished = ProgressBar.update, 5

    def interrupted(self: ProgressBar, task_id: TaskID, **changes: Any) -> None:
        update(self, task_id, **changes)
        if changes.get("completed", 0) >= finished:
            raise KeyboardInterrupt

    monkeypatch.setattr(ProgressBar, "update", interrupted)
    settings = ["--model", str(folder), "--device", "cpu", *LOAD, "--request-rate", "200", "--num-prompts", "40"]
    kept = tmp_path / "out.incomplete"
    done = run(["bench", *settings, "--output-dir", str(tmp_path / "out")])
    assert done == (130, f"interrupted: what was finished is in {kept}")
    tables = {"requests.parquet", "iterations.parquet", "ranks.parquet"}
    assert {path.name for path in kept.iterdir()} == {"config.yaml", *tables}
    assert len(read(kept / "requests.parquet")["request_id"]) == 5
    finished = 0  # before the first request has finished there is nothing to keep
    with pytest.raises(KeyboardInterrupt):
        run(["bench", *settings, "--output-dir", str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == [kept]


def test_a_killed_rank_leaves_what_was_finished(folder: Path, tmp_path: Path) -> None:
    process = start_serving(folder, tmp_path)
    others = descendants(process.pid)
    ranks = [pid for child in others for pid in descendants(child)]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (1, "")
    assert "rank" in errors and "SIGKILL" in errors and "Traceback" not in errors
    (kept,) = tmp_path.iterdir()
    assert kept.name == "out.incomplete" and str(kept) in errors
    tables = {"requests.parquet", "iterations.parquet", "ranks.parquet"}
    assert {path.name for path in kept.iterdir()} == {"config.yaml", *tables}
    assert len(read(kept / "requests.parquet")["request_id"]) > 0
    wait_until(lambda: all(gone(pid) for pid in others), "a process is left")


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_the_workers_know_whether_a_batch_is_bounded(policy: str) -> None:
    replica = resolve("microsoft/phi-2", "a100", scheduler={"policy": policy})
    spec = EngineSpec.of(replica, folder=None)
    assert spec.bounded_batches == (policy not in ("orca", "request_level"))
    assert spec.max_batch_tokens == largest_batch(replica.scheduler)
