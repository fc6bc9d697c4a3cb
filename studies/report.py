"""The report of a run: one HTML file that opens offline, on a phone as on a desktop.

It reads a run's folder, and reads nothing else: what is drawn is in `studies.report_record`, how in
`studies.report_figures`, and the page around it in `report_page.html`. plotly.js is inlined, so nothing is fetched.

    python -c "from pathlib import Path; from studies.report import write_report; write_report(Path('runs/first'))"
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

from engine.metrics import METRIC_NAMES, describe_slo, summary_key
from studies.report_figures import Panel, number, panels, seconds
from studies.report_record import Record, read_record

_PAGE = Path(__file__).with_name("report_page.html")
_STATISTICS = ("mean", "median", "p90", "p95", "p99", "p99.9", "max")
_FILES = {
    "config.yaml": "the configuration, complete",
    "summary.json": "every number of this report",
    "requests.parquet": "one row a request",
    "iterations.parquet": "one row a batch and stage",
    "trace.json": "Chrome trace",
}


def write_report(folder: Path) -> Path:
    """Write `report.html` into a finished run's folder and return its path.

    Raises FileNotFoundError when the folder lacks one of config.yaml, summary.json, requests.parquet and
    iterations.parquet.
    """
    path = folder / "report.html"
    unfinished = folder / ".report.html.tmp"
    unfinished.write_text(render(read_record(folder)), encoding="utf-8")
    return unfinished.replace(path)


def render(record: Record) -> str:
    """The page."""
    sections = panels(record)
    drawn = [panel for _, group in sections for panel in group]
    names = {id(panel): f"figure-{i}" for i, panel in enumerate(drawn)}
    figures = {names[id(panel)]: panel.figure for panel in drawn if panel.figure is not None}
    # "<" could end the script element early, and in JSON may be written otherwise
    data = ",".join(f"{json.dumps(name)}:{figure.to_json()}" for name, figure in figures.items())
    body = [_header(record), _cards(record)]
    for i, (heading, group) in enumerate(sections):
        body.append(f"<h2>{escape(heading)}</h2>\n<div class='panels'>")
        body += [_panel(panel, names[id(panel)]) for panel in group]
        body.append("</div>")
        if i == 0:
            body.append(_latency_table(record.summary))
    body.append(_about(record))
    return Template(_PAGE.read_text(encoding="utf-8")).substitute(
        title=escape(f"{_served(record)} · Windtunnel"),
        body="\n".join(body),
        figures="{" + data.replace("<", "\\u003c") + "}",
        plotly=get_plotlyjs(),
    )


# -- the header ----------------------------------------------------------------------------------------------------


def _header(record: Record) -> str:
    verdicts = "".join(f"<li class='{tone}'>{_text(text)}</li>" for tone, text in verdict(record.summary))
    tone, word, source = times_source(record)
    return f"""<header>
