"""Model, parallel, network, scheduler and SLO specs against published numbers and closed forms."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import InputError
from engine.results.metric_table import METRICS
from engine.results.slo import SLO
from engine.specs import Link, NetworkSpec, ParallelSpec, SchedulerSpec, hf_config

LLAMA_7B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
}
FALCON_40B: dict[str, Any] = {
    "model_type": "falcon",
    "hidden_size": 8192,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_kv_heads": 8,
    "new_decoder_architecture": True,
    "parallel_attn": True,
    "bias": False,
    "vocab_size": 65024,
}
FALCON_7B: dict[str, Any] = {
    "model_type": "falcon",
    "hidden_size": 4544,
    "num_attention_heads": 71,
    "num_hidden_layers": 32,
    "multi_query": True,
    "new_decoder_architecture": False,
    "parallel_attn": True,
    "bias": False,
    "alibi": False,
    "vocab_size": 65024,
}
QWEN_72B: dict[str, Any] = {
    "model_type": "qwen",
    "hidden_size": 8192,
    "intermediate_size": 49152,
    "kv_channels": 128,
    "no_bias": True,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "seq_length": 32768,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
}
PHI_2: dict[str, Any] = {
    "model_type": "phi",
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": None,
    "partial_rotary_factor": 0.4,
    "max_position_embeddings": 2048,
    "vocab_size": 51200,
}
QWEN25_7B: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
}
INTERNLM_20B: dict[str, Any] = {
    "model_type": "internlm",
    "bias": False,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_hidden_layers": 60,
    "max_position_embeddings": 4096,
    "vocab_size": 103168,
}


# The counts of Llama, Falcon, Qwen and Phi are those their repositories publish; InternLM's is 60 * (4 * 5120^2 +
# 3 * 5120 * 13824 + 2 * 5120) + 2 * 103168 * 5120 + 5120.
@pytest.mark.parametrize(
    ("config", "parameters", "kv_bytes"),
    [
        (LLAMA_7B, 6_738_415_616, 32 * 2 * 32 * 128 * 2),
        (FALCON_40B, 41_303_293_952, 60 * 2 * 8 * 64 * 2),
        (FALCON_7B, 6_921_720_704, 32 * 2 * 64 * 2),
        (QWEN_72B, 72_287_920_128, 80 * 2 * 8192 * 2),
        (PHI_2, 2_779_683_840, 32 * 2 * 2560 * 2),
        (QWEN25_7B, 7_615_616_512, 28 * 2 * 4 * 128 * 2),
        (INTERNLM_20B, 20_088_714_240, 60 * 2 * 5120 * 2),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else None,
)
def test_a_published_config_gives_the_published_size(
    tmp_path: Path, config: dict[str, Any], parameters: int, kv_bytes: int
) -> None:
    folder = tmp_path / "some-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    model = hf_config.read(folder)
    assert (model.num_parameters, model.kv_bytes_per_token) == (parameters, kv_bytes)
    assert model.name == "some-model"
    assert hf_config.read(folder / "config.json") == model == hf_config.read(config, name="some-model")


def test_each_family_has_its_blocks() -> None:
    falcon, small = hf_config.read(FALCON_40B), hf_config.read(FALCON_7B)
    assert (falcon.parallel_block, falcon.norms_per_layer, falcon.tie_word_embeddings) == (True, 2, True)
    assert (small.norms_per_layer, small.num_key_value_heads) == (1, 1)
    assert hf_config.read(FALCON_40B | {"num_ln_in_parallel_attn": 1}).norms_per_layer == 1
    classic = hf_config.read(FALCON_7B | {"parallel_attn": False, "multi_query": False, "alibi": True, "bias": True})
    assert (classic.parallel_block, classic.norms_per_layer, classic.num_key_value_heads) == (False, 2, 71)
    assert (classic.rotary_fraction, classic.qkv_bias, classic.mlp_bias) == (0.0, True, True)
    phi = hf_config.read(PHI_2)
    assert (phi.gated_mlp, phi.lm_head_bias, phi.rotary_fraction, phi.norm) == (False, True, 0.4, "layer")
    qwen = hf_config.read(QWEN_72B)
    assert (qwen.intermediate_size, qwen.qkv_bias, qwen.mlp_bias) == (24576, True, False)
    assert qwen.max_position_embeddings == 32768
    internlm_7b = hf_config.read(INTERNLM_20B | {"bias": True})
    assert (internlm_7b.qkv_bias, internlm_7b.attention_output_bias, internlm_7b.mlp_bias) == (True, True, False)
    assert hf_config.read(LLAMA_7B | {"attention_bias": True, "mlp_bias": True}).mlp_bias


def test_a_window_counts_only_where_it_is_used() -> None:
    assert hf_config.read(QWEN25_7B).sliding_window is None
    used = QWEN25_7B | {"use_sliding_window": True, "sliding_window": 2048}
    assert hf_config.read(used | {"max_window_layers": 0}).sliding_window == 2048
    assert hf_config.read(used).sliding_window is None  # its 28 layers come before the default's first with one
    assert hf_config.read(used | {"layer_types": ["sliding_attention"] * 28}).sliding_window == 2048
    assert hf_config.read(used | {"layer_types": ["full_attention"] * 28}).sliding_window is None
    some = hf_config.read(used | {"num_hidden_layers": 32})
    assert (some.sliding_window, some.full_attention_layers) == (2048, tuple(range(28)))
    assert (some.window(27), some.window(28)) == (None, 2048)
    assert some.flops_per_token(4000) - some.flops_per_token(0) == 4 * 3584 * (28 * 4000 + 4 * 2048)
    assert hf_config.read(LLAMA_7B | {"sliding_window": 2048}).sliding_window is None
    assert hf_config.read(LLAMA_7B | {"model_type": "novel", "sliding_window": 2048}).sliding_window == 2048
    assert hf_config.read(LLAMA_7B | {"model_type": "mistral", "sliding_window": None}).sliding_window is None
    assert hf_config.read(LLAMA_7B | {"model_type": "mistral"}).sliding_window == 4096


def test_an_explicit_head_dim_is_taken() -> None:
    model = hf_config.read(LLAMA_7B | {"head_dim": 256})
    assert (model.q_size, model.kv_size) == (32 * 256, 32 * 256)


def test_a_family_not_known_by_name_needs_llamas_keys() -> None:
    assert hf_config.read(LLAMA_7B | {"model_type": "novel"}).num_parameters == 6_738_415_616
    untied = {key: value for key, value in LLAMA_7B.items() if key != "tie_word_embeddings"}
    assert hf_config.read(untied | {"model_type": "novel"}).tie_word_embeddings
    assert not hf_config.read(untied).tie_word_embeddings
    del untied["rms_norm_eps"]
    with pytest.raises(InputError, match=r"'gpt2' are not known"):
        hf_config.read({"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257})
    with pytest.raises(InputError, match=r"'rms_norm_eps' is missing.*'novel'"):
        hf_config.read(untied | {"model_type": "novel"})


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"num_local_experts": 8}, r"mixture of experts whose layers are not known: known are mixtral, qwen2_moe"),
        ({"is_encoder_decoder": True}, "encoder-decoder, not a decoder"),
        ({"text_config": {}}, "not a decoder"),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512, "n_routed_experts": 256}, "multi-head latent attention"),
        ({"model_type": "phi3small"}, "'phi3small' are not modelled"),
        ({"quantization_config": {"bits": 4}}, "weights by unknown of 4 bits: modelled are fp8"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 8}}, "weights by gptq of 8 bits"),
        (
            {"quantization_config": {"quant_method": "fp8", "ignored_layers": ["model.layers.0.self_attn.q_proj"]}},
            "leaves some linear layers",
        ),
        ({"model_type": "novel", "layer_types": ["sliding_attention", "full_attention"]}, "for each of the 32 layers"),
        ({"model_type": "novel", "layer_types": ["linear_attention"] * 32}, "other kinds of layers are not modelled"),
        ({"model_type": "novel", "sliding_window": 9, "sliding_window_pattern": 4}, "in some layers only"),
        ({"hidden_size": "4096"}, "hidden_size='4096': give an integer"),
        ({"head_dim": "x"}, "head_dim='x': give an integer"),
        ({"rope_theta": "x"}, "rope_theta='x': give a number"),
        ({"rope_parameters": 5}, "rope_parameters=5: give an object"),
        ({"num_attention_heads": 33}, "does not divide hidden_size"),
        ({"num_key_value_heads": 5}, "does not divide num_attention_heads=32"),
        ({"num_hidden_layers": 0}, "num_layers=0"),
    ],
)
def test_what_is_not_modelled_is_refused(extra: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        hf_config.read(LLAMA_7B | extra)


_W8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
_W4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}


@pytest.mark.parametrize(
    ("stated", "formats"),
    [
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, ("fp8", None, "bfloat16")),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, ("fp8_block", None, "bfloat16")),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": _W8}},
             "ignore": ["lm_head"], "kv_cache_scheme": {"num_bits": 8, "type": "float"}},
            ("fp8", None, "fp8_e4m3"),
        ),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": _W4}}},
         ("int4", None, "bfloat16")),
        ({"quant_method": "awq", "bits": 4, "modules_to_not_convert": None}, ("int4", None, "bfloat16")),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, ("int4", None, "bfloat16")),
    ],
)  # fmt: skip
def test_formats_are_read_as_each_method_spells_them(stated: dict[str, Any], formats: tuple[str | None, ...]) -> None:
    model = hf_config.read(LLAMA_7B | {"quantization_config": stated})
    assert (model.linear_dtype, model.expert_dtype, model.kv_cache_dtype) == formats
    assert model.num_parameters == 6_738_415_616


def test_experts_alone_may_be_quantised() -> None:
    mixture: dict[str, Any] = LLAMA_7B | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
    model = hf_config.read(mixture | {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": kept}})
    assert (model.linear_dtype, model.expert_dtype, model.quantization) == (None, "mxfp4", "mxfp4")
    gates = {"quant_method": "fp8", "ignored_layers": ["model.layers.0.mlp.gate", "lm_head"]}
    assert hf_config.read(mixture | {"quantization_config": gates}).linear_dtype == "fp8"
    assert hf_config.read(mixture | {"quantization_config": gates | {"ignored_layers": kept}}).expert_dtype == "fp8"


def test_a_missing_key_is_named_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({key: value for key, value in LLAMA_7B.items() if key != "vocab_size"}))
    with pytest.raises(InputError, match=r"config\.json: the key 'vocab_size' is missing"):
        hf_config.read(path)
    path.write_text("{")
    with pytest.raises(InputError, match=r"config\.json is not JSON"):
        hf_config.read(path)
    with pytest.raises(InputError, match="can't read"):
        hf_config.read(tmp_path / "nowhere")


def test_flops_of_a_token() -> None:
    model = hf_config.read(LLAMA_7B)
    matrices = 6_738_415_616 - 32000 * 4096 - 65 * 4096  # all parameters but the embedding and 65 norms
    assert model.flops_per_token(0) == 2 * matrices
    assert model.flops_per_token(1000) - model.flops_per_token(0) == 4 * 1000 * 4096 * 32
    tied = replace(model, tie_word_embeddings=True)
    assert tied.flops_per_token(7) == model.flops_per_token(7)  # the head is multiplied with either way
    assert tied.num_parameters == model.num_parameters - 32000 * 4096
    windowed = replace(model, sliding_window=512)
    assert windowed.flops_per_token(4000) == model.flops_per_token(512)


def test_layers_go_to_stages_as_in_vllm() -> None:
    assert ParallelSpec(pipeline_parallel_size=4).stage_layers(10) == (2, 3, 3, 2)
    assert ParallelSpec(pipeline_parallel_size=4).stage_layers(11) == (3, 3, 3, 2)
    assert ParallelSpec(pipeline_parallel_size=3).stage_layers(10) == (3, 4, 3)
    assert ParallelSpec(pipeline_parallel_size=2).stage_layers(80) == (40, 40)


@given(layers=st.integers(1, 200), stages=st.integers(1, 64))
def test_stages_are_even_and_the_last_has_no_more_than_any(layers: int, stages: int) -> None:
    split = ParallelSpec(pipeline_parallel_size=stages).stage_layers(layers)
    assert len(split) == stages and sum(split) == layers
    assert max(split) - min(split) <= 1 and split[-1] == min(split)


def test_tensor_parallelism_that_does_not_divide_says_what_would() -> None:
    qwen = hf_config.read(QWEN25_7B)  # 28 heads, 4 KV heads
    with pytest.raises(InputError, match=r"tensor_parallel_size=8: .*28 attention heads.*: use 1, 2, 4$"):
        ParallelSpec(tensor_parallel_size=8).validate(qwen)
    even = replace(qwen, intermediate_size=28 * 512)
    with pytest.raises(InputError, match=r"multiple of 4 KV heads: use 1, 2, 4, 28$"):  # 7 divides 28 heads, but not 4
        ParallelSpec(tensor_parallel_size=7).validate(even)
    with pytest.raises(InputError, match="at most 28"):
        ParallelSpec(pipeline_parallel_size=29).validate(qwen)
    with pytest.raises(InputError, match="MLP width 10242"):
        ParallelSpec(tensor_parallel_size=4).validate(replace(qwen, intermediate_size=10242))
    ParallelSpec(tensor_parallel_size=4, pipeline_parallel_size=28).validate(qwen)
    with pytest.raises(InputError, match="tensor_parallel_size=0: give a whole number above 0"):
        ParallelSpec(tensor_parallel_size=0)


def test_kv_heads_are_copied_where_there_are_fewer_than_ranks() -> None:
    falcon = hf_config.read(FALCON_40B)
    assert [ParallelSpec(tensor_parallel_size=tp).kv_heads_per_rank(falcon) for tp in (1, 4, 8, 16)] == [8, 2, 1, 1]
    assert ParallelSpec(tensor_parallel_size=4, pipeline_parallel_size=2).world_size == 8


BRIDGED = NetworkSpec(
    name="bridged",
    description="",
    gpus_per_node=4,
    pair=Link(1e-6, 300e9),
    node=Link(2e-6, 25e9),
    internode=Link(30e-6, 10e9),
    source="made up",
)


@pytest.mark.parametrize(
    ("first", "last", "link"),
    [(0, 1, "pair"), (2, 3, "pair"), (1, 2, "node"), (0, 3, "node"), (3, 4, "internode"), (0, 7, "internode")],
)
def test_a_group_is_as_slow_as_its_slowest_link(first: int, last: int, link: str) -> None:
    assert BRIDGED.link(first, last) == getattr(BRIDGED, link)


def test_a_fast_network_between_nodes_does_not_hide_pcie() -> None:
    fast = replace(BRIDGED, internode=Link(5e-6, 50e9))
    assert fast.link(0, 7) == BRIDGED.node
    assert fast.link(3, 4) == fast.internode
    assert replace(BRIDGED, pair=None).link(0, 1) == BRIDGED.node
    equal = replace(BRIDGED, internode=Link(9e-6, 25e9))
    assert equal.link(0, 7) == equal.internode  # as narrow as PCIe, and later


def test_times_of_messages() -> None:
    assert BRIDGED.allreduce_time(10**9, 0, 1) == 0
    assert BRIDGED.allreduce_time(300 * 10**6, 2, 2) == pytest.approx(1e-3 + 2 * 1e-6)  # 2 steps of half the bytes
    assert BRIDGED.allreduce_time(100 * 10**6, 0, 4) == pytest.approx(6e-3 + 6 * 2e-6)  # 1.5 * 100 MB at 25 GB/s
    assert BRIDGED.allreduce_time(10**6, 0, 8) == pytest.approx(1.75e-4 + 14 * 30e-6)
    assert BRIDGED.send_time(10**6, 1, 5) == pytest.approx(30e-6 + 1e-4)
    assert BRIDGED.send_time(10**6, 0, 1) == pytest.approx(1e-6 + 10**6 / 300e9)
    assert BRIDGED.send_time(10**6, 1, 2) == pytest.approx(2e-6 + 4e-5)
    assert BRIDGED.send_time(10**6, 3, 3) == 0


def test_networks_that_make_no_sense() -> None:
    with pytest.raises(InputError, match="odd"):
        replace(BRIDGED, gpus_per_node=3)
    with pytest.raises(InputError, match="bandwidth_bytes_per_s=0"):
        Link(0, 0)
    with pytest.raises(InputError, match=r"span no link"):
        BRIDGED.link(2, 2)


def test_scheduler_ranges() -> None:
    schedule: dict[str, Any] = {"chunk_schedule_low": 128, "chunk_schedule_high": 1024, "chunk_schedule_stages": 8}
    dynamic = SchedulerSpec(chunk_schedule="dynamic", chunk_schedule_max_tokens=8192, **schedule)
    assert SchedulerSpec().max_num_batched_tokens is None
    assert dynamic.chunk_schedule_high == 1024
    with pytest.raises(InputError, match="chunk_schedule_low=2000 is above"):
        replace(dynamic, chunk_schedule_low=2000)
    with pytest.raises(InputError, match="did you mean 'dynamic'"):
        SchedulerSpec(chunk_schedule="dynamo")  # type: ignore[arg-type]
    refused: list[dict[str, Any]] = [{"block_size": 0}, {"max_num_seqs": -1}, {"watermark": 1.0}, {"max_model_len": 0}]
    for wrong in refused:
        with pytest.raises(InputError, match=next(iter(wrong))):
            SchedulerSpec(**wrong)


@pytest.mark.parametrize(
    ("text", "slo", "canonical"),
    [
        ("p99_tbt<=0.1", SLO("tbt", "p99", 0.1), "p99_tbt<=0.1s"),
        (" P99.9_ITL < 300 ms ", SLO("tbt", "p99.9", 0.3), "p99.9_tbt<=0.3s"),
        ("median_scheduling_delay<=2s", SLO("scheduling_delay", "p50", 2.0), "p50_scheduling_delay<=2s"),
        ("max_e2el<=1e2", SLO("e2e", "max", 100.0), "max_e2e<=100s"),
        ("mean_normalized_latency<=50ms", SLO("normalized_latency", "mean", 0.05), "mean_normalized_latency<=0.05s"),
    ],
)
def test_an_slo_is_read_and_written(text: str, slo: SLO, canonical: str) -> None:
    assert SLO.parse(text) == slo
    assert str(slo) == canonical


@given(
    metric=st.sampled_from(list(METRICS)),
    statistic=st.sampled_from(["mean", "max"])
    | st.floats(0, 100).map(lambda percent: f"p{percent:.3f}".rstrip("0").rstrip(".")),
    threshold=st.floats(min_value=1e-15, max_value=1e6),
)
def test_an_slo_survives_its_text(metric: str, statistic: str, threshold: float) -> None:
    slo = SLO(metric, statistic, threshold)
    assert SLO.parse(str(slo)) == slo


def test_the_percentile_of_an_slo() -> None:
    assert [SLO.parse(f"{name}_ttft<=1").percentile for name in ("p99.9", "median", "max", "mean")] == [
        99.9,
        50.0,
        None,
        None,
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("p99tbt<=0.1", "write it as p99_tbt<=0.1"),
        ("ttft<=1", "write it as"),
        ("p99_tbt>=1", "write it as"),
        ("p99_tbr<=1", "did you mean 'tbt'.*write it as"),
        ("medain_tbt<=1", "did you mean 'median'"),
        ("p999_tbt<=1", "p0 to p100"),
        ("p99_tbt<=fast", "'fast' is no number"),
        ("p99_tbt<=0", "threshold_s=0.0"),
        ("p99_tbt<=nan", "threshold_s=nan"),
    ],
)
def test_a_bad_slo_says_how_to_write_it(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        SLO.parse(text)
