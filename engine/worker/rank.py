"""Joining the ranks of a replica: torch.distributed where there are several, and a runner for this one."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from engine.errors import InputError
from engine.runtime.engine_spec import EngineSpec
from engine.worker.parallel import Links, Rank
from engine.worker.runner import ModelRunner


def join(spec: EngineSpec, rank: int, local_rank: int, meeting_point: str | None) -> ModelRunner:
    """Set this process up as `rank`, on GPU `local_rank` of its machine, and load its part of the model.

    `meeting_point` is the tcp:// address where the ranks find each other; None for a replica of one rank. A CPU rank
    computes on one thread unless OMP_NUM_THREADS says otherwise: several would fight over the cores.
    """
    if spec.device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    else:
        _check_gpus(spec, local_rank, torch.cuda.device_count())
        torch.cuda.set_device(local_rank)
    if meeting_point is not None:
        if meeting_point.startswith("tcp://127.0.0.1"):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        backend = "gloo" if spec.device == "cpu" else "nccl"
        dist.init_process_group(backend, init_method=meeting_point, world_size=spec.parallel.world_size, rank=rank)
    place = Rank(rank, spec.parallel)
    return ModelRunner(spec, place, Links(place))


def _check_gpus(spec: EngineSpec, local_rank: int, found: int) -> None:
    if not found:
        raise InputError("there is no GPU here that this torch can use: give --device cpu")
    if local_rank >= found:
        raise InputError(
            f"{spec.parallel} needs {spec.parallel.world_size} GPUs on one machine and there are {found}: lower "
            "--tensor-parallel-size or --pipeline-parallel-size, or give --executor ray, which takes several machines"
        )


def leave() -> None:
    """Undo `join`."""
    if dist.is_initialized():
        dist.destroy_process_group()
