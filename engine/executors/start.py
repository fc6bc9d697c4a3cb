"""Starts the ranks of a replica: in this process, in processes of their own, or as actors of a Ray cluster.

executor = start(EngineSpec.of(resolve(folder, "cpu"), folder=Path(folder)), "in_process")
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Protocol

from engine.errors import InputError, unknown
from engine.runtime.engine_spec import EXECUTORS, GRAPH_BACKENDS, EngineSpec
from engine.runtime.executor import Executor


class Ranks(Executor, Protocol):
    """An executor of ranks that were started, which say what they found."""

    has_cuda_graphs: bool  # whether batches of decodes run as CUDA graphs


def start(spec: EngineSpec, executor: str | None = None) -> Executor:
    """Start the ranks and wait until they are ready. None takes one process where one rank is enough.

    What the user should know of the choices made is printed on stderr, a line each (`warnings`).

    Raises InputError for what can't be (weights that are not there, a model too big, ...), WorkerError for what breaks.
    """
    started = _start(spec, executor)
    for warning in warnings(spec, started.attention_backend, started.has_cuda_graphs):
        print(f"warning: {warning}", file=sys.stderr)
    return started


def warnings(spec: EngineSpec, attention_backend: str, has_cuda_graphs: bool) -> list[str]:
    """Return what a user should know of a replica that has started so."""
    if spec.device != "cuda":
        return []
    found = []
    if spec.attention_backend is None and spec.cuda_graphs and attention_backend not in GRAPH_BACKENDS:
        found.append(
            f"the attention backend {attention_backend} has no CUDA graphs, so the kernels of a decode are launched "
            f"one by one: install what {' or '.join(GRAPH_BACKENDS)} needs (docs/engine.md), or ask for it by "
            f"--attention-backend {attention_backend}"
        )
    if spec.cuda_graphs and attention_backend in GRAPH_BACKENDS and not has_cuda_graphs:
        found.append(
            "the experts are computed one after the other, which no CUDA graph can hold, so the kernels of a decode "
            "are launched one by one: in bfloat16, on a GPU of compute capability 9 or 10, one kernel computes them "
            "(docs/engine.md); --enforce-eager true asks for no graphs"
        )
    if spec.num_blocks is None and not spec.bounded_batches:
        found.append(
            f"the scheduler has no token budget: beside the KV cache there is room for a batch of "
            f"{spec.max_batch_tokens} tokens, and one of more may run out of the GPU's memory (then lower "
            f"--gpu-memory-utilization {spec.gpu_memory_utilization:g} or --max-num-seqs {spec.max_num_seqs})"
        )
    return found


def _start(spec: EngineSpec, executor: str | None) -> Ranks:
    need("torch", "engine")
    name = executor or ("in_process" if spec.parallel.world_size == 1 else "multiprocess")
    if name == "in_process":
        if spec.parallel.world_size > 1:
            raise InputError(f"executor 'in_process' runs one rank, {spec.parallel} has {spec.parallel.world_size}: "
                             "use multiprocess or ray")  # fmt: skip
        from engine.executors.in_process import InProcessExecutor

        return InProcessExecutor(spec)
    if name == "multiprocess":
        from engine.executors.multiprocess import MultiprocessExecutor

        return MultiprocessExecutor(spec)
    if name == "ray":
        need("ray", "cluster")
        from engine.executors.ray_executor import RayExecutor

        return RayExecutor(spec)
    raise unknown("executor", name, EXECUTORS)


def need(package: str, extra: str) -> None:
    """Raise InputError if a package that Windtunnel brings in an extra is not installed."""
    if find_spec(package) is None:
        raise InputError(f"this needs the package {package}, which is not installed: pip install -e '.[{extra}]'")
