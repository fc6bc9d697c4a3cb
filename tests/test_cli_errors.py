"""What the command line says when something is wrong: one line, and the exit code."""

import json
from pathlib import Path

import pytest
import typer

from cli.__main__ import main
from cli.main import app, run
from engine.scheduling.policies import POLICIES
from windtunnel.names import SYNONYMS

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


# -- flags -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["simulate", "--tp", "4"], "unknown flag --tp: did you mean --tensor-parallel-size?"),
        (["simulate", "--tp=4"], "unknown flag --tp: did you mean --tensor-parallel-size?"),
        (["simulate", "--gpu", "a100"], "unknown flag --gpu: did you mean --device?"),
        (["profile", "--tp", "4"], "unknown flag --tp: did you mean --tensor-parallel-sizes?"),
        (["profile", "--model", "x"], "unknown flag --model: did you mean --models?"),
        (["simulate", "--max-model-length", "1"], "unknown flag --max-model-length: did you mean --max-model-len?"),
        (["search", "--qps", "1"], "unknown flag --qps: did you mean --request-rate?"),
        (["report", "--out", "x.html"], "unknown flag --out: did you mean --output?"),
        (["study", "run", "--gpu", "a100"], "unknown flag --gpu"),
        (["--install-completion"], "unknown flag --install-completion"),
    ],
)
def test_an_unknown_flag_names_the_likely_one(arguments: list[str], message: str) -> None:
    code, found = run(arguments)
    assert code == 2 and found.startswith(f"{message} (see ") and found.endswith("--help)")


