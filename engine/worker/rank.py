"""Joining the ranks of a replica: torch.distributed where there are several, and a runner for this one."""

from __future__ import annotations

import os
import socket

import torch
import torch.distributed as dist

from engine.errors import InputError
from engine.runtime.engine_spec import EngineSpec
from engine.worker.parallel import Links, Rank
from engine.worker.runner import ModelRunner

LOCALHOST = "127.0.0.1"


def join(spec: EngineSpec, rank: int, local_rank: int, meeting_point: str | None) -> ModelRunner:
    """Set this process up as `rank`, on GPU `local_rank` of its machine, and load its part of the model.

    `meeting_point` is the tcp:// address where the ranks find each other; None for a replica of one rank. Where it is
    127.0.0.1, nothing listens to other machines. A CPU rank computes on one thread unless OMP_NUM_THREADS says
    otherwise: several would fight over the cores.
    """
    if spec.device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    else:
        _check_gpus(spec, local_rank, torch.cuda.device_count())
        torch.cuda.set_device(local_rank)
    if meeting_point is not None:
        meet("gloo" if spec.device == "cpu" else "nccl", meeting_point, rank, spec.parallel.world_size)
    place = Rank(rank, spec.parallel)
    return ModelRunner(spec, place, Links(place))


def meet(backend: str, meeting_point: str, rank: int, world_size: int) -> None:
    """Set up torch.distributed among `world_size` ranks that find each other at a tcp:// address.

    torch's own store listens on every interface, and to whoever asks. So on one machine, where the address is
    127.0.0.1:port, rank 0 gives it a socket that is bound there.
    """
    host, _, port = meeting_point.removeprefix("tcp://").rpartition(":")
    if host != LOCALHOST:
        dist.init_process_group(backend, init_method=meeting_point, world_size=world_size, rank=rank)
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.TCPStore(  # type: ignore[attr-defined]
        host,
        int(port),
        world_size,
        is_master=rank == 0,
        wait_for_workers=False,
        master_listen_fd=_listener(int(port)).detach() if rank == 0 else None,
    )
    dist.init_process_group(backend, store=store, world_size=world_size, rank=rank)


def _listener(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((LOCALHOST, port))
    listener.listen()
    return listener


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
