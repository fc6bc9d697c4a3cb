"""The operator inventory: every operator that one iteration runs on one rank of a pipeline stage.

What is measured, what is predicted and what the engine's modules are called are the same names. An operator's work
depends on the batch through one number of rows (the batch's tokens, or the rows that are sampled) or, for attention,
through the requests' chunks and cached tokens. Operators that this engine runs as one, and others one after the other,
are one with `parts`: by these a table of such an engine is read. Left out: gathering the sampled rows' logits over
tensor-parallel ranks.
"""

from __future__ import annotations

from dataclasses import replace

from engine.errors import InputError
from engine.specs import ModelSpec, ParallelSpec
from profiler.kind import Operator, Rows
from profiler.kinds import AllReduce, AttentionDecode, AttentionPrefill, Elementwise, Gemm, Send

__all__ = ["Operator", "inventory"]


def inventory(model: ModelSpec, parallel: ParallelSpec, stage: int) -> tuple[Operator, ...]:
    """The operators of one rank of `stage`, in the order they run. Shapes are per rank."""
    if model.experts is not None:
        raise InputError(f"{model.name} has experts, whose operators are not modelled yet: give a dense model")
    tp, last_stage = parallel.tensor_parallel_size, parallel.pipeline_parallel_size - 1
    layers = parallel.stage_layers(model.num_layers)[stage]
    hidden, width = model.hidden_size, model.activation_itemsize
    q = model.q_size // tp
    kv_heads = parallel.kv_heads_per_rank(model)
    kv = kv_heads * model.head_dim
    mlp = model.intermediate_size // tp
    vocab = -(-model.vocab_size // tp)
    branches = 2 if model.parallel_block and tp == 1 else 1  # that are added to the residual at once

    heads = (model.num_attention_heads // tp, kv_heads, model.head_dim, model.sliding_window)

    def gemm(name: str, count: int, k: int, n: int, rows: Rows = "tokens") -> Operator:
        return Gemm(name, count, rows, k=k, n=n)

    def elementwise(name: str, count: int, elements: float, rows: Rows = "tokens") -> Operator:
        return Elementwise(name, count, rows, bytes_per_row=int(elements * width))

    def residual_norm(name: str, count: int, add: str, norm: str) -> Operator:
        parts = elementwise(add, count, (1 + branches + 1) * hidden), elementwise(norm, count, 2 * hidden)
        return replace(elementwise(name, count, (1 + branches + 2) * hidden), parts=parts)

    def all_reduce(name: str, count: int) -> Operator:
        return AllReduce(name, count, bytes_per_row=hidden * width)

    operators = []
    if stage == 0:
        operators.append(elementwise("embedding", 1, 2 * hidden))
        if tp > 1:
            operators.append(all_reduce("embedding_all_reduce", 1))
    operators.append(elementwise("input_norm", 1, 2 * hidden))
    if layers > 1:
        operators.append(residual_norm("mlp_residual_norm", layers - 1, "mlp_residual_add", "input_norm"))
    operators.append(gemm("qkv_proj", layers, hidden, q + 2 * kv))
    if model.qk_norm:
        operators.append(elementwise("qk_norm", layers, 2 * (q + kv)))
    stored = 2 * kv * model.kv_cache_itemsize / width  # a key and a value, as elements of the activations
    kv_write = elementwise("kv_write", layers, 2 * kv + stored)
    if model.rotary_fraction > 0:
        rotary = elementwise("rotary", layers, 2 * (q + kv) * model.rotary_fraction)
        whole = elementwise("rotary_kv_write", layers, 2 * (q + kv) + stored)
        operators.append(replace(whole, parts=(rotary, kv_write)))
    else:
        operators.append(kv_write)
    for attention in (AttentionPrefill, AttentionDecode):
        operators.append(attention(attention.kind, layers, "tokens", (), *heads))
    operators.append(gemm("output_proj", layers, q, hidden))
    if not model.parallel_block:
        if tp > 1:
            operators.append(all_reduce("attention_all_reduce", layers))
        names = ("attention_residual_norm", layers, "attention_residual_add", "post_attention_norm")
        operators.append(residual_norm(*names))
    elif model.norms_per_layer == 2:
        operators.append(elementwise("post_attention_norm", layers, 2 * hidden))
    up = "mlp_gate_up_proj" if model.gated_mlp else "mlp_up_proj"
    operators.append(gemm(up, layers, hidden, mlp * (model.mlp_matrices - 1)))
    operators.append(elementwise("mlp_activation", layers, mlp * model.mlp_matrices))
    operators.append(gemm("mlp_down_proj", layers, mlp, hidden))
    if tp > 1:
        if model.parallel_block:  # one all-reduce for both branches
            operators.append(elementwise("branch_add", layers, 3 * hidden))
        operators.append(all_reduce("mlp_all_reduce", layers))
    operators.append(elementwise("mlp_residual_add", 1, (1 + branches + 1) * hidden))
    if stage == last_stage:
        operators.append(elementwise("final_norm", 1, 2 * hidden))
        operators.append(gemm("lm_head", 1, hidden, vocab, "sampled"))
        operators.append(elementwise("sampler", 1, 3 * vocab, "sampled"))
    else:
        operators.append(Send("send", 1, bytes_per_row=hidden * width))
    return tuple(operators)
