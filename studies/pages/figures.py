"""What the figures of every page share: colours, an empty figure, axes, and measured values beside predicted ones.

Colours of text and grid are left to the page, which knows whether it is light or dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go

from engine.results.tables import Array
from studies.capacity.sweep import not_dominated

# told apart with any colour vision, and on a light ground as on a dark one
BLUE, ORANGE, GREY = "#3f88c5", "#e07b20", "#8a94a0"
GOOD, BAD = "#1f9e77", "#d6453d"
# of several runs, one after the other; when they are used up, the next dash
SERIES = (BLUE, ORANGE, GOOD, "#b0559b", "#b8960c", "#7a6ad8")
BOUND = {"color": GREY, "width": 1.3, "dash": "dash"}  # the line of an SLO
LEAST_TICKS = 4  # of a logarithmic axis
TICK_STEPS = (  # in a decade
    (1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.4, 1.7, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9),
    tuple(np.arange(10, 100) / 10),
)  # fmt: skip
AXIS = {"zeroline": False, "title": {"standoff": 8, "font": {"size": 12.5}}}
X_AXIS = {**AXIS, "showgrid": False, "showline": True, "ticks": "outside", "ticklen": 4, "hoverformat": ".4~r"}
Y_AXIS = {**AXIS, "automargin": True}
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")


@dataclass(frozen=True, eq=False)
class Panel:
    """A figure or a table (HTML) with its words. Without either the caption stands alone."""

    title: str
    caption: str
    figure: go.Figure | None = None
    width: Literal["third", "half", "full"] = "full"
    height_px: int = 300
    table: str = ""


Points = tuple[str, str, Array, Array]  # of a group: name ("": none), colour, measured and predicted values (ms)


def new_figure(legend: bool = True, x: str = "", y: str = "", **more: Any) -> go.Figure:
    """Return a figure without data in the pages' style, with titles of its axes, and more of a layout."""
    layout = {  # all at once: a figure takes ten times as long to update as to make
        "template": "none",
        "margin": {"l": 44, "r": 14, "t": 34 if legend else 10, "b": 46},
        "showlegend": legend,
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "itemclick": False,
                   "itemdoubleclick": False, "traceorder": "normal"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hovermode": "x unified",
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 12.5},
        "xaxis": X_AXIS,
        "yaxis": Y_AXIS,
    }  # fmt: skip
    titles = {f"{axis}axis_title_text": title for axis, title in (("x", x), ("y", y)) if title}
    return go.Figure(layout={**layout, **titles, **more})


def style_axes(figure: go.Figure) -> None:
    """Give every axis that the figure has the pages' style."""
    figure.update_xaxes(**X_AXIS)
    figure.update_yaxes(**Y_AXIS)


def value_axis(values: Array, logarithmic: bool = False) -> dict[str, Any]:
    """Return an axis for positive values: from 0, but logarithmic where they span a factor over 20 or if asked."""
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    if not len(values) or (high <= 20 * low and not logarithmic):
        return {"range": [0, 1.06 * high], "nticks": 6}
    low, high = low / 1.15, high * 1.15
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    coarsest = 0 if high / low > 2e3 else 1 if high / low > 100 else 2
    for steps in TICK_STEPS[coarsest:]:
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        shown = [tick for tick in ticks if low <= tick <= high]
        if len(shown) >= LEAST_TICKS:
            break
    return {
        "type": "log",
        "range": [np.log10(low), np.log10(high)],
        "tickvals": shown,
        "ticktext": [f"{tick:g}" if tick < 1e5 else f"{tick:.0e}" for tick in shown],
    }


def unit_of(longest_s: float) -> tuple[float, str]:
    """Return seconds and name of the unit that suits an axis of time."""
    return next((each for each in ((3600.0, "h"), (60.0, "min")) if longest_s >= 10 * each[0]), (1.0, "s"))


def add_line(
    figure: go.Figure, x: Any, y: Any, name: str | None, colour: str, hover: str, *, width: float = 2,
    dash: str = "solid", mode: str = "lines", **more: Any,
) -> None:  # fmt: skip
    """Draw a line; `hover` is what is shown of a point, and "" shows nothing."""
    how = {"hovertemplate": hover} if hover else {"hoverinfo": "skip"}
    line = {"color": colour, "width": width, "dash": dash}
    figure.add_scatter(x=x, y=y, name=name, mode=mode, line=line, **how, **more)


def add_front(figure: go.Figure, values: Array, less: int = 1, name: str = "front") -> list[int]:
    """Draw the front of points (n, 2), which none beats in both, and return its points from left to right.

    `less` is 1 where less is better, -1 where more is. A front of a single point is not drawn.
    """
    on = not_dominated(less * values)
    front = [i for i in np.argsort(values[:, 0], kind="stable").tolist() if on[i]]
    if len(front) > 1:
        shape = "hv" if less > 0 else "vh"
        add_line(figure, values[front, 0], values[front, 1], name, GREY, "", width=1.5, dash="dot", line_shape=shape)
    return front


def against_measured(groups: Sequence[Points], logarithmic: bool = False) -> go.Figure:
    """Return each group's predicted values over the measured ones, with the line on which they are the same."""
    axis = value_axis(np.concatenate([each for group in groups for each in group[2:]]), logarithmic)
    low, high = (10.0**edge if axis.get("type") == "log" else edge for edge in axis["range"])
    figure = new_figure(any(name for name, *_ in groups), hovermode="closest")
    for name, colour, measured_ms, predicted_ms in groups:
        figure.add_scatter(
            x=measured_ms, y=predicted_ms, mode="markers", showlegend=False,
            marker={"color": faded(colour, 0.45), "size": 4},
            hovertemplate="measured %{x:.3~r} ms<br>predicted %{y:.3~r} ms<extra></extra>",
        )  # fmt: skip
        if name:  # in the legend a marker that can be seen
            figure.add_scatter(x=[None], y=[None], name=name, mode="markers", marker={"color": colour, "size": 8})
    add_line(figure, [low, high], [low, high], None, GREY, "", width=1.2, dash="dash", showlegend=False)
    figure.update_xaxes(title_text="Measured (ms)", **axis)
    figure.update_yaxes(title_text="Predicted (ms)", **axis)
    return figure


def style_of(index: int) -> tuple[str, str]:
    """Return colour and dash of one of several runs."""
    return SERIES[index % len(SERIES)], DASHES[index // len(SERIES) % len(DASHES)]


def faded(colour: str, opacity: float) -> str:
    """Return the colour with some of the ground showing through."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity:g})"
