"""The figures of a report about single batches and requests: each function draws a part of a Record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go

from engine.results.tables import Array
from studies.pages.figures import BAD, BLUE, GOOD, GREY, ORANGE, Panel, add_line, faded, new_figure, unit_of, value_axis
from studies.pages.run_record import Record
from studies.pages.run_requests import MOST_DOTS
from studies.words import number, seconds

_FOUND = 0.05  # of a prompt in the prefix cache, from which a request counts as one that hit


def over_time(figure: go.Figure, edges_s: Array, **axis: Any) -> Array:
    """Label the axis of time in the unit that suits it; return the bins' edges (bins + 1,), each inner one twice."""
    unit_s, unit = unit_of(float(edges_s[-1]))
    edges = np.repeat(edges_s / unit_s, 2)[1:-1]
    figure.update_xaxes(range=[0, edges[-1]])
    figure.update_xaxes(title_text=f"Time since the first arrival ({unit})", **axis)
    return edges


def steps(values: Array) -> list[float | None]:
    """Return each value twice, for the beginning and the end of its bin; a gap in the line for NaN."""
    return [None if np.isnan(value) else float(value) for value in np.repeat(values, 2)]


def batch_gantt(record: Record) -> list[Panel]:
    """Draw each batch of an excerpt as a bar on its stage: when it began and how long it took."""
    excerpt, timeline = record.excerpt, record.timeline
    if excerpt is None:
        return []
    rows = excerpt.rows
    prefill = rows["num_tokens"] - rows["num_decodes"]
    kinds = (
        ("decodes alone", BLUE, prefill == 0),
        ("decodes and prefills", ORANGE, (prefill > 0) & (rows["num_decodes"] > 0)),
        ("prefills alone", GOOD, (prefill > 0) & (rows["num_decodes"] == 0)),
    )
    figure = new_figure(barmode="overlay", bargap=0.25, hovermode="closest")
    for name, colour, mine in kinds:
        if not mine.any():
            continue
        figure.add_bar(
            orientation="h", name=name, marker={"color": faded(colour, 0.8), "line": {"width": 0.6, "color": colour}},
            x=rows["duration_s"][mine], base=rows["start_s"][mine],
            y=[f"stage {stage}" for stage in rows["stage"][mine]],
            customdata=np.stack([rows["num_decodes"][mine], prefill[mine], rows["kv_blocks"][mine],
                                 rows["num_waiting"][mine]], axis=1).astype(np.int32),
            text=[seconds(float(each)) for each in rows["duration_s"][mine]], textposition="none",
            hovertemplate="at %{base:.4f} s for %{text}<br>%{customdata[0]:,} decodes, %{customdata[1]:,} prefill "
            "tokens<br>%{customdata[2]:,} KV blocks, %{customdata[3]:,} waiting<extra></extra>",
        )  # fmt: skip
    begin, end = float(rows["start_s"].min()), float((rows["start_s"] + rows["duration_s"]).max())
    shown = min(end - begin, 40 * float(np.median(rows["duration_s"])) * excerpt.stages**0.5)
    left = min(max(begin, excerpt.time_s - shown / 2), end - shown)
    if excerpt.gap_s is not None:
        figure.add_vline(x=excerpt.time_s, line={"color": BAD, "width": 1.2, "dash": "dot"})
    figure.update_xaxes(
        title_text="Time since the first arrival (s)", range=[left, left + shown],
        rangeslider={"visible": True, "thickness": 0.16, "range": [begin, end]},
    )  # fmt: skip
    order = [f"stage {stage}" for stage in range(excerpt.stages)]
    figure.update_yaxes(
        autorange="reversed", showgrid=False, ticksuffix="  ", categoryorder="array", categoryarray=order
    )
    where = f" of replica {excerpt.replica}" * (len(record.summary["replicas"]) > 1)
    around = f"The first batches{where}"
    if (gap_s := excerpt.gap_s) is not None:
        around = f"Batches{where} around the longest gap between tokens, {seconds(gap_s)}, which ends at the line"
    count = len(rows["stage"]) // excerpt.stages
    caption = (
        f"{around}: {count:,} of {timeline.batches:,}. A bar is a batch on a stage; what is empty between is a bubble. "
        "The strip below the axis moves and zooms."
    )
    return [Panel("Batches by stage", caption, figure, height_px=210 + 34 * excerpt.stages)]


