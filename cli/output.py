"""What the commands share: the default name of a run's folder, progress bars, and printed summaries."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from engine.replica_spec import ReplicaSpec
from engine.results.metric_table import METRICS
from engine.results.metrics import describe, summary_key
from engine.specs.checks import file_name

LINE_S = 30.0


def default_folder(kind: ReplicaSpec, workload: str, prefix: str = "") -> Path:
    """Return the folder of a run that was given none: the time, model, device, policy and workload in its name."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    model = kind.model.name.split("/")[-1]
    parts = (model, kind.device.name, kind.scheduler.policy, Path(workload).stem)
    return Path("runs") / f"{stamp}-{prefix}{'-'.join(map(_part, parts))}"


def _part(name: str) -> str:
    """Return what of a name stands in a folder's: a model's or a trace's may hold anything, and be long."""
    return file_name("the name", "".join(c if c.isalnum() or c in "._-+@" else "_" for c in name)[:40].lstrip("."))


class ProgressBar(Progress):
    """A progress bar on a terminal; elsewhere a line every LINE_S seconds."""

    def __init__(self, *columns: ProgressColumn) -> None:
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        super().__init__(*columns, console=console, disable=not console.is_terminal, transient=True)
        self._said_at = time.monotonic()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self._say(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._say(task_id)

    def _say(self, task_id: TaskID) -> None:
        if self.disable and time.monotonic() - self._said_at >= LINE_S:
            self._said_at = time.monotonic()
            task = self._tasks[task_id]
            shown = [column for column in self.columns if isinstance(column, TextColumn | MofNCompleteColumn)]
            self.console.print(" ".join(column(task).plain.strip() for column in shown))  # type: ignore[union-attr]


def progress_bar(what: str) -> ProgressBar:
    """Return a progress bar that counts `what`."""
    return ProgressBar(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(what),
                       TimeRemainingColumn())  # fmt: skip


def print_summary(summary: dict[str, Any], copies: list[int], target: Path, console: Console) -> None:
    """Print a summary as text; `copies` has the number of replicas of each kind."""
    first = 0
    for count in copies:
        kind = summary["replicas"][first]
        first += count
        if "server" in summary:
            console.print(f"{kind['model']} at {kind['device']}, measured from outside")
            continue
        console.print(
            f"{count} x {kind['model']} on {kind['device']}, {kind['parallel']}, {_engine_words(kind)}: "
            f"{kind['kv_cache_tokens']:,} tokens of KV cache{' each' if count > 1 else ''}",
        )
        for note in kind["notes"]:
            console.print(f"note: {note}", style="yellow")
        console.print(f"times: {kind['predictor']}", style="dim")
    if len(summary["replicas"]) > 1:
        console.print(f"{len(summary['replicas'])} replicas behind a {summary['router']} router")
    for note in summary["workload_notes"]:
        console.print(f"note: {note}", style="yellow")
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("latency (s)", "mean", "P50", "P90", "P99", "max"):
        table.add_column(column, justify="left" if column.startswith("latency") else "right")
    for key, metric in METRICS.items():
        values = [summary.get(summary_key(s, key)) for s in ("mean", "p50", "p90", "p99", "max")]
        table.add_row(metric.name, *("-" if value is None else f"{value / 1e3:.4g}" for value in values))
    console.print(table)
    if summary.get("uncertainty"):
        print_ranges(summary, console)
    known = [replica["max_model_len"] for replica in summary["replicas"] if "max_model_len" in replica]
    longest = f"--max-model-len {min(known):,}" if known else "the server's longest"
    how = "simulated" if "simulator" in summary else "measured"
    console.print(
        f"{summary['completed']:,} requests in {summary['duration']:,.1f} s {how}"
        + (f" ({summary['dropped']:,} over {longest}, dropped)" if summary["dropped"] else "")
        + (f" ({summary['trace_failures']:,} failed rows of the trace left out)" if summary["trace_failures"] else "")
        + f": {summary['request_throughput']:.3g} requests/s, {summary['output_throughput']:,.0f} output tokens/s",
    )
    if server := summary.get("server"):
        late = server["generator_lateness_ms"]
        console.print(
            f"the generator sent requests {late['p50']:.2g} ms late in the median, {late['p99']:.2g} ms in P99"
        )
        for what, count in server["errors"].items():
            console.print(f"failed: {count:,} times {what}", style="red")
    if "prefix_hit_rate" in summary:
        console.print(
            f"prefix cache: {summary['prefix_hit_rate']:.1%} of prompt tokens found "
            f"({summary['prefix_hit_tokens']:,} tokens; {summary['prefix_evictions']:,} blocks evicted)"
        )
    fullest = summary.get("peak_kv_utilization")  # unknown of a server measured from outside
    memory = [f"KV cache at most {100 * fullest:.3g}% full"] if fullest else []
    if summary["preemptions"]:
        lost = sum(replica["recomputed_tokens"] for replica in summary["replicas"])
        memory.append(f"{summary['preemptions']:,} preemptions, which threw {lost:,} computed tokens away")
    if memory:
        console.print("; ".join(memory))
    if "steady_window_s" in summary:
        start, end = summary["steady_window_s"]
        busy = summary.get("steady_utilization")
        console.print(
            f"steady window {start:,.1f} to {end:,.1f} s: {summary['steady_request_throughput']:.3g} requests/s, "
            f"{summary['steady_output_throughput']:,.0f} output tokens/s"
            + _steady_latencies(summary)
            + ("" if busy is None else f", {'GPUs' if how == 'simulated' else 'workers'} {busy:.0%} busy")
        )
    if simulator := summary.get("simulator"):
        console.print(
            f"{simulator['batches']:,} batches in {simulator['loop_seconds']:.2f} s, "
            f"{simulator['peak_rss_bytes'] / 2**20:,.0f} MiB",
            style="dim",
        )
    console.print(f"verdict: {'; '.join(describe(summary))}", style="bold")
    console.print(f"report: {target / 'report.html'}")


def print_ranges(summary: dict[str, Any], console: Console) -> None:
    """Print the ranges of results under drawn errors, and what is off most."""
    parts = []
    for name, each in summary["intervals"].items():
        unit = 1e-3 if name.endswith("_ms") else 1.0
        if name in RANGES:
            parts.append(f"{RANGES[name]} {unit * each['low']:.3g} to {unit * each['high']:.3g}")
    drawn = summary["uncertainty"]
    console.print(f"{drawn['covers']:.0%} range of {drawn['draws']:,} reruns with drawn errors: {', '.join(parts)}")
    print_errors([summary], console)


def print_errors(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print which errors were drawn of the predicted times, once for each kind of replica."""
    every = [errors for row in rows if row.get("uncertainty") for errors in row["uncertainty"]["errors"]]
    lines = [", ".join(f"{name} {share:.0%}" for name, share in list(errors.items())[:5]) for errors in every]
    for line in dict.fromkeys(lines):
        console.print(f"errors drawn (90 % within): {line}", style="dim")


RANGES = {  # results whose ranges are printed, in words, latencies in seconds
    summary_key("mean", "ttft"): "mean TTFT (s)",
    summary_key("p99", "ttft"): "P99 TTFT (s)",
    summary_key("mean", "tpot"): "mean TPOT (s)",
    summary_key("p99", "tbt"): "P99 TBT (s)",
    summary_key("mean", "e2e"): "mean E2E (s)",
    "output_throughput": "output tokens/s",
}


def _steady_latencies(summary: dict[str, Any]) -> str:
    """TTFT and TBT of the steady window."""
    parts = []
    for key in ("ttft", "tbt"):
        values = [summary.get(f"steady_{summary_key(statistic, key)}") for statistic in ("p50", "p99")]
        known = [value for value in values if value is not None]
        if len(known) == 2:
            parts.append(f", {METRICS[key].name} P50 {known[0] / 1e3:.3g} s P99 {known[1] / 1e3:.3g} s")
    return "".join(parts)


def _engine_words(kind: dict[str, Any]) -> str:
    """The engine and what was asked for instead of its own settings."""
    overrides = kind["engine_overrides"]
    own = f" ({', '.join(overrides)} of your own)" if overrides else ""
    words = [f"{kind['engine']}{own}", f"{kind['scheduler']} scheduler"]
    words += ["prefix caching"] * kind["prefix_caching"] + ["asynchronous"] * kind["async_scheduling"]
    return ", ".join(words)
