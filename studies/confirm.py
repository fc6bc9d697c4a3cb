"""Confirming a predicted capacity on hardware, with as few runs as the prediction's quality allows.

The engine serves the workload at the predicted capacity, then just above it if the SLOs are met, just below if they are
not; only a wrong prediction makes the search go on from there, in steps that double.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any

from studies.search import Trial

STEP = 0.05  # how far above and below the prediction is just above and just below
MOST_STEPS = 12
FAR = 4.0  # a prediction that is off by more is told as that, and not followed


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
        """Plain numbers."""
        return {
            "predicted_qps": self.predicted,
            "confirmed_qps": self.qps,
            "missed_at_qps": self.missed_at,
            "settled": self.settled,
            "error": self.error,
            "trials": [
                {
                    "rate": each.rate,
                    "met": each.met,
                    "margin": each.margin if isfinite(each.margin) else None,
                    "binding_slo": each.binding,
                    "duration_s": each.summary["duration"],
                    "folder": each.folder,
                }
                for each in self.trials
            ],
        }


def confirm(run: Callable[[float], Trial], predicted: float, step: float = STEP) -> Confirmation:
    """Bracket the real capacity around the prediction: `run` serves the workload at a rate on hardware.

    A right prediction takes two runs. A wrong one is followed in steps of `step`, 2 `step`, 4 `step`, ... as far as FAR
    times the prediction or its FAR-th part, and what lies between the last two rates is halved until it is within
    `step`.
    """
    trials = [run(predicted)]
    up = trials[0].met
    low, high = (predicted, None) if up else (None, predicted)
    rate, width = predicted, step
    last = predicted * FAR if up else predicted / FAR
    while (high is None if up else low is None) and len(trials) < MOST_STEPS and rate != last:
        rate = min(rate * (1 + width), last) if up else max(rate / (1 + width), last)
        width *= 2
        trials.append(run(rate))
        if trials[-1].met:
            low = rate
        else:
            high = rate
    while low is not None and high is not None and high > low * (1 + step) * (1 + 1e-9) and len(trials) < MOST_STEPS:
        middle = sqrt(low * high)
        trials.append(run(middle))
        if trials[-1].met:
            low = middle
        else:
            high = middle
    return Confirmation(predicted, low or 0.0, high, tuple(trials))


def gpu_hours(trials: Sequence[Trial], num_gpus: int) -> float:
    """What running these trials takes on so many GPUs: a trial given up early counts as far as it went."""
    return float(sum(trial.summary["duration"] for trial in trials) * num_gpus / 3600)
