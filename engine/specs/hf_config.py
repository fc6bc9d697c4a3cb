"""Reading a Hugging Face `config.json` into a ModelSpec.

A config writes down only what differs from the defaults of its model class, so the defaults of each known
`model_type` are given here (from the configuration classes of transformers 4.x, and for qwen and internlm from the
`configuration_*.py` beside the weights). Any other type is read as Llama-like if it has Llama's keys. Served in
bfloat16 whatever the checkpoint's dtype, unless another is asked for.

    python -c "from engine.specs import hf_config; print(hf_config.read('path/to/model'))"
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.documents import given_path, read_json
from engine.errors import InputError
from engine.specs.checks import MOST_WHOLE, short
from engine.specs.model import MOST_LAYERS, ExpertsSpec, ModelSpec, RopeScaling

_UNTIED = (  # elsewhere the default is tied
    *("llama", "mistral", "qwen2", "qwen3", "qwen", "internlm", "phi", "phi3"),
    *("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"),
)
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "ffn_config")
_NO_WINDOW = ("llama", "internlm", "phi", "falcon", "qwen", "gemma")  # whatever a config says: their models ignore it
_SWITCHED_WINDOW = ("qwen2", "qwen3", "qwen2_moe")  # used if `use_sliding_window`, from `max_window_layers` on
_SWITCHED_WHOLE = ("qwen3_moe",)  # the same in every layer
_WINDOW_IN_EVERY_LAYER = ("mistral", "mixtral", "phi3")
_FULL_EVERY = {"gemma2": 2, "gemma3_text": 6, "gpt_oss": 2}  # each so manieth layer has no window, unless `layer_types`
_DEFAULT_WINDOW = {"mistral": 4096, "gemma2": 4096, "gemma3_text": 4096, "gpt_oss": 128} | dict.fromkeys(
    (*_SWITCHED_WINDOW, *_SWITCHED_WHOLE), 4096
)
_FULLY_ROTATED = ("llama", "internlm", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss",
                  "gemma", "gemma2", "gemma3_text")  # whatever `partial_rotary_factor` says  # fmt: skip
_HEAD_DIM = {"qwen3": 128, "gpt_oss": 64} | dict.fromkeys(("gemma", "gemma2", "gemma3_text"), 256)
_QK_NORM = ("qwen3", "qwen3_moe", "gemma3_text")
_FOUR_NORMS = ("gemma2", "gemma3_text")
_QKV_BIAS = ("qwen2", "qwen2_moe")  # of Q, K and V always (qwen2_moe: `qkv_bias`), and never of the output
_THETA = {"mixtral": 1e6, "gpt_oss": 150000.0, "gemma3_text": 1e6}
_NOT_LLAMA_LIKE = ("phi3small", "phimoe")
_LLAMA_LIKE = ("rms_norm_eps", "intermediate_size")
MOST_BYTES = 1 << 24  # of a config.json: the longest published ones have some hundred kilobytes
_NORM_EPS = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps")
_ACTIVATIONS = {"swish": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}


class _Config:
    """A config whose missing keys, and values of the wrong type, are errors that name the file and the key."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`; the default where it is missing or null."""
        value = self.values.get(key)
        return default if value is None else value

    def number(self, key: str, default: float) -> float:
        """The value of `key`, which must be a number; the default where it is missing or null."""
        value = self.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < MOST_WHOLE:
            raise InputError(f"{self.where}: {key}={short(value)}: give a number")
        return value

    def whole(self, key: str, default: int) -> int:
        """The value of `key`, which must be an integer; the default where it is missing or null."""
        return default if self.values.get(key) is None else self.need(key)

    def flag(self, key: str, default: bool) -> bool:
        """The value of `key`, which must be true or false; the default where it is missing or null."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise InputError(f"{self.where}: {key}={short(value)}: give true or false")
        return value

    def text(self, key: str, default: str) -> str:
        """The value of `key`, which must be text; the default where it is missing, null or empty."""
        value = self.values.get(key)
        value = default if value in (None, "") else value
        if not isinstance(value, str):
            raise InputError(f"{self.where}: {key}={short(value)}: give text")
        return value

    def listed(self, key: str) -> list[Any]:
        """The value of `key`, which must be a list; empty where it is missing or null."""
        value = self.get(key, [])
        if not isinstance(value, list):
            raise InputError(f"{self.where}: {key}={short(value)}: give a list")
        return value

    def inner(self, key: str, default: Mapping[str, Any] | None = None) -> _Config:
        """The object under `key`; the default, or an empty one, where it is missing or null."""
        value = self.get(key, {} if default is None else default)
        if not isinstance(value, Mapping):
            raise InputError(f"{self.where}: {key}={short(value)}: give an object, as in the model's published config")
        return _Config(value, f"{self.where}: {key}")

    @property
    def kind(self) -> str:
        """The model type, "llama" where none is given."""
        return self.text("model_type", "llama")

    def need(self, *keys: str) -> int:
        """The value of the first of `keys` that is there, which must be an integer."""
        for key in keys:
            if (value := self.values.get(key)) is not None:
                if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= MOST_WHOLE:
                    raise InputError(f"{self.where}: {key}={short(value)}: give an integer")
                return value
        raise InputError(f"{self.where}: the key {keys[0]!r} is missing: add it as in the model's published config")


def read(source: str | Path | Mapping[str, Any], name: str | None = None) -> ModelSpec:
    """Return the ModelSpec of a config file, of a folder that holds a config.json, or of a config's contents.

    Raises InputError for what is not a decoder that is modelled, and for a missing key.
    """
    if isinstance(source, Mapping):
        values, where = source, "config"
        name = name or str(source.get("_name_or_path") or source.get("model_type") or "model")
    else:
        path = given_path(source)
        path = path / "config.json" if path.is_dir() else path
        where, name = str(path), name or path.resolve().parent.name
        values = read_json(path, "give a Hugging Face folder or config.json", MOST_BYTES)
        if not isinstance(values, Mapping):
            raise InputError(f"{where} holds no JSON object: give a Hugging Face config.json")
    config = _Config(values, where)
    _refuse(config)
    layers = config.need("num_hidden_layers", "n_layer")
    if not 1 <= layers <= MOST_LAYERS:  # lists of them are made below
        raise InputError(f"{where}: num_layers={layers}: give 1 to {MOST_LAYERS:,}")
    reader = {"falcon": _falcon, "phi": _phi, "qwen": _qwen}.get(config.kind, _llama_like)
    own = reader(config)  # first: says of a type that is not known that it is not
    return ModelSpec(name=name, **_shared(config), **own, **_formats(config))


def _refuse(config: _Config) -> None:
    kind = config.text("model_type", "of unknown type")
    if "kv_lora_rank" in config.values:
        raise InputError(
            f"{config.where} ({kind}) has multi-head latent attention (kv_lora_rank), whose cache and kernels are not "
            "modelled: give a model with grouped-query attention"
        )
    what = ""
    if config.flag("is_encoder_decoder", False) or "encoder_layers" in config.values:
        what = "an encoder-decoder"
    elif "text_config" in config.values:
        what = "multimodal (its `text_config` may be one by itself)"
    if what:
        raise InputError(f"{config.where} ({kind}) is {what}, not a decoder: only decoders are modelled")
    if _has_experts(config) and kind not in _MIXTURES:
        raise InputError(
            f"{config.where} ({kind}) is a mixture of experts whose layers are not known: known are "
            f"{', '.join(_MIXTURES)}"
        )
    if kind in _NOT_LLAMA_LIKE:
        raise InputError(f"{config.where}: the layers of model type {kind!r} are not modelled: give another model")


def _has_experts(config: _Config) -> bool:
    def experts(key: str) -> bool:
        value = config.get(key, 0)
        return (isinstance(value, int) and value > 1) or isinstance(value, Mapping)

    return any(experts(key) for key in _EXPERTS)


def _windowed_layers(config: _Config) -> list[bool]:
    """Return whether each layer has the sliding window, as the family's class in transformers reads the config."""
    kind, layers = config.kind, config.need("num_hidden_layers", "n_layer")
    if kind in _NO_WINDOW:
        return [False] * layers
    if kind in _WINDOW_IN_EVERY_LAYER:
        return [True] * layers
    if not config.flag("use_sliding_window", kind not in (*_SWITCHED_WINDOW, *_SWITCHED_WHOLE)):
        return [False] * layers
    if kind in _SWITCHED_WHOLE:
        return [True] * layers
    if types := config.listed("layer_types"):
        if len(types) != layers or any(each not in ("sliding_attention", "full_attention") for each in types):
            raise InputError(
                f"{config.where}: layer_types={short(types)}: give sliding_attention or full_attention for each of the "
                f"{layers} layers; other kinds of layers are not modelled"
            )
        return [each == "sliding_attention" for each in types]
    if kind in _SWITCHED_WINDOW:
        return [layer >= config.number("max_window_layers", 28) for layer in range(layers)]
    if kind in _FULL_EVERY:
        every = config.whole("sliding_window_pattern", _FULL_EVERY[kind])
        if every < 1:
            raise InputError(f"{config.where}: sliding_window_pattern={every}: give 1 or more")
        return [bool((layer + 1) % every) for layer in range(layers)]
    if config.get("sliding_window_pattern") or config.number("max_window_layers", 0) > 0:
        raise InputError(
            f"{config.where} ({kind}) has a sliding window in some layers only, and which is not known of this type: "
            "give 'layer_types'"
        )
    return [True] * layers


