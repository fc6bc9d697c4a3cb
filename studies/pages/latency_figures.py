"""The distribution of a latency: of one run with its SLOs, or of several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from engine.results.metric_table import Metric
from engine.results.slo import SLO
from engine.results.tables import Array
from studies.pages.figures import BAD, GOOD, GREY, Panel, add_line, new_figure, value_axis
from studies.words import statistic_name

NO_GAPS = "No request has more than one output token, so there is no gap between tokens."
Judged = tuple[SLO, float | None, bool]  # an SLO, the value that the run had, and whether that meets it


@dataclass(frozen=True, eq=False)
class Curve:
    """Quantiles of a latency (s), and how they are drawn. The curve of a single run is without a name."""

    name: str
    quantiles: Array
    values_s: Array
    colour: str
    dash: str = "solid"


def latency_cdf(
    metric: Metric, curves: Sequence[Curve], slos: Sequence[Judged] = (), nothing: str = NO_GAPS, height_px: int = 270
) -> Panel:
    """Draw the share of requests (or token gaps) within each latency.

    The SLOs on the metric are lines: of a single run with their names and the run's value, of several in grey. Without
    a curve the panel says `nothing`.
    """
    title = metric.title or metric.name
    if not curves:
        return Panel(title, nothing, width="third")
    several = any(curve.name for curve in curves)
    slos = [each for each in slos if each[0].metric == metric.key]
    every = np.concatenate([curve.values_s for curve in curves])
    scale, unit = (1.0, "s") if not several or every.max() >= 1 else (1e3, "ms")
    figure = new_figure(several, hovermode="closest")
    for curve in curves:
        hover = f"{curve.name}: " * several + f"%{{y:.4~r}} % within %{{x:.3~r}} {unit}<extra></extra>"
        x, y = scale * curve.values_s, 100 * curve.quantiles
        add_line(figure, x, y, curve.name or metric.name, curve.colour, hover, width=2.5, dash=curve.dash)
    shown = np.concatenate([every, [slo.threshold_s for slo, _, _ in slos]])
    figure.update_xaxes(title_text=f"{metric.name} ({unit})", **value_axis(scale * shown[shown > 0]))
    if several:
        for slo in sorted({slo for slo, _, _ in slos}, key=lambda slo: slo.threshold_s):
            add_line(figure, [scale * slo.threshold_s] * 2, [0, 100], f"SLO {slo}", GREY, f"SLO {slo}<extra></extra>",
                     width=1.3, dash="dash", showlegend=False)  # fmt: skip
    else:
        for row, judged in enumerate(slos):
            _verdict(figure, curves[0], judged, row)
    figure.update_yaxes(title_text="Share (%)", range=[0, 102], tickvals=[0, 25, 50, 75, 100])
    caption = f"Height: share of {metric.things} within this time."
    if slos:
        one = " Dashed: SLO; the dot is what the run had, and must lie left of its line."
        caption += " Grey: SLOs." if several else one
    return Panel(title, caption, figure, "third", height_px)


def _verdict(figure: go.Figure, curve: Curve, judged: Judged, row: int) -> None:
    """Draw an SLO as a dashed line, with its words where they have room beside the curve, and the run's value."""
    slo, value, met = judged
    colour = GOOD if met else BAD
    axis = figure.layout.xaxis
    low, high = axis.range
    place = float(np.log10(slo.threshold_s)) if axis.type == "log" else slo.threshold_s
    left = place - low > 0.55 * (high - low)
    top = left and float(np.interp(slo.threshold_s, curve.values_s, curve.quantiles)) < 0.5
    figure.add_vline(x=slo.threshold_s, line={"color": colour, "width": 1.5, "dash": "dash"})
    figure.add_annotation(
        x=place, y=0.98 - 0.1 * row if top else 0.03 + 0.1 * row, yref="paper", showarrow=False, borderpad=1,
        text=f"{statistic_name(slo.statistic)} ≤ {slo.threshold_s:g} s", font={"color": colour, "size": 12},
        xanchor="right" if left else "left", xshift=-4 if left else 4, yanchor="top" if top else "bottom",
    )  # fmt: skip
    share = {"max": 100.0}.get(slo.statistic, slo.percentile)
    if value is not None and share is not None:
        figure.add_scatter(
            x=[value], y=[share], name=str(slo), mode="markers",
            marker={"color": colour, "size": 9, "line": {"color": "white", "width": 1.5}},
            hovertemplate=f"{statistic_name(slo.statistic)} is %{{x:.3~r}} s<extra></extra>",
        )  # fmt: skip
