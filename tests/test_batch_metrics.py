"""What a run's batches and requests were like: against sums over a run that is worked out by hand."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cli.main import run as command
from engine.specs import ParallelSpec, SchedulerSpec
from engine.workload.workload import Workload
from simulator.cluster import Deployment, deploy, simulate
from simulator.predictor.base import FixedTable

FLAGS = ["--model", "01-ai/Yi-34B", "--device", "a100", "--tensor-parallel-size", "2", "--num-prompts", "30",
         "--request-rate", "1", "--scheduler", "vllm_v0"]  # fmt: skip


def toy(policy: str, stages: int = 1) -> Deployment:
    """10 ms a token on each stage."""
    times = FixedTable([[0.01 * tokens for tokens in range(300)]] * stages)
    spec = SchedulerSpec(policy=policy, max_num_batched_tokens=256, max_num_seqs=8, max_model_len=256)
    return deploy("microsoft/phi-2", "a100", scheduler=spec, num_gpu_blocks_override=64, predictor=times,
                  parallel=ParallelSpec(pipeline_parallel_size=stages))  # fmt: skip


def test_a_decode_that_waits_for_a_prompt_is_held_up_by_it() -> None:
    two = Workload("two", np.array([0.0, 0.2]), np.array([10, 100]), np.array([40, 2]), 0)
    summary = simulate(two, [toy("vllm_v0")], with_batches=True).summary
    # the first: its prompt 0.1 s, then 39 decodes, one of them beside the other's; it waits for 1 s of prompt
    first, second = 0.1 + 38 * 0.01 + 0.02, 1.0 + 0.02
    assert summary["mean_execution_time_ms"] == pytest.approx(1e3 * (first + second) / 2)
    assert summary["max_preemption_time_ms"] == pytest.approx(1e3)
    assert summary["batches"]["requests"]["upto"] == {"1": 40, "2": 1}
    assert summary["batches"]["tokens"]["upto"]["16"] == 1 and summary["batches"]["tokens"]["upto"]["128"] == 1
    assert summary["batches"]["between_ms"]["max"] == pytest.approx(0.0, abs=1e-9)


def test_time_between_batches_is_what_a_stage_idles() -> None:
    apart = Workload("apart", np.array([0.0, 5.0]), np.array([10, 10]), np.array([1, 1]), 0)
    summary = simulate(apart, [toy("sarathi")], with_batches=True).summary
    assert summary["batches"]["between_ms"]["max"] == pytest.approx(4900)
    assert summary["max_execution_time_ms"] == pytest.approx(100) and summary["max_preemption_time_ms"] == 0


def test_a_pipelines_stages_are_all_execution() -> None:
    one = Workload("one", np.array([0.0]), np.array([10]), np.array([3]), 0)
    summary = simulate(one, [toy("sarathi", stages=2)], with_batches=True).summary
    assert summary["mean_execution_time_ms"] == pytest.approx(1e3 * 2 * (0.1 + 2 * 0.01))


def test_a_run_has_no_such_keys_unless_asked() -> None:
    one = Workload("one", np.array([0.0]), np.array([10]), np.array([3]), 0)
    assert "batches" not in simulate(one, [toy("sarathi")]).summary


def test_the_time_by_operator_adds_up_and_is_on_the_page(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert command(["simulate", *FLAGS, "--operator-times", "--output-dir", str(out)]) == (0, "")
    summary = json.loads((out / "summary.json").read_text("utf-8"))
    (times,) = summary["operator_times_s"]
    worked = pq.read_table(out / "iterations.parquet")["duration_s"].to_numpy().sum()
    assert sum(times.values()) == pytest.approx(worked, rel=1e-6)
    assert max(times, key=lambda name: times[name]) == "linear" and min(times.values()) > 0
    page = (out / "report.html").read_text("utf-8")
    assert "Time by kind of operator" in page and "Requests of the batches" in page
    assert "execution and preemption time" in page  # a figure, with its CSV