def _windows(config: _Config) -> dict[str, Any]:
    """Return the sliding window, and the layers that are without it."""
    windowed = _windowed_layers(config)
    default = _DEFAULT_WINDOW.get(config.kind)
    window = config.values.get("sliding_window", default)
    if window is None or not any(windowed):
        return {"sliding_window": None}
    window = config.need("sliding_window") if "sliding_window" in config.values else window
    full = tuple(layer for layer, has in enumerate(windowed) if not has)
    return {"sliding_window": window, "full_attention_layers": full}


def _formats(config: _Config) -> dict[str, Any]:
    """Return the formats of linear layers, experts and KV cache that `quantization_config` states."""
    quantization = config.inner("quantization_config")
    if not quantization.values:
        return {}
    found: dict[str, Any] = {}
    weights = _weight_format(quantization)
    kept = [str(name) for key in _KEPT for name in quantization.listed(key)]
    attention = [name for name in kept if "attn" in name or "attention" in name]
    if weights == "mxfp4" or (attention and _has_experts(config)):
        found["expert_dtype"] = weights
    elif attention or any("mlp" in name and "gate" not in name.split(".")[-1] for name in kept):
        raise InputError(
            f"{quantization.where} leaves some linear layers as they are ({', '.join(kept[:3])}, ...): only formats of "
            "all of them, or of experts alone, are modelled"
        )
    else:
        found["linear_dtype"] = weights
    if quantization.inner("kv_cache_scheme").values or quantization.get("kv_cache_quant_algo"):
        found["kv_cache_dtype"] = "fp8_e4m3"
    return found


