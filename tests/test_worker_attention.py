"""Attention over a paged cache: sdpa against a plain softmax in float64, every other backend against sdpa.

The libraries that need a GPU are also stood in for by functions with their signatures and documented meaning, so that
what is passed to them is checked where there is none.
"""

from __future__ import annotations

import inspect
import sys
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from random_examples import random_examples
from torch import Tensor

from engine.errors import InputError
from engine.worker.attention import BACKENDS, select
from engine.worker.attention.base import AttentionBackend, AttentionBatch, AttentionShape
from engine.worker.attention.flash_attn import FlashAttn
from engine.worker.attention.flashinfer import FlashInfer
from engine.worker.attention.sdpa import TILE, Sdpa
from engine.worker.attention.torch_varlen import TorchVarlen

CPU = torch.device("cpu")


class Case(NamedTuple):
    """A batch and what it attends to. Keys and values (tokens, KV heads, head_dim) are of each sequence, unpaged."""

    shape: AttentionShape
    batch: AttentionBatch
    q: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    k_cache: Tensor
    v_cache: Tensor


def shape_of(
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    block_size: int = 16,
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
) -> AttentionShape:
    return AttentionShape(*heads, head_dim, block_size, window, dtype, device)


def make_case(shape: AttentionShape, decodes: list[int], prefills: list[tuple[int, int]], seed: int = 0) -> Case:
    """Decodes by their cached tokens, prefills by (prefix, chunk). Every slot that holds no token is NaN."""
    generator = torch.Generator().manual_seed(seed)
    chunks = [1] * len(decodes) + [chunk for _, chunk in prefills]
    kv_lens = decodes + [prefix + chunk for prefix, chunk in prefills]
    counts = [-(-kv_len // shape.block_size) for kv_len in kv_lens]
    num_blocks, width = sum(counts) + 3, max(counts) + 2
    ids = torch.randperm(num_blocks, generator=generator)
    table = torch.randint(num_blocks, (len(counts), width), generator=generator)  # past its end a row is anything
    kv = (shape.num_kv_heads, shape.head_dim)
    caches = torch.full((2, num_blocks, shape.block_size, *kv), float("nan"), dtype=shape.dtype)
    keys, values = [], []
    for row, (kv_len, count) in enumerate(zip(kv_lens, counts, strict=True)):
        table[row, :count], ids = ids[:count], ids[count:]
        both = torch.randn(2, kv_len, *kv, generator=generator).to(shape.dtype)
        for token in range(kv_len):
            caches[:, table[row, token // shape.block_size], token % shape.block_size] = both[:, token]
        keys.append(both[0])
        values.append(both[1])
    size = shape.num_heads * shape.head_dim
    projected = torch.randn(sum(chunks), 2 * size, generator=generator).to(shape.dtype)  # queries with others beside
    q = projected[:, :size].view(-1, shape.num_heads, shape.head_dim)
    batch = AttentionBatch(len(decodes), chunks, kv_lens, table.int().numpy(), shape.device)
    q, k_cache, v_cache = (x.to(shape.device) for x in (q, *caches))
    return Case(shape, batch, q, keys, values, k_cache, v_cache)


def plain_attention(q: Tensor, keys: Tensor, values: Tensor, window: int | None, causal: bool = True) -> Tensor:
    """(chunk, heads, head_dim), the last queries of a sequence, over its keys: token by token in float64."""
    group = q.shape[1] // keys.shape[1]
    q, keys, values = q.double(), keys.double(), values.double()
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    out = torch.empty_like(q)
    for i in range(len(q)):
        last = len(keys) - len(q) + i if causal else len(keys) - 1
        seen = slice(0 if window is None else max(0, last - window + 1), last + 1)
        scores = torch.einsum("hd,khd->hk", q[i], keys[seen]) / q.shape[-1] ** 0.5
        out[i] = torch.einsum("hk,khd->hd", scores.softmax(-1), values[seen])
    return out


def expected(case: Case) -> Tensor:
    queries = case.q.cpu().split(case.batch.chunks)
    window = case.shape.sliding_window
    rows = zip(queries, case.keys, case.values, strict=True)
    return torch.cat([plain_attention(q, keys, values, window) for q, keys, values in rows])


def run(backend: AttentionBackend, case: Case) -> Tensor:
    n = case.batch.num_decodes
    outputs = []
    if n:
        outputs.append(backend.decode(case.q[:n], case.k_cache, case.v_cache))
    if n < len(case.batch.chunks):
        outputs.append(backend.prefill(case.q[n:], case.k_cache, case.v_cache))
    return torch.cat(outputs)


def assert_close(actual: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    assert wanted.numel() > 0
    assert actual.shape == wanted.shape
    torch.testing.assert_close(actual.cpu().double(), wanted.cpu().double(), atol=tolerance, rtol=tolerance)


# -- the reference ---------------------------------------------------------------------------------------------------

HEADS = [(1, 1), (4, 4), (4, 2), (6, 2), (8, 1)]
decode_lists = st.lists(st.integers(1, 70), max_size=4)
prefill_lists = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 40)), max_size=3)


@random_examples(60)
@given(
    heads=st.sampled_from(HEADS),
    head_dim=st.sampled_from([8, 16, 64]),
    block_size=st.sampled_from([1, 16, 256]),
    window=st.sampled_from([None, 1, 7, 33, 1000]),
    sequences=st.tuples(decode_lists, prefill_lists).filter(any),
    seed=st.integers(0, 2**31),
)
@example(heads=(4, 2), head_dim=8, block_size=16, window=7, sequences=([1, 70, 8], [(0, 7), (9, 1), (0, 8)]), seed=0)
def test_sdpa_is_attention(heads, head_dim, block_size, window, sequences, seed):
    case = make_case(shape_of(heads, head_dim, block_size, window), *sequences, seed)
    backend = Sdpa(case.shape)
    backend.plan(case.batch)
    assert_close(run(backend, case), expected(case))


@pytest.mark.parametrize("window", [None, TILE // 2, 2 * TILE])
def test_sdpa_prefill_of_several_tiles(window):
    case = make_case(shape_of((2, 1), 8, 16, window), [5], [(30, 2 * TILE + 1), (0, TILE + 9)])
    backend = Sdpa(case.shape)
    backend.plan(case.batch)
    assert_close(run(backend, case), expected(case))


def test_sdpa_in_bfloat16():
    case = make_case(shape_of(dtype=torch.bfloat16), [3, 40], [(20, 17)])
    backend = Sdpa(case.shape)
    backend.plan(case.batch)
    out = run(backend, case)
    assert out.dtype == torch.bfloat16
    assert_close(out, expected(case), 2e-2)


def test_one_plan_serves_every_layer_and_the_next_plan_another_batch():
    shape = shape_of()
    backend = Sdpa(shape)
    layers = [make_case(shape, [3, 90], [(20, 17)], seed=0)]
    layers.append(layers[0]._replace(k_cache=layers[0].k_cache.flip(-1), v_cache=layers[0].v_cache * 2))
    backend.plan(layers[0].batch)
    outputs = [run(backend, layer) for layer in layers]
    assert_close(outputs[0], expected(layers[0]))
    flipped = layers[1]._replace(keys=[x.flip(-1) for x in layers[0].keys], values=[x * 2 for x in layers[0].values])
    assert_close(outputs[1], expected(flipped))
    for sequences in (([200], []), ([], [(0, 3)]), ([1], [(0, 1), (50, 2)])):
        case = make_case(shape, *sequences, seed=1)
        backend.plan(case.batch)
        assert_close(run(backend, case), expected(case))


# -- which one -------------------------------------------------------------------------------------------------------


def test_select_takes_the_best_that_can():
    assert type(select(None, shape_of())) is Sdpa
    assert type(select("sdpa", shape_of())) is Sdpa
    assert list(BACKENDS) == ["flash_attn", "flashinfer", "torch_varlen", "sdpa"]


@pytest.mark.parametrize("name", ["flash_attn", "flashinfer", "torch_varlen"])
def test_select_says_why_a_backend_cannot_serve(name):
    message = f"{name} can't serve here: .*not float32; it needs a CUDA device.*Available: sdpa$"
    with pytest.raises(InputError, match=message):
        select(name, shape_of())
    assert not {"flash_attn", "flashinfer"} & set(sys.modules)  # asked about, not imported


def test_select_unknown():
    with pytest.raises(InputError, match="unknown attention backend 'flashattn': did you mean 'flash_attn'"):
        select("flashattn", shape_of())


def test_unavailable_names_the_shape():
    assert "--block-size 256" in str(FlashAttn.unavailable(shape_of(block_size=16)))
    assert "--block-size" not in str(FlashAttn.unavailable(shape_of(block_size=512)))
    assert "head_dim 80 is none of 64, 128, 256" in str(FlashInfer.unavailable(shape_of(head_dim=80)))
    assert "head_dim 12" in str(TorchVarlen.unavailable(shape_of(head_dim=12)))


def test_only_some_can_be_captured():
    assert {name for name, backend in BACKENDS.items() if backend.supports_cuda_graph} == {"flash_attn", "flashinfer"}
    with pytest.raises(NotImplementedError, match="sdpa can't be captured"):
        Sdpa(shape_of()).for_cuda_graph(4, 4)


# -- the libraries, stood in for ---------------------------------------------------------------------------------------


def window_of(window_size: tuple[int, int]) -> int | None:
    left, right = window_size
    assert right == 0
    return None if left < 0 else left + 1


def unpage(cache: Tensor, blocks: Tensor, length: int) -> Tensor:
    return cache[blocks.long()].flatten(0, 1)[:length]


def packed_attention(q, k, v, cu_q, cu_k, max_q, max_k, window):
    """What the varlen functions compute on packed sequences."""
    assert max_q == cu_q.diff().max()
    assert max_k == cu_k.diff().max()
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert q.shape[1] % k.shape[1] == 0
    assert len(q) == cu_q[-1]
    assert len(k) == cu_k[-1]
    rows = zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True)
    return torch.cat([plain_attention(q[slice(*i)], k[slice(*j)], v[slice(*j)], window) for i, j in rows])


def varlen_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=None):
    assert query.shape[1] == key.shape[1]
    return packed_attention(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_of(window_size))


def varlen_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None
):  # fmt: skip
    assert enable_gqa
    if block_table is not None:
        assert key.shape[1] % 256 == 0
        assert num_splits == 1
        assert seqused_k.tolist() == cu_seq_k.diff().tolist()
        rows = list(zip(block_table, seqused_k.tolist(), strict=True))
        key, value = (torch.cat([unpage(cache, *row) for row in rows]) for cache in (key, value))
    return packed_attention(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_of(window_size))


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("block_size", [16, 256])
@pytest.mark.parametrize("function", [varlen_2_11, varlen_2_13])
def test_what_torch_varlen_is_called_with(function, block_size, window):
    case = make_case(shape_of(block_size=block_size, window=window), [1, 40, 300], [(0, 9), (270, 20)])
    backend = TorchVarlen(case.shape, function)
    backend.plan(case.batch)
    assert_close(run(backend, case), expected(case))


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(
    ("decodes", "prefills"), [([40] * 3, []), ([1, 40, 300], []), ([], [(270, 20), (0, 9)]), ([5, 9], [(30, 10)])]
)
def test_what_sdpa_gathers_is_bounded(decodes, prefills, window):
    case = make_case(shape_of(window=window), decodes, prefills)
    backend = Sdpa(case.shape)
    backend.plan(case.batch)
    run(backend, case)
    lens = case.batch.kv_lens
    bound = backend.gathered_bytes(sum(lens), len(lens), max(lens))
    assert 0 < backend._gather._buffer.nbytes <= bound
    if window is None and len(set(lens)) == 1:
        assert backend._gather._buffer.nbytes == bound == sum(lens) * 2 * 2 * 16 * 4
    if window is not None and not prefills:
        assert bound >= backend._gather._buffer.nbytes == len(lens) * min(window, max(lens)) * 2 * 2 * 16 * 4


@pytest.mark.parametrize(
    ("function", "block_size", "copies"), [(varlen_2_11, 16, 3), (varlen_2_13, 16, 1), (varlen_2_13, 256, 0)]
)
def test_what_torch_varlen_gathers_is_counted(function, block_size, copies, monkeypatch):
    """The copies: packed, and expanded to the two query heads of each KV head."""
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    given_bytes = []

    def function_seen(*arguments, **options):
        given_bytes.append(0 if options.get("block_table") is not None else arguments[1].nbytes + arguments[2].nbytes)
        return function(*arguments, **options)

    function_seen.__signature__ = inspect.signature(function)
    case = make_case(shape_of(block_size=block_size), [1, 40, 300], [])
    backend = TorchVarlen(case.shape, function_seen)
    backend.plan(case.batch)
    run(backend, case)
    expanded = given_bytes[0] if copies == 3 else 0
    counted = backend.gathered_bytes(341, 3, 300)
    assert counted == backend._gather._buffer.nbytes + expanded == copies * 341 * 2 * 2 * 16 * 4
    assert backend.gathered_bytes(10**6, 3, 300) == copies * 900 * 2 * 2 * 16 * 4


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None,
    cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1)
):  # fmt: skip
    assert causal
    window = None if window_size == (-1, -1) else window_of(window_size)
    assert cache_seqlens.dtype == block_table.dtype == torch.int32
    assert len(q) == len(cache_seqlens) == len(block_table)
    lens = cache_seqlens.tolist()
    rows = [(unpage(k_cache, *row), unpage(v_cache, *row)) for row in zip(block_table, lens, strict=True)]
    return torch.stack([plain_attention(one, *kv, window) for one, kv in zip(q, rows, strict=True)])


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None
):  # fmt: skip
    assert causal
    window = None if window_size == (-1, -1) else window_of(window_size)
    rows = list(zip(block_table, cu_seqlens_k.diff().tolist(), strict=True))
    k, v = (torch.cat([unpage(cache, *row) for row in rows]) for cache in (k, v))
    return packed_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window)


