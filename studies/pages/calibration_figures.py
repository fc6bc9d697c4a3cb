"""The figures of a device's calibration: each function draws a part of a KindRecord."""

from __future__ import annotations

from typing import Any

import numpy as np

from studies.calibration.kinds import page_of
from studies.calibration.record import KindRecord, SizeErrors
from studies.pages.figures import (
    BAD,
    BLUE,
    GOOD,
    GREY,
    ORANGE,
    Panel,
    Points,
    new_figure,
    predicted_by_measured,
    value_axis,
)
from studies.words import percent

_COLOURS = (BLUE, ORANGE, GOOD, "#8e6bbf")


def panels(kind: KindRecord) -> list[Panel]:
    """The figures of a kind; none where nothing measured is at hand."""
    if kind.scatter is None or kind.by_size is None:
        return []
    found = [_scatter(kind), _by_size(kind, kind.by_size)]
    return [*found, _efficiency(kind)] if kind.efficiency else found


def _scatter(kind: KindRecord) -> Panel:
    points = kind.scatter
    assert points is not None
    figure = predicted_by_measured([Points("", BLUE, 1e3 * points.measured_s, 1e3 * points.predicted_s)])
    shown = len(points.measured_s)
    some = "" if shown == points.total else f", {shown:,} of them drawn"
    share = points.fitted / points.total
    origin = (
        "all in-sample"
        if share == 1
        else "none used in the fit" if share == 0 else f"{percent(share)} of them in-sample"
    )  # fmt: skip
    caption = f"{points.total:,} rows of {' and '.join(points.devices)}{some}: {origin}. Dashed: predicted as measured."
    return Panel("Measured and predicted", caption, figure, "third", 320)


def _by_size(kind: KindRecord, errors: SizeErrors) -> Panel:
    figure = new_figure()
    for name, values, colour in (
        ("P95", errors.p95, GREY),
        ("median", errors.median, BLUE),
        ("bias", errors.bias, BAD),
    ):
        figure.add_scatter(
            x=1e3 * errors.centre_s, y=100 * values, name=name, mode="lines+markers", marker={"size": 6},
            line={"color": colour, "width": 2, **({"dash": "dot"} if name == "bias" else {})},
            hovertemplate="%{y:.3~r} %",
        )  # fmt: skip
    figure.add_hline(y=0, line={"color": GREY, "width": 1})
    figure.update_xaxes(title_text="Measured time (ms)", **value_axis(1e3 * errors.centre_s))
    figure.update_yaxes(title_text="Error (%)", nticks=7)
    points = kind.scatter
    rows = "the same rows" if points is None or points.fitted < points.total else "the same rows, in-sample"
    fewest, most = errors.count.min(), errors.count.max()
    caption = f"Absolute error, median and P95, and signed mean of {rows}; {fewest:,.0f} to {most:,.0f} a point."
    return Panel("Error by size", caption, figure, "third", 320)


def _efficiency(kind: KindRecord) -> Panel:
    page = page_of(kind.kind)
    collective = page.moved is not None
    scale = 1e-9 if collective else 100.0
    figure = new_figure()
    for curve, colour in zip(kind.efficiency, _COLOURS, strict=False):
        group = {"legendgroup": curve.label, "x": curve.size}
        figure.add_scatter(
            y=scale * curve.predicted, name=curve.label, mode="lines", line={"color": colour, "width": 2},
            hovertemplate="%{y:.3~r} predicted", **group,
        )  # fmt: skip
        figure.add_scatter(
            y=scale * curve.measured, name=curve.label, mode="markers", marker={"color": colour, "size": 4.5},
            showlegend=False, hovertemplate="%{y:.3~r} measured", **group,
        )  # fmt: skip
    every = np.concatenate([curve.size for curve in kind.efficiency])
    top = scale * max(float(max(curve.measured.max(), curve.predicted.max())) for curve in kind.efficiency)
    figure.update_xaxes(title_text=page.size, **_size_axis(every))
    title = "Bandwidth (GB/s)" if collective else "Share of the roofline (%)"
    figure.update_yaxes(title_text=title, range=[0, 1.06 * top])
    figure.update_layout(hovermode="closest", legend={"font": {"size": 11}})
    if collective:
        title, caption = "Bandwidth by size", f"Points: measured; lines: predicted. Height: {page.moved} over the time."
    else:
        title = "Efficiency by size"
        caption = f"The roofline over the time, for a few shapes ({page.shapes}). Points: measured; lines: predicted."
        caption += " Above 100 %: data that the cache still held." * (page.cached and top > 100)
    return Panel(title, caption, figure, "third", 320)


def _size_axis(values: Any) -> dict[str, Any]:
    """A logarithmic axis of counts, with short tick labels."""
    low, high = np.log10(float(values.min()) / 1.2), np.log10(float(values.max()) * 1.2)
    decades = np.arange(np.ceil(low), np.floor(high) + 1)
    step = max(1, round(len(decades) / 5))
    ticks = decades[::step]
    units = {0: "", 1: "k", 2: "M", 3: "G"}
    words = [f"{10 ** (tick % 3):g}{units[int(tick // 3)]}" for tick in ticks]
    return {"type": "log", "range": [low, high], "tickvals": list(10.0**ticks), "ticktext": words}
