"""How the paper's engine counted: against runs worked out by hand, and fast-forward against single steps."""

import numpy as np
import pytest

from engine.engine_preset import names, preset
from engine.errors import InputError
from engine.scheduling.osdi24 import Osdi24Scheduler
from engine.scheduling.request import Request
from engine.specs import ParallelSpec, SchedulerSpec, catalog
from engine.workload.workload import Workload
from simulator.cluster import Deployment, deploy, simulate
from simulator.predictor.base import FixedTable


def toy(blocks: int = 64, late: bool = True, preempt: bool = False, policy: str = "vllm_v0", pp: int = 1) -> Deployment:
    """10 ms a token."""
    times = FixedTable([[0.01 * tokens for tokens in range(300)]] * pp)
    spec = SchedulerSpec(policy=policy, max_num_batched_tokens=256, max_num_seqs=8, max_model_len=256,
                         late_first_token=late, preempt_for_every_decode=preempt)  # fmt: skip
    return deploy("microsoft/phi-2", "a100", scheduler=spec, num_gpu_blocks_override=blocks, predictor=times,
                  parallel=ParallelSpec(pipeline_parallel_size=pp))  # fmt: skip


def test_the_first_token_is_an_iteration_late_and_the_wait_is_in_no_metric() -> None:
    # the second prompt (1 s) comes before the first request's first token
    two = Workload("two", np.array([0.0, 0.05]), np.array([10, 100]), np.array([3, 1]), 0)
    late, plain = (simulate(two, [toy(late=late)]) for late in (True, False))
    by_id = {name: values[np.argsort(late.requests["request_id"])] for name, values in late.requests.items()}
    assert by_id["output_tokens"].tolist() == [3, 1]
    assert by_id["first_token_s"] == pytest.approx([0.1, 1.1])  # the prompts' ends
    assert by_id["last_token_s"] == pytest.approx([1.1 + 0.02 + 0.01 + 0.01, 1.1 + 0.02])
    assert by_id["max_tbt_s"][0] == pytest.approx(0.01)  # not the second of waiting
    assert late.summary["max_itl_ms"] == pytest.approx(10)
    assert plain.summary["max_itl_ms"] == pytest.approx(1010)
    assert late.summary["total_output_tokens"] == 4


def test_a_decode_that_needs_no_block_preempts_too() -> None:
    # 15 + 31 tokens are 3 blocks of 16: all there are, and no decode needs one for a while
    two = Workload("two", np.array([0.0, 0.0]), np.array([14, 30]), np.array([2, 2]), 0)
    runs = {preempt: simulate(two, [toy(blocks=4, late=False, preempt=preempt)]) for preempt in (False, True)}
    assert {preempt: run.requests["preemptions"].sum() for preempt, run in runs.items()} == {False: 0, True: 0}
    # with one block less none is free when the decodes ask
    tight = {p: simulate(two, [deploy_without_watermark(3, p)]) for p in (False, True)}
    assert tight[False].requests["preemptions"].sum() == 0
    assert tight[True].requests["preemptions"].sum() > 0


def deploy_without_watermark(blocks: int, preempt: bool) -> Deployment:
    times = FixedTable([[0.01 * tokens for tokens in range(300)]])
    spec = SchedulerSpec(policy="sarathi", max_num_batched_tokens=256, max_num_seqs=8, max_model_len=256, watermark=0.0,
                         preempt_for_every_decode=preempt)  # fmt: skip
    return deploy("microsoft/phi-2", "a100", scheduler=spec, num_gpu_blocks_override=blocks, predictor=times)


@pytest.mark.parametrize("seed", range(6))
def test_fast_forward_is_the_same_as_single_steps(seed: int) -> None:
    rng = np.random.default_rng(seed)
    policy = ("sarathi", "vllm_v0", "chunked_only")[seed % 3]
    count = 20
    work = Workload("random", np.sort(rng.uniform(0, 3, count)), rng.integers(1, 120, count),
                    rng.integers(1, 60, count), 0)  # fmt: skip
    deployment = toy(blocks=(19, 24)[seed % 2], preempt=True, policy=policy, pp=1 + seed % 2)
    fast, slow = simulate(work, [deployment]), simulate(work, [deployment], repeats=False)
    assert fast.requests["preemptions"].sum() > 0 or seed % 2
    for name, values in fast.requests.items():
        assert np.array_equal(values, slow.requests[name], equal_nan=True), name


def test_only_the_papers_preset_counts_so_and_only_in_simulated_runs() -> None:
    counting = [name for name in names() if preset(name, catalog.device("a100")).scheduler.get("late_first_token")]
    assert counting == ["sarathi-osdi24"]
    deployment = deploy("mistralai/Mistral-7B-v0.1", "a100", engine="sarathi-osdi24")
    assert isinstance(deployment.new_scheduler(), Osdi24Scheduler)
    assert not isinstance(deployment.replica.new_scheduler(), Osdi24Scheduler)


def test_a_request_that_would_fill_every_block_is_refused() -> None:
    scheduler = toy(blocks=4, preempt=True).new_scheduler()
    with pytest.raises(InputError, match="needs one more to go on"):
        scheduler.check(Request(0, 0.0, 40, 20))


def test_a_lone_worker_of_ray_costs_a_message_too() -> None:
    osdi, eager = catalog.host_overhead("sarathi_osdi24"), catalog.host_overhead("eager")
    assert osdi.times(32, 4, 1) == osdi.times(32, 4, 2)
    assert osdi.times(32, 4, 1)[1] == pytest.approx(0.835e-3 + 4 * 69.5e-6 + 2.32e-3)
    assert eager.times(32, 4, 1) == eager.times(32, 4, 2)
