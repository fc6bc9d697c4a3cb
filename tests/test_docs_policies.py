"""Every policy that the documentation shows runs in the engine and in the simulator, where memory is short too."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_workers import LENGTHS, expected, serve
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from random_examples import random_examples
from random_runs import assert_same, deployment, workloads
from replaying import assert_same_times, composition, replay

from engine.scheduling.policies import POLICIES
from engine.scheduling.scheduler import Scheduler
from engine.workload.workload import Workload
from simulator.cluster import simulate

DOCS = Path(__file__).parents[1] / "docs"


def examples() -> dict[str, str]:
    """The code blocks of the documentation that add a policy, by the policy's name."""
    blocks = [
        block
        for page in sorted(DOCS.rglob("*.md"))
        for block in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.S)
    ]
    return {name: block for block in blocks for name in re.findall(r'POLICIES\["(\w+)"\] = ', block)}


@pytest.fixture(autouse=True, params=sorted(examples()))
def policy(request: pytest.FixtureRequest) -> Iterator[str]:
    before = dict(POLICIES)
    exec(compile(examples()[request.param], "docs", "exec"), {})
    yield request.param
    POLICIES.clear()
    POLICIES.update(before)


def test_there_are_such_examples() -> None:
    assert "shortest_first" in examples()


shared = random_examples(80, suppress_health_check=[HealthCheck.function_scoped_fixture])


@shared
@given(LENGTHS, st.integers(1, 3), st.integers(14, 30), st.booleans())
def test_the_engine_gives_every_request_its_tokens(
    policy: str, lengths: Any, stages: int, num_blocks: int, ahead: bool
) -> None:
    ahead = ahead and stages == 1
    served = serve(lengths, policy, stages, num_blocks, spec={"max_num_batched_tokens": 64}, async_scheduling=ahead)
    assert sorted(served.finished) == list(range(len(lengths)))
    for sequence, (_, prompt, output) in zip(served.sequences, lengths, strict=True):
        assert sequence.output == expected(sequence.tokens[:prompt], output)
    scheduler = Scheduler(served.driver.scheduler.spec, num_blocks, stages, async_scheduling=ahead)
    simulated, recorder = replay(lengths, served.recorder, scheduler)
    assert composition(simulated) == composition(served.batches)
    assert_same_times(recorder, served.recorder)


def test_memory_is_short_in_such_runs(policy: str) -> None:
    served = serve([(0.0, 20, 12)] * 4, policy, num_blocks=20, spec={"max_num_batched_tokens": 64})
    assert served.driver.scheduler.recomputed_tokens > 0


@shared
@given(requests=workloads, stages=st.sampled_from([1, 2]), blocks=st.integers(21, 60))
def test_the_simulator_repeats_what_it_steps(policy: str, requests: Any, stages: int, blocks: int) -> None:
    gaps, prompts, outputs = map(np.array, zip(*requests, strict=True))
    workload = Workload("random", np.cumsum(gaps).astype(float), prompts, outputs, 0)
    kind = deployment("vllm_v0", stages, blocks)
    kind = replace(kind, replica=replace(kind.replica, scheduler=replace(kind.scheduler, policy=policy)))
    assert_same(simulate(workload, [kind]), simulate(workload, [kind], repeats=False))
