"""Jobs shared out to processes or to a Ray cluster, and what becomes of one that fails.

A job's result is what `work` returns for it. A job that can't be run (it does not fit, its settings contradict each
other) is {"status": "refused", "error"}; one that fails, or whose process dies, {"status": "crashed", "error"}, with a
"traceback" where there is one. Neither is ever taken for a result. A full disk ends all jobs: DiskFullError is raised.

    for number, result in work_off(compute, jobs, workers=8): ...
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sized
from itertools import count, islice, takewhile
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from engine.errors import DiskFullError, InputError
from engine.results.folders import FULL, cant_write
from engine.runtime.processes import end_with_parent

MOST_WORKERS = 1024
_FULL = "full"  # the status of a job that could not write; no one else sees it
ENDING_S = 10.0  # for processes to end by themselves

Job = TypeVar("Job")
Result = dict[str, Any]
Work = Callable[[Job], Result]  # importable by name
Jobs = Iterable[Job | None]  # None: there is none as yet, ask again after the next result
Results = Iterator[tuple[int, Result]]  # numbers of jobs and their results, as they come


class _Worker(NamedTuple):
    process: Any
    pipe: Connection


def in_turn(work: Work[Job], jobs: Jobs[Job]) -> Results:
    """Yield each job's number and result, computed in this process."""
    for number, job in enumerate(job for job in jobs if job is not None):
        yield number, _checked(answered(work, job))


def work_off(
    work: Work[Job],
    jobs: Jobs[Job],
    workers: int,
    environment: Callable[[int], dict[str, str]] | None = None,
    reuse: bool = False,
) -> Results:
    """Yield each job's number and result as they come, from `workers` processes at a time.

    `environment` gives the variables of the process in slot 0 .. workers - 1. Each job has a process of its own unless
    they are reused, for jobs that gain from what earlier ones have loaded. A job is taken from `jobs` when a process is
    free for it, after the results before have been given, so a generator may make it of these; it yields None while it
    has to wait for the next result.
    """
    workers = min(workers, MOST_WORKERS)
    if isinstance(jobs, Sized):
        workers = min(workers, max(1, len(jobs)))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])
    waiting, numbers, left = iter(jobs), count(), True
    busy: dict[int, tuple[int, _Worker]] = {}  # by slot: the number of its job
    idle: dict[int, _Worker] = {}

    def start(slot: int) -> _Worker:
        ours, theirs = context.Pipe()
        variables = environment(slot) if environment is not None else {}
        process = context.Process(target=_serve, args=(work, variables, theirs), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    try:
        while left or busy:
            for slot in range(workers):
                if slot not in busy and left:
                    try:
                        job = next(waiting)
                    except StopIteration:
                        left = False
                        break
                    if job is None:
                        break
                    busy[slot] = next(numbers), idle.pop(slot) if slot in idle else start(slot)
                    with contextlib.suppress(OSError):  # it has died: its pipe ends, which is read below
                        busy[slot][1].pipe.send(job)
            if not busy:
                continue
            ready = wait([worker.pipe for _, worker in busy.values()])
            for slot, (number, worker) in list(busy.items()):
                if worker.pipe not in ready:
                    continue
                result = _checked(_received(worker))
                del busy[slot]
                if reuse and worker.process.exitcode is None:
                    idle[slot] = worker
                else:
                    worker.pipe.close()
                    worker.process.join()
                yield number, result
    finally:
        left_over = [*idle.values(), *(worker for _, worker in busy.values())]
        for worker in left_over:
            worker.process.terminate()
        end = time.monotonic() + ENDING_S
        for worker in left_over:
            worker.process.join(max(0.0, end - time.monotonic()))
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()


def work_off_on_ray(work: Work[Job], jobs: Jobs[Job], address: str) -> Results:
    """Yield as `work_off` does, from a Ray cluster: `address` is the cluster's, or "auto". One CPU a job.

    Jobs are taken as the cluster has CPUs for them.
    """
    import logging

    import ray

    started = not ray.is_initialized()
    if started:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            raise InputError(f"no Ray cluster at {address!r} ({error}): start one with 'ray start --head'") from None
    try:
        remote: Any = ray.remote(max_retries=0)(answered)
        waiting, given = iter(jobs), count()
        numbers: dict[Any, int] = {}
        while True:
            room = max(1, int(ray.cluster_resources().get("CPU", 1))) - len(numbers)
            for job in takewhile(lambda job: job is not None, islice(waiting, max(0, room))):
                numbers[remote.remote(work, job)] = next(given)
            if not numbers:
                break
            done, _ = ray.wait(list(numbers), num_returns=1)
            try:
                result = ray.get(done[0])
            except ray.exceptions.RayError as error:
                result = {"status": "crashed", "error": str(error)}
            yield numbers.pop(done[0]), _checked(result)
    finally:
        if started:
            ray.shutdown()


def answered(work: Work[Job], job: Job) -> Result:
    """Return what `work` returns, or what it fails with."""
    try:
        return work(job)
    except DiskFullError as error:
        return {"status": _FULL, "error": str(error)}
    except InputError as error:
        return {"status": "refused", "error": str(error)}
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL:
            return {"status": _FULL, "error": str(cant_write(Path(error.filename or "the results"), error))}
        return {"status": "crashed", "error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}


def _checked(result: Result) -> Result:
    """Return a job's result. Raises DiskFullError if it found the disk full: so will the others."""
    if result.get("status") == _FULL:
        raise DiskFullError(result["error"])
    return result


def _serve(work: Work[Job], variables: dict[str, str], pipe: Connection) -> None:
    """Answer the jobs that come through the pipe until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it,
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and it leaves nothing half-written
    threading.Thread(target=end_with_parent, daemon=True).start()  # or it would race with whoever resumes
    multiprocessing.current_process().daemon = False  # a daemon may not start an engine's ranks
    os.environ.update(variables)
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(answered(work, pipe.recv()))


def _received(worker: _Worker) -> Result:
    """Return a worker's answer, or how its process ended."""
    with contextlib.suppress(EOFError, OSError):
        return dict(worker.pipe.recv())
    worker.process.join()
    code = worker.process.exitcode
    ending = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
    return {"status": "crashed", "error": f"its process ended with {ending}"}
