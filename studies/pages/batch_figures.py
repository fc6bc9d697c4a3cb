"""Figures of a run's batches, from its summary: how large they were, and what their time went into."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
STATISTICS = {"mean": "mean", "p50": "median", "p90": "P90", "p99": "P99", "max": "max"}


def batch_panels(summary: Mapping[str, Any]) -> list[Panel]:
    """Return what is known of a run's batches: histograms of their requests and tokens, the time between them, how long
    requests were executed and preempted, and the time by kind of operator.
    """
    found = []
    batches = summary.get("batches")
    if batches is not None:
        between = batches["between_ms"]
        gap = f" Between two batches of a replica: {seconds(between['mean'] / 1e3)} on average." if between else ""
        for what, colour in (("requests", BLUE), ("tokens", ORANGE)):
            sizes, things = batches[what], what.capitalize()
            names = [_range(list(sizes["upto"]), i) for i in range(len(sizes["upto"]))]
            figure = _bars({"batches": sizes["upto"].values()}, names, "%{y:,} batches", "Batches", colour)
            figure.update_xaxes(title_text=f"{things} in a batch")
            words = f"Median {number(sizes['p50'])}, mean {number(sizes['mean'])}, P99 {number(sizes['p99'])}."
            found.append(Panel(f"{things} of the batches", words + gap * (what == "requests"), figure, "half", 260))
        if between and between["max"] > 0:
            figure = _spans({"from the end of one to the next": [between[name] for name in STATISTICS]})
            found.append(Panel("Time between batches", "On the first stage of a replica.", figure, "half", 260))
    of_requests = {
        name: [summary.get(f"{'median' if statistic == 'p50' else statistic}_{key}_ms") for statistic in STATISTICS]
        for name, key in (("in a batch", "execution_time"), ("preempted or waiting", "preemption_time"))
    }
    if all(value is not None for values in of_requests.values() for value in values):
        words = "From a request's first scheduling to its last token: how long it was in a batch, and how long not."
        found.append(Panel("Requests' execution and preemption time", words, _spans(of_requests), "half", 260))
    if times := [each for each in summary.get("operator_times_s", ()) if each]:
        total = {name: sum(each[name] for each in times) for name in NAMES}
        figure = new_figure()
        figure.add_bar(x=list(total.values()), y=[NAMES[name] for name in total], orientation="h",
                       marker={"color": GREY}, name="time", hovertemplate="%{x:,.3~r} s")  # fmt: skip
        figure.update_xaxes(title_text="Seconds, over all stages")
        words = "What depends on a batch's rows is the calibration's; attention is what is left."
        found.append(Panel("Time by kind of operator", words, figure, "half", 260))
    return found


def _spans(spans: Mapping[str, Sequence[Any]]) -> go.Figure:
    """Draw bars of each name's statistics (ms)."""
    in_s = {name: [value / 1e3 for value in values] for name, values in spans.items()}
    return _bars(in_s, list(STATISTICS.values()), "%{y:,.3~r} s", "Seconds", BLUE, ORANGE)


def _bars(series: Mapping[str, Iterable[Any]], names: list[str], hover: str, title: str, *colours: str) -> go.Figure:
    """Draw bars side by side for each of the names."""
    figure = new_figure(xaxis_type="category")
    for colour, (name, values) in zip(colours, series.items(), strict=False):
        figure.add_bar(x=names, y=list(values), name=name, marker={"color": colour}, hovertemplate=hover)
    figure.update_yaxes(title_text=title, rangemode="tozero")
    return figure


def _range(names: list[str], i: int) -> str:
    """Return the sizes of a bar: those up to its own and above that of the bar before."""
    low = 1 if i == 0 else int(names[i - 1]) + 1
    return names[i] if low == int(names[i]) else f"{low:,}-{int(names[i]):,}"
