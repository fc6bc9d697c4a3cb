"""The page about a device's calibration: held-out errors, and measurements beside predictions. One offline HTML file.

The record is extracted in `studies.calibration_record`; the page around the figures is that of a run's report.

    windtunnel calibrate report --device a40 --source vidur:DIR --output a40.html
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np
from plotly.offline import get_plotlyjs

from engine import catalog
from engine.specs import DeviceSpec
from simulator.predictor import calibration as store
from simulator.predictor.calibration import Calibration
from studies.calibration_record import CalibrationRecord, KindRecord, SizeErrors, read_calibration
from studies.report import _PAGE, _card, _panel, _text
from studies.report_figures import BAD, BLUE, GOOD, GREY, ORANGE, Panel, _faded, _figure, _value_axis

if TYPE_CHECKING:
    import pandas as pd

_COLOURS = (BLUE, ORANGE, GOOD, "#8e6bbf")
_SIZES = {
    "gemm": "Rows m",
    "elementwise": "Bytes moved",
    "attention_prefill": "Chunk (tokens)",
    "attention_decode": "KV tokens of the batch",
    "all_reduce": "Bytes on each rank",
    "send": "Bytes",
}
_HELD_OUT = (
    "The errors in the table and on the cards are of data that was held out: each part was left out of the fit, and "
    "predicted by what was learned from the rest."
)
_IN_SAMPLE = (
    "The figures show the calibration as it is used, which was fitted to everything: points from tables that it was "
    "fitted to are in-sample, and lie closer to the line than those of a shape that it never saw."
)


def report(device_name: str, frames: Sequence[pd.DataFrame], path: Path) -> Path:
    """The page of a device's calibration as it ships."""
    device = catalog.device(device_name)
    return write_calibration_report(store.load(store.FOLDER / device.name, device), device, frames, path)


def write_calibration_report(
    calibration: Calibration, device: DeviceSpec, frames: Sequence[pd.DataFrame], path: Path
) -> Path:
    """Write the page to `path` and return it; `frames` are measured tables to draw, and may be none."""
    html = render(read_calibration(calibration, device, frames))
    unfinished = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished.write_text(html, encoding="utf-8")
    return unfinished.replace(path)


def render(record: CalibrationRecord) -> str:
    """The page."""
    body = [_header(record), _cards(record), _table(record)]
    figures: dict[str, Any] = {}
    for kind in record.kinds:
        body.append(f"<h2>{escape(kind.name)}</h2>{_about(kind)}")
        drawn = {f"{kind.kind}-{i}": panel for i, panel in enumerate(panels(kind))}
        if drawn:
            sections = "".join(_panel(panel, name) for name, panel in drawn.items())
            body.append(f"<div class='panels'>{sections}</div>")
        figures |= {name: panel.figure for name, panel in drawn.items()}
    body.append(_provenance(record))
    # "<" could end the script element early, and in JSON may be written otherwise
    data = ",".join(f"{json.dumps(name)}:{figure.to_json()}" for name, figure in figures.items())
    return Template(_PAGE.read_text(encoding="utf-8")).substitute(
        title=escape(f"Calibration of {record.device.name} · Windtunnel"),
        body="\n".join(body),
        figures="{" + data.replace("<", "\\u003c") + "}",
        plotly=get_plotlyjs(),
    )


# -- words and numbers ---------------------------------------------------------------------------------------------


def _header(record: CalibrationRecord) -> str:
    here = [kind.name for kind in record.kinds if not kind.carried_over]
    lines = [("good", f"Measured on {record.device.name}: {_lower(here)}")] if here else []
    for device in sorted({kind.learned_on for kind in record.kinds if kind.carried_over}):
        names = [kind.name for kind in record.kinds if kind.carried_over and kind.learned_on == device]
        lines.append(("unsure", f"Carried over from {device}, by the ratio of the rooflines: {_lower(names)}"))
    if record.lacking:
        lines.append(("bad", f"Not measured, estimated from the data sheet: {_lower(record.lacking)}"))
    verdicts = "".join(f"<li class='{tone}'>{_text(text)}</li>" for tone, text in lines)
    rows = sum(kind.rows for kind in record.kinds)
    software = sorted({name for kind in record.kinds for name in kind.provenance["software"]})
    from_ = sorted({source.split(" ")[0] for kind in record.kinds for source in kind.provenance["sources"]})
    drawn = any(kind.scatter for kind in record.kinds)
    return f"""<header>
<p class='kicker'>Windtunnel · calibration of {escape(record.device.name)}</p>
<h1>{escape(record.device.description)}</h1>
<p class='setting'>How long its operators take, learned from {rows:,} measurements of
{escape(" and ".join(from_))} ({escape("; ".join(software) or "software unknown")}).</p>
<ul class='verdicts'>{verdicts}</ul>
<p class='source'><b class='good'>Held out</b> {_text(_HELD_OUT)}</p>
{f"<p class='source'><b class='unsure'>In-sample</b> {_text(_IN_SAMPLE)}</p>" if drawn else ""}
</header>"""


