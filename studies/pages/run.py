"""The report of a run: one HTML file that opens offline, on a phone as on a desktop.

It reads a run's folder, and reads nothing else: what is drawn is in `studies.pages.run_record`, how in
`studies.pages.run_figures`, and the page around it in `studies.pages.page`.

    python -c "from pathlib import Path; from studies.pages.run import write_report; write_report(Path('runs/first'))"
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from engine.results.metric_table import METRICS
from engine.results.metrics import burst_finding, describe_slo, summary_key
from studies.pages.page import Page, Tone, details, facts_table, numbers_table, ranges
from studies.pages.request_figures import batch_panels
from studies.pages.run_figures import panels
from studies.pages.run_record import Record, flat, read_record
from studies.words import capital, number, percent, seconds, size

_STATISTICS = ("mean", "median", "p90", "p95", "p99", "p99.9", "max")
OUTSIDE = 0.1  # of the batches, from which being outside the calibrated range is a warning beside the verdict
_FILES = {
    "config.yaml": "the configuration, complete",
    "summary.json": "every number of this report",
    "requests.parquet": "one row a request",
    "iterations.parquet": "one row a batch and stage",
    "ranks.parquet": "one row a batch and rank: when it computed",
    "gauges.parquet": "the server's own gauges, once a second",
    "trace.csv": "the requests as they came, to be simulated",
    "trace.json": "Chrome trace",
}


def write_report(folder: Path) -> Path:
    """Write `report.html` into a finished run's folder and return its path.

    Raises FileNotFoundError when the folder lacks one of config.yaml, summary.json, requests.parquet and
    iterations.parquet.
    """
    return render(read_record(folder)).write(folder / "report.html")


def render(record: Record) -> Page:
    """Make the page."""
    simulator, version = record.summary.get("simulator"), record.summary.get("version")
    ending = f" {version}" if version else ""
    if simulator:
        ending += f" · {simulator['batches']:,} batches simulated in {seconds(simulator['loop_seconds'])}"
    page = Page(_served(record), ending)
    chips = verdict(record.summary)
    # a warning where much of the run is outside what its predictor was calibrated on
    if (share := record.timeline.outside_range / max(record.timeline.batches, 1)) >= OUTSIDE:
        chips.append(("unsure", f"{percent(share)} of the batches are outside the calibrated range"))
    page.header("Windtunnel · report of a run", _setting(record), chips, [times_source(record)])
    page.cards(_cards(record))
    page.add(ranges(record.summary))
    for heading, group in panels(record):
        page.add_panels(heading, group)
        if heading == "Latency":
            page.add(_latency_table(record.summary))
    if batches := batch_panels(record.summary):
        page.add_panels("Batches", batches)
    page.add(*_about(record))
    return page


def _kinds(record: Record) -> list[tuple[int, dict[str, Any]]]:
    """Return each kind of replica and how many there are of it."""
    kinds: dict[tuple[Any, ...], tuple[int, dict[str, Any]]] = {}
    names = ("model", "device", "network", "parallel", "scheduler", "max_num_batched_tokens", "max_model_len")
    for replica in record.summary["replicas"]:
        key = tuple(replica.get(name) for name in names)
        count, _ = kinds.get(key, (0, replica))
        kinds[key] = (count + 1, replica)
    return list(kinds.values())


def _served(record: Record) -> str:
    """Return which model on how many devices."""
    if "server" in record.summary:
        (replica,) = record.summary["replicas"]
        return f"{replica['model'].rstrip('/').split('/')[-1]} at {replica['device']}"
    return " and ".join(
        f"{each['model'].split('/')[-1]} on {count * each['num_gpus']} \N{MULTIPLICATION SIGN} {each['device']}"
        for count, each in _kinds(record)
    )


def _setting(record: Record) -> str:
    """Return the parallelism, the scheduler, the workload and its rate."""
    parts = []
    for count, replica in _kinds(record) if "server" not in record.summary else ():
        budget = replica.get("max_num_batched_tokens")
        copies = "one replica" if count == 1 else f"{count} replicas"
        limit = f" (token budget {budget:,})" if budget else ""
        engine = f" of {replica['engine']}" if "engine" in replica else ""
        parts.append(f"{copies}{engine}, {replica['parallel']}, under the {replica['scheduler']} scheduler{limit}")
    asked, closed, users = map(record.config.get, ("request_rate", "max_concurrency", "users"))
    named = str(record.config.get("columns") or "").replace(" ", "")
    things = "conversation" if record.config.get("turns") or "session=" in named else "request"
    if users:
        rate = f"by {users:,} user{'s' * (users != 1)}"
    elif closed:
        rate = f"with at most {closed:,} in the system at once"
    elif asked:
        rate = f"at {number(asked)} {things}{'s' * (asked != 1)}/s"
    elif record.arrival_rate is not None:
        rate = f"that came at {number(record.arrival_rate)} requests/s"
    else:
        rate = "that came at once"
    requests = record.summary["completed"] + record.summary["failed"]
    how = "; ".join(parts) or "a server, measured from outside"
    return (
        f"{capital(how)}, serving {requests:,} {'request' if requests == 1 else 'requests'} "
        f"({record.summary.get('workload', 'no named workload')}) {rate}."
    )


def verdict(summary: Mapping[str, Any]) -> list[tuple[Tone, str]]:
    """Return the verdict and each SLO in words, each with its tone: good, bad or unsure."""
    growing = summary["saturation"]["growing"]
    tone: Tone = "unsure" if growing is None else "bad" if growing else "good"
    lines = [(tone, capital(summary["saturation"]["verdict"]))]
    if (bursts := burst_finding(summary)) is not None:
        lines.append(("unsure", bursts))
    lines += [("good" if slo["met"] else "bad", describe_slo(slo)) for slo in summary["slos"]]
    if not summary["slos"]:
        lines.append(("unsure", "No SLO was set"))
    return lines


def times_source(record: Record) -> tuple[Tone, str, str]:
    """Return tone, a word and a sentence about where the batches' times came from."""
    timeline = record.timeline
    predictors = list(dict.fromkeys(replica.get("predictor", "") for replica in record.summary["replicas"]))
    text = "Times come from: " + "; ".join(filter(None, predictors)) + "."
    if (server := record.summary.get("server")) is not None:
        late = server["generator_lateness_ms"].get("p99", 0.0) / 1e3
        text = f"Times are those of the client. It sent 99 % of its requests at most {seconds(late)} late."
        for what, count in server["errors"].items():
            text += f" {count:,} requests failed: {escape(what)}."
        return ("bad" if server["errors"] else "good"), "Measured from outside", text
    if not timeline.predicted_batches:
        return "good", "Measured", text
    if outside := timeline.outside_range:
        share = number(100 * outside / timeline.batches)
        text += f" {outside:,} batches ({share} %) are outside what the predictor was calibrated on."
    if any("estimate" in predictor for predictor in predictors):
        return "unsure", "An estimate", text
    return ("unsure" if timeline.outside_range else "good"), "Predicted", text


