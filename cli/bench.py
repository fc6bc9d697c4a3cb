"""`windtunnel bench`: a workload on the engine in real time, with the flags and the folder of `simulate`."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from cli.config import BenchConfig, EngineSettings, ReplicaGroup, ServingSettings
from cli.output import default_folder, load_plugin, print_summary, progress_bar, resolved
from engine import catalog
from engine.engine_spec import DECODE_GRAPHS, DTYPE_BYTES, LOAD_FORMATS, EngineSpec, start
from engine.errors import InputError, unknown
from engine.executor import Executor, WorkerError
from engine.policies import largest_batch, resolve
from engine.run_folder import keep_incomplete, run_folder, write_chrome_trace, write_config, write_summary
from engine.serve import serve
from engine.specs import ModelSpec, SchedulerSpec
from engine.workload import make_workload
from simulator.cluster import Deployment, deploy


def run(config: BenchConfig, output_dir: Path | None, *, as_json: bool, chrome_trace: bool) -> dict[str, Any]:
    """Serve `config`'s workload, write its folder and print what came out."""
    for plugin in config.plugin:
        load_plugin(plugin)
    group = _only_group(config)
    slos = config.slos()
    spec, scheduler = engine_spec(group, config, engine_device(group.device), config.seed)
    workload = make_workload(config.workload_spec(spec.max_model_len))
    console = Console(stderr=as_json, highlight=False, soft_wrap=True)
    kind = _deployment(group, spec, scheduler, spec.num_blocks or 1)  # says what is wrong with names, before the wait
    target = output_dir or default_folder(kind, workload.name, "bench-")
    with run_folder(target) as folder:
        with progress_bar(len(workload)) as progress:
            task = progress.add_task("starting", total=len(workload))
            executor = start(spec, config.executor)
            try:
                progress.update(task, description="serving")
                result = serve(
                    workload,
                    scheduler,
                    executor,
                    vocab_size=spec.model.vocab_size,
                    parallel=spec.parallel,
                    sliding_window=spec.model.sliding_window,
                    async_scheduling=asynchronous(config, spec),
                    seed=config.seed,
                    slos=slos,
                    folder=folder,
                    on_progress=lambda finished: progress.update(task, completed=finished),
                )
            except WorkerError as error:
                kept = keep_incomplete(folder, target)
                raise WorkerError(f"{error}. What was finished before is in {kept}") from None
            finally:
                executor.close()
        kind = _deployment(group, spec, scheduler, executor.num_blocks)
        summary = result.summary
        summary["version"] = version("windtunnel")
        summary["engine"] |= {"dtype": spec.dtype, "load_format": "dummy" if spec.folder is None else "safetensors"}
        description = {**kind.describe(), "predictor": _source(executor, spec)}
        summary["replicas"] = [{**description, **summary["replicas"][0]}]
        settings = resolved(config, [kind], len(workload))
        write_config(folder, {**settings, "num_gpu_blocks_override": executor.num_blocks})
        write_summary(folder, summary)
        if chrome_trace:
            write_chrome_trace(folder)
        from studies.report import write_report

        write_report(folder)
    print_summary(summary, [1], target, console)
    if as_json:
        print(json.dumps({**summary, "output_dir": str(target)}, allow_nan=False))
    return summary


def engine_device(name: str) -> Literal["cpu", "cuda"]:
    """Where the engine runs for a device's name; "auto" takes a GPU where the machine has one."""
    if name == "auto":
        return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"
    return "cpu" if catalog.device(name).name == "cpu" else "cuda"


def engine_spec(
    serving: ServingSettings, engine: EngineSettings, device: Literal["cpu", "cuda"], seed: int
) -> tuple[EngineSpec, SchedulerSpec]:
    """What the workers and the scheduler of a replica are told. Raises InputError for what can't be."""
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
        block_size=scheduler.block_size,
        parallel=serving.parallel_spec(),
        num_blocks=serving.num_gpu_blocks_override,
        gpu_memory_utilization=serving.gpu_memory_utilization,
        attention_backend=engine.attention_backend,
        cuda_graphs=_graph_sizes(engine),
        seed=seed,
        port=engine.distributed_port,
    )
    return spec, scheduler


def asynchronous(engine: EngineSettings, spec: EngineSpec) -> bool:
    """Whether the next batch is formed while one runs."""
    staged = spec.parallel.pipeline_parallel_size > 1
    if engine.async_scheduling and staged:
        raise InputError("--async-scheduling true is for one pipeline stage: several batches are in flight already")
    return engine.async_scheduling if engine.async_scheduling is not None else spec.device == "cuda" and not staged


def _only_group(config: BenchConfig) -> ReplicaGroup:
    groups = config.groups()
    if len(groups) != 1 or groups[0].count != 1:
        raise InputError("the engine runs one replica: give --num-replicas 1, and simulate clusters")
    return groups[0]


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
        sizes = tuple(int(size) for size in engine.cudagraph_capture_sizes.split(","))
    except ValueError:
        sizes = (0,)
    if min(sizes) < 1:
        raise InputError(f"--cudagraph-capture-sizes {engine.cudagraph_capture_sizes!r}: give numbers such as 1,2,4,8")
    return sizes


def _deployment(group: ReplicaGroup, spec: EngineSpec, scheduler: SchedulerSpec, num_blocks: int) -> Deployment:
    """The replica as the simulator would have it, for its description."""
    model: ModelSpec = spec.model
    return deploy(
        model,
        group.device,
        network=group.network,
        internode_network=group.internode_network,
        parallel=spec.parallel,
        scheduler=scheduler,
        num_gpu_blocks_override=num_blocks,
        predictor="roofline",
    )


def _source(executor: Executor, spec: EngineSpec) -> str:
    """Where the times come from."""
    torch = version("torch")
    return f"measured on {executor.hardware} ({spec.dtype}, {executor.attention_backend} attention, torch {torch})"
