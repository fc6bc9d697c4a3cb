"""The page of measured results beside their predictions. One offline HTML file.

windtunnel validate --against silicon.csv --output-dir check
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from studies.measured.judge import groups_of
from studies.measured.point import MEASURES
from studies.pages.figures import BAD, SERIES, Panel, Points, predicted_by_measured
from studies.pages.page import Page, cards, details, facts_table, footer, header, numbers_table
from studies.words import effect_words, mean_error, percent

_NAMES = {"tpot": "TPOT", "ttft": "TTFT", "e2e": "E2E", "throughput": "Throughput"}
_MOST_GROUPS = len(SERIES)


def write_measured(results: Mapping[str, Any], path: Path) -> Path:
    """Write the page to `path` and return it; `results` is what `windtunnel.measured.validate_measured` gives."""
    records = results["records"]
    page = Page(f"Predictions of {results['file']}")
    page.add(
        header(
            "Windtunnel · validation",
            f"Predictions of {results['file']}",
            f"{results['predicted']:,} of {results['points']:,} measured points, each simulated under its own load"
            + (f" (source: {' and '.join(results['sources'])})." if results["sources"] else "."),
            [],
            [("unsure", "Assumed", f"{text}.") for text in results["assumed"]]
            + [("unsure", "Times", f"{text}.") for text in results["predictors"]],
        ),
        cards(
            (f"Mean error of {_NAMES[measure]}", percent(error["mape"]), f"bias {percent(error['bias'], sign=True)}")
            for measure in MEASURES
            if (error := results[measure]) is not None
        ),
    )
    page.add_panels(
        "Predicted and measured", [_scatter(records, measure) for measure in MEASURES if _has(records, measure)]
    )
    page.add_panels("By group", [Panel("Errors by group", _GROUPS, table=_groups(results))])
    if results["effects"]:
        rows = ((f"had it been {each['instead']}", effect_words(each)) for each in results["effects"])
        page.add(details("What other assumptions would change", facts_table(rows)))
    page.add(details(f"All {len(records):,} points", _points(records)))
    if results["refused"]:
        page.add(
            details(
                f"{len(results['refused']):,} rows that could not be run",
                facts_table((row["id"], row["why"]) for row in results["refused"]),
            )
        )
    page.add(footer(f" {results['version']}"))
    return page.write(path)


_GROUPS = (
    "Mean of |predicted - measured| / measured over the points, with the mean of the same with its sign. KV-limited: "
    "requests are predicted to wait for KV blocks while seats are free; such points are in no other group."
)


def _has(records: Sequence[Mapping[str, Any]], measure: str) -> bool:
    return measure != "throughput" and any(measure in record["error"] for record in records)


def _scatter(records: Sequence[Mapping[str, Any]], measure: str) -> Panel:
    """Draw predicted over measured, a colour a group; KV-limited points in one of their own."""
    drawn = [record for record in records if measure in record["error"]]
    names = list(dict.fromkeys("KV-limited" if record["kv_limited"] else record["group"] for record in drawn))
    shown = [name for name in names if name != "KV-limited"][:_MOST_GROUPS]
    groups = []
    for name in [*shown, "others", "KV-limited"]:
        mine = [
            record
            for record in drawn
            if name
            == ("KV-limited" if record["kv_limited"] else record["group"] if record["group"] in shown else "others")
        ]
        if mine:
            colour = BAD if name == "KV-limited" else SERIES[shown.index(name)] if name in shown else "#8a94a0"
            ours, theirs = (
                np.array([1e3 * each[side][measure] for each in mine]) for side in ("predicted", "measured")
            )
            groups.append(Points(name, colour, theirs, ours))
    out = sum(record["in_range"] < 1 for record in drawn)
    caption = "Dashed: predicted as measured." + (
        f" {out:,} of {len(drawn):,} points have batches outside the calibrated range." if out else ""
    )
    return Panel(_NAMES[measure], caption, predicted_by_measured(groups, logarithmic=True), "half", 430)


def _groups(results: Mapping[str, Any]) -> str:
    rows = [
        (group["group"], [f"{group['count']:,}", *(mean_error(group[measure]) for measure in MEASURES)])
        for group in groups_of(results)
    ]
    return numbers_table(["", "points", *_NAMES.values()], rows)


def _points(records: Sequence[Mapping[str, Any]]) -> str:
    heads = ["", "load", "TPOT, ms", "error", "TTFT, ms", "error", "E2E, s", "error", "with prompts", "in range"]
    rows = []
    for record in records:
        cells = [record["load"] + (", KV-limited" if record["kv_limited"] else "")]
        for measure, scale in (("tpot", 1e3), ("ttft", 1e3), ("e2e", 1.0)):
            ours, theirs = (record[side].get(measure) for side in ("predicted", "measured"))
            cells.append(
                "-" if ours is None else f"{scale * ours:.4g}" + ("" if theirs is None else f" / {scale * theirs:.4g}")
            )
            cells.append(percent(record["error"][measure], sign=True) if measure in record["error"] else "-")
        cells += [percent(record["where"]["prompts"]), percent(record["in_range"])]
        rows.append((record["id"], cells))
    return numbers_table(heads, rows)
