"""The figures of a study: each draws the records of one host overhead as the paper drew them.

The published numbers that a claim, or `marks`, states for a point's value stand beside it as diamonds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from studies.pages.figures import BAD, BLUE, GOOD, GREY, ORANGE, Panel, add_line, new_figure, value_axis
from studies.published.experiment import Experiment
from studies.published.judge import Records

PURPLE, BROWN = "#8e6bbf", "#94663a"
COLOURS = {"sarathi": ORANGE, "vllm": BLUE, "orca": GREY, "both": ORANGE, "hybrid-only": BLUE, "chunked-only": GREY}
COLOURS |= {"linear": BLUE, "attention": GREY, "communication": GOOD, "other": PURPLE, "host": ORANGE}
PALETTE = (BLUE, GREY, GOOD, PURPLE, ORANGE, BAD, BROWN)

PARTS = ("linear", "attention", "communication", "other", "host")
_TAILS = (("p99_tbt", "P99 TBT"), ("p50_ttft", "Median TTFT"))

Series = Mapping[str, tuple[Sequence[Any], Sequence[float]]]  # x and y by name
Published = Mapping[str, float]  # by POINT:METRIC


def panels(experiment: Experiment, records: Records) -> list[Panel]:
    """Return the panels of a study for one host overhead."""
    published = dict(experiment.marks)
    for claim in experiment.claims:
        if claim.compare == "value" and claim.published is not None:
            published.setdefault(claim.of[0], claim.published)  # of two the figure's, whose claims come first
    return _DRAWINGS[experiment.drawing](records, published)


def lines(series: Series, x_title: str, y_title: str, published: Series) -> go.Figure:
    """Draw a line with markers for each name, with its published values as diamonds; every x is a tick if few."""
    figure = new_figure(x=x_title, y=y_title)
    for i, (name, (xs, ys)) in enumerate(series.items()):
        colour = _colour(name, i)
        add_line(figure, xs, ys, name, colour, "%{y:.3~r}", width=2.2, mode="lines+markers", marker={"size": 6})
    _diamonds(figure, series, published)
    values = [y for each in (series, published) for _, ys in each.values() for y in ys]
    figure.update_yaxes(**value_axis(np.array(values)))
    every = {x for xs, _ in series.values() for x in xs}
    if any(isinstance(x, str) for x in every):
        figure.update_xaxes(type="category")
    elif 1 < len(every) <= 8:
        figure.update_xaxes(tickvals=sorted(every))
    return figure


def bars(series: Series, y_title: str, published: Series, stacked: bool = False) -> go.Figure:
    """Draw bars side by side (or on top of each other) for each name, with the published values as diamonds."""
    figure = new_figure(barmode="stack" if stacked else "group", scattermode="group", bargap=0.25)
    for i, (name, (xs, ys)) in enumerate(series.items()):
        figure.add_bar(
            x=list(xs), y=list(ys), name=name, marker={"color": _colour(name, i)}, hovertemplate="%{y:.3~r}",
            offsetgroup=None if stacked else name,
        )  # fmt: skip
    _diamonds(figure, series, published, beside=True)
    figure.update_yaxes(title_text=y_title, rangemode="tozero")
    figure.update_xaxes(type="category")
    return figure


def _diamonds(figure: go.Figure, series: Series, published: Series, beside: bool = False) -> None:
    """Draw published values in the colours of their series; `beside` each other, as bars are."""
    for i, (name, (xs, ys)) in enumerate(published.items()):
        figure.add_scatter(
            x=list(xs), y=list(ys), mode="markers", name="published", legendgroup="published", showlegend=not i,
            hovertemplate="%{y:.3~r} published", marker=_diamond(_colour(name, list(series).index(name))),
            offsetgroup=name if beside else None,
        )  # fmt: skip


def _colour(name: str, i: int) -> str:
    return COLOURS.get(name, PALETTE[i % len(PALETTE)])


def _diamond(colour: str) -> dict[str, Any]:
    return {"symbol": "diamond", "size": 10, "color": colour, "line": {"color": "white", "width": 1.5}}


def _places(records: Records, *parts: int) -> list[tuple[tuple[str, ...], Records]]:
    """Group the points by some parts of their names."""
    found: dict[tuple[str, ...], dict[str, Mapping[str, Any]]] = {}
    for point, record in records.items():
        names = point.split("/")
        found.setdefault(tuple(names[i] for i in parts), {})[point] = record
    return list(found.items())


def _sides(
    records: Records, published: Published, metric: str, place: Callable[..., tuple[str, Any]]
) -> tuple[Series, Series]:
    """Return our values and the published ones of a metric; `place` gives series and x of a point's parts."""
    ours: dict[str, tuple[list[Any], list[float]]] = {}
    theirs: dict[str, tuple[list[Any], list[float]]] = {}
    for point, record in records.items():
        name, x = place(*point.split("/"))
        for found, value in ((ours, record["values"][metric]), (theirs, published.get(f"{point}:{metric}"))):
            if value is not None:
                xs, ys = found.setdefault(name, ([], []))
                xs.append(x)
                ys.append(value)
    return ours, theirs


