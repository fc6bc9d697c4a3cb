"""Collectives over the ranks of this machine: a process each, and the time that it takes them together."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any, Literal

from engine.executors.multiprocess import free_port
from engine.runtime.executor import WorkerError
from profiler.kinds import KINDS, Message
from profiler.timing import Timing

WARM_UP, REPEATS = 5, 25
LEAD_CYCLES = 1_000_000  # of a GPU: about half a millisecond
PATIENCE_S = 60.0  # for an answer of all ranks


class Ranks:
    """`count` ranks that stay until this object goes."""

    def __init__(self, count: int, on: Literal["cpu", "cuda"]) -> None:
        context = multiprocessing.get_context("forkserver")
        address = f"tcp://127.0.0.1:{free_port()}"
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_live, args=(theirs, rank, count, on, address), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def measure(self, kind: str, num_bytes: int) -> Timing:
        """The time of a kind of message over all ranks."""
        try:
            for pipe in self._pipes:
                pipe.send((kind, num_bytes))
            every: list[list[float]] = []
            for pipe in self._pipes:
                while not pipe.poll(PATIENCE_S / 60):
                    self._check_alive(kind)
                every.append(pipe.recv())
        except (EOFError, OSError) as error:
            raise WorkerError(f"a rank of the {kind} measurement ended ({error!r})") from None
        of_ranks = min if _of(kind).waits else max
        seconds = [of_ranks(times) for times in zip(*every, strict=True)]
        return Timing(statistics.median(seconds), statistics.pstdev(seconds), len(seconds))

    def _check_alive(self, kind: str) -> None:
        ended = [rank for rank, process in enumerate(self._processes) if process.exitcode is not None]
        if ended:
            raise WorkerError(f"rank {ended[0]} of the {kind} measurement ended")

    def __del__(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            with contextlib.suppress(OSError):
                pipe.close()
            process.join(5)
            if process.exitcode is None:
                process.kill()


def _live(driver: Connection, rank: int, count: int, on: Literal["cpu", "cuda"], address: str) -> None:
    """A rank: measures what it is told, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    from engine.worker.rank import meet

    if on == "cpu":
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(rank)
    meet("gloo" if on == "cpu" else "nccl", address, rank, count)
    with contextlib.suppress(EOFError, OSError):
        while True:
            kind, num_bytes = driver.recv()
            driver.send(_times(kind, num_bytes, rank, on))
    os._exit(0)


def _times(kind: str, num_bytes: int, rank: int, on: Literal["cpu", "cuda"]) -> list[float]:
    """Seconds of each repeat on this rank; where one goes there and back, half of it."""
    import torch
    import torch.distributed as dist

    message = _of(kind)
    tensor = torch.randn(max(1, num_bytes // 2), device=on).to(torch.bfloat16)

    seconds = []
    for repeat in range(WARM_UP + REPEATS):
        dist.barrier()
        if on == "cuda":
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            torch.cuda._sleep(LEAD_CYCLES)  # the launch is queued behind it, and not timed
            events[0].record()
            message.exchange(dist, tensor, rank)
            events[1].record()
            torch.cuda.synchronize()
            elapsed = events[0].elapsed_time(events[1]) / 1e3
        else:
            start = time.perf_counter()
            message.exchange(dist, tensor, rank)
            elapsed = time.perf_counter() - start
        if repeat >= WARM_UP:
            seconds.append(elapsed / message.messages)
    return seconds


def _of(kind: str) -> type[Message]:
    found = KINDS[kind]
    assert issubclass(found, Message)
    return found
