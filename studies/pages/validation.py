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
from studies.pages.compare_record import read_json, readable
from studies.pages.figures import Panel
from studies.pages.page import Cell, Page, Tone, coloured, details, facts_table, numbers_table
from studies.pages.validation_figures import panels
from studies.validation.record import held, judge
from studies.words import ERROR_HEADS, capital, error_cells, number, percent, seconds, together

_CPU = (
    "This ran on a CPU, whose times vary with what else it does: the errors are held to no target. Those for GPUs are "
    "5 % of the batches' times and of P50 and P99 of latencies, 2 % of throughput."
)
_OUTSIDE, _MOSTLY_OUTSIDE = 0.1, 0.5  # of the batches beyond the calibrated range, from which that is said and is bad
_TARGETS = (
    "Errors on the same machine, at a load below 95 % of the capacity; from there on P50 and P99 of latencies may be "
    "off by 10 %."
)


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
    name = f"{str(results['model']).rstrip('/').split('/')[-1]} on {results['device']}"
    page = Page(f"Validation of {name}", f" {results['version']}" if "version" in results else "")
    page.header("Windtunnel · validation", *_header(results), title=name)
    page.cards(_cards(results))
    page.add_panels("Errors by load", [_by_load(loads, held(results))])
    for load in loads:
        words = f"{load['requests']:,} requests in {seconds(load['engine_s'])}. {capital(load['largest'])}."
        page.add_panels(capital(_where(load)), panels(load, held(results)), words)
    if "against" in results:
        said = ", ".join(f"{name} {value}" for name, value in results["said"].items())
        words = f"The server says {f'of itself: {said}' if said else 'nothing of itself'}. "
        words += f"Assumed: {'; '.join(results['assumed'])}."
        page.add_panels("What was assumed", [Panel("Taken for granted", words)])
    else:
        page.add_panels("Operators", [_operators(results["operators"])])
    page.add(details("What ran", facts_table(_facts(results))))
    return page


def validations_page(names: dict[Path, str]) -> Page:
    """Make the page of the errors of each load of validations side by side, held against their targets."""
    page = Page(together(list(names.values())))
    page.header("Windtunnel · validations side by side", "How far the simulator is off.")
    facts: list[tuple[str, str]] = []
    columns: list[str] = []
    rows: dict[str, list[Cell]] = {}
    for folder, name in names.items():
        with readable(folder, "validation"):
            results = read_json(folder / "validation.json")
            facts.append((name, f"{results['model']} on {results['device']} ({results['hardware']}) · {folder}"))
            for load in results["loads"]:
                for each in judge(load, held(results)):
                    cells = rows.setdefault(f"{each.what} {each.statistic}".strip(), [])
                    cells += ["-"] * (len(columns) - len(cells))
                    cells.append(coloured(percent(each.error, sign=each.statistic != "mean error"), each.met))
                columns.append(name if load["load"] is None else f"{name}, {100 * load['load']:g} % load")
    for cells in rows.values():
        cells += ["-"] * (len(columns) - len(cells))
    caption = "Simulated over measured, less 1; green within the target, red beyond. What ran on a CPU is held to none."
    table = numbers_table(("Error", *columns), rows.items())
    page.add_panels("What was validated", [Panel("Runs", "", table=facts_table(facts))])
    page.add_panels("Errors", [Panel("Held against the targets", caption, table=table)])
    return page


def _header(results: Mapping[str, Any]) -> tuple[str, list[tuple[Tone, str]], list[tuple[Tone, str, str]]]:
    """Return the setting, the verdicts and the sources."""
    budget = results.get("max_num_batched_tokens")
    limit = f" (token budget {budget:,})" if budget else ""
    setting = (
        f"The engine ({results['engine']}, on {results['hardware']}) and the simulator served the same requests "
        f"({results['workload']}) under the {results['scheduler']} scheduler{limit}."
    )
    source: tuple[Tone, str, str] = ("good", "Targets", _TARGETS) if held(results) else ("unsure", "A CPU", _CPU)
    if "against" in results:
        setting = (
            f"A server at {results['against']}, measured from outside, and the simulator ({results['engine']} on "
            f"{results['device']}) served the same requests ({results['workload']})."
        )
        worst = results["loads"][0]
    else:
        worst = max(results["loads"], key=lambda load: abs(load["iterations"]["bias_of_time"]))
    largest = capital(", ".join(filter(None, [_among(worst, results["loads"]), worst["largest"]])))
    return setting, verdicts(results), [source, ("unsure", "Largest", f"{largest}.")]


