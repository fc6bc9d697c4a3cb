"""`windtunnel plan`: from a load and its objectives to a fleet and its price."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from textwrap import shorten
from typing import Any

from rich.console import Console
from rich.table import Table

from cli.output import progress_bar
from engine.errors import InputError
from studies.plan.answer import HELD, layout_words, price_range
from studies.words import number, percent, seconds
from windtunnel.planning import default_folder, given_axes, listed, make_plan
from windtunnel.prices import prices
from windtunnel.settings import read_file

MOST_CRASHES = 3  # that are printed
MOST_ROWS = 12  # of the printed table; plan.json and the page have all


def run(
    config: Path | None,
    flags: dict[str, Any],
    *,
    devices: str | None,
    gpu_price: str | None,
    workers: int | None,
    ray_address: str | None,
    exhaustive: bool,
    output_dir: Path | None,
    as_json: bool,
) -> int:
    """Plan, write the results and print the answer. Returns the exit code: 1 if a point crashed."""
    console = Console(stderr=as_json, highlight=False, soft_wrap=True,
                      width=None if (sys.stderr if as_json else sys.stdout).isatty() else 160)  # fmt: skip
    settings = {} if config is None else read_file(config)
    settings |= {key: value for key, value in flags.items() if value is not None}
    named = settings.pop("device", None)
    own = settings.pop("devices", None)
    if named is not None and (devices or own):
        raise InputError(f"--device {named} and --devices {devices or own} both name devices: remove one")
    if devices is None and own is None and named is None:
        raise InputError("no devices given: add --devices h100_sxm,a100_sxm")
    chosen = listed("devices", devices or own or named)
    price = gpu_price if gpu_price is not None else settings.pop("gpu_price", None)
    settings.pop("gpu_price", None)
    if price is None:
        raise InputError(f"no prices given: add --gpu-price {chosen[0]}=2.5")
    known = prices(price, chosen)
    axes = given_axes(settings)
    target = output_dir or default_folder(settings, chosen, known, axes, exhaustive)
    started = time.monotonic()
    with progress_bar("") as progress:
        task = progress.add_task("planning", total=None)

        def show(what: str, done: int, total: int) -> None:
            progress.update(task, description=f"{what} ({done} of {total})", completed=done, total=total)

        made = make_plan(settings, chosen, known, axes, folder=target, workers=workers, ray_address=ray_address,
                         bounds=not exhaustive, on_progress=show)  # fmt: skip
    from studies.pages.report import write_page  # plotly takes longer to import than everything else

    page = write_page([target])
    _print(made, console, time.monotonic() - started)
    crashed = [each for each in made["refused"] if each["status"] == "crashed"]
    for each in crashed[:MOST_CRASHES]:
        console.print(f"CRASHED: {each['name']} ({each['what']}): {each['why']}", style="bold red", markup=False)
    if crashed:
        console.print(f"{len(crashed)} crashed and were left out: tracebacks under refused in plan.json", style="red")
    console.print(f"results: {target / 'plan.json'}; the fleet as a config: {target / 'best.yaml'}")
    console.print(f"report: {page}")
    if as_json:
        print(json.dumps({"best": made["best"], "candidates": made["candidates"]}, allow_nan=False))
    return int(bool(crashed))


def _print(made: dict[str, Any], console: Console, took_s: float) -> None:
    """Print the answer first, then what it rests on."""
    best, rate = made["best"], made["rate"]
    for line, style in answer_lines(made):
        console.print(line, style=style)
    if made["warning"]:
        console.print(f"WARNING: {made['warning']}", style="bold red")
    for note in made["notes"]:
        console.print(f"note: {note}", style="yellow")
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("replica", "replicas", "GPUs", "$/h", "$/M output", "range", "requests/s a replica", "objectives"):
        table.add_column(column, justify="left" if column in ("replica", "objectives") else "right")
    for row, facts in list(zip(made["candidates"], made["facts"], strict=True))[:MOST_ROWS]:
        low, mid, high = row["capacity_per_replica"]
        least = "" if row["met"] or facts["outcome"] == "none" else "\N{GREATER-THAN OR EQUAL TO} "
        held = HELD.get(facts["outcome"], facts["outcome"])
        usd = [f"{least}{number(row[key])}" for key in ("usd_per_hour", "usd_per_million_output_tokens")]
        range_of = f"{number(mid)} ({number(low)} to {number(high)})" if row["met"] else f"at most {number(high)}"
        counts = [f"{least}{row['replicas']:,}", f"{least}{row['gpus']:,}"]
        table.add_row(layout_words(row), *counts, *usd, price_range(row, facts) or "-", range_of, held)
    console.print(table)
    left = len(made["candidates"]) - MOST_ROWS
    more = f"{left} more in plan.json; " if left > 0 else ""
    cant = [each for each in made["refused"] if each["status"] != "crashed"]
    refused = f"{len(cant)} can't be ({shorten(cant[0]['why'], 100, placeholder=' ...')}); " if cant else ""
    console.print(f"{more}{refused}engine {best['engine']}; {rate:g} requests/s; {took_s:.0f} s", style="dim")


def answer_lines(made: dict[str, Any]) -> list[tuple[str, str | None]]:
    """Return the answer in lines, each with its style: fleet, price, latencies, headroom, limit, runner-up."""
    best, expected = made["best"], made["expected"]
    total, out = (number(best[f"usd_per_million_{name}_tokens"]) for name in ("total", "output"))
    prompts = number(made["usd_per_million_input_tokens"])
    fleet = f"{best['replicas']} replica{'s' * (best['replicas'] != 1)} of {layout_words(best)}"
    head = (
        f"{fleet}: {best['gpus']} GPU{'s' * (best['gpus'] != 1)}, ${number(best['usd_per_hour'])}/h, {best['engine']}"
    )
    lines: list[tuple[str, str | None]] = []
    if not best["met"]:
        lines.append(("No fleet meets the objectives; the closest is", "bold red"))
    lines.append((head, "bold"))
    alone = f"${out} if output tokens alone pay, ${prompts} if input tokens do"
    between = price_range(best, made["facts"][0], "total")
    over = f"; {between} by the range of its capacity" if between else ""
    lines.append((f"${total} per million tokens ({alone}){over}", None))
    times = [
        f"{name} {seconds(expected[f'p50_{key}'])} median, {seconds(expected[f'p99_{key}'])} P99"
        for name, key in (("TTFT", "ttft"), ("TBT", "tbt"), ("E2E", "e2e"))
        if expected[f"p50_{key}"] is not None
    ]
    lines.append((f"expected at {made['rate']:g} requests/s: {'; '.join(times)}", None))
    if made["headroom"] is not None:
        low, mid, high = best["capacity_per_replica"]
        lines.append((
            f"a replica carries {number(mid)} requests/s ({number(low)} to {number(high)}), and gets "
            f"{number(made['rate'] / best['replicas'])}: headroom {percent(made['headroom'], sign=True)}", None,
        ))  # fmt: skip
    lines += [(words, None) for words in made["words"]]
    return lines
