"""The figures of a report about its batches and requests, single ones and in all: each draws a part of a Record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from engine.results.tables import Array
from studies.pages.figures import BAD, BLUE, GOOD, GREY, ORANGE, Panel, add_line, faded, new_figure, unit_of, value_axis
from studies.pages.run_record import Record
from studies.pages.run_requests import MOST_DOTS
from studies.words import number, seconds

NAMES = {
    "linear": "linear layers",
    "attention_and_waits": "attention, and waiting for the host",
    "communication": "communication",
    "other": "other operators",
    "host": "added by the host",
}
STATISTICS = {"mean": "mean", "p50": "median", "p90": "P90", "p99": "P99", "max": "max"}
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
    figure = new_figure(False, y="Prompt tokens found (%)", yaxis_range=[0, 103])
    edges, shade = over_time(figure, found.hit_edges_s), faded(GOOD, 0.18)
    add_line(figure, edges, steps(found.hit_percent), "found", GOOD, "%{y:.3~r} %", fill="tozeroy", fillcolor=shade)
    rate, evicted = record.summary.get("prefix_hit_rate"), record.summary.get("prefix_evictions")
    caption = "Share of the prompt tokens of the requests first scheduled in each bin that the prefix cache had."
    if rate is not None:
        caption += f" Over the run: {number(100 * rate)} %; {evicted:,} blocks were evicted."
    return [Panel("Prefix-cache hits over time", caption, figure, "full", 260)]


def batch_panels(summary: Mapping[str, Any]) -> list[Panel]:
    """Return what is known of a run's batches: histograms of their requests and tokens, the time between them, how long
    requests were executed and preempted, and the time by kind of operator.
    """
    found = []
    batches = summary.get("batches")
    if batches is not None:
        between = batches["between_ms"]
        gap = f" Between two batches of a replica: {seconds(between['mean'] / 1e3)} on average." if between else ""
        for what, colour in (("requests", BLUE), ("tokens", ORANGE)):
            sizes, things = batches[what], what.capitalize()
            names = [_range(list(sizes["upto"]), i) for i in range(len(sizes["upto"]))]
            figure = _bars({"batches": sizes["upto"].values()}, names, "%{y:,} batches", "Batches", colour)
            figure.update_xaxes(title_text=f"{things} in a batch")
            words = f"Median {number(sizes['p50'])}, mean {number(sizes['mean'])}, P99 {number(sizes['p99'])}."
            found.append(Panel(f"{things} of the batches", words + gap * (what == "requests"), figure, "half", 260))
        if between and between["max"] > 0:
            figure = _spans({"from the end of one to the next": [between[name] for name in STATISTICS]})
            found.append(Panel("Time between batches", "On the first stage of a replica.", figure, "half", 260))
    of_requests = {
        name: [summary.get(f"{'median' if statistic == 'p50' else statistic}_{key}_ms") for statistic in STATISTICS]
        for name, key in (("in a batch", "execution_time"), ("preempted or waiting", "preemption_time"))
    }
    if all(value is not None for values in of_requests.values() for value in values):
        words = "From a request's first scheduling to its last token: how long it was in a batch, and how long not."
        found.append(Panel("Requests' execution and preemption time", words, _spans(of_requests), "half", 260))
    if times := [each for each in summary.get("operator_times_s", ()) if each]:
        total = {name: sum(each[name] for each in times) for name in NAMES}
        figure = new_figure(x="Seconds, over all stages")
        figure.add_bar(x=list(total.values()), y=[NAMES[name] for name in total], orientation="h",
                       marker={"color": GREY}, name="time", hovertemplate="%{x:,.3~r} s")  # fmt: skip
        words = "What depends on a batch's rows is the calibration's; attention is what is left."
        found.append(Panel("Time by kind of operator", words, figure, "half", 260))
    return found


def _spans(spans: Mapping[str, Sequence[Any]]) -> go.Figure:
    """Draw bars of each name's statistics (ms)."""
    in_s = {name: [value / 1e3 for value in values] for name, values in spans.items()}
    return _bars(in_s, list(STATISTICS.values()), "%{y:,.3~r} s", "Seconds", BLUE, ORANGE)


def _bars(series: Mapping[str, Iterable[Any]], names: list[str], hover: str, title: str, *colours: str) -> go.Figure:
    """Draw bars side by side for each of the names."""
    figure = new_figure(y=title, xaxis_type="category", yaxis_rangemode="tozero")
    for colour, (name, values) in zip(colours, series.items(), strict=False):
        figure.add_bar(x=names, y=list(values), name=name, marker={"color": colour}, hovertemplate=hover)
    return figure


def _range(names: list[str], i: int) -> str:
    """Return the sizes of a bar: those up to its own and above that of the bar before."""
    low = 1 if i == 0 else int(names[i - 1]) + 1
    return names[i] if low == int(names[i]) else f"{low:,}-{int(names[i]):,}"
