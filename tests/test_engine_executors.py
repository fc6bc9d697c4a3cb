"""The engine as a whole, on the CPU: tokens of transformers' own, however requests are batched and ranks are laid out.

Every proof here runs real checkpoints through real executors.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import checkpoints
import numpy as np
import pytest
import strange_ranks
import torch
from replaying import assert_same_times, composition, replay
from serving import LENGTHS, MAX_LEN, Oracle, Served, assert_varied, serve

from engine.executors import multiprocess
from engine.executors.start import start
from engine.runtime.executor import Executor, SamplingParams
from engine.scheduling.policies import POLICIES

GetOracle = Callable[..., Oracle]
GetExecutor = Callable[..., Executor]
RESERVING = ("orca", "request_level")  # of all memory they might need: they never preempt
SAMPLINGS = [  # one for each of LENGTHS
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=0.7, top_k=20, seed=2),
    SamplingParams(temperature=1.5, top_p=0.9, seed=3),
    SamplingParams(temperature=1.0),  # its seed comes from the driver's
    SamplingParams(),
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> GetOracle:
    known: dict[str, Oracle] = {}

    def get(name: str = "llama") -> Oracle:
        if name not in known:
            known[name] = Oracle(tmp_path_factory.mktemp(name), name)
        return known[name]

    return get


@pytest.fixture(scope="module")
def executor(oracle: GetOracle) -> Iterator[GetExecutor]:
    """The executor of a checkpoint over tp * pp ranks; the last one lives on until another is asked for."""
    alive: dict[tuple[str, int, int], Executor] = {}

    def get(name: str = "llama", tp: int = 1, pp: int = 1) -> Executor:
        if (name, tp, pp) not in alive:
            for other in alive.values():
                other.close()
            alive.clear()
            alive[name, tp, pp] = start(oracle(name).engine_spec(tp, pp, keep_logits=True))
        return alive[name, tp, pp]

    yield get
    for last in alive.values():
        last.close()


def assert_logits(served: Served, oracle: Oracle) -> None:
    """The logits that every token was sampled from, against those of transformers for the same tokens."""
    assert all(result.logits is not None for result in served.results)
    rows = np.concatenate([result.logits for result in served.results if result.logits is not None])
    assert rows.shape == (sum(count for _, count in LENGTHS), checkpoints.VOCABULARY)
    with torch.no_grad():
        wanted = [oracle.model(torch.tensor([s.tokens])).logits[0].numpy() for s in served.sequences]
    for row, request, length in zip(rows, served.sampled, served.lengths, strict=True):
        expected = wanted[request][length - 1]
        assert np.abs(row - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("name", checkpoints.CONFIGS)
def test_every_family_gives_the_tokens_of_transformers(name: str, oracle: GetOracle, executor: GetExecutor) -> None:
    served = serve(executor(name), oracle(name))
    assert_varied(served)
    assert served.outputs == oracle(name).outputs
    assert_logits(served, oracle(name))


def assert_cached_prefixes_change_nothing(served_by: Callable[..., Served], oracle: Oracle) -> None:
    """Prompts that begin alike, those that go on from another's output among them: the tokens of transformers."""
    asked = []  # a prompt of the oracle's, and how many of its tokens of output the prompt has already
    for which, known in ((3, 0), (3, 4), (0, 0), (3, 0), (0, 5), (3, 6), (0, 0), (1, 0), (0, 7)):
        asked.append((oracle.prompts[which] + oracle.outputs[which][:known], oracle.outputs[which][known:]))
    prompts, outputs = [prompt for prompt, _ in asked], [output for _, output in asked]
    served = served_by(prompts=prompts, counts=[len(output) for output in outputs], prefix_caching=True)
    assert served.outputs == outputs
    assert served.driver.scheduler.prefix_hit_tokens >= 40
    assert any(sequence.request.prefix_hit_tokens >= 24 for sequence in served.sequences)


@pytest.mark.parametrize("name", checkpoints.CONFIGS)
def test_every_family_reads_prefixes_that_others_wrote(name: str, oracle: GetOracle, executor: GetExecutor) -> None:
    assert_cached_prefixes_change_nothing(lambda **asked: serve(executor(name), oracle(name), **asked), oracle(name))


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_reads_them(policy: str, oracle: GetOracle, executor: GetExecutor) -> None:
    for ahead in (False, True):

        def served_by(ahead: bool = ahead, **asked: Any) -> Served:
            return serve(executor(), oracle(), policy=policy, async_scheduling=ahead, **asked)

        assert_cached_prefixes_change_nothing(served_by, oracle())


