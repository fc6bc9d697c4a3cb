"""The panels of a validation: the engine's run and the simulator's of one load, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.results.metric_table import METRICS, Metric, drawn_metrics
from engine.results.metrics import QUANTILES
from studies.pages.figures import BLUE, GOOD, ORANGE, Panel, against_measured
from studies.pages.latency_figures import Curve, latency_cdf
from studies.pages.page import Cell, coloured, numbers_table
from studies.validation.compare import BATCH_KINDS, STATISTICS
from studies.validation.record import judge
from studies.words import ERROR_HEADS, error_cells, number, percent, seconds

_NO_GAPS = "No request has more than one output token on both sides."
_COLOURS = dict(zip(BATCH_KINDS, (BLUE, ORANGE, GOOD), strict=True))
_GAUGE_NAMES = {
    "num_requests_running": "Running requests",
    "num_requests_waiting": "Waiting requests",
    "kv_cache_usage_perc": "KV cache use",
}
_STATISTICS = {name: name if name == "mean" else name.upper() for name in STATISTICS}


def panels(load: Mapping[str, Any], held: bool = True) -> list[Panel]:
    """Return all panels of a load, which may be held to the targets."""
    distributions = [_latency(load, metric) for metric in drawn_metrics()]
    if load["iterations"] is None:  # measured from outside
        return [*distributions, latency_table(load, held), *gauge_table(load)]
    order = Panel("Order of the batches", f"{_order(load['batches'])} {_replay(load['replay'])}", width="half")
    return [*distributions, iteration_times(load), latency_table(load, held), iteration_table(load), order]


def _latency(load: Mapping[str, Any], metric: Metric) -> Panel:
    curves = []
    if drawn := load["curves"].get(metric.key):
        for run, colour, dash in (("engine", BLUE, "solid"), ("simulated", ORANGE, "dash")):
            curves.append(Curve(run, QUANTILES, np.array(drawn[run]), colour, dash))
    return latency_cdf(metric, curves, nothing=_NO_GAPS, height_px=290)


def iteration_times(load: Mapping[str, Any]) -> Panel:
    """Draw predicted over measured times of the engine's batches."""
    drawn = load["curves"]["iterations"]
    measured, predicted = np.array(drawn["measured_ms"]), np.array(drawn["predicted_ms"])
    kinds = np.array(drawn["kind"])
    groups = [
        (kind, colour, measured[kinds == kind], predicted[kinds == kind])
        for kind, colour in _COLOURS.items()
        if (kinds == kind).any()
    ]
    count = load["iterations"]["count"]
    some = "" if len(kinds) == count else f", {len(kinds):,} of them drawn"
    caption = (
        f"{count:,} of the engine's batches (a batch counts on each stage){some}; "
        f"{percent(load['iterations']['in_range'])} within the calibrated range. Dashed: predicted as measured."
    )
    return Panel("Times of the batches", caption, against_measured(groups, logarithmic=True), "half", 430)


def latency_table(load: Mapping[str, Any], held: bool = True) -> Panel:
    """Draw each statistic of each latency on both sides; those that have a target are coloured."""
    met = {(each.what, each.statistic): each.met for each in judge(load, held)}
    rows: list[tuple[str, list[Cell]]] = []
    together = []
    for key, statistics in load["latencies"].items():
        name = METRICS[key].name
        for statistic, words in _STATISTICS.items():
            if (found := statistics.get(statistic)) is not None:
                error = coloured(percent(found["error"], sign=True), met.get((name, words)))
                rows.append((f"{name}, {words}", [seconds(found["engine_s"]), seconds(found["simulated_s"]), error]))
        if "pearson_r" in statistics:
            together.append(f"{name} {statistics['pearson_r']:.3f}")
    caption = "Of all requests, or of all gaps between tokens."
    if together:
        caption += f" How the requests' own values go together (Pearson's r): {', '.join(together)}."
    table = numbers_table(("Latency", "Engine", "Simulated", "Error"), rows)
    return Panel("Latencies", caption, width="half", table=table)


def gauge_table(load: Mapping[str, Any]) -> list[Panel]:
    """Draw the server's own gauges and the simulation's at the same times; no panel where it has none."""
    rows = []
    for name, found in load["gauges"].items():
        form = percent if name == "kv_cache_usage_perc" else number
        cells = [form(found[f"{side}_{what}"]) for what in ("mean", "max") for side in ("engine", "simulated")]
        rows.append((_GAUGE_NAMES[name], cells))
    if not rows:
        return []
    count = max(found["samples"] for found in load["gauges"].values())
    caption = f"The server's own gauges, looked at {count:,} times, and the simulation's state at the same times."
    heads = ("", "Server, mean", "Simulated, mean", "Server, peak", "Simulated, peak")
    return [Panel("Requests and KV cache", caption, width="half", table=numbers_table(heads, rows))]


def iteration_table(load: Mapping[str, Any]) -> Panel:
    """Draw errors of the batches' times by kind, and what each kind adds to the error of their sum."""
    iterations = load["iterations"]
    parts = iterations["contributions"]
    rows = [
        (name.capitalize(), [f"{found['count']:,}", *error_cells(found), percent(parts[name], sign=True)])
        for name, found in iterations["by_kind"].items()
    ]
    if "host" in parts:
        rows.append(("Host's part of all", ["-", "-", "-", "-", "-", percent(parts["host"], sign=True)]))
    total = percent(iterations["bias_of_time"], sign=True)
    rows.append(("All", [f"{iterations['count']:,}", *error_cells(iterations), total]))
    caption = "Absolute error of a batch's predicted time; the bias keeps its sign (positive: predicted too long). "
    caption += "Of the sum: what each part adds to the error of the time that all batches took together."
    table = numbers_table(("Batches", "Count", *ERROR_HEADS, "Of the sum"), rows)
    return Panel("Errors of the batches' times", caption, width="half", table=table)


def _order(batches: Mapping[str, Any]) -> str:
    if batches["same"]:
        return f"The engine and the simulator formed the same {batches['engine']:,} batches."
    counts = f"The engine formed {batches['engine']:,} batches and the simulator {batches['simulated']:,}."
    when = "" if batches["at_s"] is None else f", from {seconds(batches['at_s'])} into the run,"
    why = "A request that comes just before a batch's end on one side and just after it on the other is enough for that"
    return f"{counts} {_same_until(batches)}; then{when} they differ in their tokens, decodes or prompts. {why}."


def _replay(replay: Mapping[str, Any]) -> str:
    if replay["same"]:
        return (
            f"Replayed with the measured durations the simulator forms the engine's batches, all {replay['engine']:,}: "
            "what is off here are times, not decisions of the scheduler."
        )
    if "why" in replay:
        return f"Replayed with the measured durations the simulator forms other batches: {replay['why']}."
    return (
        f"Replayed with the measured durations the simulator forms other batches. {_same_until(replay)}: so not only "
        "times are off, but decisions of the scheduler."
    )


def _same_until(batches: Mapping[str, Any]) -> str:
    first = batches["first_difference"]
    return "The very first differs" if first == 0 else f"The first {first:,} are the same"
