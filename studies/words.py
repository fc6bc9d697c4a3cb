"""Numbers as a reader wants them: short, and with the unit that suits them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import Any

ERROR_HEADS = ("Mean", "Median", "P95", "Bias")
_KINDS = {"calibrated": "calibrated", "roofline": "estimated (roofline)", "an": "estimated (carried over)"}


def times_kind(predictor: str) -> str:
    """Return where times came from in a word or two, given a predictor's line: calibrated, estimated, or measured."""
    return _KINDS.get(predictor.split()[0], "of another predictor") if predictor else "measured"


def unlike_sources(predictors: Iterable[str]) -> str | None:
    """Return a warning where results rest on times of unlike kinds, given the predictors' lines; None where they don't.

    A calibration's times and an estimate's may be ten times apart: such results can't be ranked.
    """
    found = sorted({times_kind(line) for line in predictors if line})
    if len(found) < 2:
        return None
    of = ", ".join(found)
    return f"these rest on times of unlike kinds ({of}): the difference may be of that alone, do not rank them"


def statistic_name(statistic: str) -> str:
    """Return the name of a statistic: median for p50, P99 for p99; mean and max stay."""
    return {"mean": "mean", "max": "max", "p50": "median"}.get(statistic, statistic.upper())


def capital(words: str) -> str:
    """Return words that begin with a capital letter."""
    return words[:1].upper() + words[1:]


def together(names: Sequence[str]) -> str:
    """Return names as the title of a page about them all."""
    if len(names) > 4:
        return f"{', '.join(names[:3])} and {len(names) - 3} others"
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


def listed(names: Sequence[str], most: int, between: str = "; ") -> str:
    """Return names one after the other, and of more than `most` how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return between.join(names[:most]) + more


def number(value: float | None) -> str:
    """Return three digits, and no exponent unless there is no other way to be brief; "-" for none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}"


def dollars(value: float) -> str:
    """Return dollars in words; infinite ones are any price."""
    return f"${number(value)}" if isfinite(value) else "any price"


def seconds(value: float | None) -> str:
    """Return a time in the unit that suits it; "-" for none."""
    if value is None:
        return "-"
    if value == 0 or value >= 1:
        return f"{number(value)} s"
    return f"{number(1e3 * value)} ms" if value >= 1e-3 else f"{number(1e6 * value)} µs"


def percent(value: float | None, sign: bool = False) -> str:
    """Return a fraction as a percentage with two or three digits; "-" for none."""
    if value is None:
        return "-"
    return f"{100 * value:{'+' if sign else ''}.{1 if abs(value) < 0.9995 else 0}f} %"


def against(value: float, base: float) -> str:
    """Return how a positive number stands to another: a percentage, or a factor where they are far apart."""
    ratio = value / base
    if 0.5 <= ratio <= 2:
        return percent(ratio - 1, sign=True)
    return f"{number(ratio)}\N{MULTIPLICATION SIGN}" if ratio > 1 else f"1/{number(1 / ratio)}" if ratio > 0 else "none"


def size(num_bytes: float, binary: bool = False) -> str:
    """Return bytes in the unit that suits them: kB, MB, ..., or KiB, MiB, ..."""
    for power, letter in ((3, "G"), (2, "M"), (1, "k")):
        scale = (1024 if binary else 1000) ** power
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {letter.upper() + 'i' if binary else letter}B"
    return f"{num_bytes:.0f} B"


def error_cells(found: Mapping[str, Any]) -> list[str]:
    """Return the figures under ERROR_HEADS of a record of errors."""
    return [percent(found.get(name), sign=name == "bias") for name in ("mape", "p50", "p95", "bias")]


def mean_error(error: Mapping[str, float] | None) -> str:
    """Return a mean absolute error and its bias, such as "4.2 % (-0.9 %)"; a dash for none."""
    return "-" if error is None else f"{percent(error['mape'])} ({percent(error['bias'], sign=True)})"


def effect_words(effect: Mapping[str, Any]) -> str:
    """Return what another assumption changes of predictions, in words (`studies.measured.effects`)."""
    spread, names = effect["spread"], [name for name in ("tpot", "ttft", "e2e") if name in effect]
    how = "spread over " * spread
    parts = [f"{name.upper()} {how}{percent(effect[name], sign=not spread)}" for name in names]
    return f"{', '.join(parts)} (mean of {effect['points']:,} points)"


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table whose first `left` columns are aligned to the left."""
    if not rows:
        return "None of these was measured."
    marks = ["---" if i < left else "---:" for i in range(len(heads))]
    lines = [[cell.replace("|", "/") for cell in line] for line in (heads, marks, *rows)]
    return "\n".join("|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|" for line in lines)
