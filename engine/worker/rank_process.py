"""The process of one rank: takes messages from the driver's process, answers with reports.

Messages are ("allocate", number of KV blocks), ("step", Step) and ("close",); answers ("ready", what the runner's
`describe` says), ("allocated",), ("report", RankReport) and ("error", time, whether the input is to blame, text).
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import time
import traceback
from collections import deque
from multiprocessing.connection import Connection

from engine.errors import InputError
from engine.runtime.engine_spec import EngineSpec
from engine.runtime.executor import freeze_start_up
from engine.runtime.processes import end_with_parent
from engine.worker.rank import join, leave
from engine.worker.runner import ModelRunner, Pending

POLL_S = 50e-6


def main(driver: Connection, spec: EngineSpec, rank: int, meeting_point: str) -> None:
    """Live as `rank` until told to close, or until the driver is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group: the driver tells when to end
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        runner = join(spec, rank, rank, meeting_point)
        driver.send(("ready", *runner.describe()))
        _serve(driver, runner)
        del runner
        if spec.device == "cuda":
            gc.unfreeze()
            gc.collect()  # its CUDA graphs hold on to NCCL's communicators
        leave()
    except BaseException as error:
        blame = isinstance(error, InputError)
        text = str(error) if blame else "".join(traceback.format_exception(error))
        with contextlib.suppress(OSError):  # the driver may be gone, which is why
            driver.send(("error", time.perf_counter(), blame, text))
        os._exit(1)  # without waiting for ranks that wait for this one


def _serve(driver: Connection, runner: ModelRunner) -> None:
    pending: deque[Pending] = deque()
    while True:
        while pending and pending[0].ready():
            driver.send(("report", pending.popleft().wait()))
        if pending and not driver.poll(POLL_S):
            continue
        match driver.recv():
            case ("step", step):
                pending.append(runner.execute(step))
            case ("allocate", num_blocks):
                runner.allocate(num_blocks)
                freeze_start_up()
                driver.send(("allocated",))
            case ("close",):
                return