class PagedWrapper:
    """What flashinfer's two wrappers do, told apart by whether plan is given where queries begin."""

    def __init__(self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, use_tensor_cores=None,
                 paged_kv_indptr_buffer=None, paged_kv_indices_buffer=None, paged_kv_last_page_len_buffer=None,
                 backend="auto"):  # fmt: skip
        assert kv_layout == "NHD"
        assert backend == "fa2"
        assert not use_cuda_graph or len(paged_kv_indptr_buffer) == len(paged_kv_last_page_len_buffer) + 1
        self.tensor_cores = use_tensor_cores
        self.graph = use_cuda_graph
        self.buffers = (paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)

    def fill(self, indptr, indices, last_page_len):
        assert indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32
        assert len(indices) == indptr[-1]
        if self.graph:
            assert len(last_page_len) == len(self.buffers[2])
            for buffer, new in zip(self.buffers, (indptr, indices, last_page_len), strict=True):
                buffer[: len(new)].copy_(new)
        else:
            self.buffers = (indptr, indices, last_page_len)

    def run(self, q, paged_kv_cache):
        assert self.tensor_cores is None or self.tensor_cores == (q.shape[1] > self.heads[1])
        _, block_size, num_kv_heads, head_dim = paged_kv_cache[0].shape
        assert self.heads == (q.shape[1], num_kv_heads, head_dim, block_size)
        indptr, indices, last = self.buffers
        out = []
        begins = self.queries.tolist() if self.queries is not None else range(len(indptr))
        for row, (begin, end) in enumerate(pairwise(begins)):
            ids = indices[indptr[row] : indptr[row + 1]]
            length = (len(ids) - 1) * block_size + int(last[row])
            kv = (unpage(cache, ids, length) for cache in paged_kv_cache)
            out.append(plain_attention(q[begin:end], *kv, self.window))
        return torch.cat(out)


