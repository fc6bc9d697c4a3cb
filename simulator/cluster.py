"""A cluster in simulated time: a workload arrives, a router spreads it over replicas, a Recorder writes down the run.

from engine.workload.workload import WorkloadSpec, make_workload
from simulator.cluster import deploy, simulate

replica = deploy("mistralai/Mistral-7B-v0.1", "a100")
run = simulate(make_workload(WorkloadSpec(request_rate=1.0)), [replica])
print(run.summary["p99_ttft_ms"])
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import simpy
from simpy.events import URGENT

from engine.errors import InputError, unknown
from engine.replica_spec import ReplicaSettings, ReplicaSpec, resolve
from engine.results.batch_metrics import batch_metrics
from engine.results.metrics import memory_and_steady_use, prefix_use, replica_use, summarize, tbt_percentiles
from engine.results.recorder import Recorder, Run
from engine.results.slo import SLO
from engine.scheduling.request import Request
from engine.scheduling.scheduler import Scheduler
from engine.specs import DeviceSpec, HostOverhead, ModelSpec, NetworkSpec, ParallelSpec, SchedulerSpec
from engine.specs.device_folder import folder_of
from engine.workload.workload import Workload
from simulator.predictor.base import RuntimePredictor
from simulator.predictor.learned import carried_over, learned
from simulator.predictor.roofline import Roofline
from simulator.predictor.uncertainty import drawn
from simulator.replica import Clock, Replica
from simulator.router import ROUTERS

EXACT_GAPS = 20_000_000  # output tokens of a run up to which every gap between tokens is kept

PredictorMaker = Callable[[ModelSpec, DeviceSpec, NetworkSpec, ParallelSpec, HostOverhead], RuntimePredictor]


def calibrated_or_estimated(
    model: ModelSpec, device: DeviceSpec, network: NetworkSpec, parallel: ParallelSpec, host: HostOverhead
) -> RuntimePredictor:
    """The learned predictor where the device has a calibration, else an estimate: by other GPUs', or the roofline."""
    estimate = carried_over if device.runs_on == "cuda" else Roofline
    maker: PredictorMaker = learned if folder_of(device) is not None else estimate
    return maker(model, device, network, parallel, host)


PREDICTORS: dict[str, PredictorMaker] = {
    "auto": calibrated_or_estimated,
    "learned": learned,
    "carried": carried_over,
    "roofline": Roofline,
}


@dataclass(frozen=True)
class Deployment:
    """One kind of replica with a predictor of its times. Raises InputError if the memory has no room for KV blocks."""

    replica: ReplicaSpec
    predictor: RuntimePredictor
    host: HostOverhead | None = None  # that the predictor was made with, if it was made by name

    def __post_init__(self) -> None:
        self.replica.num_kv_blocks()

    @classmethod
    def of(cls, replica: ReplicaSpec, predictor: str | RuntimePredictor = "auto") -> Deployment:
        """Return the deployment of a replica; `predictor` is a name in PREDICTORS, or one made for this replica."""
        if not isinstance(predictor, str):
            return cls(replica, predictor)
        if predictor not in PREDICTORS:
            raise unknown("predictor", predictor, PREDICTORS)
        host = replica.engine.host
        made = PREDICTORS[predictor](replica.model, replica.device, replica.network, replica.parallel, host)
        return cls(replica, made, host)

    def drawn(self, seed: int) -> Deployment:
        """Return the deployment with the errors of its times drawn (`simulator.predictor.uncertainty`).

        A user's own predictor gives the same times: its errors are not known.
        """
        replica = drawn(self.replica, self.predictor.errors, seed)
        host = replica.engine.host
        return replace(self, replica=replica, predictor=self.predictor.for_host(host), host=self.host and host)

    @property
    def model(self) -> ModelSpec:
        return self.replica.model

    @property
    def device(self) -> DeviceSpec:
        return self.replica.device

    @property
    def network(self) -> NetworkSpec:
        return self.replica.network

    @property
    def parallel(self) -> ParallelSpec:
        return self.replica.parallel

    @property
    def scheduler(self) -> SchedulerSpec:
        return self.replica.scheduler

    @property
    def async_scheduling(self) -> bool:
        return self.replica.async_scheduling

    @property
    def num_kv_blocks(self) -> int:
        return self.replica.num_kv_blocks()

    def new_scheduler(self) -> Scheduler:
        """Make the engine's scheduler for one replica of this kind in simulated time."""
        return self.replica.new_scheduler(simulated=True)

    def describe(self) -> dict[str, Any]:
        """Return a summary's entry for it."""
        return self.replica.describe(self.predictor.description)


def deploy(
    model: str | ModelSpec,
    device: str | DeviceSpec,
    *,
    predictor: str | RuntimePredictor = "auto",
    **settings: Unpack[ReplicaSettings],
) -> Deployment:
    """Resolve a replica (`settings` as for `engine.replica_spec.resolve`) and give it a predictor.

    `predictor` is a name in PREDICTORS or a predictor made for this very replica. Raises InputError for what can't be.
    """
    return Deployment.of(resolve(model, device, **settings), predictor)