def _panel(title: str, figure: go.Figure, theirs: Series, words: str = "The median of the draws.") -> Panel:
    marks = "Diamonds: published." if theirs else "The paper gives no numbers to mark."
    return Panel(title, f"{words} {marks}", figure, "half", 300)


def _capacity(records: Records, published: Published) -> list[Panel]:
    """Draw the capacity of each model's schedulers, for each workload and objective."""
    found = {point: record for point, record in records.items() if "qps" in record["values"]}
    words = "Highest request rate within the objectives: the median of the draws; the first where nothing was claimed."
    result = []
    for place, here in _places(found, 1, 2):
        ours, theirs = _sides(here, published, "qps", lambda setup, workload, slo, scheduler: (scheduler, setup))
        result.append(_panel(", ".join(place), bars(ours, "Capacity (requests/s)", theirs), theirs, words))
    return result


def _completions(records: Records, published: Published) -> list[Panel]:
    """Draw the decodes completed over time."""
    figure = new_figure(x="Time since the first arrival (s)", y="Decodes completed", yaxis_rangemode="tozero")
    gaps = []
    for i, (point, record) in enumerate(records.items()):
        scheduler, line = point.split("/")[-1], record["timeline"]
        add_line(figure, line["seconds"], line["decodes"], scheduler, _colour(scheduler, i), "%{y:,.0f}")
        gaps.append(f"{scheduler} {record['values']['max_tbt']:.3g} s")
    longest = f"Of the first draw. The longest gap between a request's tokens (median of the draws): {'; '.join(gaps)}."
    ends = []
    for i, point in enumerate(records):
        if (end := published.get(f"{point}:duration")) is not None:
            scheduler = point.split("/")[-1]
            ends.append(f"{scheduler} {end:g} s")
            figure.add_vline(x=end, line={"color": _colour(scheduler, i), "width": 1, "dash": "dash"})
    longest += f" Dashed: the published ends, {'; '.join(ends)}." * bool(ends)
    return [Panel("Decodes completed over time", f"A flat step is a stall. {longest}", figure, "half", 340)]


def _over_rate(records: Records, published: Published) -> list[Panel]:
    """Draw P99 TBT and median TTFT over the request rate, for each setup and workload."""
    result = []
    for place, here in _places(records, 0, 1):
        for metric, name in _TAILS:
            ours, theirs = _sides(here, published, metric, lambda setup, load, rate, policy: (policy, float(rate)))
            figure = lines(ours, "Request rate (requests/s)", f"{name} (s)", theirs)
            result.append(_panel(f"{', '.join(place)}: {name} over the load", figure, theirs))
    return result


def _over_chunk(records: Records, published: Published) -> list[Panel]:
    """Draw P99 TBT and median TTFT over the chunk size, a line for each model and rate."""
    result = []
    for metric, name in _TAILS:
        ours, _ = _sides(records, {}, metric, lambda setup, workload, rate, chunk: (f"{setup}, {rate}/s", chunk))
        result.append(_panel(f"{name} by token budget", lines(ours, "Token budget (tokens)", f"{name} (s)", {}), {}))
    return result


