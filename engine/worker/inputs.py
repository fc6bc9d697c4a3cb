"""A batch as tensors: what the model and the attention read beside the KV cache.

What changes with a step goes to the device in one copy. The rows' newest tokens stay there, so that a step can be
launched before the host knows what the last one sampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.runtime.executor import LAST_SAMPLED, Step
from engine.worker.attention.base import AttentionBatch

Whole = np.ndarray[Any, np.dtype[np.signedinteger[Any]]]  # integers of any width


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
        self.table = np.zeros((num_rows + 1, max_blocks), dtype=np.int32)
        self.newest = torch.zeros(num_rows + 1, dtype=torch.int64, device=device)
        self._device = device

    def set_padding_block(self, block: int) -> None:
        self.table[self.padding_row] = block

    def inputs(self, step: Step, pad_to: int = 0) -> tuple[Inputs, AttentionBatch, Tensor]:
        """The tensors of a step, and its sampled rows (m,), for `remember`.

        The tokens of a batch of decodes are padded to `pad_to`, if that is more.
        """
        self.table[step.new_blocks.rows, step.new_blocks.offsets] = step.new_blocks.ids
        padding = max(0, pad_to - len(step.tokens))
        chunks, kv_lens = step.chunks, step.starts + step.chunks
        ends = np.cumsum(chunks)
        tokens = np.pad(step.tokens, (0, padding))
        positions = np.pad(np.arange(len(step.tokens)) + np.repeat(kv_lens - ends, chunks), (0, padding))
        token_rows = np.pad(np.repeat(step.rows, chunks), (0, padding), constant_values=self.padding_row)
        blocks = self.table[token_rows, positions // self.block_size].astype(np.int64)
        slots = blocks * self.block_size + positions % self.block_size
        last_tokens = np.arange(pad_to) if padding else ends[step.sampled] - 1
        parts = (tokens, positions, slots, last_tokens, token_rows, step.rows[step.sampled])
        ids, device_positions, device_slots, last, device_rows, sampled_rows = _upload(parts, self._device)
        if (step.tokens == LAST_SAMPLED).any():
            ids = torch.where(ids == LAST_SAMPLED, self.newest[device_rows], ids)
        width = -(-int(kv_lens.max()) // self.block_size)
        batch = AttentionBatch(
            num_decodes=step.num_decodes,
            chunks=chunks.tolist(),
            kv_lens=kv_lens.tolist(),
            table=self.table[step.rows, :width],
            device=self._device,
        )
        return Inputs(ids, device_positions, device_slots, last, step.num_decodes + padding), batch, sampled_rows

    def remember(self, rows: Tensor, tokens: Tensor) -> None:
        """Keep the tokens (m,) that were sampled for `rows` (m,); 0 for NO_NUMBER, as the next step reads it too."""
        self.newest[rows] = tokens.clamp_min(0)


def _upload(parts: tuple[Whole, ...], device: torch.device) -> list[Tensor]:
    """The parts as int64 tensors on the device, in one copy: from pinned memory, which lets the host go on."""
    joined = torch.from_numpy(np.concatenate(parts, dtype=np.int64, casting="same_kind"))
    if device.type == "cuda":
        joined = joined.pin_memory().to(device, non_blocking=True)  # torch keeps what is pinned until it is copied
    return list(joined.split([len(part) for part in parts]))
