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
from typing import Any

from engine.workload.workload import WorkloadSpec
from studies.measured.judge import OF_REQUESTS
from studies.measured.point import Point
from studies.words import mean_error, percent

SETS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "truth_sets.json").read_text(encoding="utf-8"))
SHOWN = ("tpot", "ttft", "e2e")

_INTRO = """
Public measurements of real vLLM servers, each point simulated under the load that it was measured under. The files are
others' and not in this project: where they come from is said below, and each set can be rerun on a laptop from them.
Errors are means of |predicted - measured| / measured over points (a file with a line a request is one point: its
means after 200 requests of warm-up), with the bias in brackets. In what ships, nothing but constants of the host, the
front end, the sampler and the memory that vLLM keeps back (two, to the KV blocks that four of these servers report) is
fitted to measurements of whole servers, and each set says to which rows; operators are fitted to measurements of
operators alone ([accuracy](accuracy.md)).

No constant is fitted to a row that the first table counts. But choices were made with these rows in view, which a set
kept aside would judge more strictly: which public table of decode attention to believe, which kernel reduces among
eight ranks, how clients sent (ten requests a user), that large products go no faster than one public benchmark of such
has it, that products in 8 bits may take less time with more rows, and which A100s Argonne's benchmark ran on. They are
named below; vLLM 0.12's front end was fitted before all of these, the other constants after. Most points have batches
outside what the operators were measured over, above all for prompts after a prefix and where a device has no table of
elementwise operators.
"""
_SOURCES = """
aiconfigurator_silicon.csv: ai-dynamo/aiconfigurator, systems/silicon_sample.csv (Apache-2.0; the Llama rows are
InferenceMAX's). vllm_0.15.1_h100_*: inference-sim/training (refs/pull/1/head:replay_data) and
inference-sim/sim-to-real-accuracy-validation. llm_inference_bench_a100_vllm.csv: argonne-lcf/LLM-Inference-Bench
(BSD-3). The peers' figures are those of their own publications and of runs on the same kind of rows; of AISimulate and
BLIS no public script reruns them.
"""


def described(point: Point, predicted: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the record says of a point: settings, load and prediction."""
    found: dict[str, Any] = {"id": point.id, "settings": dict(point.settings)}
    if point.statistic != "mean":
        found["statistic"] = point.statistic
    if isinstance(point.workload, WorkloadSpec):
        default = WorkloadSpec(request_rate=1.0)
        spec = {key: value for key, value in asdict(point.workload).items() if value != getattr(default, key)}
        found["workload"] = spec
    found["predicted"] = {name: float(f"{value:.5g}") for name, value in predicted.items()}
    return found


def render(record: Mapping[str, Any]) -> str:
    """Return the page of a record."""
    parts = [
        "# Truth: predictions beside measured servers",
        "<!-- written by `windtunnel calibrate truth`: change studies/measured/truth.py instead -->",
        _filled(_INTRO),
        "## In one table",
        _table(record["sets"]),
        "Bold misses its target. A set in brackets has points that constants were fitted to; the figures are of the "
        "others, where there are others.",
    ]
    for each in record["sets"]:
        parts += [f"## {each['name']}", *_section(each)]
    parts += ["## What is missed, and why", _filled(record["missed"]), "## Sources", _filled(_SOURCES)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _filled(text: str) -> str:
    paragraphs = text.strip().split("\n\n")
    return "\n\n".join(textwrap.fill(" ".join(part.split()), 120, break_on_hyphens=False) for part in paragraphs)


def _table(sets: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| set | points | TPOT | TTFT | E2E | targets |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for each in sets:
        for row in each["rows"]:
            name = f"({row['name']})" if row.get("fitted") else row["name"]
            cells = [_cell(row["errors"].get(key), target) for key, target in zip(SHOWN, row["targets"], strict=True)]
            targets = " / ".join("-" if target is None else percent(target) for target in row["targets"])
            lines.append(f"| {name} | {row['points']} | {' | '.join(cells)} | {targets} |")
        for who, *errors in each["peers"]:
            cells = ["-" if error is None else percent(error) for error in errors]
            lines.append(f"| *{who}* | | {' | '.join(cells)} | |")
    return "\n".join(lines)


def _cell(error: Mapping[str, float] | None, target: float | None) -> str:
    words = mean_error(error)
    if error is None or target is None or error["mape"] <= target:
        return words
    return f"**{words}**"


def _section(each: Mapping[str, Any]) -> list[str]:
    flags = [f"--{key.replace('_', '-')} {shlex.quote(str(value))}" for key, value in each["given"].items()]
    only = [f"--only '{each['only']}'"] if each["only"] else []
    command = " ".join(["windtunnel validate --against", each["file"], *only, *flags])
    fitted = each["fitted"] or "nothing of this set"
    parts = [f"```bash\n{command}\n```", f"Fitted to: {fitted}."]
    if each["assumed"]:
        parts.append("Assumed: " + "; ".join(each["assumed"]) + ".")
    if each.get("requests"):
        lines = ["| | TTFT | E2E |", "| --- | ---: | ---: |"]
        for name, text in OF_REQUESTS.items():
            entry = each["requests"][name]
            sign = name != "per_request"  # a mean of absolute errors has none
            lines.append(f"| {text} | {percent(entry['ttft'], sign=sign)} | {percent(entry['e2e'], sign=sign)} |")
        parts.append("\n".join(lines))
    if len(each["groups"]) > 1:
        lines = ["| group | points | TPOT | TTFT | E2E |", "| --- | ---: | ---: | ---: | ---: |"]
        for group in each["groups"]:
            cells = [_cell(group.get(key), None) for key in SHOWN]
            lines.append(f"| {group['group']} | {group['count']} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return parts
