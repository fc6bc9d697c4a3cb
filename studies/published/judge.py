"""Published claims held against our values, in words: what was said, what came out, whether it agrees, and if not, why.

A claim is judged for each draw of the requests. It agrees when all draws do, disagrees when none does, and otherwise
depends on the draw. One that holds under a placebo too says little of the predictor, and is marked. Nothing here knows
an outcome: an explanation is made of what the runs themselves say (where an SLO binds, how long batches take, how full
the KV cache is) and of how far each side of a ratio is from its own published value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from engine.results.tables import Array
from studies.published.experiment import FITTED_HOST, PLACEBOS, TOLERANCE, Claim, Experiment
from studies.words import number, percent

Records = Mapping[str, Mapping[str, Any]]  # of a host overhead, by point
Verdict = Literal["agrees", "disagrees", "depends on the draw", "fitted", "not run"]

KINDS = {"orders": ("order",), "ratios": ("ratio", "up_to"), "absolute values": ("value",)}  # by comparison


@dataclass(frozen=True)
class Judgement:
    """A claim's verdict. `off` is the error of a number's median; `placebos` are those that pass the claim too."""

    claim: str
    source: str
    kind: str
    published: str
    ours: str
    verdict: Verdict
    off: float | None = None
    explanation: str = ""
    placebos: tuple[str, ...] = ()

    @property
    def says_little(self) -> bool:
        """Whether a placebo passes it too."""
        return bool(self.placebos)

    @property
    def ours_and_off(self) -> str:
        """Our value with how far it is off the published one."""
        return self.ours + ("" if self.off is None else f" ({percent(self.off, sign=True)})")

    def sentence(self) -> str:
        """Return the verdict in words."""
        if self.verdict == "not run":
            return f"{self.claim}: not run"
        return f"{self.claim}: published {self.published}, ours {self.ours_and_off}: {self.verdict}"


def judge_all(experiment: Experiment, records: Mapping[str, Records]) -> dict[str, list[Judgement]]:
    """Return the verdicts under each host overhead and placebo, with the placebos that pass a claim marked on it."""
    every = {host: judge(experiment, found, host) for host, found in records.items()}
    placebos = [host for host in PLACEBOS if host in every]
    for i in range(len(experiment.claims)):
        passed = tuple(host for host in placebos if every[host][i].verdict == "agrees")
        for judgements in every.values():
            judgements[i] = replace(judgements[i], placebos=passed)
    return every


def judge(experiment: Experiment, records: Records, host: str = "") -> list[Judgement]:
    """Return every claim of a study against the records of one host overhead."""
    known = {claim.of[0]: claim.published for claim in experiment.claims if claim.compare == "value"}
    return [_judge(claim, records, known, host == FITTED_HOST) for claim in experiment.claims]


def draws_of(records: Records, name: str) -> Array | None:
    """Return the value `POINT:METRIC` of each draw (draws,); None where it was not run."""
    point, _, metric = name.rpartition(":")
    record = records.get(point)
    if record is None or metric not in record["values"]:
        return None
    return np.array(record.get("draws", {}).get(metric, [record["values"][metric]]), dtype=float)


def _judge(claim: Claim, records: Records, known: Mapping[str, float | None], on_fitted: bool) -> Judgement:
    drawn = [draws_of(records, name) for name in claim.of]
    kind = next(kind for kind, comparisons in KINDS.items() if claim.compare in comparisons)
    times = "" if claim.compare == "value" else " times"
    read = f" ± {percent(claim.reading)}" if claim.reading else ""
    published = "in that order" if claim.published is None else f"{number(claim.published)}{times}{read}"
    given = [draws for draws in drawn if draws is not None]
    if len(given) < len(drawn):
        return Judgement(claim.says, claim.source, kind, published, "not run", "not run")
    values = np.array(np.broadcast_arrays(*given))  # (values of the claim, draws)
    off = None
    if claim.compare == "order":
        held = np.all(values[:-1] > values[1:], axis=0)
        ours = _in_order(claim, values)
    else:
        pairs = values if claim.compare == "up_to" else values[:2]
        numbers = values[0] if claim.compare == "value" else np.array([max(_ratios(draw)) for draw in pairs.T])
        assert claim.published is not None
        errors = numbers / claim.published - 1
        held = np.abs(errors) <= TOLERANCE
        middle = float(np.median(numbers))
        ours = f"{number(middle)}{times}{_spread(numbers)}" if np.isfinite(middle) else "no bound: the other is 0"
        off = float(np.median(errors)) if np.isfinite(middle) else None
    verdict: Verdict = "agrees" if held.all() else "depends on the draw" if held.any() else "disagrees"
    if claim.fitted and on_fitted:
        verdict = "fitted"
    explanation = "" if verdict in ("agrees", "fitted") else _explain(claim, values, records, known)
    return Judgement(claim.says, claim.source, kind, published, ours, verdict, off, explanation)


def _spread(numbers: Array) -> str:
    low, high = number(float(numbers.min())), number(float(numbers.max()))
    return f" [{low} to {high}]" if low != high else ""


def _in_order(claim: Claim, values: Array) -> str:
    """Return the values (values of the claim, draws) of an order with what they are of, the highest first."""
    parts = [_in_words(name.rpartition(":")[0].split("/")) for name in claim.of]
    width = min(map(len, parts))
    differ = [i for i in range(width) if len({part[i] for part in parts}) > 1]
    metrics = [name.rpartition(":")[2].replace("_", " ") for name in claim.of]
    places = [" ".join([*(part[i] for i in differ), *part[width:]]) for part in parts]
    names = [place or metric for place, metric in zip(places, metrics, strict=True)]
    if len(set(names)) < len(names):
        names = [f"{name} {metric}".strip() for name, metric in zip(names, metrics, strict=True)]
    medians = np.median(values, axis=1)
    text, above = "", None
    for place in np.argsort(-medians, kind="stable"):
        text += "" if above is None else " > " if above > medians[place] else " = "
        above = float(medians[place])
        text += f"{names[place]} {number(above)}{_spread(values[place])}"
    return text


def _in_words(parts: list[str]) -> list[str]:
    """Return the parts of a point's place, with what a number in it is of: a load's rate, a chunk's tokens."""
    *above, last = parts
    if len(parts) == 3 and above[1] == "prefill":
        return [above[0], f"prompt of {last} tokens:"]
    if len(parts) == 3 and above[1] == "decode":
        return [above[0], f"{last} decode{'s' * (last != '1')}:"]
    above = [f"at {part}/s:" if i == 2 and _is_number(part) else part for i, part in enumerate(above)]
    return [*above, f"chunk {last}:" if len(parts) > 2 and _is_number(last) else last]


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def _explain(claim: Claim, values: Array, records: Records, known: Mapping[str, float | None]) -> str:
    """Say why ours differs, as far as the runs tell."""
    about: Sequence[str] = claim.of
    if claim.compare == "up_to":  # of several pairs the one with the largest ratio
        best = int(np.argmax(_ratios(np.median(values, axis=1))))
        about = claim.of[2 * best : 2 * best + 2]
    shown: dict[str, None] = {}
    for name in about:
        point, _, metric = name.rpartition(":")
        drawn, published = draws_of(records, name), known.get(name)
        assert drawn is not None
        ours = float(np.median(drawn))
        words = f"{point} has {metric} {number(ours)}{_spread(drawn)}"
        if published is not None and claim.compare != "value":
            words += f" where {number(published)} was published ({percent(ours / published - 1, sign=True)})"
        facts = records[point].get("facts", "")
        shown[words + (f": {facts}" if facts else "")] = None
    return ". ".join(shown)


