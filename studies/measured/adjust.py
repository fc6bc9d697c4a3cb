"""Fits what a server's host and front end cost, and how fast its operators are, to measured results.

A constant is a field of `engine.specs.HostOverhead`, or a kind of operator, whose factor it is. The fit is by least
squares of log(predicted / measured), large errors counted less (Huber), by steps of Gauss and Newton over simulations;
constants are never below zero.

Each constant is expected to be what it was, a factor give or take what the kind's predicted times may be off
(`simulator.predictor.uncertainty`), so that it moves only as far as the measured results speak of it. What is far from
that counts linearly too, so that a server that is unlike is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from types import MappingProxyType
from typing import Any

import numpy as np

from engine.errors import InputError, unknown
from engine.results.tables import Array
from engine.workload.workload import WorkloadSpec
from simulator.predictor.uncertainty import HOST, Z
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
_FACTOR = 0.1  # the unit of a factor of operators
_LEAST = 1.0  # of a factor, in its unit
_WEIGHTS = {"tpot": 1.0, "ttft": 0.25, "e2e": 1.0}
_LOCKED_IN = 0.1  # weight of a closed loop's TTFT, which hangs on how requests lock into step, too: 5 to 16 %
_WAY = ("receive_s", "receive_token_s", "transit_s")  # of which alone such a TTFT is asked
_NOISE = 0.02  # of a log error of weight one: repeats of a run on one server
_HUBER = 0.1  # of a log error; larger ones count linearly
_UNSURE = 1.0  # of a unit: standard deviation of a constant of the host that is small or not known
_STEP = 0.5  # of a unit, for slopes: what a lock-in changes is small beside it
_MOST_STEPS = 20
_DAMPINGS = (0.01, 0.3, 3.0)  # of steps, which are tried beside each other
_SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)  # of a change
_ENOUGH = 3e-3  # a step that lessens the loss by less, as a share, is the last
ALIKE = 0.95  # correlation from which on two constants are said not to be told apart
_FLAT = 0.3  # share of a direction from which on a constant is named as part of it
_FELT = 1e-6  # change of a log error by a unit of a constant, from which on it matters

Constants = Mapping[str, float]
Predictions = list[Mapping[str, Any]]  # of every point
Evaluate = Callable[[Sequence[Constants]], list[Predictions]]  # for each


@dataclass(frozen=True)
class Adjusted:
    """Fitted constants (s; factors of operators without a unit), and how far each may be off (90 %).

    `alike` are pairs that these points can't tell apart, `flat` the constants of directions in which they hardly say
    more than was known before, `share` how much of the change was taken (`_trusted`). `before` and `after` are the
    predictions with the first and the last constants.
    """

    constants: dict[str, float]
    margins: dict[str, float]
    alike: list[tuple[str, str]]
    flat: list[list[str]]
    share: float
    before: Predictions
    after: Predictions


def unit(name: str) -> float:
    """Return what a constant is of the order of: seconds, or a share of an operator's time."""
    return UNITS.get(name, _FACTOR)


def adjust(
    points: Sequence[Point], start: Constants, evaluate: Evaluate, known: Mapping[str, float] = MappingProxyType({})
) -> Adjusted:
    """Fit the constants in `start`, from the values there, to `points`.

    `evaluate` gives for each set of constants the predictions of `points` (`studies.measured.predict.predict`). `known`
    names the kinds of operators whose factors may be fitted, with the standard deviation of the factor's logarithm.
    Raises InputError for an unknown constant, and for fewer measured figures than constants of the host.
    """
    names = list(start)
    for name in names:
        if name not in UNITS and name not in known:
            raise unknown("constant", name, (*UNITS, *known))
    rows = [(i, name) for i, point in enumerate(points) for name in figures_of(point)]
    figures = len(rows)
    hosts = sum(name in UNITS for name in names)
    if figures <= hosts or not figures:
        raise InputError(
            f"{figures} measured figures of {len(points)} points can't fit {hosts} constants: give more points, "
            "or fewer constants by --fit"
        )
    x = first = np.array([start[name] / unit(name) for name in names])
    # how sure each was before, the noise over its standard deviation, in its unit
    off = [known[name] * x[i] if name in known else max(HOST * x[i], _UNSURE) for i, name in enumerate(names)]
    sure = _NOISE / np.array(off)
    locked = [k for k, (i, name) in enumerate(rows) if name == "ttft" and is_closed(points[i])]
    weights = np.array([_WEIGHTS[name] for _, name in rows])
    weights[locked] = _LOCKED_IN

    def at(places: Sequence[Array]) -> list[tuple[Predictions, Array]]:
        """Return the predictions at each place, and weighted log errors of every figure and of what was known."""
        made = evaluate([_named(names, place) for place in places])
        found = []
        for predicted, place in zip(made, places, strict=True):
            errors = [np.log(predicted[i][name] / points[i].measured[name]) for i, name in rows]
            found.append((predicted, np.concatenate([weights * errors, sure * (np.maximum(place, 0.0) - first)])))
        return found

    ((before, first_residuals),) = at([x])
    after, residuals = before, first_residuals
    slopes = np.zeros((len(residuals), len(names)))
    for _ in range(_MOST_STEPS):
        slopes = (np.array([each for _, each in at([*(x + _STEP * np.eye(len(names)))])]) - residuals).T / _STEP
        slopes[np.ix_(locked, [name not in _WAY for name in names])] = 0.0
        trials = [x + _step(slopes, residuals, x, damping) for damping in _DAMPINGS]
        found = at(trials)
        best = int(np.argmin([_loss(each) for _, each in found]))
        gain = 1 - _loss(found[best][1]) / max(_loss(residuals), 1e-12)
        if gain > 0:
            x, (after, residuals) = trials[best], found[best]
        if gain < _ENOUGH:
            break
    loads = np.array([points[i].load_number for i, _ in rows])
    share = _trusted(loads, first_residuals, residuals, slopes, x)
    if share < 1:
        x = first + share * (x - first)
        ((after, residuals),) = at([x])
    of_data = slice(0, figures)
    margins, alike = _confidence(names, slopes, residuals, figures, slopes[of_data])
    flat = _flat(names, slopes[of_data], sure, [name in known for name in names])
    return Adjusted(dict(_named(names, x)), margins, alike, flat, share, before, after)


