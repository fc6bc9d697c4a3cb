"""Attention by the package flashinfer 0.6, which reads the pages in place: CUDA, 16 bits, any block size.

Its kernels are compiled at first use unless flashinfer-jit-cache is installed, which needs nvcc and ninja. A wrapper
plans on the host into a pinned buffer of its own and copies that to the device: before it plans again, that copy must
be done, so a plan waits for the one before it (not for the batch before it to be computed).
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.worker.attention.base import AttentionBackend, AttentionBatch, AttentionShape
from engine.worker.attention.paged import device_ints, host_ints
from engine.worker.attention.requirements import cuda_reasons, package_reason

MOST_SMS = 160  # of a GPU
RECOMMENDED_BYTES = 128 << 20
HEAD_DIMS = (64, 128, 256)


def pages(
    kv_lens: list[int], table: NDArray[np.int32], block_size: int, device: torch.device, padding: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """The pages of n sequences, and of `padding` more that hold one token each, in block 0.

    Returns on the host where each sequence's pages begin (n + padding + 1,) and how many tokens are in its last page
    (n + padding,); and, between them, on the device the ids of all pages, one sequence after another.
    """
    lens = np.array([*kv_lens, *[1] * padding], dtype=np.int32)
    counts = -(-lens // block_size)
    ids = table[np.arange(table.shape[1]) < counts[: len(kv_lens), None]]
    pinned = device.type == "cuda"
    begin = host_ints(np.cumsum([0, *counts], dtype=np.int32), pinned)
    return (
        begin,
        device_ints(np.append(ids, np.zeros(padding, np.int32)), device),
        host_ints((lens - 1) % block_size + 1, pinned),
    )


def workspace_bytes(shape: AttentionShape, graph_decodes: int = 0) -> int:
    """Room for partial results of split sequences; one for wrappers that run one by one.

    As much as its attention/scheduler.cuh pads a plan to, or what it recommends: float32 outputs and their sums for
    tiles of the queries that share a KV head, of `graph_decodes` in a graph or, for prompts, of as many as there are
    processors for.
    """
    group = shape.num_heads // shape.num_kv_heads
    tile = 16 if group <= 16 else 64 if group <= 64 else 128
    decodes = (-(-graph_decodes * group // tile) + graph_decodes) * tile
    prompts = (2 * MOST_SMS // shape.num_kv_heads + 1) * 128
    partial: int = max(decodes, prompts) * shape.num_heads * (shape.head_dim + 1) * 4
    return max(partial, RECOMMENDED_BYTES) + (16 << 20)


def heads(shape: AttentionShape) -> tuple[int, int, int, int]:
    """What every plan is told, in its order."""
    return shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.block_size


def options(shape: AttentionShape) -> dict[str, Any]:
    """What every plan is told, by name. The window counts the keys left of a query, its own not included."""
    window_left = -1 if shape.sliding_window is None else shape.sliding_window - 1
    return {"window_left": window_left, "q_data_type": shape.dtype, "kv_data_type": shape.dtype}


def decode_wrapper(shape: AttentionShape, workspace: Tensor, **buffers: Any) -> Any:
    """A wrapper for decodes: on tensor cores where heads are grouped, as without them not every group has a kernel."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    grouped = shape.num_heads > shape.num_kv_heads
    return BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=grouped, backend="fa2", **buffers)


class FlashInfer(AttentionBackend):
    """A decode wrapper and a prefill wrapper over one workspace."""

    name = "flashinfer"
    supports_cuda_graph = True

    def __init__(self, shape: AttentionShape) -> None:
        super().__init__(shape)
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        self._workspace = torch.zeros(workspace_bytes(shape), dtype=torch.uint8, device=shape.device)
        self._decoder = decode_wrapper(shape, self._workspace)
        self._prefiller = BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD", backend="fa2")
        self._planned = torch.cuda.Event()

    @classmethod
    def unavailable(cls, shape: AttentionShape) -> str | None:
        reasons = cuda_reasons(shape)
        if shape.head_dim not in HEAD_DIMS:
            reasons.append(f"head_dim {shape.head_dim} is none of {', '.join(map(str, HEAD_DIMS))}")
        return "; ".join(reasons) or package_reason("flashinfer", "flashinfer-python")

    def plan(self, batch: AttentionBatch) -> None:
        n = batch.num_decodes
        self._planned.synchronize()
        if n:
            where = pages(batch.kv_lens[:n], batch.table[:n], self.shape.block_size, batch.device)
            self._decoder.plan(*where, *heads(self.shape), **options(self.shape))
        if len(batch.chunks) > n:
            queries = host_ints([0, *accumulate(batch.chunks[n:])], pinned=batch.device.type == "cuda")
            where = pages(batch.kv_lens[n:], batch.table[n:], self.shape.block_size, batch.device)
            self._prefiller.plan(queries, *where, *heads(self.shape), causal=True, **options(self.shape))
        self._planned.record()

    def decode(self, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        out: Tensor = self._decoder.run(q, (k_cache, v_cache))
        return out

    def prefill(self, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        out: Tensor = self._prefiller.run(q, (k_cache, v_cache))
        return out

    def for_cuda_graph(self, batch_size: int, max_blocks: int) -> FlashInferGraph:
        size = workspace_bytes(self.shape, batch_size)
        if size > len(self._workspace):  # graphs come the largest first
            self._workspace = torch.zeros(size, dtype=torch.uint8, device=self.shape.device)
        return FlashInferGraph(self.shape, self._workspace, batch_size, max_blocks)


class FlashInferGraph(AttentionBackend):
    """Decodes by a wrapper whose page lists stay in place. It plans for exactly batch_size sequences."""

    name = "flashinfer"

    def __init__(self, shape: AttentionShape, workspace: Tensor, batch_size: int, max_blocks: int) -> None:
        super().__init__(shape)
        self._batch_size = batch_size
        sizes = {"indptr": batch_size + 1, "indices": batch_size * max_blocks, "last_page_len": batch_size}
        buffers = {
            f"paged_kv_{name}_buffer": torch.zeros(size, dtype=torch.int32, device=shape.device)
            for name, size in sizes.items()
        }
        self._decoder = decode_wrapper(shape, workspace, use_cuda_graph=True, **buffers)
        self._planned = torch.cuda.Event()

    def plan(self, batch: AttentionBatch) -> None:
        padding = self._batch_size - len(batch.kv_lens)
        self._planned.synchronize()
        where = pages(batch.kv_lens, batch.table, self.shape.block_size, batch.device, padding)
        self._decoder.plan(*where, *heads(self.shape), **options(self.shape))
        self._planned.record()

    def decode(self, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        out: Tensor = self._decoder.run(q, (k_cache, v_cache))
        return out
