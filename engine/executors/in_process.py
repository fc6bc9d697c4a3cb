"""The executor of one rank, in the driver's own process."""

from __future__ import annotations

import gc
import time
from collections import deque

from engine.runtime.engine_spec import EngineSpec
from engine.runtime.executor import Result, Step, WorkerError, combine, freeze_start_up
from engine.worker.rank import join
from engine.worker.runner import Pending

POLL_S = 20e-6


class InProcessExecutor:
    """Runs steps here. On a CPU `launch` computes, on a GPU it returns as soon as the kernels are launched."""

    def __init__(self, spec: EngineSpec) -> None:
        self._runner = join(spec, 0, 0, None)
        self.num_blocks, self.attention_backend, self.hardware, self.has_cuda_graphs = self._runner.describe()
        self._runner.allocate(self.num_blocks)
        self._pending: deque[Pending] = deque()
        freeze_start_up()

    def launch(self, step: Step) -> None:
        try:
            self._pending.append(self._runner.execute(step))
        except RuntimeError as error:  # CUDA's errors, for the most part
            raise WorkerError(f"rank 0 failed: {error}") from error

    def wait(self, timeout: float | None) -> Result | None:
        if timeout is not None:
            end = time.perf_counter() + timeout
            while not self._pending[0].ready():
                if time.perf_counter() >= end:
                    return None
                time.sleep(POLL_S)
        return combine([self._pending.popleft().wait()])

    def close(self) -> None:
        self._pending.clear()
        gc.unfreeze()
