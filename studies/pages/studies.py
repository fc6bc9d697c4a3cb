"""docs/studies.md, written from the record of the studies (`studies.published.library`) and their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import log, log1p
from pathlib import Path
from statistics import median
from typing import Any

from studies.pages.study import LITTLE, judged, markdown
from studies.published import library
from studies.published.experiment import FITTED_HOST, HOSTS, PAPER_HOST, PLACEBOS, Experiment
from studies.published.judge import Judgement, judge_all, tally
from studies.words import percent

JUDGES = ("capacity", "iso_qps", "hybrid_parallelism", "chunking_overhead", "chunk_size_tradeoff",
          "scheduler_ablation")  # of the fitted host overhead: Figures 5 to 9 and Table 6  # fmt: skip
FAR = 1.5  # times off: listed as an open disagreement
PAGE = Path(__file__).with_suffix(".md")  # its beginning: how to read it


_OF_THE_HOST = (
    "What Figure 2 and Table 2 say of the host's time, held against the figures that it was not fitted to (the "
    "preset `sarathi-osdi24` keeps the measured times):"
)


def render(record: Mapping[str, Any]) -> str:
    """Return the page of a record: what agrees in all, and a section for each study."""
    every = {name: library.load(name) for name in library.names() if name in record}
    lines = [PAGE.read_text(encoding="utf-8")]
    if missing := [name for name in library.names() if name not in record]:
        lines.append(f"Not in the record yet: {', '.join(f'`{name}`' for name in missing)}.\n")
    for name in every:
        if left := [words for host, words in HOSTS.items() if host not in record[name]["records"]]:
            lines.append(f"`{name}` is in the record without: {', '.join(left)}.\n")
    lines += ["## What agrees", ""]
    hosts = [host for host in HOSTS if any(host in record[n]["records"] for n in every) and host not in PLACEBOS]
    heads = " | ".join(["study", "in the paper", *(HOSTS[host] for host in hosts)])
    lines += [f"| {heads} |", "|---" * (2 + len(hosts)) + "|"]
    for name, experiment in every.items():
        verdicts = judged(experiment, record[name]["records"])
        cells = [", ".join(map(str, tally(verdicts.get(host, [])))) or "-" for host in hosts]
        lines.append(f"| `{name}` | {experiment.source} | {' | '.join(cells)} |")
    lines += ["", *_summary(record, every), ""]
    lines += [markdown(name, experiment, record[name]["records"]) for name, experiment in every.items()]
    return "\n".join(lines).rstrip("\n") + "\n"


@dataclass
class Score:
    """How many claims agree, depend on the draw and were run; how far off numbers are that nothing was fitted to."""

    agree: int = 0
    depend: int = 0
    count: int = 0
    off: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        more = f", {self.depend} by the draw" if self.depend else ""
        typical = f"; typical error {percent(median(self.off))}" if self.off else ""
        return f"{self.agree} of {self.count} claims agree{more}{typical}"


def scores(record: Mapping[str, Any], every: Mapping[str, Experiment]) -> dict[str, Score]:
    """Return the score of each host overhead and placebo over some studies."""
    found: dict[str, Score] = {}
    for name, experiment in every.items():
        for host, judgements in judge_all(experiment, record[name]["records"]).items():
            score = found.setdefault(host, Score())
            for claim, each in zip(experiment.claims, judgements, strict=True):
                if each.off is not None and not claim.fitted:
                    score.off.append(abs(each.off))
                if each.verdict not in ("not run", "fitted"):
                    score.agree += each.verdict == "agrees"
                    score.depend += each.verdict == "depends on the draw"
                    score.count += 1
    return found


def _summary(record: Mapping[str, Any], every: Mapping[str, Experiment]) -> list[str]:
    """Return lines of how many claims hold in all, and what the figures say of the fitted host overhead."""
    seeds = max((each["seeds"] for each in record.values()), default=1)
    about = (
        f"{seeds} seeds for the engines, the first for the controls. The typical error is the median of "
        "|ours / published - 1| over the numbers that nothing was fitted to. Of all claims that were run:"
    )
    lines, total = [about, ""], scores(record, every)
    lines += [f"- {'placebo: ' * (host in PLACEBOS)}{HOSTS[host]}: {total[host]}" for host in HOSTS if host in total]
    own = {name: judged(each, record[name]["records"]).get(PAPER_HOST, []) for name, each in every.items()}
    lines += ["", _what_says_something(own), *_far_off(own)]
    judges = {name: each for name, each in every.items()
              if name in JUDGES and {PAPER_HOST, FITTED_HOST} <= set(record[name]["records"])}  # fmt: skip
    if judges:
        lines += ["", _OF_THE_HOST, ""]
        for name, experiment in judges.items():
            mine = scores(record, {name: experiment})
            lines.append(f"- {experiment.source}: measured {mine[PAPER_HOST]}. Fitted {mine[FITTED_HOST]}")
    return lines


def _what_says_something(own: Mapping[str, Sequence[Judgement]]) -> str:
    """Return a line of how many of the claims that agree, of each kind, no placebo passes."""
    every = tally([each for judgements in own.values() for each in judgements])
    parts = ", ".join(f"{each.agree - each.little} of {each.agree} {each.kind}" for each in every if each.agree)
    return (
        f"Of the claims of the paper's engine that agree, no placebo passes {parts}. These say something of the "
        f"predictor; the others ({LITTLE}) say little."
    )


def _far_off(own: Mapping[str, Sequence[Judgement]]) -> list[str]:
    """Return a list of the numbers that the paper's engine is off by half or more, in all draws together."""
    rows = [
        (abs(log1p(each.off)), f"- `{name}`: {each.claim}: {each.published}, ours {each.ours}")
        for name, judgements in own.items()
        for each in judgements
        if each.off is not None and each.verdict == "disagrees" and abs(log1p(each.off)) >= log(FAR)
    ]
    if not rows:
        return []
    about = (
        f"Open disagreements: the published numbers that the paper's engine is off by a factor of {FAR} or more, the "
        "farthest first. What the artifact itself says about one is under its study:"
    )
    return ["", about, "", *(line for _, line in sorted(rows, key=lambda row: -row[0]))]
