"""What every attention backend does: attention of a batch's queries over a paged KV cache.

The cache of a layer is two tensors (blocks, block_size, KV heads, head_dim). A batch is `num_decodes` sequences of one
query each, then sequences with a chunk of queries each; a query at position p attends to the positions up to p of its
own sequence (its own key is in the cache already), and with a sliding window w only to those above p - w. Scores are
scaled by head_dim ** -0.5. What lies in cache slots that hold none of a sequence's tokens must not matter, NaN or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.worker.attention.paged import device_ints


@dataclass(frozen=True)
class AttentionShape:
    """What a backend is made for: heads of this rank, the cache's block size, the window in tokens."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    sliding_window: int | None
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize


@dataclass
class AttentionBatch:
    """Where the queries and keys of a batch are. n sequences, decodes first."""

    num_decodes: int
    chunks: list[int]  # (n,) queries of each sequence
    kv_lens: list[int]  # (n,) its cached tokens, these chunks' included
    table: NDArray[np.int32]  # (n, at least the blocks of the longest sequence) its blocks
    device: torch.device

    @cached_property
    def kv_lens_device(self) -> Tensor:
        """(n,) int32 on the device."""
        return device_ints(self.kv_lens, self.device)

    @cached_property
    def block_table(self) -> Tensor:
        """`table` on the device."""
        return device_ints(self.table, self.device)


class AttentionBackend:
    """Base of the backends. `plan` once a batch, then `decode` and `prefill` once a layer.

    None of them waits for the device. Between `plan` and the last layer the batch's tensors must stay as they are.
    """

    name: ClassVar[str]
    supports_cuda_graph: ClassVar[bool] = False

    def __init__(self, shape: AttentionShape) -> None:
        self.shape = shape

    @classmethod
    def unavailable(cls, shape: AttentionShape) -> str | None:
        """Why it can't serve this shape here (not installed, wrong device, block size, ...); None if it can."""
        raise NotImplementedError

    def plan(self, batch: AttentionBatch) -> None:
        """Prepare for a batch: what does not depend on the layer."""
        raise NotImplementedError

    def decode(self, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """Queries (num_decodes, heads, head_dim) -> outputs of the same shape."""
        raise NotImplementedError

    def prefill(self, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """Queries of the prefills (tokens - num_decodes, heads, head_dim) -> outputs of the same shape."""
        raise NotImplementedError

    def gathered_bytes(self, tokens: int, sequences: int, length: int) -> int:
        """Bytes of the copies of a layer's keys and values that a batch is computed from, at most.

        The batch is of up to `sequences` sequences that have up to `tokens` tokens in the cache together, and up to
        `length` each. 0 where the pages are read in place.
        """
        return 0

    def for_cuda_graph(self, batch_size: int, max_blocks: int) -> AttentionBackend:
        """A companion whose `decode` can be captured in a CUDA graph, if `supports_cuda_graph`.

        Its `plan` takes up to batch_size decodes (no prefills) of up to max_blocks blocks each, and refills in place
        the tensors that the captured kernels read: plan once before the capture, and before every replay. Its `decode`
        takes batch_size queries; those past the batch's decodes read the first slot of block 0 and mean nothing.
        """
        raise NotImplementedError(f"{self.name} can't be captured in a CUDA graph")
