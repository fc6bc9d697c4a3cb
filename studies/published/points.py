"""The points of a study: every combination of what its file lists.

A point is plain data, so that it can be computed by any process and its record be kept under a name that says
everything it depends on.

    points = expand(load("scheduler_ablation"), "sarathi_osdi24")
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from engine.engine_preset import DEFAULT
from engine.specs import ParallelSpec, catalog
from engine.specs.device_folder import folder_of
from engine.workload.workload import WorkloadSpec
from simulator.cluster import Deployment, deploy
from simulator.predictor.calibration import fingerprint
from studies.published.experiment import CONTROLS, PAPER_HOST, PLACEBOS, Block, Experiment, Requests, Scheduling, Setup
from studies.published.placebo import placebo

MEMORY_UTILIZATION = 0.85  # of the paper's scripts
ROOT = Path(__file__).parents[2]
CODE = (  # that a record comes from
    "engine",
    "profiler/operators.py",
    "simulator",
    "studies/capacity",
    *(f"studies/published/{name}.py" for name in ("points", "tasks", "operation_split", "placebo")),
)


@dataclass(frozen=True)
class Point:
    """One thing to compute. `id` is its place in the study, `SETUP/WORKLOAD/...`; the rest is what it depends on."""

    id: str
    task: str
    host: str
    setup: Setup
    requests: Requests | None = None
    scheduling: Scheduling | None = None
    slos: tuple[str, ...] = ()
    rate: float | None = None
    num_prompts: int = 0
    seed: int = 0
    seeds: int = 1  # that a search goes on to, from `seed`: each starts where the one before ended
    time_limit_s: float | None = None
    fine: bool = False
    timeline: bool = False
    prompt: int = 0
    chunk: int = 0  # 0: whole
    batch: int = 0
    context: int = 0

    def key(self) -> str:
        """Return a hash of all that its record depends on: the point, the calibration and the code."""
        parts = {k: value.model_dump() if isinstance(value, BaseModel) else value for k, value in asdict(self).items()}
        calibration = folder_of(catalog.device(self.setup.device))
        text = json.dumps([parts, calibration and fingerprint(calibration), _code()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def deployment(self) -> Deployment:
        """Return the deployment it is about."""
        setup, scheduling, requests = self.setup, self.scheduling, self.requests
        scheduler = {} if scheduling is None else scheduling.model_dump(exclude_none=True)
        if requests is not None:
            scheduler["max_model_len"] = requests.max_model_len
        theirs = self.host in (PAPER_HOST, *CONTROLS)
        deployment = deploy(
            setup.model,
            setup.device,
            network=setup.network,
            internode_network=setup.internode_network,
            parallel=ParallelSpec(
                tensor_parallel_size=setup.tensor_parallel_size, pipeline_parallel_size=setup.pipeline_parallel_size
            ),
            engine="sarathi-osdi24" if theirs else DEFAULT,
            scheduler=scheduler,
            host_overhead=PAPER_HOST if self.host in PLACEBOS else self.host,
            gpu_memory_utilization=MEMORY_UTILIZATION,
            # no scheduler, no KV cache: an operator's time depends on neither
            num_gpu_blocks_override=None if scheduling is not None else 1,
        )
        return placebo(deployment, self.host) if self.host in PLACEBOS else deployment

    def workload(self) -> WorkloadSpec:
        """Return the requests, at its rate or at one request/s."""
        assert self.requests is not None
        return WorkloadSpec(
            lengths=self.requests.lengths,
            max_model_len=self.requests.max_model_len,
            request_rate=self.rate or 1.0,
            num_prompts=self.num_prompts,
            seed=self.seed,
        )


@cache
def _code() -> str:
    places = [ROOT / place for place in CODE]
    files = [path for place in places for path in (sorted(place.rglob("*.py")) if place.is_dir() else [place])]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


def expand(experiment: Experiment, host: str, seeds: int = 1) -> list[Point]:
    """Return every point of a study on a host overhead or placebo.

    A load is a point for each seed, all of one id; a search has all of its seeds. What takes long is done only where a
    claim is about it: the points of controls, searches on other than the paper's engine, and on that fine ones and more
    seeds than the first.
    """
    asked = {name.rpartition(":")[0] for claim in experiment.claims for name in claim.of}
    found: dict[tuple[str, int], Point] = {}
    for block in experiment.blocks:
        common = {name: getattr(block, name) for name in ("task", "timeline", "context", "time_limit_s")}
        for name, (place, given) in product(block.setups, list(_combinations(block, experiment))):
            id, setup = f"{name}/{place}", experiment.setups[name]
            claimed, is_search = id in asked, block.task == "search"
            if not claimed and (host in CONTROLS or (is_search and host != PAPER_HOST)):
                continue
            fine = block.fine and claimed and host == PAPER_HOST
            point = Point(id, host=host, setup=setup, fine=fine, **common, **given)
            if is_search:
                found[id, 0] = replace(point, seeds=seeds if claimed else 1)
            else:
                drawn = range(seeds if point.requests is not None else 1)
                found |= {(id, seed): replace(point, seed=seed) for seed in drawn}
    return list(found.values())


def _combinations(block: Block, experiment: Experiment) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place of each of a block's points below its setup, and what it is given."""
    if block.task in ("search", "run"):
        loads: list[tuple[str, dict[str, Any]]] = [(slo, {"slos": tuple(texts)}) for slo, texts in block.slos.items()]
        if block.task == "run":
            loads = [(f"{rate:g}", {"rate": rate}) for rate in block.rates]
        shared = {"num_prompts": block.num_prompts}
        for workload, (load, given), (name, scheduling) in product(block.workloads, loads, block.schedulers.items()):
            served = {"requests": experiment.workloads[workload], "scheduling": scheduling}
            yield f"{workload}/{load}/{name}", {**shared, **served, **given}
    elif block.task == "prefill":
        for prompt, chunk in product(block.prompts, [0, *block.chunks]):
            if chunk < prompt:
                yield f"{prompt}/{chunk or 'whole'}", {"prompt": prompt, "chunk": chunk}
    elif block.task == "operators":
        yield from ((f"prefill/{prompt}", {"prompt": prompt}) for prompt in block.prompts)
        yield from ((f"decode/{batch}", {"batch": batch}) for batch in block.batches)
        yield from ((f"hybrid/{prompt}+{batch}", {"prompt": prompt, "batch": batch}) for prompt, batch in block.beside)
    else:
        beside = {"chunk": block.chunks[0], "prompt": block.prompts[0]}
        yield from ((f"{batch}", {"batch": batch, **beside}) for batch in block.batches)
