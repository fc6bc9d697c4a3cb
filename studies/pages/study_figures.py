"""The figures of a study: each draws the records of one host overhead as the paper drew them.

The published numbers that a claim, or `marks`, states for a point's value stand beside it as diamonds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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


def lines(series: Series, x_title: str, y_title: str, published: Series | None = None) -> go.Figure:
    """Draw a line with markers for each name, with its published values as diamonds; every x is a tick if few."""
    figure = new_figure()
    for i, (name, (xs, ys)) in enumerate(series.items()):
        colour = _colour(name, i)
        add_line(figure, xs, ys, name, colour, "%{y:.3~r}", width=2.2, mode="lines+markers", marker={"size": 6})
    values = np.array([y for _, ys in series.values() for y in ys])
    for i, (name, (xs, ys)) in enumerate((published or {}).items()):
        figure.add_scatter(
            x=list(xs), y=list(ys), mode="markers", name="published", legendgroup="published", showlegend=not i,
            hovertemplate="%{y:.3~r} published", marker=_diamond(_colour(name, list(series).index(name))),
        )  # fmt: skip
        values = np.concatenate([values, ys])
    figure.update_yaxes(title_text=y_title, **value_axis(values))
    categories = any(isinstance(x, str) for xs, _ in series.values() for x in xs)
    ticks = sorted({x for xs, _ in series.values() for x in xs}) if not categories else []
    every = {"tickvals": ticks} if 1 < len(ticks) <= 8 else {}
    figure.update_xaxes(title_text=x_title, **({"type": "category"} if categories else every))
    return figure


def bars(series: Series, y_title: str, published: Series | None = None, stacked: bool = False) -> go.Figure:
    """Draw bars side by side (or on top of each other) for each name, with the published values as diamonds."""
    figure = new_figure()
    for i, (name, (xs, ys)) in enumerate(series.items()):
        figure.add_bar(
            x=list(xs), y=list(ys), name=name, marker={"color": _colour(name, i)}, hovertemplate="%{y:.3~r}",
            offsetgroup=None if stacked else name,
        )  # fmt: skip
    for i, (name, (xs, ys)) in enumerate((published or {}).items()):
        figure.add_scatter(
            x=list(xs), y=list(ys), mode="markers", name="published", legendgroup="published", showlegend=not i,
            offsetgroup=name, hovertemplate="%{y:.3~r} published", marker=_diamond(_colour(name, i)),
        )  # fmt: skip
    figure.update_layout(barmode="stack" if stacked else "group", scattermode="group", bargap=0.25)
    figure.update_yaxes(title_text=y_title, rangemode="tozero")
    figure.update_xaxes(type="category")
    return figure


def _colour(name: str, i: int) -> str:
    return COLOURS.get(name, PALETTE[i % len(PALETTE)])


def _diamond(colour: str) -> dict[str, Any]:
    return {"symbol": "diamond", "size": 10, "color": colour, "line": {"color": "white", "width": 1.5}}


def _series(rows: Iterable[tuple[str, Any, float]]) -> Series:
    """Collect the x and y of each name."""
    found: dict[str, tuple[list[Any], list[float]]] = {}
    for name, x, y in rows:
        xs, ys = found.setdefault(name, ([], []))
        xs.append(x)
        ys.append(y)
    return found


def _places(records: Records, depth: int) -> list[tuple[tuple[str, ...], list[tuple[list[str], Mapping[str, float]]]]]:
    """Group the points by the first `depth` parts of their names: the other parts, and the values."""
    found: dict[tuple[str, ...], list[tuple[list[str], Mapping[str, float]]]] = {}
    for point, record in records.items():
        parts = point.split("/")
        found.setdefault(tuple(parts[:depth]), []).append((parts[depth:], record["values"]))
    return list(found.items())


def _capacity(records: Records, published: Published) -> list[Panel]:
    """Draw the capacity of each model's schedulers, for each workload and objective."""
    found = [
        (point.split("/"), record["values"]["qps"], published.get(f"{point}:qps"))
        for point, record in records.items()
        if "qps" in record["values"]
    ]
    result = []
    for place in dict.fromkeys((parts[1], parts[2]) for parts, _, _ in found):
        here = [(parts[3], parts[0], *qps) for parts, *qps in found if (parts[1], parts[2]) == place]
        ours = _series((scheduler, setup, qps) for scheduler, setup, qps, _ in here)
        theirs = _series((scheduler, setup, qps) for scheduler, setup, _, qps in here if qps is not None)
        figure = bars(ours, "Capacity (requests/s)", theirs)
        caption = (
            "Highest request rate within the objectives: the median of the draws; the first where nothing was claimed. "
            + _marks(theirs)
        )
        result.append(Panel(", ".join(place), caption, figure, "half", 300))
    return result