class BatchDecodeWithPagedKVCacheWrapper(PagedWrapper):
    def plan(self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, *, window_left=-1,
             q_data_type="float16", kv_data_type=None):  # fmt: skip
        self.fill(indptr, indices, last_page_len)
        self.queries, self.window = None, window_of((window_left, 0))
        self.heads = (num_qo_heads, num_kv_heads, head_dim, page_size)


class BatchPrefillWithPagedKVCacheWrapper(PagedWrapper):
    def plan(self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
             head_dim_qk, page_size, *, causal=False, window_left=-1, q_data_type="float16",
             kv_data_type=None):  # fmt: skip
        assert causal
        self.fill(paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        self.queries, self.window = qo_indptr, window_of((window_left, 0))
        self.heads = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    flash_attn: Any = SimpleNamespace(
        flash_attn_with_kvcache=flash_attn_with_kvcache, flash_attn_varlen_func=flash_attn_varlen_func
    )
    flashinfer: Any = SimpleNamespace(
        BatchDecodeWithPagedKVCacheWrapper=BatchDecodeWithPagedKVCacheWrapper,
        BatchPrefillWithPagedKVCacheWrapper=BatchPrefillWithPagedKVCacheWrapper,
    )
    event = SimpleNamespace(synchronize=lambda: None, record=lambda: None)
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn)
    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr("engine.worker.attention.flashinfer.workspace_bytes", lambda *sizes: 1)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("backend_type", [FlashAttn, FlashInfer])
