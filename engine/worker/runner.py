"""One rank at work: its part of the model, its KV cache, and what it does with a step.

On a GPU a step is launched as far as it goes without waiting; `Pending` waits, and knows when the GPU worked on it.
"""

from __future__ import annotations

import platform
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import InputError
from engine.runtime.engine_spec import EngineSpec
from engine.runtime.executor import RankReport, RankTime, Step, lone_step
from engine.specs.memory import GIB, kv_bytes_per_block
from engine.worker import weights
from engine.worker.attention import select
from engine.worker.attention.base import AttentionBackend, AttentionShape
from engine.worker.graphs import DecodeGraphs
from engine.worker.inputs import Inputs, Rows
from engine.worker.layers import compile_elementwise
from engine.worker.model import Decoder
from engine.worker.parallel import Links, Rank
from engine.worker.sampler import NO_NUMBER, sample

RESERVED_BYTES = GIB // 2  # of a GPU, for what libraries take later (cuBLAS, NCCL, fragmentation)
GRAPH_BYTES = 16 << 20  # of a CUDA graph: 8 MiB for flashinfer's plan, and an estimate for its kernels' arguments
JUST_NOW_S = 200e-6  # between two looks at a step: what ended in between has ended just now
WARM_UP: list[tuple[list[tuple[int, int]], int]] = [  # sequences of (chunk, tokens in the cache), and how many decode
    ([(1, 0)], 0),
    ([(2, 0)], 0),
    ([(1, 0)], 1),
    ([(1, 0), (1, 0)], 2),
    ([(1, 0), (2, 0)], 1),
]  # nothing is read that was not written: what is in fresh memory may be NaN
CPU_KV_SHARE = 0.5  # of the free memory of a CPU, for the KV caches of all ranks