def verdicts(results: Mapping[str, Any]) -> list[tuple[Tone, str]]:
    """Say for each target which load is furthest from it, and whether a replay forms the same batches."""
    loads = results["loads"]
    chips = _outside(loads)
    if not held(results):
        chips.append(("unsure", "On a CPU: held to no target"))
    found = [(each, load) for load in loads for each in judge(load, held(results))]
    for what in dict.fromkeys(each.what for each, _ in found):
        known = [(each, load) for each, load in found if each.what == what and each.error is not None]
        if not known:
            chips.append(("unsure", f"{what}: nothing to compare"))
            continue
        worst, load = max(known, key=lambda pair: abs(pair[0].error or 0.0) / (pair[0].target or 1.0))
        error = percent(worst.error, sign=what != "Iterations")
        words = " ".join(filter(None, [worst.statistic, error, _among(load, loads)]))
        if worst.target is None:
            chips.append(("plain", f"{what}: {words}"))
        else:
            chips.append(("good" if worst.met else "bad", f"{what}: {words} (target {100 * worst.target:.0f} %)"))
    if "against" in results:
        return chips
    if other := [load for load in loads if not load["replay"]["same"]]:
        where = " and ".join(filter(None, [_among(load, loads) for load in other]))
        return [*chips, ("bad", f"Replay: other batches {where}".strip())]
    return [*chips, ("good", "Replay: the same batches")]


def _outside(loads: Sequence[Mapping[str, Any]]) -> list[tuple[Tone, str]]:
    """Return a warning where many of the engine's batches are beyond the calibrated range."""
    every = [load["iterations"] for load in loads if load["iterations"] is not None]
    count = sum(each["count"] for each in every)
    share = sum(each["count"] * (1 - each["in_range"]) for each in every) / count if count else 0.0
    if share < _OUTSIDE:
        return []
    words = f"{percent(share)} of the batches are outside the calibrated range: their times are extrapolated"
    return [("bad" if share >= _MOSTLY_OUTSIDE else "unsure", words)]


def _where(load: Mapping[str, Any]) -> str:
    """Return which load it is, in words."""
    rate = load["request_rate"]
    parts = [] if load["load"] is None else [f"{100 * load['load']:g} % load"]
    parts += [] if rate is None else [f"{number(rate)} requests/s"]
    return "at " + ", ".join(parts) if parts else "the run"


def _among(load: Mapping[str, Any], loads: Sequence[Mapping[str, Any]]) -> str:
    """Return which of several loads it is; nothing where there is only one."""
    if len(loads) == 1:
        return ""
    return _where(load) if load["load"] is None else f"at {100 * load['load']:g} % load"


def _cards(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    loads, capacity = results["loads"], results["capacity"]
    if "against" in results:
        return _outside_cards(results)
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
    return entries


def _outside_cards(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    (load,) = results["loads"]
    found = [("Requests", f"{load['requests']:,}", "answered and simulated"),
             ("Time on the server", seconds(load["engine_s"]), "first arrival to last token")]  # fmt: skip
    for metric in drawn_metrics():
        if (value := load["latencies"][metric.key].get("p50")) is not None:
            sides = f"{seconds(value['engine_s'])} measured, {seconds(value['simulated_s'])} simulated"
            found.append((f"{metric.name}, median", percent(value["error"], sign=True), sides))
    return found


def _by_load(loads: Sequence[Mapping[str, Any]], held: bool) -> Panel:
    columns = [f"{e.what} {e.statistic}" if e.statistic in ("P50", "P99") else e.what for e in judge(loads[0])]
    rows: list[tuple[str, list[Cell]]] = []
    for load in loads:
        errors = [coloured(percent(e.error, sign=e.what != "Iterations"), e.met) for e in judge(load, held)]
        if load["replay"] is not None:
            same = load["replay"]["same"]
            errors.append(coloured("same" if same else "others", same))
        rows.append((capital(_where(load)), errors))
    caption = (
        "Simulated over measured, less 1. Iterations: mean error of the engine's own batches, predicted. Throughput: "
        "the furthest off of requests and tokens a second. Replay: the batches that the simulator forms when it is "
        "given the measured durations."
    )
    replayed = ["Replay"] * (loads[0]["replay"] is not None)
    title = "Held against the targets" if held else "Errors, held to no target"
    return Panel(title, caption, table=numbers_table(("Load", *columns, *replayed), rows))


def _operators(operators: Mapping[str, Mapping[str, Any]]) -> Panel:
    title = "Errors on held-out measurements"
    if not operators:
        return Panel(title, "No calibration: the times are estimated from a data sheet.")
    names = {kind: PAGES[kind].name if kind in PAGES else kind for kind in operators}
    rows = [(names[kind], [f"{found['count']:,}", *error_cells(found)]) for kind, found in operators.items()]
    caption = "Of the calibration that predicts the batches: each part predicted by what was learned from the others."
    return Panel(title, caption, table=numbers_table(("Operator", "Rows", *ERROR_HEADS), rows))


def _facts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = {**results, "KV blocks": results.get("num_gpu_blocks"), "host overhead": results.get("host_overhead")}
    if isinstance(host := found["host overhead"], Mapping):
        times = seconds(host["iteration_s"]), seconds(host["sequence_s"])
        found["host overhead"] = f"{times[0]} an iteration and {times[1]} a sequence"
    names = ("model", "device", "hardware", "engine", "predictor", "scheduler", "KV blocks", "workload",
             "host overhead")  # fmt: skip
    return [(name, str(found[name])) for name in names if found.get(name) is not None]