def _lower(names: Sequence[str]) -> str:
    return ", ".join(name[0].lower() + name[1:].replace(", ", " ") for name in names)


def _percent(value: float | None, sign: bool = False) -> str:
    """A fraction as a percentage; or none."""
    if value is None:
        return "none"
    return f"{100 * value:{'+' if sign else ''}.1f} %"


def _cards(record: CalibrationRecord) -> str:
    cards = [
        (
            kind.name,
            _percent(kind.held_out.get("mape")),
            f"mean held-out error; {kind.left_out.split(';')[0]} left out",
        )
        for kind in record.kinds
    ]
    return "<dl class='cards'>" + "".join(map(_card, cards)) + "</dl>"


def _table(record: CalibrationRecord) -> str:
    heads = ("Measured on", "Rows", "Mean", "Median", "P95", "Bias", "Mean over 20 µs", "Interval covers")
    rows = []
    for kind in record.kinds:
        held_out = kind.held_out
        cells = [
            kind.learned_on,
            f"{kind.rows:,}",
            *(_percent(held_out.get(name), name == "bias") for name in ("mape", "p50", "p95", "bias")),
            _percent(held_out.get("over_20us", {}).get("mape")),
            f"{100 * kind.covers:.0f} of {100 * kind.meant_to_cover:.0f} %",
        ]
        values = "".join(f"<td>{_text(cell)}</td>" for cell in cells)
        rows.append(f"<tr><th scope='row'>{escape(kind.name)}</th>{values}</tr>")
    head = "".join(f"<th scope='col'>{escape(name)}</th>" for name in heads)
    return f"""<h2>Errors on held-out data</h2>
<section class='panel'><p>Absolute error of the predicted time as a share of the measured one; the bias keeps its sign
(positive: predicted too long). Interval: how many of the held-out measurements lie in their prediction interval, and
how many are meant to.</p>
<div class='scroll'><table class='numbers'><thead><tr><th>Operator</th>{head}</tr></thead>
<tbody>{"".join(rows)}</tbody></table></div></section>"""


def _about(kind: KindRecord) -> str:
    held_out = kind.held_out
    where = f"Carried over from {kind.learned_on}" if kind.carried_over else f"Measured on {kind.learned_on}"
    others = [name for name in kind.provenance["measured_on"] if name != kind.learned_on]
    where += f" and {', '.join(others)}" if others else ""
    groups = held_out.get("groups_over_20us", {})
    words = [f"{where}: {kind.rows:,} rows. Held out: {kind.left_out}, in {held_out['folds']} folds."]
    if groups.get("worst") is not None:
        words.append(f"The worst of {groups['count']:,} is {groups['worst_is']}, with {_percent(groups['worst'])}.")
    if len(kind.range_words) == 1:
        words.append(f"Calibrated range: {kind.range_words[0]}.")
        return f"<p class='source' style='margin:0 0 10px'>{_text(' '.join(words))}</p>"
    lines = "".join(f"<li>{_text(line)}</li>" for line in kind.range_words)
    return (
        f"<p class='source' style='margin:0 0 10px'>{_text(' '.join(words))}</p><details style='margin:0 0 12px'>"
        f"<summary>Calibrated range</summary><ul style='margin:8px 0 0;padding-left:20px'>{lines}</ul></details>"
    )