def test_synonyms_are_settings_that_there_are() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    known = {name.lstrip("-").replace("-", "_") for each in commands.values() for p in each.params for name in p.opts}
    assert {setting for settings in SYNONYMS.values() for setting in settings} <= known


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "--model", "x"], "interrupted: rerun the same command to resume"),
        (["profile"], "interrupted: rerun the same command to resume"),
        (["plan", "--devices", "x"], "interrupted: rerun the same command to resume"),
        (["study", "run", "capacity"], "interrupted: rerun the same command to resume"),
        (["simulate"], "interrupted: no results were written"),
        (["study", "list"], "interrupted: no results were written"),
    ],
)
def test_an_interrupted_command_says_whether_it_resumes(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(arguments: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cli.main.run", interrupt)
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert (ended.value.code, capsys.readouterr().err) == (130, f"error: {message}\n")


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_report_of_a_file_names_the_folder_to_give(tmp_path: Path) -> None:
    assert run([*SIMULATE, "--output-dir", str(tmp_path / "out")]) == (0, "")
    code, message = run(["report", str(tmp_path / "out" / "report.html")])
    assert (code, message) == (2, f"{tmp_path}/out/report.html is a file: give the folder of the run, {tmp_path}/out")
    (tmp_path / "other.html").touch()
    code, message = run(["report", str(tmp_path / "other.html")])
    assert code == 2 and message.startswith(f"{tmp_path}/other.html is a file: give a folder that simulate, ")


VLLM = {"date": "20260101-120000", "backend": "vllm", "completed": 2, "total_output_tokens": 20, "mean_ttft_ms": 21.0,
        "request_throughput": 3.2, "input_lens": [5, 6], "ttfts": [0.02, 0.02], "itls": [[0.01], [0.01]]}  # fmt: skip


@pytest.mark.parametrize(
    "text", [json.dumps(VLLM), json.dumps(VLLM) + "\n" + json.dumps(VLLM), json.dumps(VLLM, indent=2)]
)
def test_a_benchmarks_results_are_no_trace(text: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    code, message = run([*SIMULATE, "--trace", str(path)])
    assert code == 2 and message.startswith(f"trace {path} holds the results of a benchmark (vLLM's JSON")
    assert len(message.splitlines()) == 1


def test_json_lines_are_a_trace(tmp_path: Path) -> None:
    rows = [{"timestamp": 1000 * i, "input_length": 10, "output_length": 5, "mean_ttft_ms": 1} for i in range(3)]
    (tmp_path / "trace.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = run(["simulate", *BASE[:4], "--trace", str(tmp_path / "trace.jsonl"), "--output-dir", str(tmp_path / "out")])
    assert done == (0, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scheduling-policy", "priority"], "--scheduling-policy priority is an option of the scheduler vllm"),
        (["--long-prefill-token-threshold", "64"], "--long-prefill-token-threshold 64 is an option of the scheduler"),
        (["--vllm-version", "0.15"], "--vllm-version 0.15 is an option of the scheduler vllm, which sarathi would"),
        (["--engine", "orca", "--no-scheduler-reserve-full-isl"], "--scheduler-reserve-full-isl False is an option of"),
        (
            ["--engine", "vllm@0.15", "--long-prefill-token-threshold-adaptive"],
            "--long-prefill-token-threshold-adaptive true: vLLM 0.15 has no such option",
        ),
        (["--hash-id-tokens", "256"], "--hash-id-tokens 256 needs a trace"),
        (["--enable-expert-parallel"], "--enable-expert-parallel true: mistralai/Mistral-7B-v0.1 has no experts"),
        (["--watermark", "2"], "--watermark=2.0: give a share"),
        (["--seed", "-1"], "--seed -1 must be a whole number"),
        (["--turns", "2", "--think-time", "-1"], "--think-time -1.0 must be"),
        (["--engine", "nosuch"], "unknown engine 'nosuch': known are orca"),
        (["--think-time", "3"], "--think-time 3.0 needs --turns, or a trace with sessions (--columns session=NAME)"),
        (["--ramp-up", "3"], "--ramp-up 3.0 needs --max-concurrency or --users"),
        (["--max-concurrency", "2", "--ramp-up", "-3"], "--ramp-up -3.0: give 0 or more"),
        (["--client-overhead-ms", "20"], "--client-overhead-ms 20 needs --max-concurrency"),
        (["--turns", "2", "--clip-tokens", "99"], "--clip-tokens 99 has no meaning with turns"),
        (["--users", "3", "--max-concurrency", "2"], "--max-concurrency 2 and --users 3 both bound the load"),
        (["--priorities", "0=0.3"], "--priorities '0=0.3': give PRIORITY=SHARE,..."),
        (["--random-input-len", "0", "--random-output-len", "5"], "--random-input-len 0 must be a number of tokens"),
        (["--workload", "random"], "--random-input-len is missing: give a number of tokens"),
        (["--engine", "vllm@0.20"], "no preset of vllm 0.20: the one before it is vllm@0.15, the newest vllm@0.33"),
        (["--engine", "vllm@0.2"], "no preset of vllm 0.2: the oldest is vllm@0.4, the newest vllm@0.33"),
        (["--zipf-alpha", "2"], "--zipf-alpha 2.0 needs --workload 'zipf'"),
    ],
)
def test_what_would_be_ignored_is_refused_by_the_flags_name(arguments: list[str], message: str) -> None:
    code, found = run([*SIMULATE, *arguments])
    assert code == 2 and found.startswith(message) and len(found.splitlines()) == 1


def test_a_policy_that_plans_nothing_is_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fault = "from engine.scheduling.policies import BatchPlan; return BatchPlan()"
    (tmp_path / "mine.py").write_text(POLICY.format(fault=fault))
    (tmp_path / "run.yaml").write_text("plugin: mine.py\nslo: p99_tbt<=1\n")  # each is one of a list
    try:
        code, message = run([*SIMULATE, "--config", "run.yaml", "--scheduler", "mine", "--output-dir", "out"])
    finally:
        POLICIES.pop("mine", None)
    assert code == 2 and message.startswith("the policy mine schedules nothing although 0 requests are running")
    assert "Traceback" not in capsys.readouterr().err


def test_settings_that_are_true_or_false_may_stand_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for number, flags in enumerate([["--enable-prefix-caching"], ["--no-enable-prefix-caching"]]):
        out = ["--output-dir", str(tmp_path / str(number)), "--json"]
        assert run([*SIMULATE, "--engine", "vllm@0.15", *flags, *out]) == (0, "")
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1])["replicas"][0]["prefix_caching"])
    assert found == [True, False]


def test_a_version_in_a_file_may_look_like_a_number(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("engine: vllm@0.33\nvllm_version: 0.15\n")
    done = run([*SIMULATE, "--config", str(tmp_path / "run.yaml"), "--output-dir", str(tmp_path / "out")])
    assert done == (0, "")
    (tmp_path / "run.yaml").write_text("engine: vllm@0.33\nvllm_version: 0.20\n")
    code, message = run([*SIMULATE, "--config", str(tmp_path / "run.yaml")])
    assert code == 2 and message.startswith("unknown vLLM version '0.2': did you mean '0.12'? known are 0.12, 0.15")


def test_another_policy_on_a_vllm_preset_leaves_vllms_own_options_behind(tmp_path: Path) -> None:
    done = run([*SIMULATE, "--engine", "vllm@0.15", "--scheduler", "sarathi", "--output-dir", str(tmp_path / "out")])
    assert done == (0, "")
    assert run(
        ["simulate", "--config", str(tmp_path / "out" / "config.yaml"), "--output-dir", str(tmp_path / "2")]
    ) == (
        0,
        "",
    )
