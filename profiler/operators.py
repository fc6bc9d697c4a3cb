"""The operator inventory: every operator that one iteration runs on one rank of a pipeline stage.

What is measured, what is predicted and what the engine's modules are called are the same names. An operator's work
depends on the batch through one number of rows (the batch's tokens, or the rows that are sampled) or, for attention,
through the requests' chunks and cached tokens. Operators that this engine runs as one, and others one after the other,
are one with `parts`: by these a table of such an engine is read. Left out: gathering the sampled rows' logits over
tensor-parallel ranks.
"""

from __future__ import annotations

from dataclasses import replace

from engine.specs import ModelSpec, ParallelSpec
from profiler.expert_kinds import AllGather, AllToAll, Experts, ReduceScatter
from profiler.kind import Operator, Rows
from profiler.kinds import AllReduce, AttentionDecode, AttentionPrefill, Elementwise, Gemm, Send

__all__ = ["Operator", "inventory"]


def inventory(model: ModelSpec, parallel: ParallelSpec, stage: int) -> tuple[Operator, ...]:
    """The operators of one rank of `stage`, in the order they run. Shapes are per rank."""
    tp, last_stage = parallel.tensor_parallel_size, parallel.pipeline_parallel_size - 1
    numbers = parallel.layers_of(stage, model.num_layers)
    layers, dense = len(numbers), sum(not model.has_experts(layer) for layer in numbers)
    hidden, width = model.hidden_size, model.activation_itemsize
    q = model.q_size // tp
    kv_heads = parallel.kv_heads_per_rank(model)
    kv = kv_heads * model.head_dim
    mlp = model.intermediate_size // tp
    vocab = -(-model.vocab_size // tp)
    branches = 2 if model.parallel_block and tp == 1 else 1  # that are added to the residual at once

    heads = (model.num_attention_heads // tp, kv_heads, model.head_dim)

    def gemm(name: str, count: int, k: int, n: int, rows: Rows = "tokens", dtype: str | None = None) -> Operator:
        return Gemm(name, count, rows, k=k, n=n, dtype=dtype)

    def linear(name: str, count: int, k: int, n: int) -> Operator:
        return gemm(name, count, k, n, dtype=model.linear_dtype)

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
    operators.append(linear("qkv_proj", layers, hidden, q + 2 * kv))
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
    full = sum(layer in model.full_attention_layers for layer in numbers)  # without the window that others have
    apart = bool(model.full_attention_layers)
    for attention in (AttentionPrefill, AttentionDecode):
        if full:
            operators.append(attention(attention.kind, full, "tokens", (), *heads, None))
        if full < layers:
            window = (model.sliding_window, apart)
            operators.append(
                attention(attention.kind + "_window" * apart, layers - full, "tokens", (), *heads, *window)
            )
    operators.append(linear("output_proj", layers, q, hidden))
    if model.norms_per_layer == 4:
        operators.append(elementwise("post_attention_output_norm", layers, 2 * hidden))
        operators.append(elementwise("mlp_output_norm", layers, 2 * hidden))
    if not model.parallel_block:
        if tp > 1:
            operators.append(all_reduce("attention_all_reduce", layers))
        names = ("attention_residual_norm", layers, "attention_residual_add", "post_attention_norm")
        operators.append(residual_norm(*names))
    elif model.norms_per_layer == 2:
        operators.append(elementwise("post_attention_norm", layers, 2 * hidden))
    if dense:
        up = "mlp_gate_up_proj" if model.gated_mlp else "mlp_up_proj"
        operators.append(linear(up, dense, hidden, mlp * (model.mlp_matrices - 1)))
        operators.append(elementwise("mlp_activation", dense, mlp * model.mlp_matrices))
        operators.append(linear("mlp_down_proj", dense, mlp, hidden))
    if dense < layers:
        operators += _mixture(model, parallel, layers - dense)
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


def _mixture(model: ModelSpec, parallel: ParallelSpec, count: int) -> list[Operator]:
    """The operators of `count` layers with experts, without the all-reduce that ends every layer."""
    experts, dp = model.experts, parallel.data_parallel_size
    assert experts is not None
    hidden, width, every = model.hidden_size, model.activation_itemsize, experts.num_experts
    shared = experts.shared_intermediate_size // parallel.tensor_parallel_size
    operators: list[Operator] = [Gemm("router", count, k=hidden, n=every)]
    operators.append(Elementwise("expert_choice", count, bytes_per_row=4 * (every + 2 * experts.top_k)))
    if shared:
        up = "shared_gate_up_proj" if model.gated_mlp else "shared_up_proj"
        operators.append(Gemm(up, count, k=hidden, n=shared * (model.mlp_matrices - 1), dtype=model.linear_dtype))
        activation = shared * model.mlp_matrices * width
        operators.append(Elementwise("shared_activation", count, bytes_per_row=activation))
        operators.append(Gemm("shared_down_proj", count, k=shared, n=hidden, dtype=model.linear_dtype))
        adds = 3 + 2 * experts.shared_gate  # its gate reads the input and scales the output
        operators.append(Elementwise("shared_expert_add", count, bytes_per_row=adds * hidden * width))
    whole = Experts(
        "experts",
        count,
        hidden=hidden,
        width=experts.intermediate_size // parallel.expert_tensor_size,
        local_experts=every // parallel.expert_parallel_size,
        num_experts=every,
        top_k=experts.top_k,
        matrices=model.mlp_matrices,
        replicas=dp,
        load=experts.load,
        dtype=model.expert_format or model.weight_dtype,
    )
    if dp == 1:
        return [*operators, whole]
    span = parallel.expert_ranks * parallel.pipeline_parallel_size
    if parallel.expert_exchange == "all_gather":  # the rows of every replica to all, and the sums back
        row = hidden * width
        gather = AllGather("expert_all_gather", count, bytes_per_row=row, num_ranks=dp, span=span)
        scatter = ReduceScatter("expert_reduce_scatter", count, bytes_per_row=row, num_ranks=dp, span=span)
        return [*operators, gather, whole, scatter]
    ranks = parallel.expert_ranks  # each row to those of them that have one of its experts, itself left out
    copies = (ranks - 1) * (1 - (1 - 1 / ranks) ** experts.top_k)
    share = -(-hidden * width // parallel.tensor_parallel_size)  # of a row: ranks of a replica send different rows

    def exchange(name: str) -> Operator:
        return AllToAll(name, count, bytes_per_row=share, num_ranks=ranks, span=span, copies=copies)

    return [*operators, exchange("expert_dispatch"), whole, exchange("expert_combine")]
