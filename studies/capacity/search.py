"""The capacity search: the highest request rate at which every SLO holds, to a tolerance.

A search brackets the capacity by doubling and halving, then bisects in the logarithm of the rate.

    capacity = find_capacity(lambda rate: simulated_trial(workload_at(rate), deployments, slos, rate), start=1.0)
    print(capacity.qps, capacity.binding)

A predicted capacity is confirmed on hardware with as few runs as the prediction's quality allows: the engine serves the
workload at the predicted capacity, then just above it if the SLOs are met, just below if they are not; only after a
wrong prediction does the search continue from there, in steps that double.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from math import inf, sqrt
from typing import Any, Literal, NamedTuple

from engine.errors import InputError
from studies.capacity.trial import Trial

TOLERANCE = 0.025
LEAST_TOLERANCE = 1e-4
FROM_A_GUESS = (2.0, 2.0, inf)  # steps of the bracket
FAR = 1000.0  # a rate this many times lower or higher than the guess stands for none at all, or for all at once
FINE = 0.005  # tolerance of the fine search that a choice is held against
_FINE_STEP = 1.03  # of its bracket
STEP = 0.05  # how far above and below the prediction is just above and just below
MOST_STEPS = 12
FAR_OFF = 4.0  # a prediction that is off by more is reported as that, and not followed


class Bracket(NamedTuple):
    """The highest rate that is known to meet the SLOs, and the lowest that misses one; None where none was seen."""

    low: float | None
    high: float | None


def bracket(
    met: Callable[[float], bool], start: float, *, steps: Iterable[float], far: float, tolerance: float,
    most: int | None = None,
) -> Bracket:  # fmt: skip
    """Bracket the highest rate at which `met` holds, from the rate `start` on.

    Each of `steps` is a factor that the rate goes up by while it is met, down while it is not, to `far` times the start
    or its `far`-th part; then the bracket is halved in the logarithm until it is within `tolerance`. At most `most`
    rates are tried, if given.
    """
    tried = 1
    up = met(start)
    low, high = (start, None) if up else (None, start)
    rate, last = start, start * far if up else start / far
    for step in islice(steps, None if most is None else most - 1):
        if rate == last or (low and high):
            break
        rate = min(rate * step, last) if up else max(rate / step, last)
        tried += 1
        low, high = (rate, high) if met(rate) else (low, rate)
    while low and high and high > low * (1 + tolerance) * (1 + 1e-9) and (most is None or tried < most):
        rate = sqrt(low * high)
        tried += 1
        low, high = (rate, high) if met(rate) else (low, rate)
    return Bracket(low, high)


def _noted(run: Callable[[float], Trial], trials: list[Trial]) -> Callable[[float], bool]:
    """Return whether the trial at a rate meets the SLOs; each is added to the trials."""

    def met(rate: float) -> bool:
        trials.append(run(rate))
        return trials[-1].met

    return met


@dataclass(frozen=True)
class Capacity:
    """What a search found.

    `outcome` "found": `qps` meets every SLO and at most `tolerance` more misses one, `binding`. "none": not even a
    trickle meets them, `qps` is 0. "all": even all requests at once meet them, and `qps` is the throughput of that.
    """

    outcome: Literal["found", "none", "all"]
    qps: float
    binding: str | None
    tolerance: float
    trials: tuple[Trial, ...]  # in the order they were made

    @property
    def best(self) -> Trial | None:
        """The trial at the capacity."""
        return max((trial for trial in self.trials if trial.met), key=lambda trial: trial.rate, default=None)

    def describe(self, things: str = "requests") -> str:
        """Return the outcome in words; a rate is of `things`, which may be conversations."""
        if self.outcome == "none":
            return f"no rate meets {self.binding}, not even one request at a time"
        if self.outcome == "all":
            return f"every rate meets the SLOs, even all requests at once ({self.qps:.3g} {things}/s)"
        return f"{self.qps:.3g} {things}/s within the SLOs; beyond it {self.binding} is missed"

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers; `max_qps_under_slo` is the capacity."""
        trials = [{**each.to_json(), "stopped_early": each.summary.get("stopped_early")} for each in self.trials]
        return {
            "max_qps_under_slo": self.qps,
            "outcome": self.outcome,
            "binding_slo": self.binding,
            "tolerance": self.tolerance,
            "trials": trials,
        }


def check_tolerance(tolerance: float) -> None:
    """Raise InputError unless it is a share that a search can reach, and that the names of its trials tell apart."""
    if not LEAST_TOLERANCE <= tolerance < 1:
        raise InputError(f"tolerance {tolerance}: give a share from {LEAST_TOLERANCE} to 1, such as {TOLERANCE}")


def find_capacity(
    run: Callable[[float], Trial],
    start: float,
    tolerance: float = TOLERANCE,
    steps: Iterable[float] = FROM_A_GUESS,
    arrivals_per_request: float = 1.0,
) -> Capacity:
    """Search from the guess `start` (requests/s): `run` makes the trial at a rate; `steps` are those of the bracket.
    Rates are of arrivals, of which a conversation's later turns are none.

    Raises whatever `run` raises: a trial that crashes is no trial that misses its SLOs.
    """
    check_tolerance(tolerance)
    trials: list[Trial] = []
    low, high = bracket(_noted(run, trials), start, steps=steps, far=FAR, tolerance=tolerance)
    if high is None:
        qps = arrivals_per_request * trials[-1].summary["request_throughput"]
        return Capacity("all", qps, None, tolerance, tuple(trials))
    if low is None:
        return Capacity("none", 0.0, trials[-1].binding, tolerance, tuple(trials))
    over = min((trial for trial in trials if not trial.met and trial.rate >= high), key=lambda trial: trial.rate)
    return Capacity("found", low, over.binding, tolerance, tuple(trials))


def fine_capacity(met: Callable[[float], bool], start: float) -> float:
    """Return the capacity at a fine tolerance near `start`, a rate above 0; 0 if a thousandth of it is too much.

    Meant for trials that run to their end. The bracket is found in steps of 3 %.
    """
    return bracket(met, start, steps=repeat(_FINE_STEP), far=FAR, tolerance=FINE).low or 0.0


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

    A right prediction takes two runs. A wrong one is followed in steps of `step`, 2 `step`, 4 `step`, ... as far as
    FAR_OFF times the prediction or its FAR_OFF-th part, and what lies between the last two rates is halved until it is
    within `step`.
    """
    trials: list[Trial] = []
    steps = (1 + step * 2**i for i in range(MOST_STEPS))
    low, high = bracket(_noted(run, trials), predicted, steps=steps, far=FAR_OFF, tolerance=step, most=MOST_STEPS)
    return Confirmation(predicted, low or 0.0, high, tuple(trials))


def gpu_hours(trials: Sequence[Trial], num_gpus: int) -> float:
    """Return what running these trials takes on so many GPUs: one that was given up counts as far as it went."""
    return float(sum(trial.summary["duration"] for trial in trials) * num_gpus / 3600)
