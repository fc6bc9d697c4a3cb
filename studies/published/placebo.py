"""Placebos: predictors that know nothing of how long the batches of a study's GPUs take.

A claim that holds under a placebo too says little of the predictor: what it states follows from the scheduler, or from
any times at all. A placebo replaces the times alone; scheduler, memory and workload stay the study's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from engine.scheduling.request import BatchShape
from engine.specs import catalog
from simulator.cluster import Deployment
from simulator.predictor.base import RuntimePredictor
from simulator.predictor.roofline import Roofline
from studies.published.experiment import MODERN_HOST, ROOFLINE_PLACEBO

OTHER_DEVICE = "h100"  # of another generation, and none of the studies'
DECODES = [1 << i for i in range(9)]  # batches whose times are dealt out, to those of about as many tokens
PROMPTS = [1 << i for i in range(4, 15)]
CONTEXT = 1024


def placebo(deployment: Deployment, name: str) -> Deployment:
    """Return the deployment with the times of a placebo."""
    if name != ROOFLINE_PLACEBO:
        return replace(deployment, predictor=Shuffled(deployment.predictor))
    # of that device alone, on an engine of today
    other, host = catalog.device(OTHER_DEVICE), catalog.host_overhead(MODERN_HOST)
    times = Roofline(deployment.model, other, deployment.network, deployment.parallel, host)
    return replace(deployment, predictor=times)


class Shuffled(RuntimePredictor):
    """A predictor's times, each given to batches of another size.

    Batches of decodes alone trade times among each other, and so do batches with prompts; sizes are powers of two, of
    tokens. What remains true is that prompts take longer than decodes, and the range of either.
    """

    def __init__(self, predictor: RuntimePredictor, seed: int = 0) -> None:
        self.predictor = predictor
        self.description = f"placebo: the times of other batches ({predictor.description})"
        rng = np.random.default_rng(seed)
        self._decodes, self._prompts = (_derangement(rng, len(sizes)) for sizes in (DECODES, PROMPTS))
        self._known: dict[tuple[BatchShape, int], float] = {}

    def dealt(self, shape: BatchShape) -> BatchShape:
        """Return the batch whose time this one has: a whole prompt, or decodes of CONTEXT tokens."""
        sizes, dealt = (PROMPTS, self._prompts) if shape.prefills else (DECODES, self._decodes)
        place = min(range(len(sizes)), key=lambda i: abs(np.log2(shape.num_tokens / sizes[i])))
        size = sizes[dealt[place]]
        if shape.prefills:
            return BatchShape(size, 0, 0, ((size, 0),), 1, 0)
        return BatchShape(size, size, size * CONTEXT, (), size, size)

    def stage_time(self, shape: BatchShape, stage: int) -> float:
        """Seconds of a batch of another size."""
        place = self.dealt(shape), stage
        if (found := self._known.get(place)) is None:
            found = self._known[place] = self.predictor.stage_time(*place)
        return found

    def stage_times(self, shape: BatchShape, stage: int, repeats: int) -> list[float]:
        return [self.stage_time(shape, stage)] * repeats

    def send_time(self, shape: BatchShape, stage: int) -> float:
        return self.predictor.send_time(shape, stage)


def _derangement(rng: np.random.Generator, count: int) -> Sequence[int]:
    """A permutation that leaves nothing in its place."""
    while True:
        found = rng.permutation(count)
        if (found != np.arange(count)).all():
            return [int(place) for place in found]
