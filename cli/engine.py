"""What `bench` and `generate` share: the engine's settings as its workers and its scheduler are told them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from cli.config import EngineSettings, ServingSettings
from engine import catalog
from engine.engine_spec import DECODE_GRAPHS, DTYPE_BYTES, LOAD_FORMATS, EngineSpec
from engine.errors import InputError, unknown
from engine.memory import MOST_BLOCKS
from engine.policies import largest_batch, resolve
from engine.specs import SchedulerSpec

MOST_PORTS = (1 << 16) - 1


def engine_device(name: str) -> Literal["cpu", "cuda"]:
    """Where the engine runs for a device's name; "auto" takes a GPU where the machine has one."""
    if name == "auto":
        return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"
    return "cpu" if catalog.device(name).name == "cpu" else "cuda"


def engine_spec(
    serving: ServingSettings, engine: EngineSettings, device: Literal["cpu", "cuda"], seed: int
) -> tuple[EngineSpec, SchedulerSpec]:
    """What the workers and the scheduler of a replica are told. Raises InputError for what can't be."""
    if seed < 0:
        raise InputError(f"seed {seed}: give a whole number, 0 or more")
    if not 0 < serving.gpu_memory_utilization <= 1:
        raise InputError(f"gpu_memory_utilization={serving.gpu_memory_utilization}: give a share above 0 and up to 1")
    blocks, port = serving.num_gpu_blocks_override, engine.distributed_port
    if blocks is not None and not 1 <= blocks <= MOST_BLOCKS:
        raise InputError(f"num_gpu_blocks_override {blocks}: give 1 to {MOST_BLOCKS:,} blocks")
    if port is not None and not 1 <= port <= MOST_PORTS:
        raise InputError(f"distributed_port {port}: give 1 to {MOST_PORTS}")
    dtype = engine.dtype
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    if dtype not in DTYPE_BYTES:
        raise unknown("dtype", dtype, ("auto", *DTYPE_BYTES))
    model = replace(catalog.model(serving.model), dtype_bytes=DTYPE_BYTES[dtype])
    scheduler = resolve(serving.scheduler_spec(), model.max_position_embeddings)
    spec = EngineSpec(
        model=model,
        folder=_weights(serving.model, engine.load_format),
        device=device,
        dtype=dtype,
        max_num_seqs=scheduler.max_num_seqs,
        max_model_len=scheduler.max_model_len or 0,
        max_batch_tokens=largest_batch(scheduler),
        bounded_batches=scheduler.max_num_batched_tokens is not None,
        block_size=scheduler.block_size,
        parallel=serving.parallel_spec(),
        num_blocks=blocks,
        gpu_memory_utilization=serving.gpu_memory_utilization,
        attention_backend=engine.attention_backend,
        cuda_graphs=_graph_sizes(engine),
        seed=seed,
        port=port,
    )
    return spec, scheduler


def asynchronous(serving: ServingSettings, spec: EngineSpec) -> bool:
    """Whether the next batch is formed while one runs."""
    staged = spec.parallel.pipeline_parallel_size > 1
    if serving.async_scheduling and staged:
        raise InputError("--async-scheduling true is for one pipeline stage: several batches are in flight already")
    return serving.async_scheduling if serving.async_scheduling is not None else spec.device == "cuda" and not staged


def _weights(model: str, load_format: str) -> Path | None:
    """The folder with a model's weights; None for dummies."""
    if load_format not in ("auto", *LOAD_FORMATS):
        raise unknown("load format", load_format, ("auto", *LOAD_FORMATS))
    if load_format == "dummy":
        return None
    folder = Path(model).expanduser()
    if catalog.is_name("model", model) and not folder.is_dir():
        raise InputError(
            f"model {model} has no weights here: give a folder with its safetensors, or --load-format dummy"
        )
    return folder if folder.is_dir() else folder.parent


def _graph_sizes(engine: EngineSettings) -> tuple[int, ...]:
    if engine.enforce_eager:
        return ()
    if engine.cudagraph_capture_sizes is None:
        return DECODE_GRAPHS
    try:
        sizes = tuple(int(size) for size in str(engine.cudagraph_capture_sizes).split(","))
    except ValueError:
        sizes = (0,)
    if min(sizes) < 1:
        raise InputError(f"--cudagraph-capture-sizes {engine.cudagraph_capture_sizes!r}: give numbers such as 1,2,4,8")
    return sizes
