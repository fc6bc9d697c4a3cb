"""Bounds on what a replica carries, from its predictor alone: which points of a plan can't win, without a simulation.

A replica works through batches. Whatever its scheduler does, a second of its time is a mix of batches of some shapes,
which together have to compute so many prompt tokens, decodes and cached tokens read for each request. The fastest
mix is a linear program over the shapes; no schedule carries more, where attention to the prompt itself counts nothing.
Batches that take longer than a percentile of TBT allows may hold no more than the rest of the gaps.

    bound = replica_bound(deployment, make_workload(spec), slos)
    print(bound.most, bound.likely)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np

from engine.results.slo import SLO
from engine.results.tables import Array
from engine.scheduling import policies
from engine.scheduling.request import BatchShape
from engine.workload.workload import Workload
from simulator.cluster import Deployment
from simulator.predictor.learned import Learned
from studies.capacity.trial import arrivals

NOTHING = 1e-6  # requests/s: the solver's zero
SLACK = 1.15  # of the bound: shapes between those that are looked at, and runs that end before their queue does
LATE = 1.2  # times the threshold of TBT: a shape beside it may still be in time
BESIDE = (16, 4, 1, 0)  # decodes, at least, beside a chunk in the mixes that are likely: the first that can be
_CACHED = (16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 65536)  # tokens of each decode


@dataclass(frozen=True)
class Bound:
    """Requests/s of a replica: it carries no more than `most`; `likely` guides the search and proves nothing."""

    most: float
    likely: float


def replica_bound(deployment: Deployment, workload: Workload, slos: Sequence[SLO]) -> Bound:
    """Return the bound of a replica under a workload.

    Predictors that are not `Learned` (whose times need not be of a batch's sums) and policies that may exceed their
    token budget are not bounded.
    """
    scheduler = deployment.scheduler
    needs = _needs(workload, scheduler.block_size if scheduler.enable_prefix_caching else None)
    shapes = _shapes(deployment)
    stages = range(deployment.parallel.pipeline_parallel_size)
    times = np.array([[deployment.predictor.stage_time(shape, stage) for stage in stages] for shape in shapes])
    table = np.array([(shape.num_tokens - shape.num_decodes, shape.num_decodes, shape.decode_kv_tokens)
                      for shape in shapes], dtype=float)  # fmt: skip
    slowest, passing = times.max(axis=1), times.sum(axis=1)
    gaps = [(slo.threshold_s, 1 - slo.percentile / 100) for slo in slos if slo.metric == "tbt" and slo.percentile]
    likely_chunk = min(policies.largest_batch(scheduler), max(1, int(needs[0])))
    for beside in BESIDE:  # decodes that a chunk of a prompt stalls: the more, the sooner a long one is too long
        chunks = (np.abs(table[:, 0] / likely_chunk - 1) < 0.15) & (table[:, 1] >= min(beside, scheduler.max_num_seqs))
        usual = (table[:, 0] == 0) | chunks
        likely = _fastest(table[usual], slowest[usual], passing[usual], needs, gaps, 1.0)
        if likely > NOTHING:
            break
    policy = policies.POLICIES[scheduler.policy]
    if not (isinstance(deployment.predictor, Learned) and policy.has_budget and policy.strict_budget):
        return Bound(inf, likely)
    return Bound(SLACK * _fastest(table, slowest, passing, needs, gaps, LATE), likely)


def _needs(workload: Workload, block_size: int | None) -> tuple[float, float, float]:
    """Return what an arrival takes on average: prompt tokens to compute, decodes, and cached tokens that these read.

    With prefix caching (`block_size`) only what no cache can hold is computed. A conversation arrives once and brings
    all its turns.
    """
    prompts, decodes = workload.prompt_tokens, workload.output_tokens - 1
    computed = float(prompts.sum())
    if block_size is not None and workload.contents is not None:
        computed = float(_never_cached(workload, block_size))
    cached = float((decodes * prompts + decodes * (decodes + 1) / 2).sum())
    count = arrivals(workload)
    return computed / count, float(decodes.sum()) / count, cached / count


def _fastest(
    table: Array, slowest: Array, passing: Array, needs: tuple[float, float, float],
    gaps: Sequence[tuple[float, float]], late: float,
) -> float:  # fmt: skip
    """Return the most requests/s of any mix of batches: their tokens (n, 3), times of the slowest stage, of all."""
    from scipy.optimize import linprog  # takes longer to import than a bound to compute

    rows = [np.append(-table[:, i], need) for i, need in enumerate(needs)]
    rows.append(np.append(slowest, 0.0))
    rows += [np.append(table[:, 1] * (passing > late * longest), -share * needs[1]) for longest, share in gaps]
    limits = np.zeros(len(rows))
    limits[len(needs)] = 1.0  # a second of a second
    scale = np.max(np.abs(rows), axis=1, keepdims=True)
    scale[scale == 0] = 1.0
    goal = np.zeros(len(table) + 1)
    goal[-1] = -1.0
    found: Any = linprog(goal, A_ub=np.array(rows) / scale, b_ub=limits / scale[:, 0], method="highs")
    return max(0.0, float(found.x[-1])) if found.status == 0 else inf


def _shapes(deployment: Deployment) -> list[BatchShape]:
    """Return batches of many mixes that the replica may run: tokens of prompts, decodes, and what each decode reads."""
    scheduler = deployment.scheduler
    budget, seats = policies.largest_batch(scheduler), scheduler.max_num_seqs
    room = deployment.num_kv_blocks * scheduler.block_size
    found = []
    for chunk in (0, *_ladder(8, budget, 1.2)):
        for decodes in (0, *_ladder(1, min(seats, budget), 1.3)):
            if not 0 < chunk + decodes <= budget:
                continue
            reads = [each for each in _CACHED if each * decodes <= room] if decodes else [0]
            for each in reads or [room // decodes]:
                sampled = decodes + (chunk > 0)
                found.append(BatchShape(chunk + decodes, decodes, decodes * each, (), sampled, decodes))
    return found


def _ladder(first: int, last: int, ratio: float) -> list[int]:
    """Return whole numbers from `first` to `last`, each about `ratio` times the one before."""
    steps = [min(first, last)]
    while steps[-1] < last:
        steps.append(min(last, max(steps[-1] + 1, int(steps[-1] * ratio))))
    return steps


def _never_cached(workload: Workload, block_size: int) -> int:
    """Return the prompt tokens that a cache of any size could not hold: those that nobody had before."""
    assert workload.contents is not None
    seen: set[int] = set()
    tokens = 0
    columns = (workload.contents, workload.prompt_tokens.tolist(), workload.output_tokens.tolist())
    for content, prompt, output in zip(*columns, strict=True):
        if content is None:
            tokens += prompt
            continue
        blocks = content.block_hashes(prompt + output, block_size)
        asked = blocks[: prompt // block_size]
        tokens += prompt - block_size * sum(block in seen for block in asked)
        seen.update(blocks)
    return tokens
