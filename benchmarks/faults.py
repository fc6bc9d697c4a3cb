"""Kills commands with SIGKILL at random moments and runs them again: does a killed run leave anything behind?

    python benchmarks/faults.py --log faults.jsonl     # every command, 30 times each: an hour on two cores
    python benchmarks/faults.py --times 3 --only search,sweep

Each command first runs to its end once, for its tables. Then, as often as asked for, it is started, killed after a
random share of that time, and started again with the same arguments. It fails where that ends otherwise than well,
where the tables or the names of the files are not the same, where a process of the killed run lives on, where a file
of somebody else beside the folder has changed, and where something is left beside it. With a log, in which each moment
is a line, what went well before is not done again. A command more is an entry more in `CASES`.
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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MARK = "WINDTUNNEL_FAULT"  # in the environment of every process that descends from a command
ENDING_S = 20.0  # for workers to notice that their parent is gone
MODEL = ("--model", "Mistral-7B-v0.1", "--device", "a100", "--max-model-len", "4096")
TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip
SWEEP = "sweep:\n  max_num_seqs: [8, 32]\n  scheduler: [sarathi, vllm]\n"
PROFILE = ("profile", "--models", "tiny", "--device", "cpu", "--budget", "4s", "--max-model-len", "16",
           "--max-num-seqs", "2")  # fmt: skip
ROWS = "arrived_at_s,input_tokens,output_tokens,ttft_s,e2e_s\n" + "".join(
    f"{i / 4},{200 + i % 7},{20 + i % 5},0.05,{0.5 + i % 3 / 10}\n" for i in range(400)
)


Say = Callable[[int, str], None]


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
        ("search", *MODEL, "--num-prompts", "50", "--slo", "p99_tbt<=0.1", "--sweep", "sweep.yaml", "--workers", "2",
         "--seeds", "1", "--tolerance", "0.2", "--no-curve"),
        _swept,
        {"sweep.yaml": SWEEP},
    ),
    "plan": Case(
        ("plan", *MODEL[:2], "--max-model-len", "4096", "--devices", "a100_sxm", "--gpu-price", "2", "--num-prompts",
         "20", "--request-rate", "1", "--slo", "p99_tbt<=0.1", "--workload", "fixed", "--input-len", "1000",
         "--output-len", "100", "--max-num-seqs", "4", "--tensor-parallel-size", "1", "--pipeline-parallel-size", "1",
         "--max-num-batched-tokens", "512", "--workers", "2"),
        lambda folder: _json(folder / "plan.json", "best", "expected", "candidates"),
    ),
    "study": Case(
        ("study", "run", "generation_stalls", "--num-prompts", "30", "--seeds", "1", "--workers", "2"),
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


def run_case(name: str, case: Case, moments: Iterable[int], seed: int = 0, say: Say = lambda *_: None) -> None:
    """Kill a command at numbered moments and `say` each that went well, with what it was in words.

    Raises FaultError for the first that is not as it was.
    """
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
        wanted = case.table(folder / "whole"), _names(folder / "whole")
        for number in moments:
            after_s = random.Random(f"{seed} {name} {number}").uniform(0, whole_s)
            out = f"run{number}"
            strangers = _strangers(folder, out)
            beside = {path.name for path in folder.iterdir()} | {out}
            _kill(case, folder, out, after_s)
            where = f"{name}, killed after {after_s:.2f} of {whole_s:.2f} s"
            _check_strangers(strangers, where)
            try:
                if not _finished(case, folder / out):
                    _to_its_end(case, folder, out)
                found = case.table(folder / out), _names(folder / out)
            except FaultError as error:
                raise FaultError(f"{where}: {error}") from None
            if found[0] != wanted[0]:
                raise FaultError(f"{where}: other tables after it was run again")
            if other := wanted[1] ^ found[1]:
                raise FaultError(f"{where}: other files after it was run again: {', '.join(sorted(other))}")
            _check_strangers(strangers, where)
            if left := {path.name for path in folder.iterdir()} - beside:
                raise FaultError(f"{where}: {', '.join(sorted(left))} beside the folder")
            say(number, where)


def _names(folder: Path) -> set[str]:
    """Return the names of all files in a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


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


def _strangers(folder: Path, out: str) -> dict[Path, str]:
    """Write files of somebody else beside a command's folder, with names like its own; return what they hold."""
    files = dict.fromkeys((folder / "mine.txt", folder / f".{out}.part", folder / f"{out}x" / f".{out}.json.part"), out)
    for path, text in files.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return files


def _check_strangers(files: dict[Path, str], where: str) -> None:
    for path, text in files.items():
        if not path.is_file() or path.read_text("utf-8") != text:
            raise FaultError(f"{where}: somebody else's {path.name} has changed")


def main(arguments: list[str] | None = None) -> int:
    """Run the cases, print how each went and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=30, help="how often each command is killed (default: 30)")
    parser.add_argument("--only", help=f"commands, separated by commas, of {', '.join(CASES)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="JSON lines of what went well, which is not done again")
    given = parser.parse_args(arguments)
    names = given.only.split(",") if given.only else list(CASES)
    lacking = [name for name in names if (package := CASES[name].needs) is not None and find_spec(package) is None]
    for name in lacking:
        print(f"{name}: left out, for it needs {CASES[name].needs}")
    failed = []
    names = [name for name in names if name not in lacking]
    for name in names:
        done = _logged(given.log, name, given.seed)
        try:
            if left := [number for number in range(given.times) if number not in done]:
                run_case(name, CASES[name], left, given.seed, partial(_say, given.log, name, given.seed))
        except FaultError as error:
            failed.append(name)
            print(f"FAILED: {error}", flush=True)
    print(
        f"{len(names) - len(failed)} of {len(names)} commands stand it" + (f": not {', '.join(failed)}" * bool(failed))
    )
    return int(bool(failed))


def _say(log: Path | None, name: str, seed: int, number: int, where: str) -> None:
    """Print what went well, and keep it in the log."""
    print(f"{where}: well", flush=True)
    if log is not None:
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"command": name, "seed": seed, "number": number, "what": where}) + "\n")


def _logged(log: Path | None, name: str, seed: int) -> set[int]:
    """Return the numbers of a command's moments that went well before."""
    lines = log.read_text("utf-8").splitlines() if log is not None and log.exists() else []
    found = [json.loads(line) for line in lines]
    return {each["number"] for each in found if (each["command"], each["seed"]) == (name, seed)}


if __name__ == "__main__":
    sys.exit(main())
