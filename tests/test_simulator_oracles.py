"""The simulator against closed forms: queueing formulas, pipelines worked out on paper, and roofline bounds."""

from dataclasses import replace
from functools import cache
from math import ceil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_examples import random_examples

from engine.results.tables import Array
from engine.scheduling.request import BatchShape
from engine.specs import HostOverhead, Link, ModelSpec, NetworkSpec, ParallelSpec, SchedulerSpec, catalog
from engine.workload.workload import Workload
from profiler.operators import inventory
from simulator.cluster import Deployment, Run, deploy, simulate
from simulator.predictor.base import FixedTable, RuntimePredictor
from simulator.predictor.roofline import Roofline

NO_HOST = HostOverhead(name="none", iteration_s=0.0, sequence_s=0.0, layer_s=0.0, source="for tests")


def network(latency_s: float = 0.0, bandwidth: float = 1e18) -> NetworkSpec:
    link = Link(latency_s, bandwidth)
    return NetworkSpec(name="test", description="", gpus_per_node=64, node=link, internode=link, source="for tests")


def replica(predictor: RuntimePredictor, stages: int = 1, **limits: object) -> Deployment:
    """A replica with plenty of memory whose times come from `predictor`."""
    limits = {"max_model_len": 2048, "watermark": 0.0, **limits}
    return deploy(
        "microsoft/phi-2",
        "a100",
        parallel=ParallelSpec(pipeline_parallel_size=stages),
        scheduler=SchedulerSpec(**limits),  # type: ignore[arg-type]
        num_gpu_blocks_override=100_000,
        predictor=predictor,
    )


def workload(arrived: Array, prompts: int | Array, outputs: int | Array) -> Workload:
    count = len(arrived)
    prompt, output = (np.broadcast_to(np.asarray(tokens), count).astype(int) for tokens in (prompts, outputs))
    return Workload("test", np.asarray(arrived, float), prompt, output, 0)


def column(run: Run, name: str) -> Array:
    """A column of the requests, in order of arrival."""
    assert len(run.requests["request_id"]) > 0
    return run.requests[name][np.argsort(run.requests["request_id"])]


def poisson(rate: float, count: int, seed: int) -> Array:
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count))


def waits(arrived: Array, service: Array) -> Array:
    """Waiting times at one server, first come first served (Lindley 1952)."""
    wait = np.zeros(len(arrived))
    for i in range(1, len(arrived)):
        wait[i] = max(0.0, wait[i - 1] + service[i - 1] - (arrived[i] - arrived[i - 1]))
    return wait


# -- one request at a time: queueing theory ----------------------------------------------------------------------------

ONE_AT_A_TIME = {"max_num_seqs": 1, "max_num_batched_tokens": 1}
SECONDS = 0.01  # of a batch of one token


