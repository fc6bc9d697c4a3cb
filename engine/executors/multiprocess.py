"""The executor of several ranks on one machine: a process each, and a pipe to each.

The ranks find each other through torch.distributed; this process never imports torch. If a rank dies or fails, the
others are killed and the error names it.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn

from engine.errors import InputError
from engine.runtime.engine_spec import EngineSpec
from engine.runtime.executor import RankReport, Result, Step, WorkerError, combine, freeze_start_up
from engine.runtime.network import LOCALHOST

CLOSE_S = 5.0  # for ranks to end by themselves
BLAME_S = 1.0  # a rank that fails may have lost another: how long that one's end may take to show


class MultiprocessExecutor:
    """Starts the ranks' processes and speaks with them."""

    def __init__(self, spec: EngineSpec) -> None:
        context = multiprocessing.get_context("forkserver")
        # torch is imported once for all ranks
        context.set_forkserver_preload(["engine.worker.rank_process", "engine.worker.preloaded"])
        _start_fork_server()
        meeting_point = f"tcp://{LOCALHOST}:{spec.port or free_port()}"
        if spec.port is not None:
            check_port(spec.port)
        self._reports: dict[int, list[RankReport]] = {}
        self._launched: deque[int] = deque()  # numbers of the steps whose result has not been given
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        try:
            with _no_ctrl_c():  # a rank whose start is cut short complains in a traceback of its own
                for rank in range(spec.parallel.world_size):
                    ours, theirs = context.Pipe()
                    process = context.Process(
                        target=_run_rank, args=(theirs, spec, rank, meeting_point), name=f"rank-{rank}", daemon=True
                    )
                    process.start()
                    theirs.close()
                    self._pipes.append(ours)
                    self._processes.append(process)
            ready = self._ask_all("ready")
            self.num_blocks = min(answer[1] for answer in ready)
            self.attention_backend, self.hardware = str(ready[0][2]), str(ready[0][3])
            self.has_cuda_graphs = bool(ready[0][4])
            self._tell_all(("allocate", self.num_blocks))
            self._ask_all("allocated")
            freeze_start_up()
        except BaseException:
            self._kill()
            raise

    def launch(self, step: Step) -> None:
        self._launched.append(step.number)
        self._reports[step.number] = []
        self._tell_all(("step", step))

    def wait(self, timeout: float | None) -> Result | None:
        number = self._launched[0]
        end = None if timeout is None else time.perf_counter() + timeout
        while len(self._reports[number]) < len(self._pipes):
            left = None if end is None else end - time.perf_counter()
            if left is not None and left <= 0 and timeout:
                return None
            if not self._receive(left, self._take_report) and end is not None:
                return None
        self._launched.popleft()
        return combine(self._reports.pop(number))

    def close(self) -> None:
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # that rank is gone
                pipe.send(("close",))
        end = time.perf_counter() + CLOSE_S
        for process in self._processes:
            process.join(max(0.0, end - time.perf_counter()))
        self._kill()
        gc.unfreeze()

    # -- inside ----------------------------------------------------------------------------------------------------

    def _tell_all(self, message: tuple[Any, ...]) -> None:
        for rank, pipe in enumerate(self._pipes):
            try:
                pipe.send(message)
            except OSError:
                self._fail(rank)

    def _ask_all(self, kind: str) -> list[tuple[Any, ...]]:
        """An answer of this kind from every rank, by rank."""
        answers: dict[int, tuple[Any, ...]] = {}

        def take(rank: int, message: tuple[Any, ...]) -> None:
            assert message[0] == kind, f"rank {rank} answered {message[0]}, not {kind}"
            answers[rank] = message

        while len(answers) < len(self._pipes):
            self._receive(None, take)
        return [answers[rank] for rank in range(len(self._pipes))]

    def _take_report(self, rank: int, message: tuple[Any, ...]) -> None:
        report: RankReport = message[1]
        self._reports[report.number].append(report)

    def _receive(self, timeout: float | None, take: Callable[[int, tuple[Any, ...]], None]) -> bool:
        """Wait for messages and `take` them; False if none came in time. Raises if a rank died or failed."""
        ready = wait([*self._pipes, *(process.sentinel for process in self._processes)], timeout)
        for rank, pipe in enumerate(self._pipes):
            if pipe in ready:
                try:
                    message = pipe.recv()
                except (EOFError, OSError):
                    self._fail(rank)
                if message[0] == "error":
                    self._fail(rank, message)
                take(rank, message)
        for rank, process in enumerate(self._processes):
            if process.sentinel in ready and not self._pipes[rank].poll():
                self._fail(rank)
        return bool(ready)

    def _fail(self, rank: int, error: tuple[Any, ...] | None = None) -> NoReturn:
        """Kill every rank and raise what went wrong; `error` is what `rank` said, None if it is gone.

        A rank that is lost makes the others fail, and they may be heard of before. So a rank that ended without a word
        is to blame, one that was killed above all; else the one that failed first.
        """
        errors = {} if error is None else {rank: error}
        deadline = time.perf_counter() + BLAME_S
        while True:
            codes = [process.exitcode for process in self._processes]
            for other, pipe in enumerate(self._pipes):
                while other not in errors and (message := _pending_message(pipe)) is not None:
                    if message[0] == "error":
                        errors[other] = message
            silent = {r: code for r, code in enumerate(codes) if code is not None and r not in errors}
            known = None not in codes or any(blames_input for _, _, blames_input, _ in errors.values())
            if silent or known or time.perf_counter() > deadline:
                break
            time.sleep(0.01)
        pids = [process.pid for process in self._processes]
        self._kill()
        if silent:
            rank, code = min(silent.items(), key=lambda item: item[1])
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise WorkerError(f"rank {rank} {how} (process {pids[rank]})")
        if not errors:
            raise WorkerError(f"rank {rank} closed its pipe (process {pids[rank]})")
        rank, (_, _, blames_input, text) = min(errors.items(), key=lambda item: item[1][1])
        raise InputError(text) if blames_input else WorkerError(f"rank {rank} failed: {text}")

    def _kill(self) -> None:
        for process in self._processes:
            if process.exitcode is None:
                process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()


def _start_fork_server() -> None:
    """Start the process that ranks are forked from, unless it runs, with SIGINT blocked in it and so in them.

    Ctrl-C goes to every process of the group, while they start too; the driver alone decides what comes of it.
    """
    resource_tracker.ensure_running()  # first, for it unblocks SIGINT
    with _no_ctrl_c():
        forkserver.ensure_running()


@contextlib.contextmanager
def _no_ctrl_c() -> Iterator[None]:
    """Hold SIGINT back until the end of the block, for this thread and for what it starts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _pending_message(pipe: Connection) -> tuple[Any, ...] | None:
    """The next message that is there already; None if there is none, or never will be."""
    try:
        message: tuple[Any, ...] | None = pipe.recv() if pipe.poll() else None
    except (EOFError, OSError):
        return None
    return message


def _run_rank(driver: Connection, spec: EngineSpec, rank: int, meeting_point: str) -> None:
    from engine.worker.rank_process import main

    main(driver, spec, rank, meeting_point)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((LOCALHOST, 0))
        return int(probe.getsockname()[1])


def check_port(port: int) -> None:
    """Raise InputError if somebody listens on `port` already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOCALHOST, port))
        except OSError as error:
            raise InputError(
                f"port {port} can't be had ({error.strerror}): give another --distributed-port, or leave it out"
            ) from None
