"""The figures of a study: each draws the records of one host overhead as the paper drew them.

The published numbers that a claim states for a point's value stand beside it as diamonds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from studies.pages.figures import BAD, BLUE, GOOD, GREY, ORANGE, Panel, new_figure, value_axis
from studies.published.experiment import Experiment
from studies.published.judge import Records

PURPLE, BROWN = "#8e6bbf", "#94663a"
COLOURS = {"sarathi": ORANGE, "vllm": BLUE, "orca": GREY, "both": ORANGE, "hybrid-only": BLUE, "chunked-only": GREY}
COLOURS |= {"linear": BLUE, "attention": GREY, "communication": GOOD, "other": PURPLE, "host": ORANGE}
PALETTE = (BLUE, GREY, GOOD, PURPLE, ORANGE, BAD, BROWN)

Series = Mapping[str, tuple[Sequence[Any], Sequence[float]]]  # x and y by name


def panels(experiment: Experiment, records: Records) -> list[Panel]:
    """The panels of a study for one host overhead."""
    published = {claim.of[0]: claim.published for claim in experiment.claims if claim.compare == "value"}
    draw: dict[str, Callable[[Records, Mapping[str, float | None]], list[Panel]]] = {
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
    return draw[experiment.drawing](records, published)


# -- figures -------------------------------------------------------------------------------------------------------


def lines(series: Series, x_title: str, y_title: str, categories: bool = False, log: bool = False) -> go.Figure:
    """A line with markers for each name."""
    figure = new_figure()
    for i, (name, (xs, ys)) in enumerate(series.items()):
        figure.add_scatter(
            x=[str(x) for x in xs] if categories else xs, y=ys, name=name, mode="lines+markers",
            line={"color": _colour(name, i), "width": 2.2}, marker={"size": 6}, hovertemplate="%{y:.3~r}",
        )  # fmt: skip
    values = np.array([y for _, ys in series.values() for y in ys])
    figure.update_yaxes(title_text=y_title, **value_axis(values[values > 0] if log else values, log))
    figure.update_xaxes(title_text=x_title, **({"type": "category"} if categories else {}))
    return figure


def bars(series: Series, y_title: str, published: Series | None = None, stacked: bool = False) -> go.Figure:
    """Bars side by side (or on top of each other) for each name, with the published values as diamonds."""
    figure = new_figure()
    for i, (name, (xs, ys)) in enumerate(series.items()):
        figure.add_bar(
            x=list(xs), y=list(ys), name=name, marker={"color": _colour(name, i)}, hovertemplate="%{y:.3~r}",
            offsetgroup=None if stacked else name,
        )  # fmt: skip
    for i, (name, (xs, ys)) in enumerate((published or {}).items()):
        figure.add_scatter(
            x=list(xs), y=list(ys), mode="markers", name="published", legendgroup="published", showlegend=not i,
            offsetgroup=name, hovertemplate="%{y:.3~r} published", marker={
                "symbol": "diamond", "size": 10, "color": _colour(name, i), "line": {"color": "white", "width": 1.5}
            },
        )  # fmt: skip
    figure.update_layout(barmode="stack" if stacked else "group", scattermode="group", bargap=0.25)
    figure.update_yaxes(title_text=y_title, rangemode="tozero")
    figure.update_xaxes(type="category")
    return figure


def _colour(name: str, i: int) -> str:
    return COLOURS.get(name, PALETTE[i % len(PALETTE)])


# -- what each study draws -----------------------------------------------------------------------------------------


def _split(records: Records) -> list[tuple[list[str], Mapping[str, Any]]]:
    return [(point.split("/"), record) for point, record in records.items()]


def _unique(values: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _capacity(records: Records, published: Mapping[str, float | None]) -> list[Panel]:
    """Capacity of each model's schedulers, for each workload and objective."""
    found = [parts for parts, record in _split(records) if "qps" in record["values"]]
    result = []
    for workload, slo in dict.fromkeys((parts[1], parts[2]) for parts in found):
        here = [parts for parts in found if parts[1:3] == [workload, slo]]
        setups = _unique([parts[0] for parts in here])
        ours, theirs = {}, {}
        for scheduler in _unique([parts[3] for parts in here]):
            points = {parts[0]: records["/".join(parts)]["values"]["qps"] for parts in here if parts[3] == scheduler}
            known = {
                setup: value
                for setup in setups
                if (value := published.get(f"{setup}/{workload}/{slo}/{scheduler}:qps")) is not None
            }
            ours[scheduler] = (list(points), list(points.values()))
            if known:
                theirs[scheduler] = (list(known), list(known.values()))
        figure = bars(ours, "Capacity (requests/s)", theirs)
        caption = "Highest request rate within the objectives." + " Diamonds: published." * bool(theirs)
        result.append(Panel(f"{workload}, {slo}", caption, figure, "half", 300))
    return result


