"""Which slices of which checkpoint tensors make up each of a rank's parameters.

One table a family, as transformers names its tensors: our module -> theirs, several where ours is fused. The cut over
ranks depends on the module alone, and is the same for weights and biases:

- vocabulary (embedding, LM head), MLP gate and up: rows, evenly; the last rank's vocabulary may be short
- Q, K, V: by heads; with fewer KV heads than ranks, several ranks hold a copy of one
- attention output and MLP down: columns of the weight; their biases, and norms, are whole on every rank
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from engine.specs import ModelSpec
from engine.worker.parallel import Rank

_LLAMA = {
    "embedding": "model.embed_tokens",
    "layers": "model.layers.{}.",
    "input_norm": "input_layernorm",
    "qkv_proj": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "output_proj": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "mlp_gate_up_proj": "mlp.gate_proj mlp.up_proj",
    "mlp_down_proj": "mlp.down_proj",
    "final_norm": "model.norm",
    "lm_head": "lm_head",
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
    "internlm": _LLAMA,
    "falcon": _FALCON,
    "phi": _PHI,
}


@dataclass(frozen=True)
class Piece:
    """Elements start..stop of a checkpoint tensor's dimension `dim`; `shape` is the whole tensor's by the config."""

    tensor: str
    shape: tuple[int, ...]
    dim: int
    start: int
    stop: int


def local_kv_heads(spec: ModelSpec, rank: Rank) -> range:
    """The KV heads that a rank holds."""
    first = rank.tp_rank * spec.num_key_value_heads // rank.tp_size
    return range(first, first + rank.parallel.kv_heads_per_rank(spec))


def vocabulary_rows(spec: ModelSpec, rank: Rank) -> int:
    """Rows of the embedding, and of the LM head, on each rank; past the end of the vocabulary they are padding."""
    return -(-spec.vocab_size // rank.tp_size)


def first_layer(spec: ModelSpec, rank: Rank) -> int:
    """The model's number of the first layer of a rank's stage."""
    return sum(rank.parallel.stage_layers(spec.num_layers)[: rank.stage])


def tensor_names(spec: ModelSpec) -> dict[str, str]:
    """The family's table, with what depends on the config."""
    names = dict(FAMILIES[spec.model_type])
    if spec.model_type == "falcon" and spec.parallel_block and spec.norms_per_layer == 2:
        names |= {"input_norm": "ln_attn", "post_attention_norm": "ln_mlp"}
    return names


def pieces(spec: ModelSpec, rank: Rank, parameter: str) -> list[Piece]:
    """The pieces that make up a rank's parameter ("layers.0.qkv_proj.weight"), to be joined along dimension 0.

    The embedding and the LM head are shorter than the parameter where the vocabulary does not divide evenly.
    """
    module, _, kind = parameter.rpartition(".")
    names, prefix = tensor_names(spec), ""
    if module.startswith("layers."):
        _, layer, module = module.split(".")
        prefix = names["layers"].format(first_layer(spec, rank) + int(layer))
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
    return [Piece(tensors[0], (hidden,), 0, 0, hidden)]


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
