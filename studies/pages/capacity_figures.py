"""The figures of searches and sweeps side by side: their capacities, what those cost, and the front of speed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import Any

import numpy as np
import plotly.graph_objects as go

from studies.pages.capacity_record import Point, Search, Tried
from studies.pages.figures import GOOD, GREY, Panel, add_line, new_figure, style_of, value_axis
from studies.words import capital, number, times_kind

MOST_BARS = 40
_FEW = 4  # bars whose binding SLOs the caption has room for
_SPAN = 1e4  # on a logarithmic axis no dot is lower than the top over this
_NEAR = 5.0  # times the capacity, or a part of it: the rates that are seen
_LONGEST_LINE = 22  # characters beside a bar, where a name can be broken
_LONGEST_NAME = 34  # where it can't


def capacity_panels(points: Sequence[Point]) -> list[Panel]:
    """Return capacities as bars: in all, by GPU, and by dollar where a price is known."""
    panels = [capacity_bars(points)]
    things = capital(things_of(points))
    if any(point.gpus != points[0].gpus for point in points) or len({point.group for point in points}) > 1:
        panels.append(_ranked(points, "Capacity per GPU", f"{things}/s and GPU", "per_gpu"))
    if any(point.per_dollar for point in points):
        panels.append(_ranked(points, f"{things} per dollar", f"{things} per dollar", "per_dollar"))
    return panels


def things_of(points: Iterable[Point]) -> str:
    """Return what the points' rates are of: requests, or conversations."""
    return " or ".join(dict.fromkeys(point.rate_of for point in points if point.qps is not None)) or "requests"


def series_of(points: Sequence[Point]) -> list[str]:
    """Return what gives each point its colour: its sweep where there are several, else its device."""
    if len({point.group for point in points}) > 1:
        return [point.group or "searches" for point in points]
    return [point.device or point.settings.get("device", "") for point in points]


def colours_of(points: Sequence[Point]) -> dict[str, str]:
    """Return the colour of each of `series_of`, the same on a whole page."""
    return {name: style_of(i)[0] for i, name in enumerate(dict.fromkeys(series_of(points)))}


def capacity_bars(points: Sequence[Point], colours: Mapping[str, str] | None = None) -> Panel:
    """Draw a bar for each capacity, the highest first, with its range and what was published and confirmed beside it.

    `colours`: of the searches by their names, where they are not all to have the same one.
    """
    shown = sorted(points, key=lambda point: -(point.qps or 0.0))[:MOST_BARS]
    own = dict(zip(map(id, points), series_of(points), strict=True))
    series: list[tuple[str, str, list[float | None]]] = [
        (f"simulated{f', {name}' if name else ''}", colour,
         [point.qps if own[id(point)] == name else None for point in shown])
        for name, colour in colours_of(points).items()
    ]  # fmt: skip
    if colours:
        series = [("simulated", GREY, [point.qps for point in shown])]
    series += [
        ("published", GREY, [point.published for point in shown]),
        ("confirmed on hardware", GOOD, [point.confirmed for point in shown]),
    ]
    series = [each for each in series if any(value is not None for value in each[2])]
    figure = new_figure(len(series) > 1, barmode="group", bargap=0.3, hovermode="closest")
    bars = len({name.partition(",")[0] for name, _, _ in series})  # of a point
    names = labels(shown)
    for name, colour, values in series:
        simulated = name.startswith("simulated")
        figure.add_bar(
            y=names, x=values, name=name.removeprefix("simulated, "), orientation="h",
            marker={"color": [(colours or {}).get(point.name, GREY) for point in shown] if simulated and colours
                    else colour, "line": {"width": 0}},
            offsetgroup="simulated" if simulated else name,
            text=["" if value is None or simulated else number(value) for value in values], textposition="outside",
            cliponaxis=False, constraintext="none",
            error_x=_whiskers([point.range for point in shown], values) if simulated else None,
            customdata=[_detail(point) for point in shown],
            hovertemplate="%{y}: %{x:.4~r} " + ("%{customdata}" if simulated else "") + "<extra></extra>",
        )  # fmt: skip
    ends = [max([value or 0.0, *(point.range or ())]) for point in shown for value in [point.qps]]
    figure.add_scatter(
        x=ends, y=names, text=[f"  {_words(point)}" for point in shown], mode="text", textposition="middle right",
        showlegend=False, hoverinfo="skip", cliponaxis=False,
    )  # fmt: skip
    highest = max([*ends, *(value for _, _, values in series for value in values if value is not None)], default=1.0)
    things = things_of(shown)
    figure.update_xaxes(title_text=f"Capacity ({things}/s)", range=[0, 1.2 * (highest or 1.0)], nticks=6)
    name_axis(figure, shown)
    caption = "The highest request rate at which every SLO holds."
    if over := next((point.range_over for point in shown if point.range), ""):
        caption += f" Whiskers: over {over}."
    if len(shown) <= _FEW:
        beyond = [f"{point.binding} ({point.words})" for point in shown if point.binding]
        caption += f" Missed beyond it: {', '.join(beyond)}." if beyond else ""
    height_px = 120 + max(10 + 16 * bars, row_px(shown)) * len(shown)
    return Panel("Capacity", caption + _left_out(points, shown), figure, height_px=height_px)