def _completions(records: Records, published: Published) -> list[Panel]:
    """Draw the decodes completed over time."""
    figure = new_figure()
    gaps = []
    for i, (point, record) in enumerate(records.items()):
        scheduler, line = point.split("/")[-1], record["timeline"]
        add_line(figure, line["seconds"], line["decodes"], scheduler, _colour(scheduler, i), "%{y:,.0f}")
        gaps.append(f"{scheduler} {record['values']['max_tbt']:.3g} s")
    figure.update_xaxes(title_text="Time since the first arrival (s)")
    figure.update_yaxes(title_text="Decodes completed", rangemode="tozero")
    ends = [f"{point.split('/')[-1]} {published[f'{point}:duration']:g} s" for point in records
            if f"{point}:duration" in published]  # fmt: skip
    longest = f"Of the first draw. The longest gap between a request's tokens (median of the draws): {'; '.join(gaps)}."
    longest += f" Dashed: the published ends, {'; '.join(ends)}." * bool(ends)
    for i, point in enumerate(records):
        if (end := published.get(f"{point}:duration")) is not None:
            figure.add_vline(x=end, line={"color": _colour(point.split("/")[-1], i), "width": 1, "dash": "dash"})
    return [Panel("Decodes completed over time", f"A flat step is a stall. {longest}", figure, "half", 340)]


def _of(metric: str, rows: Iterable[tuple[str, str, Any]], published: Published) -> Series | None:
    """Return the published values of rows (point, name, x) as series."""
    theirs = _series(
        (name, x, published[f"{point}:{metric}"]) for point, name, x in rows if f"{point}:{metric}" in published
    )
    return theirs or None


def _about(theirs: Series | None) -> str:
    return f"The median of the draws. {_marks(theirs)}"


def _marks(theirs: Series | None) -> str:
    return "Diamonds: published." if theirs else "The paper gives no numbers to mark."


def _over_rate(records: Records, published: Published) -> list[Panel]:
    """Draw P99 TBT and median TTFT over the request rate, for each setup and workload."""
    result = []
    for place, rows in _places(records, 2):
        for metric, name in _TAILS:
            series = _series((scheduler, float(rate), values[metric]) for (rate, scheduler), values in rows)
            points = [("/".join((*place, rate, scheduler)), scheduler, float(rate)) for (rate, scheduler), _ in rows]
            theirs = _of(metric, points, published)
            figure = lines(series, "Request rate (requests/s)", f"{name} (s)", published=theirs)
            title = f"{', '.join(place)}: {name} over the load"
            result.append(Panel(title, _about(theirs), figure, "half", 300))
    return result


def _over_chunk(records: Records, published: Published) -> list[Panel]:
    """Draw P99 TBT and median TTFT over the chunk size, a line for each model and rate."""
    result = []
    for metric, name in _TAILS:
        series = _series(
            (f"{setup}, {rate}/s", chunk, values[metric])
            for (setup, _, rate), rows in _places(records, 3)
            for (chunk,), values in rows
        )
        figure = lines(series, "Token budget (tokens)", f"{name} (s)")
        result.append(Panel(f"{name} by token budget", _about(None), figure, "half", 300))
    return result


