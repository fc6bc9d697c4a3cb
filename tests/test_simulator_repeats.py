"""The fast path (many repeats at once) gives the identical result to single-stepping every batch."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_examples import random_examples
from random_runs import Affine, assert_same, deployment, with_async, workloads

from engine.scheduling.policies import POLICIES
from engine.scheduling.request import BatchShape
from engine.workload.workload import Workload
from simulator.cluster import simulate


@random_examples(100)
@given(
    requests=workloads,
    policy=st.sampled_from([*sorted(POLICIES), "dynamic"]),
    stages=st.sampled_from([1, 2, 3]),
    blocks=st.integers(21, 60),
    replicas=st.sampled_from([1, 1, 2]),
    router=st.sampled_from(["round_robin", "least_outstanding_tokens", "kv_aware"]),
    window=st.sampled_from([None, 16]),
    budget=st.sampled_from([6, 9, 24]),
    ahead=st.booleans(),
)
def test_repeats_equal_single_steps(  # type: ignore[no-untyped-def]
    requests, policy, stages, blocks, replicas, router, window, budget, ahead
):
    gaps, prompts, outputs = map(np.array, zip(*requests, strict=True))
    workload = Workload("random", np.cumsum(gaps).astype(float), prompts, outputs, 0)
    kind = deployment(policy, stages, blocks, window, budget=budget)
    kinds = [with_async(kind, ahead)] * replicas
    fast = simulate(workload, kinds, router=router)
    slow = simulate(workload, kinds, router=router, repeats=False)
    assert_same(fast, slow)


@pytest.mark.parametrize("stages", [1, 2])
def test_repeats_save_most_of_the_events(stages: int) -> None:
    """Guards the point of it: a long decode must not be stepped one batch at a time."""
    asked = 0

    class Counting(Affine):
        def stage_times(self, shape: BatchShape, stage: int, repeats: int) -> list[float]:
            nonlocal asked
            asked += 1
            return super().stage_times(shape, stage, repeats)

    base = deployment("sarathi", stages, 60)
    kind = replace(base, predictor=Counting())
    workload = Workload("one", np.zeros(1), np.array([8]), np.array([65]), 0)
    run = simulate(workload, [kind])
    assert run.summary["simulator"]["batches"] == 65
    assert asked < 10 * stages