def _ratios(values: Array) -> list[float]:
    """Return the ratio of each pair: without a bound where the second is 0, and no number where both are."""
    pairs = zip(values[::2].tolist(), values[1::2].tolist(), strict=True)
    return [above / below if below else float("inf") if above else float("nan") for above, below in pairs]


@dataclass(frozen=True)
class Tally:
    """How many claims of a kind agree, depend on the draw, and were judged; `little` of those that agree say little."""

    kind: str
    agree: int
    depend: int
    count: int
    little: int

    def __str__(self) -> str:
        more = [f"{self.depend} by the draw"] * bool(self.depend) + [f"{self.little} †"] * bool(self.little)
        return f"{self.agree} of {self.count} {self.kind}" + (f" ({', '.join(more)})" if more else "")


def tally(judgements: Sequence[Judgement]) -> list[Tally]:
    """Return the counts of each kind of claim that was judged."""
    found = []
    for kind in KINDS:
        mine = [each for each in judgements if each.kind == kind and each.verdict not in ("not run", "fitted")]
        agree = [each for each in mine if each.verdict == "agrees"]
        depend = sum(each.verdict == "depends on the draw" for each in mine)
        if mine:
            found.append(Tally(kind, len(agree), depend, len(mine), sum(each.says_little for each in agree)))
    return found


@dataclass(frozen=True)
class Choice:
    """Of the schedulers of one place: what the search would choose, and what that costs against the truth.

    `spearman` is the rank correlation of the search's capacities with those at a fine tolerance (None: all alike);
    `regret` the share of the best fine capacity that the chosen scheduler lacks; `worst_error` the largest relative
    difference between the two capacities of a scheduler.
    """

    place: str
    chosen: str
    best: str
    spearman: float | None
    regret: float
    worst_error: float


def choices(records: Records) -> list[Choice]:
    """Return the choice at each place (setup, workload, SLO) where every scheduler was searched twice."""
    places: dict[str, dict[str, Mapping[str, Any]]] = {}
    for point, record in records.items():
        if "fine_qps" in record:
            place, _, scheduler = point.rpartition("/")
            places.setdefault(place, {})[scheduler] = record
    return [_choice(place, found) for place, found in places.items() if len(found) > 1]


def _choice(place: str, found: Mapping[str, Mapping[str, Any]]) -> Choice:
    names = list(found)
    coarse = np.array([found[name].get("coarse_qps", found[name]["values"]["qps"]) for name in names])
    fine = np.array([found[name]["fine_qps"] for name in names])
    chosen, best = int(coarse.argmax()), int(fine.argmax())
    some = np.maximum(coarse, fine) > 0
    errors = np.abs(coarse - fine)[some] / np.maximum(coarse, fine)[some]
    regret = float(1 - fine[chosen] / fine[best]) if fine[best] else 0.0
    return Choice(place, names[chosen], names[best], spearman(coarse, fine), regret, float(errors.max(initial=0.0)))


def spearman(first: Array, second: Array) -> float | None:
    """Return the rank correlation (Spearman), equal values sharing their mean rank; None where either has no spread."""
    # a rank: how many are below, and half of those alike
    ranks = [((each[:, None] > each).sum(axis=1) + (each[:, None] >= each).sum(axis=1)) / 2 for each in (first, second)]
    ours, theirs = (each - each.mean() for each in ranks)
    norm = float(np.sqrt((ours**2).sum() * (theirs**2).sum()))
    return float((ours * theirs).sum()) / norm if norm else None