def _whiskers(ranges: Sequence[tuple[float, float] | None], values: Sequence[float | None]) -> dict[str, Any]:
    """Return a bar chart's error bars from ranges."""
    pairs = [(value, each) if value is not None and each else None for value, each in zip(values, ranges, strict=True)]
    return {
        "type": "data", "symmetric": False, "color": "#737d89", "thickness": 1.4, "width": 4,
        "array": [pair[1][1] - pair[0] if pair else 0.0 for pair in pairs],
        "arrayminus": [pair[0] - pair[1][0] if pair else 0.0 for pair in pairs],
        "visible": any(pairs),
    }  # fmt: skip


def _detail(point: Point) -> str:
    beyond = f"; beyond it {point.binding} is missed" if point.binding else ""
    return f"{point.rate_of}/s{beyond}{f'; times {times_kind(point.predictor)}' if point.predictor else ''}"


def _words(point: Point) -> str:
    """Return what stands beside a capacity."""
    if point.qps is None:
        return ""
    if point.outcome == "none":
        return "none"
    return number(point.qps) + ", all at once" * (point.outcome == "all")


def _ranked(points: Sequence[Point], title: str, axis: str, name: str) -> Panel:
    """Draw bars of what each point has by a name, from the best to the worst."""
    having = [point for point in points if getattr(point, name) is not None]
    ranked = sorted(having, key=lambda point: -getattr(point, name))[:MOST_BARS]
    colours, own = colours_of(points), dict(zip(map(id, points), series_of(points), strict=True))
    values = [getattr(point, name) for point in ranked]
    figure = new_figure(False, bargap=0.3, hovermode="closest")
    figure.add_bar(
        y=labels(ranked), x=values, orientation="h", text=list(map(number, values)), textposition="outside",
        marker={"color": [colours[own[id(point)]] for point in ranked], "line": {"width": 0}},
        cliponaxis=False, hovertemplate="%{y}: %{x:.4~r}<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(title_text=axis, range=[0, 1.35 * max([*values, 1e-9])], nticks=5)
    name_axis(figure, ranked)
    caption = "The best first." + _left_out(having, ranked)
    return Panel(title, caption, figure, "half", 90 + row_px(ranked) * len(ranked))


def trials(searches: Sequence[Search], colours: Mapping[str, str] | None = None) -> Panel:
    """Draw value over threshold at each rate: of each SLO for one search, of the binding one for several."""
    figure = new_figure(hovermode="closest")
    own = colours or {search.name: style_of(i)[0] for i, search in enumerate(searches)}
    several, things = len(searches) > 1, things_of(search.point for search in searches)
    lines: dict[str, list[tuple[float, float]]] = {}  # of an SLO, or a search
    for search in searches:
        for trial in search.trials:
            for name, margin in _margins(trial, search.name if several else None).items():
                lines.setdefault(name, []).append((trial.rate, margin))
    finite = [margin for line in lines.values() for _, margin in line if margin]
    top = 1.5 * max([1.0, *finite])
    for i, (name, line) in enumerate(lines.items()):
        colour = own[name] if several else style_of(i)[0]
        rates, values = zip(*((rate, max(margin, top / _SPAN)) for rate, margin in line), strict=True)
        hover = f"%{{x:.4~r}} {things}/s: %{{y:.3~r}} times the threshold"
        marker = {"size": 7, "color": colour}
        add_line(figure, rates, values, name, colour, hover, width=1.8, mode="lines+markers", marker=marker)
    given_up = [(search, trial) for search in searches for trial in search.trials if trial.stopped_early]
    if given_up:
        figure.add_scatter(
            x=[trial.rate for _, trial in given_up], y=[top] * len(given_up), name="given up", mode="markers",
            ids=[f"{search.name}: {trial.stopped_early}" for search, trial in given_up],
            marker={"symbol": "x", "size": 8, "color": GREY},
            hovertemplate=f"%{{id}} can't be met at %{{x:.4~r}} {things}/s<extra></extra>",
        )  # fmt: skip
    found = {each.name: qps for each in searches if each.point.outcome == "found" and (qps := each.point.qps)}
    for name, qps in found.items():
        words, colour = (f"capacity of {name}", own[name]) if several else ("capacity", GREY)
        hover = f"capacity: {qps:.4g} {things}/s<extra></extra>"
        ends = [qps] * 2, [top / _SPAN / 2, 2 * top]
        add_line(figure, *ends, words, colour, hover, width=1.5, dash="dash", showlegend=not several)
    shown = np.array([*(max(each, top / _SPAN) for each in finite), 1.0, top])
    tried = np.array([trial.rate for search in searches for trial in search.trials])
    near = found.values()
    seen = (tried > min(near) / _NEAR) & (tried < max(near) * _NEAR) if near else tried > 0
    span = value_axis(tried[seen], logarithmic=True)
    figure.add_hline(y=1, line={"color": GREY, "width": 1.2, "dash": "dot"})
    figure.update_xaxes(title_text=f"Rate ({things}/s)", **span)
    figure.update_yaxes(title_text="Value / threshold", **value_axis(shown, logarithmic=True))
    caption = (
        f"{'The binding SLO of each search' if several else 'Each SLO'} at the rates that were tried; what lies above "
        "the dotted line is missed."
    )
    caption += " Crosses: trials that were given up, since an SLO could not be met any more." * bool(given_up)
    caption += " The rates that are far from the capacity are left out." * (not seen.all())
    return Panel("The trials", caption, figure, height_px=380)


def _margins(trial: Tried, together: str | None) -> dict[str, float]:
    """Return the finite margins of a trial; with a name only the worst of all, by that name."""
    margins = trial.margins if together is None else {together: max(trial.margins.values())}
    return {slo: margin for slo, margin in margins.items() if isfinite(margin)}


def _left_out(points: Sequence[Point], shown: Sequence[Point]) -> str:
    return "" if len(points) == len(shown) else f" The {len(shown)} highest of {len(points)}; the table has all."


def names_of_points(points: Sequence[Point]) -> dict[int, str]:
    """Return each point's name in words, by its id(); with its sweep's where several sweeps have points."""
    several = len({point.group for point in points}) > 1
    return {id(each): f"{each.group}: {each.words}" if several and each.group else each.words for each in points}


def labels(points: Sequence[Point]) -> list[str]:
    """Return names that fit beside bars: long ones on several lines. What has no capacity says why."""
    names = names_of_points(points)
    return ["<br>".join(_lines(names[id(each)])) + f" ({each.status})" * (each.qps is None) for each in points]


def row_px(points: Sequence[Point]) -> int:
    """Return the height that a bar's name needs."""
    return 11 + 16 * max((name.count("<br>") + 1 for name in labels(points)), default=1)


def _lines(name: str) -> list[str]:
    """Return a name on lines that are not too long, broken between its parts."""
    lines = [""]
    for part in name.split(", "):
        joined = f"{lines[-1]}, {part}" if lines[-1] else part
        if len(joined) > _LONGEST_LINE and lines[-1]:
            lines[-1] += ","
            lines.append(part)
        else:
            lines[-1] = joined
    return [
        line if len(line) <= _LONGEST_NAME else f"{line[: _LONGEST_NAME - 1]}\N{HORIZONTAL ELLIPSIS}" for line in lines
    ]


def name_axis(figure: go.Figure, points: Sequence[Point]) -> None:
    """Put bars from top to bottom in the order of their points."""
    figure.update_yaxes(
        autorange="reversed", showgrid=False, ticksuffix="  ", categoryorder="array", categoryarray=labels(points)
    )