def _completions(records: Records, published: Mapping[str, float | None]) -> list[Panel]:
    figure = new_figure()
    for i, (parts, record) in enumerate(_split(records)):
        line = record["timeline"]
        figure.add_scatter(
            x=line["seconds"], y=line["decodes"], name=parts[-1], mode="lines",
            line={"color": _colour(parts[-1], i), "width": 2}, hovertemplate="%{y:,.0f}",
        )  # fmt: skip
    figure.update_xaxes(title_text="Time since the first arrival (s)")
    figure.update_yaxes(title_text="Decodes completed", rangemode="tozero")
    gaps = "; ".join(f"{parts[-1]} {record['values']['max_tbt']:.3g} s" for parts, record in _split(records))
    caption = f"A flat step is a stall. The longest gap between a request's tokens (median of the draws): {gaps}."
    return [Panel("Decodes completed over time", caption, figure, "half", 340)]


def _over_rate(records: Records, published: Mapping[str, float | None]) -> list[Panel]:
    """P99 TBT and median TTFT over the request rate, for each setup and workload."""
    result = []
    for setup, workload in dict.fromkeys((parts[0], parts[1]) for parts, _ in _split(records)):
        here = [(parts, record) for parts, record in _split(records) if parts[:2] == [setup, workload]]
        for metric, name in (("p99_tbt", "P99 TBT"), ("p50_ttft", "Median TTFT")):
            series = {
                scheduler: (
                    [float(parts[2]) for parts, _ in here if parts[3] == scheduler],
                    [record["values"][metric] for parts, record in here if parts[3] == scheduler],
                )
                for scheduler in _unique([parts[3] for parts, _ in here])
            }
            figure = lines(series, "Request rate (requests/s)", f"{name} (s)", log=True)
            result.append(
                Panel(f"{setup}, {workload}: {name} over the load", "Each point is a run.", figure, "half", 300)
            )
    return result


def _over_chunk(records: Records, published: Mapping[str, float | None]) -> list[Panel]:
    """P99 TBT and median TTFT over the chunk size, a line for each model and rate."""
    result = []
    for metric, name in (("p99_tbt", "P99 TBT"), ("p50_ttft", "Median TTFT")):
        series: dict[str, tuple[list[str], list[float]]] = {}
        for parts, record in _split(records):
            xs, ys = series.setdefault(f"{parts[0]}, {parts[2]}/s", ([], []))
            xs.append(parts[3])
            ys.append(record["values"][metric])
        figure = lines(series, "Token budget (tokens)", f"{name} (s)", categories=True, log=True)
        result.append(Panel(f"{name} by token budget", "Each point is a run.", figure, "half", 300))
    return result


def _parallelism(records: Records, published: Mapping[str, float | None]) -> list[Panel]:
    """TBT of decodes alone over the batch, and the capacities."""
    series: dict[str, tuple[list[str], list[float]]] = {}
    for parts, record in _split(records):
        if "tbt" in record["values"]:
            xs, ys = series.setdefault(parts[0], ([], []))
            xs.append(parts[1])
            ys.append(record["values"]["tbt"])
    figure = lines(series, "Decodes in the batch", "TBT (s)", categories=True)
    for i, setup in enumerate(series):
        known = {
            name.split("/")[1].split(":")[0]: value
            for name, value in published.items()
            if name.startswith(f"{setup}/") and name.endswith(":tbt")
        }
        if known:
            figure.add_scatter(
                x=list(known), y=list(known.values()), mode="markers", name=f"{setup}, published",
                marker={"symbol": "diamond", "size": 10, "color": PALETTE[i], "line": {"color": "white", "width": 1.5}},
            )  # fmt: skip
            figure.update_yaxes(range=None, rangemode="tozero")
    about = "A batch of decodes alone, once through all stages. Diamonds: published, read off."
    searched = {point: record for point, record in records.items() if "qps" in record["values"]}
    return [Panel("TBT of decodes alone", about, figure, "half", 300), *_capacity(searched, published)]


