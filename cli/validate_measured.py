"""`windtunnel validate --against FILE`: measured results of others beside their predictions."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Unpack

from rich.console import Console
from rich.table import Table

from cli.output import progress_bar
from engine.results.run_folder import run_folder, write_summary
from studies.measured.judge import OF_REQUESTS, groups_of
from studies.measured.point import MEASURES
from studies.words import effect_words
from windtunnel.measured import Reading, validate_measured

_LINE = ("points", "predicted", *MEASURES, "groups", *OF_REQUESTS)  # of --json
_SHOWN = 5  # rows that could not be run


def run(
    path: Path,
    given: dict[str, Any],
    output_dir: Path | None,
    *,
    uncertainty: int | None,
    as_json: bool,
    **reading: Unpack[Reading],
) -> None:
    """Predict the points, print the errors by group, and write `validation.json` and a page if a folder is given."""
    width = None if (sys.stderr if as_json else sys.stdout).isatty() else 130
    console = Console(stderr=as_json, highlight=False, soft_wrap=True, width=width)

    def predicted() -> dict[str, Any]:
        with progress_bar("points") as progress:
            task = progress.add_task("predicting", total=None)
            return validate_measured(
                path, given, uncertainty=uncertainty, effects=True, workers=None,
                on_progress=lambda done, of: progress.update(task, completed=done, total=of), **reading,
            )  # fmt: skip

    if output_dir is None:
        results = predicted()
    else:
        with run_folder(output_dir) as folder:
            results = predicted()
            write_summary(folder, results, "validation.json")
            from studies.pages.measured import write_measured

            write_measured(results, folder / "validation.html")
    _print(results, console)
    if output_dir is not None:
        console.print(f"report: {output_dir / 'validation.html'}")
    if as_json:
        print(json.dumps({key: results[key] for key in _LINE if key in results}, allow_nan=False))


def _print(results: dict[str, Any], console: Console) -> None:
    sources = f", as {' and '.join(results['sources'])}" if results["sources"] else ""
    console.print(f"{results['predicted']:,} of {results['points']:,} points of {results['file']}{sources}")
    for predictor in results["predictors"][:_SHOWN]:
        console.print(f"times: {predictor}", style="dim")
    for text in results["assumed"]:
        console.print(f"assumed: {text}", style="yellow")
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("mean error (bias)", no_wrap=True)
    for name in ("points", "TPOT", "TTFT", "E2E", "throughput"):
        table.add_column(name, justify="right")
    for group in groups_of(results):
        table.add_row(group["group"], f"{group['count']:,}", *(_cell(group[name]) for name in MEASURES))
    console.print(table)
    known = [(name, results[name]) for name in MEASURES if "covered" in (results[name] or {})]
    shares = [f"{name.upper()} {error['covered']:.0%}" for name, error in known]
    if shares:
        console.print(f"measured within the ranges of reruns with drawn errors: {', '.join(shares)} of the points")
    for effect in results["effects"]:
        console.print(f"had it been {effect['instead']}: {effect_words(effect)}", style="dim")
    for name, words in OF_REQUESTS.items():
        if entry := results.get(name):
            sign = "" if name == "per_request" else "+"  # a mean of absolute errors has none
            parts = [f"{key.upper()} {value:{sign}.1%}" for key, value in entry.items() if value is not None]
            if parts:
                console.print(f"{words}: {', '.join(parts)}")
    out = [record for record in results["records"] if record["in_range"] < 1]
    if out:
        console.print(f"{len(out):,} points have batches outside the calibrated range", style="yellow")
    for row in results["refused"][:_SHOWN]:
        console.print(f"not run: {row['id']}: {row['why']}", style="yellow")
    if len(results["refused"]) > _SHOWN:
        console.print(f"not run: {len(results['refused']) - _SHOWN:,} more", style="yellow")


def _cell(error: dict[str, float] | None) -> str:
    return "-" if error is None else f"{error['mape']:.1%} ({error['bias']:+.1%})"
