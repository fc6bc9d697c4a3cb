"""Published claims held against our values, in words: what was said, what came out, whether it agrees, and if not, why.

Nothing here knows an outcome. An explanation is made of what the runs themselves say (where an SLO binds, how long
batches take, how full the KV cache is), of how far each side of a ratio is from its own published value, and of the
note that a study's file has for the case.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from engine.results.tables import Array
from studies.published.experiment import Claim, Experiment
from studies.words import number, percent

Records = Mapping[str, Mapping[str, Any]]  # of a host overhead, by point

KINDS = {  # the sections of a verdict, and the comparisons in each
    "orders": ("order",),
    "ratios": ("ratio", "up_to"),
    "bounds": ("at_least", "at_most"),
    "absolute values": ("value",),
}


@dataclass(frozen=True)
class Judgement:
    """A claim's verdict. `agrees` is None where the points were not run; `off` is the error of a number."""

    claim: str
    source: str
    kind: str
    published: str
    ours: str
    agrees: bool | None
    off: float | None = None
    explanation: str = ""

    def sentence(self) -> str:
        """Return the verdict in words."""
        if self.agrees is None:
            return f"{self.claim}: not run"
        off = "" if self.off is None else f" ({percent(self.off, sign=True)})"
        verdict = "agrees" if self.agrees else "does not agree"
        return f"{self.claim}: published {self.published}, ours {self.ours}{off}: {verdict}"


def judge(experiment: Experiment, records: Records) -> list[Judgement]:
    """Return every claim of a study against the records of one host overhead."""
    known = {claim.of[0]: claim.published for claim in experiment.claims if claim.compare == "value"}
    return [_judge(claim, records, known) for claim in experiment.claims]


def value_of(records: Records, name: str) -> float | None:
    """Return the value `POINT:METRIC`, or None where the point was not run."""
    point, _, metric = name.rpartition(":")
    record = records.get(point)
    return None if record is None else float(record["values"][metric])


def _judge(claim: Claim, records: Records, known: Mapping[str, float | None]) -> Judgement:
    values = [value_of(records, name) for name in claim.of]
    kind = next(kind for kind, comparisons in KINDS.items() if claim.compare in comparisons)
    published = _published(claim)
    given = [value for value in values if value is not None]
    if len(given) < len(values):
        return Judgement(claim.says, claim.source, kind, published, "not run", None)
    if claim.compare == "order":
        agrees = all(high > low for high, low in pairwise(given))
        ours = " > ".join(map(number, given)) if agrees else ", ".join(map(number, given))
        off = None
    else:
        ours_value = _number(claim, given)
        assert claim.published is not None
        off = ours_value / claim.published - 1 if claim.compare in ("value", "ratio", "up_to") else None
        agrees = {"at_least": ours_value >= claim.published, "at_most": ours_value <= claim.published}.get(
            claim.compare, off is not None and abs(off) <= claim.tolerance
        )
        times = "" if claim.compare == "value" else " times"
        ours = f"{number(ours_value)}{times}" if np.isfinite(ours_value) else "without a bound: the other is 0"
        off = off if off is None or np.isfinite(off) else None
    explanation = "" if agrees else _explain(claim, given, records, known)
    return Judgement(claim.says, claim.source, kind, published, ours, bool(agrees), off, explanation)


def _number(claim: Claim, values: Sequence[float]) -> float:
    """Return what a claim's values come to."""
    if claim.compare == "value":
        return values[0]
    return max(_ratios(values if claim.compare == "up_to" else values[:2]))


def _published(claim: Claim) -> str:
    if claim.published is None:
        return "in that order"
    if claim.compare == "value":
        return number(claim.published)
    bound = {"at_least": "at least ", "at_most": "at most "}.get(claim.compare, "")
    return f"{bound}{number(claim.published)} times"


def _explain(claim: Claim, values: Sequence[float], records: Records, known: Mapping[str, float | None]) -> str:
    """Say why ours differs, as far as the runs tell."""
    parts = [claim.if_missed] if claim.if_missed else []
    shown: dict[str, None] = {}
    for name in _extreme_pair(claim, values):
        point, _, metric = name.rpartition(":")
        ours, published = value_of(records, name), known.get(name)
        words = f"{point} has {metric} {number(ours or 0.0)}"
        if published is not None and ours is not None and claim.compare != "value":
            words += f" where {number(published)} was published ({percent(ours / published - 1, sign=True)})"
        facts = records[point].get("facts", "")
        if metric in (draws := records[point].get("draws", {})):
            spread = draws[metric]
            facts = (
                f"from {number(min(spread))} to {number(max(spread))} over {len(spread)} draws of the requests; {facts}"
            )
        shown[words + (f": {facts}" if facts else "")] = None
    return ". ".join([*parts, *shown])


def _extreme_pair(claim: Claim, values: Sequence[float]) -> Sequence[str]:
    """Return the values that a verdict is about: of several pairs the one with the largest ratio."""
    if claim.compare != "up_to":
        return claim.of
    best = int(np.argmax(_ratios(values)))
    return claim.of[2 * best : 2 * best + 2]


def _ratios(values: Sequence[float]) -> list[float]:
    """Return the ratio of each pair: without a bound where the second is 0, and no number where both are."""
    pairs = zip(values[::2], values[1::2], strict=True)
    return [above / below if below else float("inf") if above else float("nan") for above, below in pairs]


def tally(judgements: Sequence[Judgement]) -> list[tuple[str, int, int]]:
    """Return for each kind of claim that was judged: its name, how many agree, of how many."""
    verdicts = {kind: [e.agrees for e in judgements if e.kind == kind and e.agrees is not None] for kind in KINDS}
    return [(kind, sum(agrees), len(agrees)) for kind, agrees in verdicts.items() if agrees]


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
    coarse = np.array([found[name]["values"]["qps"] for name in names])
    fine = np.array([found[name]["fine_qps"] for name in names])
    chosen, best = int(coarse.argmax()), int(fine.argmax())
    some = np.maximum(coarse, fine) > 0
    errors = np.abs(coarse - fine)[some] / np.maximum(coarse, fine)[some]
    return Choice(
        place,
        names[chosen],
        names[best],
        spearman(coarse, fine),
        float(1 - fine[chosen] / fine[best]) if fine[best] else 0.0,
        float(errors.max(initial=0.0)),
    )


def spearman(first: Array, second: Array) -> float | None:
    """Return the rank correlation (Spearman), equal values sharing their mean rank; None where either has no spread."""
    ranks = [_ranks(values) for values in (first, second)]
    centred = [rank - rank.mean() for rank in ranks]
    norm = float(np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float((centred[0] * centred[1]).sum()) / norm if norm else None


def _ranks(values: Array) -> Array:
    below = (values[:, None] > values).sum(axis=1)
    alike = (values[:, None] == values).sum(axis=1)
    mean_ranks: Array = below + (alike + 1) / 2
    return mean_ranks
