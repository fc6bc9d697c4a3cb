"""Parameter counts against transformers' own models on the meta device, and against what repositories publish."""

import json
from typing import Any

import pytest

from engine.specs import ExpertsSpec, ModelSpec, ParallelSpec, hf_config, memory

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# (model type, keys that differ from the class's defaults, parameters as published or None)
MODELS: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "Mixtral-8x7B": ("mixtral", {}, 46_702_792_704),
    "Mixtral-8x22B": (
        "mixtral",
        {"hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56, "num_attention_heads": 48,
         "vocab_size": 32768},
        140_630_071_296,
    ),
    "Qwen3-30B-A3B": ("qwen3_moe", {"num_hidden_layers": 48, "head_dim": 128}, 30_532_122_624),
    "Qwen3-235B-A22B": (
        "qwen3_moe",
        {"hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 94,
         "num_attention_heads": 64, "head_dim": 128},
        235_093_634_560,
    ),
    "gpt-oss-120b": ("gpt_oss", {}, 116_829_156_672),
    "gpt-oss-20b": ("gpt_oss", {"num_hidden_layers": 24, "num_local_experts": 32}, 20_914_757_184),
    "experts in some layers": (
        "qwen3_moe", {"num_hidden_layers": 6, "mlp_only_layers": [1], "decoder_sparse_step": 2, "num_experts": 8}, None
    ),
    "Qwen1.5-MoE-A2.7B": ("qwen2_moe", {}, 14_315_784_192),
    "Qwen3-32B": (
        "qwen3",
        {"num_hidden_layers": 64, "hidden_size": 5120, "intermediate_size": 25600, "num_attention_heads": 64,
         "num_key_value_heads": 8},
        32_762_123_264,
    ),
    "Phi-3-mini": ("phi3", {}, 3_821_079_552),
    "phi-4": (
        "phi3",
        {"num_hidden_layers": 40, "hidden_size": 5120, "intermediate_size": 17920, "num_attention_heads": 40,
         "num_key_value_heads": 10, "vocab_size": 100352},
        14_659_507_200,
    ),
    "gemma-2-2b": ("gemma2", {}, 2_614_341_888),
    "gemma-3-1b": (
        "gemma3_text",
        {"hidden_size": 1152, "intermediate_size": 6912, "num_attention_heads": 4, "num_key_value_heads": 1,
         "num_hidden_layers": 26, "vocab_size": 262144},
        999_885_952,
    ),
    "Qwen2.5-7B": (
        "qwen2",
        {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
         "num_hidden_layers": 28, "vocab_size": 152064},
        7_615_616_512,
    ),
}  # fmt: skip


def of_transformers(kind: str, keys: dict[str, Any]) -> tuple[ModelSpec, int]:
    """The spec read from transformers' config, and the parameters of transformers' model."""
    config = transformers.AutoConfig.for_model(kind, **keys)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    return hf_config.read(json.loads(json.dumps(config.to_dict())), name=kind), count


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_transformers(name: str) -> None:
    kind, keys, published = MODELS[name]
    spec, parameters = of_transformers(kind, keys)
    assert spec.num_parameters == parameters
    assert published in (None, parameters)
    assert memory.weight_bytes(spec, ParallelSpec(), 0) == 2 * parameters


def test_a_token_passes_the_published_share_of_a_mixture() -> None:
    """What is published as active: 12.9 of 46.7, 3.3 of 30.5, 22.2 of 235, 5.1 of 117 thousand million (embeddings and
    biases in or out makes the last digit)."""
    for name, active in (("Mixtral-8x7B", 12.9), ("Qwen3-30B-A3B", 3.3), ("Qwen3-235B-A22B", 22.2)):
        spec, _ = of_transformers(*MODELS[name][:2])
        table = spec.vocab_size * spec.hidden_size
        assert (spec.matmul_parameters + table) / 1e9 == pytest.approx(active, abs=0.06), name
    spec, _ = of_transformers(*MODELS["gpt-oss-120b"][:2])
    assert spec.matmul_parameters / 1e9 == pytest.approx(5.1, abs=0.06)


def test_every_key_of_a_mixture_is_read() -> None:
    mixtral, _ = of_transformers("mixtral", {"num_hidden_layers": 1})
    assert mixtral.experts == ExpertsSpec(num_experts=8, top_k=2, intermediate_size=14336)
    keys = {"num_hidden_layers": 6, "mlp_only_layers": [1], "decoder_sparse_step": 2, "num_experts": 8}
    qwen, _ = of_transformers("qwen3_moe", keys)
    assert qwen.qk_norm and qwen.experts is not None
    assert (qwen.experts.dense_layers, qwen.experts.normalize) == ((0, 1, 2, 4), False)
    assert [qwen.has_experts(layer) for layer in range(6)] == [False, False, False, True, False, True]
    second, _ = of_transformers("qwen2_moe", {"num_hidden_layers": 1, "num_experts": 4})
    assert second.experts is not None and second.experts.shared_gate and second.experts.shared_intermediate_size == 5632
    oss, _ = of_transformers("gpt_oss", {"num_hidden_layers": 4, "num_local_experts": 8})
    assert oss.experts is not None and oss.experts.bias and oss.attention_sinks and oss.attention_output_bias
    assert (oss.sliding_window, oss.full_attention_layers) == (128, (1, 3))
