"""The page of a study, and its section in Markdown: what was published, beside ours under each host overhead.

write_page("capacity", experiment, records, Path("report.html"))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from studies.pages.figures import Panel
from studies.pages.page import Cell, Page, Tone, details, facts_table, numbers_table
from studies.pages.study_figures import panels
from studies.published.experiment import HOSTS, MODERN_HOST, PAPER_HOST, PLACEBOS, Experiment
from studies.published.judge import KINDS, Choice, Judgement, Records, choices, judge_all, tally
from studies.words import capital, percent

DRAWN = (PAPER_HOST, MODERN_HOST)  # whose figures the page of a whole study shows
LITTLE = "†"
STYLE = (
    "<style>.claims th[scope=row] { min-width: 10rem; background: var(--page); } .claims td { min-width: 6em; } "
    ".claims + p { margin-top: 1rem; }</style>"
)
Judged = Mapping[str, Sequence[Judgement]]  # by host overhead


def judged(experiment: Experiment, records: Mapping[str, Records]) -> dict[str, list[Judgement]]:
    """Return the verdicts under each host overhead, placebos left out, on the claims whose points were run."""
    every = judge_all(experiment, records)
    run = [i for i in range(len(experiment.claims)) if any(each[i].verdict != "not run" for each in every.values())]
    named = [host for host in HOSTS if host in every] + [host for host in every if host not in HOSTS]
    return {host: [every[host][i] for i in run] for host in named if host not in PLACEBOS}


def write_page(
    name: str, experiment: Experiment, records: Mapping[str, Records], path: Path, reduced: str = ""
) -> Path:
    """Write the page; `reduced` says what was left out of the study, if anything was."""
    verdicts = judged(experiment, records)
    page = Page(experiment.title, f" · study {name}")
    kicker = f"Study {name} · Sarathi-Serve (OSDI 2024), {experiment.source[0].lower()}{experiment.source[1:]}"
    page.header(kicker, experiment.shows, _chips(verdicts), _sources(records, reduced))
    if experiment.claims:
        page.add("<h2>Published, and ours</h2>", STYLE, "<div class='claims'>", claims_table(verdicts), "</div>")
        page.add(f"<p>{escape(_how_judged(records))}</p>")
        if words := little_in_words(verdicts.get(PAPER_HOST, [])):
            page.add(f"<p>{escape(capital(HOSTS[PAPER_HOST]))}: {escape(words)}.</p>")
    for host, judgements in verdicts.items():
        missed = [each for each in judgements if each.explanation]
        if missed and host in DRAWN:
            why = [f"{each.ours} for {each.published} ({each.verdict}): {each.explanation}" for each in missed]
            rows = zip([each.claim for each in missed], why, strict=True)
            count = f"{len(missed)} claim{'s' * (len(missed) > 1)}"
            page.add(details(f"Why ours differs as {host_name(host)}: {count}", facts_table(rows)))
    beside: dict[str, list[Panel]] = {}  # by figure, under each host overhead
    for host, found in records.items():
        if found and host in (DRAWN if PAPER_HOST in records else list(records)[:1]):
            for panel in panels(experiment, found):
                named = replace(panel, title=f"{panel.title}, {HOSTS.get(host, host)}")
                beside.setdefault(panel.title, []).append(named)
    page.add_panels("Figures", [panel for row in beside.values() for panel in row])
    for host, found in records.items():
        if table := choices(found):
            _add_choices(page, table, host)
    if experiment.choices:
        page.add("<h2>What the paper leaves open</h2><ul>")
        page.add(*(f"<li>{escape(line)}</li>" for line in experiment.choices), "</ul>")
    return page.write(path)


def _how_judged(records: Mapping[str, Records]) -> str:
    """Return how to read the verdicts."""
    every = [record["draws"] for each in records.values() for record in each.values() if record.get("draws")]
    seeds = max((len(next(iter(draws.values()))) for draws in every), default=1)
    drawn = f"Numbers are medians of {seeds} draws of the requests [lowest to highest]. " if seeds > 1 else ""
    words = (
        f"{drawn}A number agrees within 20 % of the published one, its reading included; a claim depends on the draw "
        "where it agrees in some draws only."
    )
    if placebos := [HOSTS[host] for host in records if host in PLACEBOS]:
        words += f" {LITTLE}: it agrees with a placebo's times too ({' or '.join(placebos)}), "
        words += "so that it says little of the predictor."
    return words


def host_name(host: str) -> str:
    """Return a host overhead in words, with its name."""
    return f"{HOSTS[host]} ({host})" if host in HOSTS else host


def _chips(verdicts: Judged) -> list[tuple[Tone, str]]:
    """Return how many claims of each kind agree, under each host overhead."""
    chips: list[tuple[Tone, str]] = []
    for host, judgements in verdicts.items():
        for each in tally(judgements):
            some: Tone = "unsure" if each.agree or each.depend else "bad"
            tone: Tone = "good" if each.agree == each.count and each.agree > each.little else some
            chips.append((tone, f"{HOSTS.get(host, host)}: {each}"))
    return chips


def _sources(records: Mapping[str, Records], reduced: str) -> list[tuple[Tone, str, str]]:
    every = ", ".join(host_name(host) for host in records if host not in PLACEBOS)
    simulated = f"with the host overhead of {every}; nothing here was run on a GPU."
    less: list[tuple[Tone, str, str]] = [("bad", "reduced", f"{reduced}: these figures are not the study's.")]
    return [*(less if reduced else []), ("unsure", "simulated", simulated)]


def claims_table(verdicts: Judged) -> str:
    """Return a row for each claim: published, and ours under each host overhead."""
    heads = ("Published", *(capital(HOSTS.get(host, host)) for host in verdicts))
    parts = []
    for kind in KINDS:
        rows: list[tuple[str, list[Cell]]] = []
        for judgements in zip(*verdicts.values(), strict=True):
            if judgements[0].kind == kind:
                rows.append((_claim(judgements[0]), [judgements[0].published, *map(_cell, judgements)]))
        if rows:
            parts.append(numbers_table((kind.capitalize(), *heads), rows, words=True))
    return "".join(parts)


def _claim(judgement: Judgement) -> str:
    return judgement.claim + f" {LITTLE}" * judgement.says_little


def _cell(judgement: Judgement) -> Cell:
    tones: dict[str, Tone] = {"agrees": "unsure" if judgement.says_little else "good", "disagrees": "bad"}
    if judgement.verdict == "not run":
        return "-"
    words = "" if judgement.verdict in tones else f", {judgement.verdict}"
    return tones.get(judgement.verdict, "unsure"), judgement.ours_and_off + words


def _choices_in_numbers(table: Sequence[Choice]) -> tuple[str, float, float, str | None]:
    """Return in how many places the best was chosen, the largest regret and error, and the lowest correlation."""
    right = sum(choice.chosen == choice.best for choice in table)
    known = [choice.spearman for choice in table if choice.spearman is not None]
    regret, error = (max(getattr(choice, name) for choice in table) for name in ("regret", "worst_error"))
    return f"{right} of {len(table)} places", regret, error, f"{min(known):.2f}" if known else None


def _add_choices(page: Page, table: Sequence[Choice], host: str) -> None:
    """Add a row for each place: the choice, the best, how the ranks agree, and what the choice costs."""
    right, regret, _, correlation = _choices_in_numbers(table)
    words = (
        f"The scheduler with the highest capacity at the search's usual tolerance, against every scheduler's capacity "
        f"to 0.5 % with each trial run to its end, as {host_name(host)}: the best one is "
        f"chosen in {right}; the largest regret is {percent(regret)}"
        + (f", the lowest rank correlation {correlation}" if correlation else "")
    )
    rows = []
    for each in table:
        rank = "-" if each.spearman is None else f"{each.spearman:.2f}"
        costs = percent(each.regret), percent(each.worst_error)
        rows.append((each.place, [each.chosen, each.best, rank, *costs]))
    heads = ("Place", "Chosen", "Best", "Rank correlation", "Regret", "Largest error of a capacity")
    page.add("<h2>How good is the choice?</h2>", f"<p>{escape(words)}.</p>", STYLE)
    page.add("<div class='claims'>", numbers_table(heads, rows), "</div>")


def markdown(name: str, experiment: Experiment, records: Mapping[str, Records]) -> str:
    """Return the study's section of a page in Markdown."""
    verdicts = judged(experiment, records)
    hosts = list(verdicts)
    lines = [f"## {experiment.title}", "", f"`windtunnel study run {name}` · {experiment.source}.", ""]
    lines += [experiment.shows.strip(), ""]
    lines += [f"- {host_name(host)}: {in_words(verdicts[host])}" for host in hosts]
    if words := little_in_words(verdicts.get(PAPER_HOST, [])):
        lines.append(f"- {words}")
    heads = ["claim", "published", *(HOSTS.get(host, host) for host in hosts)]
    every = zip(*verdicts.values(), strict=True)
    rows = [[_claim(row[0]), row[0].published, *map(_markdown_cell, row)] for row in every]
    lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    for host in hosts:
        if table := choices(records[host]):
            lines += ["", _markdown_choices(table, host)]
    if experiment.choices:
        lines += ["", *(f"- {line}" for line in experiment.choices)]
    return "\n".join(lines) + "\n"


