"""A GPU that is stood in for by the CPU, so that the engine's code for CUDA runs where there is none.

What is asked of "cuda" is done on the CPU at once. A CUDA graph is what torch dispatched while it was captured, done
again on the very tensors that were there then: a replay that reads anything else, or a capture that looks at a value,
goes wrong as it would on a GPU. What is used of flash-attn and flashinfer is computed plainly.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MEMORY = 1 << 30
LOOKS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)


class OnTheCpu(TorchFunctionMode):
    """Takes "cuda" for "cpu" in every call of torch, and pinned memory for any."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.pin_memory:
            return args[0]
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        kwargs = {name: _cpu(value) for name, value in (kwargs or {}).items() if name != "pin_memory"}
        return func(*map(_cpu, args), **kwargs)


def _cpu(value: Any) -> Any:
    """Devices are given as arguments, never inside of lists."""
    is_cuda = isinstance(value, torch.device | str) and str(value).startswith("cuda")
    return torch.device("cpu") if is_cuda else value


class Graph:
    """torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def pool(self) -> tuple[int, int]:
        return (0, 0)

    def replay(self) -> None:
        for func, args, kwargs, then in self.calls:
            for old, new in zip(tree_leaves(then), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


class Capture(TorchDispatchMode):
    """torch.cuda.graph."""

    def __init__(self, graph: Graph, pool: Any = None) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in LOOKS:
            raise RuntimeError(f"{func} waits for the GPU, which is not permitted while a graph is captured")
        out = func(*args, **(kwargs or {}))
        self.graph.calls.append((func, args, kwargs or {}, out))
        return out


class Event:
    """torch.cuda.Event. Everything has happened when it is asked about."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, block_table: Tensor, causal: bool,
    window_size: tuple[int, int],
) -> Tensor:  # fmt: skip
    """q (n, 1, heads, head_dim); looks at no value on the host, as the real one."""
    assert causal and window_size == (-1, -1)
    return _attention(q, k_cache, v_cache, cache_seqlens, block_table)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, causal: bool, window_size: tuple[int, int], block_table: Tensor,
) -> Tensor:  # fmt: skip
    assert causal and window_size == (-1, -1)
    parts = q.split(cu_seqlens_q.diff().tolist())
    rows = zip(parts, cu_seqlens_k.diff(), block_table, strict=True)
    return torch.cat([_attention(part[None], k, v, length[None], table[None])[0] for part, length, table in rows])


class Wrapper:
    """flashinfer's two wrappers: `run` reads what `plan` left in the buffers, and looks at no value on the host."""

    def __init__(self, workspace: Tensor, layout: str, *, use_cuda_graph: bool = False, use_tensor_cores: bool = False,
                 backend: str, **buffers: Tensor) -> None:  # fmt: skip
        assert layout == "NHD" and backend == "fa2" and use_cuda_graph == bool(buffers)
        self._fixed = {name.removeprefix("paged_kv_").removesuffix("_buffer"): each for name, each in buffers.items()}

    def _pages(self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, page_size: int) -> None:
        new = {"indptr": indptr, "indices": indices, "last_page_len": last_page_len}
        for name, tensor in self._fixed.items():
            tensor[: len(new[name])].copy_(new[name])
        self._now, self._page_size = self._fixed or new, page_size
        most = len(self._fixed["indices"]) // len(last_page_len) if self._fixed else int(indptr.diff().max())
        self._places = torch.arange(most)

    def _attend(self, q: Tensor, kv: tuple[Tensor, Tensor], rows: slice = slice(None)) -> Tensor:
        indptr, indices = self._now["indptr"], self._now["indices"]
        lens = (indptr.diff() - 1) * self._page_size + self._now["last_page_len"]
        table = indices[(indptr[:-1, None] + self._places).clamp_max(len(indices) - 1)]
        return _attention(q, *kv, lens[rows], table[rows])


class BatchDecodeWithPagedKVCacheWrapper(Wrapper):
    def plan(self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, num_qo_heads: int, num_kv_heads: int,
             head_dim: int, page_size: int, **options: Any) -> None:  # fmt: skip
        self._pages(indptr, indices, last_page_len, page_size)

    def run(self, q: Tensor, kv: tuple[Tensor, Tensor]) -> Tensor:
        return self._attend(q[:, None], kv)[:, 0]


class BatchPrefillWithPagedKVCacheWrapper(Wrapper):
    def plan(self, qo_indptr: Tensor, indptr: Tensor, indices: Tensor, last_page_len: Tensor, num_qo_heads: int,
             num_kv_heads: int, head_dim: int, page_size: int, *, causal: bool, **options: Any) -> None:  # fmt: skip
        assert causal
        self._pages(indptr, indices, last_page_len, page_size)
        self._chunks = qo_indptr.diff().tolist()

    def run(self, q: Tensor, kv: tuple[Tensor, Tensor]) -> Tensor:
        parts = enumerate(q.split(self._chunks))
        return torch.cat([self._attend(part[None], kv, slice(i, i + 1))[0] for i, part in parts])


def _attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, lens: Tensor, table: Tensor) -> Tensor:
    """q (n, queries, heads, head_dim), the last `queries` of each sequence's `lens` (n,) tokens."""
    group = q.shape[2] // k_cache.shape[2]
    seen = torch.arange(table.shape[1] * k_cache.shape[1])
    ends = lens[:, None] - q.shape[1] + torch.arange(q.shape[1]) + 1  # (n, queries)
    visible = (seen < ends[..., None])[:, None]  # (n, 1, queries, keys)
    k, v = (cache[table].flatten(1, 2).double() for cache in (k_cache, v_cache))  # (n, keys, KV heads, head_dim)
    k, v = (torch.where(visible[:, 0, -1, :, None, None], each, 0.0).repeat_interleave(group, 2) for each in (k, v))
    scores = torch.einsum("nqhd,nkhd->nhqk", q.double(), k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("nhqk,nkhd->nqhd", weights, v).to(q.dtype)


@contextmanager
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """While it is open, there is a GPU, with flash-attn and flashinfer."""
    for name, value in {
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": Capture,
        "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "stream": lambda stream: nullcontext(),
        "synchronize": lambda: None,
        "_sleep": lambda cycles: time.sleep(cycles * 1e-12),
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "set_device": lambda device: None,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "NVIDIA H200",
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 0,
        "memory_reserved": lambda: 0,
        "reset_peak_memory_stats": lambda: None,
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    of_flash_attn = (flash_attn_with_kvcache, flash_attn_varlen_func)
    of_flashinfer = (BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper)
    for name, parts in {"flash_attn": of_flash_attn, "flashinfer": of_flashinfer}.items():
        package: Any = SimpleNamespace(**{part.__name__: part for part in parts})
        monkeypatch.setitem(sys.modules, name, package)
        monkeypatch.setattr(f"engine.worker.attention.{name}.package_reason", lambda module, package: None)
    for place in ("engine.worker.runner", "engine.worker.layers"):
        monkeypatch.setattr(f"{place}.compile_elementwise", lambda on: None)
    with OnTheCpu():
        yield