def test_what_the_libraries_are_called_with(backend_type, window):
    block_size = 256 if backend_type is FlashAttn else 16
    for heads in ((4, 2), (2, 2)):
        shape = shape_of(heads, block_size=block_size, window=window)
        backend = backend_type(shape)
        for sequences in (([1, 40, 300], [(0, 9), (270, 20)]), ([16, 33], []), ([], [(5, 16)])):
            case = make_case(shape, *sequences)
            backend.plan(case.batch)
            assert_close(run(backend, case), expected(case))


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("backend_type", [FlashAttn, FlashInfer])
def test_a_companion_for_cuda_graphs_refills_what_it_has(backend_type):
    shape = shape_of(block_size=256)
    companion = backend_type(shape).for_cuda_graph(batch_size=4, max_blocks=3)
    if backend_type is FlashAttn:
        fixed = (companion._decode_lens, companion._decode_table)
    else:
        fixed = companion._decoder.buffers
    addresses = [tensor.data_ptr() for tensor in fixed]
    for lens in ([700, 1, 300, 256], [5, 257], [9, 8, 7]):
        case = make_case(shape, lens, [])
        companion.plan(case.batch)
        q = torch.cat([case.q, torch.zeros(4 - len(lens), *case.q.shape[1:])])
        out = companion.decode(q, case.k_cache, case.v_cache)
        assert len(out) == 4
        assert_close(out[: len(lens)], expected(case))
    now = (companion._decode_lens, companion._decode_table) if backend_type is FlashAttn else companion._decoder.buffers
    assert [tensor.data_ptr() for tensor in now] == addresses


