"""Memory: shards add up to the model, hand-worked sizes, and what a model that doesn't fit is told."""

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from random_examples import random_examples

from engine.errors import InputError
from engine.replica_spec import resolve
from engine.runtime.engine_spec import EngineSpec
from engine.specs import ExpertsSpec, ModelSpec, ParallelSpec, SchedulerSpec, catalog
from engine.specs.memory import (
    GIB,
    ProfileRun,
    activation_bytes,
    kv_bytes_per_block,
    num_kv_blocks,
    profiled_bytes,
    weight_bytes,
)


def cut(tp: int, pp: int = 1) -> ParallelSpec:
    return ParallelSpec(tensor_parallel_size=tp, pipeline_parallel_size=pp)


@pytest.mark.parametrize("name", catalog.MODELS)
def test_one_gpu_holds_every_parameter_once(name: str) -> None:
    model = catalog.model(name).quantized("none")
    assert weight_bytes(model, cut(1), 0) == 2 * model.num_parameters


@random_examples(200)
@given(
    tp=st.sampled_from([1, 2, 4, 8, 16]),
    pp=st.integers(1, 6),
    kv_heads=st.sampled_from([1, 2, 4, 8, 16]),
    layers=st.integers(6, 20),
    vocab=st.integers(100, 300),
    norm=st.sampled_from(["rms", "layer"]),
    flags=st.fixed_dictionaries(
        dict.fromkeys(
            ["qkv_bias", "attention_output_bias", "mlp_bias", "lm_head_bias", "tie_word_embeddings", "gated_mlp"],
            st.booleans(),
        )
    ),
    one_norm=st.booleans(),
)
def test_shards_add_up_to_the_model_and_its_copies(
    tp: int, pp: int, kv_heads: int, layers: int, vocab: int, norm: str, flags: dict[str, bool], one_norm: bool
) -> None:
    hidden, heads, head_dim = 48, 16, 8
    vocab += -vocab % tp
    model = ModelSpec(
        name="toy", model_type="llama", num_layers=layers, hidden_size=hidden, intermediate_size=96,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, vocab_size=vocab,
        max_position_embeddings=64, norm="rms" if norm == "rms" else "layer", parallel_block=one_norm,
        norms_per_layer=1 if one_norm else 2, **flags,
    )  # fmt: skip
    parallel = cut(tp, pp)
    assume(parallel.fits(model))
    held = sum(weight_bytes(model, parallel, stage) * tp for stage in range(pp)) // 2

    norm_size = hidden * (2 if norm == "layer" else 1)
    copied = layers * (1 if one_norm else 2) * norm_size + norm_size
    copied += layers * hidden * (flags["attention_output_bias"] + flags["mlp_bias"])
    kv_copies = max(tp // kv_heads, 1) - 1
    shared = layers * kv_copies * 2 * kv_heads * head_dim * (hidden + flags["qkv_bias"])
    second_table = vocab * hidden * (flags["tie_word_embeddings"] and pp > 1)
    assert held == model.num_parameters + (tp - 1) * copied + shared + second_table


def test_weights_by_hand() -> None:
    model = catalog.model("Llama-2-70b-hf")
    layer = 8192 * (8192 + 2 * 1024) // 4 + 8192 * 8192 // 4 + 3 * 8192 * 28672 // 4 + 2 * 8192
    table = 32000 * 8192 // 4
    assert weight_bytes(model, cut(4, 2), 0) == 2 * (40 * layer + table)
    assert weight_bytes(model, cut(4, 2), 1) == 2 * (40 * layer + table + 8192)
    # 80 layers on 7 stages: 11 each, and one more on the three before the last
    assert [weight_bytes(model, cut(4, 7), stage) / (2 * layer) for stage in range(1, 6)] == [11, 11, 12, 12, 12]


def test_a_vocabulary_that_does_not_divide_is_padded() -> None:
    model = replace(catalog.model("Llama-2-7b-hf"), vocab_size=32001)
    padded = replace(model, vocab_size=32004)
    assert weight_bytes(model, cut(4), 0) == weight_bytes(padded, cut(4), 0)


def test_kv_blocks_by_hand() -> None:
    mistral, falcon = catalog.model("Mistral-7B-v0.1"), catalog.model("falcon-180B")
    assert kv_bytes_per_block(mistral, cut(1), 0, 16) == 2 * 1024 * 1024
    assert kv_bytes_per_block(falcon, cut(4, 2), 1, 16) == 16 * 40 * 2 * (2 * 64) * 2
    # twice as many ranks as KV heads: each rank keeps a whole head
    assert kv_bytes_per_block(mistral, cut(16), 0, 16) == kv_bytes_per_block(mistral, cut(8), 0, 16) == 2**21 // 8


def test_activations_by_hand() -> None:
    model = catalog.model("Mistral-7B-v0.1")
    token = 2 * (2 * 4096 + 3 * 14336)  # the MLP's three buffers are wider than attention's
    assert activation_bytes(model, cut(1), 512, 128) == 512 * token + 2 * 128 * 32000 * 4 + GIB
    assert activation_bytes(model, cut(2), 512, 128) < activation_bytes(model, cut(1), 512, 128)


def test_blocks_fill_what_is_left() -> None:
    model, device = catalog.model("Mistral-7B-v0.1"), catalog.device("a100")
    scheduler = SchedulerSpec(max_num_batched_tokens=512)
    blocks = num_kv_blocks(model, device, cut(1), scheduler)
    fixed = 2 * 7_241_732_096 + activation_bytes(model, cut(1), 512, 128)
    left = device.memory_bytes * 0.9 - fixed - blocks * 2**21
    assert 0 <= left < 2**21
    assert 27_000 < blocks < 31_000  # some 56 GiB at 2 MiB a block
    assert num_kv_blocks(model, device, cut(1), scheduler, 0.5) < blocks
    assert num_kv_blocks(model, device, cut(1), scheduler, max_num_batched_tokens=16384) < blocks
    assert num_kv_blocks(model, device, cut(1), replace(scheduler, block_size=32)) == blocks // 2


def test_the_fullest_stage_decides() -> None:
    model, device = catalog.model("Llama-2-70b-hf"), catalog.device("a40")
    parallel, scheduler = cut(4, 3), SchedulerSpec()
    room = int(device.memory_bytes * 0.9) - activation_bytes(model, parallel, 2048, 128)
    each = [
        (room - weight_bytes(model, parallel, stage)) // kv_bytes_per_block(model, parallel, stage, 16)
        for stage in range(3)
    ]
    assert len(set(each)) > 1 and num_kv_blocks(model, device, parallel, scheduler) == min(each)


@pytest.mark.parametrize(
    ("name", "device", "layout"),
    [("Mistral-7B-v0.1", "a100", (1, 1)), ("Yi-34B", "a100", (2, 1)), ("Llama-2-70b-hf", "a40", (4, 2)),
     ("falcon-180B", "a100", (4, 2)), ("falcon-180B", "a100", (8, 1))],
)  # fmt: skip
def test_the_deployments_of_the_sarathi_serve_paper_fit(name: str, device: str, layout: tuple[int, int]) -> None:
    model = catalog.model(name)
    blocks = num_kv_blocks(model, catalog.device(device), cut(*layout), SchedulerSpec())
    assert blocks * 16 > 16384  # its longest request


def test_a_model_that_does_not_fit_is_told_what_would() -> None:
    model, device, scheduler = catalog.model("Yi-34B"), catalog.device("a40"), SchedulerSpec()
    with pytest.raises(
        InputError,
        match=r"Yi-34B needs 64\.1 GiB of weights .*at TP1-PP1 but a40 has 40\.0 GiB usable: "
        r"raise --tensor-parallel-size to 2 or raise --pipeline-parallel-size to 2$",
    ):
        num_kv_blocks(model, device, cut(1), scheduler)
    assert (
        num_kv_blocks(model, device, cut(2), scheduler) > 0 and num_kv_blocks(model, device, cut(1, 2), scheduler) > 0
    )


def test_a_batch_that_fits_nowhere_is_told_the_gap() -> None:
    scheduler = SchedulerSpec(max_num_batched_tokens=10**8)
    with pytest.raises(InputError, match=r"GiB too little.*lower --max-num-batched-tokens"):
        num_kv_blocks(catalog.model("phi-2"), catalog.device("l4"), cut(1), scheduler)


def test_impossible_layouts_and_shares_are_refused() -> None:
    model, device = catalog.model("Yi-34B"), catalog.device("a100")
    with pytest.raises(InputError, match="use 1, 2, 4, 8"):
        num_kv_blocks(model, device, cut(3), SchedulerSpec())
    with pytest.raises(InputError, match=r"gpu_memory_utilization=1\.5"):
        num_kv_blocks(model, device, cut(2), SchedulerSpec(), 1.5)


# -- vLLM's profiling run ----------------------------------------------------------------------------------------------

MIXTRAL = ModelSpec(
    name="Mixtral-8x7B", model_type="mixtral", num_layers=32, hidden_size=4096, intermediate_size=14336,
    num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=32000, max_position_embeddings=32768,
    experts=ExpertsSpec(num_experts=8, top_k=2, intermediate_size=14336),
)  # fmt: skip


@pytest.mark.parametrize(
    ("model", "tp", "blocks"),
    [("Llama-2-7b-hf", 1, 7_462), ("CodeLlama-34b-Instruct-hf", 2, 26_602), ("Llama-2-70b-hf", 4, 31_356),
     (MIXTRAL, 2, 27_510)],
)  # fmt: skip
def test_blocks_are_those_that_vllm_reported(model: str | ModelSpec, tp: int, blocks: int) -> None:
    """vLLM 0.15.1 on H100s, 128 sequences, a budget of 2048.

    The base was fitted to the first, what a rank among several has more to the mean of the others.
    """
    replica = resolve(
        model, "h100", engine="vllm@0.15", parallel=cut(tp),
        scheduler={"max_num_seqs": 128, "max_num_batched_tokens": 2048, "max_model_len": 4096},
    )  # fmt: skip
    assert replica.num_kv_blocks() == pytest.approx(blocks, rel=0.002)


def test_a_server_of_many_sequences_and_a_large_vocabulary_keeps_gigabytes_for_the_sampler() -> None:
    """Nothing was fitted to this one: about 275,000 tokens fit what others measured of Qwen3-32B at TP2 under vLLM 0.12
    (1,024 sequences of its server on H100); the estimate of the other engines says 314,000."""
    qwen = ModelSpec(
        name="Qwen3-32B", model_type="qwen3", num_layers=64, hidden_size=5120, intermediate_size=25600,
        num_attention_heads=64, num_key_value_heads=8, head_dim=128, vocab_size=151936, max_position_embeddings=40960,
        qk_norm=True,
    )  # fmt: skip
    replica = resolve(qwen, "h100", engine="vllm@0.12", parallel=cut(2))
    assert (replica.scheduler.max_num_seqs, replica.scheduler.max_num_batched_tokens) == (1024, 8192)
    assert replica.num_kv_blocks() * 16 == pytest.approx(275_000, rel=0.03)
    few = resolve(qwen, "h100", engine="vllm@0.12", parallel=cut(2), scheduler={"max_num_seqs": 64})
    assert few.num_kv_blocks() * 16 > 315_000


def test_only_the_last_stage_samples() -> None:
    run = ProfileRun(base_bytes=5, parallel_bytes=70, logit_bytes=38)
    model = catalog.model("Qwen2.5-7B")
    hidden, mlp = 2 * 3584, 3 * 18944
    assert profiled_bytes(model, cut(1), 100, 64, run, samples=False) == 100 * 2 * (hidden + mlp) + 5
    assert profiled_bytes(model, cut(1), 100, 64, run) == 100 * hidden + 64 * 152064 * 38 + 5
    assert profiled_bytes(model, cut(2), 100, 64, run) == 100 * hidden + 64 * (152064 * 38 + 152064) + 75
    assert profiled_bytes(model, cut(1), 32, 64, run) == 32 * (hidden + 152064 * 38) + 5  # no more rows than tokens


# -- formats -----------------------------------------------------------------------------------------------------------


def test_quantised_are_projections_and_experts_alone() -> None:
    model = catalog.model("Llama-2-7b-hf")
    linears = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    rest = 2 * (model.num_parameters - linears)
    for name, width in (("fp8", 1.0), ("fp8_block", 1 + 4 / 16384), ("int4", 4.15625 / 8), ("none", 2.0)):
        assert weight_bytes(model.quantized(name), cut(1), 0) == round(rest + width * linears)
    experts = 32 * 8 * 3 * 4096 * 14336
    only = replace(MIXTRAL, expert_dtype="mxfp4")
    assert weight_bytes(only, cut(1), 0) == 2 * (MIXTRAL.num_parameters - experts) + experts * 4.25 / 8
    assert MIXTRAL.quantized("mxfp4") == only and only.quantization == "mxfp4"
    both = MIXTRAL.quantized("fp8")
    attention = 32 * (2 * 4096**2 + 2 * 4096 * 1024)
    assert weight_bytes(both, cut(1), 0) == 2 * MIXTRAL.num_parameters - experts - attention
    for name in ("nope", "mxfp4"):
        with pytest.raises(InputError, match=name):
            model.quantized(name)


def test_an_fp8_cache_holds_twice_the_tokens() -> None:
    replica = resolve("Llama-2-7b-hf", "h100", kv_cache_dtype="fp8")
    assert replica.model.kv_cache_dtype == "fp8_e4m3" and replica.model.weight_dtype == "bfloat16"
    assert replica.num_kv_blocks() // 2 == resolve("Llama-2-7b-hf", "h100").num_kv_blocks()
    with pytest.raises(InputError, match="unknown kv_cache_dtype 'fp7'"):
        resolve("Llama-2-7b-hf", "h100", kv_cache_dtype="fp7")
    quantised = resolve("Llama-2-7b-hf", "h100", quantization="fp8")
    assert quantised.model.linear_dtype == "fp8" and quantised.settings()["quantization"] == "fp8"
    with pytest.raises(InputError, match=r"is quantised \(fp8\)"):
        EngineSpec.of(quantised, folder=None)
