"""An engine's run once more, in the simulator, with the durations that were measured."""

from typing import Any

import numpy as np
from simpy.events import URGENT

from engine.results.recorder import Recorder
from engine.scheduling.request import Batch
from engine.scheduling.scheduler import Scheduler
from engine.workload.workload import Workload
from simulator.replay import Measured
from simulator.replica import Clock, Replica


def replay(
    lengths: list[tuple[float, int, int]], recorder: Recorder, scheduler: Scheduler
) -> tuple[list[Batch], Recorder]:
    """Simulate requests of (arrival, prompt, output) on a fresh `scheduler`, which `recorder` has a real run of."""
    batches: list[Batch] = []
    schedule = scheduler.schedule

    def noting() -> Batch | None:
        batch = schedule()
        if batch is not None:
            batches.append(batch)
        return batch

    scheduler.schedule = noting  # type: ignore[method-assign]
    env, simulated = Clock(), Recorder()
    predictor = Measured(recorder.iterations_kept(), scheduler.num_stages)
    replica = Replica(env, 0, scheduler, predictor, simulated, lambda request: None, repeats=False)
    at, prompts, outputs = (np.array(column) for column in zip(*lengths, strict=True))

    def arrive() -> Any:
        for request in Workload("w", at, prompts, outputs, 0).requests():
            yield env.at(request.arrived_at, URGENT)
            replica.add(request)

    env.process(arrive())
    env.run()
    simulated.close()
    return batches, simulated


def composition(batches: list[Batch]) -> list[Any]:
    """What is in each batch: requests that decode, chunks of prompts, and the KV blocks in use."""
    return [([r.id for r in b.decodes], [(r.id, n) for r, n in b.chunks], b.kv_blocks) for b in batches]


def assert_same_times(simulated: Recorder, measured: Recorder) -> None:
    """Every request of the measured run was scheduled, and had its first and last token, at the same time."""
    columns, expected = simulated.requests(), measured.requests()
    order = {int(i): k for k, i in enumerate(columns["request_id"])}
    rows = [order[int(i)] for i in expected["request_id"]]
    for column in ("scheduled_s", "first_token_s", "last_token_s"):
        np.testing.assert_allclose(columns[column][rows], expected[column], rtol=0, atol=1e-9)
