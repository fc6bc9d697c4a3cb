"""Attention by torch's scaled_dot_product_attention: any device, any type, any block size. The reference.

Keys are gathered from their pages. The query heads that share a KV head become a dimension of their own, over which
keys are broadcast: for a decode as more queries, for a prefill as more heads. So grouped heads are never copied, and
every case takes a fused kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from engine.worker.attention.base import AttentionBackend, AttentionBatch, AttentionShape
from engine.worker.attention.paged import Gather, first_key, packed_slots, padded_slots

TILE = 512  # queries of a prefill in one call: bounds the mask, and spares scores that it would discard


@dataclass
class Tile:
    """Queries of one prefill that go into one call, and the keys that they may see between them."""

    queries: slice  # of the prefills' queries
    keys: slice  # of the gathered keys
    causal: bool  # query i sees keys 0 to i
    mask: Tensor | None  # (queries, keys) added to the scores


class Sdpa(AttentionBackend):
    """Decodes in one call, padded to the longest; prefills in tiles, sequence by sequence."""

    name = "sdpa"

    def __init__(self, shape: AttentionShape) -> None:
        super().__init__(shape)
        self._gather = Gather()

    @classmethod
    def unavailable(cls, shape: AttentionShape) -> str | None:
        return None

    def gathered_bytes(self, tokens: int, sequences: int, length: int) -> int:
        """Of decodes, padded to the longest, or of prefills, packed."""
        longest = min(tokens, length)
        padded = min(tokens, sequences) * min(longest, self.shape.sliding_window or longest)
        return max(padded, min(tokens, sequences * length)) * self.shape.token_bytes

    def plan(self, batch: AttentionBatch) -> None:
        if batch.num_decodes:
            self._plan_decodes(batch)
        if len(batch.chunks) > batch.num_decodes:
            self._plan_prefills(batch)

    def _plan_decodes(self, batch: AttentionBatch) -> None:
        lens = batch.kv_lens[: batch.num_decodes]
        width = min(max(lens), self.shape.sliding_window or max(lens))
        ends = batch.kv_lens_device[: batch.num_decodes, None]
        steps = torch.arange(width, dtype=torch.int32, device=self.shape.device)
        positions = (ends - width).clamp_min(0) + steps  # (n, width)
        # past its end a sequence's last token stands in: masked too, but whatever is in an unused slot could be NaN
        table = batch.block_table[: batch.num_decodes]
        self._decode_slots = padded_slots(table, positions.minimum(ends - 1), self.shape.block_size)
        self._decode_mask = None if min(lens) >= width else self._mask(positions < ends)[:, None, None]

    def _plan_prefills(self, batch: AttentionBatch) -> None:
        window = self.shape.sliding_window
        chunks, kv_lens = batch.chunks[batch.num_decodes :], batch.kv_lens[batch.num_decodes :]
        starts = [kv_len - chunk for chunk, kv_len in zip(chunks, kv_lens, strict=True)]
        firsts = [first_key(start, window) for start in starts]
        table = batch.block_table[batch.num_decodes :]
        self._prefill_slots = packed_slots(table, firsts, kv_lens, self.shape.block_size)
        self._tiles = []
        query = key = 0  # where the sequence begins among the queries, and among the gathered keys
        for start, first, kv_len in zip(starts, firsts, kv_lens, strict=True):
            for begin in range(start, kv_len, TILE):
                end = min(begin + TILE, kv_len)
                queries = slice(query + begin - start, query + end - start)
                keys = slice(key + first_key(begin, window) - first, key + end - first)
                self._tiles.append(Tile(queries, keys, *self._visible(begin, end)))
            query += kv_len - start
            key += kv_len - first

    def _visible(self, begin: int, end: int) -> tuple[bool, Tensor | None]:
        """For queries at positions [begin, end): whether plain causality will do, else the mask, if one is needed."""
        window = self.shape.sliding_window
        first = first_key(begin, window)
        if first == begin and (window is None or window >= end - begin):
            return True, None
        if end - begin == 1:
            return False, None
        positions = torch.arange(first, end, device=self.shape.device)
        queries = positions[begin - first :, None]
        visible = positions <= queries
        if window is not None:
            visible &= positions > queries - window
        return False, self._mask(visible)

    def _mask(self, visible: Tensor) -> Tensor:
        # added rather than boolean, which every call would turn into this
        mask = torch.zeros(visible.shape, dtype=self.shape.dtype, device=self.shape.device)
        return mask.masked_fill_(~visible, float("-inf"))

    def decode(self, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        keys, values = self._gather(k_cache, v_cache, self._decode_slots)
        keys, values = (x.view(*self._decode_slots.shape, *x.shape[1:]).transpose(1, 2) for x in (keys, values))
        grouped = q.view(len(q), self.shape.num_kv_heads, -1, self.shape.head_dim)  # (n, KV heads, group, head_dim)
        out = scaled_dot_product_attention(grouped, keys, values, attn_mask=self._decode_mask)
        return out.reshape(q.shape)

    def prefill(self, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        keys, values = self._gather(k_cache, v_cache, self._prefill_slots)
        keys, values = (x.transpose(0, 1)[:, None] for x in (keys, values))  # (KV heads, 1, tokens, head_dim)
        grouped = q.view(len(q), self.shape.num_kv_heads, -1, self.shape.head_dim).permute(1, 2, 0, 3)
        group = grouped.shape[1]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for tile in self._tiles:
            outputs = scaled_dot_product_attention(
                grouped[:, :, tile.queries],
                keys[:, :, tile.keys].expand(-1, group, -1, -1),
                values[:, :, tile.keys].expand(-1, group, -1, -1),
                attn_mask=tile.mask,
                is_causal=tile.causal,
            )  # (KV heads, group, queries, head_dim)
            out[tile.queries] = outputs.permute(2, 0, 1, 3).flatten(1, 2)
        return out
