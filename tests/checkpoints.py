"""Small random Hugging Face checkpoints, one for each layout of layers that the engine knows.

model = checkpoints.write(folder, "falcon_new")  # the transformers model, which knows the right logits
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 101  # divides by no number of ranks
_SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 3,
                          "num_attention_heads": 8, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_LLAMA: dict[str, Any] = {**_SIZES, "intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 256,
                          "tie_word_embeddings": False}  # fmt: skip
_QWEN3_MOE: dict[str, Any] = {**_LLAMA, "head_dim": 12, "num_experts": 6, "num_experts_per_tok": 3,
                              "moe_intermediate_size": 32, "mlp_only_layers": [1]}  # fmt: skip
_FALCON: dict[str, Any] = {**_SIZES, "num_hidden_layers": 2}
_NEW_FALCON: dict[str, Any] = {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}
_LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {  # the class's name without Config, its arguments
    "llama": ("Llama", _LLAMA),
    "llama_multi_head": ("Llama", _LLAMA | {"num_key_value_heads": 8}),
    "llama_head_dim": ("Llama", _LLAMA | {"head_dim": 12}),
    "llama_tied": ("Llama", _LLAMA | {"tie_word_embeddings": True}),
    "llama_mlp_bias": ("Llama", _LLAMA | {"mlp_bias": True}),
    "llama_gelu": ("Llama", _LLAMA | {"hidden_act": "gelu_pytorch_tanh"}),
    "llama_linear_rope": (
        "Llama",
        _LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3}},
    ),
    "llama_llama3_rope": ("Llama", _LLAMA | {"rope_parameters": _LLAMA3_ROPE}),
    "internlm": (
        "Llama",
        _LLAMA | {"num_key_value_heads": 8, "attention_bias": True},
    ),  # as which it was later published
    "llama_unused_keys": ("Llama", _LLAMA),
    "mistral": ("Mistral", _LLAMA | {"sliding_window": 5}),
    "mistral_unused_keys": ("Mistral", _LLAMA | {"sliding_window": 5}),
    "qwen2": ("Qwen2", _LLAMA | {"num_key_value_heads": 4}),
    "qwen2_unused_keys": ("Qwen2", _LLAMA | {"num_key_value_heads": 4}),
    "qwen2_window": ("Qwen2", _LLAMA | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    "qwen2_no_layer_windowed": ("Qwen2", _LLAMA | {"use_sliding_window": True, "sliding_window": 5}),
    "qwen3": ("Qwen3", _LLAMA | {"head_dim": 12}),
    "mixtral": ("Mixtral", _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3Moe", _QWEN3_MOE),
    "falcon_new": ("Falcon", _NEW_FALCON | {"num_ln_in_parallel_attn": 2}),
    "falcon_new_one_norm": ("Falcon", _NEW_FALCON | {"num_ln_in_parallel_attn": 1}),
    "falcon_multi_query": ("Falcon", _FALCON | {"multi_query": True, "parallel_attn": True}),
    "falcon_multi_head": ("Falcon", _FALCON | {"multi_query": False, "parallel_attn": False, "bias": True}),
    "phi": ("Phi", _SIZES | {"intermediate_size": 96, "partial_rotary_factor": 0.75}),
    "phi_unused_keys": ("Phi", _SIZES | {"intermediate_size": 96}),
}
# keys that other families use and these models ignore
_UNUSED_KEYS: dict[str, dict[str, Any]] = {
    "llama_unused_keys": {"sliding_window": 5, "use_sliding_window": True, "partial_rotary_factor": 0.5},
    "mistral_unused_keys": {"use_sliding_window": False, "partial_rotary_factor": 0.5},
    "qwen2_unused_keys": {"sliding_window": 5, "max_window_layers": 0, "partial_rotary_factor": 0.5},
    "phi_unused_keys": {"sliding_window": 5, "use_sliding_window": True},
}


def write(folder: Path, name: str, **save: Any) -> "transformers.PreTrainedModel":  # by name: read when it is used
    """Save the checkpoint of that name and return its model. `save`: for save_pretrained, max_shard_size="20kB" say.

    Every number is random, norms and biases too, and large enough for logits to differ by units. Biases are around 0,
    or that of the last norm would choose the same token everywhere.
    """
    kind, arguments = CONFIGS[name]
    config = getattr(transformers, f"{kind}Config")(**arguments)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5, generator=generator)
            else:
                parameter.normal_(0.0 if key.endswith("bias") else 1.0, 0.3, generator=generator)
    model.save_pretrained(folder, **save)
    if name in _UNUSED_KEYS:
        edit_config(folder, **_UNUSED_KEYS[name])
        model = type(model).from_pretrained(folder).eval()
    if name == "internlm":  # transformers has no class of that name
        edit_config(folder, model_type="internlm", bias=True, attention_bias=None)
    return model


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of the folder's config.json; None takes one out."""
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}), encoding="utf-8")
