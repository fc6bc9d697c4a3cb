"""Figures of a run's batches, from its summary: how large they were, and what their time went into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from studies.pages.figures import BLUE, GREY, ORANGE, Panel, new_figure
from studies.words import number, seconds

NAMES = {
    "linear": "linear layers",
    "attention_and_waits": "attention, and waiting for the host",
    "communication": "communication",
    "other": "other operators",
    "host": "added by the host",
}


STATISTICS = {"mean": "mean", "median": "median", "p90": "P90", "p99": "P99", "max": "max"}


def batch_panels(summary: Mapping[str, Any]) -> list[Panel]:
    """Return what is known of a run's batches: histograms of their requests and tokens, the time between them, how long
    requests were executed and preempted, and the time by kind of operator.
    """
    found = []
    of_requests = {
        name: [summary.get(f"{statistic}_{key}_ms") for statistic in STATISTICS]
        for name, key in (("in a batch", "execution_time"), ("preempted or waiting", "preemption_time"))
    }
    batches = summary.get("batches")
    if batches is not None:
        between = batches["between_ms"]
        gap = f" Between two batches of a replica: {seconds(between['mean'] / 1e3)} on average." if between else ""
        for what, colour in (("requests", BLUE), ("tokens", ORANGE)):
            sizes = batches[what]
            figure = new_figure()
            names = list(sizes["upto"])
            figure.add_bar(x=[_range(names, i) for i in range(len(names))], y=list(sizes["upto"].values()),
                           marker={"color": colour}, name="batches", hovertemplate="%{y:,} batches")  # fmt: skip
            figure.update_xaxes(title_text=f"{what.capitalize()} in a batch", type="category")
            figure.update_yaxes(title_text="Batches", rangemode="tozero")
            about = f"Median {number(sizes['p50'])}, mean {number(sizes['mean'])}, P99 {number(sizes['p99'])}."
            found.append(Panel(f"{what.capitalize()} of the batches", about + gap * (what == "requests"), figure,
                               "half", 260))  # fmt: skip
        if between and between["max"] > 0:
            spans = {"from the end of one to the next": [between[_short(name)] for name in STATISTICS]}
            found.append(Panel("Time between batches", "On the first stage of a replica.", _spans(spans), "half", 260))
    if all(value is not None for values in of_requests.values() for value in values):
        about = "From a request's first scheduling to its last token: how long it was in a batch, and how long not."
        found.append(Panel("Requests' execution and preemption time", about, _spans(of_requests), "half", 260))
    times = [each for each in summary.get("operator_times_s", ()) if each]
    if times:
        total = {name: sum(each[name] for each in times) for name in NAMES}
        figure = new_figure()
        figure.add_bar(x=list(total.values()), y=[NAMES[name] for name in total], orientation="h",
                       marker={"color": GREY}, name="time", hovertemplate="%{x:,.3~r} s")  # fmt: skip
        figure.update_xaxes(title_text="Seconds, over all stages")
        about = "What depends on a batch's rows is the calibration's; attention is what is left."
        found.append(Panel("Time by kind of operator", about, figure, "half", 260))
    return found


def _short(statistic: str) -> str:
    return "p50" if statistic == "median" else statistic


def _spans(spans: Mapping[str, Sequence[Any]]) -> go.Figure:
    """Draw bars of each name's statistics (ms)."""
    figure = new_figure()
    for colour, (name, values) in zip((BLUE, ORANGE), spans.items(), strict=False):
        figure.add_bar(x=list(STATISTICS.values()), y=[value / 1e3 for value in values], name=name,
                       marker={"color": colour}, hovertemplate="%{y:,.3~r} s")  # fmt: skip
    figure.update_xaxes(type="category")
    figure.update_yaxes(title_text="Seconds", rangemode="tozero")
    return figure


def _range(names: list[str], i: int) -> str:
    """Return the sizes of a bar: those up to its own and above that of the bar before."""
    low = 1 if i == 0 else int(names[i - 1]) + 1
    return names[i] if low == int(names[i]) else f"{low:,}-{int(names[i]):,}"
