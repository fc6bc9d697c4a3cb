"""The figures of a report: each function draws a part of a Record, and `panels` is the order they are shown in."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from engine.results.metric_table import Metric, drawn_metrics
from engine.results.tables import Array
from studies.pages.figures import (
    BAD,
    BLUE,
    GOOD,
    GREY,
    ORANGE,
    Panel,
    faded,
    new_figure,
    share_axis,
    style_axes,
    value_axis,
)
from studies.pages.run_record import STALL_FACTOR, Record, Timeline
from studies.pages.run_stages import stage_use
from studies.words import number, seconds, statistic_name

_NO_GAPS = "No request has more than one output token, so there is no gap between tokens."


def panels(record: Record) -> list[tuple[str, list[Panel]]]:
    """The sections of a report: a heading and its panels."""
    return [
        ("Latency", [latency_cdf(record, metric) for metric in drawn_metrics()]),
        ("Over time", [tbt_over_time(record), batch_composition(record), kv_use(record), queue(record)]),
        ("Stages", [stage_use(record)]),
    ]


# -- latency -------------------------------------------------------------------------------------------------------


def latency_cdf(record: Record, metric: Metric) -> Panel:
    """The share of requests (or token gaps) within each latency, with the SLOs on that metric."""
    name = metric.title or metric.name
    distribution = record.latencies.get(metric.key)
    if distribution is None:
        return Panel(name, _NO_GAPS, None, "third")
    slos = [(slo, value, met) for slo, value, met in record.slos if slo.metric == metric.key]
    values = distribution.values_s
    figure = new_figure(legend=False)
    figure.add_scatter(
        x=values,
        y=100 * distribution.quantiles,
        name=metric.name,
        mode="lines",
        line={"color": BLUE, "width": 2.5},
        hovertemplate="%{y:.4~r} % within %{x:.3~r} s<extra></extra>",
    )
    shown = np.concatenate([values, [slo.threshold_s for slo, _, _ in slos]])
    figure.update_xaxes(title_text=f"{metric.name} (s)", **value_axis(shown[shown > 0]))
    for i, (slo, value, met) in enumerate(slos):
        colour = GOOD if met else BAD
        within = float(np.interp(slo.threshold_s, values, distribution.quantiles))
        words = f"{statistic_name(slo.statistic)} ≤ {slo.threshold_s:g} s"
        _vertical_line(figure, slo.threshold_s, within, words, colour, i)
        share = {"max": 100.0}.get(slo.statistic, slo.percentile)
        if value is not None and share is not None:
            figure.add_scatter(
                x=[value],
                y=[share],
                name=str(slo),
                mode="markers",
                marker={"color": colour, "size": 9, "line": {"color": "white", "width": 1.5}},
                hovertemplate=f"{statistic_name(slo.statistic)} is %{{x:.3~r}} s<extra></extra>",
            )
    share_axis(figure)
    caption = f"Height: share of {metric.things} within this time."
    if slos:
        caption += " Dashed: SLO; the dot is what the run had, and must lie left of its line."
    return Panel(name, caption, figure, "third", 270)


# -- over time -----------------------------------------------------------------------------------------------------


def tbt_over_time(record: Record) -> Panel:
    """The longest and the typical gap between tokens in each time bin, with the stalls marked."""
    timeline, title = record.timeline, "Time between tokens over time"
    some = ~np.isnan(timeline.max_tbt_s)
    threshold = timeline.stall_threshold_s
    if not some.any() or threshold is None:
        return Panel(title, _NO_GAPS, None)
    unit_s, unit = _time_unit(timeline)
    edges = np.repeat(timeline.edges_s / unit_s, 2)[1:-1]
    centres = (timeline.edges_s[1:] + timeline.edges_s[:-1]) / 2 / unit_s
    figure = new_figure()
    longest = timeline.max_tbt_s
    stalled = some & (longest > threshold)
    figure.add_scatter(
        x=edges, y=_steps(timeline.median_tbt_s), name="median", mode="lines", line={"color": BLUE, "width": 2},
        customdata=_steps(longest), hovertemplate="%{y:.3~r} s, longest %{customdata:.3~r} s",
    )  # fmt: skip
    for name, points, marker in (
        ("longest", some & ~stalled, {"color": GREY, "size": 4.5}),
        ("longest, a stall", stalled, {"color": BAD, "size": 6.5, "symbol": "diamond"}),
    ):
        if points.any():
            figure.add_scatter(
                x=centres[points], y=longest[points], name=name, mode="markers", marker=marker, hoverinfo="skip"
            )
    if stalled.any():
        figure.add_hline(y=threshold, line={"color": BAD, "width": 1, "dash": "dot"})
    shown = np.concatenate([longest[some], timeline.median_tbt_s[some], [threshold] if stalled.any() else []])
    figure.update_yaxes(title_text="TBT (s)", **value_axis(shown))
    figure.update_xaxes(title_text=f"Time since the first arrival ({unit})", range=[0, edges[-1]])
    stalls = f"a gap over {seconds(threshold)}, {STALL_FACTOR:g} times the run's median"
    if timeline.stalled_batches:
        count = timeline.stalled_batches
        found = (
            f"Generation stalls (red, above the dotted line: {stalls}, mostly waiting for other requests' prefills): "
            f"{count:,} of {timeline.batches:,} batches ({number(100 * count / timeline.batches)} %) ended one."
        )
    else:
        found = f"No generation stall: none had {stalls}."
    caption = (
        f"Longest gap that a token ended in each {seconds(timeline.edges_s[1])} bin, and the median of the "
        f"batches' longest gaps. {found}"
    )
    return Panel(title, caption, figure)


def batch_composition(record: Record) -> Panel:
    """Decode and prefill tokens in a batch, stacked, with the token budget; below it the decode tokens alone."""
    timeline = record.timeline
    unit_s, unit = _time_unit(timeline)
    edges = np.repeat(timeline.edges_s / unit_s, 2)[1:-1]
    figure = new_figure()
    figure.set_subplots(rows=2, shared_xaxes=True, row_heights=[0.64, 0.36], vertical_spacing=0.09)
    style_axes(figure)
    for name, colour, tokens in (
        ("decode tokens", BLUE, timeline.decode_tokens),
        ("prefill tokens", ORANGE, timeline.prefill_tokens),
    ):
        figure.add_scatter(
            x=edges, y=_steps(tokens), name=name, stackgroup="tokens", mode="lines",
            line={"color": colour, "width": 0.5}, fillcolor=faded(colour, 0.75),
            hovertemplate="%{y:,.3~r}", row=1, col=1,
        )  # fmt: skip
    figure.add_scatter(
        x=edges, y=_steps(timeline.decode_tokens), mode="lines", fill="tozeroy", showlegend=False, name="decode tokens",
        line={"color": BLUE, "width": 0.5}, fillcolor=faded(BLUE, 0.75),
        hovertemplate="%{y:,.3~r}", row=2, col=1,
    )  # fmt: skip
    highest = float((timeline.decode_tokens + timeline.prefill_tokens).max())
    budgets = sorted({replica.get("max_num_batched_tokens") or 0 for replica in record.summary["replicas"]} - {0})
    caption = (
        "Tokens of the running batch, averaged over the time that batches ran, so that long batches count for more; "
        "below, the decode tokens alone."
    )
    # a line far above everything would only flatten the rest
    shown = [budget for budget in budgets if budget <= 4 * highest]
    for budget in shown:
        figure.add_scatter(
            x=[edges[0], edges[-1]], y=[budget, budget], name=f"token budget, {budget:,}", mode="lines",
            line={"color": GREY, "width": 1.5, "dash": "dash"}, hoverinfo="skip",
            row=1, col=1,
        )  # fmt: skip
    if budgets and not shown:
        caption += f" The token budget, {' and '.join(f'{budget:,}' for budget in budgets)}, is far above."
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(title_text="Tokens per batch", row=1)
    figure.update_yaxes(title_text="Decodes", row=2, nticks=4)
    figure.update_xaxes(range=[0, edges[-1]])
    figure.update_xaxes(title_text=f"Time since the first arrival ({unit})", row=2)
    return Panel("Batch composition over time", caption, figure, height_px=390)


def kv_use(record: Record) -> Panel:
    """KV blocks in use, as a share of the replica's."""
    timeline = record.timeline
    unit_s, unit = _time_unit(timeline)
    edges = np.repeat(timeline.edges_s / unit_s, 2)[1:-1]
    several = len(timeline.kv_percent) > 1
    figure = new_figure(legend=several)
    _mean_and_range(figure, edges, timeline.kv_percent, "", BLUE, "%{y:.3~r} %")
    top = 105.0 if timeline.peak_kv_percent > 25 else None
    figure.update_yaxes(title_text="KV blocks in use (%)", range=[0, top], rangemode="tozero")
    figure.update_xaxes(title_text=f"Time since the first arrival ({unit})", range=[0, edges[-1]])
    caption = f"Share of a replica's KV cache that requests hold; the peak is {number(timeline.peak_kv_percent)} %."
    caption += " Band: lowest to highest replica." * several
    return Panel("KV cache use over time", caption, figure, "half")