def _chunking(records: Records, published: Mapping[str, float | None]) -> list[Panel]:
    result = []
    for setup in _unique([parts[0] for parts, _ in _split(records)]):
        series: dict[str, tuple[list[str], list[float]]] = {}
        for parts, record in _split(records):
            if parts[0] == setup and parts[2] != "whole":
                xs, ys = series.setdefault(f"chunks of {parts[2]}", ([], []))
                xs.append(f"{int(parts[1]):,}")
                ys.append(record["values"]["overhead"])
        figure = bars(series, "Time, relative to whole")
        figure.add_hline(y=1, line={"color": GREY, "width": 1, "dash": "dash"})
        figure.update_xaxes(title_text="Prompt (tokens)")
        result.append(Panel(f"{setup}: chunks against a whole prompt", "1 is the whole prompt.", figure, "half", 300))
    return result


PARTS = ("linear", "attention", "communication", "other", "host")


def _operators(records: Records, published: Mapping[str, float | None]) -> list[Panel]:
    """The time of prompts and of decode batches by kind of operator."""
    result = []
    for setup, phase in dict.fromkeys((parts[0], parts[1]) for parts, _ in _split(records)):
        here = [(parts[2], record) for parts, record in _split(records) if parts[:2] == [setup, phase]]
        sizes = [f"{int(size):,}" for size, _ in here]
        series = {part: (sizes, [1e3 * record["values"][part] for _, record in here]) for part in PARTS}
        figure = bars({name: points for name, points in series.items() if any(points[1])}, "Time (ms)", stacked=True)
        figure.update_xaxes(title_text="Prompt (tokens)" if phase == "prefill" else "Decodes")
        title = f"{setup}: {'a whole prompt' if phase == 'prefill' else 'a batch of decodes'}"
        result.append(Panel(title, "By kind of operator; the host's share is what is not hidden.", figure, "half", 300))
    return result


def _piggyback(records: Records, published: Mapping[str, float | None]) -> list[Panel]:
    result = []
    words = {"with_prompt": "with a whole prompt", "with_chunk": "with a chunk", "alone": "decodes alone"}
    for setup in _unique([parts[0] for parts, _ in _split(records)]):
        here = [(parts[1], record) for parts, record in _split(records) if parts[0] == setup]
        series = {
            words[name]: ([size for size, _ in here], [1e3 * record["values"][name] for _, record in here])
            for name in words
        }
        figure = lines(series, "Decodes in the batch", "Iteration (ms)", categories=True, log=True)
        result.append(Panel(f"{setup}: an iteration of decodes", "What its company costs.", figure, "half", 300))
    return result


def _ablation(records: Records, published: Mapping[str, float | None]) -> list[Panel]:
    """P99 TBT and median TTFT of each scheduler, for each workload."""
    result = []
    for metric, name in (("p99_tbt", "P99 TBT"), ("p50_ttft", "Median TTFT")):
        series: dict[str, tuple[list[str], list[float]]] = {}
        theirs: dict[str, tuple[list[str], list[float]]] = {}
        for point, record in records.items():
            _, workload, _, scheduler = point.split("/")
            for into, value in ((series, record["values"][metric]), (theirs, published.get(f"{point}:{metric}"))):
                if value is not None:
                    xs, ys = into.setdefault(scheduler, ([], []))
                    xs.append(workload)
                    ys.append(value)
        figure = bars(series, f"{name} (s)", theirs)
        result.append(Panel(f"{name} of each scheduler", "Diamonds: published.", figure, "half", 300))
    return result