def mean_waits(load: float, outputs: str, seeds: int, count: int) -> Array:
    """Mean scheduling delay of `seeds` runs, each without its first tenth; mean output is 1 or 8 tokens."""
    means = []
    for seed in range(seeds):
        geometric = np.random.default_rng([seed, 1]).geometric(1 / 8, count)
        tokens = np.ones(count, int) if outputs == "one" else geometric
        rate = load / (SECONDS * (1 if outputs == "one" else 8))
        arrived = poisson(rate, count, seed)
        run = simulate(workload(arrived, 1, tokens), [replica(FixedTable([[0.0, SECONDS]]), **ONE_AT_A_TIME)])
        delay = column(run, "scheduled_s") - arrived
        np.testing.assert_allclose(delay, waits(arrived, tokens * SECONDS), atol=1e-6)  # each, not only the mean
        means.append(delay[count // 10 :].mean())
    return np.array(means)


def assert_mean(samples: Array, expected: float, within: float) -> None:
    """`expected` lies in the 99.9 % confidence interval of the samples' mean, and that is narrow enough to matter."""
    half = 4.6 * samples.std(ddof=1) / len(samples) ** 0.5  # Student's t for 10 samples or more
    assert half < within * expected
    assert samples.mean() == pytest.approx(expected, abs=half)


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_equal_requests_one_at_a_time_wait_as_in_m_d_1(load: float) -> None:
    """Pollaczek-Khinchine with a constant service time D: W = load * D / (2 (1 - load))."""
    assert_mean(mean_waits(load, "one", seeds=12, count=3000), load * SECONDS / (2 * (1 - load)), within=0.15)


@pytest.mark.parametrize("load", [0.5, 0.7])
def test_random_lengths_one_at_a_time_wait_as_in_m_g_1(load: float) -> None:
    """Geometric output lengths (nearly M/M/1): W = rate * E[S^2] / (2 (1 - load)), E[S^2] = D^2 (2 - p) / p^2."""
    p = 1 / 8
    rate = load * p / SECONDS
    expected = rate * SECONDS**2 * (2 - p) / p**2 / (2 * (1 - load))
    assert_mean(mean_waits(load, "geometric", seeds=12, count=3000), expected, within=0.2)


# -- replicas and routers ----------------------------------------------------------------------------------------------


@cache
def routed(router: str, load: float = 0.9, replicas: int = 3, count: int = 9000) -> tuple[Array, Array, Array]:
    """Arrivals, replica and delay of each of `count` requests."""
    arrived = poisson(replicas * load / SECONDS, count, seed=5)
    kind = replica(FixedTable([[0.0, SECONDS]]), **ONE_AT_A_TIME)
    run = simulate(workload(arrived, 1, 1), [kind] * replicas, router=router, seed=1)
    return arrived, column(run, "replica"), column(run, "scheduled_s") - arrived


def test_each_replica_is_a_queue_of_its_own() -> None:
    arrived, where, delay = routed("random")
    assert np.bincount(where).min() > 2700  # of 9000, in three about equal shares
    for each in range(3):
        mine = where == each
        np.testing.assert_allclose(delay[mine], waits(arrived[mine], np.full(mine.sum(), SECONDS)), atol=1e-6)


def test_round_robin_gives_each_replica_every_third_request() -> None:
    arrived, where, delay = routed("round_robin")
    assert where.tolist() == [i % 3 for i in range(9000)]
    for each in range(3):  # arrivals at a replica are Erlang-3, steadier than Poisson
        mine = np.arange(each, 9000, 3)
        np.testing.assert_allclose(delay[mine], waits(arrived[mine], np.full(len(mine), SECONDS)), atol=1e-6)


def test_better_routers_wait_less() -> None:
    """At 90 % load random routing is M/D/1, round robin Erlang-3/D/1, and joining the shortest queue beats both."""
    means = {name: routed(name)[2].mean() for name in ("random", "round_robin", "least_outstanding_requests")}
    assert means["random"] == pytest.approx(0.9 * SECONDS / (2 * 0.1), rel=0.35)
    assert means["round_robin"] < 0.6 * means["random"]
    assert means["least_outstanding_requests"] < 0.5 * means["random"]


def test_one_shared_queue_is_the_best_that_a_router_can_do() -> None:
    """Joining the shortest of R queues with equal service times is first come, first served on R servers (M/D/R)."""
    arrived, _, delay = routed("least_outstanding_requests")
    free = [0.0] * 3
    expected = []
    for now in arrived:
        start = max(now, min(free))
        free[free.index(min(free))] = start + SECONDS
        expected.append(start - now)
    assert delay.mean() >= np.mean(expected) - 1e-9
    assert delay.mean() <= 1.5 * np.mean(expected)


@pytest.mark.parametrize(
    ("router", "where"),
    [("least_outstanding_tokens", [0, 1, 1, 1, 1, 1]), ("least_outstanding_requests", [0, 1, 0, 1, 0, 1])],
)
def test_short_requests_pass_a_long_one_where_the_router_counts_tokens(router: str, where: list[int]) -> None:
    """All six come before the first batch ends; the first will make 500 tokens, the others 2."""
    outputs = np.array([500, 2, 2, 2, 2, 2])
    kind = replica(FixedTable([[0.0, SECONDS]]))
    run = simulate(workload(np.arange(6) * 0.001, 1, outputs), [kind] * 2, router=router)
    assert column(run, "replica").tolist() == where


# -- batches -----------------------------------------------------------------------------------------------------------


def test_a_batch_takes_its_prefill_and_then_its_decodes() -> None:
    """8 prompts of 10 tokens in one batch of 80 tokens, then 19 decodes of 8 tokens."""
    table = [0.001 * tokens + 0.02 for tokens in range(101)]
    run = simulate(
        workload(np.zeros(8), 10, 20), [replica(FixedTable([table]), max_num_seqs=8, max_num_batched_tokens=100)]
    )
    np.testing.assert_allclose(column(run, "first_token_s"), 0.1)
    np.testing.assert_allclose(column(run, "last_token_s"), 0.1 + 19 * 0.028)
    np.testing.assert_allclose(column(run, "max_tbt_s"), 0.028)
    assert run.summary["simulator"]["batches"] == 20
    assert run.summary["duration"] == pytest.approx(0.1 + 19 * 0.028)
    assert run.summary["output_throughput"] == pytest.approx(160 / 0.632)


@pytest.mark.parametrize(("policy", "ends"), [("request_level", [1, 2, 3]), ("sarathi", [1, 2, 3])])
def test_waves_of_full_batches(policy: str, ends: list[int]) -> None:
    """12 equal requests, 4 at a time: three waves of (prefill of 8 tokens, 9 decodes of 4), one after the other."""
    run = simulate(
        workload(np.zeros(12), 2, 10),
        [replica(FixedTable([[0.0, *([0.01] * 4), *([0.03] * 96)]]), policy=policy, max_num_seqs=4,
                 max_num_batched_tokens=100)],
    )  # fmt: skip
    np.testing.assert_allclose(column(run, "last_token_s"), np.repeat(ends, 4) * (0.03 + 9 * 0.01))


def test_a_chunked_prompt_stalls_decodes_by_a_chunk_and_a_whole_one_by_all_of_it() -> None:
    table = [0.001 * tokens for tokens in range(2000)]
    arrived = np.array([0.0, 0.1])
    longest = {}
    for policy, budget in (("sarathi", 100), ("vllm_v0", 2048)):
        kind = replica(FixedTable([table]), policy=policy, max_num_batched_tokens=budget, max_num_seqs=8)
        run = simulate(workload(arrived, np.array([10, 990]), np.array([400, 1])), [kind])
        longest[policy] = column(run, "max_tbt_s")[0]
    assert longest["sarathi"] == pytest.approx(0.1)  # 99 tokens of the prompt and the decode
    assert longest["vllm_v0"] == pytest.approx(0.991)  # all 990, then the decode


# -- pipelines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("send", [0.0, 0.004, 0.05])
@pytest.mark.parametrize("times", [[0.01], [0.01, 0.01], [0.02, 0.01, 0.03], [0.03, 0.01, 0.02, 0.01]])
def test_a_full_pipeline_is_as_fast_as_its_slowest_part(times: list[float], send: float) -> None:
    """One-batch requests, as many in flight as stages. The first leaves after the pipeline's length; from then on as
    many as are in flight leave in each round, which lasts as long as one passage or the slowest stage's work on all.
    """
    stages, count = len(times), 60
    passage = sum(times) + (stages - 1) * send
    slowest = max(times)
    kind = replica(FixedTable([[0.0, t] for t in times], send), stages, max_num_seqs=4, max_num_batched_tokens=4)
    run = simulate(workload(np.zeros(count), 4, 1), [kind])
    done = column(run, "last_token_s")
    np.testing.assert_allclose(done[:stages], passage + slowest * np.arange(stages))
    np.testing.assert_allclose(done[stages:] - done[:-stages], max(passage, stages * slowest))
    use = run.summary["replicas"][0]
    np.testing.assert_allclose(use["stage_bubbles"], [1 - count * t / done[-1] for t in times], atol=1e-9)
    np.testing.assert_allclose(use["stage_utilization"], [count * t / done[-1] for t in times], atol=1e-9)
    if send == 0.0:  # the last of them leaves (count - 1) rounds of the slowest stage after the first
        assert done[-1] == pytest.approx(passage + (count - 1) * slowest)


@pytest.mark.parametrize("send", [0.0, 0.004, 0.05])
@pytest.mark.parametrize("times", [[0.01, 0.01], [0.02, 0.01, 0.03]])
def test_decodes_in_a_pipeline_come_once_a_round(times: list[float], send: float) -> None:
    """As many requests as stages, each in a batch of its own: the time between tokens is one round."""
    stages = len(times)
    round_s = max(sum(times) + (stages - 1) * send, stages * max(times))
    kind = replica(FixedTable([[0.0, t] for t in times], send), stages, max_num_seqs=4, max_num_batched_tokens=4)
    run = simulate(workload(np.zeros(stages), 4, 300), [kind])
    tpot = (column(run, "last_token_s") - column(run, "first_token_s")) / 299
    np.testing.assert_allclose(tpot, round_s, rtol=1e-9)
    np.testing.assert_allclose(column(run, "max_tbt_s"), round_s, rtol=1e-9)


def test_a_lone_request_leaves_every_other_stage_idle() -> None:
    kind = replica(FixedTable([[0.0, 0.01], [0.0, 0.03]], 0.01), 2, max_num_seqs=4, max_num_batched_tokens=4)
    run = simulate(workload(np.array([2.0]), 4, 100), [kind])
    assert run.summary["duration"] == pytest.approx(100 * 0.05)  # both stages and the sending between
    assert run.summary["replicas"][0]["occupied_s"] == pytest.approx(5.0)  # it came at 2 s: not counted before
    np.testing.assert_allclose(run.summary["replicas"][0]["stage_bubbles"], [0.8, 0.4])


def test_a_stage_idle_for_want_of_requests_is_no_bubble() -> None:
    kind = replica(FixedTable([[0.0, 0.01]]))
    run = simulate(workload(np.array([0.0, 10.0]), 4, 50), [kind])
    use = run.summary["replicas"][0]
    assert use["occupied_s"] == pytest.approx(1.0)
    assert use["stage_bubbles"] == pytest.approx([0.0])
    assert use["stage_utilization"] == pytest.approx([1.0 / 10.5])


# -- determinism -------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    arrived = poisson(20.0, 300, seed=0)
    lengths = np.random.default_rng(1).integers(1, 300, (2, 300))
    files = {}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        folder = tmp_path / name
        folder.mkdir()
        kind = deploy("microsoft/phi-2", "a100", parallel=ParallelSpec(pipeline_parallel_size=2))
        simulate(workload(arrived, *lengths), [kind] * 2, router="random", seed=seed, folder=folder)
        files[name] = [(folder / f"{table}.parquet").read_bytes() for table in ("requests", "iterations")]
    assert files["a"] == files["b"]
    assert files["a"][0] != files["c"][0]  # the router's seed matters, so the files do hold the run


# -- the roofline ------------------------------------------------------------------------------------------------------

A100 = replace(catalog.device("a100"), clock_hz=1e18)  # whose launches take no time
MODELS = ["mistralai/Mistral-7B-v0.1", "meta-llama/Llama-2-7b-hf", "microsoft/phi-2", "tiiuae/falcon-180B"]


def roofline(name: str, tp: int = 1, pp: int = 1, net: NetworkSpec | None = None) -> Roofline:
    parallel = ParallelSpec(tensor_parallel_size=tp, pipeline_parallel_size=pp)
    return Roofline(catalog.model(name), A100, net or network(), parallel, NO_HOST)


def shape_of(decodes: int, kv: int, prefills: list[tuple[int, int]], completing: int = 0) -> BatchShape:
    """`decodes` requests with `kv` cached tokens each (their own included), and chunks, `completing` of which end."""
    tokens = decodes + sum(chunk for chunk, _ in prefills)
    return BatchShape(tokens, decodes, decodes * kv, tuple(prefills), decodes + completing, decodes)


shapes = st.builds(
    lambda decodes, kv, prefills: shape_of(max(decodes, not prefills), kv, prefills, len(prefills)),
    st.integers(0, 128),
    st.integers(1, 4000),
    st.lists(st.tuples(st.integers(1, 1500), st.integers(0, 6000)), max_size=3),
)


def seconds(predictor: Roofline, shape: BatchShape) -> float:
    return sum(predictor.stage_time(shape, stage) for stage in range(len(predictor.stages)))


@random_examples(100)
@given(name=st.sampled_from(MODELS), tp=st.sampled_from([1, 2, 4]), pp=st.sampled_from([1, 2, 3]), shape=shapes)
def test_no_batch_beats_the_data_sheet(name: str, tp: int, pp: int, shape: BatchShape) -> None:
    """Every weight is read once, every cached key and value once, and every FLOP done, by all GPUs together."""
    model = catalog.model(name)
    head = model.vocab_size * model.hidden_size
    window = model.sliding_window or 10**9
    attended = shape.decode_kv_tokens
    cached = attended
    for chunk, prefix in shape.prefills:
        attended += sum(min(prefix + i, window) for i in range(1, chunk + 1))
        cached += min(prefix + chunk, window)
    read = 2 * model.matmul_parameters + model.kv_bytes_per_token * cached
    flops = 2 * (model.matmul_parameters - head) * shape.num_tokens + 2 * head * shape.num_sampled
    flops += 4 * model.q_size * model.num_layers * attended
    time = seconds(roofline(name, tp, pp), shape)
    gpus = tp  # the stages take turns
    assert time >= read / gpus / A100.memory_bandwidth
    assert time >= flops / gpus / A100.peak_flops
    if tp == 1:  # and it is not far above what the stated efficiencies allow, activations included
        bound = flops / A100.peak_flops / min(A100.matmul_efficiency, A100.attention_efficiency)
        bound += read / A100.memory_bandwidth / A100.bandwidth_efficiency
        moved = 4 * shape.num_tokens * model.num_layers * (40 * model.hidden_size + 8 * model.intermediate_size)
        assert time <= 1.5 * (bound + moved / A100.memory_bandwidth)


@pytest.mark.parametrize("name", MODELS[:3])
def test_one_decode_takes_the_time_to_read_the_weights(name: str) -> None:
    model = catalog.model(name)
    read = 2 * model.matmul_parameters / (A100.memory_bandwidth * A100.bandwidth_efficiency)
    assert seconds(roofline(name), shape_of(1, 1, [])) == pytest.approx(read, rel=0.01)


@pytest.mark.parametrize("name", MODELS[:3])
def test_a_long_prefill_takes_the_time_of_its_flops(name: str) -> None:
    model = catalog.model(name)
    head = model.vocab_size * model.hidden_size
    flops = 2 * (model.matmul_parameters - head) * 2048 / (A100.peak_flops * A100.matmul_efficiency)
    flops += 4 * model.q_size * model.num_layers * (2048 * 2049 // 2) / (A100.peak_flops * A100.attention_efficiency)
    time = seconds(roofline(name), shape_of(0, 0, [(2048, 0)]))
    assert flops < time < 1.25 * flops


@pytest.mark.parametrize("name", MODELS[:3])
def test_only_a_prompts_last_chunk_pays_for_the_lm_head(name: str) -> None:
    """And for one row of it, which takes as long as reading its weights."""
    model, predictor = catalog.model(name), roofline(name)
    more = seconds(predictor, shape_of(0, 0, [(512, 0)], 1)) - seconds(predictor, shape_of(0, 0, [(512, 0)], 0))
    read = 2 * model.vocab_size * model.hidden_size / (A100.memory_bandwidth * A100.bandwidth_efficiency)
    assert more == pytest.approx(read, rel=0.01)


@pytest.mark.parametrize("name", MODELS[:3])
def test_each_cached_token_costs_its_bytes(name: str) -> None:
    model, predictor = catalog.model(name), roofline(name)
    more = seconds(predictor, shape_of(32, 2000, [])) - seconds(predictor, shape_of(32, 1000, []))
    expected = 32 * 1000 * model.kv_bytes_per_token / (A100.memory_bandwidth * A100.bandwidth_efficiency)
    assert more == pytest.approx(expected, rel=1e-6)


@random_examples(100)
@given(
    name=st.sampled_from(MODELS),
    tp=st.sampled_from([1, 2]),
    shape=shapes,
    decodes=st.integers(0, 20),
    kv=st.integers(0, 500),
    chunk=st.integers(0, 200),
    prefix=st.integers(0, 500),
)
def test_more_work_never_takes_less_time(  # type: ignore[no-untyped-def]
    name, tp, shape, decodes, kv, chunk, prefix
) -> None:
    predictor = roofline(name, tp)
    time = seconds(predictor, shape)
    n, old_decodes, old_kv, prefills, sampled, growth = shape
    more = BatchShape(n + decodes, old_decodes + decodes, old_kv + decodes + kv, prefills, sampled + decodes, growth)
    assert seconds(predictor, more) >= time
    if prefills:
        (first, before), *others = prefills
        longer = BatchShape(n + chunk, old_decodes, old_kv, ((first + chunk, before), *others), sampled, growth)
        assert seconds(predictor, longer) >= time
        later = BatchShape(n, old_decodes, old_kv, ((first, before + prefix), *others), sampled, growth)
        assert seconds(predictor, later) >= time


@random_examples(100)
@given(name=st.sampled_from(MODELS), shape=shapes, repeats=st.integers(1, 8))
def test_times_of_repeats_are_the_times_one_by_one(name: str, shape: BatchShape, repeats: int) -> None:
    predictor = roofline(name, 2, 2)
    for stage in (0, 1):
        one_by_one = [predictor.stage_time(shape.after(i), stage) for i in range(repeats)]
        assert predictor.stage_times(shape, stage, repeats) == one_by_one


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [shape_of(1, 1000, []), shape_of(64, 1000, []), shape_of(0, 0, [(4096, 0)])])
def test_two_gpus_and_a_free_network_take_half_the_time(name: str, shape: BatchShape) -> None:
    ratio = seconds(roofline(name, tp=2), shape) / seconds(roofline(name), shape)
    assert 0.5 <= ratio < 0.54  # norms and residuals are done on both


def test_a_sliding_window_bounds_what_attention_costs() -> None:
    windowed, full = roofline("mistralai/Mistral-7B-v0.1"), roofline("mistralai/Mistral-7B-Instruct-v0.2")
    model = catalog.model("mistralai/Mistral-7B-v0.1")
    assert model.sliding_window == 4096
    at = {prefix: seconds(windowed, shape_of(0, 0, [(512, prefix)])) for prefix in (0, 3000, 4096, 8192, 30000)}
    assert at[0] < at[3000] < at[4096] == at[8192] == at[30000]
    for prefix in (0, 3000):  # below the window it makes no difference
        assert at[prefix] == seconds(full, shape_of(0, 0, [(512, prefix)]))
    assert seconds(full, shape_of(0, 0, [(512, 30000)])) > 1.5 * at[30000]


@pytest.mark.parametrize("name", ["mistralai/Mistral-7B-v0.1", "meta-llama/Llama-2-7b-hf"])
@pytest.mark.parametrize(("chunk", "prefix"), [(1000, 0), (700, 3800), (5000, 0), (2000, 6000)])
def test_causal_attention_is_counted_pair_by_pair(name: str, chunk: int, prefix: int) -> None:
    model = catalog.model(name)
    window = model.sliding_window or 10**9
    pairs = sum(min(prefix + i, window) for i in range(1, chunk + 1))
    expected = 4 * pairs * model.q_size * model.num_layers / (A100.peak_flops * A100.attention_efficiency)
    assert roofline(name).stages[0].prefill_time(chunk, prefix) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "all_reduces"),
    [
        ("meta-llama/Llama-2-7b-hf", 2 * 32 + 1),  # after attention and after the MLP, and of the embedding
        ("tiiuae/falcon-180B", 80 + 1),  # attention and MLP side by side share one
        ("microsoft/phi-2", 32 + 1),
    ],
)
@pytest.mark.parametrize("pp", [1, 2])
def test_all_reduces_of_an_iteration(name: str, all_reduces: int, pp: int) -> None:
    """On a network whose every message takes 1 ms whatever its size: 2 (n - 1) steps each (ring, n = 2)."""
    shape = shape_of(4, 100, [])
    slow, free = (seconds(roofline(name, 2, pp, network(latency)), shape) for latency in (1e-3, 0.0))
    assert slow - free == pytest.approx(all_reduces * 2e-3)