def in_words(judgements: Sequence[Judgement]) -> str:
    """Return how many claims of each kind agree."""
    parts = [str(each) for each in tally(judgements)]
    return ", ".join(parts) + " agree" if parts else "nothing of what was published was run"


def little_in_words(judgements: Sequence[Judgement]) -> str:
    """Return how many of the claims that agree say little of the predictor; nothing where none does."""
    agree = [each for each in judgements if each.verdict == "agrees"]
    little = sum(each.says_little for each in agree)
    which = f"{'all' if little == len(agree) else little} of the {len(agree)} that agree"
    return f"{LITTLE} with a placebo's times too, so saying little of the predictor: {which}" if little else ""


def _markdown_cell(judgement: Judgement) -> str:
    marks = {"fitted": " fitted", "disagrees": " ✗", "depends on the draw": " ~"}
    return "-" if judgement.verdict == "not run" else judgement.ours_and_off + marks.get(judgement.verdict, "")


def _markdown_choices(table: Sequence[Choice], host: str) -> str:
    right, regret, error, lowest = _choices_in_numbers(table)
    correlation = f"; rank correlation {lowest} or more" if lowest else ""
    return (
        f"The search's choice of a scheduler against a fine search to 0.5 % ({host_name(host)}): the best in "
        f"{right}, regret at most {percent(regret)}, capacities off by at most {percent(error)}{correlation}."
    )


def to_json(experiment: Experiment, records: Mapping[str, Records]) -> dict[str, Any]:
    """Return everything as plain data: records, verdicts and choices."""
    return {
        "title": experiment.title,
        "source": experiment.source,
        "judgements": {host: list(map(vars, each)) for host, each in judge_all(experiment, records).items()},
        "choices": {host: list(map(vars, choices(found))) for host, found in records.items()},
        "records": {host: dict(found) for host, found in records.items()},
    }


def summary_lines(experiment: Experiment, records: Mapping[str, Records]) -> list[str]:
    """Return what to print: a line for each host overhead, and the claims that don't agree."""
    lines = []
    for host, judgements in judged(experiment, records).items():
        lines.append(f"{host_name(host)}: {in_words(judgements)}")
        if host in (PAPER_HOST, *list(records)[:1]):
            lines += [f"  {each.sentence()}" for each in judgements if each.explanation]
    return lines
