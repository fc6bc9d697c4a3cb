"""The page of measured results beside their predictions. One offline HTML file.

windtunnel validate --against silicon.csv --output-dir check
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from studies.measured.judge import groups_of
from studies.measured.point import LATENCIES, MEASURES
from studies.pages.figures import BAD, GREY, SERIES, Panel, against_measured
from studies.pages.page import Page, details, facts_table, numbers_table
from studies.words import effect_words, mean_error, percent

_NAMES = {"tpot": "TPOT", "ttft": "TTFT", "e2e": "E2E", "throughput": "Throughput"}
_LIMITED = "KV-limited"


def write_measured(results: Mapping[str, Any], path: Path) -> Path:
    """Write the page to `path` and return it; `results` is what `windtunnel.measured.validate_measured` gives."""
    records = results["records"]
    page = Page(f"Predictions of {results['file']}", f" {results['version']}")
    of = f" (source: {' and '.join(results['sources'])})" if results["sources"] else ""
    page.header(
        "Windtunnel · validation",
        f"{results['predicted']:,} of {results['points']:,} measured points, each simulated under its own load{of}.",
        sources=[("unsure", "Assumed", f"{text}.") for text in results["assumed"]]
        + [("unsure", "Times", f"{text}.") for text in results["predictors"]],
    )
    page.cards(
        (f"Mean error of {_NAMES[measure]}", percent(error["mape"]), f"bias {percent(error['bias'], sign=True)}")
        for measure in MEASURES
        if (error := results[measure]) is not None
    )
    drawn = {measure: [each for each in records if measure in each["error"]] for measure in LATENCIES}
    page.add_panels("Predicted and measured", [_scatter(rows, measure) for measure, rows in drawn.items() if rows])
    groups = [
        (each["group"], [f"{each['count']:,}", *(mean_error(each[measure]) for measure in MEASURES)])
        for each in groups_of(results)
    ]
    table = numbers_table(["", "points", *_NAMES.values()], groups)
    page.add_panels("By group", [Panel("Errors by group", _GROUPS, table=table)])
    if results["effects"]:
        rows = ((f"had it been {each['instead']}", effect_words(each)) for each in results["effects"])
        page.add(details("What other assumptions would change", facts_table(rows)))
    page.add(details(f"All {len(records):,} points", _points(records)))
    if refused := [(row["id"], row["why"]) for row in results["refused"]]:
        page.add(details(f"{len(refused):,} rows that could not be run", facts_table(refused)))
    return page.write(path)


_GROUPS = (
    "Mean of |predicted - measured| / measured over the points, with the mean of the same with its sign. KV-limited: "
    "requests are predicted to wait for KV blocks while seats are free; such points are in no other group."
)


def _scatter(drawn: Sequence[Mapping[str, Any]], measure: str) -> Panel:
    """Draw predicted over measured, a colour a group; KV-limited points in one of their own."""
    names = [_LIMITED if record["kv_limited"] else record["group"] for record in drawn]
    shown = [name for name in dict.fromkeys(names) if name != _LIMITED][: len(SERIES)]
    colours = {**dict(zip(shown, SERIES, strict=False)), "others": GREY, _LIMITED: BAD}
    names = [name if name in colours else "others" for name in names]
    groups = []
    for name, colour in colours.items():
        if mine := [each for each, group in zip(drawn, names, strict=True) if group == name]:
            ours, theirs = ([1e3 * each[side][measure] for each in mine] for side in ("predicted", "measured"))
            groups.append((name, colour, np.array(theirs), np.array(ours)))
    out = sum(record["in_range"] < 1 for record in drawn)
    caption = "Dashed: predicted as measured."
    caption += f" {out:,} of {len(drawn):,} points have batches outside the calibrated range." * bool(out)
    return Panel(_NAMES[measure], caption, against_measured(groups, logarithmic=True), "half", 430)


def _points(records: Sequence[Mapping[str, Any]]) -> str:
    heads = ["", "load", "TPOT, ms", "error", "TTFT, ms", "error", "E2E, s", "error", "with prompts", "in range"]
    rows = []
    for record in records:
        cells = [record["load"] + (", KV-limited" if record["kv_limited"] else "")]
        for measure, scale in (("tpot", 1e3), ("ttft", 1e3), ("e2e", 1.0)):
            both = [record[side].get(measure) for side in ("predicted", "measured")]
            known = [f"{scale * each:.4g}" for each in both if each is not None]
            cells.append("-" if both[0] is None else " / ".join(known))
            cells.append(percent(record["error"][measure], sign=True) if measure in record["error"] else "-")
        cells += [percent(record["where"]["prompts"]), percent(record["in_range"])]
        rows.append((record["id"], cells))
    return numbers_table(heads, rows)
