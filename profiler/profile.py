"""Profile this machine: the engine's operators, collectives and iterations, for some models.

run_profile(ProfileSpec(device=catalog.device("cpu"), models=(catalog.model("Llama-2-7b-hf"),), ...), Path("out"))
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch

from engine.errors import InputError
from engine.executors.start import start
from engine.replica_spec import ReplicaSpec, resolve
from engine.runtime.engine_spec import DECODE_GRAPHS, EngineSpec
from engine.specs import DeviceSpec, ModelSpec, ParallelSpec, SchedulerSpec, catalog
from engine.worker.attention import BACKENDS, select
from engine.worker.attention.base import AttentionShape
from engine.worker.runner import hardware_name
from profiler import collectives
from profiler.in_situ import InSitu, Reference
from profiler.iterations import bursts, run_burst
from profiler.points import Limits, Point, message_points, points
from profiler.session import Bursts, Measure, Part, Session, model_record
from profiler.timer import CudaTimer
from profiler.workbench import Workbench

ITERATIONS_SHARE = 0.3  # of what operators get: whole iterations of a model


@dataclass(frozen=True, kw_only=True)
class ProfileSpec:
    """What to profile. `models` are in `dtype`; ranks beyond those of this machine are not spoken to."""

    device: DeviceSpec
    models: tuple[ModelSpec, ...]
    tensor_parallel_sizes: tuple[int, ...]
    dtype: str
    limits: Limits
    budget_s: float
    block_size: int = 16
    attention_backend: str | None = None
    seed: int = 0

    @property
    def on(self) -> Literal["cpu", "cuda"]:
        """Where it is measured."""
        return self.device.runs_on


def run_profile(spec: ProfileSpec, folder: Path, on_progress: Callable[[str, int, float], None]) -> Session:
    """Measure into `folder`, which may hold a part of the same profile. Raises InputError for what can't be."""
    _check_gpu(spec.on)
    if spec.on == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    setups = [(model, tp) for model in spec.models for tp in spec.tensor_parallel_sizes if _cut(tp).fits(model)]
    if not setups:
        sizes = ", ".join(map(str, spec.tensor_parallel_sizes))
        raise InputError(f"none of the models can be cut into {sizes} ranks: give other --tensor-parallel-sizes")
    backend = _attention_backend(spec)
    reference = Reference() if spec.on == "cpu" else None
    session = Session(folder, _identity(spec, backend), _provenance(spec, backend, reference))
    if reference is not None:
        reference.reference_s = session.provenance["reference_s"]
    ranks = _ranks_here(spec)
    parts: list[Part | Bursts] = [_operators(spec, model, tp, backend, reference) for model, tp in setups]
    parts += [_messages(spec, model, tp) for model, tp in setups if 1 < tp <= ranks]
    parts += [_iterations(spec, model, backend, reference) for model in spec.models if 1 in spec.tensor_parallel_sizes]
    session.run(parts, spec.budget_s, on_progress)
    session.finish()
    return session


def _operators(spec: ProfileSpec, model: ModelSpec, tp: int, backend: str, reference: Reference | None) -> Part:
    def open_bench() -> Measure:
        if reference is not None:
            return InSitu(_engine(spec, _replica(spec, model, tp), backend), reference).measure
        timer = CudaTimer()
        bench = Workbench(
            model,
            tp,
            torch.device(spec.on),
            getattr(torch, spec.dtype),
            backend,
            spec.block_size,
            spec.limits,
            spec.seed,
        )
        return lambda point: bench.launch() if point["kind"] == "host" else timer.measure(bench.calls(point))

    every = list(points(model, tp, spec.limits))
    if reference is None:  # on a CPU launching is computing
        name: Point = {"model": model.name, "tensor_parallel_size": tp}
        every.insert(0, {"operator": "layer_launch", "kind": "host", "batch_size": 1, **name})
    return Part(f"{model.name} TP{tp}", every, open_bench)


def _messages(spec: ProfileSpec, model: ModelSpec, tp: int) -> Part:
    columns: Point = {"num_ranks": tp, "ranks_per_node": tp, "network": spec.device.network}
    every = [{**point, **columns} for point in message_points(model, tp, spec.limits)]

    def open_ranks() -> Measure:
        ranks = collectives.Ranks(tp, spec.on)
        return lambda point: ranks.measure(str(point["kind"]), int(point["num_bytes"]))

    return Part(f"{model.name} collectives of {tp}", every, open_ranks, share=0.3)


def _iterations(spec: ProfileSpec, model: ModelSpec, backend: str, reference: Reference | None) -> Bursts:
    replica = _replica(spec, model, 1)

    def open_engine() -> Callable[[int, int], list[dict[str, Any]]]:
        executor = start(_engine(spec, replica, backend), "in_process")

        def burst(count: int, prompt: int) -> list[dict[str, Any]]:
            before = reference.drift() if reference is not None else 1.0
            rows = run_burst(count, prompt, replica, executor)
            drift = (before + reference.drift()) / 2 if reference is not None else 1.0
            return [
                {"model": model.name}
                | {name: value / drift if name.endswith("_ms") else value for name, value in row.items()}
                for row in rows
            ]

        burst(1, 8)  # what is slow only once
        return burst

    return Bursts(f"{model.name} iterations", bursts(spec.limits), open_engine, share=ITERATIONS_SHARE)


