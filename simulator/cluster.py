"""A cluster in simulated time: a workload arrives, a router spreads it over replicas, a Recorder writes down the run.

from engine.workload import WorkloadSpec, make_workload
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
from pathlib import Path
from typing import Any

import numpy as np
import simpy
from simpy.events import URGENT

from engine import catalog
from engine.engine_spec import dtype_bytes
from engine.errors import InputError, unknown
from engine.memory import MOST_BLOCKS, num_kv_blocks
from engine.metrics import replica_use, summarize, tbt_percentiles
from engine.policies import POLICIES, largest_batch, resolve
from engine.recorder import Recorder, Run
from engine.request import Request
from engine.scheduler import Scheduler
from engine.specs import SLO, DeviceSpec, HostOverhead, ModelSpec, NetworkSpec, ParallelSpec, SchedulerSpec
from engine.workload import Workload
from simulator.predictor.base import RuntimePredictor
from simulator.predictor.calibration import folder_of, measured_host, profiled_dtype
from simulator.predictor.learned import learned
from simulator.predictor.roofline import Roofline
from simulator.replica import Clock, Replica
from simulator.router import ROUTERS

EXACT_GAPS = 20_000_000  # output tokens of a run up to which every gap between tokens is kept

PredictorMaker = Callable[[ModelSpec, DeviceSpec, NetworkSpec, ParallelSpec, HostOverhead], RuntimePredictor]


def calibrated_or_roofline(
    model: ModelSpec, device: DeviceSpec, network: NetworkSpec, parallel: ParallelSpec, host: HostOverhead
) -> RuntimePredictor:
    """The learned predictor where the device has a calibration, else the roofline estimate."""
    maker: PredictorMaker = learned if folder_of(device) is not None else Roofline
    return maker(model, device, network, parallel, host)


PREDICTORS: dict[str, PredictorMaker] = {
    "auto": calibrated_or_roofline,
    "learned": learned,
    "roofline": Roofline,
}


@dataclass(frozen=True)
class Deployment:
    """One kind of replica: a model on devices, cut and scheduled in one way, with a predictor of its times."""

    model: ModelSpec
    device: DeviceSpec
    network: NetworkSpec
    parallel: ParallelSpec
    scheduler: SchedulerSpec
    num_kv_blocks: int
    predictor: RuntimePredictor
    async_scheduling: bool = False
    host: HostOverhead | None = None  # that the predictor was made with, if it was made by name

    def new_scheduler(self) -> Scheduler:
        """The engine's scheduler for one replica of this kind."""
        return Scheduler(
            self.scheduler,
            self.num_kv_blocks,
            max_in_flight=self.parallel.pipeline_parallel_size,
            sliding_window=self.model.sliding_window,
            async_scheduling=self.async_scheduling,
        )

    def notes(self) -> list[str]:
        """What a user should know who reads the results."""
        length, positions = self.scheduler.max_model_len or 0, self.model.max_position_embeddings
        notes = []
        if length > positions:
            notes.append(
                f"--max-model-len {length} is past the {positions} positions that {self.model.name} was made for"
            )
        policy, longest = POLICIES[self.scheduler.policy], f"activation memory is counted for {length} tokens"
        if not policy.has_budget:
            notes.append(f"{self.scheduler.policy} has no token budget: a batch may hold many whole prompts; {longest}")
        elif not policy.strict_budget:
            notes.append(f"{self.scheduler.policy} runs a prompt over its token budget whole; {longest}")
        tp, node = self.parallel.tensor_parallel_size, self.network.gpus_per_node
        if tp > node:
            rate = self.network.internode.bandwidth_bytes_per_s / 1e9
            notes.append(f"TP{tp} spans {-(-tp // node)} nodes of {node} GPUs: its all-reduces go at {rate:g} GB/s")
        return notes

    def describe(self) -> dict[str, Any]:
        """What there is to say about it in a summary."""
        return {
            "model": self.model.name,
            "device": self.device.name,
            "network": self.network.name,
            "num_nodes": -(-self.parallel.world_size // self.network.gpus_per_node),
            "parallel": str(self.parallel),
            "num_gpus": self.parallel.world_size,
            "scheduler": self.scheduler.policy,
            "max_num_batched_tokens": self.scheduler.max_num_batched_tokens,
            "max_model_len": self.scheduler.max_model_len,
            "num_gpu_blocks": self.num_kv_blocks,
            "kv_cache_tokens": self.num_kv_blocks * self.scheduler.block_size,
            "predictor": self.predictor.description,
            "notes": self.notes(),
        }


def deploy(
    model: str | ModelSpec,
    device: str | DeviceSpec,
    *,
    network: str | None = None,
    internode_network: str | None = None,
    parallel: ParallelSpec | None = None,
    scheduler: SchedulerSpec | None = None,
    host_overhead: str = "auto",
    gpu_memory_utilization: float = 0.9,
    num_gpu_blocks_override: int | None = None,
    predictor: str | RuntimePredictor = "auto",
    async_scheduling: bool = False,
) -> Deployment:
    """A deployment by names, with what is left open filled in. Raises InputError for what can't be.

    A model that is given by name has the type of numbers that the device was profiled in, if it was. `predictor` is a
    name in PREDICTORS or a predictor made for this very deployment.
    """
    device = catalog.device(device) if isinstance(device, str) else device
    if isinstance(model, str):
        model, dtype = catalog.model(model), profiled_dtype(device)
        model = model if dtype is None else replace(model, dtype_bytes=dtype_bytes(dtype))
    net = catalog.network(network or device.network, internode_network)
    parallel = parallel or ParallelSpec()
    parallel.validate(model)
    spec = resolve(scheduler or SchedulerSpec(), model.max_position_embeddings)
    if num_gpu_blocks_override is None:
        blocks = num_kv_blocks(model, device, parallel, spec, gpu_memory_utilization, largest_batch(spec))
    elif not 1 <= num_gpu_blocks_override <= MOST_BLOCKS:
        raise InputError(f"num_gpu_blocks_override {num_gpu_blocks_override}: give 1 to {MOST_BLOCKS:,} blocks")
    else:
        blocks = num_gpu_blocks_override
    host = None
    if isinstance(predictor, str):
        if predictor not in PREDICTORS:
            raise unknown("predictor", predictor, PREDICTORS)
        host = measured_host(device) if host_overhead == "auto" and predictor != "roofline" else None
        if host is None:
            host = catalog.host_overhead("cuda_graphs" if host_overhead == "auto" else host_overhead)
        predictor = PREDICTORS[predictor](model, device, net, parallel, host)
    if async_scheduling and parallel.pipeline_parallel_size > 1:
        raise InputError("async_scheduling true is for one pipeline stage: several batches are in flight already")
    return Deployment(model, device, net, parallel, spec, blocks, predictor, async_scheduling, host)


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
) -> Run:
    """Run `workload` through one replica of each of `deployments`.

    Args:
        seed: of the router's random choices.
        folder: where `requests.parquet` and `iterations.parquet` are written as the run goes on.
        repeats: False single-steps every batch; the result is the same, later.
        on_progress: called now and then with the number of finished requests.
        stop: called with each finished request; what it gives ends the run, and is `stopped_early` in its summary.

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

    def on_finished(request: Request) -> None:
        nonlocal finished, stopped_early
        finished += 1
        if stop is not None and stopped_early is None:
            stopped_early = stop(request)
            if stopped_early is not None and finished < len(workload):
                all_finished.succeed()
        if finished == len(workload) and not all_finished.triggered:
            all_finished.succeed()
        if on_progress is not None and finished % report_every == 0:
            on_progress(finished)

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

    def arrivals() -> Generator[simpy.Event, Any, None]:
        for request in workload.requests():
            yield env.at(request.arrived_at, URGENT)
            choose(request, replicas).add(request)

    env.process(arrivals())
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
    summary = summarize(requests, recorder.gaps, slos, len(workload), workload.num_dropped)
    summary["workload"] = workload.name
    summary["trace_failures"] = workload.num_failed
    summary["router"] = router
    summary["replicas"] = [
        {
            **deployment.describe(),
            **replica_use(replica.scheduler.recomputed_tokens, replica.busy_s, replica.occupied_s, summary["duration"]),
        }
        for deployment, replica in zip(deployments, replicas, strict=True)
    ]
    if stopped_early is not None:
        summary["stopped_early"] = stopped_early
    summary["simulator"] = {"batches": recorder.num_batches, "loop_seconds": loop_seconds}
    return Run(summary, requests, None if folder else recorder.iterations_kept())


def _run(env: Clock, until: simpy.Event, replicas: Sequence[Replica]) -> None:
    """Run the simulation; RuntimeError if a policy leaves requests waiting for ever."""
    try:
        env.run(until=until)
    except RuntimeError as error:
        left = [replica for replica in replicas if replica.outstanding_requests]
        if not str(error).startswith("No scheduled events") or not left:
            raise
        scheduler = left[0].scheduler
        raise RuntimeError(
            f"the policy {scheduler.spec.policy} schedules nothing although {len(scheduler.running)} requests are "
            f"running and {len(scheduler.waiting)} are waiting"
        ) from error