def simulate(
    workload: Workload,
    deployments: Sequence[Deployment],
    router: str = "round_robin",
    seed: int = 0,
    slos: Sequence[SLO] = (),
    folder: Path | None = None,
    repeats: bool = True,
    on_progress: Callable[[int], None] | None = None,
    stop: Callable[[Request], str | None] | None = None,
    with_batches: bool = False,
) -> Run:
    """Run `workload` through one replica of each of `deployments`.

    Args:
        seed: of the router's random choices.
        folder: where `requests.parquet` and `iterations.parquet` are written as the run goes on.
        repeats: False single-steps every batch; the result is the same, later.
        on_progress: called now and then with the number of finished requests.
        stop: called with each finished request; what it gives ends the run, and is `stopped_early` in its summary.
        with_batches: add what `engine.results.batch_metrics` derives to the summary.

    Raises InputError for a request that one of the replicas could never run.
    """
    if router not in ROUTERS:
        raise unknown("router", router, ROUTERS)
    if not deployments:
        raise InputError("no replica to simulate: give at least one")
    for deployment in {id(each): each for each in deployments}.values():
        workload.check_fits(deployment.new_scheduler())
    started = time.perf_counter()
    exact = int(workload.output_tokens.sum()) <= EXACT_GAPS
    recorder = Recorder(folder, tbt_percentiles(slos), exact_gaps=exact)
    env = Clock()
    all_finished = env.event()
    finished = 0
    stopped_early: str | None = None
    report_every = max(1, len(workload) // 200)

    def on_finished(requests: Sequence[Request]) -> None:
        nonlocal finished, stopped_early
        for request in requests:
            finished += 1
            if client is not None:
                client.finished(request, env.now)
            if stop is not None and stopped_early is None:
                stopped_early = stop(request)
            if on_progress is not None and finished % report_every == 0:
                on_progress(finished)
        if client is not None:
            send()
        if (finished == len(workload) or stopped_early is not None) and not all_finished.triggered:
            all_finished.succeed()

    replicas = [
        Replica(
            env,
            i,
            deployment.new_scheduler(),
            deployment.predictor,
            recorder,
            on_finished,
            repeats,
        )
        for i, deployment in enumerate(deployments)
    ]
    choose = ROUTERS[router](np.random.default_rng(seed))

    front_ends = [FrontEnd(deployment.host) for deployment in deployments]

    def receive(replica: Replica, request: Request) -> None:
        through = front_ends[replica.index].through(request, env.now)
        if through > env.now:
            env.at(through, URGENT).callbacks.append(lambda event: replica.add(request))
        else:
            replica.add(request)

    client = workload.sender() if workload.waits else None
    due = inf  # when `send` is called next, as far as that is known

    def arrivals() -> Generator[simpy.Event, Any, None]:
        for request in workload.requests():
            yield env.at(request.arrived_at, URGENT)
            receive(choose(request, replicas), request)

    def send(event: simpy.Event | None = None) -> None:
        """Send what the client has to send now, and come again when there is more."""
        nonlocal due
        assert client is not None
        while client.next_at <= env.now:
            request = client.pop()
            receive(choose(request, replicas), request)
        if due <= env.now:
            due = inf
        if client.next_at < due:
            due = client.next_at
            env.at(due, URGENT).callbacks.append(send)

    if client is None:
        env.process(arrivals())
    else:
        env.at(0.0, URGENT).callbacks.append(send)
    collected = gc.isenabled()
    gc.disable()  # a run makes no reference cycles to speak of, and looking for them takes a fifth of its time
    try:
        _run(env, all_finished, replicas)
        recorder.close()
        loop_seconds = time.perf_counter() - started
    finally:
        if collected:
            gc.enable()
    requests = recorder.requests()
    of_batches = batch_metrics(recorder, requests) if with_batches else {}
    summary = summarize(requests, recorder.gaps, slos, len(workload), workload.num_dropped, workload.client)
    summary |= of_batches
    summary["workload"] = workload.name
    summary["trace_failures"] = workload.num_failed
    summary["workload_notes"] = workload.notes_on(deployment.scheduler for deployment in deployments)
    summary["router"] = router
    busy = recorder.busy_share(summary.get("steady_window_s"))
    summary["replicas"] = [
        {
            **deployment.describe(),
            **replica_use(
                replica.scheduler,
                replica.busy_s,
                replica.occupied_s,
                summary["duration"],
                recorder.peak_kv_blocks.get(replica.index, 0),
                [busy.get((replica.index, stage), 0.0) for stage in range(replica.num_stages)] if busy else (),
            ),
        }
        for deployment, replica in zip(deployments, replicas, strict=True)
    ]
    summary |= prefix_use(summary["replicas"]) | memory_and_steady_use(summary["replicas"])
    if stopped_early is not None:
        summary["stopped_early"] = stopped_early
    summary["simulator"] = {"batches": recorder.num_batches, "loop_seconds": loop_seconds}
    return Run(summary, requests, None if folder else recorder.iterations_kept())


class FrontEnd:
    """What a replica's server does before its scheduler sees a request: `HostOverhead.receive_s` and the like."""

    def __init__(self, host: HostOverhead | None) -> None:
        self.host = host if host is not None and host.receives else None
        self._free = 0.0  # when the next request can be taken up

    def through(self, request: Request, now: float) -> float:
        """Return when a request that arrives now, as the newest, reaches the scheduler."""
        if self.host is None:
            return now
        work = self.host.receive_s + self.host.receive_token_s * request.prompt_tokens
        self._free = max(self._free, now) + work
        return self._free + self.host.transit_s


def _run(env: Clock, until: simpy.Event, replicas: Sequence[Replica]) -> None:
    """Run the simulation. Raises InputError if a policy leaves requests waiting for ever."""
    try:
        env.run(until=until)
    except RuntimeError as error:
        left = [replica for replica in replicas if replica.outstanding_requests]
        if not str(error).startswith("No scheduled events") or not left:
            raise
        scheduler = left[0].scheduler
        raise InputError(
            f"the policy {scheduler.spec.policy} schedules nothing although {len(scheduler.running)} requests are "
            f"running and {len(scheduler.waiting)} are waiting: its plan() must give a batch while any can run"
        ) from error