class ModelRunner:
    """Rank `rank` of a replica. `allocate` comes before the first `execute`.

    Raises InputError for weights that don't fit the model, an attention backend that is not to be had, and memory that
    is too small.
    """

    def __init__(self, spec: EngineSpec, rank: Rank, links: Links) -> None:
        self.spec = spec
        self.rank = rank
        self.links = links
        self.device = torch.device(spec.device)
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self._output_dtype = torch.float32 if rank.is_last_stage else self.dtype  # logits, or hidden states
        self.kv_caches: list[tuple[Tensor, Tensor]] = []
        self._clock = _CudaClock() if self.device.type == "cuda" else None
        self._graphs: DecodeGraphs | None = None
        self._max_blocks = -(-spec.max_model_len // spec.block_size)
        shape = AttentionShape(
            num_heads=spec.model.num_attention_heads // rank.tp_size,
            num_kv_heads=spec.parallel.kv_heads_per_rank(spec.model),
            head_dim=spec.model.head_dim,
            block_size=spec.block_size,
            sliding_window=spec.model.sliding_window,
            dtype=self.dtype,
            device=self.device,
        )
        compile_elementwise(self.device.type == "cuda")
        with torch.inference_mode(), self._memory("loading the weights"):
            self.attention = select(spec.attention_backend, shape)
            self.model = Decoder(spec.model, rank, links, self.dtype, self.device)
            if spec.folder is None:
                weights.dummy(self.model, spec.seed)
            else:
                weights.load(self.model, spec.folder)
            self.rows = Rows(spec.max_num_seqs, self._max_blocks, spec.block_size, self.device)

    def describe(self) -> tuple[int, str, str, bool]:
        """KV blocks it may have (as told, or as many as there is memory for), its attention backend, its hardware.

        And whether it captures CUDA graphs of decodes.
        """
        blocks = self.spec.num_blocks or self.free_blocks()
        return blocks, self.attention.name, hardware_name(self.device), bool(self._graph_sizes())

    # -- memory ----------------------------------------------------------------------------------------------------

    def free_blocks(self) -> int:
        """KV blocks that this rank has memory for beside the weights and the largest batches.

        On a GPU these are run and their peak measured. They have little in the cache: the copies of keys and values
        that some attention backends make, of a full cache at most, are added (not their indices and masks, a
        hundredth). On a CPU it is a share of the memory that is free, and not much more than the longest requests could
        ever fill.
        """
        spec = self.spec
        block_bytes = kv_bytes_per_block(spec.model, spec.parallel, self.rank.stage, spec.block_size)
        if self.device.type == "cpu":
            available = _free_cpu_bytes() * CPU_KV_SHARE / spec.parallel.world_size
            return min(int(available / block_bytes), 2 * spec.max_num_seqs * self._max_blocks)
        used = self._peak_bytes()
        total = torch.cuda.mem_get_info(self.device)[1] * spec.gpu_memory_utilization
        room = int(total - used - RESERVED_BYTES)

        def taken(blocks: int) -> int:
            tokens = blocks * spec.block_size
            return blocks * block_bytes + self.attention.gathered_bytes(tokens, spec.max_num_seqs, spec.max_model_len)

        blocks = bisect_right(range(max(0, room) // block_bytes + 1), room, key=taken) - 1
        if blocks < 1:
            raise InputError(
                f"rank {self.rank.rank} takes {used / GIB:.1f} GiB for weights and the largest batch, of "
                f"{total / GIB:.1f} GiB it may use: raise --gpu-memory-utilization or --tensor-parallel-size, or lower "
                f"{self._batch_flag()}"
            )
        return blocks

    def _peak_bytes(self) -> int:
        """Bytes of this GPU in use, by anybody, at the peak of the largest batches, which every rank runs.

        CUDA graphs keep memory of their own, as much as their largest batch takes.
        """
        spec = self.spec
        length = min(spec.max_model_len, spec.max_batch_tokens)
        count = max(1, min(spec.max_num_seqs, spec.max_batch_tokens // length))
        prompts = lone_step([(length, 0)] * count, 0, spec.block_size)
        sizes = self._graph_sizes()
        with self._memory("making room for the largest batch"):
            self._make_caches(len(prompts.new_blocks.ids))
        activations = max(self._activation_bytes(prompts), self._decode_bytes(spec.max_num_seqs))
        of_graphs = self._decode_bytes(max(sizes)) + len(sizes) * GRAPH_BYTES if sizes else 0
        self.kv_caches = []
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free + activations + of_graphs

    def _decode_bytes(self, batch: int) -> int:
        step = lone_step([(1, 0)] * batch, batch, self.spec.block_size)
        shared = step.new_blocks._replace(ids=step.new_blocks.ids * 0)  # one block for all: what they write is no use
        return self._activation_bytes(step._replace(new_blocks=shared))

    def _activation_bytes(self, step: Step) -> int:
        """What a step takes beside what is held anyway, at its peak."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.execute(step).wait()
        return torch.cuda.max_memory_allocated() - before

    def _graph_sizes(self) -> list[int]:
        """Batch sizes to capture CUDA graphs for, in order; one above the most sequences there are is cut to these."""
        if self.device.type != "cuda" or not (self.attention.supports_cuda_graph and self.model.supports_cuda_graph):
            return []
        return sorted({min(size, self.spec.max_num_seqs) for size in self.spec.cuda_graphs})

    def allocate(self, num_blocks: int) -> None:
        """Make the KV caches, of `num_blocks` blocks and one more for padding; on a GPU warm up and capture its graphs.

        Warming up runs a step of each kind, so that what is compiled at first use is there before the first request.
        """
        spec = self.spec
        with torch.inference_mode(), self._memory("allocating the KV cache"):
            self._make_caches(num_blocks + 1)
            self.rows.set_padding_block(num_blocks)
            if self.device.type == "cuda":
                for sequences, num_decodes in WARM_UP:
                    if len(sequences) > spec.max_num_seqs:
                        continue
                    step = lone_step(sequences, num_decodes, spec.block_size)
                    if len(step.new_blocks.ids) <= num_blocks and len(step.tokens) <= spec.max_model_len:
                        self.execute(step).wait()
            if sizes := self._graph_sizes():
                self._graphs = DecodeGraphs(
                    sizes,
                    self._forward,
                    self.attention,
                    self._max_blocks,
                    num_blocks * spec.block_size,
                    None if self.rank.is_first_stage else self._hidden(1),
                    self._output_dtype,
                )

    def _make_caches(self, num_blocks: int) -> None:
        layers = self.spec.parallel.stage_layers(self.spec.model.num_layers)[self.rank.stage]
        shape = self.attention.shape
        size = (num_blocks, shape.block_size, shape.num_kv_heads, shape.head_dim)

        def empty() -> Tensor:
            return torch.empty(size, dtype=self.dtype, device=self.device)

        self.kv_caches = [(empty(), empty()) for _ in range(layers)]

    def _batch_flag(self) -> str:
        """What bounds the largest batch, as the user gives it."""
        spec = self.spec
        if spec.bounded_batches:
            return f"--max-num-batched-tokens {spec.max_batch_tokens}"
        return f"--max-num-seqs {spec.max_num_seqs}"

    @contextmanager
    def _memory(self, doing: str) -> Iterator[None]:
        """Turn running out of memory into an error that says what to change."""
        try:
            yield
        except RuntimeError as error:
            where = "GPU" if isinstance(error, torch.OutOfMemoryError) else "CPU"
            if where == "CPU" and "can't allocate memory" not in str(error):
                raise
            share = f"--gpu-memory-utilization {self.spec.gpu_memory_utilization:g}"
            if self.spec.num_blocks is not None:
                share = f"--num-gpu-blocks-override {self.spec.num_blocks}"
            raise InputError(
                f"{where} out of memory on rank {self.rank.rank} while {doing}: lower {share} or "
                f"{self._batch_flag()}, or raise --tensor-parallel-size ({str(error).splitlines()[0]})"
            ) from None

    # -- a step ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def execute(self, step: Step) -> Pending:
        """Compute a step, on a GPU as far as it goes without waiting for it."""
        with self._memory("computing a batch"):
            graphs = self._graphs if self._graphs is not None and step.num_decodes == len(step.rows) else None
            size = graphs.size_for(step.num_decodes) if graphs is not None else 0
            inputs, batch, sampled_rows = self.rows.inputs(step, pad_to=size)
            hidden = None if self.rank.is_first_stage else self.links.receive(self._hidden(len(step.tokens)))
            started = self._stamp()
            if graphs is not None and size:
                output = graphs.run(inputs, batch, hidden)
                if self.spec.keep_logits or not self.rank.is_last_stage:
                    output = output.clone()  # it is read later, when the next replay may have written over it
            else:
                self.attention.plan(batch)
                output = self._forward(inputs, self.attention, hidden).to(self._output_dtype)
            if not self.rank.is_last_stage:
                ended = self._stamp()
                self.links.send(output)
                return Pending(self, step.number, started, ended)
            tokens = sample(output, step.sampling, (step.starts + step.chunks)[step.sampled])
            self.rows.remember(sampled_rows, tokens)
            return Pending(self, step.number, started, self._stamp(), tokens, output if self.spec.keep_logits else None)

    def _forward(self, inputs: Inputs, attention: AttentionBackend, hidden: Tensor | None) -> Tensor:
        output: Tensor = self.model(inputs, attention, self.kv_caches, hidden)
        return output

    def _hidden(self, tokens: int) -> Tensor:
        """Room for what the stage before sends (tokens, hidden_size)."""
        return torch.empty(tokens, self.spec.model.hidden_size, dtype=self.dtype, device=self.device)

    def _stamp(self) -> float | torch.cuda.Event:
        return time.perf_counter() if self._clock is None else self._clock.stamp()


class Pending:
    """A step on its way through a rank."""

    def __init__(
        self,
        runner: ModelRunner,
        number: int,
        started: float | torch.cuda.Event,
        ended: float | torch.cuda.Event,
        tokens: Tensor | None = None,
        logits: Tensor | None = None,
    ) -> None:
        self._rank = runner.rank
        self._clock = runner._clock
        self._number = number
        self._started, self._ended = started, ended
        self._logits = logits
        self._tokens = tokens if self._rank.tp_rank == 0 else None
        self._copied: torch.cuda.Event | None = None
        self._seen_busy = 0.0  # when `ready` last found it on its way
        if self._clock is not None:
            if self._tokens is not None:
                self._tokens = self._tokens.to("cpu", non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def ready(self) -> bool:
        """Whether `wait` would return at once."""
        if self._copied is None:
            return True
        now = time.perf_counter()
        if not self._copied.query():
            self._seen_busy = now
            return False
        if self._clock is not None and now - self._seen_busy < JUST_NOW_S:
            assert not isinstance(self._ended, float)
            self._clock.set(self._ended)
        return True

    def wait(self) -> RankReport:
        """What came of it, once it is done."""
        started, ended = self._started, self._ended
        if self._clock is not None and self._copied is not None:
            assert isinstance(started, torch.cuda.Event) and isinstance(ended, torch.cuda.Event)
            waited = not self._copied.query()
            self._copied.synchronize()
            if waited:
                self._clock.set(ended)
            started, ended = self._clock.time(started), self._clock.time(ended)
        assert isinstance(started, float) and isinstance(ended, float)
        tokens = None if self._tokens is None else self._tokens.tolist()
        if tokens is not None and NO_NUMBER in tokens:
            raise InputError(
                "the model's logits are NaN: its weights hold a NaN, or are beyond the type of numbers: give other "
                "weights or another --dtype"
            )
        return RankReport(
            self._number,
            RankTime(self._rank.rank, started, ended),
            tokens,
            None if self._logits is None or self._tokens is None else self._logits.float().cpu().numpy(),
        )


class _CudaClock:
    """Times of a GPU's events on the host's clock.

    CUDA tells the time between two events only, in milliseconds of 24 bits. So an event whose time the host has just
    seen serves as the origin, a new one as often as can be.
    """

    def __init__(self) -> None:
        torch.cuda.synchronize()
        origin = self.stamp()
        torch.cuda.synchronize()
        self.set(origin)

    def set(self, event: torch.cuda.Event) -> None:
        """`event` has happened just now."""
        self._origin, self._origin_s = event, time.perf_counter()

    def stamp(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def time(self, event: torch.cuda.Event) -> float:
        """Seconds of time.perf_counter."""
        return self._origin_s + float(self._origin.elapsed_time(event)) / 1e3


def hardware_name(device: torch.device) -> str:
    """The GPU as its driver names it, or the processor as the kernel does."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _free_cpu_bytes() -> int:
    """Memory that can be had without swapping."""
    found = dict(line.split(":") for line in Path("/proc/meminfo").read_text("ascii").splitlines())
    return int(found["MemAvailable"].split()[0]) * 1024
