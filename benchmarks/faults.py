"""Kills commands with SIGKILL at random moments and runs them again: does a killed run leave anything behind?

    python benchmarks/faults.py                        # every command, 30 times each: an hour on two cores
    python benchmarks/faults.py --times 3 --only search,sweep

Each command first runs to its end once, for its tables. Then, as often as asked for, it is started, killed after a
random share of that time, and started again with the same arguments. It fails where that ends otherwise than well,
where the tables are not the same, where a process of the killed run lives on, where a file of somebody else beside the
folder has changed, and where something half-written is left. A command more is an entry more in `CASES`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MARK = "WINDTUNNEL_FAULT"  # in the environment of every process that descends from a command
ENDING_S = 20.0  # for workers to notice that their parent is gone
STRANGER = "mine.txt"  # a file of somebody else
MODEL = ("--model", "Mistral-7B-v0.1", "--device", "a100", "--max-model-len", "4096")
TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip
SWEEP = "sweep:\n  max_num_seqs: [8, 16, 32]\n  scheduler: [sarathi, vllm]\n"
PROFILE = ("profile", "--models", "tiny", "--device", "cpu", "--budget", "20s", "--max-model-len", "64")
ROWS = "arrived_at_s,input_tokens,output_tokens,ttft_s,e2e_s\n" + "".join(
    f"{i / 4},{200 + i % 7},{20 + i % 5},0.05,{0.5 + i % 3 / 10}\n" for i in range(400)
)


@dataclass(frozen=True)
class Case:
    """A command that writes into a folder. `table` reads what must be the same again of it."""

    arguments: tuple[str, ...]
    table: Callable[[Path], Any]
    files: dict[str, str] = field(default_factory=dict)  # that it reads, by their names in its folder
    output: str = "--output-dir"
    drive: Callable[[subprocess.Popen[str]], None] | None = None  # what ends it, where it does not end by itself
    before: tuple[str, ...] = ()  # a command to run first
    needs: str | None = None  # a package


def _json(path: Path, *names: str) -> Any:
    data = json.loads(path.read_text("utf-8"))
    return [data[name] for name in names] if names else data


def _searched(folder: Path) -> Any:
    trials = _json(folder / "search.json", "max_qps_under_slo", "binding_slo", "trials")
    return [trials[0], trials[1], [(each["rate"], each["met"], each["margin"]) for each in trials[2]]]


def _swept(folder: Path) -> Any:
    (points,) = _json(folder / "sweep.json", "points")
    return sorted((point["name"], point["max_qps_under_slo"], point["pareto"]) for point in points)


def _profiled(folder: Path) -> Any:
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text("utf-8").splitlines()]
    keys = [json.dumps(line.get("point") or [line["part"], line["burst"]], sort_keys=True) for line in lines]
    assert len(keys) == len(set(keys)), "a point was measured twice"
    return (folder / "operators.csv").is_file()


def _serve(process: subprocess.Popen[str]) -> None:
    """Send a request to the server and end it."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("serving "):
            url = line.split(" at ")[1].split()[0]
            body = json.dumps({"model": MODEL[1], "prompt": "a b c d", "max_tokens": 4}).encode()
            request = urllib.request.Request(f"{url}/completions", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request) as answer:
                answer.read()
            process.terminate()
            return


CASES: dict[str, Case] = {
    "simulate": Case(
        ("simulate", *MODEL, "--num-prompts", "3000", "--request-rate", "4"),
        lambda folder: _json(folder / "summary.json", "completed", "output_throughput", "duration"),
    ),
    "search": Case(("search", *MODEL, "--num-prompts", "100", "--seeds", "1", "--slo", "p99_tbt<=0.1"), _searched),
    "sweep": Case(
        ("search", *MODEL, "--num-prompts", "200", "--slo", "p99_tbt<=0.1", "--sweep", "sweep.yaml", "--workers", "2"),
        _swept,
        {"sweep.yaml": SWEEP},
    ),
    "plan": Case(
        ("plan", *MODEL[:2], "--max-model-len", "4096", "--devices", "a100_sxm", "--gpu-price", "2", "--num-prompts",
         "60", "--request-rate", "10", "--slo", "p99_tbt<=0.1", "--tensor-parallel-size", "1,2",
         "--pipeline-parallel-size", "1", "--max-num-batched-tokens", "512", "--workers", "2"),
        lambda folder: _json(folder / "plan.json", "best")[0]["replicas"],
    ),
    "study": Case(
        ("study", "run", "generation_stalls", "--num-prompts", "60", "--workers", "2"),
        lambda folder: _json(folder / "results.json"),
    ),
    "against": Case(
        ("validate", "--against", "rows.csv", *MODEL),
        lambda folder: _json(folder / "validation.json", "records"),
        {"rows.csv": ROWS},
    ),
    "validate": Case(
        ("validate", "--model", "tiny", "--device", "cpu", "--load-format", "dummy", "--num-prompts", "8",
         "--request-rate", "20", "--workload", "fixed", "--input-len", "16", "--output-len", "8"),
        lambda folder: _json(folder / "validation.json")["loads"][0]["requests"],
        {"tiny/config.json": json.dumps(TINY)},
        needs="torch",
    ),
    "serve": Case(
        ("serve", "--simulate", *MODEL, "--port", "0"),
        lambda folder: _json(folder / "summary.json", "completed"),
        drive=_serve,
        needs="fastapi",
    ),
    "calibrate": Case(
        ("calibrate", "fit", "--source", "profile:measured"),
        lambda folder: sorted((path.name, path.read_text("utf-8")) for path in folder.glob("*.json")),
        {"tiny/config.json": json.dumps(TINY)},
        before=(*PROFILE, "--output-dir", "measured"),
        needs="torch",
    ),
    "profile": Case(
        PROFILE,
        _profiled,
        {"tiny/config.json": json.dumps(TINY)},
        needs="torch",
    ),
}  # fmt: skip