@pytest.mark.parametrize(("name", "tp", "pp"), [("llama", 2, 1), ("mistral", 2, 2)])
def test_every_cut_reads_them(name: str, tp: int, pp: int, oracle: GetOracle, executor: GetExecutor) -> None:
    def served_by(**asked: Any) -> Served:
        return serve(executor(name, tp, pp), oracle(name), stages=pp, **asked)

    assert_cached_prefixes_change_nothing(served_by, oracle(name))


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_gives_them(policy: str, pp: int, oracle: GetOracle, executor: GetExecutor) -> None:
    served = serve(executor(pp=pp), oracle(), policy=policy, stages=pp)
    assert (served.driver.scheduler.recomputed_tokens > 0) == (policy not in RESERVING)
    assert served.outputs == oracle().outputs
    assert all(sequence.finish_reason == "length" for sequence in served.sequences)


@pytest.mark.parametrize(
    ("name", "tp", "pp"),
    [("llama", 2, 1), ("llama", 1, 2), ("mistral", 2, 2), ("falcon_new", 4, 1), ("qwen3_moe", 2, 2)],
)
def test_every_cut_gives_them(name: str, tp: int, pp: int, oracle: GetOracle, executor: GetExecutor) -> None:
    """mistral's window is shorter than the prompts; falcon_new has fewer KV heads than there are ranks; qwen3_moe's
    second layer has no experts.
    """
    served = serve(executor(name, tp, pp), oracle(name), stages=pp)
    assert_varied(served)
    assert served.outputs == oracle(name).outputs
    assert_logits(served, oracle(name))
    for result in served.results:
        assert [time.rank for time in result.times] == list(range(tp * pp))
        assert all(time.start <= time.end for time in result.times)


@pytest.mark.parametrize("tp", [1, 2])
def test_scheduling_ahead_gives_them(tp: int, oracle: GetOracle, executor: GetExecutor) -> None:
    served = serve(executor(tp=tp), oracle(), async_scheduling=True)
    assert_varied(served)
    assert served.outputs == oracle().outputs


# -- sampling ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sampled(oracle: GetOracle, executor: GetExecutor) -> list[list[int]]:
    """What one rank samples with SAMPLINGS, nobody preempted."""
    served = serve(executor(), oracle(), sampling=SAMPLINGS, num_blocks=48)
    assert served.driver.scheduler.recomputed_tokens == 0
    differs = [ours != greedy for ours, greedy in zip(served.outputs, oracle().outputs, strict=True)]
    assert differs == [True, True, True, True, False]
    return served.outputs


@pytest.mark.parametrize(
    ("tp", "pp", "policy"), [(1, 1, "sarathi"), (1, 1, "vllm_v0"), (2, 1, "hybrid_only"), (1, 2, "chunked_only")]
)
def test_a_seed_gives_its_tokens_whatever_ranks_policy_and_preemption(
    tp: int, pp: int, policy: str, sampled: list[list[int]], oracle: GetOracle, executor: GetExecutor
) -> None:
    served = serve(executor(tp=tp, pp=pp), oracle(), sampling=SAMPLINGS, policy=policy, stages=pp)
    assert served.driver.scheduler.recomputed_tokens > 0
    assert served.outputs == sampled


def test_another_seed_gives_other_tokens(sampled: list[list[int]], oracle: GetOracle, executor: GetExecutor) -> None:
    others = [replace(each, seed=None if each.seed is None else each.seed + 100) for each in SAMPLINGS]
    served = serve(executor(), oracle(), sampling=others, seed=1)
    differs = [ours != theirs for ours, theirs in zip(served.outputs, sampled, strict=True)]
    assert differs == [True, True, True, True, False]


