"""The figures of a report: each function draws a part of a Record, and `panels` is the order they are shown in."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from engine.results.metric_table import Metric, drawn_metrics
from engine.results.tables import Array
from studies.pages.figures import BAD, BLUE, GREY, ORANGE, Panel, add_line, faded, new_figure, style_axes, value_axis
from studies.pages.latency_figures import NO_GAPS, Curve, latency_cdf
from studies.pages.request_figures import batch_gantt, over_time, prefix_hits, slowest_requests, steps, ttft_by_prompt
from studies.pages.run_record import Record
from studies.pages.run_timeline import STALL_FACTOR
from studies.words import number, seconds


def panels(record: Record) -> list[tuple[str, list[Panel]]]:
    """Return the sections of a report: a heading and its panels."""
    latency = ("Latency", [_latency(record, metric) for metric in drawn_metrics()])
    requests = ("Requests", [ttft_by_prompt(record), slowest_requests(record), *prefix_hits(record)])
    if "server" in record.summary:  # measured from outside, where no batch is seen
        return [latency, requests]
    return [
        latency,
        ("Over time", [tbt_over_time(record), batch_composition(record), kv_use(record), queue(record)]),
        requests,
        ("Stages", [stage_use(record), *batch_gantt(record)]),
    ]


def _latency(record: Record, metric: Metric) -> Panel:
    found = record.latencies.get(metric.key)
    return latency_cdf(metric, [Curve("", *found, BLUE)] if found else [], record.slos)


def tbt_over_time(record: Record) -> Panel:
    """Draw the longest and the typical gap between tokens in each time bin, with the stalls marked."""
    timeline, title = record.timeline, "Time between tokens over time"
    some = ~np.isnan(timeline.max_tbt_s)
    threshold = timeline.stall_threshold_s
    if not some.any() or threshold is None:
        return Panel(title, NO_GAPS, None)
    figure = new_figure()
    edges = over_time(figure, timeline.edges_s)
    centres = (edges[::2] + edges[1::2]) / 2
    longest = timeline.max_tbt_s
    stalled = some & (longest > threshold)
    hover = "%{y:.3~r} s, longest %{customdata:.3~r} s"
    add_line(figure, edges, steps(timeline.median_tbt_s), "median", BLUE, hover, customdata=steps(longest))
    for name, points, marker in (
        ("longest", some & ~stalled, {"color": GREY, "size": 4.5}),
        ("longest, a stall", stalled, {"color": BAD, "size": 6.5, "symbol": "diamond"}),
    ):
        if points.any():
            dots = {"x": centres[points], "y": longest[points], "name": name, "mode": "markers", "marker": marker}
            figure.add_scatter(**dots, hoverinfo="skip")
    if stalled.any():
        figure.add_hline(y=threshold, line={"color": BAD, "width": 1, "dash": "dot"})
    shown = np.concatenate([longest[some], timeline.median_tbt_s[some], [threshold] if stalled.any() else []])
    figure.update_yaxes(title_text="TBT (s)", **value_axis(shown))
    stalls = f"a gap over {seconds(threshold)}, {STALL_FACTOR:g} times the run's median"
    found = f"No generation stall: none had {stalls}."
    if count := timeline.stalled_batches:
        found = (
            f"Generation stalls (red, above the dotted line: {stalls}, mostly waiting for other requests' prefills): "
            f"{count:,} of {timeline.batches:,} batches ({number(100 * count / timeline.batches)} %) ended one."
        )
    caption = (
        f"Longest gap that a token ended in each {seconds(timeline.edges_s[1])} bin, and the median of the "
        f"batches' longest gaps. {found}"
    )
    return Panel(title, caption, figure)


def batch_composition(record: Record) -> Panel:
    """Draw decode and prefill tokens in a batch, stacked, with the token budget; below it the decodes alone."""
    timeline = record.timeline
    figure = new_figure()
    figure.set_subplots(rows=2, shared_xaxes=True, row_heights=[0.64, 0.36], vertical_spacing=0.09)
    style_axes(figure)
    edges = over_time(figure, timeline.edges_s, row=2)
    both = (("decode tokens", BLUE, timeline.decode_tokens), ("prefill tokens", ORANGE, timeline.prefill_tokens))
    for name, colour, tokens in both:
        area: dict[str, Any] = {"stackgroup": "tokens", "fillcolor": faded(colour, 0.75), "row": 1, "col": 1}
        add_line(figure, edges, steps(tokens), name, colour, "%{y:,.3~r}", width=0.5, **area)
    area = {"fill": "tozeroy", "fillcolor": faded(BLUE, 0.75), "showlegend": False, "row": 2, "col": 1}
    add_line(figure, edges, steps(timeline.decode_tokens), "decode tokens", BLUE, "%{y:,.3~r}", width=0.5, **area)
    highest = float((timeline.decode_tokens + timeline.prefill_tokens).max())
    budgets = sorted({replica.get("max_num_batched_tokens") or 0 for replica in record.summary["replicas"]} - {0})
    caption = (
        "Tokens of the running batch, averaged over the time that batches ran, so that long batches count for more; "
        "below, the decode tokens alone."
    )
    # a line far above everything would only flatten the rest
    shown = [budget for budget in budgets if budget <= 4 * highest]
    for budget in shown:
        ends, name = [edges[0], edges[-1]], f"token budget, {budget:,}"
        add_line(figure, ends, [budget] * 2, name, GREY, "", width=1.5, dash="dash", row=1, col=1)
    if budgets and not shown:
        caption += f" The token budget, {' and '.join(f'{budget:,}' for budget in budgets)}, is far above."
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(title_text="Tokens per batch", row=1)
    figure.update_yaxes(title_text="Decodes", row=2, nticks=4)
    return Panel("Batch composition over time", caption, figure, height_px=390)


def kv_use(record: Record) -> Panel:
    """Draw KV blocks in use, as a share of the replica's."""
    timeline = record.timeline
    several = len(timeline.kv_percent) > 1
    top = 105.0 if timeline.peak_kv_percent > 25 else None
    figure = new_figure(several, y="KV blocks in use (%)", yaxis_range=[0, top], yaxis_rangemode="tozero")
    edges = over_time(figure, timeline.edges_s)
    _mean_and_range(figure, edges, timeline.kv_percent, "", BLUE, "%{y:.3~r} %")
    caption = f"Share of a replica's KV cache that requests hold; the peak is {number(timeline.peak_kv_percent)} %."
    caption += " Band: lowest to highest replica." * several
    return Panel("KV cache use over time", caption, figure, "half")


