"""What a report shows of a run, as arrays: read from the run's folder, small however long the run was.

record = read_record(Path("runs/first"))
print(record.timeline.kv_percent.max(axis=1))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from engine.documents import read_json, read_yaml
from engine.errors import InputError
from engine.results.metric_table import REQUEST_COLUMNS
from engine.results.metrics import distributions
from engine.results.slo import SLO
from engine.results.tables import Array, Columns, to_numpy
from engine.specs.checks import short
from studies.pages.run_requests import Excerpt, Requests, read_excerpt, read_requests
from studies.pages.run_timeline import Timeline, read_timeline

NOT_SET = "not set"
_ROUNDING = 1e-6  # s


@dataclass(frozen=True, eq=False)
class Record:
    """All that a report shows."""

    config: dict[str, Any]
    summary: dict[str, Any]
    files: dict[str, int]  # bytes of each file in the folder
    latencies: dict[str, tuple[Array, Array]]  # quantiles and their values (s) of each drawn metric that has one
    arrival_rate: float | None  # requests/s as they came; None when all came at once
    timeline: Timeline
    requests: Requests
    excerpt: Excerpt | None  # of its batches; None where nobody saw one

    @property
    def slos(self) -> list[tuple[SLO, float | None, bool]]:
        """Each SLO, the value that the run had, and whether that meets it."""
        return [(SLO.parse(entry["slo"]), entry["value_s"], entry["met"]) for entry in self.summary["slos"]]


def read_record(folder: Path) -> Record:
    """Read a finished run's folder. Raises FileNotFoundError where one of its files is missing."""
    hint = "is all of it there?"
    summary, config = read_json(folder / "summary.json", hint), read_yaml(folder / "config.yaml", hint)
    table = pq.ParquetFile(folder / "requests.parquet")
    more = [name for name in ("request_id", "prefix_hit_tokens") if name in table.schema_arrow.names]
    requests = to_numpy(table.read([*REQUEST_COLUMNS, *more]))
    _check(folder, summary, config, requests)
    first, last = float(requests["arrived_s"].min()), float(requests["arrived_s"].max())
    end = float(requests["last_token_s"].max())
    return Record(
        config=config,
        summary=summary,
        files={path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()},
        latencies=distributions(requests, summary),
        arrival_rate=(len(requests["arrived_s"]) - 1) / (last - first) if last > first else None,
        timeline=read_timeline(folder / "iterations.parquet", summary, first, end, requests["first_token_s"]),
        requests=read_requests(requests),
        excerpt=read_excerpt(folder / "iterations.parquet", first),
    )


def _check(folder: Path, summary: Any, config: Any, requests: Columns) -> None:
    """Raise InputError unless the files are of one finished run, with times that can be."""
    if not isinstance(config, dict):
        raise InputError(f"{folder / 'config.yaml'} holds no settings: is it the run's own?")
    if not isinstance(summary, dict) or not isinstance(summary.get("replicas"), list) or not summary["replicas"]:
        raise InputError(f"{folder / 'summary.json'} holds no run's results: is it the run's own?")
    path, count = folder / "requests.parquet", len(requests["arrived_s"])
    if not count:
        raise InputError(f"{path} holds no request: there is nothing to report")
    if summary.get("completed") != count:
        raise InputError(
            f"{path} holds {count:,} requests, summary.json says {short(summary.get('completed'))}: they are not of "
            "one run"
        )
    times = [requests[name] for name in ("arrived_s", "first_token_s", "last_token_s")]
    wrong = ~np.isfinite(times).all(axis=0) | (times[0] < -_ROUNDING)
    wrong |= (times[1] < times[0] - _ROUNDING) | (times[2] < times[1] - _ROUNDING)
    wrong |= (requests["prompt_tokens"] < 1) | (requests["output_tokens"] < 1)
    if wrong.any():
        row = int(wrong.argmax())
        told = ", ".join(f"{each[row]:g}" for each in times)
        raise InputError(
            f"{path} row {row}: arrival, first and last token at {told} s, {requests['output_tokens'][row]} tokens: "
            "no run has that"
        )


def flat(value: Any, name: str = "", number: Callable[[float], str] = str) -> Iterator[tuple[str, str]]:
    """Yield names and values of nested settings: an inner name comes after its outer one and a dot."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}" if name else str(key), number)
    elif isinstance(value, list) and any(isinstance(each, Mapping) for each in value):
        for i, inner in enumerate(value):
            yield from flat(inner, f"{name}.{i}", number)
    elif value in (None, "", []):
        yield name, NOT_SET
    elif isinstance(value, list):
        yield name, ", ".join(map(str, value))
    else:
        yield name, number(value) if isinstance(value, float) else str(value)