def _named(names: Sequence[str], x: Array) -> dict[str, float]:
    low = [0.0 if name in UNITS else _LEAST for name in names]
    return {name: float(f"{value * unit(name):.4g}") for name, value in zip(names, np.maximum(x, low), strict=True)}


def figures_of(point: Point) -> list[str]:
    """What of a point is fitted to: E2E where there is no TPOT."""
    return [name for name in _WEIGHTS if name in point.measured and (name != "e2e" or "tpot" not in point.measured)]


def is_closed(point: Point) -> bool:
    """Whether the next request waits for an answer."""
    spec = point.workload
    return bool(spec.max_concurrency if isinstance(spec, WorkloadSpec) else spec.client.max_concurrency)


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


def _trusted(loads: Array, first: Array, residuals: Array, slopes: Array, x: Array) -> float:
    """How much of the change to take: as much as predicts the highest load best when fitted to the others alone.

    That fit and its predictions are by the slopes at the fit to all, without simulations. 1.0 where there is one load.
    """
    if len(np.unique(loads)) < 2:
        return 1.0
    held = np.zeros(len(residuals), dtype=bool)
    held[: len(loads)] = loads == loads.max()
    kept = x + _step(slopes[~held], residuals[~held], x, _DAMPINGS[0])
    fitted = residuals[held] + slopes[held] @ (kept - x)
    losses = [_loss((1 - share) * first[held] + share * fitted) for share in _SHARES]
    return _SHARES[int(np.argmin(losses))]


def _confidence(
    names: Sequence[str], slopes: Array, residuals: Array, figures: int, of_data: Array
) -> tuple[dict[str, float], list[tuple[str, str]]]:
    """How far each constant may be off (90 %), and which pairs the points alone can't tell apart."""
    freedom = max(1, figures - sum(name in UNITS for name in names))
    noise = max(float((residuals[:figures] ** 2).sum()) / freedom, (_NOISE / 2) ** 2)
    whole = slopes.copy()
    whole[figures:] *= np.sqrt(noise) / _NOISE  # what was known before does not depend on how well the points are met
    spread = np.sqrt(np.maximum(np.diag(np.linalg.pinv(whole.T @ whole)) * noise, 1e-30))
    alone = np.linalg.pinv(of_data.T @ of_data)
    deviation = np.sqrt(np.maximum(np.diag(alone), 1e-30))
    correlation = alone / np.outer(deviation, deviation)
    felt = np.abs(of_data).max(axis=0) > _FELT  # what these points do not depend on they say nothing about
    alike = [
        (names[i], names[j])
        for i in range(len(names))
        for j in range(i)
        if felt[i] and felt[j] and abs(correlation[i, j]) > ALIKE
    ]
    return {name: float(Z * spread[i] * unit(name)) if felt[i] else inf for i, name in enumerate(names)}, alike


def _flat(names: Sequence[str], of_data: Array, sure: Array, is_factor: Sequence[bool]) -> list[list[str]]:
    """The constants of each direction among factors in which the points say less than was known before."""
    factors = np.flatnonzero(is_factor)
    if not len(factors):
        return []
    scaled = of_data[:, factors] / sure[factors]  # by how far each may be off, and by the noise
    strengths, directions = np.linalg.eigh(scaled.T @ scaled)
    return [
        [names[factors[i]] for i in np.argsort(-np.abs(direction)) if abs(direction[i]) > _FLAT]
        for strength, direction in zip(strengths, directions.T, strict=True)
        if strength < 1.0
    ]
