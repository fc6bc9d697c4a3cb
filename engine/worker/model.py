"""The decoder: one class for every family, with the layers and shards of one rank.

Modules and methods carry the names of `profiler.operators`, so that each can be run and timed by itself. Families
differ in what their ModelSpec says: norms, biases, a gated MLP or a plain one, after the attention or in parallel.

    rank = Rank(0, ParallelSpec())
    decoder = Decoder(spec, rank, Links(rank), torch.bfloat16, torch.device("cuda"))
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from engine.errors import InputError
from engine.specs import ModelSpec
from engine.worker import layers
from engine.worker.attention.base import AttentionBackend
from engine.worker.inputs import Inputs
from engine.worker.layers import Embedding, Linear, NewParameter, Norm, TensorModule
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
    elif spec.rope_scaling is not None and spec.rope_scaling.kind not in layers.ROPE_SCALINGS:
        what = f"rope scaling {spec.rope_scaling.kind!r}: it knows {', '.join(layers.ROPE_SCALINGS)}"
    if what:
        raise InputError(f"the engine can't run {spec.name}, for it has no {what}. Give another model, or simulate it")


class Layer(TensorModule):
    """One decoder layer on one rank: `heads` query and `kv_heads` KV heads of it, and a share of the MLP."""

    mlp_gate_up_proj: Linear  # one of these two
    mlp_up_proj: Linear

    def __init__(self, spec: ModelSpec, rank: Rank, links: Links, new: NewParameter) -> None:
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
        self.output_proj = Linear(q, hidden, spec.attention_output_bias, new, adds_bias=first)
        self.post_attention_norm = Norm(spec, new) if spec.norms_per_layer == 2 else None
        if self.gated:
            self.mlp_gate_up_proj = Linear(hidden, 2 * mlp, spec.mlp_bias, new)
        else:
            self.mlp_up_proj = Linear(hidden, mlp, spec.mlp_bias, new)
        self.mlp_down_proj = Linear(mlp, hidden, spec.mlp_bias, new, adds_bias=first)

    def forward(
        self, hidden: Tensor, inputs: Inputs, angles: tuple[Tensor, Tensor], attention: AttentionBackend, cache: Cache
    ) -> Tensor:
        """(t, hidden_size) -> (t, hidden_size); `angles` are cosine and sine of the tokens' rotations."""
        x = self.input_norm(hidden)
        attended = self.output_proj(self.attend(x, inputs, angles, attention, cache))
        if self.parallel_block:
            mlp = self.mlp(x if self.post_attention_norm is None else self.post_attention_norm(hidden))
            if self.tp_size > 1:  # one all-reduce for both
                return self.mlp_residual_add(hidden, self.links.all_reduce(attended.add_(mlp)))
            return self.mlp_residual_add(hidden, attended, mlp)
        assert self.post_attention_norm is not None
        hidden = self.attention_residual_add(hidden, self.links.all_reduce(attended))
        return self.mlp_residual_add(hidden, self.links.all_reduce(self.mlp(self.post_attention_norm(hidden))))

    def attend(
        self, x: Tensor, inputs: Inputs, angles: tuple[Tensor, Tensor], attention: AttentionBackend, cache: Cache
    ) -> Tensor:
        """Normed input (t, hidden_size) -> outputs of this rank's heads (t, heads * head_dim)."""
        tokens, decodes = x.shape[0], inputs.num_decodes
        qkv = self.qkv_proj(x).view(tokens, -1, self.head_dim)
        values = self.heads + self.kv_heads
        q, k = self.rotary(qkv[:, : self.heads], qkv[:, self.heads : values], angles)
        self.kv_write(k, qkv[:, values:], inputs.slots, cache)
        if decodes == 0:
            out = attention.prefill(q, *cache)
        elif decodes == tokens:
            out = attention.decode(q, *cache)
        else:
            out = torch.cat((attention.decode(q[:decodes], *cache), attention.prefill(q[decodes:], *cache)))
        return out.reshape(tokens, -1)

    def mlp(self, x: Tensor) -> Tensor:
        """(t, hidden_size) -> (t, hidden_size), this rank's part of the sum."""
        return self.mlp_down_proj(self.mlp_activation(self.mlp_gate_up_proj(x) if self.gated else self.mlp_up_proj(x)))

    def rotary(self, q: Tensor, k: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Queries (t, heads, head_dim) and keys (t, KV heads, head_dim), rotated."""
        return layers.rotate(q, k, *angles)

    def kv_write(self, k: Tensor, v: Tensor, slots: Tensor, cache: Cache) -> None:
        """Write the tokens' keys and values (t, KV heads, head_dim) into their slots of this layer's cache."""
        for tensor, new in zip(cache, (k, v), strict=True):
            tensor.view(-1, self.kv_heads, self.head_dim).index_copy_(0, slots, new)

    def attention_residual_add(self, residual: Tensor, attended: Tensor) -> Tensor:
        return residual + attended

    def mlp_activation(self, up: Tensor) -> Tensor:
        """Output of the up (or gate and up) projection -> input of the down projection."""
        return layers.gated_activate(up, self.activation) if self.gated else layers.activate(up, self.activation)

    def mlp_residual_add(self, residual: Tensor, *branches: Tensor) -> Tensor:
        """The residual and one output, or the two of a parallel block that is on one rank."""
        return residual + branches[0] if len(branches) == 1 else layers.add3(residual, *branches)


class Decoder(nn.Module):
    """A pipeline stage's layers on one rank, with the embedding on the first stage and the LM head on the last."""

    def __init__(self, spec: ModelSpec, rank: Rank, links: Links, dtype: torch.dtype, device: torch.device) -> None:
        """Parameters are empty. Raises InputError for a model that is not supported or can't be cut this way."""
        super().__init__()
        check_supported(spec)
        rank.parallel.validate(spec)
        self.spec, self.rank, self.links = spec, rank, links
        self.frequencies: Tensor
        self.register_buffer("frequencies", layers.rotary_frequencies(spec).to(device), persistent=False)
        new = partial(layers.new_parameter, dtype=dtype, device=device)
        self.embedding = Embedding(spec, rank, new) if rank.is_first_stage else None
        count = rank.parallel.stage_layers(spec.num_layers)[rank.stage]
        self.layers = nn.ModuleList(Layer(spec, rank, links, new) for _ in range(count))
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
        stage, and on the last one float32 logits (m, vocab_size) of the m `last_tokens`, on all of its ranks.
        """
        if self.embedding is not None:
            hidden = self.links.all_reduce(self.embedding(inputs.token_ids))
        assert hidden is not None
        angles = layers.rotation(inputs.positions, self.frequencies)
        for layer, cache in zip(self.layers, kv_caches, strict=True):
            hidden = layer(hidden, inputs, angles, attention, cache)
        assert hidden is not None
        if self.final_norm is None or self.lm_head is None:
            return hidden
        logits = self.lm_head(self.final_norm(hidden)[inputs.last_tokens])
        return self.links.gather_columns(logits)[:, : self.spec.vocab_size].float()
