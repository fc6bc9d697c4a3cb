"""Attention by the package flash-attn 2.8, which reads the pages in place: CUDA, 16 bits.

Its block size must be a multiple of 256. Causality is aligned to the last key, and window_size counts the keys left and
right of a query, its own not included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.worker.attention.base import AttentionBackend, AttentionBatch, AttentionShape
from engine.worker.attention.paged import cumulative
from engine.worker.attention.requirements import cuda_reasons, package_reason

PAGE_MULTIPLE = 256


class FlashAttn(AttentionBackend):
    """flash_attn_with_kvcache for the decodes, flash_attn_varlen_func for the prefills."""

    name = "flash_attn"
    supports_cuda_graph = True

    def __init__(self, shape: AttentionShape) -> None:
        super().__init__(shape)
        from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

        self._with_kvcache = flash_attn_with_kvcache
        self._varlen = flash_attn_varlen_func
        window = shape.sliding_window
        self._options: dict[str, Any] = {"causal": True, "window_size": (-1, -1) if window is None else (window - 1, 0)}

    @classmethod
    def unavailable(cls, shape: AttentionShape) -> str | None:
        reasons = cuda_reasons(shape)
        if shape.block_size % PAGE_MULTIPLE:
            reasons.append(
                f"block size {shape.block_size} is not a multiple of {PAGE_MULTIPLE} (--block-size {PAGE_MULTIPLE})"
            )
        if shape.head_dim > 256:
            reasons.append(f"head_dim {shape.head_dim} is above 256")
        return "; ".join(reasons) or package_reason("flash_attn", "flash-attn")

    def plan(self, batch: AttentionBatch) -> None:
        n = batch.num_decodes
        if n:
            blocks = -(-max(batch.kv_lens[:n]) // self.shape.block_size)
            self._decode_lens = batch.kv_lens_device[:n]
            self._decode_table = batch.block_table[:n, :blocks]  # its width bounds the kernel's work
        if len(batch.chunks) > n:
            chunks, kv_lens = batch.chunks[n:], batch.kv_lens[n:]
            self._prefill = {
                "cu_seqlens_q": cumulative(chunks, self.shape.device),
                "cu_seqlens_k": cumulative(kv_lens, self.shape.device),
                "max_seqlen_q": max(chunks),
                "max_seqlen_k": max(kv_lens),
                "block_table": batch.block_table[n:],
            }

    def decode(self, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        out: Tensor = self._with_kvcache(
            q[:, None],  # (n, 1, heads, head_dim)
            k_cache,
            v_cache,
            cache_seqlens=self._decode_lens,
            block_table=self._decode_table,
            **self._options,
        )
        return out[:, 0]

    def prefill(self, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        out: Tensor = self._varlen(q, k_cache, v_cache, **self._prefill, **self._options)
        return out

    def for_cuda_graph(self, batch_size: int, max_blocks: int) -> FlashAttnGraph:
        return FlashAttnGraph(self.shape, batch_size, max_blocks)


class FlashAttnGraph(FlashAttn):
    """Decodes with lengths and a block table that stay in place. The table's full width is what is captured."""

    def __init__(self, shape: AttentionShape, batch_size: int, max_blocks: int) -> None:
        super().__init__(shape)
        self._decode_lens = torch.ones(batch_size, dtype=torch.int32, device=shape.device)
        self._decode_table = torch.zeros(batch_size, max_blocks, dtype=torch.int32, device=shape.device)

    def plan(self, batch: AttentionBatch) -> None:
        n = len(batch.chunks)
        width = min(batch.block_table.shape[1], self._decode_table.shape[1])
        self._decode_lens[:n] = batch.kv_lens_device
        self._decode_lens[n:] = 1
        self._decode_table[:n, :width] = batch.block_table[:, :width]
        self._decode_table[n:] = 0
