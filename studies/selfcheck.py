"""One command for a GPU node that may be gone in ten minutes: measure, learn, report the error, and test.

    windtunnel selfcheck --device cuda --budget 9m --output-dir check
    python -m studies.selfcheck --device cuda --budget 9m --output-dir check     # where pydantic or plotly is missing

Each step is a process of its own, so that it leaves the GPU's memory, and the steps after it, alone; what a step
measures is written as it goes, and a step whose time is up is ended and reported with what it did. What needs the GPU
most comes first, and the first step also pays for the kernels that are compiled. The folder holds at most eight files,
to bring home: `summary.json` with a line for each step, the tests' and the benchmark's output, the profile, and
`validation.json`. There,
`windtunnel calibrate fit --source profile:check/profile` makes the calibration again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf
from pathlib import Path
from typing import Any

from engine.errors import InputError
from engine.executors.start import need, start
from engine.replica_spec import resolve
from engine.results.folders import owned
from engine.results.run_folder import write_summary
from engine.runtime.engine_spec import EngineSpec
from engine.specs import ModelSpec, SchedulerSpec, catalog
from engine.workload.workload import WorkloadSpec, make_workload
from profiler.points import Limits
from profiler.session import duration

ROOT = Path(__file__).parents[1]
LOADS = (0.5, 0.85, 0.95)
STEPS = {"profile": 0.35, "validate": 0.25, "benchmark": 0.2, "tests": 0.2}  # shares of the budget
SETTLE_S = 15.0  # of a step's time, to start and to end
LEAST_S = {  # of a step, below which it ends with nothing: estimates
    "cuda": {"profile": 60.0, "validate": 75.0, "benchmark": 75.0, "tests": 75.0},
    "cpu": {"profile": 20.0, "validate": 20.0, "benchmark": 40.0, "tests": 40.0},
}
PATIENCE = 1.0  # a step is ended after this many times its share of the budget
PROGRESS_S = 1.0  # between lines about how far a step is
SMALL = ModelSpec(name="small", model_type="llama", num_layers=3, hidden_size=256, intermediate_size=704,
                  num_attention_heads=4, num_key_value_heads=2, head_dim=64, vocab_size=2048,
                  max_position_embeddings=4096)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What a kind of device is checked with."""

    model: ModelSpec
    dtype: str
    limits: Limits
    scheduler: SchedulerSpec
    workload: WorkloadSpec


CASES = {
    "cuda": Case(
        catalog.model("Meta-Llama-3-8B"),
        "bfloat16",
        Limits(max_tokens=8192, max_requests=256, max_length=8192, kv_tokens=1 << 18),
        SchedulerSpec(max_num_batched_tokens=2048, max_num_seqs=256, max_model_len=8192),
        WorkloadSpec(lengths="openchat_sharegpt4", max_model_len=8192, arrival="burst"),
    ),
    "cpu": Case(
        SMALL.in_dtype("float32"),
        "float32",
        Limits(max_tokens=128, max_requests=8, max_length=512, kv_tokens=4096),
        SchedulerSpec(max_num_batched_tokens=128, max_num_seqs=8, max_model_len=512),
        WorkloadSpec(lengths="uniform", input_len="16:128", output_len="8:32", max_model_len=512, arrival="burst"),
    ),
}


def least_budget(device: str, steps: Sequence[str] = tuple(STEPS)) -> float:
    """Return the shortest budget (s) whose shares leave every step the time that it needs at least."""
    total = sum(STEPS[step] for step in steps)
    return max(LEAST_S[device][step] * total / STEPS[step] for step in steps)


def selfcheck(device: str, budget_s: float, output_dir: Path, steps: tuple[str, ...] = tuple(STEPS)) -> bool:
    """Run the steps within the budget, print a table of them, and return whether all went well.

    Raises InputError, before anything runs, for a budget that is too short.
    """
    if device not in CASES:
        raise InputError(f"device {device!r}: give cuda or cpu")
    need("torch", "engine")
    if budget_s < (least := ceil(round(least_budget(device, steps), 3))):
        raise InputError(f"--budget {budget_s:g}s is too short on {device}: give at least {least}s")
    with owned(output_dir):
        if any(output_dir.iterdir()):
            raise InputError(f"{output_dir} is not empty: give another --output-dir")
        return _run_steps(device, budget_s, output_dir, steps)


def _run_steps(device: str, budget_s: float, output_dir: Path, steps: tuple[str, ...]) -> bool:
    began = time.perf_counter()
    lines: dict[str, dict[str, Any]] = {}
    for i, step in enumerate(steps):
        start_s = time.perf_counter()
        left = budget_s - (start_s - began)
        share = STEPS[step] / sum(STEPS[each] for each in steps[i:])
        print(f"{step}: {left * share:.0f} s of {left:.0f} s", flush=True)
        lines[step] = _run_step(step, device, left * share, output_dir)
        lines[step]["seconds"] = round(time.perf_counter() - start_s, 1)
        write_summary(output_dir, {"device": device, "budget_s": budget_s, "steps": lines})
    print(f"\n{'step':<10} {'seconds':>8}  result")
    for step, line in lines.items():
        print(f"{step:<10} {line['seconds']:>8.1f}  {line['result']}")
    print(f"results: {output_dir}")
    return all(line["ok"] for line in lines.values())


