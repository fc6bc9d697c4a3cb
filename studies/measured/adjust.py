"""Fits what a server's host and front end cost to measured results, operators left as they are.

Each constant is a field of `engine.specs.HostOverhead`. The fit is by least squares of log(predicted / measured), large
errors counted less (Huber), by steps of Gauss and Newton over simulations; constants are never below zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np

from engine.errors import InputError, unknown
from engine.results.tables import Array
from studies.measured.point import Point

UNITS = {  # seconds in which each constant is of the order of one
    "iteration_s": 1e-3,
    "sequence_s": 1e-5,
    "exposed_s": 1e-3,
    "layer_s": 1e-5,
    "message_s": 1e-3,
    "receive_s": 1e-3,
    "receive_token_s": 1e-6,
    "transit_s": 1e-2,
    "sampler_s": 1e-9,
    "sampler_logit_s": 1e-11,
}
_WEIGHTS = {"tpot": 1.0, "ttft": 0.5, "e2e": 1.0}  # a TTFT hangs on how a closed loop locks in, too
_HUBER = 0.1  # of a log error; larger ones count linearly
_STEP = 0.2  # of a unit, for slopes
_MOST_STEPS = 8
_DAMPINGS = (0.01, 0.1, 1.0)  # of steps, which are tried beside each other
_ENOUGH = 1e-3  # a step that lessens the loss by less, as a share, is the last
ALIKE = 0.95  # correlation from which on two constants are said not to be told apart
_Z90 = 1.645
_FELT = 1e-6  # change of a log error by a unit of a constant, from which on it matters

Constants = Mapping[str, float]
Evaluate = Callable[[Sequence[Constants]], list[list[Mapping[str, Any]]]]  # predictions of every point, for each


@dataclass(frozen=True)
class Adjusted:
    """Fitted constants (s), how far each may be off (90 %), and pairs that these points can't tell apart."""

    constants: dict[str, float]
    margins: dict[str, float]
    alike: list[tuple[str, str]]
    steps: int


def adjust(points: Sequence[Point], start: Constants, evaluate: Evaluate) -> Adjusted:
    """Fit the constants in `start`, from the values there, to `points`.

    `evaluate` gives for each set of constants the predictions of `points` (`studies.measured.predict.predict`). Raises
    InputError for an unknown constant, and for fewer measured figures than constants.
    """
    names = list(start)
    for name in names:
        if name not in UNITS:
            raise unknown("constant", name, UNITS)
    figures = sum(len(figures_of(point)) for point in points)
    if figures <= len(names):
        raise InputError(
            f"{figures} measured figures of {len(points)} points can't fit {len(names)} constants: give more points, "
            "or fewer constants by --fit"
        )
    x = np.array([start[name] / UNITS[name] for name in names])
    residuals = _residuals(points, evaluate([_named(names, x)])[0])
    slopes = np.zeros((len(residuals), len(names)))
    steps = 0
    for steps in range(1, _MOST_STEPS + 1):  # noqa: B007 - how many there were
        trials = [x + _STEP * np.eye(len(names))[i] for i in range(len(names))]
        found = [_residuals(points, each) for each in evaluate([_named(names, trial) for trial in trials])]
        slopes = (np.array(found) - residuals).T / _STEP
        trials = [x + _step(slopes, residuals, x, damping) for damping in _DAMPINGS]
        found = [_residuals(points, each) for each in evaluate([_named(names, trial) for trial in trials])]
        best = int(np.argmin([_loss(each) for each in found]))
        gain = 1 - _loss(found[best]) / _loss(residuals)
        if gain > 0:
            x, residuals = trials[best], found[best]
        if gain < _ENOUGH:
            break
    margins, alike = _confidence(names, slopes, residuals)
    return Adjusted(dict(_named(names, x)), margins, alike, steps)


def _named(names: Sequence[str], x: Array) -> dict[str, float]:
    return {name: float(f"{value * UNITS[name]:.4g}") for name, value in zip(names, np.maximum(x, 0.0), strict=True)}


def figures_of(point: Point) -> list[str]:
    """What of a point is fitted to: E2E where there is no TPOT."""
    return [name for name in _WEIGHTS if name in point.measured and (name != "e2e" or "tpot" not in point.measured)]


def _residuals(points: Sequence[Point], predictions: Sequence[Mapping[str, Any]]) -> Array:
    """Weighted log errors of every figure of every point."""
    return np.array([
        _WEIGHTS[name] * np.log(predicted[name] / point.measured[name])
        for point, predicted in zip(points, predictions, strict=True)
        for name in figures_of(point)
    ])  # fmt: skip


def _loss(residuals: Array) -> float:
    large = np.abs(residuals) > _HUBER
    return float(np.where(large, _HUBER * (2 * np.abs(residuals) - _HUBER), residuals**2).sum())


def _step(slopes: Array, residuals: Array, x: Array, damping: float) -> Array:
    """The step that lessens the loss most as far as slopes tell, no constant below zero; damped, a shorter one."""
    from scipy.optimize import lsq_linear

    weights = np.sqrt(_HUBER / np.maximum(np.abs(residuals), _HUBER))
    left = np.vstack([weights[:, None] * slopes, damping * np.sqrt(len(residuals)) * _HUBER * np.eye(len(x))])
    right = np.concatenate([-weights * residuals, np.zeros(len(x))])
    found: Array = lsq_linear(left, right, bounds=(np.minimum(-x, -1e-12), np.inf)).x
    return found


def _confidence(
    names: Sequence[str], slopes: Array, residuals: Array
) -> tuple[dict[str, float], list[tuple[str, str]]]:
    """How far each constant may be off (s, 90 %), and which pairs the points can't tell apart."""
    freedom = max(1, len(residuals) - len(names))
    covariance = np.linalg.pinv(slopes.T @ slopes) * float((residuals**2).sum()) / freedom
    spread = np.sqrt(np.maximum(np.diag(covariance), 1e-30))
    correlation = covariance / np.outer(spread, spread)
    alike = [(names[i], names[j]) for i in range(len(names)) for j in range(i) if abs(correlation[i, j]) > ALIKE]
    felt = np.abs(slopes).max(axis=0) > _FELT  # what these points do not depend on they say nothing about
    return {name: float(_Z90 * spread[i] * UNITS[name]) if felt[i] else inf for i, name in enumerate(names)}, alike
