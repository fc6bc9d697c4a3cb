"""Running a validation: the engine at one rate or at several loads, each beside its simulation.

A load is a share of the capacity, which is what the simulator sustains when all requests come at once; the engine's own
is measured beside it. What comes out is what `validation.json` holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engine.errors import InputError
from engine.replica_spec import ReplicaSpec
from engine.results.slo import SLO
from engine.runtime.driver import Clock
from engine.runtime.executor import Executor
from engine.specs import catalog
from engine.specs.device_folder import PROFILE_FILE, folder_of, profile_settings
from engine.workload.workload import Workload, WorkloadSpec, make_workload
from simulator.cluster import Deployment
from simulator.predictor import calibration as store
from studies.validation.compare import Pair, compare, run_pair
from studies.validation.record import curves


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What is validated. `loads` are shares of the capacity; with none the workload comes at its own rate."""

    deployment: Deployment
    workload: WorkloadSpec
    loads: tuple[float, ...] = ()
    seed: int = 0
    slos: Sequence[SLO] = ()
    clock: Clock | None = None

    def run(
        self,
        executor: Executor,
        folder: Path | None = None,
        on_progress: Callable[[str, int, int], None] = lambda what, finished, of: None,
        on_result: Callable[[Mapping[str, Any]], None] = lambda result: None,
    ) -> dict[str, Any]:
        """Serve and simulate every load and return plain numbers; with a folder the runs' tables go there.

        `on_progress` gets what is served, how many requests are finished, and of how many; `on_result` all there is
        after each load. Raises InputError if the calibration is of another machine than the executor's.
        """
        check_machine(self.deployment.replica, executor)
        deployment = replace(self.deployment, replica=self.deployment.replica.with_blocks(executor.num_blocks))
        results = self._describe(deployment, executor)

        def pair_of(spec: WorkloadSpec, name: str) -> tuple[Workload, Pair]:
            workload = make_workload(spec)
            place = folder / name if folder is not None else None
            return workload, run_pair(
                workload, deployment, executor, place, seed=self.seed, slos=self.slos, clock=self.clock,
                on_progress=lambda finished: on_progress(name, finished, len(workload)),
            )  # fmt: skip

        rates: list[tuple[float | None, float | None]] = [(None, self.workload.request_rate)]
        if self.loads:
            _, pair = pair_of(replace(self.workload, request_rate=None, arrival="burst"), "burst")
            real, simulated = (run.summary["request_throughput"] for run in (pair.engine, pair.simulated))
            results["capacity"] = {"engine": real, "simulated": simulated, "error": simulated / real - 1}
            rates = [(load, load * simulated) for load in self.loads]
        for load, rate in rates:
            spec = self.workload if load is None else replace(self.workload, request_rate=rate, arrival=None)
            workload, pair = pair_of(spec, "run" if load is None else f"load-{load:g}")
            result = {"load": load, "request_rate": rate, **compare(pair, deployment, workload)}
            results["loads"].append({**result, "curves": curves(pair, deployment)})
            on_result(results)
        return results

    def _describe(self, deployment: Deployment, executor: Executor) -> dict[str, Any]:
        """Return what was validated on what, and how well the calibration predicts operators."""
        folder = folder_of(deployment.device)
        learned = store.load(folder, deployment.device).records if folder is not None else {}
        host, torch = deployment.host, version("torch")
        return {
            "model": deployment.model.name,
            "device": deployment.device.name,
            "runs_on": deployment.device.runs_on,
            "hardware": executor.hardware,
            "engine": f"{deployment.model.dtype}, {executor.attention_backend} attention, torch {torch}, "
            f"{deployment.parallel}",
            "predictor": deployment.predictor.description,
            "scheduler": deployment.scheduler.policy,
            "max_num_batched_tokens": deployment.scheduler.max_num_batched_tokens,
            "async_scheduling": deployment.async_scheduling,
            "num_gpu_blocks": executor.num_blocks,
            "workload": self.workload.trace.stem if self.workload.trace is not None else self.workload.lengths,
            "host_overhead": None if host is None else {"iteration_s": host.iteration_s, "sequence_s": host.sequence_s},
            "operators": {
                kind: {name: record["held_out"].get(name) for name in ("count", "mape", "p50", "p95", "bias")}
                for kind, record in learned.items()
            },
            "capacity": None,
            "loads": [],
        }


def check_machine(replica: ReplicaSpec, executor: Executor) -> None:
    """Raise InputError if the calibration was measured on other hardware, in another dtype or with other attention."""
    folder = folder_of(replica.device)
    if folder is None or not (folder / PROFILE_FILE).is_file():  # fitted to public tables, or a data sheet
        name, found = replica.device.name, catalog.device_of_hardware(executor.hardware)
        if name in catalog.DEVICES and found is not None and found != name:
            raise InputError(f"the device is {name}, and this machine has {executor.hardware}: give --device {found}")
        return
    measured = profile_settings(folder)["identity"]
    own = {"hardware": executor.hardware, "dtype": replica.model.dtype, "attention_backend": executor.attention_backend}
    for name, value in own.items():
        if measured[name] != value:
            raise InputError(
                f"the calibration in {folder} was measured with {name} {measured[name]!r}, and this engine has "
                f"{value!r}: profile this machine, or choose what was profiled"
            )
