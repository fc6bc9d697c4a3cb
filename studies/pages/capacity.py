"""The pages of a search, and of sweeps and searches side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from studies.capacity.ranges import Range, alike
from studies.pages.capacity_figures import capacity_panels, names_of_points, things_of, trials
from studies.pages.capacity_record import Point, Search, Sweep
from studies.pages.compare_record import num_gpus, read_side
from studies.pages.figures import Panel
from studies.pages.page import Cell, Page, Tone, coloured, details, facts_table, numbers_table, ranges
from studies.pages.run_figures import panels
from studies.pages.run_record import Record, flat
from studies.pages.sweep_figures import heat_map, load_curves, trade_offs
from studies.words import capital, dollars, listed, number, percent, seconds, times_kind, unlike_sources

_MOST_ALIKE = 4  # points that can't be told apart from the best, which are named


def search_page(search: Search) -> Page:
    """Make the page of a search: its capacity, its trials, and the report of the run at the capacity."""
    page = Page(f"Capacity of {search.name}")
    record = None if search.best is None else read_side(search.best, search.name).record
    _search_header(page, search, record)
    page.cards(_search_cards(search))
    page.add(ranges(search.ranges))
    if curves := load_curves([search.point]):
        page.add_panels("Latency against load", curves)
    page.add_panels("The search", [trials([search]), _trials_table(search)])
    if record is not None:
        words = "From here on: the run at the capacity."
        for heading, group in panels(record):
            page.add_panels(heading, group, words)
            words = ""
        page.add(details("Configuration of the run at the capacity", facts_table(flat(record.config), code=True)))
    return page


def _search_header(page: Page, search: Search, record: Record | None) -> None:
    point = search.point
    tone: Tone = {"found": "good", "none": "bad"}.get(point.outcome, "unsure")  # type: ignore[assignment]
    found = f"no rate meets {point.binding}" if point.outcome == "none" else f"{number(point.qps)} {point.rate_of}/s"
    answer = search.words or (point.status if point.qps is None else found)
    chips: list[tuple[Tone, str]] = [] if point.outcome == "found" else [(tone, answer)]
    if point.range is not None:
        low, high = map(number, point.range)
        answer += f". Range: {low} to {high} {point.rate_of}/s over {point.range_over}"
    if point.unsteady:
        chips.append(("unsure", f"The run at the capacity: {point.unsteady}"))
    what = f"the highest request rate at which {_conditions([point])}."
    if record is None:
        chips.append(("unsure", "The run at the capacity is not there"))
        setting = capital(what)
    else:
        first, load = record.summary["replicas"][0], record.summary.get("workload", "its workload")
        setting = (
            f"{first['model']} on {num_gpus(record)} \N{MULTIPLICATION SIGN} {first['device']}, {first['parallel']}, "
            f"under the {first['scheduler']} scheduler, serving {load}: {what}"
        )
    page.header("Windtunnel · capacity search", setting, chips, _sources([point]),
                title=search.name, answer=f"{capital(answer)}.")  # fmt: skip


def _sources(points: Sequence[Point]) -> list[tuple[Tone, str, str]]:
    """Return where the points' times came from, a line for each predictor with the devices that it is of."""
    devices: dict[str, list[str]] = {}
    for point in points:
        if point.predictor:
            devices.setdefault(point.predictor, []).append(point.device)
    return [
        (
            "good" if (kind := times_kind(line)) == "calibrated" else "unsure",
            capital(kind),
            f"Times of {' and '.join(dict.fromkeys(of)) or 'these'}: {line}.",
        )
        for line, of in devices.items()
    ]


def _conditions(points: Sequence[Point]) -> str:
    """Return what holds at a capacity: the SLOs where they are the same for all points."""
    slos = {point.slos for point in points if point.slos}
    return " and ".join(slos.pop()) if len(slos) == 1 else "its SLOs hold"


def _search_cards(search: Search) -> list[tuple[str, str, str]]:
    point = search.point
    given_up = sum(trial.stopped_early is not None for trial in search.trials)
    entries = [
        ("Capacity", f"{number(point.qps or 0.0)} {point.rate_of}/s", f"to {percent(search.tolerance)}"),
        ("Per GPU", _with(point.per_gpu, f"{point.rate_of}/s"), f"of {point.gpus}" if point.gpus else ""),
        ("Output", _with(point.tokens, "tokens/s"), "at the capacity"),
        ("TTFT, median", seconds(point.ttft_s), "at the capacity"),
        ("TBT, P99", seconds(point.tbt_s), "at the capacity"),
        ("Trials", f"{len(search.trials)}", f"{given_up} given up early"),
    ]
    if point.range is not None:
        entries.insert(1, ("Range", f"{_range(point.range)} /s", f"over {point.range_over}"))
    if point.confirmed is not None:
        entries.insert(1, ("Confirmed", f"{number(point.confirmed)} {point.rate_of}/s", "on hardware"))
    if point.published is not None:
        entries.insert(1, ("Published", f"{number(point.published)} {point.rate_of}/s", ""))
    return entries


