"""The shape of a model, with its arithmetic: parameters, FLOPs and KV bytes.

python -c "from engine.specs import catalog; print(catalog.model('Mistral-7B-v0.1').kv_bytes_per_token)"
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from engine.errors import InputError, unknown
from engine.specs.checks import check_fields

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8_e4m3": 1, "fp8_e5m2": 1, "int8": 1}  # of an element
QUANTIZED_BYTES = {  # of a weight of a linear layer or an expert, its share of the scales included
    "fp8": 1.0,  # a scale a tensor or output channel: less than 0.1 %
    "fp8_block": 1 + 4 / 128**2,  # a float32 scale for each 128 x 128
    "int4": (4 + (16 + 4) / 128) / 8,  # a 16-bit scale and a 4-bit zero point for each group of 128 (AWQ, GPTQ)
    "mxfp4": (4 + 8 / 32) / 8,  # an 8-bit scale for each group of 32
}
DTYPES = ("bfloat16", "float16", "float32")  # that a whole model is served in; the others are of some tensors
EXPERT_LOADS = ("balanced", "power_law_1.01", "power_law_1.2")  # see profiler/expert_load.py
QUANTIZATIONS = ("none", *QUANTIZED_BYTES)
MOST_LAYERS = 10_000  # they are counted one by one
MOST_HEADS = MOST_EXPERTS = 1 << 16
MOST_WIDTH = 1 << 28  # of a layer, or of a vocabulary


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched past the positions that a model was first trained on.

    `linear` divides each by `factor`; `llama3` only those of long wavelengths. Others are named, and no engine's here.
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self) -> None:
        check_fields(self, "factor low_freq_factor high_freq_factor original_max_position")


@dataclass(frozen=True, kw_only=True)
class ExpertsSpec:
    """The mixture of experts that stands in place of a layer's MLP, but in the `dense_layers`.

    A router (hidden_size x num_experts) chooses `top_k` experts for each token, by the softmax of its logits; with
    `normalize` the weights of the chosen are divided by their sum. An expert is an MLP of `intermediate_size`. Shared
    experts are one MLP of `shared_intermediate_size` (the sum of their widths; 0: none) that every token passes, with
    `shared_gate` multiplied by the sigmoid of one more output for each token.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    shared_intermediate_size: int = 0
    shared_gate: bool = False
    normalize: bool = True
    router_bias: bool = False
    bias: bool = False  # of the experts' own matrices
    dense_layers: tuple[int, ...] = ()  # that have a plain MLP of the model's intermediate_size
    load: str = "power_law_1.01"  # how a batch's tokens are taken to spread over the experts

    def __post_init__(self) -> None:
        check_fields(self, "num_experts top_k", most=MOST_EXPERTS)
        check_fields(self, "intermediate_size", most=MOST_WIDTH)
        check_fields(self, "shared_intermediate_size", zero=True, most=MOST_WIDTH)
        if self.load not in EXPERT_LOADS:
            raise unknown("expert load", self.load, EXPERT_LOADS)
        if self.shared_gate and not self.shared_intermediate_size:
            raise InputError("shared_gate is for a model with shared experts: give shared_intermediate_size")
        if self.top_k > self.num_experts:
            raise InputError(
                f"top_k={self.top_k} experts of num_experts={self.num_experts}: a token passes at most all of them"
            )


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The shape of a decoder-only transformer, dense or with a mixture of experts.

    Sizes are numbers of elements. A layer is attention (Q, K, V and output projections) and an MLP (gate, up and down
    when `gated_mlp`, else up and down) or `experts`. With `parallel_block` both read the same input and their outputs
    are added at once, so a tensor-parallel layer needs one all-reduce instead of two; such a layer may share one norm.
    With `qk_norm` each head's query and key pass an RMS norm of head_dim weights, one for Q and one for K, before they
    are rotated. Four norms a layer are Gemma's: before and after the attention, before and after the MLP.
    """

    name: str
    model_type: str  # Hugging Face's: llama, mistral, qwen2, qwen, internlm, falcon, phi, ...
    num_layers: int
    hidden_size: int
    intermediate_size: int  # width of one of gate and up, also where a config counts both
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    gated_mlp: bool = True
    parallel_block: bool = False
    norms_per_layer: int = 2
    norm: Literal["rms", "layer"] = "rms"
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    lm_head_bias: bool = False
    tie_word_embeddings: bool = False
    sliding_window: int | None = None  # tokens a query attends to, itself included
    full_attention_layers: tuple[int, ...] = ()  # that have no window though the others have
    qk_norm: bool = False
    attention_sinks: bool = False  # one learned logit a query head, in its softmax only
    experts: ExpertsSpec | None = None
    rotary_fraction: float = 1.0  # share of head_dim that is rotated; 0: no rotary embedding
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    activation: str = "silu"  # of the MLP: silu, gelu, gelu_tanh
    weight_dtype: str = "bfloat16"  # the three as served: names in DTYPE_BYTES
    activation_dtype: str = "bfloat16"
    kv_cache_dtype: str = "bfloat16"
    linear_dtype: str | None = None  # of the projections of attention and MLP: in QUANTIZED_BYTES; None: weight_dtype
    expert_dtype: str | None = None  # the same of the experts; None: as the projections

    def __post_init__(self) -> None:
        check_fields(self, "num_layers", most=MOST_LAYERS)
        check_fields(self, "num_attention_heads num_key_value_heads", most=MOST_HEADS)
        check_fields(self, "hidden_size intermediate_size head_dim vocab_size", most=MOST_WIDTH)
        check_fields(self, "max_position_embeddings rope_theta norm_eps")
        check_fields(self, "rotary_fraction", zero=True)
        if self.sliding_window is not None:
            check_fields(self, "sliding_window")
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"{self.name}: num_key_value_heads={self.num_key_value_heads} does not divide "
                f"num_attention_heads={self.num_attention_heads}: query heads share KV heads in equal groups"
            )
        for name in ("weight_dtype", "activation_dtype", "kv_cache_dtype"):
            if getattr(self, name) not in DTYPE_BYTES:
                raise unknown(name, str(getattr(self, name)), DTYPE_BYTES)
        for name in ("linear_dtype", "expert_dtype"):
            if getattr(self, name) not in (None, *QUANTIZED_BYTES):
                raise unknown(name, str(getattr(self, name)), QUANTIZED_BYTES)
        if self.norm not in ("rms", "layer"):
            raise unknown("norm", str(self.norm), ("rms", "layer"))
        if self.norms_per_layer not in ((1, 2) if self.parallel_block else (2, 4)):
            raise InputError(
                f"{self.name}: norms_per_layer={self.norms_per_layer}: give 2 (1 only with parallel_block, where "
                "attention and MLP may share a norm; 4 only without)"
            )
        self._check_layers("full_attention_layers", self.full_attention_layers)
        if self.full_attention_layers and self.sliding_window is None:
            raise InputError(f"{self.name}: full_attention_layers is for a model with a sliding_window: give one")
        if self.experts is not None:
            self._check_layers("experts.dense_layers", self.experts.dense_layers)
            if self.parallel_block:
                raise InputError(f"{self.name}: experts in a parallel_block are not modelled")
        if self.rotary_fraction > 1:
            raise InputError(f"{self.name}: rotary_fraction={self.rotary_fraction}: give a share between 0 and 1")

    def _check_layers(self, field: str, layers: tuple[int, ...]) -> None:
        """Raise InputError unless these are some layers, in order, and not all of them."""
        if any(layer not in range(self.num_layers) for layer in layers):
            raise InputError(f"{self.name}: {field}={layers}: give layers from 0 to {self.num_layers - 1}")
        if list(layers) != sorted(set(layers)) or len(layers) == self.num_layers:
            raise InputError(f"{self.name}: {field}={layers}: give each layer once, rising, and not all of them")

    def has_experts(self, layer: int) -> bool:
        """Return whether a layer has experts in place of its MLP."""
        return self.experts is not None and layer not in self.experts.dense_layers

    def window(self, layer: int) -> int | None:
        """Return the tokens that a query of a layer attends to, itself included; None: all."""
        return None if layer in self.full_attention_layers else self.sliding_window

    def in_dtype(self, dtype: str) -> ModelSpec:
        """Return the model with weights, activations and KV cache in `dtype`. Raises InputError unless in DTYPES."""
        if dtype not in DTYPES:
            raise unknown("dtype", dtype, DTYPES)
        return replace(self, weight_dtype=dtype, activation_dtype=dtype, kv_cache_dtype=dtype)

    def quantized(self, quantization: str) -> ModelSpec:
        """Return the model with its linear layers and experts in a format; "none" takes what it has away.

        The embedding, LM head, norms, biases and routers stay as they are; mxfp4 is of experts alone. Raises InputError
        for a format that is not known, and for mxfp4 without experts.
        """
        if quantization not in QUANTIZATIONS:
            raise unknown("quantization", quantization, QUANTIZATIONS)
        if quantization == "none":
            return replace(self, linear_dtype=None, expert_dtype=None)
        if quantization == "mxfp4":
            if self.experts is None:
                raise InputError(f"quantization mxfp4 is of experts, and {self.name} has none: give fp8 or int4")
            return replace(self, linear_dtype=None, expert_dtype=quantization)
        return replace(self, linear_dtype=quantization, expert_dtype=None)

    @property
    def quantization(self) -> str | None:
        """The name by which `quantized` gives the same formats; None where there is none."""
        if self.linear_dtype is not None:
            return self.linear_dtype if self.expert_dtype in (None, self.linear_dtype) else None
        return {None: "none", "mxfp4": "mxfp4"}.get(self.expert_dtype)

    @property
    def dtype(self) -> str | None:
        """The dtype of weights, activations and KV cache; None where they differ, and of quantised models."""
        same = self.weight_dtype == self.activation_dtype == self.kv_cache_dtype
        return self.activation_dtype if same and self.quantization == "none" else None

    @property
    def expert_format(self) -> str | None:
        """The format of the experts' weights: in QUANTIZED_BYTES; None: weight_dtype."""
        return self.expert_dtype or self.linear_dtype

    def bytes_of(self, quantized: str | None) -> float:
        """Return the bytes of a weight in a format, its share of the scales included; None: in weight_dtype."""
        return self.weight_itemsize if quantized is None else QUANTIZED_BYTES[quantized]

    @property
    def weight_itemsize(self) -> int:
        """Bytes of a weight."""
        return DTYPE_BYTES[self.weight_dtype]

    @property
    def activation_itemsize(self) -> int:
        """Bytes of an element of the activations, which is what collectives send too."""
        return DTYPE_BYTES[self.activation_dtype]

    @property
    def kv_cache_itemsize(self) -> int:
        """Bytes of an element of a cached key or value."""
        return DTYPE_BYTES[self.kv_cache_dtype]

    @property
    def q_size(self) -> int:
        """Width of the query (and of the attention output before its projection): heads * head_dim."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of the key, and of the value: KV heads * head_dim."""
        return self.num_key_value_heads * self.head_dim

    @property
    def mlp_matrices(self) -> int:
        """Weight matrices of an MLP: gate, up and down, or up and down."""
        return 3 if self.gated_mlp else 2

    @property
    def norm_size(self) -> int:
        """Parameters of one norm: a weight, and for layer norm a bias too."""
        return self.hidden_size * (2 if self.norm == "layer" else 1)

    @property
    def has_mlps(self) -> bool:
        """Whether any layer has a plain MLP."""
        return self.num_expert_layers < self.num_layers

    @property
    def num_expert_layers(self) -> int:
        """Layers with experts in place of their MLP."""
        return 0 if self.experts is None else self.num_layers - len(self.experts.dense_layers)

    @property
    def attention_matrices(self) -> int:
        """Parameters of a layer's Q, K, V and output projections, without biases."""
        return self.hidden_size * (self.q_size + 2 * self.kv_size) + self.q_size * self.hidden_size

    def mlp_parameters(self, width: int, bias: bool = False) -> int:
        """Return the parameters of an MLP, or an expert, of so many neurons."""
        biases = (self.mlp_matrices - 1) * width + self.hidden_size
        return self.mlp_matrices * self.hidden_size * width + biases * bias

    @property
    def matmul_parameters(self) -> int:
        """Parameters of the matrices that a token is multiplied with: projections, MLPs and LM head, no embedding.

        Of experts, those that it is sent to, the shared ones and the router.
        """
        dense = self.num_layers - self.num_expert_layers
        matrices = self.num_layers * self.attention_matrices + dense * self.mlp_parameters(self.intermediate_size)
        if self.experts is not None:
            width = self.experts.top_k * self.experts.intermediate_size + self.experts.shared_intermediate_size
            gates = self.hidden_size * (self.experts.num_experts + self.experts.shared_gate)
            matrices += self.num_expert_layers * (self.mlp_parameters(width) + gates)
        return matrices + self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """Distinct parameters, exactly; an LM head that is tied to the embedding counts once."""
        layer = self.attention_matrices + (self.q_size + 2 * self.kv_size) * self.qkv_bias
        layer += self.hidden_size * self.attention_output_bias + self.norms_per_layer * self.norm_size
        layer += 2 * self.head_dim * self.qk_norm + self.num_attention_heads * self.attention_sinks
        dense = self.num_layers - self.num_expert_layers
        total = self.num_layers * layer + dense * self.mlp_parameters(self.intermediate_size, self.mlp_bias)
        if (experts := self.experts) is not None:
            mixture = experts.num_experts * self.mlp_parameters(experts.intermediate_size, experts.bias)
            mixture += experts.num_experts * (self.hidden_size + experts.router_bias)
            if experts.shared_intermediate_size:
                mixture += self.mlp_parameters(experts.shared_intermediate_size)
                mixture += self.hidden_size * experts.shared_gate
            total += self.num_expert_layers * mixture
        tables = 1 if self.tie_word_embeddings else 2
        total += tables * self.vocab_size * self.hidden_size + self.vocab_size * self.lm_head_bias
        return total + self.norm_size  # before the LM head

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token leaves in the cache, over all layers and KV heads."""
        return 2 * self.num_layers * self.kv_size * self.kv_cache_itemsize

    def flops_per_token(self, context: int) -> int:
        """FLOPs of one token that attends to `context` tokens, itself included (a sliding window caps it).

        2 per matmul parameter, the LM head among them (so this is a token whose logits are wanted), plus
        4 * context * q_size per layer for QK^T and PV (Kaplan et al. 2020, section 2.1). The embedding look-up, norms,
        activations and softmax are not counted.
        """
        windows = (self.window(layer) or context for layer in range(self.num_layers))
        return 2 * self.matmul_parameters + 4 * self.q_size * sum(min(context, window) for window in windows)
