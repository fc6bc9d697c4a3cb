"""The page of runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from engine.results.metric_table import Metric, drawn_metrics
from studies.capacity.ranges import alike
from studies.pages.capacity_figures import capacity_bars, trials
from studies.pages.capacity_record import Search, responses, thresholds
from studies.pages.compare_record import Headline, Side, bubbles, differing_settings, headline, num_gpus, same_requests
from studies.pages.figures import BOUND, Panel, add_front, add_line, faded, new_figure, style_of, unit_of, value_axis
from studies.pages.latency_figures import NO_GAPS, Curve, latency_cdf
from studies.pages.page import Cell, Page, Tone, coloured, key, numbers_table
from studies.pages.run_record import Record
from studies.words import against, capital, number, seconds, times_kind, together, unlike_sources

_ANSWERS = ("Throughput", "Goodput", "Output per device", "TTFT, median", "TTFT, P99", "TBT, P99", "E2E, P99")


def runs_page(sides: Sequence[Side], searches: dict[str, Search]) -> Page:
    """Runs side by side, with the capacities of those that are the best of a search."""
    order = list(dict.fromkeys([*(side.name for side in sides), *searches]))  # not every search has a run
    page = Page(together(order))
    verdicts = _verdicts(sides)
    for name, search in searches.items():
        if search.best is None:
            verdicts.append(("unsure", f"{name}: no run at a capacity ({search.words})"))
    ranked = sorted(searches, key=lambda name: -(searches[name].point.qps or 0.0))
    if ranked and (others := [ranked[i] for i in alike([searches[name].point.range for name in ranked], 0)]):
        words = f"The capacity of {ranked[0]} can't be told apart from {' and '.join(others)}: ranges overlap"
        verdicts.append(("unsure", words))
    what = "Runs" if not searches else "Runs at the capacity" if len(searches) == len(sides) else "Runs and searches"
    page.header("Windtunnel · side by side", f"{what}, laid side by side.", verdicts)
    folders = {side.name: side.folder for side in sides} | {name: search.folder for name, search in searches.items()}
    if len(sides) > 1:
        page.cards(_best_cards(sides))
    page.add(key((side.name, f"{_describe(side.record)} · {folders[side.name]}") for side in sides))
    if searches:
        colours = {name: style_of(order.index(name))[0] for name in searches}
        points = [search.point for search in searches.values()]
        page.add_panels("Capacity", [capacity_bars(points, colours), trials(list(searches.values()), colours)])
    page.add_panels("Numbers", [_headline_table(sides), _settings_table(sides)])
    for heading, panels in run_panels(sides, searches):
        page.add_panels(heading, panels)
    return page


def _best_cards(sides: Sequence[Side]) -> list[tuple[str, str, str]]:
    """Return which run is the best in what, where one is, and how the next one stands to it."""
    found = []
    for line in headline(sides):
        if line.name not in _ANSWERS or line.best is None:
            continue
        others = [each for i, each in enumerate(line.values) if i != line.best and each is not None]
        next_best = max(others) if line.better == "more" else min(others)
        words = line.words(line.values[line.best]) + (f" {line.unit}" if line.unit != "s" else "")
        found.append((line.name, words, f"{sides[line.best].name}; the next {line.words(next_best)}"))
    return found


def _verdicts(sides: Sequence[Side]) -> list[tuple[Tone, str]]:
    """Say of each run whether it is sustained and meets its SLOs; then whether all served the same requests."""
    found: list[tuple[Tone, str]] = []
    loads = {None: "", True: ", saturated", False: ", sustained"}
    for side in sides:
        missed = [str(slo) for slo, _, met in side.record.slos if not met]
        saturated = side.record.summary["saturation"]["growing"]
        words = f"misses {' and '.join(missed)}" if missed else "meets every SLO" if side.record.slos else "no SLO"
        tone: Tone = "bad" if missed or saturated else "good" if side.record.slos else "unsure"
        found.append((tone, f"{side.name}: {words}{loads[saturated]}"))
    if not same_requests(sides):
        found.append(("unsure", "These did not serve the same requests"))
    every = [replica.get("predictor") for side in sides for replica in side.record.summary["replicas"]]
    if warning := unlike_sources([line for line in every if line]):
        found.append(("bad", capital(warning)))
    return found


def _describe(record: Record) -> str:
    """Return a run in a line, and where its times came from."""
    summary, replicas = record.summary, record.summary["replicas"]
    first, lines = replicas[0], dict.fromkeys(replica.get("predictor") or "" for replica in replicas)
    times = " and ".join(dict.fromkeys(map(times_kind, lines)))
    if "server" in summary:
        return (
            f"{first['model']} at {first['device']}, measured from outside; {summary['completed']:,} requests · times "
            f"{times}"
        )
    devices = {str(each.get("device")) for each in replicas}
    device = "devices" if len(devices) > 1 else first["device"]
    rate = record.config.get("request_rate") or record.arrival_rate
    came = "all at once" if rate is None else f"at {number(rate)} requests/s"
    return (
        f"{str(first['model']).split('/')[-1]} on {num_gpus(record)} \N{MULTIPLICATION SIGN} {device}, "
        f"{first['parallel']}, {first['scheduler']}; {summary['completed']:,} requests "
        f"({summary.get('workload', 'no named workload')}) {came} · times {times}"
    )


def _headline_table(sides: Sequence[Side]) -> Panel:
    rows = [(line.name + f" ({line.unit})" * (line.unit not in ("", "s")), _cells(line)) for line in headline(sides)]
    every: dict[str, list[Cell]] = {}
    for i, side in enumerate(sides):
        for slo, value, met in side.record.slos:
            cells = every.setdefault(str(slo), ["-"] * len(sides))
            cells[i] = coloured("no value" if value is None else seconds(value), met)
    rows += every.items()
    table = numbers_table(("", *(side.name for side in sides)), rows, sortable=False)
    return Panel("What came out", "In brackets: against the first. A star: the best of its row.", table=table)


def _cells(line: Headline) -> list[Cell]:
    """Return the values, each but the first with its distance from the first."""
    base = line.values[0]
    cells: list[Cell] = []
    for i, value in enumerate(line.values):
        words = line.words(value)
        if i and base and value is not None and value != base:
            words += f" ({against(value, base)})"
        cells.append(("best", words) if i == line.best else words)
    return cells


def _settings_table(sides: Sequence[Side]) -> Panel:
    heads, rows = ("Setting", *(side.name for side in sides)), differing_settings(sides)
    table = numbers_table(heads, rows, words=True, sortable=False) if rows else ""
    words = "All others are the same." if rows else "None: the runs have the same settings."
    return Panel("Settings that differ", words, table=table)


def run_panels(sides: Sequence[Side], searches: Mapping[str, Search]) -> list[tuple[str, list[Panel]]]:
    """Return the sections about runs, a heading and its panels. Each of `searches` is of the side of its name."""
    sections = [
        ("Latency", [_latency(sides, metric) for metric in drawn_metrics()]),
        ("First token against the next", [frontier(sides, searches)]),
        ("Over time, and by stage", [*output_over_time(sides), *stage_bubbles(sides)]),
    ]
    return [section for section in sections if section[1]]


def _latency(sides: Sequence[Side], metric: Metric) -> Panel:
    curves = [
        Curve(side.name, *curve, *style_of(i))
        for i, side in enumerate(sides)
        if (curve := side.record.latencies.get(metric.key))
    ]
    slos = [judged for side in sides for judged in side.record.slos]
    return latency_cdf(metric, curves, slos, height_px=_height(270, sides))


def frontier(sides: Sequence[Side], searches: Mapping[str, Search]) -> Panel:
    """Draw median TTFT against P99 TBT: a dot for each run, lines through trials of searches, and the runs' front."""
    title = "Median TTFT against P99 TBT"
    every = [(i, side, found) for i, side in enumerate(sides) if (found := responses(side, searches.get(side.name)))]
    if not every:
        return Panel(title, NO_GAPS)
    figure = new_figure(hovermode="closest")
    for i, side, points in every:
        colour, dash = style_of(i)
        sizes = [11 if point.is_run else 6 for point in points]
        figure.add_scatter(
            x=[point.tbt_s for point in points], y=[point.ttft_s for point in points], name=side.name,
            ids=[point.words for point in points], mode="lines+markers+text" if len(points) > 1 else "markers+text",
            text=[side.name if point.is_run else "" for point in points], textposition="top center", cliponaxis=False,
            line={"color": faded(colour, 0.6), "width": 1.5, "dash": dash},
            marker={"color": colour, "opacity": 1, "size": sizes, "line": {"color": "white", "width": 1}},
            hovertemplate="%{id}<br>median TTFT %{y:.3~r} s<br>P99 TBT %{x:.3~r} s<extra></extra>",
        )  # fmt: skip
    caption = "Lower left is better."
    runs = np.array([(point.tbt_s, point.ttft_s) for _, _, points in every for point in points if point.is_run])
    front = add_front(figure, runs)
    if len(front) > 1:
        caption += " Dotted: the runs that none of the others beats in both."
    if searches:
        caption += " Large: the run at the capacity; small: the other trials that ran to their end."
    values = np.array([(point.tbt_s, point.ttft_s) for _, _, points in every for point in points])
    slos = [slo for side in sides for slo, _, _ in side.record.slos]
    bounds = [thresholds(slos, "tbt", "p99"), thresholds(slos, "ttft", "p50")]
    figure.update_xaxes(title_text="P99 TBT (s)", **value_axis(np.array([*values[:, 0], *bounds[0]])))
    figure.update_yaxes(title_text="Median TTFT (s)", **value_axis(np.array([*values[:, 1], *bounds[1]])))
    for slo_s in bounds[0]:
        figure.add_vline(x=slo_s, line=BOUND)
    for slo_s in bounds[1]:
        figure.add_hline(y=slo_s, line=BOUND)
    caption += " Dashed: SLOs." * any(bounds)
    figure.update_layout(showlegend=len(front) > 1 or bool(searches))
    return Panel(title, caption, figure, height_px=_height(380, sides))


