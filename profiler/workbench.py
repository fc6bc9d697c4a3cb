"""One rank of a model on the bench: its modules and kernels, ready to be called at any size and timed on a GPU.

The modules are the engine's own, on random data. There are only as many layers as a cache can't hold, and they are
called in turns. Of a tensor-parallel rank the shard is made and nothing is sent.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.runtime.engine_spec import DECODE_GRAPHS
from engine.specs import ModelSpec, ParallelSpec
from engine.worker import layers, weights
from engine.worker.attention import select
from engine.worker.attention.base import AttentionBatch, AttentionShape
from engine.worker.inputs import Inputs
from engine.worker.model import Decoder
from engine.worker.parallel import Links, Rank
from engine.worker.sampler import sample
from profiler.grids import Limits, Point
from profiler.kinds import KINDS
from profiler.timer import Call
from profiler.timing import Timing

CACHE_BYTES = 256 << 20  # weights in turns: more than a GPU's cache
KV_BYTES = 16 << 30  # of all layers' caches
INPUTS = 4  # random inputs, in turns
LAUNCHES = 40  # of all layers, to time them


class NoLinks(Links):
    """A rank that is alone: nothing is sent, sums are its own part."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self._group = None
        self._sending = []


class Workbench:
    """Rank 0 of `model` over `tensor_parallel_size` ranks. `limits` are cut to what the KV caches here hold.

    Points may be beyond: then sequences share blocks.
    """

    def __init__(
        self,
        model: ModelSpec,
        tensor_parallel_size: int,
        device: torch.device,
        dtype: torch.dtype,
        attention_backend: str | None,
        block_size: int,
        limits: Limits,
        seed: int = 0,
    ) -> None:
        parallel = ParallelSpec(tensor_parallel_size=tensor_parallel_size)
        parallel.validate(model)
        self.model, self.device, self.dtype, self.block_size = model, device, dtype, block_size
        layers.compile_elementwise(device.type == "cuda")
        torch.manual_seed(seed)
        rank = Rank(0, parallel)
        layer_bytes = model.matmul_parameters // model.num_layers // tensor_parallel_size * model.weight_itemsize
        few = _of_few_layers(model, CACHE_BYTES // max(1, layer_bytes) + 2)
        with torch.inference_mode():
            self.decoder = Decoder(few, rank, NoLinks(rank), dtype, device)
            weights.dummy(self.decoder, seed)
            kv_heads = parallel.kv_heads_per_rank(model)
            shape = AttentionShape(
                num_heads=model.num_attention_heads // tensor_parallel_size,
                num_kv_heads=kv_heads,
                head_dim=model.head_dim,
                block_size=block_size,
                sliding_window=model.sliding_window,
                dtype=dtype,
                device=device,
            )
            self.attention = select(attention_backend, shape)
            token_bytes = 2 * kv_heads * model.head_dim * model.kv_cache_itemsize * few.num_layers
            tokens = min(limits.kv_tokens, KV_BYTES // token_bytes)
            blocks = max(-(-max(limits.max_length, limits.max_tokens) // block_size), tokens // block_size)
            cache = (blocks, block_size, kv_heads, model.head_dim)
            self.caches = [(self._random(*cache), self._random(*cache)) for _ in range(few.num_layers)]
            self._blocks = np.random.default_rng(seed).permutation(blocks).astype(np.int32)
        self.limits = replace(limits, kv_tokens=blocks * block_size)

    def calls(self, point: Point) -> list[Call]:
        """What to time at a point: calls to take in turns."""
        with torch.inference_mode():
            return KINDS[str(point["kind"])].calls(self, point)

    def launch(self) -> Timing:
        """The host's time to launch the kernels of one layer eagerly, for a decode of one sequence."""
        zero = torch.zeros(1, dtype=torch.int64, device=self.device)
        inputs = Inputs(zero, zero, zero, zero, 1)
        seconds = []
        with torch.inference_mode():
            self.attention.plan(self._batch([1], [1], 1))
            angles = layers.rotation(zero, self.decoder.frequencies)
            for _ in range(LAUNCHES):
                hidden, branches = self._random(1, self.model.hidden_size), ()
                torch.cuda.synchronize()
                start = time.perf_counter()
                for layer, cache in zip(self.decoder.layers, self.caches, strict=True):
                    hidden, branches = layer(hidden, branches, inputs, angles, self.attention, cache)
                seconds.append((time.perf_counter() - start) / len(self.caches))
            torch.cuda.synchronize()
        warm = seconds[LAUNCHES // 4 :]
        return Timing(statistics.median(warm), statistics.pstdev(warm), len(warm))

    def attention_calls(self, chunks: list[int], kv_lens: list[int], decodes: int) -> list[Call]:
        """Calls of attention over new tokens and KV lengths of sequences, the first `decodes` of which are decodes."""
        attention, batch = self.attention, self._batch(chunks, kv_lens, decodes)
        if 0 < decodes <= max(DECODE_GRAPHS) and attention.supports_cuda_graph:  # as a graph runs it
            longest = max(batch.table.shape[1], -(-self.limits.max_length // self.block_size))
            attention = attention.for_cuda_graph(decodes, longest)
        attention.plan(batch)
        run = attention.decode if decodes else attention.prefill
        queries = [self._random(sum(chunks), attention.shape.num_heads, attention.shape.head_dim)
                   for _ in range(INPUTS)]  # fmt: skip
        pairs = [(queries[i % INPUTS], cache) for i, cache in enumerate(self.caches)]
        return [_bind(lambda q, cache: run(q, *cache).reshape(q.shape[0], -1), q, cache) for q, cache in pairs]

    def gemm_calls(self, name: str, rows: int) -> list[Call]:
        """Calls of a linear layer on so many rows."""
        if name == "lm_head":
            head = self.decoder.lm_head
            assert head is not None
            return self.in_turns([head], lambda module, x: module(x).float(), rows, self.model.hidden_size)
        modules: list[Any] = [getattr(layer, name) for layer in self.decoder.layers if hasattr(layer, name)]
        return self.in_turns(modules, lambda module, x: module(x), rows, modules[0].weight.shape[1])

    def elementwise_calls(self, name: str, rows: int) -> list[Call]:
        """Calls of an elementwise operator on so many rows."""
        decoder, hidden = self.decoder, self.model.hidden_size
        every: list[Any] = list(decoder.layers)
        layer = every[0]
        if name == "embedding":
            ids = torch.randint(self.model.vocab_size, (rows,), device=self.device)
            assert decoder.embedding is not None
            return [_bind(decoder.embedding, ids)]
        if name == "sampler":
            logits = [self._random(rows, self.model.vocab_size).float() for _ in range(2)]
            return [_bind(sample, each, None, ()) for each in logits]
        if name == "final_norm":
            return self.in_turns([decoder.final_norm], lambda module, x: module(x), rows, hidden)
        if name in ("input_norm", "post_attention_norm"):
            norms = [getattr(each, name) for each in every]
            return self.in_turns(norms, lambda module, x: module(x), rows, hidden)
        if name == "qk_norm":
            shape = rows, layer.heads + 2 * layer.kv_heads, layer.head_dim
            width = shape[1] * shape[2]
            return self.in_turns(every, lambda module, x: module.qk_norm(x.view(shape)), rows, width)
        if name == "rotary_kv_write":
            angles = layers.rotation(torch.arange(rows, device=self.device), decoder.frequencies)
            slots = torch.randperm(self.limits.kv_tokens, device=self.device)[:rows]
            heads = layer.heads + 2 * layer.kv_heads

            def rotary_kv_write(place: tuple[Any, Any], qkv: Tensor) -> object:
                module, cache = place
                return module.rotary_kv_write(qkv.view(rows, heads, layer.head_dim), slots, angles, cache)

            places = list(zip(every, self.caches, strict=True))
            return self.in_turns(places, rotary_kv_write, rows, heads * layer.head_dim)
        if name == "expert_choice":
            every = [each for each in every if each.mixture is not None]
            return self.in_turns(every, lambda module, x: module.expert_choice(x), rows, every[0].mixture.num_experts)
        if name == "mlp_activation":
            every = [each for each in every if each.mixture is None]
            layer = every[0]
            width = (layer.mlp_gate_up_proj if layer.gated else layer.mlp_up_proj).weight.shape[0]
            return self.in_turns(every, lambda module, x: module.mlp_activation(x), rows, width)
        branches = [self._random(rows, hidden) for _ in range(2 if layer.parallel_block and layer.tp_size == 1 else 1)]
        return self.in_turns(every, lambda module, x: getattr(module, name)(x, *branches), rows, hidden)

    def expert_calls(self, chosen: NDArray[np.int64]) -> list[Call]:
        """Calls of a layer's experts on tokens of which each has chosen some (rows, top_k), all as good."""
        experts = torch.from_numpy(chosen).to(self.device)
        weights = torch.full(chosen.shape, 1 / chosen.shape[1], device=self.device)
        every: list[Any] = [layer.experts for layer in self.decoder.layers if layer.mixture is not None]
        return self.in_turns(every, lambda module, x: module(x, weights, experts), len(chosen), self.model.hidden_size)

    def in_turns(self, modules: Sequence[Any], run: Callable[..., object], rows: int, width: int) -> list[Call]:
        """Calls of `run` on each module, and random inputs (rows, width)."""
        inputs = [self._random(rows, width) for _ in range(INPUTS)]
        count = max(len(modules), INPUTS)
        return [_bind(run, modules[i % len(modules)], inputs[i % INPUTS]) for i in range(count)]

    # -- inside ----------------------------------------------------------------------------------------------------

    def _random(self, *sizes: int) -> Tensor:
        return torch.randn(sizes, dtype=self.dtype, device=self.device)

    def _batch(self, chunks: list[int], kv_lens: list[int], decodes: int) -> AttentionBatch:
        need = [-(-length // self.block_size) for length in kv_lens]
        ends = list(accumulate(need))
        # where there are too few blocks sequences share some, which no cache of the device keeps until then
        places = [np.arange(end - count, end) % len(self._blocks) for count, end in zip(need, ends, strict=True)]
        table = np.stack([np.pad(self._blocks[each], (0, max(need) - len(each))) for each in places])
        return AttentionBatch(decodes, chunks, kv_lens, table, self.device)


def _of_few_layers(model: ModelSpec, most: int) -> ModelSpec:
    """Return the model with so many layers of each kind, if it has them; plain ones and those with experts in turns."""
    count, experts = model.num_layers, model.experts
    if experts is None or not experts.dense_layers:
        return replace(model, num_layers=min(count, most))
    most = min(most, len(experts.dense_layers), count - len(experts.dense_layers))
    return replace(model, num_layers=2 * most, experts=replace(experts, dense_layers=tuple(range(0, 2 * most, 2))))


def _bind(run: Callable[..., object], *arguments: object) -> Call:
    return lambda: run(*arguments)