def _replica(spec: ProfileSpec, model: ModelSpec, tp: int) -> ReplicaSpec:
    """The replica whose operators and iterations are measured; asynchronous on a GPU, where that hides the host."""
    limits = spec.limits
    return resolve(
        model,
        spec.device,
        parallel=_cut(tp),
        scheduler=SchedulerSpec(
            max_num_batched_tokens=max(limits.max_tokens, limits.max_requests),
            max_num_seqs=limits.max_requests,
            max_model_len=limits.max_length,
            block_size=spec.block_size,
        ),
        async_scheduling=spec.on == "cuda",
        # on a GPU the cache may be larger than what fits beside a whole model
        num_gpu_blocks_override=-(-limits.kv_tokens // spec.block_size) + limits.max_requests
        if spec.on == "cpu"
        else None,
    )


def _engine(spec: ProfileSpec, replica: ReplicaSpec, backend: str) -> EngineSpec:
    return EngineSpec.of(replica, folder=None, attention_backend=backend, seed=spec.seed)


def device_here(on: Literal["cpu", "cuda"]) -> DeviceSpec:
    """This machine's device in the catalog. Raises InputError for a GPU that is not there."""
    if on == "cpu":
        return catalog.device("cpu")
    _check_gpu(on)
    found = torch.cuda.get_device_name()
    if (name := catalog.device_of_hardware(found)) is not None:
        return catalog.device(name)
    raise InputError(f"this GPU, {found}, is not in the catalog: give --device FILE.yaml with its data sheet")


def _check_gpu(on: Literal["cpu", "cuda"]) -> None:
    if on == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no GPU here that this torch can use: give --device cpu")


def _cut(tensor_parallel_size: int) -> ParallelSpec:
    return ParallelSpec(tensor_parallel_size=tensor_parallel_size)


def _ranks_here(spec: ProfileSpec) -> int:
    """Ranks that this machine can run at once."""
    return os.cpu_count() or 1 if spec.on == "cpu" else torch.cuda.device_count()


def _attention_backend(spec: ProfileSpec) -> str:
    """The backend that serves every model: the one asked for, or the first model's best."""
    model = spec.models[0]
    shape = AttentionShape(
        num_heads=model.num_attention_heads,
        num_kv_heads=model.num_key_value_heads,
        head_dim=model.head_dim,
        block_size=spec.block_size,
        sliding_window=model.sliding_window,
        dtype=getattr(torch, spec.dtype),
        device=torch.device(spec.on),
    )
    return select(spec.attention_backend, shape).name


def _identity(spec: ProfileSpec, backend: str) -> dict[str, Any]:
    """What makes two sessions the same."""
    return {
        "device": spec.device.name,
        "hardware": hardware_name(torch.device(spec.on)),
        "models": [model.name for model in spec.models],
        "shapes": [model_record(model) for model in spec.models],
        "tensor_parallel_sizes": list(spec.tensor_parallel_sizes),
        "dtype": spec.dtype,
        "attention_backend": backend,
        "block_size": spec.block_size,
        "limits": asdict(spec.limits),
        "torch": torch.__version__,
    }


def _provenance(spec: ProfileSpec, backend: str, reference: Reference | None) -> dict[str, Any]:
    """Where and with what, for the tables and for whoever reads them later."""
    hardware = hardware_name(torch.device(spec.on))
    state = _nvidia_smi("driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw") if spec.on == "cuda" else {}
    return {
        "device": spec.device.name,
        "device_spec": asdict(_as_here(spec.device)),
        "hardware": hardware,
        "source": f"windtunnel profile on {hardware}",
        "date": datetime.now(UTC).date().isoformat(),
        "dtype": spec.dtype,
        "attention_backend": backend,
        "experts": "torch",
        "collectives": "gloo" if spec.on == "cpu" else "nccl",
        "software": f"torch {torch.__version__}",
        "python": platform.python_version(),
        "commit": _commit(),
        "threads": torch.get_num_threads() if spec.on == "cpu" else None,
        "graph_decodes": max(DECODE_GRAPHS) if spec.on == "cuda" and BACKENDS[backend].supports_cuda_graph else 0,
        "reference_s": reference.reference_s if reference is not None else None,
        **state,
    }


def _as_here(device: DeviceSpec) -> DeviceSpec:
    """The catalog's CPU stands for any: this one has its own memory."""
    if device.name != "cpu":
        return device
    return replace(device, memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _nvidia_smi(query: str) -> dict[str, str]:
    """The GPU's state as nvidia-smi tells it; nothing where it can't be asked."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(query.split(","), (text.strip() for text in done.stdout.splitlines()[0].split(",")), strict=False))


def _commit() -> str | None:
    """The commit of this checkout, where it is one."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
