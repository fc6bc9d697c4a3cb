"""The figures of runs side by side: each function draws a part of their records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from engine.results.metric_table import Metric, drawn_metrics
from studies.pages.capacity_record import Search, responses
from studies.pages.compare_record import Side, bubbles, not_dominated
from studies.pages.figures import GREY, Panel, faded, new_figure, series_style, share_axis, value_axis


def run_panels(sides: Sequence[Side], searches: Mapping[str, Search]) -> list[tuple[str, list[Panel]]]:
    """The sections about runs: a heading and its panels. Each of `searches` is of the side of its name."""
    return [
        ("Latency", [latency_cdf(sides, metric) for metric in drawn_metrics()]),
        ("First token against the next", [frontier(sides, searches)]),
        ("Over time, and by stage", [output_over_time(sides), stage_bubbles(sides)]),
    ]


def latency_cdf(sides: Sequence[Side], metric: Metric) -> Panel:
    """The share of requests (or token gaps) within each latency, a line for each run."""
    name = metric.title or metric.name
    every_side = enumerate(sides)
    curves = [(i, side, curve) for i, side in every_side if (curve := side.record.latencies.get(metric.key))]
    if not curves:
        return Panel(
            name, "No request has more than one output token, so there is no gap between tokens.", width="third"
        )
    every = np.concatenate([curve.values_s for _, _, curve in curves])
    scale, unit = (1.0, "s") if every.max() >= 1 else (1e3, "ms")
    figure = new_figure()
    for i, side, curve in curves:
        colour, dash = series_style(i)
        figure.add_scatter(
            x=scale * curve.values_s, y=100 * curve.quantiles, name=side.name, mode="lines",
            line={"color": colour, "width": 2.3, "dash": dash},
            hovertemplate=f"{side.name}: %{{y:.4~r}} % within %{{x:.3~r}} {unit}<extra></extra>",
        )  # fmt: skip
    slos = {slo for side in sides for slo, _, _ in side.record.slos if slo.metric == metric.key}
    for slo in sorted(slos, key=lambda slo: slo.threshold_s):
        figure.add_scatter(
            x=[scale * slo.threshold_s] * 2, y=[0, 100], name=f"SLO {slo}", mode="lines", showlegend=False,
            line={"color": GREY, "width": 1.3, "dash": "dash"}, hovertemplate=f"SLO {slo}<extra></extra>",
        )  # fmt: skip
    shown = np.concatenate([every, [slo.threshold_s for slo in slos]])
    figure.update_xaxes(title_text=f"{metric.name} ({unit})", **value_axis(scale * shown[shown > 0]))
    share_axis(figure)
    caption = f"Height: share of {metric.things} within this time." + " Grey: SLOs." * bool(slos)
    return Panel(name, caption, figure, "third", _height(270, sides))


def frontier(sides: Sequence[Side], searches: Mapping[str, Search]) -> Panel:
    """Median TTFT against P99 TBT: a dot for each run, lines through the trials of searches, and the runs' front."""
    title = "Median TTFT against P99 TBT"
    every = [(i, side, responses(side, searches.get(side.name))) for i, side in enumerate(sides)]
    every = [each for each in every if each[2]]
    if not every:
        return Panel(title, "No request has more than one output token, so there is no gap between tokens.")
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
        figure.add_scatter(
            x=front[:, 0], y=front[:, 1], name="front", mode="lines", hoverinfo="skip",
            line={"color": GREY, "width": 1.5, "dash": "dot", "shape": "hv"},
        )  # fmt: skip
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
    unit_s, unit = next(
        (each for each in ((3600.0, "h"), (60.0, "min")) if longest >= 10 * each[0]), (1.0, "s")
    )  # fmt: skip
    figure = new_figure()
    for i, side in enumerate(sides):
        colour, dash = series_style(i)
        figure.add_scatter(
            x=side.output_s / unit_s, y=side.output_tokens, name=side.name, mode="lines",
            line={"color": colour, "width": 2, "dash": dash}, hovertemplate="%{y:,.4~r} tokens",
        )  # fmt: skip
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
