"""The figures of a study: each draws the records of one host overhead as the paper drew them.

The published numbers that a claim states for a point's value stand beside it as diamonds.
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
    published = {claim.of[0]: claim.published for claim in experiment.claims if claim.compare == "value"}
    return _DRAWINGS[experiment.drawing](
        records, {name: value for name, value in published.items() if value is not None}
    )


def lines(series: Series, x_title: str, y_title: str, log: bool = False) -> go.Figure:
    """Draw a line with markers for each name."""
    figure = new_figure()
    for i, (name, (xs, ys)) in enumerate(series.items()):
        colour = _colour(name, i)
        add_line(figure, xs, ys, name, colour, "%{y:.3~r}", width=2.2, mode="lines+markers", marker={"size": 6})
    values = np.array([y for _, ys in series.values() for y in ys])
    figure.update_yaxes(title_text=y_title, **value_axis(values[values > 0] if log else values, log))
    categories = any(isinstance(x, str) for xs, _ in series.values() for x in xs)
    figure.update_xaxes(title_text=x_title, **({"type": "category"} if categories else {}))
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
        caption = "Highest request rate within the objectives." + " Diamonds: published." * bool(theirs)
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
    longest = f"The longest gap between a request's tokens (median of the draws): {'; '.join(gaps)}."
    return [Panel("Decodes completed over time", f"A flat step is a stall. {longest}", figure, "half", 340)]


def _over_rate(records: Records, published: Published) -> list[Panel]:
    """Draw P99 TBT and median TTFT over the request rate, for each setup and workload."""
    result = []
    for place, rows in _places(records, 2):
        for metric, name in _TAILS:
            series = _series((scheduler, float(rate), values[metric]) for (rate, scheduler), values in rows)
            figure = lines(series, "Request rate (requests/s)", f"{name} (s)", log=True)
            title = f"{', '.join(place)}: {name} over the load"
            result.append(Panel(title, "Each point is a run.", figure, "half", 300))
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
        figure = lines(series, "Token budget (tokens)", f"{name} (s)", log=True)
        result.append(Panel(f"{name} by token budget", "Each point is a run.", figure, "half", 300))
    return result


def _parallelism(records: Records, published: Published) -> list[Panel]:
    """Draw the TBT of decodes alone over the batch, and the capacities."""
    tbt = {point: record["values"]["tbt"] for point, record in records.items() if "tbt" in record["values"]}
    series = _series((*point.split("/"), value) for point, value in tbt.items())
    figure = lines(series, "Decodes in the batch", "TBT (s)")
    theirs = _series(
        (*name.removesuffix(":tbt").split("/"), value)  # type: ignore[misc]
        for name, value in published.items()
        if name.endswith(":tbt") and name.split("/")[0] in series
    )
    for i, setup in enumerate(series):
        if setup in theirs:
            xs, ys = theirs[setup]
            figure.add_scatter(x=xs, y=ys, mode="markers", name=f"{setup}, published", marker=_diamond(PALETTE[i]))
            figure.update_yaxes(range=None, rangemode="tozero")
    about = "A batch of decodes alone, once through all stages. Diamonds: published, read off."
    return [Panel("TBT of decodes alone", about, figure, "half", 300), *_capacity(records, published)]


def _chunking(records: Records, published: Published) -> list[Panel]:
    """Draw the time of prompts in chunks over that of whole ones."""
    result = []
    for (setup,), rows in _places(records, 1):
        series = _series(
            (f"chunks of {chunk}", f"{int(prompt):,}", values["overhead"])
            for (prompt, chunk), values in rows
            if chunk != "whole"
        )
        figure = bars(series, "Time, relative to whole")
        figure.add_hline(y=1, line={"color": GREY, "width": 1, "dash": "dash"})
        figure.update_xaxes(title_text="Prompt (tokens)")
        result.append(Panel(f"{setup}: chunks against a whole prompt", "1 is the whole prompt.", figure, "half", 300))
    return result


def _operators(records: Records, published: Published) -> list[Panel]:
    """Draw the time of prompts and of decode batches by kind of operator."""
    result = []
    for (setup, phase), rows in _places(records, 2):
        series = _series((part, f"{int(size):,}", 1e3 * values[part]) for part in PARTS for (size,), values in rows)
        figure = bars({name: points for name, points in series.items() if any(points[1])}, "Time (ms)", stacked=True)
        figure.update_xaxes(title_text="Prompt (tokens)" if phase == "prefill" else "Decodes")
        title = f"{setup}: {'a whole prompt' if phase == 'prefill' else 'a batch of decodes'}"
        result.append(Panel(title, "By kind of operator; the host's share is what is not hidden.", figure, "half", 300))
    return result


def _piggyback(records: Records, published: Published) -> list[Panel]:
    """Draw the time of decode batches alone, with a chunk and with a whole prompt."""
    result = []
    words = {"with_prompt": "with a whole prompt", "with_chunk": "with a chunk", "alone": "decodes alone"}
    for (setup,), rows in _places(records, 1):
        series = _series((words[name], size, 1e3 * values[name]) for name in words for (size,), values in rows)
        figure = lines(series, "Decodes in the batch", "Iteration (ms)", log=True)
        result.append(Panel(f"{setup}: an iteration of decodes", "What its company costs.", figure, "half", 300))
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
        result.append(Panel(f"{name} of each scheduler", "Diamonds: published.", figure, "half", 300))
    return result


_DRAWINGS: dict[str, Callable[[Records, Published], list[Panel]]] = {
    "capacity": _capacity,
    "completions": _completions,
    "over_rate": _over_rate,
    "over_chunk": _over_chunk,
    "parallelism": _parallelism,
    "chunking": _chunking,
    "operators": _operators,
    "piggyback": _piggyback,
    "table": _ablation,
}
