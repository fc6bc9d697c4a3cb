"""The ranges of results under drawn errors of the predicted times, as every page shows them."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from studies.pages.page import details, numbers_table
from studies.words import number

_WORDS = {"max_qps_under_slo": "capacity", "qps_per_gpu": "capacity per GPU"}


def ranges(summary: Mapping[str, Any]) -> str:
    """Return a table of the ranges of results under drawn errors; "" for a run without any."""
    drawn = summary.get("uncertainty")
    if not drawn:
        return ""
    rows = []
    for name, each in summary["intervals"].items():
        unit, scale = ("s", 1e-3) if name.endswith("_ms") else ("1/s", 1.0)
        words = f"{_WORDS.get(name, name.removesuffix('_ms').replace('_', ' '))} ({unit})"
        rows.append((words, [number(scale * each[end]) for end in ("low", "mid", "high")]))
    off = "; ".join(
        ", ".join(f"{name.replace('_', ' ')} {number(100 * share)} %" for name, share in errors.items())
        for errors in drawn["errors"]
    )
    return details(
        f"Ranges of {drawn['draws']:,} reruns with drawn errors of the predicted times: meant to hold "
        f"{number(100 * drawn['covers'])} % of such deployments",
        numbers_table(["", "low", "middle", "high"], rows) + f"<p>Errors drawn (90 % within): {escape(off)}.</p>",
    )
