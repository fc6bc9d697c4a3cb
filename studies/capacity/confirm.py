"""Confirming a predicted capacity on hardware, with as few runs as the prediction's quality allows.

The engine serves the workload at the predicted capacity, then just above it if the SLOs are met, just below if they are
not; only after a wrong prediction does the search continue from there, in steps that double.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from studies.capacity.search import bracket
from studies.capacity.trial import Trial

STEP = 0.05  # how far above and below the prediction is just above and just below
MOST_STEPS = 12
FAR = 4.0  # a prediction that is off by more is reported as that, and not followed


@dataclass(frozen=True)
class Confirmation:
    """What hardware says of a predicted capacity (requests/s); `qps` is 0 if no rate that was tried meets the SLOs."""

    predicted: float
    qps: float
    missed_at: float | None  # the lowest rate that was seen to miss an SLO
    trials: tuple[Trial, ...]

    @property
    def settled(self) -> bool:
        """Whether the capacity is known to a step: it lies between `qps` and `missed_at`."""
        return bool(self.qps) and self.missed_at is not None and self.missed_at <= self.qps * (1 + STEP) * 1.001

    @property
    def error(self) -> float | None:
        """Predicted over confirmed, less 1."""
        return self.predicted / self.qps - 1 if self.qps else None

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers."""
        return {
            "predicted_qps": self.predicted,
            "confirmed_qps": self.qps,
            "missed_at_qps": self.missed_at,
            "settled": self.settled,
            "error": self.error,
            "trials": [{**each.to_json(), "duration_s": each.summary["duration"]} for each in self.trials],
        }


def confirm(run: Callable[[float], Trial], predicted: float, step: float = STEP) -> Confirmation:
    """Bracket the real capacity around the prediction: `run` serves the workload at a rate on hardware.

    A right prediction takes two runs. A wrong one is followed in steps of `step`, 2 `step`, 4 `step`, ... as far as FAR
    times the prediction or its FAR-th part, and what lies between the last two rates is halved until it is within
    `step`.
    """
    trials: list[Trial] = []

    def met(rate: float) -> bool:
        trials.append(run(rate))
        return trials[-1].met

    steps = (1 + step * 2**i for i in range(MOST_STEPS))
    low, high = bracket(met, predicted, steps=steps, far=FAR, tolerance=step, most=MOST_STEPS)
    return Confirmation(predicted, low or 0.0, high, tuple(trials))


def gpu_hours(trials: Sequence[Trial], num_gpus: int) -> float:
    """Return what running these trials takes on so many GPUs: one that was given up counts as far as it went."""
    return float(sum(trial.summary["duration"] for trial in trials) * num_gpus / 3600)