@pytest.mark.parametrize(("tp", "pp", "ahead"), [(1, 1, False), (1, 1, True), (2, 1, True), (1, 2, False)])
def test_a_stop_token_ends_a_sequence(tp: int, pp: int, ahead: bool, oracle: GetOracle, executor: GetExecutor) -> None:
    outputs = oracle().outputs
    stop = [frozenset({outputs[0][3]}), frozenset(), frozenset({outputs[2][-1], outputs[2][4]}), frozenset({1000}),
            frozenset({outputs[4][0]})]  # fmt: skip
    served = serve(executor(tp=tp, pp=pp), oracle(), stages=pp, stop=stop, async_scheduling=ahead)
    wanted = []
    for output, ends in zip(outputs, stop, strict=True):
        at = next((i for i, token in enumerate(output) if token in ends), len(output) - 1)
        wanted.append(output[: at + 1])
    assert served.outputs == wanted
    reasons = [sequence.finish_reason for sequence in served.sequences]
    assert reasons == ["stop", "length", "stop", "length", "stop"]
    assert [len(output) for output in wanted] != [count for _, count in LENGTHS]


# -- time --------------------------------------------------------------------------------------------------------------


# scheduling does not know how many ranks share a layer: one policy over two of them stands for all
REPLAYED = [
    *((policy, 1, pp, ahead) for policy in POLICIES for pp, ahead in ((1, False), (2, False), (1, True))),
    ("sarathi", 2, 1, True),
]


@pytest.mark.parametrize(("policy", "tp", "pp", "ahead"), sorted(REPLAYED, key=lambda each: each[1:]))
def test_the_simulator_replays_a_run_in_real_time(
    policy: str, tp: int, pp: int, ahead: bool, oracle: GetOracle, executor: GetExecutor
) -> None:
    rng = np.random.default_rng(5)
    arrivals = [0.0, *np.cumsum(rng.exponential(0.2 / 16, 15)).tolist()]
    lengths = [(at, int(rng.integers(1, 31)), int(rng.integers(1, 14))) for at in arrivals]
    prompts = [rng.integers(checkpoints.VOCABULARY, size=prompt).tolist() for _, prompt, _ in lengths]
    served = serve(executor(tp=tp, pp=pp), oracle(), policy=policy, stages=pp, prompts=prompts, arrivals=arrivals,
                   counts=[count for _, _, count in lengths], async_scheduling=ahead)  # fmt: skip
    assert len(served.batches) > 25
    simulated, recorder = replay(lengths, served.recorder, served.new_scheduler())
    assert composition(simulated) == composition(served.batches)
    assert_same_times(recorder, served.recorder)


def test_pipeline_stages_work_at_the_same_time(oracle: GetOracle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocess, "_run_rank", strange_ranks.takes_its_time)
    mine = start(oracle().engine_spec(pp=2))
    try:
        served = serve(mine, oracle(), stages=2)
    finally:
        mine.close()
    assert served.outputs == oracle().outputs
    first, second = ([result.times[stage] for result in served.results] for stage in (0, 1))
    overlaps = [a.start < b.end and b.start < a.end for a, b in zip(first[1:], second, strict=False)]
    assert len(overlaps) > 10
    assert any(overlaps)


@pytest.mark.parametrize("tp", [1, 2])
def test_collections_pass_over_what_a_start_leaves(tp: int, oracle: GetOracle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocess, "_run_rank", strange_ranks.has_frozen_its_start)
    monkeypatch.setattr("engine.runtime.executor.gc", gc)  # not that of conftest
    gc.unfreeze()  # what another executor left
    mine = start(oracle().engine_spec(tp))
    try:
        assert gc.get_freeze_count() > 10_000
        assert serve(mine, oracle()).outputs == oracle().outputs
    finally:
        mine.close()
    assert gc.get_freeze_count() == 0


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_the_number_of_blocks_is_found(tp: int, pp: int, oracle: GetOracle) -> None:
    mine = start(oracle().engine_spec(tp, pp, num_blocks=None))
    try:
        assert 4 * MAX_LEN // 4 <= mine.num_blocks <= 1000  # as many tokens as four requests have, not all the memory
        served = serve(mine, oracle(), stages=pp, num_blocks=mine.num_blocks)
        assert served.outputs == oracle().outputs
    finally:
        mine.close()


def test_the_rank_with_the_least_memory_decides(oracle: GetOracle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocess, "_run_rank", strange_ranks.has_room_by_rank)
    mine = start(oracle().engine_spec(2, 2, num_blocks=None))
    try:
        assert mine.num_blocks == 28
        assert serve(mine, oracle(), stages=2, num_blocks=28).outputs == oracle().outputs
    finally:
        mine.close()
