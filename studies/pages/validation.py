"""The page of a validation: how far the simulator is from an engine's runs. One offline HTML file.

The errors come from `studies.validation.compare`, what is drawn from `studies.validation.record`.

    windtunnel validate --model /models/llama --device /profiles/h100/calibration --load 0.5,0.95 --output-dir check
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.results.metric_table import drawn_metrics
from studies.calibration.kinds import PAGES
from studies.pages.figures import Panel
from studies.pages.page import (
    ERROR_HEADS,
    Cell,
    Page,
    Tone,
    about,
    cards,
    coloured,
    details,
    error_cells,
    facts_table,
    footer,
    header,
    numbers_table,
)
from studies.pages.validation_figures import panels
from studies.validation.record import Judgement, held, judge
from studies.words import number, percent, seconds

_CPU = (
    "This ran on a CPU, whose times vary with what else it does: the errors are held to no target. Those for GPUs are "
    "5 % of the batches' times and of P50 and P99 of latencies, 2 % of throughput."
)
_OUTSIDE, _MOSTLY_OUTSIDE = 0.1, 0.5  # of the batches beyond the calibrated range, from which that is said and is bad
_TARGETS = (
    "Errors on the same machine, at a load below 95 % of the capacity; from there on P50 and P99 of latencies may be "
    "off by 10 %."
)


def write_validation(results: Mapping[str, Any], path: Path) -> Path:
    """Write the page of what `validation.json` holds to `path` and return it."""
    return validation_page(results).write(path)


def validation_page(results: Mapping[str, Any]) -> Page:
    """Make the page.

    Args:
        results: what `validation.json` holds. `model`, `device`, `hardware`, `engine`, `scheduler` and `workload` say
            in words what ran, and may be joined by other facts; `operators` has the held-out errors of each kind;
            `capacity` the requests/s when all come at once (engine, simulated, error), or None; each of `loads` a load
            (a share of the capacity, or None), its request_rate (or None), the result of `validation.compare`, and
            the `curves` of `validation_record`.
    """
    loads = results["loads"]
    page = Page(f"Validation of {_short_name(results)} on {results['device']}")
    page.add(_header(results), _cards(results))
    page.add_panels("Errors by load", [_by_load(loads, held(results))])
    for load in loads:
        page.add_panels(_capital(_where(load)), panels(load, held(results)), _about(load))
    if "against" in results:
        page.add_panels("What was assumed", [_assumed(results)])
    else:
        page.add_panels("Operators", [_operators(results["operators"])])
    page.add(details("What ran", facts_table(_facts(results))))
    page.add(footer(f" {results['version']}" if "version" in results else ""))
    return page


def _header(results: Mapping[str, Any]) -> str:
    budget = results.get("max_num_batched_tokens")
    limit = f" (token budget {budget:,})" if budget else ""
    setting = (
        f"The engine ({results['engine']}, on {results['hardware']}) and the simulator served the same requests "
        f"({results['workload']}) under the {results['scheduler']} scheduler{limit}."
    )
    source: tuple[Tone, str, str] = ("good", "Targets", _TARGETS)
    if not held(results):
        source = ("unsure", "A CPU", _CPU)
    if "against" in results:
        setting = (
            f"A server at {results['against']}, measured from outside, and the simulator ({results['engine']} on "
            f"{results['device']}) served the same requests ({results['workload']})."
        )
        worst = results["loads"][0]
    else:
        worst = max(results["loads"], key=lambda load: abs(load["iterations"]["bias_of_time"]))
    largest: tuple[Tone, str, str] = ("unsure", "Largest", _largest(worst, results["loads"]))
    title = f"{_short_name(results)} on {results['device']}"
    return header("Windtunnel · validation", title, setting, verdicts(results), [source, largest])


def verdicts(results: Mapping[str, Any]) -> list[tuple[Tone, str]]:
    """Say for each target which load is furthest from it, and whether a replay forms the same batches."""
    loads = results["loads"]
    chips: list[tuple[Tone, str]] = _outside(loads)
    if not held(results):
        chips.append(("unsure", "On a CPU: held to no target"))
    found = [(each, load) for load in loads for each in judge(load, held(results))]
    for what in dict.fromkeys(each.what for each, _ in found):
        known = [(each, load) for each, load in found if each.what == what and each.error is not None]
        if not known:
            chips.append(("unsure", f"{what}: nothing to compare"))
            continue
        worst, load = max(known, key=lambda pair: _share_of_target(pair[0]))
        error = percent(worst.error, sign=what != "Iterations")
        words = " ".join(filter(None, [worst.statistic, error, _among(load, loads)]))
        if worst.target is None:
            chips.append(("plain", f"{what}: {words}"))
        else:
            chips.append(("good" if worst.met else "bad", f"{what}: {words} (target {100 * worst.target:.0f} %)"))
    if "against" in results:
        return chips
    other = [load for load in loads if not load["replay"]["same"]]
    if other:
        where = " and ".join(filter(None, [_among(load, loads) for load in other]))
        return [*chips, ("bad", " ".join(filter(None, ["Replay: other batches", where])))]
    return [*chips, ("good", "Replay: the same batches")]


def _share_of_target(judgement: Judgement) -> float:
    return abs(judgement.error or 0.0) / (judgement.target or 1.0)


def _outside(loads: Sequence[Mapping[str, Any]]) -> list[tuple[Tone, str]]:
    """Return a warning where many of the engine's batches are beyond the calibrated range."""
    every = [load["iterations"] for load in loads if load["iterations"] is not None]
    count = sum(each["count"] for each in every)
    share = sum(each["count"] * (1 - each["in_range"]) for each in every) / count if count else 0.0
    if share < _OUTSIDE:
        return []
    words = f"{percent(share)} of the batches are outside the calibrated range: their times are extrapolated"
    return [("bad" if share >= _MOSTLY_OUTSIDE else "unsure", words)]


