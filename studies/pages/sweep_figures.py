"""The figures of a sweep's trade-offs: speed and price of every load, latency beyond the capacities, and a heat map."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from engine.results.metric_table import find_metric
from engine.results.slo import SLO
from studies.capacity.sweep import in_words
from studies.pages.capacity_figures import colours_of, names_of_points, series_of, things_of
from studies.pages.capacity_record import Load, Point, thresholds
from studies.pages.figures import BOUND, DASHES, GOOD, GREY, Panel, add_front, add_line, faded, new_figure, value_axis
from studies.words import capital, listed, number, seconds, statistic_name

MOST_CURVES = 6  # points whose latency is drawn against load, the best per GPU
MOST_SLOS = 3
_LAYOUT = ("model", "device", "network", "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size",
           "num_replicas")  # fmt: skip
_BLUES = [[0, "rgba(63,136,197,0.08)"], [1, "rgba(63,136,197,0.85)"]]


class Sample(NamedTuple):
    """A load of a point as a dot."""

    point: int
    load: Load
    x: float
    y: float


def trade_offs(points: Sequence[Point]) -> list[Panel]:
    """Draw each load of each point: its price against latencies that have SLOs, and a GPU's against a user's speed.

    Prices are dollars per million output tokens, where they are known. Speeds are output tokens/s, a user's being 1 /
    mean TPOT, and 1 / P99 TBT in the slowest gaps, with the SLO on that.
    """
    loads = [(i, point, load) for i, point in enumerate(points) for load in point.loads]
    panels = []
    for slo in _slos(points)[: MOST_SLOS - 1] if any(point.usd_per_hour for point in points) else ():
        parsed = SLO.parse(slo)
        title, axes = f"Price against {_name(parsed)}", (f"{_name(parsed)} (s)", "$ per million output tokens")
        prices = [(i, load, load.slos.get(slo), point.usd_per_million(load.tokens)) for i, point, load in loads]
        panels.append(_front(points, prices, title, axes, 1, parsed.threshold_s))
    slos = (SLO.parse(text) for point in points for text in point.slos)
    bound_s = max(thresholds(slos, "tbt", "p99"), default=None)  # the loosest
    for title, gap, name, bound in (
        ("Tokens/s of a GPU against tokens/s of a user", "mean TPOT", "tpot_s", None),
        ("The same in a user's slowest gaps", "P99 TBT", "tbt_s", 1 / bound_s if bound_s else None),
    ):
        speeds = [
            (i, load, 1 / gap_s if (gap_s := getattr(load, name)) else None, point.gpus and load.tokens / point.gpus)
            for i, point, load in loads
        ]
        axes = f"Tokens/s of a user (1 / {gap})", "Output tokens/s and GPU"
        panels.append(_front(points, speeds, title, axes, -1, bound))
    return panels


def _slos(points: Sequence[Point]) -> list[str]:
    """Return the SLOs whose values are known, those that bind most often first."""
    binding = Counter(point.binding for point in points)
    every = dict.fromkeys(slo for point in points for load in point.loads for slo in load.slos)
    return sorted(every, key=lambda slo: -binding[slo])


def _name(slo: SLO) -> str:
    return f"{capital(statistic_name(slo.statistic))} {find_metric(slo.metric).name}"


def _front(
    points: Sequence[Point], every: Sequence[tuple[int, Load, float | None, float | None]], title: str,
    axes: tuple[str, str], less: int, bound: float | None,
) -> Panel:  # fmt: skip
    """Draw loads as dots, those at the capacities large, and the front of those that meet the SLOs.

    `less` is 1 where less is better, -1 where more is; `bound` is where the SLO on the horizontal axis is.
    """
    samples = [Sample(i, load, x, y) for i, load, x, y in every if x and y is not None]
    met = [each for each in samples if each.load.met]
    if not met:
        return Panel(title, "No load that meets the SLOs is known in these.", width="half")
    names, series = names_of_points(points), series_of(points)
    figure = new_figure(hovermode="closest")
    for name, colour in colours_of(points).items():
        mine = [each for each in samples if series[each.point] == name]
        figure.add_scatter(
            x=[each.x for each in mine], y=[each.y for each in mine], name=name or "loads", mode="markers",
            ids=[f"{names[id(points[each.point])]}<br>{number(each.load.rate)} {points[each.point].rate_of}/s"
                 + ", an SLO is missed" * (not each.load.met) for each in mine],
            marker={
                "color": [colour if each.load.met else faded(colour, 0.0) for each in mine], "opacity": 1,
                "size": [11 if each.load.rate == points[each.point].qps else 6 for each in mine],
                "line": {"color": [colour for _ in mine], "width": 1},
            },
            hovertemplate="%{id}<br>%{y:.4~r} " + axes[1] + "<br>%{x:.3~r} " + axes[0] + "<extra></extra>",
        )  # fmt: skip
    better = "Lower left" if less > 0 else "Upper right"
    caption = f"{better} is better. A dot is a load of a point; large: its capacity; hollow: an SLO is missed."
    on = add_front(figure, np.array([(each.x, each.y) for each in met]), less)
    if len(on) > 1:
        figure.data[-1].ids = best = [names[id(points[met[k].point])] for k in on]
        caption += f" Dotted: those that no other beats in both, of {listed(list(dict.fromkeys(best)), 3)}."
    if bound is not None:
        figure.add_vline(x=bound, line=BOUND)
        caption += " Dashed: the SLO."
    low, high = min(each.x for each in met) / 3, max(each.x for each in met) * 3
    near = np.array([(each.x, each.y) for each in samples if low <= each.x <= high])
    figure.update_xaxes(title_text=axes[0], **value_axis(np.array([*near[:, 0], *([bound] if bound else [])])))
    figure.update_yaxes(title_text=axes[1], **value_axis(near[:, 1]))
    return Panel(title, caption, figure, "half", 400)


def load_curves(points: Sequence[Point]) -> list[Panel]:
    """Draw each latency that has an SLO against the load, up to and beyond the capacity."""
    ranked = sorted((point for point in points if len(point.loads) > 1), key=lambda point: -(point.per_gpu or 0.0))
    shown = ranked[:MOST_CURVES]
    if not shown:
        return []
    many = len(shown) > 1
    names, series, colours = names_of_points(shown), series_of(shown), colours_of(points)
    things = things_of(shown)
    panels = []
    for slo in _slos(shown)[:MOST_SLOS]:
        parsed = SLO.parse(slo)
        figure = new_figure(many, hovermode="closest")
        drawn = []
        for i, point in enumerate(shown):
            loads = [load for load in point.loads if not point.qps or load.rate < 3 * point.qps]
            of = [(load, value) for load in loads if (value := load.slos.get(slo)) is not None and value > 0]
            if not of:
                continue
            colour = colours.get(series[i], GREY)
            scale = point.gpus or 1 if many else 1
            values = [value for _, value in of]
            drawn += values
            add_line(
                figure, [load.rate / scale for load, _ in of], values, names[id(point)], colour,
                f"{names[id(point)]}<br>%{{x:.4~r}} {things}/s: %{{y:.3~r}} s<extra></extra>",
                mode="lines+markers", dash=DASHES[series[:i].count(series[i]) % len(DASHES)],
                marker={"color": [colour if load.met else "rgba(0,0,0,0)" for load, _ in of], "size": 8,
                        "line": {"color": colour, "width": 1.5}},
            )  # fmt: skip
            if not many and point.qps:
                figure.add_vline(x=point.qps, line={"color": GOOD, "width": 1.3, "dash": "dot"})
        if not drawn:
            continue
        figure.add_hline(y=parsed.threshold_s, line=BOUND)
        figure.update_xaxes(title_text=f"Load ({things}/s{' and GPU' if many else ''})", rangemode="tozero")
        name = _name(parsed)
        figure.update_yaxes(title_text=f"{name} (s)", **value_axis(np.array([*drawn, parsed.threshold_s])))
        caption = f"Dashed: {name} ≤ {seconds(parsed.threshold_s)}. Hollow: a load at which some SLO is missed."
        caption += " Dotted: the capacity." * (not many)
        caption += f" The {len(shown)} best points per GPU." * (len(ranked) > len(shown))
        legend_px = 14 * sum(len(each) for each in names.values()) // 30 if many else 0
        panels.append(Panel(f"{name} against load", caption, figure, "half", 320 + legend_px))
    return panels


def heat_map(points: Sequence[Point]) -> list[Panel]:
    """Draw the capacity per GPU over what varies: devices and layouts against all else; nothing for a single row."""
    cells: dict[tuple[str, str], Point] = {}
    for point in points:
        layout = {key: value for key, value in point.settings.items() if key in _LAYOUT}
        rest = {key: value for key, value in point.settings.items() if key not in _LAYOUT}
        if point.per_gpu is not None and layout and rest:
            cells[in_words(rest), in_words(layout)] = point
    across, down = (list(dict.fromkeys(cell[k] for cell in cells)) for k in (0, 1))
    if len(across) < 2 or len(down) < 2:
        return []
    if len(across) > len(down):  # the longer way is down, which suits a phone
        across, down, cells = down, across, {(y, x): point for (x, y), point in cells.items()}
    values = [[each.per_gpu if (each := cells.get((x, y))) else None for x in across] for y in down]
    margin = {"l": 44, "r": 14, "t": 20 + 16 * max(name.count(", ") + 1 for name in across), "b": 10}
    figure = new_figure(False, hovermode="closest", margin=margin)
    figure.add_heatmap(
        x=[name.replace(", ", "<br>") for name in across], y=[name.replace(", ", "<br>") for name in down], z=values,
        colorscale=_BLUES, showscale=False, xgap=2, ygap=2,
        text=[["" if value is None else number(value) for value in row] for row in values], texttemplate="%{text}",
        hovertemplate="%{y}, %{x}: %{z:.4~r} a second and GPU<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(ticks="", showline=False, type="category", side="top", tickangle=0)
    figure.update_yaxes(autorange="reversed", ticks="", showgrid=False, type="category")
    caption = f"Capacity ({things_of(points)}/s and GPU) of each device and layout with each of the other settings."
    return [Panel("The sweep at a glance", caption, figure, "half", 80 + 54 * len(down))]