def _weight_format(quantization: _Config) -> str:
    """Return the format of the weights, as each method spells it."""
    method, scheme = str(quantization.get("quant_method", "unknown")), dict(quantization.values)
    if method == "compressed-tensors":
        groups = quantization.inner("config_groups")
        schemes = [dict(groups.inner(name).inner("weights").values) for name in groups.values]
        scheme = schemes[0] if schemes else {}
        if any(each != scheme for each in schemes):
            raise InputError(f"{quantization.where} has groups of several formats: only one for all is modelled")
    bits = scheme.get("num_bits", scheme.get("bits", scheme.get("w_bit")))
    blocks = scheme.get("weight_block_size") or (scheme.get("strategy") == "block" and scheme.get("block_structure"))
    if method in ("fp8", "fbgemm_fp8") or (scheme.get("type") == "float" and bits == 8):
        return "fp8_block" if blocks else "fp8"
    if method == "modelopt" and str(scheme.get("quant_algo")) == "FP8":
        return "fp8"
    if method == "mxfp4":
        return "mxfp4"
    if bits == 4 and (method in ("awq", "gptq") or scheme.get("type") == "int"):
        return "int4"
    raise InputError(
        f"{quantization.where} has weights by {method}{f' of {bits} bits' * bool(bits)}: modelled are fp8 (by tensor, "
        "channel or block), int4 (awq, gptq, compressed-tensors) and mxfp4"
    )


