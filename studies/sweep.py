"""Sweeps: many points, each its own settings, worked off by processes or by a Ray cluster, and the table of them.

A sweep's file holds settings like any run's, and under `sweep` lists of what varies; the points are their product. An
entry that is a mapping sets several keys at once:

    model: 01-ai/Yi-34B
    workload: openchat_sharegpt4
    sweep:
      deployment:
        - {device: a100, tensor_parallel_size: 2}
        - {device: h100, tensor_parallel_size: 1}
      scheduler: [sarathi, vllm_v0]

A point that can't be (it does not fit, its settings contradict each other) is "refused", one that fails is "crashed";
neither is ever a capacity.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from engine.errors import InputError
from engine.runtime.multiprocess import end_with_parent

ENDING_S = 10.0  # for processes to end by themselves
Work = Callable[[dict[str, Any]], dict[str, Any]]  # a point's settings -> its result; importable by name


def points(varied: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The product of what varies, as the settings that each point changes."""
    if not isinstance(varied, Mapping) or not varied:
        raise InputError(f"{where}: sweep: give what varies as lists, such as scheduler: [sarathi, vllm_v0]")
    axes = []
    for key, values in varied.items():
        if not isinstance(values, list) or not values:
            raise InputError(f"{where}: sweep: {key}: {values!r}: give a list of values")
        axes.append([value if isinstance(value, Mapping) else {key: value} for value in values])
    found = [dict(itertools.chain.from_iterable(each.items() for each in point)) for point in itertools.product(*axes)]
    names = [name_of(point) for point in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"{where}: sweep: the point {twice} is there twice: remove one")
    return found


def name_of(changed: Mapping[str, Any]) -> str:
    """A point's name, fit for a folder: the values that it changes."""
    parts = []
    for value in changed.values():
        text = "+".join(map(str, value)) if isinstance(value, list) else str(value)
        parts.append("".join(c if c.isalnum() or c in ".+-" else "_" for c in text.split("/")[-1]))
    return ",".join(parts)


def work_off(
    work: Work,
    points: Sequence[dict[str, Any]],
    workers: int,
    environment: Callable[[int], dict[str, str]] | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each point's number and result as they come, from `workers` processes at a time.

    A result has a "status": what `work` gives, "refused" for an InputError, "crashed" for any other error or for a
    process that died. `environment` gives the variables of the process in slot 0 .. workers - 1.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])
    waiting = list(enumerate(points))[::-1]
    running: dict[int, tuple[int, Any, Connection]] = {}  # by slot
    try:
        while waiting or running:
            for slot in range(workers):
                if slot not in running and waiting:
                    number, settings = waiting.pop()
                    ours, theirs = context.Pipe(duplex=False)
                    variables = environment(slot) if environment is not None else {}
                    process = context.Process(target=_work, args=(work, settings, variables, theirs), daemon=True)
                    process.start()
                    theirs.close()
                    running[slot] = number, process, ours
            ready = wait([pipe for _, _, pipe in running.values()])
            for slot, (number, process, pipe) in list(running.items()):
                if pipe in ready:
                    try:
                        result = pipe.recv()
                    except EOFError:
                        process.join()
                        result = {"status": "crashed", "error": f"its process ended with {_ending(process.exitcode)}"}
                    process.join()
                    pipe.close()
                    del running[slot]
                    yield number, result
    finally:
        for _, process, _ in running.values():
            process.terminate()
        end = time.monotonic() + ENDING_S
        for _, process, _ in running.values():
            process.join(max(0.0, end - time.monotonic()))
            process.kill()
            process.join()


def work_off_on_ray(work: Work, points: Sequence[dict[str, Any]], address: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """As `work_off`, on a Ray cluster: `address` is the cluster's, or "auto". One CPU a point."""
    import logging

    import ray

    started = not ray.is_initialized()
    if started:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            raise InputError(f"no Ray cluster at {address!r} ({error}): start one with 'ray start --head'") from None
    try:
        remote = ray.remote(max_retries=0)(answered)
        numbers = {remote.remote(work, settings): number for number, settings in enumerate(points)}
        left = list(numbers)
        while left:
            done, left = ray.wait(left, num_returns=1)
            try:
                result = ray.get(done[0])
            except ray.exceptions.RayError as error:
                result = {"status": "crashed", "error": str(error)}
            yield numbers[done[0]], result
    finally:
        if started:
            ray.shutdown()


def answered(work: Work, settings: dict[str, Any]) -> dict[str, Any]:
    """What `work` gives, or what it fails with."""
    try:
        return work(settings)
    except InputError as error:
        return {"status": "refused", "error": str(error)}
    except Exception as error:
        return {"status": "crashed", "error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}


def mark_pareto(rows: Sequence[dict[str, Any]], more: Sequence[str], less: Sequence[str]) -> None:
    """Set "pareto" on each row: whether no other is at least as good in everything and better in something.

    Rows without one of the keys are not on the front.
    """
    keys = [(key, 1) for key in more] + [(key, -1) for key in less]
    scores = [
        [sign * row[key] for key, sign in keys] if all(row.get(key) is not None for key, _ in keys) else None
        for row in rows
    ]
    for row, mine in zip(rows, scores, strict=True):
        row["pareto"] = mine is not None and not any(
            other is not None and other != mine and all(o >= m for o, m in zip(other, mine, strict=True))
            for other in scores
        )


def write_json(path: Path, values: Any) -> None:
    """Write at once or not at all."""
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    unfinished.replace(path)


def _work(work: Work, settings: dict[str, Any], variables: dict[str, str], answer: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it,
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and it leaves nothing half-written
    threading.Thread(target=end_with_parent, daemon=True).start()  # killed: or it would race with who goes on
    multiprocessing.current_process().daemon = False  # a daemon may not start an engine's ranks
    os.environ.update(variables)
    answer.send(answered(work, settings))
    answer.close()


def _ending(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
