"""What the tests of whole small runs share: a replica with odd times, random workloads, a run's iterations in order."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import strategies as st

from engine.scheduling.policies import resolve
from engine.scheduling.request import BatchShape
from engine.specs import ParallelSpec, SchedulerSpec, catalog
from simulator.cluster import Deployment, Run, deploy
from simulator.predictor.base import RuntimePredictor


class Affine(RuntimePredictor):
    """Times that depend on everything a predictor may look at, with an odd last digit."""

    def stage_time(self, shape: BatchShape, stage: int) -> float:
        chunks = sum(chunk * (3 + prefix) for chunk, prefix in shape.prefills)
        sampled = 1e-5 * shape.num_sampled
        return (
            0.003 + 7e-4 * stage + 1e-4 * shape.num_tokens + 1.1e-6 * shape.decode_kv_tokens + 1e-7 * chunks + sampled
        )

    def send_time(self, shape: BatchShape, stage: int) -> float:
        return 1e-4 + 1e-6 * shape.num_tokens


def deployment(
    policy: str, stages: int, blocks: int, window: int | None = None, seqs: int = 6, budget: int = 24
) -> Deployment:
    """A small replica; the policy "dynamic" is sarathi with the dynamic chunk schedule."""
    spec = resolve(
        SchedulerSpec(
            policy="sarathi" if policy == "dynamic" else policy,
            chunk_schedule="dynamic" if policy == "dynamic" else "fixed",
            max_num_seqs=seqs,
            max_num_batched_tokens=budget if policy in ("sarathi", "chunked_only", "dynamic") else 160,
            max_model_len=80,
            block_size=4,
        ),
        80,
    )
    return deploy(
        replace(catalog.model("microsoft/phi-2"), sliding_window=window), "a100",
        parallel=ParallelSpec(pipeline_parallel_size=stages), scheduler=spec, num_gpu_blocks_override=blocks,
        predictor=Affine(),
    )  # fmt: skip


def with_async(kind: Deployment, ahead: bool) -> Deployment:
    """The replica with asynchronous scheduling, where that is asked for and there is one pipeline stage."""
    one = kind.parallel.pipeline_parallel_size == 1
    return replace(kind, replica=replace(kind.replica, async_scheduling=ahead and one))


def rows(run: Run) -> list[tuple]:  # type: ignore[type-arg]
    assert run.iterations is not None
    table = pd.DataFrame(run.iterations).sort_values(["replica", "stage", "start_s"]).fillna(-1.0)
    return [tuple(row) for row in table.itertuples(index=False)]


def assert_same(fast: Run, slow: Run) -> None:
    assert len(fast.requests["request_id"]) > 0
    order_fast, order_slow = (np.argsort(run.requests["request_id"]) for run in (fast, slow))
    for name, column in slow.requests.items():
        np.testing.assert_array_equal(fast.requests[name][order_fast], column[order_slow], err_msg=name)
    assert rows(fast) == rows(slow)
    for key, value in slow.summary.items():
        if isinstance(value, int | float):  # means may add up in another order
            assert fast.summary[key] == pytest.approx(value, rel=1e-9), key
    for mine, other in zip(fast.summary["replicas"], slow.summary["replicas"], strict=True):
        for key in ("recomputed_tokens", "occupied_s", "stage_utilization", "stage_bubbles"):
            assert mine[key] == pytest.approx(other[key], rel=1e-9, abs=1e-12), key


workloads = st.lists(
    st.tuples(st.sampled_from([0.0, 0.001, 0.01, 0.05, 0.3]), st.integers(1, 40), st.integers(1, 39)),
    min_size=1,
    max_size=25,
)
