"""The shape of a model, with its arithmetic: parameters, FLOPs and KV bytes.

python -c "from engine.specs import catalog; print(catalog.model('Mistral-7B-v0.1').kv_bytes_per_token)"
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from engine.errors import InputError, unknown
from engine.specs.checks import check_fields

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8_e4m3": 1, "fp8_e5m2": 1, "int8": 1}  # of an element
DTYPES = ("bfloat16", "float16", "float32")  # that a whole model is served in; the others are of some tensors


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


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The shape of a dense decoder-only transformer.

    Sizes are numbers of elements. A layer is attention (Q, K, V and output projections) and an MLP (gate, up and down
    when `gated_mlp`, else up and down). With `parallel_block` both read the same input and their outputs are added at
    once, so a tensor-parallel layer needs one all-reduce instead of two; such a layer may share one norm.
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
    rotary_fraction: float = 1.0  # share of head_dim that is rotated; 0: no rotary embedding
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    activation: str = "silu"  # of the MLP: silu, gelu, gelu_tanh
    weight_dtype: str = "bfloat16"  # the three as served: names in DTYPE_BYTES
    activation_dtype: str = "bfloat16"
    kv_cache_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        check_fields(self, "num_layers hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim")
        check_fields(self, "vocab_size max_position_embeddings rope_theta norm_eps")
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
        if self.norm not in ("rms", "layer"):
            raise unknown("norm", str(self.norm), ("rms", "layer"))
        if self.norms_per_layer not in ((1, 2) if self.parallel_block else (2,)):
            raise InputError(
                f"{self.name}: norms_per_layer={self.norms_per_layer}: give 2 (1 only with parallel_block, where "
                "attention and MLP may share a norm)"
            )
        if self.rotary_fraction > 1:
            raise InputError(f"{self.name}: rotary_fraction={self.rotary_fraction}: give a share between 0 and 1")

    def in_dtype(self, dtype: str) -> ModelSpec:
        """Return the model with weights, activations and KV cache in `dtype`. Raises InputError unless in DTYPES."""
        if dtype not in DTYPES:
            raise unknown("dtype", dtype, DTYPES)
        return replace(self, weight_dtype=dtype, activation_dtype=dtype, kv_cache_dtype=dtype)

    @property
    def dtype(self) -> str | None:
        """The dtype of weights, activations and KV cache; None where they differ."""
        same = self.weight_dtype == self.activation_dtype == self.kv_cache_dtype
        return self.activation_dtype if same else None

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
    def matmul_parameters(self) -> int:
        """Parameters of the matrices that a token is multiplied with: projections, MLPs and LM head, no embedding."""
        attention = self.hidden_size * (self.q_size + 2 * self.kv_size) + self.q_size * self.hidden_size
        mlp = self.mlp_matrices * self.hidden_size * self.intermediate_size
        return self.num_layers * (attention + mlp) + self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """Distinct parameters, exactly; an LM head that is tied to the embedding counts once."""
        bias = (self.q_size + 2 * self.kv_size) * self.qkv_bias + self.hidden_size * self.attention_output_bias
        bias += ((self.mlp_matrices - 1) * self.intermediate_size + self.hidden_size) * self.mlp_bias
        embedding = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        return (
            self.matmul_parameters
            + embedding
            + self.num_layers * (bias + self.norms_per_layer * self.norm_size)
            + self.norm_size  # before the LM head
            + self.vocab_size * self.lm_head_bias
        )

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
        attended = context if self.sliding_window is None else min(context, self.sliding_window)
        return 2 * self.matmul_parameters + 4 * attended * self.q_size * self.num_layers
