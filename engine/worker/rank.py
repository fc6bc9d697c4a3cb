"""Joining the ranks of a replica: torch.distributed where there are several, and a runner for this one."""

from __future__ import annotations

import os
import socket

import torch
import torch.distributed as dist

from engine.errors import InputError
from engine.runtime.engine_spec import EngineSpec
from engine.runtime.network import LOCALHOST
from engine.worker.parallel import Links, Rank
from engine.worker.runner import ModelRunner


def join(
    spec: EngineSpec, rank: int, local_rank: int, meeting_point: str | None, interface: str | None = None
) -> ModelRunner:
    """Set this process up as `rank`, on GPU `local_rank` of its machine, and load its part of the model.

    `meeting_point` is the tcp:// address where the ranks find each other; None for a replica of one rank. Where it is
    127.0.0.1, nothing listens to other machines; else the ranks listen on the network `interface` alone. A CPU rank
    computes on one thread unless OMP_NUM_THREADS says otherwise: several would fight over the cores.
    """
    if spec.device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    else:
        _check_gpus(spec, local_rank, torch.cuda.device_count())
        torch.cuda.set_device(local_rank)
    if meeting_point is not None:
        meet("gloo" if spec.device == "cpu" else "nccl", meeting_point, rank, spec.parallel.world_size, interface)
    place = Rank(rank, spec.parallel)
    return ModelRunner(spec, place, Links(place))


def meet(backend: str, meeting_point: str, rank: int, world_size: int, interface: str | None = None) -> None:
    """Set up torch.distributed among `world_size` ranks that find each other at a tcp:// address.

    torch's own store listens on every interface, and to whoever asks. So rank 0 gives it a socket that is bound to the
    address alone: on one machine 127.0.0.1. Gloo and NCCL keep to the loopback there, else to `interface`, if that is
    given; what the environment says of theirs comes first.
    """
    host, _, port = meeting_point.removeprefix("tcp://").rpartition(":")
    if (named := "lo" if host == LOCALHOST else interface) is not None:
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", named)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        host,
        int(port),
        world_size,
        is_master=rank == 0,
        wait_for_workers=False,
        master_listen_fd=_listener(host, int(port)).detach() if rank == 0 else None,
    )
    dist.init_process_group(backend, store=store, world_size=world_size, rank=rank)


def _listener(host: str, port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
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