def queue(record: Record) -> Panel:
    """Running and waiting requests of a replica."""
    timeline = record.timeline
    several = len(timeline.kv_percent) > 1
    figure = new_figure(y="Requests per replica" if several else "Requests", yaxis_rangemode="tozero")
    edges = over_time(figure, timeline.edges_s)
    _mean_and_range(figure, edges, timeline.num_running, "running", BLUE, "%{y:.3~r}")
    _mean_and_range(figure, edges, timeline.num_waiting, "waiting", ORANGE, "%{y:.3~r}")
    caption = "Running requests hold KV blocks, waiting ones are in the queue; one that keeps growing means saturation."
    caption += " Bands: lowest to highest replica." * several
    return Panel("Running and waiting requests", caption, figure, "half")


def _mean_and_range(figure: go.Figure, edges: Array, values: Array, name: str, colour: str, hover: str) -> None:
    """Draw the mean of `values` (replicas, bins); of several also a band from the lowest to the highest."""
    several = len(values) > 1
    shade: dict[str, Any] = {"fill": "tozeroy", "fillcolor": faded(colour, 0.18)}
    if several:
        common: dict[str, Any] = {"mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
        figure.add_scatter(x=edges, y=steps(values.min(axis=0)), name="lowest", **common)
        common |= {"fill": "tonexty", "fillcolor": faded(colour, 0.25)}
        figure.add_scatter(x=edges, y=steps(values.max(axis=0)), name="highest", **common)
        shade = {}
    label = ", ".join(filter(None, [name, "mean of replicas" * several]))
    add_line(figure, edges, steps(values.mean(axis=0)), label, colour, hover, **shade)


_MOST_BARS = 16


def stage_shares(record: Record) -> list[tuple[str, Array]]:
    """Return a label and the shares (3, replicas) of the run that each stage worked, was a bubble, had no request.

    One entry for each stage of each replica; where those are too many to show, one for each stage of all replicas.
    """
    shares: list[list[Array]] = []
    for replica in record.summary["replicas"]:
        busy, bubbles = np.array(replica["stage_utilization"]), np.array(replica["stage_bubbles"])
        # a bubble is given as a share of the time with requests, of which the stage works the rest
        bubble = np.where(bubbles < 1, busy * bubbles / np.where(bubbles < 1, 1 - bubbles, 1.0), 0.0)
        shares.append(list(np.clip([busy, bubble, 1 - busy - bubble], 0.0, 1.0).T))
    if sum(map(len, shares)) <= _MOST_BARS:
        several, pipelined = len(shares) > 1, max(map(len, shares)) > 1
        return [
            (", ".join([f"replica {i}"] * several + [f"stage {j}"] * pipelined) or "replica 0", share[:, None])
            for i, stages in enumerate(shares)
            for j, share in enumerate(stages)
        ]
    every = [[stages[j] for stages in shares if len(stages) > j] for j in range(max(map(len, shares)))]
    return [
        (f"stage {j}, " * (len(every) > 1) + f"{len(having)} replicas", np.stack(having, axis=1))
        for j, having in enumerate(every)
    ]


def stage_use(record: Record) -> Panel:
    """Draw work, bubbles and idle time of each stage."""
    entries = stage_shares(record)
    labels = [label for label, _ in entries]
    together = any(shares.shape[1] > 1 for _, shares in entries)
    figure = new_figure(barmode="stack", bargap=0.35, hovermode="closest")
    for i, (name, colour) in enumerate([("working", BLUE), ("bubble", ORANGE), ("no request", faded(GREY, 0.3))]):
        means = [100 * float(shares[i].mean()) for _, shares in entries]
        ranges = [f" ({100 * shares[i].min():.0f} to {100 * shares[i].max():.0f})" * together for _, shares in entries]
        words = [f"{mean:.0f} %" * (mean >= 11) + span * (mean > 40) for mean, span in zip(means, ranges, strict=True)]
        figure.add_bar(
            x=means, y=labels, name=name, orientation="h", marker={"color": colour, "line": {"width": 0}},
            text=words, textposition="inside", insidetextanchor="middle", textangle=0, constraintext="none",
            **({"textfont": {"color": "white"}} if i < 2 else {}),
            customdata=ranges, hovertemplate="%{x:.3~r} %%{customdata}",
        )  # fmt: skip
    figure.update_xaxes(title_text="Share of the run (%)", range=[0, 100])
    figure.update_yaxes(autorange="reversed", showgrid=False, ticksuffix="  ")
    caption = "A bubble is time that a stage idles while requests are at its replica."
    if together:
        caption += " Each bar is the mean of its replicas, with the lowest and the highest in brackets."
    return Panel("How each stage spent the run", caption, figure, "full", 130 + 34 * len(entries))
