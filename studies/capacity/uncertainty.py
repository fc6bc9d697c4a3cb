"""The ranges of results of runs under drawn errors of the predicted times, and what was drawn.

found = described(intervals(summaries), draws=19, errors=[errors_in_words(deployment)])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import expm1
from typing import Any

from engine.results.metrics import summary_key
from simulator.cluster import Deployment
from simulator.predictor.uncertainty import HOST_SECONDS, Z, covered, deviations, interval

LEADING = (
    *(summary_key(part, metric) for metric in ("ttft", "tpot", "tbt", "e2e") for part in ("mean", "p50", "p99")),
    "request_throughput",
    "output_throughput",
    "request_goodput",
)  # fmt: skip


def intervals(summaries: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return low, mid and high of each leading result that every summary has."""
    values = {name: [summary.get(name) for summary in summaries] for name in LEADING}
    return {name: interval([*map(float, each)]) for name, each in values.items() if None not in each}  # type: ignore[arg-type]


def described(found: Mapping[str, Any], draws: int, errors: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return what a summary holds of ranges: them, what they are meant to cover, and the errors that were drawn."""
    return {"intervals": found, "uncertainty": {"draws": draws, "covers": covered(draws), "errors": list(errors)}}


def errors_in_words(deployment: Deployment) -> dict[str, float]:
    """Return how far each thing that is drawn may be off, as a share (90 %), the largest first; the host's as one."""
    found = deviations(deployment.replica, deployment.predictor.errors)
    hosts = [found.pop(name) for name in HOST_SECONDS if name in found]
    shares = {**found, **({"host": max(hosts)} if hosts else {})}
    return {name: round(expm1(Z * shares[name]), 4) for name in sorted(shares, key=lambda name: -shares[name])}