def _provenance(record: CalibrationRecord) -> str:
    blocks = []
    for kind in record.kinds:
        facts = kind.provenance
        spread = facts["median_relative_spread"]
        lines = [
            ("measured on", ", ".join(facts["measured_on"])),
            ("software", "; ".join(facts["software"]) or "unknown"),
            ("kernels", ", ".join(facts["kernels"]) or "unknown"),
            ("numbers", ", ".join(facts["dtypes"]) or "unknown"),
            ("dates", ", ".join(facts["dates"]) or "unknown"),
            ("spread of repeats", "unknown" if spread is None else f"{_percent(spread)} (median)"),
            ("sources", "; ".join(facts["sources"])),
        ]
        cells = "".join(f"<tr><th scope='row'>{name}</th><td>{_text(value)}</td></tr>" for name, value in lines)
        blocks.append(
            f"<details><summary>{escape(kind.name)}</summary><div class='scroll'><table><tbody>{cells}</tbody></table>"
            "</div></details>"
        )
    return f"<h2>Where the numbers come from</h2>{''.join(blocks)}<footer>Windtunnel</footer>"


# -- figures -------------------------------------------------------------------------------------------------------


def panels(kind: KindRecord) -> list[Panel]:
    """The figures of a kind; none where nothing measured is at hand."""
    if kind.scatter is None or kind.by_size is None:
        return []
    found = [_scatter(kind), _by_size(kind, kind.by_size)]
    return [*found, _efficiency(kind)] if kind.efficiency else found


def _scatter(kind: KindRecord) -> Panel:
    points = kind.scatter
    assert points is not None
    measured, predicted = 1e3 * points.measured_s, 1e3 * points.predicted_s
    axis = _value_axis(np.concatenate([measured, predicted]))
    low, high = (10.0**edge if axis.get("type") == "log" else edge for edge in axis["range"])
    figure = _figure(legend=False)
    figure.add_scatter(
        x=measured, y=predicted, mode="markers", marker={"color": _faded(BLUE, 0.45), "size": 4},
        hovertemplate="measured %{x:.3~r} ms<br>predicted %{y:.3~r} ms<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=[low, high], y=[low, high], mode="lines", line={"color": GREY, "width": 1.2, "dash": "dash"}, hoverinfo="skip"
    )
    figure.update_layout(hovermode="closest")
    figure.update_xaxes(title_text="Measured (ms)", **axis)
    figure.update_yaxes(title_text="Predicted (ms)", **axis)
    shown = len(points.measured_s)
    some = "" if shown == points.total else f", {shown:,} of them drawn"
    share = points.fitted / points.total
    origin = (
        "all in-sample"
        if share == 1
        else "none used in the fit" if share == 0 else f"{_percent(share)} of them in-sample"
    )  # fmt: skip
    caption = f"{points.total:,} rows of {' and '.join(points.devices)}{some}: {origin}. Dashed: predicted as measured."
    return Panel("Measured and predicted", caption, figure, "third", 320)


def _by_size(kind: KindRecord, errors: SizeErrors) -> Panel:
    figure = _figure()
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
    figure.update_xaxes(title_text="Measured time (ms)", **_value_axis(1e3 * errors.centre_s))
    figure.update_yaxes(title_text="Error (%)", nticks=7)
    points = kind.scatter
    rows = "the same rows" if points is None or points.fitted < points.total else "the same rows, in-sample"
    fewest, most = errors.count.min(), errors.count.max()
    caption = f"Absolute error, median and P95, and signed mean of {rows}; {fewest:,.0f} to {most:,.0f} a point."
    return Panel("Error by size", caption, figure, "third", 320)


def _efficiency(kind: KindRecord) -> Panel:
    collective = kind.kind in ("all_reduce", "send")
    scale = 1e-9 if collective else 100.0
    figure = _figure()
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
    figure.update_xaxes(title_text=_SIZES[kind.kind], **_size_axis(every))
    title = "Bandwidth (GB/s)" if collective else "Share of the roofline (%)"
    figure.update_yaxes(title_text=title, range=[0, 1.06 * top])
    figure.update_layout(hovermode="closest", legend={"font": {"size": 11}})
    if collective:
        moved = "bytes that each rank sends in a ring" if kind.kind == "all_reduce" else "bytes"
        title, caption = "Bandwidth by size", f"Points: measured; lines: predicted. Height: {moved} over the time."
    else:
        name = {"gemm": "k and n", "elementwise": "operator"}.get(kind.kind, "query/KV heads and kernel")
        title = "Efficiency by size"
        caption = f"The roofline over the time, for a few shapes ({name}). Points: measured; lines: predicted."
        caption += " Above 100 %: data that the cache still held." * (kind.kind == "elementwise" and top > 100)
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