def _largest(load: Mapping[str, Any], loads: Sequence[Mapping[str, Any]]) -> str:
    where = _among(load, loads)
    return _capital(f"{where}, {load['largest']}." if where else f"{load['largest']}.")


def _short_name(results: Mapping[str, Any]) -> str:
    return str(results["model"]).rstrip("/").split("/")[-1]


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _where(load: Mapping[str, Any]) -> str:
    """Return which load it is, in words."""
    rate = load["request_rate"]
    parts = [
        "" if load["load"] is None else f"{100 * load['load']:g} % load",
        "" if rate is None else f"{number(rate)} requests/s",
    ]
    return "at " + ", ".join(filter(None, parts)) if any(parts) else "the run"


def _among(load: Mapping[str, Any], loads: Sequence[Mapping[str, Any]]) -> str:
    """Return which of several loads it is; nothing where there is only one."""
    if len(loads) == 1:
        return ""
    return _where(load) if load["load"] is None else f"at {100 * load['load']:g} % load"


def _cards(results: Mapping[str, Any]) -> str:
    loads, capacity = results["loads"], results["capacity"]
    if "against" in results:
        return cards(_outside_cards(results))
    iterations = [load["iterations"] for load in loads]
    count = sum(each["count"] for each in iterations)
    mean, inside = (sum(each["count"] * each[name] for each in iterations) / count for name in ("mape", "in_range"))
    bias = max((each["bias_of_time"] for each in iterations), key=abs)
    each_load = " (worst load)" if len(loads) > 1 else ""
    entries = [
        ("Batches' times", percent(mean), f"mean error of {count:,} batches"),
        ("Their sum", percent(bias, sign=True), f"error of the batches' time together{each_load}"),
        ("In range", percent(inside), "batches within the calibrated range"),
        ("Requests", f"{sum(load['requests'] for load in loads):,}", "served and simulated"),
        ("Time on the engine", seconds(sum(load["engine_s"] for load in loads)), "of all loads together"),
    ]
    if capacity is not None:
        sides = f"{number(capacity['engine'])} requests/s on the engine, {number(capacity['simulated'])} simulated"
        entries.insert(0, ("Capacity", percent(capacity["error"], sign=True), sides))
    return cards(entries)


def _outside_cards(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    (load,) = results["loads"]
    found = [("Requests", f"{load['requests']:,}", "answered and simulated"),
             ("Time on the server", seconds(load["engine_s"]), "first arrival to last token")]  # fmt: skip
    for metric in drawn_metrics():
        if (value := load["latencies"][metric.key].get("p50")) is not None:
            sides = f"{seconds(value['engine_s'])} measured, {seconds(value['simulated_s'])} simulated"
            found.append((f"{metric.name}, median", percent(value["error"], sign=True), sides))
    return found


def _assumed(results: Mapping[str, Any]) -> Panel:
    said = [f"{name} {value}" for name, value in results["said"].items()]
    words = f"The server says of itself: {', '.join(said)}. " if said else "The server says nothing of itself. "
    return Panel("Taken for granted", f"{words}Assumed: {'; '.join(results['assumed'])}.")


def _by_load(loads: Sequence[Mapping[str, Any]], held: bool) -> Panel:
    columns = [f"{e.what} {e.statistic}" if e.statistic in ("P50", "P99") else e.what for e in judge(loads[0])]
    rows: list[tuple[str, list[Cell]]] = []
    for load in loads:
        errors = [coloured(percent(e.error, sign=e.what != "Iterations"), e.met) for e in judge(load, held)]
        if load["replay"] is not None:
            same = load["replay"]["same"]
            errors.append(coloured("same" if same else "others", same))
        rows.append((_capital(_where(load)), errors))
    caption = (
        "Simulated over measured, less 1. Iterations: mean error of the engine's own batches, predicted. Throughput: "
        "the furthest off of requests and tokens a second. Replay: the batches that the simulator forms when it is "
        "given the measured durations."
    )
    replayed = ["Replay"] * (loads[0]["replay"] is not None)
    title = "Held against the targets" if held else "Errors, held to no target"
    return Panel(title, caption, table=numbers_table(("Load", *columns, *replayed), rows))


def _about(load: Mapping[str, Any]) -> str:
    words = f"{load['requests']:,} requests in {seconds(load['engine_s'])}. {_capital(load['largest'])}."
    return about(words)


def _operators(operators: Mapping[str, Mapping[str, Any]]) -> Panel:
    title = "Errors on held-out measurements"
    if not operators:
        return Panel(title, "No calibration: the times are estimated from a data sheet.")
    rows = [
        (PAGES[kind].name if kind in PAGES else kind, [f"{found['count']:,}", *error_cells(found)])
        for kind, found in operators.items()
    ]  # fmt: skip
    caption = "Of the calibration that predicts the batches: each part predicted by what was learned from the others."
    return Panel(title, caption, table=numbers_table(("Operator", "Rows", *ERROR_HEADS), rows))


def _facts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    host = results.get("host_overhead")
    named = {
        "model": results["model"],
        "device": results["device"],
        "hardware": results["hardware"],
        "engine": results["engine"],
        "predictor": results.get("predictor"),
        "scheduler": results["scheduler"],
        "KV blocks": results.get("num_gpu_blocks"),
        "workload": results["workload"],
        "host overhead": _host(host) if isinstance(host, Mapping) else host,
    }
    return [(name, str(value)) for name, value in named.items() if value is not None]


def _host(host: Mapping[str, float]) -> str:
    return f"{seconds(host['iteration_s'])} an iteration and {seconds(host['sequence_s'])} a sequence"