def _run_step(step: str, device: str, seconds: float, output_dir: Path) -> dict[str, Any]:
    """Run a step as a process that is ended when its time is up, and return its result in a line."""
    commands: dict[str, list[str]] = {
        "tests": ["-m", "pytest", "-m", "gpu" if device == "cuda" else "not gpu", "-v", "-p", "no:cacheprovider",
                  "tests/test_gpu_engine.py", "tests/test_worker_attention.py"],
        "benchmark": ["benchmarks/engine_speed.py", "--device", device, "--json"],
    }  # fmt: skip
    own = ["-m", "studies.selfcheck", "--device", device, "--budget", f"{seconds}", "--output-dir", str(output_dir)]
    command = commands.get(step, [*own, "--step", step])
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT if step in commands else None, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE * seconds,
        )  # fmt: skip
        output, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as error:
        found = error.stdout or b""
        output, code = found.decode("utf-8", "replace") if isinstance(found, bytes) else found, -1
    if step in commands:
        (output_dir / f"{step}.txt").write_text(output, encoding="utf-8")
    printed = [line.strip() for line in output.splitlines() if line.strip()]
    last = printed[-1][:200] if printed else ""
    if code == -1:
        got = f"it got to: {last}" if last else f"while it was starting: give {step} more of a longer --budget"
        return {"ok": False, "result": f"out of time after {seconds:.0f} s, {got}"}
    return {"ok": code == 0, "result": last if code == 0 else f"failed ({code}): {last or 'it printed nothing'}"}


def profile_step(device: str, seconds: float, output_dir: Path) -> str:
    """Profile the case's model and return a sentence on what was measured."""
    from profiler.profile import ProfileSpec, device_here, run_profile

    shown_at = -inf

    def on_progress(part: str, samples: int, left: float) -> None:
        nonlocal shown_at
        if (now := time.perf_counter()) - shown_at >= PROGRESS_S:
            shown_at = now
            print(f"{samples:,} measurements, of {part}")

    case = CASES[device]
    spec = ProfileSpec(
        device=device_here("cuda" if device == "cuda" else "cpu"), models=(case.model,), tensor_parallel_sizes=(1,),
        dtype=case.dtype, limits=case.limits, block_size=case.scheduler.block_size,
        budget_s=max(5.0, seconds - SETTLE_S),
    )  # fmt: skip
    session = run_profile(spec, output_dir / "profile", on_progress)
    return f"{len(session.samples):,} measurements on {session.provenance['hardware']}"


def validate_step(device: str, seconds: float, output_dir: Path) -> str:
    """Fit the profile, validate it at LOADS, and return a sentence on the simulator's error."""
    from profiler.importers import read_source
    from profiler.profile import device_here
    from simulator.cluster import Deployment, simulate
    from simulator.predictor import calibration as store
    from simulator.predictor import calibration_fit
    from studies.validation.run import Validation

    began = time.perf_counter()
    case, profile = CASES[device], output_dir / "profile"
    with tempfile.TemporaryDirectory() as scratch:
        found = device_here("cuda" if device == "cuda" else "cpu")
        print("fitting the profile")
        fitted = calibration_fit.fit(found, [read_source("profile", profile)], on_progress=lambda line: None)
        store.save(fitted, Path(scratch), found)
        (Path(scratch) / "profile.json").write_bytes((profile / "profile.json").read_bytes())
        replica = resolve(case.model, scratch, scheduler=case.scheduler, async_scheduling=device == "cuda")
        print("starting the engine")
        executor = start(EngineSpec.of(replica, folder=None), "in_process")
        deployment = Deployment.of(replica.with_blocks(executor.num_blocks))
        burst = simulate(make_workload(replace(case.workload, num_prompts=64)), [deployment])
        left = seconds - SETTLE_S - (time.perf_counter() - began)
        served = left * burst.summary["request_throughput"]
        prompts = max(16, int(served / (1 + sum(1 / load for load in LOADS))))
        workload = replace(case.workload, num_prompts=prompts)
        validation = Validation(deployment=deployment, workload=workload, loads=LOADS)
        print(f"serving {prompts} requests at once")

        def on_result(so_far: Mapping[str, Any]) -> None:
            write_summary(output_dir, so_far, "validation.json")
            print(_validated(so_far))

        results = validation.run(executor, on_result=on_result)
    return _validated(results)


def _validated(results: Mapping[str, Any]) -> str:
    """Return a sentence on the loads that were validated."""
    errors = [
        f"{each['load']:.0%}: iterations {each['iterations']['mape']:.1%}, "
        f"E2E P50 {each['latencies']['e2e']['p50']['error']:+.1%} P99 {each['latencies']['e2e']['p99']['error']:+.1%}"
        for each in results["loads"]
    ]
    return f"capacity {results['capacity']['error']:+.1%}; " + "; ".join(errors)


STEP_FUNCTIONS: dict[str, Callable[[str, float, Path], str]] = {"profile": profile_step, "validate": validate_step}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 if every step went well."""
    about = "Profile, validate, benchmark and test this machine within a time budget, a process for each step."
    parser = argparse.ArgumentParser(prog="windtunnel selfcheck", description=about)
    parser.add_argument("--device", choices=sorted(CASES), default="cuda", help="(default: %(default)s)")
    parser.add_argument("--budget", default="9m", help="time to spend, such as 400s or 9m (default: %(default)s)")
    parser.add_argument("--output-dir", type=Path, required=True, help="new or empty folder for the results")
    parser.add_argument("--step", choices=sorted(STEP_FUNCTIONS), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    try:
        seconds = duration(given.budget)
        if given.step:
            print(STEP_FUNCTIONS[given.step](given.device, seconds, given.output_dir))
            return 0
        return 0 if selfcheck(given.device, seconds, given.output_dir) else 1
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
