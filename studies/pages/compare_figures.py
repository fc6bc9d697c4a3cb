"""The figures of runs side by side: each function draws a part of their records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from engine.results.metric_table import Metric, drawn_metrics
from studies.pages.capacity_record import Search, responses
from studies.pages.compare_record import Side, bubbles, not_dominated
from studies.pages.figures import GREY, Panel, add_line, faded, new_figure, series_style, time_unit, value_axis
from studies.pages.latency_figures import NO_GAPS, Curve, latency_cdf


def run_panels(sides: Sequence[Side], searches: Mapping[str, Search]) -> list[tuple[str, list[Panel]]]:
    """The sections about runs: a heading and its panels. Each of `searches` is of the side of its name."""
    return [
        ("Latency", [_latency(sides, metric) for metric in drawn_metrics()]),
        ("First token against the next", [frontier(sides, searches)]),
        ("Over time, and by stage", [output_over_time(sides), stage_bubbles(sides)]),
    ]


def _latency(sides: Sequence[Side], metric: Metric) -> Panel:
    curves = [
        Curve(side.name, curve.quantiles, curve.values_s, *series_style(i))
        for i, side in enumerate(sides)
        if (curve := side.record.latencies.get(metric.key))
    ]
    slos = [judged for side in sides for judged in side.record.slos]
    return latency_cdf(metric, curves, slos, height_px=_height(270, sides))


def frontier(sides: Sequence[Side], searches: Mapping[str, Search]) -> Panel:
    """Median TTFT against P99 TBT: a dot for each run, lines through the trials of searches, and the runs' front."""
    title = "Median TTFT against P99 TBT"
    every = [(i, side, responses(side, searches.get(side.name))) for i, side in enumerate(sides)]
    every = [each for each in every if each[2]]
    if not every:
        return Panel(title, NO_GAPS)
    figure = new_figure()
    for i, side, points in every:
        colour, dash = series_style(i)
        sizes = [11 if point.is_run else 6 for point in points]
        figure.add_scatter(
            x=[point.tbt_s for point in points], y=[point.ttft_s for point in points], name=side.name,
            ids=[point.words for point in points], mode="lines+markers" if len(points) > 1 else "markers",
            line={"color": faded(colour, 0.6), "width": 1.5, "dash": dash},
            marker={"color": colour, "opacity": 1, "size": sizes, "line": {"color": "white", "width": 1}},
            hovertemplate="%{id}<br>median TTFT %{y:.3~r} s<br>P99 TBT %{x:.3~r} s<extra></extra>",
        )  # fmt: skip
    caption = "Lower left is better."
    runs = np.array([(point.tbt_s, point.ttft_s) for _, _, points in every for point in points if point.is_run])
    front = runs[not_dominated(runs)]
    if len(front) > 1:
        front = front[np.argsort(front[:, 0])]
        add_line(figure, front[:, 0], front[:, 1], "front", GREY, "", width=1.5, dash="dot", line_shape="hv")
        caption += " Dotted: the runs that none of the others beats in both."
    if searches:
        caption += " Large: the run at the capacity; small: the other trials that ran to their end."
    values = np.array([(point.tbt_s, point.ttft_s) for _, _, points in every for point in points])
    figure.update_xaxes(title_text="P99 TBT (s)", **value_axis(values[:, 0]))
    figure.update_yaxes(title_text="Median TTFT (s)", **value_axis(values[:, 1]))
    figure.update_layout(hovermode="closest")
    return Panel(title, caption, figure, height_px=_height(380, sides))


def output_over_time(sides: Sequence[Side]) -> Panel:
    """Output tokens that were there by each time, of each run."""
    longest = max(float(side.output_s[-1]) for side in sides)
    unit_s, unit = time_unit(longest)
    figure = new_figure()
    for i, side in enumerate(sides):
        colour, dash = series_style(i)
        x, y = side.output_s / unit_s, side.output_tokens
        add_line(figure, x, y, side.name, colour, "%{y:,.4~r} tokens", dash=dash)
    figure.update_yaxes(title_text="Output tokens", rangemode="tozero")
    figure.update_xaxes(title_text=f"Time since the first arrival ({unit})", rangemode="tozero")
    caption = "First tokens and decoded ones, added up. A flat piece is a time in which no request went on."
    return Panel("Output tokens over time", caption, figure, "half", _height(330, sides))


def stage_bubbles(sides: Sequence[Side]) -> Panel:
    """The share of the time with requests that each pipeline stage idled, of each run."""
    figure = new_figure()
    highest = 0.0
    for i, side in enumerate(sides):
        colour, _ = series_style(i)
        shares = 100 * bubbles(side.record)
        highest = max(highest, float(shares.max()))
        figure.add_bar(
            x=[f"stage {j}" for j in range(len(shares))], y=shares, name=side.name,
            marker={"color": colour, "line": {"width": 0}},
            hovertemplate=f"{side.name}: %{{y:.3~r}} %<extra></extra>",
        )  # fmt: skip
    figure.update_layout(barmode="group", bargap=0.3, hovermode="closest")
    figure.update_yaxes(title_text="Bubbles (%)", range=[0, max(1.0, 1.08 * highest)])
    caption = (
        "A bubble is time that a stage idles while requests are at its replica: a share of the time that there are "
        "any, mean over the replicas."
    )
    return Panel("Pipeline bubbles", caption, figure, "half", _height(330, sides))


def _height(height_px: int, sides: Sequence[Side]) -> int:
    """Room for the lines of a legend."""
    return height_px + 18 * (sum(len(side.name) + 8 for side in sides) // 40)
