"""The page about a device's calibration: held-out errors, and measurements beside predictions. One offline HTML file.

What is drawn is extracted in `studies.calibration.record`.

    windtunnel calibrate report --device a40 --source vidur:DIR --output a40.html
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.specs import DeviceSpec
from simulator.predictor.calibration import Calibration
from studies.calibration.kinds import KindPage
from studies.calibration.record import Drawn, Efficiency, KindRecord, lacking, read_calibration
from studies.pages.figures import BAD, BLUE, GREY, SERIES, Panel, add_line, against_measured, new_figure, value_axis
from studies.pages.page import Page, Tone, details, facts_table, numbers_table, text
from studies.words import ERROR_HEADS, error_cells, percent

if TYPE_CHECKING:
    import pandas as pd

_HELD_OUT = (
    "The errors in the table and on the cards are of data that was held out: each part was left out of the fit, and "
    "predicted by what was learned from the rest."
)
_IN_SAMPLE = (
    "The figures show the calibration as it is used, which was fitted to everything: points from tables that it was "
    "fitted to are in-sample, and lie closer to the line than those of a shape that it never saw."
)


def write_calibration_report(
    calibration: Calibration, device: DeviceSpec, frames: Sequence[pd.DataFrame], path: Path
) -> Path:
    """Write the page to `path` and return it; `frames` are measured tables to draw, and may be none."""
    kinds = read_calibration(calibration, frames)
    page = Page(f"Calibration of {device.name}")
    _header(page, device, kinds, lacking(calibration))
    page.cards(
        (kind.page.name, percent(kind.record["held_out"].get("mape")),
         f"mean held-out error; {kind.page.left_out(kind.record).split(';')[0]} left out")
        for kind in kinds
    )  # fmt: skip
    page.add(_table(kinds))
    for kind in kinds:
        page.add_panels(kind.page.name, panels(kind), *_about(kind))
    page.add("<h2>Where the numbers come from</h2>" + "".join(map(_provenance, kinds)))
    return page.write(path)


def _header(page: Page, device: DeviceSpec, kinds: Sequence[KindRecord], missing: Sequence[str]) -> None:
    here = [kind.page.name for kind in kinds if not kind.carried_over]
    lines: list[tuple[Tone, str]] = [("good", f"Measured on {device.name}: {_lower(here)}")] if here else []
    for other in sorted({kind.record["learned_on"] for kind in kinds if kind.carried_over}):
        names = [kind.page.name for kind in kinds if kind.carried_over and kind.record["learned_on"] == other]
        lines.append(("unsure", f"Carried over from {other}, by the ratio of the rooflines: {_lower(names)}"))
    if missing:
        lines.append(("bad", f"Not measured, estimated from the data sheet: {_lower(missing)}"))
    rows = sum(kind.record["provenance"]["rows"] for kind in kinds)
    software = sorted({name for kind in kinds for name in kind.record["provenance"]["software"]})
    from_ = sorted({source.split(" ")[0] for kind in kinds for source in kind.record["provenance"]["sources"]})
    setting = f"""How long its operators take, learned from {rows:,} measurements of
{" and ".join(from_)} ({"; ".join(software) or "software unknown"})."""
    sources: list[tuple[Tone, str, str]] = [("good", "Held out", _HELD_OUT)]
    if any(kind.drawn for kind in kinds):
        sources.append(("unsure", "In-sample", _IN_SAMPLE))
    kicker = f"Windtunnel · calibration of {device.name}"
    page.header(kicker, setting, lines, sources, title=device.description)


def _lower(names: Sequence[str]) -> str:
    return ", ".join(name[0].lower() + name[1:].replace(", ", " ") for name in names)


def _table(kinds: Sequence[KindRecord]) -> str:
    heads = ("Operator", "Measured on", "Rows", *ERROR_HEADS, "Mean over 20 µs", "Interval covers")
    rows = []
    for kind in kinds:
        held_out, interval = kind.record["held_out"], kind.record["interval"]
        cells = [
            kind.record["learned_on"],
            f"{kind.record['provenance']['rows']:,}",
            *error_cells(held_out),
            percent(held_out.get("over_20us", {}).get("mape")),
            f"{100 * interval['covers']:.0f} of {100 * interval['meant_to_cover']:.0f} %",
        ]
        rows.append((kind.page.name, cells))
    return f"""<h2>Errors on held-out data</h2>
