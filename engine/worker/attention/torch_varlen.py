"""Attention by torch.nn.attention.varlen: FlashAttention 2 as it comes with torch, on CUDA, in 16 bits.

Keys are gathered from their pages, as torch 2.11 reads packed sequences only. torch 2.13 reads pages in place where
the block size is a multiple of 256 (torch 2.12 has the argument too, but its kernel can't be told num_splits). Grouped
heads are expanded where torch lacks `enable_gqa`. Causality is aligned to the last key, as the kernel does it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.worker.attention.base import AttentionBackend, AttentionBatch, AttentionShape
from engine.worker.attention.paged import Gather, cumulative, first_key, packed_slots
from engine.worker.attention.requirements import cuda_reasons

PAGE_MULTIPLE = 256  # of FlashAttention 2


def torch_function() -> Callable[..., Any] | None:
    """torch's own; None if this torch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


@dataclass
class Sequences:
    """What a call needs to know of n sequences."""

    queries: Tensor  # (n + 1,) where each begins among the queries
    keys: Tensor  # (n + 1,) and among the keys
    max_queries: int
    max_keys: int
    slots: Tensor | None  # where the keys are; None: read through the block table
    kv_lens: Tensor  # (n,)
    block_table: Tensor  # (n, blocks)


class TorchVarlen(AttentionBackend):
    """One call for the decodes and one for the prefills, which differ too much in length to share one."""

    name = "torch_varlen"

    def __init__(self, shape: AttentionShape, function: Callable[..., Any] | None = None) -> None:
        """function: what to call instead of this torch's own."""
        super().__init__(shape)
        function = function or torch_function()
        assert function is not None
        self._function = function
        self._gather = Gather()
        parameters = inspect.signature(function).parameters
        self._expands_heads = "enable_gqa" not in parameters
        version = tuple(int(part) for part in torch.__version__.split(".")[:2])
        self._paged = "block_table" in parameters and version >= (2, 13) and shape.block_size % PAGE_MULTIPLE == 0
        self._options: dict[str, Any] = {}
        if "window_size" in parameters:
            left = -1 if shape.sliding_window is None else shape.sliding_window - 1
            self._options["window_size"] = (left, 0)
        else:
            self._options["is_causal"] = True
        if not self._expands_heads:
            self._options["enable_gqa"] = True

    @classmethod
    def unavailable(cls, shape: AttentionShape) -> str | None:
        reasons = cuda_reasons(shape)
        if shape.head_dim % 8 or shape.head_dim > 256:
            reasons.append(f"head_dim {shape.head_dim} is not a multiple of 8 up to 256")
        if shape.device.type != "cuda":
            return "; ".join(reasons)  # torch's function takes a second to import
        function = torch_function()
        if function is None:
            reasons.append("this torch has no torch.nn.attention.varlen")
        elif shape.sliding_window is not None and "window_size" not in inspect.signature(function).parameters:
            reasons.append("this torch has no sliding window in it")
        if not torch.backends.cuda.is_flash_attention_available():
            reasons.append("this torch is built without FlashAttention")
        return "; ".join(reasons) or None

    def gathered_bytes(self, tokens: int, sequences: int, length: int) -> int:
        """Of keys and values, packed, and once more for every query head where these are expanded."""
        if self._paged:
            return 0
        group = self.shape.num_heads // self.shape.num_kv_heads
        copies = 1 + group if self._expands_heads and group > 1 else 1
        return min(tokens, sequences * length) * self.shape.token_bytes * copies

    def plan(self, batch: AttentionBatch) -> None:
        n = batch.num_decodes
        if n:
            self._decodes = self._sequences(batch, slice(0, n))
        if len(batch.chunks) > n:
            self._prefills = self._sequences(batch, slice(n, None))

    def _sequences(self, batch: AttentionBatch, which: slice) -> Sequences:
        chunks, kv_lens = batch.chunks[which], batch.kv_lens[which]
        table = batch.block_table[which]
        slots = None
        lengths = kv_lens
        if not self._paged:
            window = self.shape.sliding_window
            firsts = [first_key(kv_len - chunk, window) for chunk, kv_len in zip(chunks, kv_lens, strict=True)]
            slots = packed_slots(table, firsts, kv_lens, self.shape.block_size)
            lengths = [kv_len - first for first, kv_len in zip(firsts, kv_lens, strict=True)]
        device = self.shape.device
        return Sequences(
            queries=cumulative(chunks, device),
            keys=cumulative(lengths, device),
            max_queries=max(chunks),
            max_keys=max(lengths),
            slots=slots,
            kv_lens=batch.kv_lens_device[which],
            block_table=table,
        )

    def decode(self, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        return self._call(q, k_cache, v_cache, self._decodes)

    def prefill(self, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        return self._call(q, k_cache, v_cache, self._prefills)

    def _call(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, sequences: Sequences) -> Tensor:
        options = dict(self._options)
        if sequences.slots is None:
            keys, values = k_cache, v_cache
            # one split: left to choose their number, 2.13's kernel gives NaN on pages now and then (torchtitan #3235)
            options |= {"block_table": sequences.block_table, "seqused_k": sequences.kv_lens, "num_splits": 1}
        else:
            keys, values = self._gather(k_cache, v_cache, sequences.slots)
            group = self.shape.num_heads // self.shape.num_kv_heads
            if self._expands_heads and group > 1:
                keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        out: Tensor = self._function(
            q,
            keys,
            values,
            sequences.queries,
            sequences.keys,
            sequences.max_queries,
            sequences.max_keys,
            **options,
        )
        return out