# -- on a GPU --------------------------------------------------------------------------------------------------------


def gpu_backend(name: str, shape: AttentionShape) -> AttentionBackend:
    """The backend, if there is a GPU and it can serve there; else the test is skipped."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    reason = BACKENDS[name].unavailable(shape)
    if reason is not None:
        pytest.skip(reason)
    return BACKENDS[name](shape)


def gpu_shape(heads: tuple[int, int], block_size: int, window: int | None = None, head_dim: int = 128):
    return shape_of(heads, head_dim, block_size, window, torch.bfloat16, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("block_size", [16, 256])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (14, 2)])
@pytest.mark.parametrize("name", BACKENDS)
def test_backend_on_a_gpu(name, heads, block_size, window):
    shape = gpu_shape(heads, block_size, window)
    backend = gpu_backend(name, shape)
    reference = Sdpa(shape)
    for sequences in (([1, 40, 300, 256], [(0, 9), (270, 130), (0, 700)]), ([33], []), ([], [(5, 16)])):
        case = make_case(shape, *sequences)
        reference.plan(case.batch)
        backend.plan(case.batch)
        assert_close(run(reference, case), expected(case), 2e-2)
        assert_close(run(backend, case), run(reference, case), 2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize("name", [name for name, backend in BACKENDS.items() if backend.supports_cuda_graph])
def test_decode_replayed_from_a_cuda_graph(name, heads):
    shape = gpu_shape(heads, 256)
    eager = gpu_backend(name, shape)
    companion = eager.for_cuda_graph(batch_size=4, max_blocks=8)
    cases = [make_case(shape, lens, [], seed) for seed, lens in enumerate(([1, 1, 1, 1], [900, 1, 300, 256], [5, 257]))]
    blocks = max(len(case.k_cache) for case in cases)
    k_cache, v_cache = (torch.zeros(blocks, *cases[0].k_cache.shape[1:], dtype=shape.dtype).cuda() for _ in range(2))
    q = torch.zeros(4, shape.num_heads, shape.head_dim, dtype=shape.dtype, device=shape.device)
    companion.plan(cases[0].batch)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        companion.decode(q, k_cache, v_cache)  # compiles, and allocates what it keeps
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = companion.decode(q, k_cache, v_cache)
    for case in cases:
        k_cache[: len(case.k_cache)], v_cache[: len(case.v_cache)] = case.k_cache, case.v_cache
        q[: len(case.q)] = case.q
        companion.plan(case.batch)
        graph.replay()
        eager.plan(case.batch)
        assert_close(out[: len(case.q)], run(eager, case), 1e-2)
