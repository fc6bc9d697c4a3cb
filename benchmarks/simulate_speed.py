"""How fast the simulator is, as whole processes: time, peak memory, batches/s, and how they grow with the requests.

The case: Llama-2-70B TP2 on A100, azure_conv lengths clipped to 4096 tokens, Poisson arrivals of 1 request/s, sarathi
with a budget of 512 tokens, at most 128 sequences, every per-request and per-token metric kept. Beside it, in the same
run, stand two references: the same simulation stepping every batch singly, and with a fixed table of times for a
predictor, which costs nothing to ask. The table has the mean time of the batches of as many tokens in the simulation
with the calibrated predictor, so that about as many batches come of it; these two run in turn, in one process.

    python benchmarks/simulate_speed.py                # 1k, 10k and 100k requests, a minute
    python benchmarks/simulate_speed.py --full         # and a million over 64 replicas, some minutes
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# as users have it: Python keeps what it compiled, which without it is half of the start-up
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
CASE = (
    "simulate --model meta-llama/Llama-2-70b-hf --device a100 --tensor-parallel-size 2 --workload azure_conv "
    "--clip-tokens 4096 --max-model-len 4096 --scheduler sarathi --max-num-batched-tokens 512 --max-num-seqs 128 --json"
)
SETUP = """
import json, sys, time
started = time.perf_counter()
from engine.specs import ParallelSpec, SchedulerSpec
from engine.workload.workload import WorkloadSpec, make_workload
from simulator.cluster import deploy, simulate
spec = WorkloadSpec(lengths="azure_conv", request_rate=1.0, num_prompts=int(sys.argv[1]), clip_tokens=4096)
workload = make_workload(spec)
scheduler = SchedulerSpec(max_model_len=4096, max_num_batched_tokens=512, max_num_seqs=128)
case = ("meta-llama/Llama-2-70b-hf", "a100")
specs = {"parallel": ParallelSpec(tensor_parallel_size=2), "scheduler": scheduler}
replica = deploy(*case, **specs)
startup_seconds = time.perf_counter() - started
"""
SINGLE_STEPS = """
summary = simulate(workload, [replica], repeats=False).summary
summary["simulator"]["startup_seconds"] = startup_seconds
print(json.dumps(summary))
"""
FIXED_TABLE = """
import numpy as np
from simulator.predictor.base import FixedTable
rows = simulate(workload, [replica]).iterations
tokens, seconds = rows["num_tokens"], rows["duration_s"]
known = np.unique(tokens)
means = np.bincount(tokens, seconds)[known] / np.bincount(tokens)[known]
table = FixedTable([np.interp(range(scheduler.max_num_batched_tokens + 1), known, means).tolist()])
kinds = {"calibrated": replica, "fixed table": deploy(*case, **specs, predictor=table)}
best = {}
for name in list(kinds) * 10:
    simulator = simulate(workload, [kinds[name]]).summary["simulator"]
    best[name] = max(best.get(name, 0), simulator["batches"] / simulator["loop_seconds"])
print(json.dumps(best))
"""


def measure(arguments: list[str]) -> tuple[float, float, dict]:  # type: ignore[type-arg]
    """Wall time (s) and peak memory (MiB) of a whole Python process, and the summary that it prints last."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"a run failed: {arguments}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024, json.loads(output.splitlines()[-1])


def row(name: str, seconds: float, memory: float, summary: dict) -> float:  # type: ignore[type-arg]
    """Print a run's figures; returns its batches per second."""
    simulator = summary["simulator"]
    speed = simulator["batches"] / simulator["loop_seconds"]
    print(
        f"{name:<34}{simulator['batches']:>12,}{speed:>14,.0f}{simulator['startup_seconds']:>12.2f}"
        f"{simulator['loop_seconds']:>10.2f}{seconds:>13.2f}{memory:>12,.0f}",
        flush=True,
    )
    return float(speed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="also a million requests over 64 replicas")
    full = parser.parse_args().full
    measure(["-c", "import cli.main, cli.simulate, studies.pages.run; print(0)"])  # compiles what is not yet compiled
    print(
        f"{'run':<34}{'batches':>12}{'batches/s':>14}{'start-up s':>12}{'loop s':>10}{'process s':>13}{'peak MiB':>12}"
    )
    speeds = {}
    sizes = [(1_000, 1), (10_000, 1), (100_000, 1), *([(1_000_000, 64)] if full else [])]
    with tempfile.TemporaryDirectory() as folder:
        for requests, replicas in sizes:
            flags = f"--num-prompts {requests} --num-replicas {replicas} --request-rate {replicas} --output-dir"
            run = ["-m", "cli", *CASE.split(), *flags.split(), str(Path(folder) / f"{requests}")]
            speeds[requests] = row(f"{requests:,} requests, {replicas} replica(s)", *measure(run))
    single = row("10,000 requests, single steps", *measure(["-c", SETUP + SINGLE_STEPS, "10000"]))
    print(
        "'process' is from start to exit and includes writing the run's folder with its report (not for single steps)"
    )
    print(f"\nratio at 10,000 requests, repeats over single steps: {speeds[10_000] / single:.2f}x batches/s")
    *_, best = measure(["-c", SETUP + FIXED_TABLE, "10000"])
    calibrated, fixed = best["calibrated"], best["fixed table"]
    print(
        f"ratio at 10,000 requests, calibrated predictor over fixed table: {calibrated / fixed:.3f} "
        f"({calibrated:,.0f} and {fixed:,.0f} batches/s, each the best of 10 runs, without files)"
    )


if __name__ == "__main__":
    main()
