"""Which slices of which checkpoint tensors make up each of a rank's parameters.

One table a family, as transformers names its tensors: our module -> theirs, several where ours is fused. The cut over
ranks depends on the module alone, and is the same for weights and biases:

- vocabulary (embedding, LM head), MLP gate and up: rows, evenly; the last rank's vocabulary may be short
- Q, K, V: by heads; with fewer KV heads than ranks, several ranks hold a copy of one
- attention output and MLP down: columns of the weight; their biases, and norms, are whole on every rank
- experts: each one's gate, up and down as an MLP's; the router is whole on every rank
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from engine.specs import ModelSpec
from engine.worker.parallel import Rank

_LLAMA = {
    "embedding": "model.embed_tokens",
    "layers": "model.layers.{}.",
    "input_norm": "input_layernorm",
    "qkv_proj": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "output_proj": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "mlp_gate_up_proj": "mlp.gate_proj mlp.up_proj",
    "mlp_down_proj": "mlp.down_proj",
    "final_norm": "model.norm",
    "lm_head": "lm_head",
}
_MIXTRAL = _LLAMA | {
    "router": "block_sparse_moe.gate",
    "experts.gate_up_proj": "block_sparse_moe.experts.{}.w1 block_sparse_moe.experts.{}.w3",
    "experts.down_proj": "block_sparse_moe.experts.{}.w2",
}
_QWEN3_MOE = _LLAMA | {
    "router": "mlp.gate",
    "experts.gate_up_proj": "mlp.experts.{}.gate_proj mlp.experts.{}.up_proj",
    "experts.down_proj": "mlp.experts.{}.down_proj",
}
_FUSED_EXPERTS = {  # as transformers 5 holds any family's, and saves them with save_original_format=False
    "router": "mlp.gate",
    "experts.gate_up_proj": "mlp.experts.gate_up_proj",
    "experts.down_proj": "mlp.experts.down_proj",
}
_PHI = {
    "embedding": "model.embed_tokens",
    "layers": "model.layers.{}.",
    "input_norm": "input_layernorm",
    "qkv_proj": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "output_proj": "self_attn.dense",
    "mlp_up_proj": "mlp.fc1",
    "mlp_down_proj": "mlp.fc2",
    "final_norm": "model.final_layernorm",
    "lm_head": "lm_head",
}
_FALCON = {
    "embedding": "transformer.word_embeddings",
    "layers": "transformer.h.{}.",
    "input_norm": "input_layernorm",
    "qkv_proj": "self_attention.query_key_value",
    "output_proj": "self_attention.dense",
    "post_attention_norm": "post_attention_layernorm",
    "mlp_up_proj": "mlp.dense_h_to_4h",
    "mlp_down_proj": "mlp.dense_4h_to_h",
    "final_norm": "transformer.ln_f",
    "lm_head": "lm_head",
}
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "mixtral": _MIXTRAL,
    "qwen3_moe": _QWEN3_MOE,
    "internlm": _LLAMA,
    "falcon": _FALCON,
    "phi": _PHI,
}


@dataclass(frozen=True)
class Piece:
    """Elements start..stop of a checkpoint tensor's dimension `dim`; `shape` is the whole tensor's by the config.

    Of a tensor of several experts it is the matrix of one `expert`, whose dimensions count.
    """

    tensor: str
    shape: tuple[int, ...]
    dim: int
    start: int
    stop: int
    expert: int | None = None


def local_kv_heads(spec: ModelSpec, rank: Rank) -> range:
    """The KV heads that a rank holds."""
    first = rank.tp_rank * spec.num_key_value_heads // rank.tp_size
    return range(first, first + rank.parallel.kv_heads_per_rank(spec))


def vocabulary_rows(spec: ModelSpec, rank: Rank) -> int:
    """Rows of the embedding, and of the LM head, on each rank; past the end of the vocabulary they are padding."""
    return -(-spec.vocab_size // rank.tp_size)


def first_layer(spec: ModelSpec, rank: Rank) -> int:
    """The model's number of the first layer of a rank's stage."""
    return rank.parallel.layers_of(rank.stage, spec.num_layers).start


def are_fused(tensors: Iterable[str]) -> bool:
    """Return whether a checkpoint with tensors of these names has each layer's experts in one tensor."""
    return any(tensor.endswith(_FUSED_EXPERTS["experts.down_proj"]) for tensor in tensors)


def tensor_names(spec: ModelSpec, fused_experts: bool = False) -> dict[str, str]:
    """The family's table, with what depends on the config and on how the checkpoint holds experts."""
    names = FAMILIES[spec.model_type] | (_FUSED_EXPERTS if fused_experts else {})
    if spec.model_type == "falcon" and spec.parallel_block and spec.norms_per_layer == 2:
        names |= {"input_norm": "ln_attn", "post_attention_norm": "ln_mlp"}
    return names


