"""The page of a plan: the fleet and its price first, then what the times rest on, then what it was chosen from.

plan_page(read_json(folder / "plan.json")).write(folder / "report.html")
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from studies.pages.page import Page, Tone, about, coloured, details, facts_table, numbers_table
from studies.pages.plan_figures import load_panel, price_panel, speed_panel
from studies.plan.answer import HELD, layout_words, price_range
from studies.words import number, percent, seconds, times_kind


def plan_page(made: Mapping[str, Any]) -> Page:
    """Make the page of what `plan.json` holds."""
    best = made["best"]
    fleet = f"{best['replicas']} \N{MULTIPLICATION SIGN} {layout_words(best)}"
    page = Page(f"Plan: {fleet}", f" {made['version']}")
    settings = made["settings"]
    load = settings.get("trace") or settings.get("workload") or "openchat_sharegpt4"
    setting = (
        f"{settings['model']} under {made['rate']:g} requests/s of {load}, within {' and '.join(made['slos'])}: the "
        f"cheapest fleet behind a {made['fleet']['summary']['router']} router."
    )
    page.header("Windtunnel · plan", setting, _chips(made), _sources(made), title=fleet)
    page.cards(_cards(made))
    page.add("<h2>Why this one</h2>", *(about(words) for words in made["words"]))
    curve = [load_panel(made)] if made["curve"] else []
    page.add_panels("What it was chosen from", [price_panel(made), speed_panel(made), *curve])
    page.add("<h2>Every candidate</h2>", about(_ABOUT), _table(made))
    for status, title in (("crashed", "crashed"), ("refused", "that can't be")):
        rows = [(each["name"], each["why"]) for each in made["refused"] if each["status"] == status]
        if rows:
            page.add(details(f"{len(rows)} {title}", facts_table(rows)))
    page.add(details("Settings", facts_table(_settings(made), code=True)))
    return page


_ABOUT = (
    "A number with + is of a candidate that was dismissed: no fewer replicas can hold, by the bound of its fastest mix "
    "of batches or by a simulated fleet that missed, and even so few cost more than a fleet that holds. Its capacity "
    "is at most the high end."
)


def _chips(made: Mapping[str, Any]) -> list[tuple[Tone, str]]:
    best = made["best"]
    chips: list[tuple[Tone, str]] = []
    if best["met"]:
        slos = made["fleet"]["summary"]["slos"]
        chips += [("good", f"{each['slo']} is met: {seconds(each['value_s'])}") for each in slos]
        verdict = made["fleet"]["summary"]["saturation"]
        chips.append(("good" if verdict["growing"] is False else "unsure", verdict["verdict"]))
    else:
        chips.append(("bad", "No fleet meets the objectives: this is the closest"))
    if any("can't be told apart" in words for words in made["words"]):
        chips.append(("unsure", "It and the runner-up can't be told apart"))
    return chips


def _sources(made: Mapping[str, Any]) -> list[tuple[Tone, str, str]]:
    """Return where the times of each device come from."""
    found: dict[str, str] = {}
    for row in made["candidates"]:
        found.setdefault(row["device"], row["provenance"])
    lines: list[tuple[Tone, str, str]] = [
        ("good" if line.startswith("calibrated") else "unsure", times_kind(line), f"{device}: {line}")
        for device, line in found.items()
    ]
    if made["warning"]:
        lines.append(("bad", "unlike", made["warning"]))
    return lines


def _cards(made: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    best, expected = made["best"], made["expected"]
    (low, mid, high), draws = best["capacity_per_replica"], made["draws"]
    gpus = best["gpus"] // best["replicas"]
    tokens = {}
    for what, note in (("output", "if these alone pay"), ("total", "prompts and outputs alike")):
        between = price_range(best, made["facts"][0], what)
        tokens[what] = f"${number(best[f'usd_per_million_{what}_tokens'])}", f"{between}, {note}" if between else note
    entries = [
        ("Replicas", f"{best['replicas']:,}", f"of {gpus} GPU{'s' * (gpus > 1)}: {best['gpus']:,} {best['device']}"),
        ("Price", f"${number(best['usd_per_hour'])} /h", "of all GPUs"),
        ("Million output tokens", *tokens["output"]),
        ("Million tokens", *tokens["total"]),
        ("TTFT, P99", seconds(expected["p99_ttft"]), f"median {seconds(expected['p50_ttft'])}"),
        ("TBT, P99", seconds(expected["p99_tbt"]), f"median {seconds(expected['p50_tbt'])}"),
    ]
    if made["headroom"] is not None:
        entries += [
            ("Headroom", percent(made["headroom"], sign=True), "more load until it no longer holds"),
            ("A replica carries", f"{number(mid)} requests/s", f"{number(low)} to {number(high)}, {draws} draws"),
        ]
    return entries


def _table(made: Mapping[str, Any]) -> str:
    heads = ("Replica", "Objectives", "Replicas", "GPUs", "$/h", "$/M output", "$/M range", "Requests/s a replica",
             "low", "high", "TTFT, P99", "TBT, P99", "Times", "Engine", "Sequences", "Why")  # fmt: skip
    rows = []
    for row, facts in zip(made["candidates"], made["facts"], strict=True):
        open_end = "+" if facts["outcome"] == "dismissed" else ""
        low, mid, high = map(number, row["capacity_per_replica"])
        expected = facts["expected"] if row["met"] else {}
        held = HELD.get(facts["outcome"], facts["outcome"])
        met = {"met": True, "missed": False}.get(held)
        chosen = row is made["candidates"][0] and row["met"]
        cells = [
            coloured(held, met),
            f"{row['replicas']:,}{open_end}",
            f"{row['gpus']:,}{open_end}",
            ("best", number(row["usd_per_hour"])) if chosen else f"{number(row['usd_per_hour'])}{open_end}",
            f"{number(row['usd_per_million_output_tokens'])}{open_end}",
            price_range(row, facts) or "-",
            mid if row["met"] else "-",
            low if row["met"] else "-",
            high,
            seconds(expected.get("p99_ttft")),
            seconds(expected.get("p99_tbt")),
            times_kind(row["provenance"]),
            row["engine"],
            f"{row['max_num_seqs']:,}",
            facts["why"] or "-",
        ]
        rows.append((layout_words(row), cells))
    return f"<section class='panel'>{numbers_table(heads, rows)}</section>"


def _settings(made: Mapping[str, Any]) -> list[tuple[str, str]]:
    prices = ", ".join(f"{device} ${price:g}" for device, price in made["gpu_price"].items())
    own = {name: made["best"][name] for name in ("engine", "max_num_batched_tokens", "max_num_seqs", "quantization")}
    shared = {key: value for key, value in made["settings"].items() if key not in own}
    rows = {**shared, **own, "gpu_price": prices, "draws": made["draws"]}
    return [(key, ", ".join(map(str, value)) if isinstance(value, list) else str(value)) for key, value in rows.items()]