def _cards(record: Record) -> list[tuple[str, str, str]]:
    summary = record.summary
    finished = f"{summary['completed']:,} finished in {seconds(summary['duration'])}"
    share = 100 * summary["requests_meeting_slos"] / summary["completed"]
    met = f"{number(share)} % met every SLO" if summary["slos"] else "no SLO set"
    blocks = sum(replica.get("num_gpu_blocks", 0) for replica in summary["replicas"])
    steady, notes = "", [finished, f"{summary['total_output_tokens']:,} tokens"]
    if "steady_window_s" in summary:
        steady, whole = "steady_", (number(summary[key]) for key in ("request_throughput", "output_throughput"))
        notes = [f"steady window; {value} over the whole run" for value in whole]
    entries = [
        ("Throughput", f"{number(summary[steady + 'request_throughput'])} requests/s", notes[0]),
        ("Output", f"{number(summary[steady + 'output_throughput'])} tokens/s", notes[1]),
        ("Goodput", f"{number(summary['request_goodput'])} requests/s", met),
        *((f"{name}, {words}", _latency(summary, statistic, name.lower()), what)
          for name, what in (("TTFT", "arrival to first token"), ("TBT", "between output tokens"))
          for statistic, words in (("p50", "median"), ("p99", "P99"))),
        ("E2E, P99", _latency(summary, "p99", "e2e"), "arrival to last token"),
        ("Sched. delay, median", _latency(summary, "p50", "scheduling_delay"), "arrival to first batch"),
        ("KV cache, peak use", f"{number(record.timeline.peak_kv_percent)} %",
         f"of {blocks:,} blocks" if len(summary["replicas"]) == 1 else "of the fullest replica"),
        ("Preemptions", f"{summary['preemptions']:,}", "for want of KV blocks"),
        ("Dropped requests", f"{summary['dropped']:,}", "too long to be served"),
    ]  # fmt: skip
    if "prefix_hit_rate" in summary:
        found = f"{summary['prefix_hit_tokens']:,} tokens; {summary['prefix_evictions']:,} blocks evicted"
        entries.insert(-2, ("Prefix cache hits", f"{number(100 * summary['prefix_hit_rate'])} %", found))
    if "server" in summary:
        inside = ("Sched. delay, median", "KV cache, peak use", "Preemptions")
        entries = [entry for entry in entries if entry[0] not in inside]
    if summary["failed"]:
        entries.append(("Failed requests", f"{summary['failed']:,}", "never finished"))
    return entries


def _latency(summary: Mapping[str, Any], statistic: str, metric: str) -> str:
    value = summary.get(summary_key(statistic, metric))
    return "none" if value is None else seconds(value / 1e3)


def _latency_table(summary: Mapping[str, Any]) -> str:
    heads = ("", *(name.capitalize() for name in _STATISTICS))
    rows = [(metric.name, [_latency(summary, each, key) for each in _STATISTICS]) for key, metric in METRICS.items()]
    for key, name in (("execution_time", "execution time"), ("preemption_time", "preemption time")):
        if f"mean_{key}_ms" in summary:
            values = [summary.get(f"{statistic}_{key}_ms") for statistic in _STATISTICS]
            rows.append((name, ["-" if value is None else seconds(value / 1e3) for value in values]))
    how = summary.get("token_percentiles", "exact")
    note = "" if how == "exact" else f"<p>Percentiles of TBT: {escape(how)}.</p>"
    return details("Every latency in numbers", numbers_table(heads, rows) + note)


def _about(record: Record) -> list[str]:
    files = [(name, f"{size(length)} · {_FILES[name]}") for name, length in record.files.items() if name in _FILES]
    if "server" in record.summary:
        says = "the same requests go to a simulated deployment"
        commands = "windtunnel simulate --config config.yaml --device NAME --output-dir ../simulated"
    elif record.summary.get("simulator"):
        says = "the same configuration gives the same run"
        commands = "windtunnel simulate --config config.yaml --output-dir ../again"
    else:
        says = "the same configuration runs on this machine's engine again, or in the simulator"
        commands = """windtunnel bench --config config.yaml --output-dir ../again
windtunnel simulate --config config.yaml --output-dir ../simulated"""
    again = f"\n<p style='margin-top:12px'>In the run's folder, {says}:</p>\n<pre>{commands}</pre>"
    return [
        "<h2>The run</h2>",
        details("Configuration", facts_table(flat(record.config), code=True)),
        details("Files and how to reproduce", facts_table(files, code=True) + again),
    ]