def pieces(spec: ModelSpec, rank: Rank, parameter: str, fused_experts: bool = False) -> list[Piece]:
    """The pieces that make up a rank's parameter ("layers.0.qkv_proj.weight"), to be joined along dimension 0.

    Those of a parameter of several experts make up its matrices, one after the other. The embedding and the LM head are
    shorter than the parameter where the vocabulary does not divide evenly.
    """
    module, _, kind = parameter.rpartition(".")
    names, prefix = tensor_names(spec, fused_experts), ""
    if module.startswith("layers."):
        _, layer, module = module.split(".")
        prefix = names["layers"].format(first_layer(spec, rank) + int(layer))
    if module == "experts":
        sources = [f"{prefix}{each}" for each in names[f"{module}.{kind}"].split()]
        return _experts(spec, rank, sources, kind, fused_experts)
    source = names["embedding" if parameter == "lm_head.weight" and spec.tie_word_embeddings else module]
    tensors = [f"{prefix}{each}.{kind}" for each in source.split()]
    hidden, mlp, columns = spec.hidden_size, spec.intermediate_size, () if kind == "bias" else (spec.hidden_size,)
    if module in ("embedding", "lm_head"):
        rows = vocabulary_rows(spec, rank)
        start, stop = (min(r * rows, spec.vocab_size) for r in (rank.tp_rank, rank.tp_rank + 1))
        return [Piece(tensors[0], (spec.vocab_size, *columns), 0, start, stop)]
    if module in ("mlp_gate_up_proj", "mlp_up_proj"):
        return [Piece(tensor, (mlp, *columns), 0, *_share(mlp, rank)) for tensor in tensors]
    if module == "qkv_proj":
        return _fused_qkv(spec, rank, tensors[0], columns) if len(tensors) == 1 else _qkv(spec, rank, tensors, columns)
    if module in ("output_proj", "mlp_down_proj") and kind == "weight":
        width = spec.q_size if module == "output_proj" else mlp
        return [Piece(tensors[0], (hidden, width), 1, *_share(width, rank))]
    if module == "router":
        assert spec.experts is not None
        return [Piece(tensors[0], (spec.experts.num_experts, *columns), 0, 0, spec.experts.num_experts)]
    size = spec.head_dim if module in ("q_norm", "k_norm") else hidden
    return [Piece(tensors[0], (size,), 0, 0, size)]


def _share(size: int, rank: Rank) -> tuple[int, int]:
    each = size // rank.tp_size
    return rank.tp_rank * each, (rank.tp_rank + 1) * each


def _qkv(spec: ModelSpec, rank: Rank, tensors: list[str], columns: tuple[int, ...]) -> list[Piece]:
    heads = local_kv_heads(spec, rank)
    kv = heads.start * spec.head_dim, heads.stop * spec.head_dim
    q, k, v = tensors
    return [
        Piece(q, (spec.q_size, *columns), 0, *_share(spec.q_size, rank)),
        Piece(k, (spec.kv_size, *columns), 0, *kv),
        Piece(v, (spec.kv_size, *columns), 0, *kv),
    ]


def _experts(spec: ModelSpec, rank: Rank, tensors: list[str], kind: str, fused: bool) -> list[Piece]:
    """Each expert's gate and up, or its down projection, from its own tensors or from those of all experts."""
    assert spec.experts is not None
    hidden, width, count = spec.hidden_size, spec.experts.intermediate_size, spec.experts.num_experts
    start, stop = _share(width, rank)
    if not fused:
        shape, dim = ((width, hidden), 0) if kind == "gate_up_proj" else ((hidden, width), 1)
        return [
            Piece(f"{tensor.format(expert)}.weight", shape, dim, start, stop)
            for expert in range(count)
            for tensor in tensors
        ]
    if kind == "down_proj":
        return [Piece(tensors[0], (count, hidden, width), 1, start, stop, expert) for expert in range(count)]
    return [
        Piece(tensors[0], (count, 2 * width, hidden), 0, first + start, first + stop, expert)
        for expert in range(count)
        for first in (0, width)
    ]


def _fused_qkv(spec: ModelSpec, rank: Rank, tensor: str, columns: tuple[int, ...]) -> list[Piece]:
    """Falcon's tensor is groups of [the query heads of a KV head, its key, its value].

    So are the older layouts: multi-query is one group, and multi-head groups with one query each.
    """
    size, queries = spec.head_dim, spec.num_attention_heads // spec.num_key_value_heads
    shape = (spec.q_size + 2 * spec.kv_size, *columns)

    def rows(group: int, first: int, count: int) -> Piece:
        start = (group * (queries + 2) + first) * size
        return Piece(tensor, shape, 0, start, start + count * size)

    parts = []
    q_start, q_stop = _share(spec.num_attention_heads, rank)
    for group, heads in groupby(range(q_start, q_stop), key=lambda head: head // queries):
        mine = list(heads)
        parts.append(rows(group, mine[0] % queries, len(mine)))
    kv_heads = local_kv_heads(spec, rank)
    return parts + [rows(group, queries, 1) for group in kv_heads] + [rows(group, queries + 1, 1) for group in kv_heads]