def test_a_batch_is_sent_on_once_a_stage_with_its_activations() -> None:
    model = catalog.model("meta-llama/Llama-2-7b-hf")
    predictor = roofline(model.name, 2, 2, network(1e-4, 10e9))
    shape = shape_of(0, 0, [(1000, 0)])
    assert predictor.send_time(shape, 0) == pytest.approx(1e-4 + 1000 * 4096 * 2 / 10e9)
    assert predictor.send_time(shape, 1) == 0.0


def test_host_time_is_hidden_only_as_far_as_launches_go() -> None:
    model = catalog.model("microsoft/phi-2")
    shape = shape_of(10, 100, [])
    gpu = seconds(roofline(model.name), shape)
    for layer_s, expected in ((0.0, gpu), (1.0, 32.0)):  # 32 layers of 1 s to launch: the GPU waits
        host = HostOverhead(name="h", iteration_s=2.0, sequence_s=0.1, layer_s=layer_s, source="for tests")
        predictor = Roofline(model, A100, network(), ParallelSpec(), host)
        assert seconds(predictor, shape) == pytest.approx(expected + 2.0 + 10 * 0.1)


# -- the operator inventory --------------------------------------------------------------------------------------------


def each_shape() -> list[str]:
    """The catalog's models of one kind of layer, of each shape one; mixtures have tests of their own."""
    shapes = {replace(spec, name="", linear_dtype=None): name for name, spec in catalog.MODELS.items()}
    return [name for spec, name in shapes.items() if spec.experts is None and not spec.full_attention_layers]