def ttft_by_prompt(record: Record) -> Panel:
    """Draw each request's TTFT over the length of its prompt, with the median and P99 of requests of such lengths."""
    found, title = record.requests, "TTFT by prompt length"
    positive = found.ttft_s > 0
    if not positive.any():
        return Panel(title, "No request has a first token after its arrival.", width="half")
    figure = new_figure(hovermode="closest", legend_itemsizing="constant")
    hit = found.hit_share >= _FOUND
    for name, colour, chosen in (("request", BLUE, ~hit), ("request, prefix in the cache", GOOD, hit)):
        if (mine := positive & chosen).any():
            figure.add_scatter(
                x=found.prompt_tokens[mine], y=found.ttft_s[mine], name=name, mode="markers",
                marker={"color": faded(colour, 0.4), "size": 4}, customdata=found.ids[mine],
                hovertemplate="request %{customdata}<br>%{x:,} prompt tokens<br>TTFT %{y:.3~r} s<extra></extra>",
            )  # fmt: skip
    for name, dash, values in (("median", "solid", found.band_ttft_s[:, 0]), ("P99", "dot", found.band_ttft_s[:, 1])):
        if len(values) > 1:
            hover = f"{name} %{{y:.3~r}} s at %{{x:,.0f}} tokens<extra></extra>"
            add_line(figure, found.band_tokens, values, name, ORANGE, hover, dash=dash)
    figure.update_xaxes(title_text="Prompt (tokens)", **value_axis(found.prompt_tokens[positive]))
    figure.update_yaxes(title_text="TTFT (s)", **value_axis(found.ttft_s[positive]))
    caption = "A dot is a request; the lines are of requests with prompts about as long."
    if found.count > MOST_DOTS:
        caption += f" {MOST_DOTS:,} of {found.count:,} requests are dots."
    caption += " A line that is flat: TTFT is waiting; one that rises: it is the prompt's own work."
    return Panel(title, caption, figure, "half", 380)


def slowest_requests(record: Record) -> Panel:
    """Draw where the time of the slowest requests went: waiting, to the first token, and to the last."""
    rows = record.requests.slowest
    names = [f"#{request}" for request in rows["id"]]
    unit_s, unit = unit_of(float(rows["e2e_s"].max()))
    figure = new_figure(barmode="stack", bargap=0.3, hovermode="closest")
    waited = rows["waited_s"]
    parts = [("waiting", GREY, waited), ("to the first token", ORANGE, rows["first_s"] - waited)]
    if np.isnan(waited).any():  # unknown
        parts = [("to the first token", ORANGE, rows["first_s"])]
    parts.append(("to the last token", BLUE, rows["e2e_s"] - rows["first_s"]))
    words = [_in_words({name: values[i].item() for name, values in rows.items()}) for i in range(len(names))]
    for name, colour, values in parts:
        figure.add_bar(
            x=np.maximum(values, 0.0) / unit_s, y=names, name=name, orientation="h",
            marker={"color": colour, "line": {"width": 0}}, customdata=words,
            hovertemplate=f"%{{customdata}}<br>{name} %{{x:.3~r}} {unit}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title_text=f"Time since the request's arrival ({unit})", rangemode="tozero")
    figure.update_yaxes(autorange="reversed", showgrid=False, type="category", ticksuffix="  ")
    preempted = int((rows["preemptions"] > 0).sum())
    caption = f"The {len(names)} requests with the longest end-to-end latency, the slowest on top."
    caption += f" {preempted} of them were preempted." if preempted else ""
    return Panel("The slowest requests", caption, figure, "half", max(200, 110 + 17 * len(names)))


def _in_words(row: Mapping[str, float]) -> str:
    cached = f" ({row['hits']:,} in the cache)" if row["hits"] else ""
    preempted = f", {row['preemptions']} preemptions" if row["preemptions"] else ""
    return (
        f"#{row['id']}, came at {seconds(row['arrived_s'])}: {row['prompt_tokens']:,} prompt tokens{cached}, "
        f"{row['output_tokens']:,} output tokens{preempted}"
    )


def prefix_hits(record: Record) -> list[Panel]:
    """Draw which share of prompt tokens was found in the prefix cache over time; nothing where none was."""
    found = record.requests
    if not len(found.hit_percent):
        return []
    figure = new_figure(False)
    edges, shade = over_time(figure, found.hit_edges_s), faded(GOOD, 0.18)
    add_line(figure, edges, steps(found.hit_percent), "found", GOOD, "%{y:.3~r} %", fill="tozeroy", fillcolor=shade)
    figure.update_yaxes(title_text="Prompt tokens found (%)", range=[0, 103])
    rate, evicted = record.summary.get("prefix_hit_rate"), record.summary.get("prefix_evictions")
    caption = "Share of the prompt tokens of the requests first scheduled in each bin that the prefix cache had."
    if rate is not None:
        caption += f" Over the run: {number(100 * rate)} %; {evicted:,} blocks were evicted."
    return [Panel("Prefix-cache hits over time", caption, figure, "full", 260)]
