"""What was measured, point by point: a replica, a load, and how a real server fared under it.

A point is one run of a server: of a benchmark's results file, of a row of a table, or of a file with a line a request.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

from engine.errors import InputError
from engine.results.tables import Array
from engine.workload.workload import Workload, WorkloadSpec

LATENCIES = ("tpot", "ttft", "e2e")  # mean seconds
MEASURES = (*LATENCIES, "throughput")  # and output tokens/s of a run


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measured run.

    `settings` are of the replica, by their names in a config file. `measured` has some of MEASURES, and for runs with a
    line a request `per_request` has (n,) arrays of ttft and e2e in seconds, in the order of the workload's requests.
    """

    id: str
    settings: Mapping[str, Any]
    workload: Workload | WorkloadSpec
    measured: Mapping[str, float]
    warmup_requests: int = 0  # the first ones, which `measured` leaves out
    statistic: str = "mean"  # of the requests; median, or max: the last one's
    output_tokens: int | None = None  # where E2E is said to be TTFT + TPOT x (these - 1), measured and predicted
    load: str = ""  # in words, for groups
    per_request: Mapping[str, Array] = field(default_factory=dict)
    source: str | None = None  # the bundle that filled in what its file leaves open
    assumed: tuple[str, ...] = ()

    @property
    def load_number(self) -> float:
        """The load as a number, to compare it with others of a file: concurrency, rate, or requests given at once."""
        spec = self.workload
        if isinstance(spec, WorkloadSpec):
            rate = spec.request_rate if spec.request_rate != inf else None
            return float(spec.max_concurrency or rate or spec.num_prompts or 0)
        last = float(spec.arrived_at[-1]) if len(spec) else 0.0
        return float(spec.client.max_concurrency or (len(spec) / last if last else len(spec)))


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """What a file holds: its points, what had to be assumed about all, and rows that can't be run, with the reason."""

    name: str
    format: str
    points: list[Point]
    assumed: tuple[str, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()

    @property
    def sources(self) -> list[str]:
        """The sources of its points."""
        return list(dict.fromkeys(point.source for point in self.points if point.source))

    @property
    def every_assumption(self) -> list[str]:
        """What was assumed about its points, and about all."""
        return list(dict.fromkeys([text for point in self.points for text in point.assumed] + list(self.assumed)))

    def only(self, text: str) -> Measurements:
        """Return the points and rows whose id or load has a match of a regular expression."""
        try:
            matches = re.compile(text).search
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(f"--only {text!r} is no regular expression: {error}") from None
        points = [point for point in self.points if matches(point.id) or matches(point.load)]
        return replace(self, points=points, refused=tuple(row for row in self.refused if matches(row[0])))