<p class='kicker'>Windtunnel · report of a run</p>
<h1>{escape(_served(record))}</h1>
<p class='setting'>{escape(_setting(record))}</p>
<ul class='verdicts'>{verdicts}</ul>
<p class='source'><b class='{tone}'>{escape(word)}</b> {_text(source)}</p>
</header>"""


def _kinds(record: Record) -> list[tuple[int, dict[str, Any]]]:
    """Each kind of replica and how many there are of it."""
    kinds: dict[tuple[Any, ...], tuple[int, dict[str, Any]]] = {}
    names = ("model", "device", "network", "parallel", "scheduler", "max_num_batched_tokens", "max_model_len")
    for replica in record.summary["replicas"]:
        key = tuple(replica.get(name) for name in names)
        count, _ = kinds.get(key, (0, replica))
        kinds[key] = (count + 1, replica)
    return list(kinds.values())


def _served(record: Record) -> str:
    """Which model on how many devices."""
    parts = []
    for count, replica in _kinds(record):
        devices = count * replica["num_gpus"]
        parts.append(f"{replica['model'].split('/')[-1]} on {devices} \N{MULTIPLICATION SIGN} {replica['device']}")
    return " and ".join(parts)


def _setting(record: Record) -> str:
    """The parallelism, the scheduler, the workload and its rate."""
    parts = []
    for count, replica in _kinds(record):
        budget = replica.get("max_num_batched_tokens")
        copies = "one replica" if count == 1 else f"{count} replicas"
        limit = f" (token budget {budget:,})" if budget else ""
        parts.append(f"{copies} of {replica['parallel']} under the {replica['scheduler']} scheduler{limit}")
    asked = record.config.get("request_rate")
    if asked:
        rate = f"at {number(asked)} request{'s' * (asked != 1)}/s"
    elif record.arrival_rate is not None:
        rate = f"that came at {number(record.arrival_rate)} requests/s"
    else:
        rate = "that came at once"
    requests = record.summary["completed"] + record.summary["failed"]
    how = "; ".join(parts)
    return (
        f"{how[0].upper()}{how[1:]}, serving {requests:,} {'request' if requests == 1 else 'requests'} "
        f"({record.summary.get('workload', 'no named workload')}) {rate}."
    )


def verdict(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The verdict and each SLO in words, each with its tone: good, bad or unsure."""
    growing = summary["saturation"]["growing"]
    tone = "unsure" if growing is None else "bad" if growing else "good"
    lines = [(tone, summary["saturation"]["verdict"])]
    lines += [("good" if slo["met"] else "bad", describe_slo(slo)) for slo in summary["slos"]]
    if not summary["slos"]:
        lines.append(("unsure", "No SLO was set"))
    return [(tone, text[:1].upper() + text[1:] if i == 0 else text) for i, (tone, text) in enumerate(lines)]


def times_source(record: Record) -> tuple[str, str, str]:
    """Tone, a word and a sentence about where the batches' times came from."""
    timeline = record.timeline
    predictors = list(dict.fromkeys(replica.get("predictor", "") for replica in record.summary["replicas"]))
    text = "Times come from: " + "; ".join(filter(None, predictors)) + "."
    if not timeline.predicted_batches:
        return "good", "Measured", text
    if timeline.outside_range:
        share = 100 * timeline.outside_range / timeline.batches
        text += (
            f" {timeline.outside_range:,} batches ({number(share)} %) are outside what the predictor was calibrated on."
        )
    if any("estimate" in predictor for predictor in predictors):
        return "unsure", "An estimate", text
    return ("unsure" if timeline.outside_range else "good"), "Predicted", text


# -- numbers -------------------------------------------------------------------------------------------------------


def _cards(record: Record) -> str:
    summary = record.summary
    finished = f"{summary['completed']:,} finished in {seconds(summary['duration'])}"
    share = 100 * summary["requests_meeting_slos"] / summary["completed"]
    met = f"{number(share)} % met every SLO" if summary["slos"] else "no SLO set"
    blocks = sum(replica["num_gpu_blocks"] for replica in summary["replicas"])
    many = len(summary["replicas"]) > 1
    cards = [
        ("Throughput", f"{number(summary['request_throughput'])} requests/s", finished),
        ("Output", f"{number(summary['output_throughput'])} tokens/s", f"{summary['total_output_tokens']:,} tokens"),
        ("Goodput", f"{number(summary['request_goodput'])} requests/s", met),
        ("TTFT, median", _latency(summary, "median_ttft_ms"), "arrival to first token"),
        ("TTFT, P99", _latency(summary, "p99_ttft_ms"), "arrival to first token"),
        ("TBT, median", _latency(summary, "median_itl_ms"), "between output tokens"),
        ("TBT, P99", _latency(summary, "p99_itl_ms"), "between output tokens"),
        ("E2E, P99", _latency(summary, "p99_e2el_ms"), "arrival to last token"),
        ("Sched. delay, median", _latency(summary, "median_scheduling_delay_ms"), "arrival to first batch"),
        (
            "KV cache, peak use",
            f"{number(record.timeline.peak_kv_percent)} %",
            f"of {blocks:,} blocks" if not many else "of the fullest replica",
        ),
        ("Preemptions", f"{summary['preemptions']:,}", "for want of KV blocks"),
        ("Dropped requests", f"{summary['dropped']:,}", "too long to be served"),
    ]
    if summary["failed"]:
        cards.append(("Failed requests", f"{summary['failed']:,}", "never finished"))
    return "<dl class='cards'>" + "".join(map(_card, cards)) + "</dl>"


