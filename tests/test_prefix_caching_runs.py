"""Whole runs of requests that share prefixes: repeats and single steps, driver and replica, and what blocks hold."""

from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_examples import random_examples
from random_runs import SHARING_POLICIES, assert_same, deployment, rows, sharers, sharing, with_async
from test_predicted_executor import drive

from engine.scheduling.request import Batch, Request
from engine.scheduling.scheduler import Scheduler
from simulator.cluster import simulate

Jobs = list[tuple[float, int, int, int, int, int]]


@random_examples(100)
@given(
    jobs=sharers,
    policy=st.sampled_from(SHARING_POLICIES),
    stages=st.sampled_from([1, 1, 2, 3]),
    blocks=st.integers(21, 60),
    window=st.sampled_from([None, None, 16]),
    budget=st.sampled_from([6, 9, 24]),
    ahead=st.booleans(),
)
def test_repeats_equal_single_steps_and_the_driver(
    jobs: Jobs,
    policy: tuple[str, dict[str, Any]],
    stages: int,
    blocks: int,
    window: int | None,
    budget: int,
    ahead: bool,
) -> None:
    workload = sharing(jobs)
    name, options = policy
    kind = deployment(name, stages, blocks, window, budget=budget, enable_prefix_caching=True, **options)
    kind = with_async(kind, ahead)
    fast, slow = simulate(workload, [kind]), simulate(workload, [kind], repeats=False)
    assert_same(fast, slow)
    driven = drive(workload, kind)
    orders = [np.argsort(run.requests["request_id"]) for run in (driven, fast)]
    for column, values in fast.requests.items():
        np.testing.assert_array_equal(driven.requests[column][orders[0]], values[orders[1]], err_msg=column)
    assert rows(driven) == rows(fast)
    assert driven.summary["recomputed_tokens"] == fast.summary["replicas"][0]["recomputed_tokens"]


@settings(max_examples=40)
@given(
    jobs=sharers,
    policy=st.sampled_from(SHARING_POLICIES),
    stages=st.sampled_from([1, 1, 2]),
    blocks=st.integers(21, 40),
    ahead=st.booleans(),
)
def test_requests_that_share_nothing_run_as_with_hashes_of_their_own(
    jobs: Jobs, policy: tuple[str, dict[str, Any]], stages: int, blocks: int, ahead: bool
) -> None:
    alone = [(*job[:4], 0, job[5]) for job in jobs]
    hashed = sharing(alone)
    unhashed = replace(hashed, hashes=(None,) * len(alone))
    kind = deployment(policy[0], stages, blocks, budget=9, enable_prefix_caching=True, **policy[1])
    kind = with_async(kind, ahead)
    one, other = simulate(hashed, [kind]), simulate(unhashed, [kind])
    assert_same(one, other)
    for key in ("prefix_query_tokens", "prefix_hit_tokens", "prefix_evictions"):
        assert one.summary["replicas"][0][key] == other.summary["replicas"][0][key]


class Memory:
    """What the KV blocks hold: for each slot whose token, computed after what."""

    def __init__(self, jobs: Jobs, block_size: int) -> None:
        self.jobs = jobs
        self.block_size = block_size
        self.slots: dict[tuple[int, int], tuple[int, int]] = {}

    def token(self, request: Request, position: int) -> tuple[int, int]:
        """Equal for two requests exactly if all their tokens up to there are."""
        _, _, _, family, shared, _ = self.jobs[request.id]
        return (family if position < shared else 1000 + request.id, position)

    def run(self, batch: Batch, computed: dict[int, int]) -> None:
        """Write the tokens of a batch, then read each request's whole context."""
        for request, tokens in batch.entries:
            for position in range(computed[request.id], computed[request.id] + tokens):
                place, slot = divmod(position, self.block_size)
                self.slots[request.blocks[place], slot] = self.token(request, position)
        for request, tokens in batch.entries:
            for position in range(computed[request.id] + tokens):
                place, slot = divmod(position, self.block_size)
                assert self.slots.get((request.blocks[place], slot)) == self.token(request, position)


@random_examples(250)
@given(
    jobs=sharers,
    policy=st.sampled_from(SHARING_POLICIES),
    stages=st.sampled_from([1, 1, 2, 3]),
    blocks=st.integers(21, 60),
    budget=st.sampled_from([6, 9, 24]),
    ahead=st.booleans(),
)
def test_what_is_found_in_the_cache_has_been_computed(
    jobs: Jobs, policy: tuple[str, dict[str, Any]], stages: int, blocks: int, budget: int, ahead: bool
) -> None:
    hits, _ = play(jobs, policy, stages, blocks, budget, ahead and stages == 1)
    shared = [shared >= 4 for *_, shared, _ in jobs]
    assert sum(shared) > 1 or not any(hits[1:]) or any(count > 1 for count in hits)