class FaultError(AssertionError):
    """A killed run left something behind, or can't be run again."""


def run_case(name: str, case: Case, times: int, rng: random.Random, say: Callable[[str], None] = print) -> None:
    """Kill a command `times` times. Raises FaultError for the first that is not as it was, with the moment."""
    with tempfile.TemporaryDirectory(prefix=f"fault-{name}-") as place:
        folder = Path(place)
        for file, text in case.files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text, encoding="utf-8")
        if case.before:
            subprocess.run([sys.executable, "-m", "cli", *case.before], cwd=folder, env=_environment(), check=True)
        began = time.monotonic()
        _to_its_end(case, folder, "whole")
        whole_s = time.monotonic() - began
        wanted = case.table(folder / "whole")
        for number in range(times):
            after_s = rng.uniform(0, whole_s)
            out = f"run{number}"
            (folder / STRANGER).write_text(out, encoding="utf-8")
            _kill(case, folder, out, after_s)
            where = f"{name}, killed after {after_s:.2f} of {whole_s:.2f} s"
            _check_strangers(folder, out, where)
            try:
                again = _finished(case, folder / out)
                if not again:
                    _to_its_end(case, folder, out)
                found = case.table(folder / out)
            except FaultError as error:
                raise FaultError(f"{where}: {error}") from None
            if found != wanted:
                raise FaultError(f"{where}: other tables after it was run again")
            _check_strangers(folder, out, where)
            left = [path.name for path in folder.rglob("*") if path.name.endswith(".part") or ".partial-" in path.name]
            if left and not again:
                raise FaultError(f"{where}: {left} are left")
            say(f"{where}: well")


def _finished(case: Case, out: Path) -> bool:
    """Whether a run was killed after its end: its folder is whole, and no other may be written there."""
    try:
        case.table(out)
    except (OSError, ValueError, LookupError):
        return False
    return case.arguments[0] in ("simulate", "validate", "serve")


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def _start(case: Case, folder: Path, out: str) -> subprocess.Popen[str]:
    environment = {**_environment(), MARK: str(folder / out)}
    return subprocess.Popen(
        [sys.executable, "-m", "cli", *case.arguments, case.output, out], cwd=folder, env=environment, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def _to_its_end(case: Case, folder: Path, out: str) -> None:
    process = _start(case, folder, out)
    if case.drive is not None:
        case.drive(process)
    _, said = process.communicate()
    if process.returncode:
        raise FaultError(f"exit code {process.returncode}: {said.strip().splitlines()[-1:]}")


def _kill(case: Case, folder: Path, out: str, after_s: float) -> None:
    """Start a command, kill its first process, and wait for the others to end. Raises FaultError if they don't."""
    process = _start(case, folder, out)
    try:
        process.communicate(timeout=after_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
    end = time.monotonic() + ENDING_S
    while left := list(_descendants(str(folder / out))):
        if time.monotonic() > end:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            raise FaultError(f"{case.arguments[0]}: processes {left} live on {ENDING_S:g} s after it was killed")
        time.sleep(0.05)


def _descendants(mark: str) -> Iterator[int]:
    """Yield the processes that have our mark in their environment."""
    wanted = f"{MARK}={mark}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found = wanted in (entry / "environ").read_bytes().split(b"\0")
                if found and (entry / "stat").read_text("utf-8", "replace").rsplit(")", 1)[1].split()[0] != "Z":
                    yield int(entry.name)
            except OSError:  # it has ended, or is not ours
                continue


def _check_strangers(folder: Path, out: str, where: str) -> None:
    if not (folder / STRANGER).is_file() or (folder / STRANGER).read_text("utf-8") != out:
        raise FaultError(f"{where}: somebody else's file has changed")


def main(arguments: list[str] | None = None) -> int:
    """Run the cases, print how each went and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=30, help="how often each command is killed (default: 30)")
    parser.add_argument("--only", help=f"commands, separated by commas, of {', '.join(CASES)}")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    names = given.only.split(",") if given.only else list(CASES)
    lacking = [name for name in names if (package := CASES[name].needs) is not None and find_spec(package) is None]
    for name in lacking:
        print(f"{name}: left out, for it needs {CASES[name].needs}")
    names = [name for name in names if name not in lacking]
    failed = []
    for name in names:
        try:
            run_case(name, CASES[name], given.times, random.Random(f"{given.seed} {name}"))
        except FaultError as error:
            failed.append(name)
            print(f"FAILED: {error}", flush=True)
    print(
        f"{len(names) - len(failed)} of {len(names)} commands stand it" + (f": not {', '.join(failed)}" * bool(failed))
    )
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