def _shared(config: _Config) -> dict[str, Any]:
    """The fields that every family spells alike."""
    kind = config.kind
    rope = config.inner("rope_parameters")  # where transformers 5 moved the contents of `rope_scaling`, and more
    theta = rope.number("rope_theta", _THETA.get(kind, 10000.0))
    eps = 1e-5 if kind in ("falcon", "phi") else 1e-6
    theta = config.number("rope_theta", config.number("rotary_emb_base", theta))
    return {
        "model_type": kind,
        "num_layers": config.need("num_hidden_layers", "n_layer"),
        "hidden_size": config.need("hidden_size", "n_embd"),
        "num_attention_heads": config.need("num_attention_heads", "n_head"),
        "vocab_size": config.need("vocab_size"),
        "tie_word_embeddings": config.flag("tie_word_embeddings", kind not in _UNTIED),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(config.inner("rope_scaling", rope.values)),
        "norm_eps": next((config.number(key, 0.0) for key in _NORM_EPS if key in config.values), eps),
    }


def _rotary_fraction(config: _Config, default: float) -> float:
    key = "partial_rotary_factor"
    return config.number(key, config.inner("rope_parameters").number(key, default))


def _rope_scaling(rope: _Config) -> RopeScaling | None:
    """What `rope_scaling` (or, since transformers 5, `rope_parameters`) says, if anything."""
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind == "default":
        return None
    return RopeScaling(
        kind=kind,
        factor=rope.number("factor", 1.0),
        low_freq_factor=rope.number("low_freq_factor", 1.0),
        high_freq_factor=rope.number("high_freq_factor", 4.0),
        original_max_position=int(rope.number("original_max_position_embeddings", 8192)),
    )


def _activation(config: _Config, *keys: str, default: str) -> str:
    name = next((config.text(key, default) for key in keys if config.values.get(key)), default)
    return _ACTIVATIONS.get(name, name)


def _head_dim(config: _Config) -> int:
    heads, hidden = config.need("num_attention_heads", "n_head"), config.need("hidden_size", "n_embd")
    if config.get("head_dim", config.get("kv_channels")):
        return config.need("head_dim", "kv_channels")
    if default := _HEAD_DIM.get(config.kind):
        return default
    if heads < 1 or hidden % heads:
        raise InputError(
            f"{config.where}: num_attention_heads={heads} does not divide hidden_size={hidden}: give 'head_dim'"
        )
    return hidden // heads


def _llama_like(config: _Config) -> dict[str, Any]:
    """llama, mistral, qwen2, qwen3, phi3, gemma, mixtral and whatever else has a gated MLP, or experts that have one,
    and grouped-query attention after RMS norms."""
    kind = config.kind
    for key in _LLAMA_LIKE:
        if key not in config.values and kind not in _UNTIED:
            raise InputError(
                f"{config.where}: the key {key!r} is missing and the layers of model type {kind!r} are not known: "
                "give a dense decoder with Llama's keys, or write a ModelSpec"
            )
    # internlm has `bias` for Q, K, V and the output, llama `attention_bias`; qwen2 has the first three always
    own_bias = kind == "gpt_oss" or (kind == "internlm" and config.flag("bias", True))
    bias = config.flag("attention_bias", own_bias)
    experts = _MIXTURES[kind](config) if kind in _MIXTURES and _has_experts(config) else None
    return {
        "intermediate_size": config.need("intermediate_size"),
        "num_key_value_heads": config.need("num_key_value_heads", "num_attention_heads"),
        "head_dim": _head_dim(config),
        "max_position_embeddings": config.need("max_position_embeddings"),
        "qkv_bias": config.flag("qkv_bias", True) if kind in _QKV_BIAS else bias,
        "attention_output_bias": kind not in _QKV_BIAS and bias,
        "mlp_bias": config.flag("mlp_bias", False),
        "qk_norm": kind in _QK_NORM,
        "norms_per_layer": 4 if kind in _FOUR_NORMS else 2,
        "attention_sinks": kind == "gpt_oss",
        "rotary_fraction": 1.0 if kind in _FULLY_ROTATED else _rotary_fraction(config, 1.0),
        "activation": _activation(
            config, "hidden_act", "hidden_activation", default="gelu_tanh" if kind in _GEMMA else "silu"
        ),
        "experts": experts,
        **_windows(config),
    }


def _mixtral(config: _Config) -> ExpertsSpec:
    """Mixtral: every layer has experts as wide as `intermediate_size`."""
    return ExpertsSpec(
        num_experts=config.need("num_local_experts", "num_experts"),
        top_k=config.whole("num_experts_per_tok", 2),
        intermediate_size=config.need("intermediate_size"),
    )