def _with(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{number(value)} {unit}"


def _trials_table(search: Search) -> Panel:
    rows: list[tuple[str, list[Cell]]] = []
    for trial in search.trials:
        margin = trial.margins.get(trial.binding, 0.0)
        how = "given up" if trial.stopped_early else f"{margin:.3g} \N{MULTIPLICATION SIGN}"
        verdict = coloured("met" if trial.met else "missed", trial.met)
        cells = [verdict, trial.binding, how, seconds(trial.ttft_s), seconds(trial.tbt_s)]
        rows.append((f"{trial.rate:.4g}", cells))
    rate = f"{capital(search.point.rate_of)}/s"
    heads = (rate, "SLOs", "Binding SLO", "Value / threshold", "TTFT, median", "TBT, P99")
    return Panel("Each trial", "", table=numbers_table(heads, rows))


def capacities_page(sweeps: Sequence[Sweep], searches: Sequence[Search]) -> Page:
    """Make the page of the points of sweeps and searches side by side: the answer, where it comes from, the figures."""
    points = [point for sweep in sweeps for point in sweep.points] + [search.point for search in searches]
    every: list[Sweep | Search] = [*sweeps, *searches]
    names = [each.name for each in every]
    page = Page(" and ".join(names) if len(names) < 5 else f"{len(names)} searches and sweeps")
    kicker = "Windtunnel · sweep" if len(names) == 1 else "Windtunnel · capacities side by side"
    setting = f"For each point the highest request rate at which {_conditions(points)}."
    page.header(kicker, setting, _chips(points), _sources(points), answer=_answer(points))
    page.cards(_best_cards(points))
    for sweep in sweeps:
        if sweep.settings:
            title = "What all points have in common" + f" in {sweep.name}" * (len(every) > 1)
            page.add(details(title, facts_table(flat(sweep.settings), code=True)))
    if any(point.qps is not None for point in points):
        page.add_panels("Capacity", [*capacity_panels(points), *heat_map(points)])
        if any(point.loads for point in points):
            page.add_panels("Trade-offs", trade_offs(points))
    if curves := load_curves(points):
        page.add_panels("Latency against load", curves)
    if searches:
        page.add_panels("Searches", [trials(searches)])
    page.add_panels("Every point", _tables(points))
    if len(names) > 1:
        page.add(details("Folders", facts_table((each.name, str(each.folder)) for each in every)))
    return page


def _answer(points: Sequence[Point]) -> str:
    """Return which point is the best per GPU, and at what price; "" where there is none or only one.

    Points whose times are of unlike kinds are not ranked together: the best of each kind is named.
    """
    ranked, names = _ranked(points), names_of_points(points)
    if len(ranked) < 2:
        return ""
    best: dict[str, Point] = {}
    for point in ranked:
        best.setdefault(times_kind(point.predictor), point)
    if len(best) == 1:
        return f"Most per GPU: {_in_words(ranked[0], names)}."
    each = [f"{kind}: {_in_words(point, names)}" for kind, point in best.items()]
    return f"Most per GPU of those whose times are {'; '.join(each)}."


def _in_words(point: Point, names: Mapping[int, str]) -> str:
    words = f"{names[id(point)]}: {number(point.per_gpu)} {point.rate_of}/s"
    if point.range_per_gpu is not None:
        low, high = map(number, point.range_per_gpu)
        words += f" ({low} to {high} over {point.range_over})"
    if point.usd is None:
        return words
    between = "" if point.usd_range is None else " ({} to {})".format(*map(dollars, point.usd_range))
    return f"{words}, ${number(point.usd)} per million output tokens{between}"


def _ranked(points: Sequence[Point]) -> list[Point]:
    """Return the points with a capacity, the most per GPU first."""
    return sorted((point for point in points if point.per_gpu), key=lambda point: -(point.per_gpu or 0.0))


def _apart(points: Sequence[Point]) -> list[tuple[Tone, str]]:
    """Say which points can't be told apart from the best per GPU, or that it is ahead of all."""
    ranked, names = _ranked(points), names_of_points(points)
    drawn = bool(ranked) and "draws" in ranked[0].range_over
    unlike = unlike_sources([point.predictor for point in ranked])
    if len(ranked) < 2 or ranked[0].range is None or (unlike and not drawn):
        return []
    rest = "" if drawn else "; errors of the predicted times are not in it (--uncertainty)"
    others = [names[id(ranked[i])] for i in alike([point.range_per_gpu for point in ranked], 0)]
    if not others:
        return [("good" if drawn else "unsure", f"Its range over {ranked[0].range_over} overlaps no other's{rest}")]
    few = listed(others, _MOST_ALIKE)
    return [("unsure", f"Can't be told apart from it, for their ranges overlap: {few}{rest}")]


def _chips(points: Sequence[Point]) -> list[tuple[Tone, str]]:
    chips: list[tuple[Tone, str]] = []
    if warning := unlike_sources([point.predictor for point in points if point.qps is not None]):
        chips.append(("bad", capital(warning)))
    chips += _apart(points)
    found = sum(bool(point.qps) for point in points)
    chips.append(("good" if found else "bad", f"{found} of {len(points)} points have a capacity"))
    if refused := sum(point.status == "refused" for point in points):
        chips.append(("unsure", f"{refused} refused: they can't be"))
    if crashed := sum(point.status == "crashed" for point in points):
        chips.append(("bad", f"{crashed} crashed"))
    if unsteady := sum(bool(point.unsteady) for point in points):
        more = "with more requests (--num-prompts) they may be lower"
        many = "1 capacity is of a run" if unsteady == 1 else f"{unsteady} capacities are of runs"
        chips.append(("unsure", f"{many} not seen to be sustained: {more}"))
    return chips


def _best_cards(points: Sequence[Point]) -> list[tuple[str, str, str]]:
    """Return which point is the best in what."""
    things = things_of(points)
    names = names_of_points(points)
    entries = []
    for title, unit, name in (
        ("Highest capacity", f"{things}/s", "qps"),
        ("Most per GPU", f"{things}/s", "per_gpu"),
        ("Most per dollar", things, "per_dollar"),
        ("Most output per GPU", "tokens/s", "tokens_per_gpu"),
    ):
        best = max(points, key=lambda point: getattr(point, name) or 0.0)
        if value := getattr(best, name):
            entries.append((title, f"{number(value)} {unit}", names[id(best)]))
    if priced := [point for point in points if point.usd is not None]:
        point = min(priced, key=lambda point: point.usd or 0.0)
        entries.append(("Cheapest", f"${number(point.usd)} /M tokens", f"output; {names[id(point)]}"))
    return entries


def _tables(points: Sequence[Point]) -> list[Panel]:
    ranked = sorted((point for point in points if point.qps is not None), key=lambda point: -(point.per_gpu or 0.0))
    alone = {point.gpus for point in ranked} == {1}  # then per GPU is the same again
    names = names_of_points(points)
    heads, rows = ["Point"], [(names[id(point)], list[Cell]()) for point in ranked]
    columns: list[tuple[str, str, Callable[[Any], str], int]] = [  # head, what of a point, in words, 1: more is better
        (f"{capital(things_of(ranked))}/s", "qps", number, 1),
        ("Range", "range", _range, 0),
        ("Binding SLO", "binding", lambda slo: slo or "none", 0),
        ("GPUs", "gpus", number, 0),
        ("Per GPU", "per_gpu", number, 1),
        ("Per dollar", "per_dollar", number, 1),
        ("$/M output", "usd", number, -1),
        ("$/M range", "usd_range", _range, 0),
        ("Tokens/s/GPU", "tokens_per_gpu", number, 1),
        ("TTFT, median", "ttft_s", seconds, -1),
        ("TBT, P99", "tbt_s", seconds, -1),
        ("TPOT, mean", "tpot_s", seconds, -1),
        ("Published", "published", number, 0),
        ("Confirmed", "confirmed", number, 0),
        ("Times", "predictor", lambda line: times_kind(line) if line else "-", 0),
    ]
    for head, name, in_words, more in columns:
        values = [getattr(point, name) for point in ranked]
        words = list(map(in_words, values))
        if set(words) <= {"-"} or (alone and head in ("GPUs", "Per GPU")):
            continue
        heads.append(head)
        best = max((more * value for value in values if more and value), default=None)
        for value, said, (_, cells) in zip(values, words, rows, strict=True):
            marked = best is not None and value is not None and more * value == best and len(ranked) > 1
            cells.append(("best", said) if marked else said)
    caption = "The most per GPU first; a star marks the best of a column, a click on a head sorts."
    found = [Panel("At the capacity", caption, table=numbers_table(heads, rows))]
    failed = [(names[id(point)], f"{point.status}: {point.error}") for point in points if point.qps is None]
    if failed:
        found.append(Panel("Points without a result", "", table=facts_table(failed)))
    return found if ranked else found[1:]


def _range(found: Range | None) -> str:
    return "-" if found is None else f"{number(found[0])}\N{EN DASH}{number(found[1])}"