<section class='panel'><p>Absolute error of the predicted time as a share of the measured one; the bias keeps its sign
(positive: predicted too long). Interval: how many of the held-out measurements lie in their prediction interval, and
how many are meant to.</p>
{numbers_table(heads, rows)}</section>"""


def _about(kind: KindRecord) -> tuple[str, str]:
    """Return words and HTML about a kind."""
    held_out, provenance, device = kind.record["held_out"], kind.record["provenance"], kind.record["learned_on"]
    where = f"{'Carried over from' if kind.carried_over else 'Measured on'} {device}"
    others = [name for name in provenance["measured_on"] if name != device]
    where += f" and {', '.join(others)}" if others else ""
    groups = held_out.get("groups_over_20us", {})
    folds = f"{kind.page.left_out(kind.record)}, in {held_out['folds']} folds"
    words = [f"{where}: {provenance['rows']:,} rows. Held out: {folds}."]
    if groups.get("worst") is not None:
        words.append(f"The worst of {groups['count']:,} is {groups['worst_is']}, with {percent(groups['worst'])}.")
    if len(kind.range_words) == 1:
        return " ".join([*words, f"Calibrated range: {kind.range_words[0]}."]), ""
    lines = "".join(f"<li>{text(line)}</li>" for line in kind.range_words)
    html = (
        "<details style='margin:0 0 12px'><summary>Calibrated range</summary>"
        f"<ul style='margin:8px 0 0;padding-left:20px'>{lines}</ul></details>"
    )
    return " ".join(words), html


def _provenance(kind: KindRecord) -> str:
    facts = kind.record["provenance"]
    spread = facts["median_relative_spread"]
    lines = [
        ("measured on", ", ".join(facts["measured_on"])),
        ("software", "; ".join(facts["software"]) or "unknown"),
        *((what, ", ".join(facts[key]) or "unknown")
          for what, key in (("kernels", "kernels"), ("numbers", "dtypes"), ("dates", "dates"))),
        ("spread of repeats", "unknown" if spread is None else f"{percent(spread)} (median)"),
        ("sources", "; ".join(facts["sources"])),
    ]  # fmt: skip
    return details(kind.page.name, facts_table(lines))


_COLOURS = (*SERIES[:3], "#8e6bbf")


def panels(kind: KindRecord) -> list[Panel]:
    """Return the figures of a kind; none where nothing measured is at hand."""
    if (drawn := kind.drawn) is None:
        return []
    found = [_scatter(drawn), _by_size(drawn)]
    return [*found, _efficiency(kind.page, drawn.efficiency)] if drawn.efficiency else found


def _scatter(points: Drawn) -> Panel:
    figure = against_measured([("", BLUE, 1e3 * points.measured_s, 1e3 * points.predicted_s)])
    shown = len(points.measured_s)
    some = "" if shown == points.total else f", {shown:,} of them drawn"
    share = points.fitted / points.total
    origin = {1.0: "all in-sample", 0.0: "none used in the fit"}.get(share, f"{percent(share)} of them in-sample")
    caption = f"{points.total:,} rows of {' and '.join(points.devices)}{some}: {origin}. Dashed: predicted as measured."
    return Panel("Measured and predicted", caption, figure, "third", 320)


def _by_size(points: Drawn) -> Panel:
    errors = points.by_size
    figure = new_figure(y="Error (%)", yaxis_nticks=7)
    how: dict[str, Any] = {"mode": "lines+markers", "marker": {"size": 6}}
    for name, values, hue in (("P95", errors.p95, GREY), ("median", errors.median, BLUE), ("bias", errors.bias, BAD)):
        how["dash"] = "dot" if name == "bias" else "solid"
        add_line(figure, 1e3 * errors.centre_s, 100 * values, name, hue, "%{y:.3~r} %", **how)
    figure.add_hline(y=0, line={"color": GREY, "width": 1})
    figure.update_xaxes(title_text="Measured time (ms)", **value_axis(1e3 * errors.centre_s))
    rows = "the same rows" if points.fitted < points.total else "the same rows, in-sample"
    fewest, most = errors.count.min(), errors.count.max()
    caption = f"Absolute error, median and P95, and signed mean of {rows}; {fewest:,.0f} to {most:,.0f} a point."
    return Panel("Error by size", caption, figure, "third", 320)


def _efficiency(page: KindPage, curves: Sequence[Efficiency]) -> Panel:
    collective = page.moved is not None
    scale = 1e-9 if collective else 100.0
    figure = new_figure(hovermode="closest", legend_font_size=11)
    for curve, colour in zip(curves, _COLOURS, strict=False):
        label, hover = curve.label, "%{y:.3~r} predicted"
        add_line(figure, curve.size, scale * curve.predicted, label, colour, hover, legendgroup=label)
        figure.add_scatter(
            x=curve.size, y=scale * curve.measured, name=label, mode="markers", marker={"color": colour, "size": 4.5},
            showlegend=False, hovertemplate="%{y:.3~r} measured", legendgroup=label,
        )  # fmt: skip
    every = np.concatenate([curve.size for curve in curves])
    top = scale * max(float(max(curve.measured.max(), curve.predicted.max())) for curve in curves)
    figure.update_xaxes(title_text=page.size, **_size_axis(every))
    title = "Bandwidth (GB/s)" if collective else "Share of the roofline (%)"
    figure.update_yaxes(title_text=title, range=[0, 1.06 * top])
    if collective:
        title, caption = "Bandwidth by size", f"Points: measured; lines: predicted. Height: {page.moved} over the time."
    else:
        title = "Efficiency by size"
        caption = f"The roofline over the time, for a few shapes ({page.shapes}). Points: measured; lines: predicted."
        caption += " Above 100 %: data that the cache still held." * (page.cached and top > 100)
    return Panel(title, caption, figure, "third", 320)


def _size_axis(values: Any) -> dict[str, Any]:
    """Return a logarithmic axis of counts, with short tick labels."""
    low, high = np.log10(float(values.min()) / 1.2), np.log10(float(values.max()) * 1.2)
    decades = np.arange(np.ceil(low), np.floor(high) + 1)
    step = max(1, round(len(decades) / 5))
    ticks = decades[::step]
    units = {0: "", 1: "k", 2: "M", 3: "G"}
    words = [f"{10 ** (tick % 3):g}{units[int(tick // 3)]}" for tick in ticks]
    return {"type": "log", "range": [low, high], "tickvals": list(10.0**ticks), "ticktext": words}