def _gpt_oss(config: _Config) -> ExpertsSpec:
    """gpt-oss: as Mixtral's, with biases; the softmax is over the chosen, which is the same as to normalise."""
    plain = _mixtral(config)
    return replace(plain, top_k=config.whole("num_experts_per_tok", 4), router_bias=True, bias=True)


def _qwen_moe(config: _Config) -> ExpertsSpec:
    """Qwen2-MoE (with a gated shared expert) and Qwen3-MoE: every `decoder_sparse_step`th layer but `mlp_only_layers`.

    transformers 5 writes `num_experts` as `num_local_experts`.
    """
    layers, step = config.need("num_hidden_layers"), config.whole("decoder_sparse_step", 1)
    if step < 1:
        raise InputError(f"{config.where}: decoder_sparse_step={step}: give 1 or more")
    without = config.listed("mlp_only_layers")
    second = config.kind == "qwen2_moe"
    return ExpertsSpec(
        num_experts=config.need("num_experts", "num_local_experts"),
        top_k=config.whole("num_experts_per_tok", 4 if second else 8),
        intermediate_size=config.need("moe_intermediate_size"),
        shared_intermediate_size=config.need("shared_expert_intermediate_size") if second else 0,
        shared_gate=second,
        normalize=config.flag("norm_topk_prob", False),
        dense_layers=tuple(layer for layer in range(layers) if layer in without or (layer + 1) % step),
    )


_KEPT = ("modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules")  # what is not quantised
_GEMMA = ("gemma", "gemma2", "gemma3_text")
_MIXTURES = {"mixtral": _mixtral, "qwen2_moe": _qwen_moe, "qwen3_moe": _qwen_moe, "gpt_oss": _gpt_oss}


def _qwen(config: _Config) -> dict[str, Any]:
    """Qwen 1: fused QKV with a bias whatever `no_bias` says; `intermediate_size` is gate and up together."""
    bias = not config.flag("no_bias", True)
    return {
        "intermediate_size": config.need("intermediate_size") // 2,
        "num_key_value_heads": config.need("num_attention_heads"),
        "head_dim": _head_dim(config),
        "max_position_embeddings": config.need("seq_length", "max_position_embeddings"),
        "qkv_bias": True,
        "attention_output_bias": bias,
        "mlp_bias": bias,
        "rotary_fraction": config.number("rotary_pct", 1.0),
    }


def _phi(config: _Config) -> dict[str, Any]:
    """Phi-1 and 2: attention and a plain MLP side by side after one layer norm, biases everywhere."""
    return {
        "intermediate_size": config.need("intermediate_size"),
        "num_key_value_heads": config.need("num_key_value_heads", "num_attention_heads"),
        "head_dim": _head_dim(config),
        "max_position_embeddings": config.need("max_position_embeddings"),
        "gated_mlp": False,
        "parallel_block": True,
        "norms_per_layer": 1,
        "norm": "layer",
        "qkv_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
        "lm_head_bias": True,
        "rotary_fraction": _rotary_fraction(config, 0.5),
        "activation": _activation(config, "hidden_act", default="gelu_new"),
    }


def _falcon(config: _Config) -> dict[str, Any]:
    """Falcon: the new architecture (40B, 180B) has grouped KV heads, the old (7B) one KV head or all of them."""
    heads, hidden = config.need("num_attention_heads", "n_head"), config.need("hidden_size", "n_embd")
    new = config.flag("new_decoder_architecture", False)
    old_kv_heads = 1 if config.flag("multi_query", True) else heads
    kv_heads = config.need("num_kv_heads", "n_head_kv") if new else old_kv_heads
    parallel = new or config.flag("parallel_attn", True)
    norms = config.whole("num_ln_in_parallel_attn", 2 if new else 1) if parallel else 2
    bias = config.flag("bias", False)
    return {
        "intermediate_size": config.whole("ffn_hidden_size", 4 * hidden),
        "num_key_value_heads": kv_heads,
        "head_dim": _head_dim(config),
        "max_position_embeddings": config.whole("max_position_embeddings", 2048),
        "gated_mlp": False,
        "parallel_block": parallel,
        "norms_per_layer": norms,
        "norm": "layer",
        "qkv_bias": bias,
        "attention_output_bias": bias,
        "mlp_bias": bias,
        "rotary_fraction": 0.0 if config.flag("alibi", False) else 1.0,
        "activation": _activation(config, "activation", default="gelu"),
    }