def play(
    jobs: Jobs, policy: tuple[str, dict[str, Any]], stages: int, blocks: int, budget: int, ahead: bool
) -> tuple[list[int], Scheduler]:
    """Run requests step by step with every check; gives the tokens found in the cache at each admission."""
    name, options = policy
    kind = deployment(name, stages, blocks, budget=budget, enable_prefix_caching=True, **options)
    scheduler = with_async(kind, ahead).new_scheduler()
    memory = Memory(jobs, 4)
    requests = list(sharing(jobs).requests())
    hits: list[int] = []
    admit = scheduler.admit

    def admitting(request: Request, *arguments: Any) -> bool:
        admitted = admit(request, *arguments)
        if admitted:
            hits.append(request.num_computed_tokens)
        return admitted

    scheduler.admit = admitting  # type: ignore[method-assign]
    flying: deque[Batch] = deque()
    to_come = deque(requests)
    finished: list[Request] = []
    steps = 0
    while len(finished) < len(jobs):
        while to_come and (not flying or to_come[0].arrived_at <= 0.02 * steps):
            scheduler.add(to_come.popleft())
        while (batch := scheduler.schedule()) is not None:
            flying.append(batch)
            counted = scheduler.max_in_flight > 1
            memory.run(batch, {request.id: request.start - tokens * counted for request, tokens in batch.entries})
            scheduler.kv_cache.check_integrity(scheduler.running)
        assert flying, "nothing runs although requests are left"
        finished += scheduler.commit(flying.popleft())[0]
        scheduler.kv_cache.check_integrity(scheduler.running)
        steps += 1
    assert sorted(request.id for request in finished) == list(range(len(jobs)))
    assert all(request.num_output_tokens == request.output_tokens for request in requests)
    assert scheduler.kv_cache.num_used == 0
    return hits, scheduler


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("policy", SHARING_POLICIES, ids=str)
def test_there_are_hits_evictions_and_preemptions_in_such_runs(policy: tuple[str, dict[str, Any]], ahead: bool) -> None:
    rng = np.random.default_rng(0)
    jobs = [(0.1, int(p), int(o), i % 3, int(s), i % 2) for i, (p, o, s) in enumerate(
        zip(rng.integers(10, 40, 60), rng.integers(10, 39, 60), rng.integers(0, 60, 60), strict=True))]  # fmt: skip
    reserves = policy[0] in ("orca", "request_level")  # 20 blocks a request: nobody is preempted
    hits, scheduler = play(jobs, policy, 1, 70 if reserves else 26, 9, ahead)
    assert sum(hits) > 100
    assert scheduler.kv_cache.evictions > 10
    assert len(hits) > len(jobs) or reserves  # some were admitted again


def test_what_is_found_again_after_a_preemption_is_counted_apart(tmp_path: Path) -> None:
    jobs = [(0.01 * (i > 0), 20, 30, i % 3, 12, 0) for i in range(60)]
    kind = deployment("vllm", 1, 40, enable_prefix_caching=True)
    run = simulate(sharing(jobs), [kind], folder=tmp_path)
    summary, (replica,) = run.summary, run.summary["replicas"]
    assert summary["preemptions"] > 5
    assert summary["prefix_hit_tokens"] == run.requests["prefix_hit_tokens"].sum() > 0
    assert summary["prefix_hit_rate"] == summary["prefix_hit_tokens"] / run.requests["prompt_tokens"].sum()
    again = pd.read_parquet(tmp_path / "iterations.parquet")["prefix_hit_tokens"].sum() - summary["prefix_hit_tokens"]
    assert again == summary["prefix_resumed_hit_tokens"] > 0
    assert summary["peak_kv_utilization"] == replica["peak_kv_blocks"] / kind.new_scheduler().kv_cache.num_blocks
    assert 0.9 < summary["peak_kv_utilization"] <= 1


def test_the_steady_window_has_use_gaps_and_all_tokens_of_its_own(tmp_path: Path) -> None:
    jobs = [(0.02 * (i > 0), 20, 1 + i % 30, 0, 0, 0) for i in range(150)]
    kinds = [deployment("vllm", 2, 60), deployment("sarathi", 1, 60)]
    run, kept = simulate(sharing(jobs), kinds, folder=tmp_path), simulate(sharing(jobs), kinds)
    summary = run.summary
    (start, end), table = summary["steady_window_s"], pd.read_parquet(tmp_path / "iterations.parquet")
    assert table["start_s"].min() < start < end < table["start_s"].max()
    ends = (table["start_s"] + table["duration_s"]).clip(upper=end)
    busy = (ends - table["start_s"].clip(lower=start)).clip(lower=0).groupby([table["replica"], table["stage"]]).sum()
    found = [share for replica in summary["replicas"] for share in replica["steady_stage_utilization"]]
    assert found == pytest.approx((busy / (end - start)).tolist()) and len(found) == 3
    assert summary["steady_utilization"] == pytest.approx(np.mean(found))
    inside = table[(table["start_s"] >= start) & (table["start_s"] <= end) & (table["stage"] == 0)]
    assert summary["steady_total_token_throughput"] * (end - start) == pytest.approx(
        inside["num_tokens"].sum(), rel=0.1
    )
    assert 0 < summary["steady_p99_itl_ms"] <= summary["max_itl_ms"]
    assert summary["steady_mean_itl_ms"] != summary["mean_itl_ms"]
    steady = {key: value for key, value in summary.items() if key.startswith("steady") and key != "steady_window_s"}
    assert steady == pytest.approx({key: kept.summary[key] for key in steady}) and len(steady) > 20
