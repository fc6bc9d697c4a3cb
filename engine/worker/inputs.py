"""A batch as tensors: what the model and the attention read beside the KV cache.

What changes with a step goes to the device in one copy. The rows' block tables and newest tokens stay there, so that a
step can be launched before the host knows what the last one sampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.executor import Step
from engine.worker.attention.base import AttentionBatch

Whole = np.ndarray[Any, np.dtype[np.signedinteger[Any]]]  # integers of any width

COPIES_ON_THE_WAY = 8  # host buffers that may be read by copies to the device at once


@dataclass
class Inputs:
    """t tokens of a batch, decodes first, and m of them whose logits are wanted. int64, on the device."""

    token_ids: Tensor  # (t,)
    positions: Tensor  # (t,) of each token in its sequence
    slots: Tensor  # (t,) where its key and value go: block * block_size + offset
    last_tokens: Tensor  # (m,) the sampled ones among the t tokens
    num_decodes: int


class Rows:
    """What a rank keeps of each row: its block table (rows, blocks) and the token it sampled last (rows,).

    There is one row more, `padding_row`, whose only block is `padding_block`.
    """

    def __init__(self, num_rows: int, max_blocks: int, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.padding_row = num_rows
        self.table = torch.zeros(num_rows + 1, max_blocks, dtype=torch.int32, device=device)
        self.newest = torch.zeros(num_rows + 1, dtype=torch.int64, device=device)
        self._upload = _Upload(device)

    def set_padding_block(self, block: int) -> None:
        self.table[self.padding_row] = block

    def inputs(self, step: Step, pad_to: int = 0) -> tuple[Inputs, AttentionBatch]:
        """The tensors of a step. The tokens of a batch of decodes are padded to `pad_to`, if that is more."""
        padding = max(0, pad_to - len(step.tokens))
        chunks, kv_lens = step.chunks, step.starts + step.chunks
        ends = np.cumsum(chunks)
        tokens = np.pad(step.tokens, (0, padding))
        positions = np.pad(np.arange(len(step.tokens)) + np.repeat(kv_lens - ends, chunks), (0, padding))
        token_rows = np.pad(np.repeat(step.rows, chunks), (0, padding), constant_values=self.padding_row)
        last_tokens = np.arange(pad_to) if padding else ends[step.sampled] - 1
        parts = (tokens, positions, token_rows, last_tokens, step.rows, kv_lens, *step.new_blocks)
        device_parts = self._upload(parts)
        ids, place, token_rows_, last, rows, device_kv_lens, new_rows, offsets, new_ids = device_parts
        if len(new_ids):
            self.table[new_rows.long(), offsets.long()] = new_ids
        place, token_rows_ = place.long(), token_rows_.long()
        ids = torch.where(ids < 0, self.newest[token_rows_], ids)  # LAST_SAMPLED
        slots = self.table[token_rows_, place // self.block_size].long() * self.block_size + place % self.block_size
        width = -(-int(kv_lens.max()) // self.block_size)
        batch = AttentionBatch(
            num_decodes=step.num_decodes,
            chunks=chunks.tolist(),
            kv_lens=kv_lens.tolist(),
            kv_lens_device=device_kv_lens,
            block_table=self.table[:, :width][rows.long()],
        )
        return Inputs(ids, place, slots, last.long(), step.num_decodes + padding), batch

    def remember(self, step: Step, tokens: Tensor) -> None:
        """Keep the tokens (m,) that a step sampled."""
        (rows,) = self._upload((step.rows[step.sampled],))
        self.newest[rows.long()] = tokens


class _Upload:
    """Copies arrays to the device as one, from pinned memory where that lets the host go on."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers = [torch.empty(0, dtype=torch.int32)] * COPIES_ON_THE_WAY
        self._next = 0

    def __call__(self, parts: tuple[Whole, ...]) -> list[Tensor]:
        """int32 tensors of the parts, on the device."""
        sizes = [len(part) for part in parts]
        joined = torch.from_numpy(np.concatenate(parts, dtype=np.int32, casting="same_kind"))
        if self.device.type == "cpu":
            return list(joined.split(sizes))
        buffer = self._buffers[self._next]
        if len(buffer) < len(joined):
            buffer = self._buffers[self._next] = torch.empty(2 * len(joined), dtype=torch.int32, pin_memory=True)
        self._next = (self._next + 1) % COPIES_ON_THE_WAY
        buffer[: len(joined)] = joined
        return list(buffer[: len(joined)].to(self.device, non_blocking=True).split(sizes))
