"""The page about a device's calibration: held-out errors, and measurements beside predictions. One offline HTML file.

The record is extracted in `studies.calibration.record` and drawn in `studies.pages.calibration_figures`.

    windtunnel calibrate report --device a40 --source vidur:DIR --output a40.html
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.specs import DeviceSpec, catalog
from simulator.predictor import calibration as store
from simulator.predictor.calibration import Calibration
from studies.calibration.record import CalibrationRecord, KindRecord, read_calibration
from studies.pages.calibration_figures import panels
from studies.pages.page import Page, Tone, about, cards, details, facts_table, footer, header, numbers_table, text
from studies.words import percent

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


def report(device_name: str, frames: Sequence[pd.DataFrame], path: Path) -> Path:
    """The page of a device's calibration: what ships, or a folder's."""
    device = catalog.device(device_name)
    return write_calibration_report(store.load_of(device), device, frames, path)


def write_calibration_report(
    calibration: Calibration, device: DeviceSpec, frames: Sequence[pd.DataFrame], path: Path
) -> Path:
    """Write the page to `path` and return it; `frames` are measured tables to draw, and may be none."""
    return render(read_calibration(calibration, device, frames)).write(path)


def render(record: CalibrationRecord) -> Page:
    """The page."""
    page = Page(f"Calibration of {record.device.name}")
    page.add(_header(record), _cards(record), _table(record))
    for kind in record.kinds:
        page.add_panels(kind.name, panels(kind), _about(kind))
    page.add(_provenance(record))
    return page


def _header(record: CalibrationRecord) -> str:
    here = [kind.name for kind in record.kinds if not kind.carried_over]
    lines: list[tuple[Tone, str]] = [("good", f"Measured on {record.device.name}: {_lower(here)}")] if here else []
    for device in sorted({kind.learned_on for kind in record.kinds if kind.carried_over}):
        names = [kind.name for kind in record.kinds if kind.carried_over and kind.learned_on == device]
        lines.append(("unsure", f"Carried over from {device}, by the ratio of the rooflines: {_lower(names)}"))
    if record.lacking:
        lines.append(("bad", f"Not measured, estimated from the data sheet: {_lower(record.lacking)}"))
    rows = sum(kind.rows for kind in record.kinds)
    software = sorted({name for kind in record.kinds for name in kind.provenance["software"]})
    from_ = sorted({source.split(" ")[0] for kind in record.kinds for source in kind.provenance["sources"]})
    setting = f"""How long its operators take, learned from {rows:,} measurements of
{" and ".join(from_)} ({"; ".join(software) or "software unknown"})."""
    sources: list[tuple[Tone, str, str]] = [("good", "Held out", _HELD_OUT)]
    if any(kind.scatter for kind in record.kinds):
        sources.append(("unsure", "In-sample", _IN_SAMPLE))
    kicker = f"Windtunnel · calibration of {record.device.name}"
    return header(kicker, record.device.description, setting, lines, sources)


def _lower(names: Sequence[str]) -> str:
    return ", ".join(name[0].lower() + name[1:].replace(", ", " ") for name in names)


def _cards(record: CalibrationRecord) -> str:
    return cards(
        (kind.name, percent(kind.held_out.get("mape")), f"mean held-out error; {kind.left_out.split(';')[0]} left out")
        for kind in record.kinds
    )


def _table(record: CalibrationRecord) -> str:
    heads = ("Operator", "Measured on", "Rows", "Mean", "Median", "P95", "Bias", "Mean over 20 µs", "Interval covers")
    rows = []
    for kind in record.kinds:
        held_out = kind.held_out
        cells = [
            kind.learned_on,
            f"{kind.rows:,}",
            *(percent(held_out.get(name), name == "bias") for name in ("mape", "p50", "p95", "bias")),
            percent(held_out.get("over_20us", {}).get("mape")),
            f"{100 * kind.covers:.0f} of {100 * kind.meant_to_cover:.0f} %",
        ]
        rows.append((kind.name, cells))
    return f"""<h2>Errors on held-out data</h2>
<section class='panel'><p>Absolute error of the predicted time as a share of the measured one; the bias keeps its sign
(positive: predicted too long). Interval: how many of the held-out measurements lie in their prediction interval, and
how many are meant to.</p>
{numbers_table(heads, rows)}</section>"""


def _about(kind: KindRecord) -> str:
    held_out = kind.held_out
    where = f"Carried over from {kind.learned_on}" if kind.carried_over else f"Measured on {kind.learned_on}"
    others = [name for name in kind.provenance["measured_on"] if name != kind.learned_on]
    where += f" and {', '.join(others)}" if others else ""
    groups = held_out.get("groups_over_20us", {})
    words = [f"{where}: {kind.rows:,} rows. Held out: {kind.left_out}, in {held_out['folds']} folds."]
    if groups.get("worst") is not None:
        words.append(f"The worst of {groups['count']:,} is {groups['worst_is']}, with {percent(groups['worst'])}.")
    if len(kind.range_words) == 1:
        words.append(f"Calibrated range: {kind.range_words[0]}.")
        return about(" ".join(words))
    lines = "".join(f"<li>{text(line)}</li>" for line in kind.range_words)
    return (
        f"{about(' '.join(words))}<details style='margin:0 0 12px'>"
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
            ("spread of repeats", "unknown" if spread is None else f"{percent(spread)} (median)"),
            ("sources", "; ".join(facts["sources"])),
        ]
        blocks.append(details(kind.name, facts_table(lines)))
    return f"<h2>Where the numbers come from</h2>{''.join(blocks)}{footer()}"
