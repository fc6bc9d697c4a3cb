"""docs/truth.md: how far predictions are from public measurements, from a record that holds predictions alone.

The record has for each point its id, its settings and what was predicted, and the errors of the set as they were when
the public files were at hand; never a measured value of a row.

    windtunnel calibrate truth --public DIR --output docs/truth.md
"""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from string import Template
from typing import Any

from engine.workload.workload import WorkloadSpec
from studies.measured.judge import OF_REQUESTS
from studies.measured.point import LATENCIES, Point
from studies.words import markdown_table, mean_error, percent

SETS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "truth_sets.json").read_text(encoding="utf-8"))
PAGE = Path(__file__).with_suffix(".md")  # what the page says, with places for what the record has


def described(point: Point, predicted: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the record says of a point: settings, load and prediction."""
    found: dict[str, Any] = {"id": point.id, "settings": dict(point.settings)}
    if point.statistic != "mean":
        found["statistic"] = point.statistic
    if isinstance(point.workload, WorkloadSpec):
        default = WorkloadSpec(request_rate=1.0)
        spec = asdict(point.workload).items()
        found["workload"] = {key: value for key, value in spec if value != getattr(default, key)}
    found["predicted"] = {name: float(f"{value:.5g}") for name, value in predicted.items()}
    return found


def render(record: Mapping[str, Any]) -> str:
    """Return the page of a record."""
    sections = [part for each in record["sets"] for part in (f"## {each['name']}", *_section(each))]
    return Template(PAGE.read_text(encoding="utf-8")).substitute(
        table=_table(record["sets"]), sections="\n\n".join(sections), missed=_filled(record["missed"])
    )


def _filled(text: str) -> str:
    paragraphs = text.strip().split("\n\n")
    return "\n\n".join(textwrap.fill(" ".join(part.split()), 120, break_on_hyphens=False) for part in paragraphs)


def _table(sets: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for each in sets:
        for row in each["rows"]:
            name = f"({row['name']})" if row.get("fitted") else row["name"]
            cells = [
                _cell(row["errors"].get(key), target) for key, target in zip(LATENCIES, row["targets"], strict=True)
            ]
            rows.append([name, str(row["points"]), *cells, " / ".join(map(percent, row["targets"]))])
        rows += [[f"*{who}*", "", *map(percent, errors), ""] for who, *errors in each["peers"]]
    return markdown_table(["set", "points", "TPOT", "TTFT", "E2E", "targets"], rows)


def _cell(error: Mapping[str, float] | None, target: float | None) -> str:
    missed = error is not None and target is not None and error["mape"] > target
    return f"**{mean_error(error)}**" if missed else mean_error(error)


def _section(each: Mapping[str, Any]) -> list[str]:
    flags = [f"--{key.replace('_', '-')} {shlex.quote(str(value))}" for key, value in each["given"].items()]
    only = [f"--only '{each['only']}'"] if each["only"] else []
    command = " ".join(["windtunnel validate --against", each["file"], *only, *flags])
    parts = [f"```bash\n{command}\n```", f"Fitted to: {each['fitted'] or 'nothing of this set'}."]
    if each["assumed"]:
        parts.append("Assumed: " + "; ".join(each["assumed"]) + ".")
    if each.get("requests"):
        rows = []
        for name, text in OF_REQUESTS.items():
            sign = name != "per_request"  # a mean of absolute errors has none
            rows.append([text, *(percent(each["requests"][name][key], sign=sign) for key in ("ttft", "e2e"))])
        parts.append(markdown_table(["", "TTFT", "E2E"], rows))
    if len(each["groups"]) > 1:
        rows = [
            [of["group"], str(of["count"]), *(mean_error(of.get(key)) for key in LATENCIES)] for of in each["groups"]
        ]
        parts.append(markdown_table(["group", "points", "TPOT", "TTFT", "E2E"], rows))
    return parts
