"""The pages of a search, and of sweeps and searches side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from studies.pages.capacity_figures import capacity_panels, names_of_points, speed_front, trials
from studies.pages.capacity_record import Point, Search, Sweep
from studies.pages.compare_record import num_gpus, read_side
from studies.pages.figures import Panel
from studies.pages.page import (
    Cell,
    Page,
    Tone,
    about,
    cards,
    coloured,
    details,
    facts_table,
    footer,
    header,
    numbers_table,
)
from studies.pages.ranges import ranges
from studies.pages.run_figures import panels
from studies.pages.run_record import Record
from studies.words import number, percent, seconds


def search_page(search: Search) -> Page:
    """Make the page of a search: its capacity, its trials, and the report of the run at the capacity."""
    page = Page(f"Capacity of {search.name}")
    record = None if search.best is None else read_side(search.best, search.name).record
    page.add(_search_header(search, record), cards(_search_cards(search)))
    page.add(ranges(search.ranges))
    page.add_panels("The search", [trials([search]), _trials_table(search)])
    if record is not None:
        words = about("From here on: the run at the capacity.")
        for heading, group in panels(record):
            page.add_panels(heading, group, words)
            words = ""
    page.add(footer())
    return page


def _search_header(search: Search, record: Record | None) -> str:
    point = search.point
    tone: Tone = {"found": "good", "none": "bad"}.get(point.outcome, "unsure")  # type: ignore[assignment]
    setting = f"The highest request rate at which {_conditions([point])}."
    if record is not None:
        first = record.summary["replicas"][0]
        setting = (
            f"{first['model']} on {num_gpus(record)} \N{MULTIPLICATION SIGN} {first['device']}, {first['parallel']}, "
            f"under the {first['scheduler']} scheduler, serving {record.summary.get('workload', 'its workload')}: "
            f"the highest request rate at which {_conditions([point])}."
        )
    chips: list[tuple[Tone, str]] = [(tone, search.words or _outcome(point))]
    if record is None:
        chips.append(("unsure", "The run at the capacity is not there"))
    return header("Windtunnel · capacity search", search.name, setting, chips, [])


def _conditions(points: Sequence[Point]) -> str:
    """Return what holds at a capacity: the SLOs where they are the same for all points."""
    slos = {point.slos for point in points if point.slos}
    return " and ".join(slos.pop()) if len(slos) == 1 else "its SLOs hold"


def _outcome(point: Point) -> str:
    if point.qps is None:
        return point.status
    return f"{number(point.qps)} {point.rate_of}/s" if point.outcome != "none" else f"no rate meets {point.binding}"


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
    if point.confirmed is not None:
        entries.insert(1, ("Confirmed", f"{number(point.confirmed)} requests/s", "on hardware"))
    if point.published is not None:
        entries.insert(1, ("Published", f"{number(point.published)} requests/s", ""))
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
    heads = ("Requests/s", "SLOs", "Binding SLO", "Value / threshold", "TTFT, median", "TBT, P99")
    return Panel("Each trial", "", table=numbers_table(heads, rows))


def capacities_page(sweeps: Sequence[Sweep], searches: Sequence[Search]) -> Page:
    """Make the page of the points of sweeps and searches side by side."""
    points = [point for sweep in sweeps for point in sweep.points] + [search.point for search in searches]
    every: list[Sweep | Search] = [*sweeps, *searches]
    names = [each.name for each in every]
    page = Page(" and ".join(names) if len(names) < 5 else f"{len(names)} searches and sweeps")
    kicker = "Windtunnel · sweep" if len(names) == 1 else "Windtunnel · capacities side by side"
    setting = f"For each point the highest request rate at which {_conditions(points)}."
    page.add(header(kicker, page.title, setting, _chips(points), []), cards(_best_cards(points)))
    if any(point.qps is not None for point in points):
        page.add_panels("Capacity", capacity_panels(points))
        mean, slowest = "Throughput against a user's speed", "Throughput against a user's slowest speed"
        at_p99 = "Tokens/s of a user in the slowest gaps, 1 / P99 TBT"
        at_mean = speed_front(points, mean, "Tokens/s of a user, 1 / mean TPOT", "tpot", "mean")
        page.add_panels("Speed", [at_mean, speed_front(points, slowest, at_p99, "tbt", "p99")])
    if searches:
        page.add_panels("Searches", [trials(searches)])
    page.add_panels("Every point", _tables(points))
    if len(names) > 1:
        page.add(details("Folders", facts_table((each.name, str(each.folder)) for each in every)))
    page.add(footer())
    return page


def _chips(points: Sequence[Point]) -> list[tuple[Tone, str]]:
    found = sum(bool(point.qps) for point in points)
    chips: list[tuple[Tone, str]] = [("good" if found else "bad", f"{found} of {len(points)} points have a capacity")]
    for status, tone, what in (("refused", "unsure", "refused: they can't be"), ("crashed", "bad", "crashed")):
        count = sum(point.status == status for point in points)
        if count:
            chips.append((tone, f"{count} {what}"))  # type: ignore[arg-type]
    return chips


def _best_cards(points: Sequence[Point]) -> list[tuple[str, str, str]]:
    """Return which point is the best in what."""
    ranks: list[tuple[str, str, Callable[[Point], float | None]]] = [
        ("Highest capacity", "requests/s", lambda point: point.qps),
        ("Most per GPU", "requests/s", lambda point: point.per_gpu),
        ("Most per dollar", "requests", lambda point: point.per_dollar),
        ("Most output per GPU", "tokens/s", lambda point: point.tokens_per_gpu),
    ]
    names = dict(zip(map(id, points), names_of_points(points), strict=True))
    entries = []
    for title, unit, value in ranks:
        best = max(points, key=lambda point: value(point) or 0.0)
        if value(best):
            entries.append((title, _with(value(best), unit), names[id(best)]))
    return entries


def _tables(points: Sequence[Point]) -> list[Panel]:
    done = [point for point in points if point.qps is not None]
    columns: list[tuple[str, Callable[[Point], str]]] = [
        ("Requests/s", lambda point: number(point.qps)),
        ("Binding SLO", lambda point: point.binding or "none"),
        ("GPUs", lambda point: number(point.gpus)),
        ("Per GPU", lambda point: number(point.per_gpu)),
        ("Per dollar", lambda point: number(point.per_dollar)),
        ("Tokens/s/GPU", lambda point: number(point.tokens_per_gpu)),
        ("TTFT, median", lambda point: seconds(point.ttft_s)),
        ("TBT, P99", lambda point: seconds(point.tbt_s)),
        ("TPOT, mean", lambda point: seconds(point.tpot_s)),
        ("Published", lambda point: number(point.published)),
        ("Confirmed", lambda point: number(point.confirmed)),
    ]
    columns = [(head, value) for head, value in columns if any(value(point) != "-" for point in done)]
    named = list(zip(names_of_points(points), points, strict=True))
    rows = [(name, [value(point) for _, value in columns]) for name, point in named if point.qps is not None]
    keys = list(dict.fromkeys(key for point in points for key in point.settings))
    caption = f"A point's name has its values of {', '.join(keys)}." if keys else ""
    found = [Panel("At the capacity", caption, table=numbers_table(("Point", *(head for head, _ in columns)), rows))]
    failed = [(name, f"{point.status}: {point.error}") for name, point in named if point.qps is None]
    if failed:
        found.append(Panel("Points without a result", "", table=facts_table(failed)))
    return found if done else found[1:]