def _card(card: tuple[str, str, str]) -> str:
    name, value, note = card
    number, _, unit = value.partition(" ")
    return (
        f"<div class='card'><dt>{escape(name)}</dt><dd>{escape(number)} <span>{escape(unit)}</span></dd>"
        f"<p>{escape(note)}</p></div>"
    )


def _latency(summary: Mapping[str, Any], key: str) -> str:
    value = summary.get(key)
    return "none" if value is None else seconds(value / 1e3)


def _latency_table(summary: Mapping[str, Any]) -> str:
    head = "".join(f"<th scope='col'>{name.capitalize()}</th>" for name in _STATISTICS)
    rows = []
    for metric, name in METRIC_NAMES.items():
        keys = [summary_key(statistic, metric) for statistic in _STATISTICS]
        values = "".join(f"<td>{escape(_latency(summary, key))}</td>" for key in keys)
        rows.append(f"<tr><th scope='row'>{escape(name)}</th>{values}</tr>")
    how = summary.get("token_percentiles", "exact")
    note = "" if how == "exact" else f"<p>Percentiles of TBT: {escape(how)}.</p>"
    return (
        f"<details><summary>Every latency in numbers</summary><div class='scroll'><table class='numbers'>"
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{note}</details>"
    )


# -- panels and the rest ---------------------------------------------------------------------------------------------


def _panel(panel: Panel, name: str) -> str:
    words = f"<h3>{escape(panel.title)}</h3><p>{_text(panel.caption)}</p>"
    figure = ""
    if panel.figure is not None:
        label = f"role='img' aria-label='{escape(panel.title)}'"
        figure = f"<div class='figure' id='{name}' {label} style='height:{panel.height_px}px'></div>"
    return f"<section class='panel {panel.width}'>{words}{figure}</section>"


def _text(text: str) -> str:
    """Escaped, and with each number on the line of its unit."""
    return escape(re.sub(r"(\d) (%|s|ms|µs)(?!\w)", "\\1\u00a0\\2", text))


def _about(record: Record) -> str:
    simulator = record.summary.get("simulator", {})
    took = ""
    if simulator:
        took = f" · {simulator['batches']:,} batches simulated in {seconds(simulator['loop_seconds'])}"
    version = record.summary.get("version")
    files = _table((name, _size(size)) for name, size in record.files.items() if name in _FILES)
    return f"""<h2>The run</h2>
<details><summary>Configuration</summary>{_table(_flat(record.config))}</details>
<details><summary>Files and how to reproduce</summary>{files}
<p style='margin-top:12px'>In the run's folder, the same configuration gives the same run:</p>
<pre>windtunnel simulate --config config.yaml</pre></details>
<footer>Windtunnel{f" {escape(str(version))}" if version else ""}{_text(took)}</footer>"""


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Names and values of a nested configuration; an inner name comes after its outer one and a dot."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            yield prefix + name, ", ".join(map(str, value)) or "none"
        else:
            yield prefix + name, "not set" if value is None else str(value)


def _table(rows: Iterable[tuple[str, str]]) -> str:
    cells = "".join(
        f"<tr><th scope='row'><code>{escape(name)}</code></th><td>{escape(value)}"
        f"{f' · {_FILES[name]}' if name in _FILES else ''}</td></tr>"
        for name, value in rows
    )
    return f"<div class='scroll'><table><tbody>{cells}</tbody></table></div>"


def _size(num_bytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {unit}"
    return f"{num_bytes} B"
