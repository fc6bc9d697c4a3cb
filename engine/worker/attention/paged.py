"""Where a batch's keys lie in a paged cache, and the copying together of those that a kernel can't read in place.

A token's slot is block * block_size + offset, an index into the cache with its first two dimensions merged. Sizes come
from host lists and contents from device tensors, so that nothing here waits for the device.
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def host_ints(values: list[int] | NDArray[np.int32], pinned: bool) -> Tensor:
    """int32 on the host."""
    ints = torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32))
    return ints.pin_memory() if pinned else ints


def device_ints(values: list[int] | NDArray[np.int32], device: torch.device) -> Tensor:
    """int32 on the device. From pinned memory, which torch does not reuse before the copy is done."""
    on_cuda = device.type == "cuda"
    return host_ints(values, on_cuda).to(device, non_blocking=on_cuda)


def cumulative(lengths: list[int], device: torch.device) -> Tensor:
    """Where each of n packed sequences begins, and the end: (n + 1,) int32 on the device."""
    return device_ints([0, *accumulate(lengths)], device)


def first_key(position: int, window: int | None) -> int:
    """The first position that a query at `position` attends to."""
    return 0 if window is None else max(0, position - window + 1)


def padded_slots(block_table: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Slots of the tokens at `positions` (n, width) of n sequences: (n, width) int32."""
    blocks = block_table.gather(1, (positions // block_size).long())
    return blocks * block_size + positions % block_size


def packed_slots(block_table: Tensor, firsts: list[int], kv_lens: list[int], block_size: int) -> Tensor:
    """Slots of the tokens from firsts[i] up to kv_lens[i] of each sequence i, one after another: (sum,) int32."""
    device = block_table.device
    lengths = [kv_len - first for first, kv_len in zip(firsts, kv_lens, strict=True)]
    ends = list(accumulate(lengths))
    # token j of the packed ones is at position j + shift of its sequence
    shifts = [kv_len - end for kv_len, end in zip(kv_lens, ends, strict=True)]
    lengths_and_shifts = device_ints([*lengths, *shifts], device).view(2, -1)
    rows = torch.arange(len(lengths), device=device)
    rows = rows.repeat_interleave(lengths_and_shifts[0], output_size=ends[-1])
    positions = torch.arange(ends[-1], dtype=torch.int32, device=device) + lengths_and_shifts[1][rows]
    return block_table[rows, positions // block_size] * block_size + positions % block_size


class Gather:
    """Copies cached tokens together. Keeps its buffer: on a CPU a fresh one costs more than the copy itself."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def __call__(self, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (slots, KV heads, head_dim) of the slots (any shape). Valid until the next call."""
        heads_and_dim = k_cache.shape[2:]
        size = 2 * slots.numel() * heads_and_dim.numel()
        if self._buffer.numel() < size:
            self._buffer = torch.empty(0)  # first: there is room for one
            self._buffer = torch.empty(size, dtype=k_cache.dtype, device=k_cache.device)
        keys, values = self._buffer[:size].view(2, slots.numel(), *heads_and_dim)
        for cache, out in ((k_cache, keys), (v_cache, values)):
            # view, not flatten: a cache that is not contiguous should fail rather than be copied whole
            torch.index_select(cache.view(-1, *heads_and_dim), 0, slots.flatten(), out=out)
        return keys, values