def _over_batch(records: Records, published: Published) -> list[Panel]:
    """Draw the median TBT over the most requests in a batch, and the capacities."""
    runs = {point: record for point, record in records.items() if "p50_tbt" in record["values"]}
    rows = [(point, point.split("/")[0], int(point.split("/")[-1])) for point in runs]
    if not rows:
        return _capacity(records, published)
    series = _series((setup, batch, runs[point]["values"]["p50_tbt"]) for point, setup, batch in rows)
    theirs = _of("p50_tbt", rows, published)
    figure = lines(series, "Largest batch (requests)", "Median TBT (s)", published=theirs)
    figure.update_xaxes(type="log")
    return [
        Panel("Median TBT by the largest batch", _about(theirs), figure, "half", 300),
        *_capacity(records, published),
    ]


def _chunking(records: Records, published: Published) -> list[Panel]:
    """Draw the time of prompts in chunks and whole."""
    result = []
    for (setup,), rows in _places(records, 1):
        names = {chunk: "whole" if chunk == "whole" else f"chunks of {chunk}" for (_, chunk), _ in rows}
        series = _series((names[chunk], f"{int(prompt):,}", values["seconds"]) for (prompt, chunk), values in rows)
        points = [(f"{setup}/{prompt}/{chunk}", names[chunk], f"{int(prompt):,}") for (prompt, chunk), _ in rows]
        theirs = _of("seconds", points, published)
        figure = bars(series, "Time (s)", theirs)
        figure.update_xaxes(title_text="Prompt (tokens)")
        result.append(Panel(f"{setup}: a prompt in chunks, and whole", _about(theirs), figure, "half", 300))
    return result


def _size(size: str) -> str:
    return f"{int(size):,}" if size.isdigit() else size


def _operators(records: Records, published: Published) -> list[Panel]:
    """Draw the time of prompts and of decode batches by kind of operator."""
    result = []
    for (setup, phase), rows in _places(records, 2):
        series = _series((part, _size(size), 1e3 * values[part]) for part in PARTS for (size,), values in rows)
        figure = bars({name: points for name, points in series.items() if any(points[1])}, "Time (ms)", stacked=True)
        theirs = _of("total", [(f"{setup}/{phase}/{size}", "host", _size(size)) for (size,), _ in rows], published)
        for xs, ys in (theirs or {}).values():
            figure.add_scatter(x=list(xs), y=[1e3 * y for y in ys], mode="markers", name="published",
                               hovertemplate="%{y:.3~r} published", marker=_diamond(GREY))  # fmt: skip
        names = {"prefill": ("Prompt (tokens)", "a whole prompt"), "decode": ("Decodes", "a batch of decodes")}
        axis, what = names.get(phase, ("Prompt tokens + decodes", "decodes beside a chunk"))
        figure.update_xaxes(title_text=axis)
        about = f"By kind of operator; the host's share is what is not hidden. {_marks(theirs)}"
        result.append(Panel(f"{setup}: {what}", about, figure, "half", 300))
    return result


def _piggyback(records: Records, published: Published) -> list[Panel]:
    """Draw the time of decode batches alone, with a chunk and with a whole prompt."""
    result = []
    words = {"with_prompt": "with a whole prompt", "with_chunk": "with a chunk", "alone": "decodes alone"}
    for (setup,), rows in _places(records, 1):
        series = _series((words[name], size, 1e3 * values[name]) for name in words for (size,), values in rows)
        figure = lines(series, "Decodes in the batch", "Iteration (ms)")
        result.append(
            Panel(f"{setup}: an iteration of decodes", f"What its company costs. {_marks(None)}", figure, "half", 300)
        )
    return result


def _ablation(records: Records, published: Published) -> list[Panel]:
    """Draw P99 TBT and median TTFT of each scheduler, for each workload."""
    result = []
    for metric, name in _TAILS:
        ours, theirs = (
            _series(
                (point.split("/")[3], point.split("/")[1], value)
                for point, value in values.items()
                if value is not None
            )
            for values in (
                {point: record["values"][metric] for point, record in records.items()},
                {point: published.get(f"{point}:{metric}") for point in records},
            )
        )
        figure = bars(ours, f"{name} (s)", theirs)
        result.append(Panel(f"{name} of each scheduler", _about(theirs), figure, "half", 300))
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
