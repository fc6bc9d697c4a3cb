"""Ranks that are not as they should be: each function may take the place of engine.executors.multiprocess._run_rank.

monkeypatch.setattr(multiprocess, "_run_rank", partial(strange_ranks.dies_computing, victim=1))
"""

import gc
import os
import signal
import time
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from engine.worker import rank_process, weights
from engine.worker.model import Decoder
from engine.worker.runner import ModelRunner

FATAL_STEP = 6


def dies_at_once(*arguments: Any, victim: int) -> None:
    """Before it meets the others."""
    if arguments[2] == victim:
        _die()
    rank_process.main(*arguments)


def dies_loading(*arguments: Any, victim: int) -> None:
    """When all have met."""
    if arguments[2] == victim:
        weights.load = _die
    rank_process.main(*arguments)


def dies_computing(*arguments: Any, victim: int) -> None:
    """In the middle of a step."""
    _run(arguments, victim, _die)


def exits_computing(*arguments: Any, victim: int) -> None:
    """Without a word."""
    _run(arguments, victim, lambda: os._exit(3))


def fails_computing(*arguments: Any, victim: int) -> None:
    """With an error."""

    def fail() -> NoReturn:
        raise ArithmeticError("strange numbers")

    _run(arguments, victim, fail)


def runs_out_of_memory(*arguments: Any, victim: int) -> None:
    """As torch says it on a GPU."""

    def fail() -> NoReturn:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nAnd more.")

    _run(arguments, victim, fail)


def takes_its_time(*arguments: Any) -> None:
    """A hundredth of a second more each step, without need of a processor."""
    compute = Decoder.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.01)
        return compute(*args, **kwargs)

    Decoder.forward = forward  # type: ignore[method-assign]
    rank_process.main(*arguments)


def has_room_by_rank(*arguments: Any) -> None:
    """Finds 40 KV blocks, and 4 fewer on each rank after the first."""
    allocate = ModelRunner.allocate

    def checked(self: ModelRunner, num_blocks: int) -> None:
        assert num_blocks == 40 - 4 * (self.spec.parallel.world_size - 1)
        allocate(self, num_blocks)

    ModelRunner.free_blocks = lambda self: 40 - 4 * self.rank.rank  # type: ignore[method-assign]
    ModelRunner.allocate = checked  # type: ignore[method-assign]
    rank_process.main(*arguments)


def has_frozen_its_start(*arguments: Any) -> None:
    """Fails in a step if garbage collections still look at what was there before the first."""
    compute = Decoder.forward

    def forward(self: Decoder, *args: Any, **kwargs: Any) -> Any:
        assert not any(each is self for each in gc.get_objects())
        return compute(self, *args, **kwargs)

    Decoder.forward = forward  # type: ignore[method-assign]
    rank_process.main(*arguments)


def slow_to_report(actor: Any) -> None:
    """Make a rank that is a Ray actor note when it starts a step and when it has waited for one.

    It waits until the next one has been started too, but not for long: after the last there is none.
    """
    actor.noted = []
    execute = actor._runner.execute

    class Slow:
        def __init__(self, pending: Any) -> None:
            self.pending = pending

        def wait(self) -> Any:
            end = time.monotonic() + 3
            while actor.noted.count("start") - actor.noted.count("done") < 2 and time.monotonic() < end:
                time.sleep(0.01)
            actor.noted.append("done")
            return self.pending.wait()

    def noting(step: Any) -> Any:
        actor.noted.append("start")
        return Slow(execute(step))

    actor._runner.execute = noting


def noted(actor: Any) -> list[str]:
    return list(actor.noted)


def pid(actor: object) -> int:
    """Of a rank that is a Ray actor."""
    return os.getpid()


def _die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _run(arguments: tuple[Any, ...], victim: int, action: Callable[[], None]) -> None:
    """A rank that does `action` in the midst of its step number FATAL_STEP, if it is the victim."""
    compute, steps = Decoder.forward, 0

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == FATAL_STEP:
            action()
        return compute(*args, **kwargs)

    if arguments[2] == victim:
        Decoder.forward = forward  # type: ignore[method-assign]
    rank_process.main(*arguments)