def queue(record: Record) -> Panel:
    """Running and waiting requests of a replica."""
    timeline = record.timeline
    unit_s, unit = _time_unit(timeline)
    edges = np.repeat(timeline.edges_s / unit_s, 2)[1:-1]
    several = len(timeline.kv_percent) > 1
    figure = new_figure()
    _mean_and_range(figure, edges, timeline.num_running, "running", BLUE, "%{y:.3~r}")
    _mean_and_range(figure, edges, timeline.num_waiting, "waiting", ORANGE, "%{y:.3~r}")
    figure.update_yaxes(title_text="Requests per replica" if several else "Requests", rangemode="tozero")
    figure.update_xaxes(title_text=f"Time since the first arrival ({unit})", range=[0, edges[-1]])
    caption = "Running requests hold KV blocks, waiting ones are in the queue; one that keeps growing means saturation."
    caption += " Bands: lowest to highest replica." * several
    return Panel("Running and waiting requests", caption, figure, "half")


def _mean_and_range(figure: go.Figure, edges: Array, values: Array, name: str, colour: str, hover: str) -> None:
    """The mean of `values` (replicas, bins); of several also a band from the lowest to the highest."""
    several = len(values) > 1
    if several:
        common: dict[str, Any] = {"mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
        figure.add_scatter(x=edges, y=_steps(values.min(axis=0)), name="lowest", **common)
        figure.add_scatter(
            x=edges, y=_steps(values.max(axis=0)), name="highest", fill="tonexty", fillcolor=faded(colour, 0.25),
            **common,
        )  # fmt: skip
    figure.add_scatter(
        x=edges, y=_steps(values.mean(axis=0)), name=", ".join(filter(None, [name, "mean of replicas" * several])),
        mode="lines", line={"color": colour, "width": 2}, hovertemplate=hover,
        **({} if several else {"fill": "tozeroy", "fillcolor": faded(colour, 0.18)}),
    )  # fmt: skip


# -- what they share -----------------------------------------------------------------------------------------------


def _time_unit(timeline: Timeline) -> tuple[float, str]:
    """Seconds and name of the unit of time that suits the run."""
    for unit_s, unit in ((3600.0, "h"), (60.0, "min")):
        if timeline.edges_s[-1] >= 10 * unit_s:
            return unit_s, unit
    return 1.0, "s"


def _steps(values: Array) -> list[float | None]:
    """Each value twice, for the beginning and the end of its bin; a gap in the line for NaN."""
    return [None if np.isnan(value) else float(value) for value in np.repeat(values, 2)]


def _vertical_line(figure: go.Figure, x: float, within: float, text: str, colour: str, row: int) -> None:
    """A dashed line through a CDF that is `within` high there, with its words where they have room beside the curve."""
    axis = figure.layout.xaxis
    log = axis.type == "log"
    place = float(np.log10(x)) if log else x
    low, high = axis.range
    left = place - low > 0.55 * (high - low)
    top = left and within < 0.5
    figure.add_vline(x=x, line={"color": colour, "width": 1.5, "dash": "dash"})
    figure.add_annotation(
        x=place, y=0.98 - 0.1 * row if top else 0.03 + 0.1 * row, yref="paper", text=text, showarrow=False,
        font={"color": colour, "size": 12}, borderpad=1,
        xanchor="right" if left else "left", xshift=-4 if left else 4, yanchor="top" if top else "bottom",
    )  # fmt: skip
