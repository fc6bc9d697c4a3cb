"""The decoder: one class for every family, with the layers and shards of one rank.

Modules and methods carry the names of `profiler.operators`, so that each can be run and timed by itself. Families
differ in what their ModelSpec says: norms, biases, a gated MLP or a plain one, after the attention or in parallel.

    rank = Rank(0, ParallelSpec())
    decoder = Decoder(spec, rank, Links(rank), torch.bfloat16, torch.device("cuda"))
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import InputError
from engine.specs import ModelSpec
from engine.worker import layers
from engine.worker.attention.base import AttentionBackend
from engine.worker.experts import Experts, Products, choose, has_grouped_kernel, in_one_kernel, one_by_one, plain
from engine.worker.inputs import Inputs
from engine.worker.layers import Embedding, Linear, NewParameter, Norm
from engine.worker.names import FAMILIES, vocabulary_rows
from engine.worker.parallel import Links, Rank

Cache = tuple[Tensor, Tensor]  # keys and values, (blocks, block_size, KV heads, head_dim) each


def check_supported(spec: ModelSpec) -> None:
    """Raise InputError for a model whose layers the engine hasn't got; the message names what is missing."""
    what = ""
    if spec.model_type not in FAMILIES:
        what = f"layers of model type {spec.model_type!r}: it knows {', '.join(sorted(FAMILIES))}"
    elif spec.activation not in layers.ACTIVATIONS:
        what = f"activation {spec.activation!r}: it knows {', '.join(sorted(layers.ACTIVATIONS))}"
    elif spec.rotary_fraction == 0:
        what = "attention without rotary embeddings (rotary_fraction=0; ALiBi)"
    elif spec.full_attention_layers:
        what = "sliding window in some layers only"
    elif spec.attention_sinks or spec.norms_per_layer > 2:
        what = "attention sinks" if spec.attention_sinks else f"layers of {spec.norms_per_layer} norms"
    elif spec.experts is not None and not (spec.gated_mlp and plain(spec.experts)):
        what = "experts that are shared, have biases or are not gated"
    elif spec.rope_scaling is not None and spec.rope_scaling.kind not in layers.ROPE_SCALINGS:
        what = f"rope scaling {spec.rope_scaling.kind!r}: it knows {', '.join(layers.ROPE_SCALINGS)}"
    if what:
        raise InputError(f"the engine can't run {spec.name}, for it has no {what}. Give another model, or simulate it")


