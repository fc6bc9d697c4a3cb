"""Mixtures of experts: a layer's operators, how tokens spread, what is read and computed, and what is learned."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import InputError
from engine.replica_spec import resolve
from engine.runtime.engine_spec import EngineSpec
from engine.scheduling.request import BatchShape
from engine.specs import ExpertsSpec, ModelSpec, ParallelSpec, catalog, memory
from engine.specs.model import EXPERT_LOADS
from profiler.expert_kinds import AllGather, AllToAll, Experts, ReduceScatter
from profiler.expert_load import deal, loads, padded, touched
from profiler.importers import read_source
from profiler.kind import Operator
from profiler.kinds import Gemm
from profiler.operators import inventory
from simulator.cluster import deploy
from simulator.predictor import experts as estimator
from simulator.predictor.kind import Site
from simulator.predictor.roofline import Roofline
from windtunnel.settings import ReplicaConfig

QWEN = ModelSpec(
    name="Qwen3-30B-A3B", model_type="qwen3_moe", num_layers=48, hidden_size=2048, intermediate_size=6144,
    num_attention_heads=32, num_key_value_heads=4, head_dim=128, vocab_size=151936, max_position_embeddings=40960,
    qk_norm=True, experts=ExpertsSpec(num_experts=128, top_k=8, intermediate_size=768),
)  # fmt: skip
H100 = catalog.device("h100")
NETWORK = catalog.network("nvswitch_h100")
SHARED = Path("/work/shared/data/aiconfigurator")


def ops(model: ModelSpec, **parallel: object) -> dict[str, Operator]:
    cut = ParallelSpec(**parallel)  # type: ignore[arg-type]
    return {op.name: op for op in inventory(model, cut, 0)}


def decode(requests: int, kv_tokens: int) -> BatchShape:
    return BatchShape(requests, requests, kv_tokens, (), requests, requests)


def prompt(tokens: int) -> BatchShape:
    return BatchShape(tokens, 0, 0, ((tokens, 0),), 1, 0)


# -- operators ---------------------------------------------------------------------------------------------------------


def test_matrices_of_an_inventory_are_the_models() -> None:
    """What one rank multiplies with, experts included, is every matrix of the model once."""
    for model in (QWEN, replace(QWEN, experts=replace(QWEN.experts, dense_layers=(0, 3)))):  # type: ignore[type-var]
        every = inventory(model, ParallelSpec(), 0)
        plain = sum(op.count * op.k * op.n for op in every if isinstance(op, Gemm))
        mixed = sum(op.count * op.local_experts * op.matrices * op.hidden * op.width
                    for op in every if isinstance(op, Experts))  # fmt: skip
        norms = model.num_layers * (2 * 2048 + 2 * 128) + 2048
        assert plain + mixed + 151936 * 2048 + norms == model.num_parameters


def test_dense_layers_stand_between() -> None:
    some = ops(replace(QWEN, experts=replace(QWEN.experts, dense_layers=(0, 3))))  # type: ignore[type-var]
    assert (some["experts"].count, some["router"].count, some["mlp_down_proj"].count) == (46, 46, 2)
    assert "mlp_down_proj" not in ops(QWEN) and ops(QWEN)["qk_norm"].count == 48


def test_shared_experts_run_beside() -> None:
    shared = replace(QWEN, experts=replace(QWEN.experts, shared_intermediate_size=1024, shared_gate=True))  # type: ignore[type-var]
    found = ops(shared, tensor_parallel_size=2)
    assert (found["shared_gate_up_proj"].n, found["shared_down_proj"].k) == (1024, 512)  # type: ignore[attr-defined]
    assert "shared_down_proj" not in ops(QWEN)


@pytest.mark.parametrize(
    ("tp", "dp", "ep", "width", "local"),
    [(4, 1, 1, 192, 128), (4, 1, 4, 768, 32), (1, 4, 4, 768, 32), (2, 4, 4, 384, 32), (2, 4, 8, 768, 16)],
)
def test_experts_are_cut_by_width_and_by_expert(tp: int, dp: int, ep: int, width: int, local: int) -> None:
    cut = ParallelSpec(tensor_parallel_size=tp, data_parallel_size=dp, expert_parallel_size=ep)
    assert cut.expert_tensor_size * cut.expert_parallel_size == tp * dp
    found = {op.name: op for op in inventory(QWEN, cut, 0)}
    mine = found["experts"]
    assert isinstance(mine, Experts) and (mine.width, mine.local_experts, mine.replicas) == (width, local, dp)
    assert isinstance(found.get("expert_all_gather"), AllGather) == (dp > 1)
    assert isinstance(found.get("expert_reduce_scatter"), ReduceScatter) == (dp > 1)
    assert ("mlp_all_reduce" in found) == (tp > 1)
    ranks = tp * dp
    held = memory.weight_bytes(QWEN, cut, 0) - memory.weight_bytes(
        replace(QWEN, experts=replace(QWEN.experts, intermediate_size=1 * cut.expert_tensor_size)), cut, 0  # type: ignore[type-var]
    )  # fmt: skip
    every = 48 * 128 * 3 * 2048
    assert held == 2 * every * (768 - cut.expert_tensor_size) // ranks


def test_an_exchange_by_expert_sends_a_row_to_the_ranks_that_have_its_experts() -> None:
    cut = {"data_parallel_size": 8, "expert_parallel_size": 8, "expert_exchange": "all_to_all"}
    found = ops(QWEN, **cut)
    there = found["expert_dispatch"]
    assert isinstance(there, AllToAll) and there.num_ranks == 8
    assert there.copies == pytest.approx(7 * (1 - (7 / 8) ** 8))  # of 8 chosen experts, on 8 ranks
    assert "expert_all_gather" not in found


@pytest.mark.parametrize(
    ("model", "cut", "said"),
    [
        (QWEN, {"expert_parallel_size": 3}, "does not divide the 1 ranks"),
        (QWEN, {"tensor_parallel_size": 4, "data_parallel_size": 64, "expert_parallel_size": 256}, "128 experts"),
        (QWEN, {"data_parallel_size": 2, "expert_exchange": "all_to_all"}, "whole experts on every rank"),
        (catalog.model("phi-2"), {"data_parallel_size": 2}, "has no experts to share .* give more replicas"),
    ],
)
def test_cuts_that_can_not_be_are_refused(model: ModelSpec, cut: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        ParallelSpec(**cut).validate(model)  # type: ignore[arg-type]


def test_replicas_that_share_experts_are_said_to() -> None:
    settings = ReplicaConfig(model="Qwen3-30B-A3B", device="h100", tensor_parallel_size=2, data_parallel_size=2,
                             enable_expert_parallel=True)  # fmt: skip
    cut = settings.parallel_spec()
    assert (str(cut), cut.expert_parallel_size) == ("TP2-PP1-DP2-EP4", 4)
    replica = resolve("Qwen3-30B-A3B", "h100", parallel=cut)
    assert any("2 such replicas share the experts" in note for note in replica.notes())
    with pytest.raises(InputError, match="TP2-PP1-DP2-EP4: the engine cuts experts by width"):
        EngineSpec.of(replica.with_blocks(9), folder=None)


# -- how tokens spread -------------------------------------------------------------------------------------------------


@given(
    load=st.sampled_from(EXPERT_LOADS),
    tokens=st.integers(1, 5000),
    shape=st.sampled_from([(8, 2), (128, 8), (512, 22)]),
    ranks=st.sampled_from([1, 2, 8]),
)
def test_every_choice_lands_and_no_expert_gets_a_token_twice(
    load: str, tokens: int, shape: tuple[int, int], ranks: int
) -> None:
    num_experts, top_k = shape
    spread = loads(load, tokens, num_experts, top_k, ranks)
    assert len(spread) == num_experts // ranks and (np.diff(spread) <= 1e-9).all()
    share = tokens * top_k / ranks
    assert spread.sum() == pytest.approx(share) if ranks == 1 else spread.sum() >= share - 1e-6
    assert spread.max() <= tokens * (1 + 1e-6) + 1 and 0 < touched(spread) <= len(spread)
    assert padded(spread, 16) >= spread.sum() - 1e-6


@pytest.mark.parametrize("load", EXPERT_LOADS)
@pytest.mark.parametrize(("tokens", "num_experts", "top_k"), [(1, 128, 8), (5, 6, 3), (7, 8, 8), (300, 8, 2)])
def test_tokens_are_dealt_as_the_load_has_it(load: str, tokens: int, num_experts: int, top_k: int) -> None:
    chosen = deal(loads(load, tokens, num_experts, top_k, 1), tokens, top_k)
    assert chosen.shape == (tokens, top_k)
    assert all(len(set(row)) == top_k for row in chosen.tolist())
    counts = np.sort(np.bincount(chosen.ravel(), minlength=num_experts))[::-1]
    assert np.abs(counts - loads(load, tokens, num_experts, top_k, 1)).max() <= 1


def test_balanced_tokens_touch_each_expert_in_turn() -> None:
    assert [touched(loads("balanced", tokens, 128, 8, 1)) for tokens in (1, 4, 16, 100)] == [8, 32, 128, 128]
    assert touched(loads("power_law_1.2", 4, 128, 8, 1)) < 32
    skewed, even = (loads(load, 4096, 128, 8, 8).sum() for load in ("power_law_1.01", "balanced"))
    assert even == 4096 * 8 / 8 and 1.2 * even < skewed < 3 * even


# -- the roofline ------------------------------------------------------------------------------------------------------


def stage(model: ModelSpec, **parallel: object) -> Roofline:
    cut = ParallelSpec(**parallel)  # type: ignore[arg-type]
    return Roofline(model, H100, NETWORK, cut, resolve("phi-2", "h100", engine="vllm@0.15").engine.host)


def test_a_decode_reads_the_experts_that_it_touches_and_a_prompt_computes_top_k() -> None:
    roofline = stage(QWEN)
    seconds = [roofline.stage_time(decode(n, 100 * n), 0) for n in (1, 4, 16, 64)]
    every = 48 * 128 * 3 * 2048 * 768 * 2 / H100.memory_bandwidth
    assert seconds[0] < every / 3 and seconds[3] > every  # of a token 8 of 128, of 64 nearly all
    assert seconds == sorted(seconds)
    tokens = 16384
    flops = 2 * tokens * (QWEN.matmul_parameters - 151936 * 2048) + 2 * tokens**2 * QWEN.q_size * 48
    assert flops / H100.peak_flops < roofline.stage_time(prompt(tokens), 0) < 3 * flops / H100.peak_flops


def test_more_tokens_never_take_less_time() -> None:
    site = Site(H100, NETWORK, QWEN, 1, 0)
    rows = np.unique(np.geomspace(1, 60_000, 300).round())
    for load in EXPERT_LOADS:
        for dtype in ("bfloat16", "fp8", "fp8_block", "int4", "mxfp4"):
            op = Experts("experts", 1, hidden=2048, width=768, local_experts=16, num_experts=128, top_k=8, load=load,
                         dtype=dtype)  # fmt: skip
            seconds = estimator.Experts.roofline(op, site, rows)
            assert (np.diff(seconds) >= 0).all() and seconds[-1] > 1.5 * seconds[len(rows) * 4 // 5]


def test_replicas_that_share_experts_see_all_their_tokens() -> None:
    alone, shared = stage(QWEN), stage(QWEN, data_parallel_size=4, expert_parallel_size=4)
    assert shared.stage_time(decode(64, 6400), 0) < alone.stage_time(decode(64, 6400), 0)  # a quarter of the experts
    assert shared.stage_time(prompt(8192), 0) > alone.stage_time(prompt(8192), 0)  # busiest rank, and the exchange


def test_fp8_experts_take_less_and_so_does_an_fp8_cache() -> None:
    plain, quantised = stage(QWEN), stage(QWEN.quantized("fp8"))
    assert 0.4 < quantised.stage_time(decode(64, 640), 0) / plain.stage_time(decode(64, 640), 0) < 0.8
    dense = catalog.model("Meta-Llama-3-8B")
    int4 = stage(dense.quantized("int4"))
    ratio = int4.stage_time(decode(1, 10), 0) / stage(dense).stage_time(decode(1, 10), 0)
    assert 0.27 < ratio < 0.5  # the weights' quarter, and the LM head in 16 bits
    assert int4.stage_time(prompt(8192), 0) > stage(dense).stage_time(prompt(8192), 0)  # widened on the way


def test_windows_in_some_layers_bound_their_attention() -> None:
    gemma = replace(catalog.model("Meta-Llama-3-8B"), sliding_window=1024, full_attention_layers=tuple(range(0, 32, 4)))
    whole, none = (
        replace(gemma, full_attention_layers=()),
        replace(gemma, sliding_window=None, full_attention_layers=()),
    )
    shape = decode(8, 8 * 8000)
    some, full = stage(gemma).stage_time(shape, 0), stage(none).stage_time(shape, 0)
    capped = stage(whole).stage_time(decode(8, 8 * 1024), 0)  # what the scheduler counts where all layers have it
    assert some == pytest.approx(0.25 * full + 0.75 * capped, rel=1e-6)
    assert capped < stage(gemma).stage_time(prompt(8000), 0) < stage(none).stage_time(prompt(8000), 0)


# -- learned -----------------------------------------------------------------------------------------------------------


def table(sizes: list[tuple[int, int, int, int]], factor: float = 1.3) -> pd.DataFrame:
    """Rows of made-up times: `factor` times the roofline."""
    rows = []
    for hidden, width, local, top_k in sizes:
        for tokens in (1, 4, 16, 64, 256, 1024, 4096, 16384):
            rows.append({"kind": "moe", "operator": "experts", "expert_tokens": tokens, "hidden_size": hidden,
                         "expert_width": width, "local_experts": local, "num_experts": 128, "top_k": top_k,
                         "expert_load": "balanced", "dtype": "bfloat16", "device": H100.name})  # fmt: skip
    frame = pd.DataFrame(rows)
    model = estimator.Experts(H100)
    _, log_model, _ = model._features(model.columns_of(frame))
    return frame.assign(time_ms=1e3 * factor * np.exp(log_model))


def test_a_law_is_learned_and_carries_over_to_another_shape() -> None:
    shapes = [(hidden, width, local, 8) for hidden in (2048, 4096) for width in (256, 768) for local in (16, 64, 128)]
    frame = table(shapes)
    model = estimator.Experts(H100).fit(frame)
    other = table([(3072, 512, 32, 8)])
    assert model.seconds(model.columns_of(other)) == pytest.approx(other["time_ms"].to_numpy() / 1e3, rel=0.02)
    again = estimator.Experts.from_json(model.to_json(), H100)
    assert (again.seconds(again.columns_of(other)) == model.seconds(model.columns_of(other))).all()
    assert model.in_range(model.columns_of(frame)).all()
    assert not model.in_range({**model.columns_of(other), "dtype": np.array("fp8")}).any()
    op = ops(QWEN)["experts"]
    assert isinstance(op, Experts) and model.applies(op, Site(H100, NETWORK, QWEN, 1, 0))
    assert not model.applies(replace(op, dtype="fp8"), Site(H100, NETWORK, QWEN, 1, 0))
    times = model.times(op, Site(H100, NETWORK, QWEN, 1, 0), np.arange(1.0, 5000.0))
    assert (np.diff(times) >= 0).all()


def test_times_of_a_cache_are_no_times_of_a_model() -> None:
    frame = table([(2048, 768, 128, 8)])
    fast = frame.assign(time_ms=frame["time_ms"] / 10)
    assert len(estimator.Experts.usable(frame)) == len(frame)
    assert len(estimator.Experts.usable(fast)) < len(frame)
    assert estimator.Experts.usable(frame.assign(dtype="int3")).empty


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the public measurements")
def test_published_measurements_are_read_as_they_are() -> None:
    rows = read_source("aiconfigurator", SHARED / "a100_sxm" / "moe")
    row = rows[(rows["expert_tokens"] == 64) & (rows["hidden_size"] == 2048) & (rows["local_experts"] == 32)
               & (rows["expert_width"] == 768) & (rows["expert_load"] == "power_law_1.2")]  # fmt: skip
    assert len(row) == 1 and set(rows["dtype"]) == {"bfloat16"}
    model = estimator.Experts(catalog.device("a100_sxm"))
    roofline = np.exp(model._features(model.columns_of(rows))[1])
    assert 1.0 < np.median(rows["time_ms"] / 1e3 / roofline) < 2.0


def test_what_ships_predicts_a_mixture_and_says_what_it_estimates() -> None:
    replica = deploy("Qwen3-30B-A3B", "a100_sxm", parallel=ParallelSpec(tensor_parallel_size=2))
    times = [replica.predictor.stage_time(prompt(tokens), 0) for tokens in (1, 64, 1024, 16384)]
    assert times == sorted(times) and "estimate" not in replica.predictor.description
    assert replica.predictor.in_range(prompt(512))
    shared = ParallelSpec(data_parallel_size=2, expert_parallel_size=2)
    assert (
        "data sheet: all gather, reduce scatter"
        in deploy("Qwen3-30B-A3B", "a100_sxm", parallel=shared).predictor.description
    )
    fp8 = deploy("Qwen3-30B-A3B-FP8", "a100_sxm")
    assert "data sheet: gemm (fp8_block), moe" in fp8.predictor.description and not fp8.predictor.in_range(prompt(512))
