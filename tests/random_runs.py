"""What the tests of whole small runs share: a replica with odd times, random workloads, a run's iterations in order."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import strategies as st

from engine.scheduling.policies import resolve
from engine.scheduling.request import BatchShape, Request
from engine.specs import ParallelSpec, SchedulerSpec, catalog
from engine.workload.workload import Workload
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
    policy: str, stages: int, blocks: int, window: int | None = None, seqs: int = 6, budget: int = 24, **options: Any
) -> Deployment:
    """A small replica, `options` as in SchedulerSpec; the policy "dynamic" is sarathi with dynamic chunks."""
    splits = policy in ("sarathi", "chunked_only", "dynamic", "vllm")
    settings: dict[str, Any] = {
        "policy": "sarathi" if policy == "dynamic" else policy,
        "chunk_schedule": "dynamic" if policy == "dynamic" else "fixed",
        "max_num_seqs": seqs,
        "max_num_batched_tokens": budget if splits else 160,
        "max_model_len": 80,
        "block_size": 4,
    }
    spec = resolve(SchedulerSpec(**settings, **options), 80)
    return deploy(
        replace(catalog.model("microsoft/phi-2"), sliding_window=window), "a100",
        parallel=ParallelSpec(pipeline_parallel_size=stages), scheduler=spec, num_gpu_blocks_override=blocks,
        predictor=Affine(),
    )  # fmt: skip


def with_async(kind: Deployment, ahead: bool) -> Deployment:
    """The replica with asynchronous scheduling, where that is asked for and there is one pipeline stage."""
    one = kind.parallel.pipeline_parallel_size == 1
    return replace(kind, replica=replace(kind.replica, async_scheduling=ahead and one))


@dataclass(frozen=True)
class Sharing(Workload):
    """A workload whose requests have the KV blocks' hashes and priorities that are given."""

    hashes: tuple[list[int] | None, ...] = ()
    priorities: tuple[int, ...] = ()

    def requests(self) -> Iterator[Request]:
        for request, hashes, priority in zip(super().requests(), self.hashes, self.priorities, strict=True):
            request.block_hashes, request.priority = hashes, priority
            yield request


def sharing(jobs: list[tuple[float, int, int, int, int, int]], block_size: int = 4) -> Sharing:
    """Requests whose first tokens are those of their family.

    A job is (gap, prompt tokens, output tokens, family, tokens shared with it, priority).
    """
    gaps, prompts, outputs, *_, priorities = map(np.array, zip(*jobs, strict=True))
    hashes = tuple(
        [block_of(i, family, shared, k, block_size) for k in range((prompt + output) // block_size)]
        for i, (_, prompt, output, family, shared, _) in enumerate(jobs)
    )
    arrivals = np.cumsum(gaps).astype(float)
    return Sharing("sharing", arrivals, prompts, outputs, 0, hashes=hashes, priorities=tuple(priorities.tolist()))


def block_of(number: int, family: int, shared: int, block: int, block_size: int) -> int:
    """The hash of a block of request `number`: its family's if all tokens up to its end are the family's."""
    owner = family if (block + 1) * block_size <= shared else 1000 + number
    return owner * 1000 + block


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

sharers = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.001, 0.01, 0.05, 0.3]),
        st.integers(1, 40),
        st.integers(1, 39),
        st.integers(0, 2),
        st.sampled_from([0, 3, 12, 16, 30, 80]),  # 80: the outputs are the family's too
        st.sampled_from([0, 0, 1, -3]),
    ),
    min_size=1,
    max_size=25,
)

SHARING_POLICIES: list[tuple[str, dict[str, Any]]] = [
    *[(name, {}) for name in ("sarathi", "dynamic", "chunked_only", "vllm_v0", "orca", "request_level", "hybrid_only")],
    *[("vllm", {"vllm_version": version}) for version in ("0.12", "0.15", "0.33")],
    *[("vllm", {"vllm_version": version, "long_prefill_token_threshold": 5}) for version in ("0.15", "0.33")],
    *[("vllm", {"vllm_version": version, "scheduling_policy": "priority"}) for version in ("0.15", "0.33")],
    ("vllm", {"scheduler_reserve_full_isl": False, "watermark": 0.0}),
    ("vllm", {"long_prefill_token_threshold": 3, "long_prefill_token_threshold_adaptive": True}),
]