def _over_batch(records: Records, published: Published) -> list[Panel]:
    """Draw the median TBT over the most requests in a batch, and the capacities."""
    runs = {point: record for point, record in records.items() if "p50_tbt" in record["values"]}
    capacities = _capacity(records, published)
    if not runs:
        return capacities
    ours, theirs = _sides(runs, published, "p50_tbt", lambda setup, *others: (setup, int(others[-1])))
    figure = lines(ours, "Largest batch (requests)", "Median TBT (s)", theirs).update_xaxes(type="log")
    return [_panel("Median TBT by the largest batch", figure, theirs), *capacities]


def _chunking(records: Records, published: Published) -> list[Panel]:
    """Draw the time of prompts in chunks and whole."""

    def place(setup: str, prompt: str, chunk: str) -> tuple[str, str]:
        return "whole" if chunk == "whole" else f"chunks of {chunk}", _size(prompt)

    result = []
    for (setup,), here in _places(records, 0):
        ours, theirs = _sides(here, published, "seconds", place)
        figure = bars(ours, "Time (s)", theirs).update_xaxes(title_text="Prompt (tokens)")
        result.append(_panel(f"{setup}: a prompt in chunks, and whole", figure, theirs))
    return result


def _size(size: str) -> str:
    return f"{int(size):,}" if size.isdigit() else size


def _operators(records: Records, published: Published) -> list[Panel]:
    """Draw the time of prompts and of decode batches by kind of operator."""
    names = {"prefill": ("Prompt (tokens)", "a whole prompt"), "decode": ("Decodes", "a batch of decodes")}
    words = "By kind of operator; the host's share is what is not hidden."
    result = []
    for (setup, phase), here in _places(records, 0, 1):
        sizes = [_size(point.split("/")[2]) for point in here]
        series = {part: (sizes, [1e3 * record["values"][part] for record in here.values()]) for part in PARTS}
        figure = bars({name: each for name, each in series.items() if any(each[1])}, "Time (ms)", {}, stacked=True)
        _, theirs = _sides(here, published, "total", lambda setup, phase, size: ("host", _size(size)))
        for xs, ys in theirs.values():
            figure.add_scatter(x=list(xs), y=[1e3 * y for y in ys], mode="markers", name="published",
                               hovertemplate="%{y:.3~r} published", marker=_diamond(GREY))  # fmt: skip
        axis, what = names.get(phase, ("Prompt tokens + decodes", "decodes beside a chunk"))
        figure.update_xaxes(title_text=axis)
        result.append(_panel(f"{setup}: {what}", figure, theirs, words))
    return result


def _piggyback(records: Records, published: Published) -> list[Panel]:
    """Draw the time of decode batches alone, with a chunk and with a whole prompt."""
    words = {"with_prompt": "with a whole prompt", "with_chunk": "with a chunk", "alone": "decodes alone"}
    result = []
    for (setup,), here in _places(records, 0):
        sizes = [point.split("/")[1] for point in here]
        series = {words[name]: (sizes, [1e3 * each["values"][name] for each in here.values()]) for name in words}
        figure = lines(series, "Decodes in the batch", "Iteration (ms)", {})
        result.append(_panel(f"{setup}: an iteration of decodes", figure, {}, "What its company costs."))
    return result


def _ablation(records: Records, published: Published) -> list[Panel]:
    """Draw P99 TBT and median TTFT of each scheduler, for each workload."""
    result = []
    for metric, name in _TAILS:
        ours, theirs = _sides(records, published, metric, lambda setup, workload, rate, policy: (policy, workload))
        result.append(_panel(f"{name} of each scheduler", bars(ours, f"{name} (s)", theirs), theirs))
    return result


_DRAWINGS: dict[str, Callable[[Records, Published], list[Panel]]] = {
    "capacity": _capacity,
    "completions": _completions,
    "over_rate": _over_rate,
    "over_chunk": _over_chunk,
    "over_batch": _over_batch,
    "chunking": _chunking,
    "operators": _operators,
    "piggyback": _piggyback,
    "table": _ablation,
}