@pytest.mark.parametrize("name", each_shape())
def test_the_gemms_of_all_ranks_are_the_models_matrices(name: str) -> None:
    cuts = [
        ParallelSpec(tensor_parallel_size=tp, pipeline_parallel_size=pp) for tp in (1, 2, 4, 8) for pp in (1, 2, 3, 8)
    ]
    for parallel in cuts:
        if parallel.fits(catalog.model(name)):
            assert_whole(catalog.model(name), parallel)


def assert_whole(model: ModelSpec, parallel: ParallelSpec) -> None:
    """All ranks' operators together are those of the model."""
    tp, pp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    operators = [op for stage in range(pp) for op in inventory(model, parallel, stage)]
    gemms = [op for op in operators if op.kind == "gemm"]
    multiplied = tp * sum(op.k * op.n * op.count for op in gemms)
    copies = max(1, tp // model.num_key_value_heads) - 1  # of each KV head, where there are more ranks than heads
    copied = copies * 2 * model.kv_size * model.hidden_size * model.num_layers
    padded = model.hidden_size * (tp * ceil(model.vocab_size / tp) - model.vocab_size)
    assert multiplied == model.matmul_parameters + copied + padded
    for kind in ("attention_prefill", "attention_decode"):
        heads = [op.num_heads * tp * op.head_dim for op in operators if op.kind == kind]
        assert heads == [model.q_size] * pp
        assert sum(op.count for op in operators if op.kind == kind) == model.num_layers
        assert {op.sliding_window for op in operators if op.kind == kind} == {model.sliding_window}
    assert sum(op.name == "lm_head" for op in operators) == 1
    assert sum(op.kind == "send" for op in operators) == pp - 1
    assert any(op.kind == "all_reduce" for op in operators) == (tp > 1)


def test_an_inventory_names_each_operator_once() -> None:
    for model in catalog.MODELS.values():
        names = [op.name for op in inventory(model, ParallelSpec(), 0)]
        assert len(set(names)) == len(names) > 10
        narrow = replace(model, rotary_fraction=0.0)
        assert "rotary" not in [op.name for op in inventory(narrow, ParallelSpec(), 0)]


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), 0.0, -0.01])
@pytest.mark.parametrize("stages", [1, 2])
def test_times_that_are_no_times_stop_the_run(seconds: float, stages: int) -> None:
    class Broken(RuntimePredictor):
        description = "a broken predictor"

        def stage_time(self, shape: BatchShape, stage: int) -> float:
            return 0.01 if shape.prefills or stage < stages - 1 else seconds

    parallel = ParallelSpec(pipeline_parallel_size=stages)
    replica = deploy("microsoft/phi-2", "a100", parallel=parallel, predictor=Broken())
    with pytest.raises(ValueError, match="a broken predictor"):
        simulate(Workload("two", np.zeros(2), np.array([9, 9]), np.array([5, 5]), 0), [replica])
