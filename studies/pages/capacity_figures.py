"""The figures of searches and sweeps side by side: their capacities, what those cost, and the front of speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite

import numpy as np
import plotly.graph_objects as go

from engine.errors import unknown
from studies.capacity.sweep import not_dominated
from studies.pages.capacity_record import Point, Search, Tried, threshold
from studies.pages.figures import GOOD, GREY, Panel, add_line, faded, new_figure, series_style, value_axis
from studies.words import number

MOST_BARS = 40
_FEW = 4  # bars whose binding SLOs the caption has room for
_SPAN = 1e4  # on a logarithmic axis no dot is lower than the top over this
_NEAR = 5.0  # times the capacity, or a part of it: the rates that are seen
_LONGEST_NAME = 30  # characters beside a bar


def capacity_panels(points: Sequence[Point]) -> list[Panel]:
    """Return capacities as bars: in all, by GPU, and by dollar where a price is known."""
    panels = [capacity_bars(points)]
    if any(point.gpus != points[0].gpus for point in points) or len({point.group for point in points}) > 1:
        panels.append(_ranked(points, "Capacity per GPU", "Requests/s and GPU", lambda point: point.per_gpu))
    if any(point.per_dollar for point in points):
        panels.append(_ranked(points, "Requests per dollar", "Requests per dollar", lambda point: point.per_dollar))
    return panels


def capacity_bars(points: Sequence[Point], colours: Mapping[str, str] | None = None) -> Panel:
    """Draw a bar for each capacity, with the published and the confirmed one beside it where there is one.

    `colours`: of the searches by their names, where they are not all to have the same one.
    """
    highest_first = sorted(points, key=lambda point: -(point.qps or 0.0))
    shown = list(points) if len(points) <= MOST_BARS else highest_first[:MOST_BARS]
    series: list[tuple[str, str, list[float | None]]] = [
        (f"simulated{f', {group}' if group else ''}", series_style(i)[0],
         [point.qps if point.group == group else None for point in shown])
        for i, group in enumerate(dict.fromkeys(point.group for point in points))
    ]  # fmt: skip
    series += [
        ("published", GREY, [point.published for point in shown]),
        ("confirmed on hardware", GOOD, [point.confirmed for point in shown]),
    ]
    series = [each for each in series if any(value is not None for value in each[2])]
    figure = new_figure(legend=len(series) > 1)
    bars = len({name.partition(",")[0] for name, _, _ in series})  # of a point
    own = [(colours or {}).get(point.name, GREY) for point in shown]
    for name, colour, values in series:
        simulated = name.startswith("simulated")
        words = [
            "" if value is None else _words(point) if simulated else number(value)
            for point, value in zip(shown, values, strict=True)
        ]
        figure.add_bar(
            y=names_of_points(shown), x=values, name=name, orientation="h",
            marker={"color": own if simulated and colours else colour, "line": {"width": 0}},
            offsetgroup="simulated" if simulated else name,
            text=words, textposition="outside", cliponaxis=False, constraintext="none",
            customdata=[f"; beyond it {point.binding} is missed" * bool(point.binding) for point in shown],
            hovertemplate="%{y}: %{x:.4~r} requests/s" + "%{customdata}" * simulated + "<extra></extra>",
        )  # fmt: skip
    highest = max((value for _, _, values in series for value in values if value is not None), default=1.0)
    figure.update_layout(barmode="group", bargap=0.3, hovermode="closest")
    figure.update_xaxes(title_text="Capacity (requests/s)", range=[0, 1.2 * (highest or 1.0)], nticks=6)
    _name_axis(figure, shown)
    caption = "The highest request rate at which every SLO holds."
    if len(shown) <= _FEW:
        beyond = [f"{point.binding} ({point.name})" for point in shown if point.binding]
        caption += f" Missed beyond it: {', '.join(beyond)}." if beyond else ""
    height_px = 120 + (10 + 16 * bars) * len(shown)
    return Panel("Capacity", caption + _left_out(points, shown), figure, height_px=height_px)


def _words(point: Point) -> str:
    """Return what stands beside a capacity."""
    return "none" if point.outcome == "none" else number(point.qps) + ", all at once" * (point.outcome == "all")


def _ranked(points: Sequence[Point], title: str, axis: str, value: Callable[[Point], float | None]) -> Panel:
    """Draw bars from the best to the worst."""
    having = [point for point in points if value(point) is not None]
    ranked = sorted(having, key=lambda point: -(value(point) or 0.0))[:MOST_BARS]
    groups = list(dict.fromkeys(point.group for point in points))
    values = [value(point) or 0.0 for point in ranked]
    figure = new_figure(legend=False)
    figure.add_bar(
        y=names_of_points(ranked), x=values, orientation="h", text=list(map(number, values)), textposition="outside",
        marker={"color": [series_style(groups.index(point.group))[0] for point in ranked], "line": {"width": 0}},
        cliponaxis=False, hovertemplate="%{y}: %{x:.4~r}<extra></extra>",
    )  # fmt: skip
    figure.update_layout(bargap=0.3, hovermode="closest")
    figure.update_xaxes(title_text=axis, range=[0, 1.2 * max([*values, 1e-9])], nticks=5)
    _name_axis(figure, ranked)
    caption = "The best first." + _left_out(having, ranked)
    return Panel(title, caption, figure, "half", 90 + 26 * len(ranked))


def speed_front(points: Sequence[Point], title: str, unit: str, metric: str, statistic: str) -> Panel:
    """Draw output tokens/s of a GPU against those that a user sees: 1 over a statistic of the time of a token."""
    known: list[tuple[Point, float, float]] = []
    for point in points:
        times = {"tbt": point.tbt_s, "tpot": point.tpot_s}
        if metric not in times:
            raise unknown("metric of a token's time", metric, times)
        time_s = times[metric]
        if time_s and point.tokens_per_gpu:
            known.append((point, 1 / time_s, point.tokens_per_gpu))
    if not known:
        return Panel(title, "No point says what its run at the capacity was like.", width="half")
    values = np.array([(x, y) for _, x, y in known])
    front = not_dominated(-values)
    names = names_of_points([point for point, _, _ in known])
    figure = new_figure()
    slowest = threshold([point for point, _, _ in known], metric, statistic)
    caption = "Each dot is the run at a capacity; upper right is better."
    right, top = 1.12 * max(values[:, 0].max(), 1 / slowest if slowest else 0), 1.12 * values[:, 1].max()
    if slowest is not None:
        figure.add_scatter(
            x=[1 / slowest, right, right, 1 / slowest], y=[0, 0, top, top], mode="lines", fill="toself",
            name="within the SLO", line={"width": 0, "color": GOOD}, fillcolor=faded(GOOD, 0.13), hoverinfo="skip",
        )  # fmt: skip
        caption += f" Shaded: within the SLO, {statistic}_{metric}<={slowest:g}s."
    for i, group in enumerate(dict.fromkeys(point.group for point, _, _ in known)):
        mine = [k for k, (point, _, _) in enumerate(known) if point.group == group]
        figure.add_scatter(
            x=values[mine, 0], y=values[mine, 1], ids=[names[k] for k in mine], mode="markers",
            name=group or "searches",
            marker={"color": series_style(i)[0], "opacity": 1, "size": [11 if front[k] else 7 for k in mine],
                    "line": {"color": "white", "width": 1}},
            hovertemplate="%{id}<br>%{y:.4~r} tokens/s and GPU<br>%{x:.3~r} tokens/s and user<extra></extra>",
        )  # fmt: skip
    steps = [k for k in np.argsort(values[:, 0], kind="stable") if front[k]]
    if len(steps) > 1:
        x, y, ids = values[steps, 0], values[steps, 1], [names[k] for k in steps]
        add_line(figure, x, y, "front", GREY, "", width=1.5, dash="dot", line_shape="vh", ids=ids)
        caption += " Dotted: those that no other beats in both."
    figure.update_layout(hovermode="closest")
    figure.update_xaxes(title_text=unit, **(value_axis(values[:, 0]) | {"type": "linear", "range": [0, right]}))
    figure.update_yaxes(title_text="Output tokens/s and GPU", range=[0, top], nticks=6)
    return Panel(title, caption, figure, "half", 380)


def trials(searches: Sequence[Search], colours: Mapping[str, str] | None = None) -> Panel:
    """Draw value over threshold at each rate: of each SLO for one search, of the binding one for several."""
    figure = new_figure()
    own = colours or {search.name: series_style(i)[0] for i, search in enumerate(searches)}
    several = len(searches) > 1
    known = [_margins(trial, search.name if several else None) for search in searches for trial in search.trials]
    finite = [margin for margins in known for margin in margins.values() if margin]
    top = 1.5 * max([1.0, *finite])
    for search in searches:
        lines: dict[str, list[tuple[float, float]]] = {}
        for trial in search.trials:
            for slo, margin in _margins(trial, search.name if several else None).items():
                lines.setdefault(slo, []).append((trial.rate, max(margin, top / _SPAN)))
        for i, (slo, found) in enumerate(lines.items()):
            colour = own[search.name] if several else series_style(i)[0]
            rates, values = zip(*found, strict=True)
            hover = "%{x:.4~r} requests/s: %{y:.3~r} times the threshold"
            marker = {"size": 7, "color": colour}
            add_line(figure, rates, values, slo, colour, hover, width=1.8, mode="lines+markers", marker=marker)
    given_up = [(search, trial) for search in searches for trial in search.trials if trial.stopped_early]
    if given_up:
        figure.add_scatter(
            x=[trial.rate for _, trial in given_up], y=[top] * len(given_up), name="given up", mode="markers",
            ids=[f"{search.name}: {trial.stopped_early}" for search, trial in given_up],
            marker={"symbol": "x", "size": 8, "color": GREY},
            hovertemplate="%{id} can't be met at %{x:.4~r} requests/s<extra></extra>",
        )  # fmt: skip
    for search in searches:
        if search.point.outcome == "found" and search.point.qps:
            name, colour = (f"capacity of {search.name}", own[search.name]) if several else ("capacity", GREY)
            hover = f"capacity: {search.point.qps:.4g} requests/s<extra></extra>"
            ends = [search.point.qps] * 2, [top / _SPAN / 2, 2 * top]
            add_line(figure, *ends, name, colour, hover, width=1.5, dash="dash", showlegend=not several)
    shown = np.array([*(max(each, top / _SPAN) for each in finite), 1.0, top])
    tried = np.array([trial.rate for search in searches for trial in search.trials])
    near = [search.point.qps for search in searches if search.point.outcome == "found" and search.point.qps]
    seen = (tried > min(near) / _NEAR) & (tried < max(near) * _NEAR) if near else tried > 0
    span = value_axis(tried[seen], logarithmic=True)
    figure.add_hline(y=1, line={"color": GREY, "width": 1.2, "dash": "dot"})
    figure.update_xaxes(title_text="Request rate (requests/s)", **span)
    figure.update_yaxes(title_text="Value / threshold", **value_axis(shown, logarithmic=True))
    figure.update_layout(hovermode="closest")
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


def names_of_points(points: Sequence[Point]) -> list[str]:
    """Return each point's name; with its sweep's where several sweeps have points."""
    several = len({point.group for point in points}) > 1
    return [f"{point.group}: {point.name}" if several and point.group else point.name for point in points]


def _name_axis(figure: go.Figure, points: Sequence[Point]) -> None:
    """Label the bars, from top to bottom; long names without their middle. What has no bar says why."""
    names = names_of_points(points)
    half = _LONGEST_NAME // 2
    words = [
        (name if len(name) <= _LONGEST_NAME else f"{name[:half]}\N{HORIZONTAL ELLIPSIS}{name[-half:]}")
        + (f" ({point.status})" if point.qps is None else "")
        for name, point in zip(names, points, strict=True)
    ]
    figure.update_yaxes(autorange="reversed", showgrid=False, ticksuffix="  ", tickvals=names, ticktext=words)