def output_over_time(sides: Sequence[Side]) -> list[Panel]:
    """Draw output tokens that were there by each time, of each run whose batches are known; nothing without one."""
    sides = [side for side in sides if side.record.timeline.batches]
    if not sides:
        return []
    unit_s, unit = unit_of(max(float(side.record.timeline.output_s[-1]) for side in sides))
    figure = new_figure(x=f"Time since the first arrival ({unit})", y="Output tokens")
    figure.update_xaxes(rangemode="tozero").update_yaxes(rangemode="tozero")
    for i, side in enumerate(sides):
        (colour, dash), timeline = style_of(i), side.record.timeline
        times = timeline.output_s / unit_s
        add_line(figure, times, timeline.output_tokens, side.name, colour, "%{y:,.4~r} tokens", dash=dash)
    caption = "First tokens and decoded ones, added up. A flat piece is a time in which no request went on."
    return [Panel("Output tokens over time", caption, figure, "half", _height(330, sides))]


def stage_bubbles(sides: Sequence[Side]) -> list[Panel]:
    """Draw the share of the time with requests that each pipeline stage idled, of each run; nothing without one."""
    every = [100 * bubbles(side.record) for side in sides]
    highest = max(float(shares.max(initial=0.0)) for shares in every)
    if not highest:
        return []
    figure = new_figure(y="Bubbles (%)", barmode="group", bargap=0.3, hovermode="closest")
    figure.update_yaxes(range=[0, max(1.0, 1.08 * highest)])
    for i, (side, shares) in enumerate(zip(sides, every, strict=True)):
        figure.add_bar(
            x=[f"stage {j}" for j in range(len(shares))], y=shares, name=side.name,
            marker={"color": style_of(i)[0], "line": {"width": 0}},
            hovertemplate=f"{side.name}: %{{y:.3~r}} %<extra></extra>",
        )  # fmt: skip
    caption = "A bubble is time that a stage idles while requests are at its replica: a share of the time that there "
    caption += "are any, mean over the replicas."
    return [Panel("Pipeline bubbles", caption, figure, "half", _height(330, sides))]


def _height(height_px: int, sides: Sequence[Side]) -> int:
    """Return room for the lines of a legend."""
    return height_px + 18 * (sum(len(side.name) + 8 for side in sides) // 40)