class Layer(nn.Module):
    """One decoder layer on one rank: `heads` query and `kv_heads` KV heads of it, and a share of the MLP."""

    mlp_gate_up_proj: Linear  # one of the first two and the third, or else the others
    mlp_up_proj: Linear
    mlp_down_proj: Linear
    router: Linear
    experts: Experts

    def __init__(
        self, spec: ModelSpec, number: int, rank: Rank, links: Links, new: NewParameter, products: Products
    ) -> None:
        """`number` is the layer's in the model; `products` is how experts are computed, if it has them."""
        super().__init__()
        tp = rank.tp_size
        self.links, self.tp_size = links, tp
        self.gated, self.activation, self.parallel_block = spec.gated_mlp, spec.activation, spec.parallel_block
        self.heads, self.kv_heads = spec.num_attention_heads // tp, rank.parallel.kv_heads_per_rank(spec)
        self.head_dim = spec.head_dim
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        hidden, mlp, first = spec.hidden_size, spec.intermediate_size // tp, rank.tp_rank == 0

        self.input_norm = Norm(spec, new)
        self.qkv_proj = Linear(hidden, q + 2 * kv, spec.qkv_bias, new)
        self.q_norm = Norm(spec, new, self.head_dim) if spec.qk_norm else None
        self.k_norm = Norm(spec, new, self.head_dim) if spec.qk_norm else None
        self.output_proj = Linear(q, hidden, spec.attention_output_bias, new, adds_bias=first)
        self.post_attention_norm = Norm(spec, new) if spec.norms_per_layer == 2 else None
        self.mixture = spec.experts if spec.has_experts(number) else None
        if self.mixture is not None:
            self.router = Linear(hidden, self.mixture.num_experts, False, new)
            self.experts = Experts(spec, rank, new, products)
            return
        if self.gated:
            self.mlp_gate_up_proj = Linear(hidden, 2 * mlp, spec.mlp_bias, new)
        else:
            self.mlp_up_proj = Linear(hidden, mlp, spec.mlp_bias, new)
        self.mlp_down_proj = Linear(mlp, hidden, spec.mlp_bias, new, adds_bias=first)

    def forward(
        self,
        hidden: Tensor,
        branches: tuple[Tensor, ...],
        inputs: Inputs,
        angles: tuple[Tensor, Tensor],
        attention: AttentionBackend,
        cache: Cache,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(t, hidden_size) -> (t, hidden_size), and the layer's outputs that are still to be added to it.

        `branches` are those of the layer before, none for the first; `angles` are cosine and sine of the tokens'
        rotations. Adding a branch is left to the norm behind it, which reads it anyway.
        """
        if branches:
            hidden, x = self.mlp_residual_norm(hidden, *branches)
        else:
            x = self.input_norm(hidden)
        attended = self.output_proj(self.attend(x, inputs, angles, attention, cache))
        if self.parallel_block:
            mlp = self.mlp(x if self.post_attention_norm is None else self.post_attention_norm(hidden))
            if self.tp_size > 1:  # one all-reduce for both
                return hidden, (self.links.all_reduce(self.branch_add(attended, mlp)),)
            return hidden, (attended, mlp)
        hidden, x = self.attention_residual_norm(hidden, self.links.all_reduce(attended))
        return hidden, (self.links.all_reduce(self.mlp(x)),)

    def attend(
        self, x: Tensor, inputs: Inputs, angles: tuple[Tensor, Tensor], attention: AttentionBackend, cache: Cache
    ) -> Tensor:
        """Normed input (t, hidden_size) -> outputs of this rank's heads (t, heads * head_dim)."""
        tokens, decodes = x.shape[0], inputs.num_decodes
        qkv = self.qkv_proj(x).view(tokens, -1, self.head_dim)
        if self.q_norm is not None:
            qkv = self.qk_norm(qkv)
        q = self.rotary_kv_write(qkv, inputs.slots, angles, cache)
        if decodes == 0:
            out = attention.prefill(q, *cache)
        elif decodes == tokens:
            out = attention.decode(q, *cache)
        else:
            out = torch.cat((attention.decode(q[:decodes], *cache), attention.prefill(q[decodes:], *cache)))
        return out.reshape(tokens, -1)

    def mlp(self, x: Tensor) -> Tensor:
        """(t, hidden_size) -> (t, hidden_size), this rank's part of the sum; of the MLP or of the experts."""
        if self.mixture is not None:
            return self.experts(x, *self.expert_choice(self.router(x)))
        return self.mlp_down_proj(self.mlp_activation(self.mlp_gate_up_proj(x) if self.gated else self.mlp_up_proj(x)))

    def qk_norm(self, qkv: Tensor) -> Tensor:
        """RMS norm of each query and key head of qkv (t, heads + 2 KV heads, head_dim), in place."""
        assert self.q_norm is not None and self.k_norm is not None
        layers.norm_heads(qkv, self.q_norm.weight, self.k_norm.weight, self.heads, self.kv_heads, self.q_norm.eps)
        return qkv

    def rotary_kv_write(self, qkv: Tensor, slots: Tensor, angles: tuple[Tensor, Tensor], cache: Cache) -> Tensor:
        """Rotated queries of qkv (t, heads + 2 KV heads, head_dim); keys and values go to this layer's cache."""
        keys, values = (tensor.view(-1, self.kv_heads, self.head_dim) for tensor in cache)
        return layers.rotate_and_write(qkv, *angles, slots, self.heads, keys, values)

    def attention_residual_norm(self, residual: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """The residual plus the attention's output, and its norm for the MLP."""
        assert self.post_attention_norm is not None
        return self.post_attention_norm.of_sum(residual, attended)

    def branch_add(self, attended: Tensor, mlp: Tensor) -> Tensor:
        """The sum of a parallel block's outputs, in the place of the first."""
        return attended.add_(mlp)

    def mlp_activation(self, up: Tensor) -> Tensor:
        """Output of the up (or gate and up) projection -> input of the down projection."""
        return layers.gated_activate(up, self.activation) if self.gated else layers.activate(up, self.activation)

    def expert_choice(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The router's logits (t, experts) -> weights, float32, and numbers (t, top_k) of each token's experts."""
        assert self.mixture is not None
        return choose(logits, self.mixture)

    def mlp_residual_norm(self, residual: Tensor, *branches: Tensor) -> tuple[Tensor, Tensor]:
        """The residual plus what the layer before put out, and its norm for the attention."""
        return self.input_norm.of_sum(residual, *branches)

    def mlp_residual_add(self, residual: Tensor, *branches: Tensor) -> Tensor:
        """The residual plus one output, or plus the two of a parallel block that is on one rank."""
        return residual + (branches[0] if len(branches) == 1 else branches[0] + branches[1])


class Decoder(nn.Module):
    """A pipeline stage's layers on one rank, with the embedding on the first stage and the LM head on the last."""

    def __init__(self, spec: ModelSpec, rank: Rank, links: Links, dtype: torch.dtype, device: torch.device) -> None:
        """Parameters are empty. Raises InputError for a model that is not supported or can't be cut this way."""
        super().__init__()
        check_supported(spec)
        rank.parallel.validate(spec)
        if rank.parallel.data_parallel_size > 1 or rank.parallel.expert_parallel_size > 1:
            raise InputError(
                f"{rank.parallel}: the engine cuts every expert over the tensor-parallel ranks: give "
                "data_parallel_size=1 and expert_parallel_size=1, or simulate it"
            )
        self.spec, self.rank, self.links = spec, rank, links
        self.frequencies: Tensor
        self.register_buffer("frequencies", layers.rotary_frequencies(spec).to(device), persistent=False)
        new = partial(layers.new_parameter, dtype=dtype, device=device)
        self.embedding = Embedding(spec, rank, new) if rank.is_first_stage else None
        grouped = has_grouped_kernel(spec, rank, dtype, device)
        self.supports_cuda_graph = grouped or spec.experts is None
        products = in_one_kernel if grouped else one_by_one
        numbers = rank.parallel.layers_of(rank.stage, spec.num_layers)
        self.layers = nn.ModuleList(Layer(spec, number, rank, links, new, products) for number in numbers)
        self.final_norm = self.lm_head = None
        if rank.is_last_stage:
            self.final_norm = Norm(spec, new)
            tied = self.embedding.weight if self.embedding is not None and spec.tie_word_embeddings else None
            self.lm_head = Linear(spec.hidden_size, vocabulary_rows(spec, rank), spec.lm_head_bias, new, weight=tied)

    def forward(
        self, inputs: Inputs, attention: AttentionBackend, kv_caches: list[Cache], hidden: Tensor | None = None
    ) -> Tensor:
        """Run the stage on a batch for which `attention` has been planned; writes its keys and values.

        `hidden` (t, hidden_size) comes from the previous stage; the first one has none. Returns the same for the next
        stage, and on the last one logits (m, vocab_size) of the m `last_tokens`, on all of its ranks, in its own type.
        """
        if self.embedding is not None:
            hidden = self.links.all_reduce(self.embedding(inputs.token_ids))
        assert hidden is not None
        angles = layers.rotation(inputs.positions, self.frequencies)
        branches: tuple[Tensor, ...] = ()
        layer: Any
        for layer, cache in zip(self.layers, kv_caches, strict=True):
            hidden, branches = layer(hidden, branches, inputs, angles, attention, cache)
        hidden = layer.mlp_residual_add(hidden, *branches)
        if self.final_norm is None or self.lm_head is None:
            return hidden
        logits = self.lm_head(self.final_norm(hidden)[inputs.last_tokens])
        return self.links.gather_columns(logits)[:, : self.spec.vocab_size]
