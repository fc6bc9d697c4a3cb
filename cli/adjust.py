"""`windtunnel calibrate adjust`: fit an engine's host constants to results of one's own server."""

from __future__ import annotations

from math import isinf
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from cli.output import progress_bar
from engine.errors import InputError
from engine.results.files import check_output, write_whole
from studies.measured.point import MEASURES
from windtunnel.measured import adjust_preset


def run(results: Path, given: dict[str, Any], output: Path, **options: Any) -> None:
    """Fit, write the preset and print what was found."""
    if output.suffix not in (".yaml", ".yml"):
        raise InputError(f"--output {output}: give a name that ends in .yaml")
    if output.exists():
        raise InputError(f"--output {output} exists: give another name, or remove it")
    check_output(output)
    console = Console(highlight=False, soft_wrap=True)
    with progress_bar("simulations") as progress:
        task = progress.add_task("fitting", total=None)
        found = adjust_preset(
            results, given, workers=None, on_progress=lambda done, of: progress.update(task, completed=done), **options
        )
    write_whole(output, yaml.safe_dump(found["preset"], sort_keys=False))
    console.print(f"fitted to {found['points']:,} points, from {found['preset']['base']}:")
    for name, value in found["constants"].items():
        margin, before = found["margins"][name], found["before_constants"][name]
        if name in found["factors"]:
            known = "of no effect on these points" if isinf(margin) else f"90 % within {margin:.2g}"
            console.print(f"  {name} x {value:.4g}, {known} (before {before:.4g})")
            continue
        known = "of no effect on these points" if isinf(margin) else f"90 % within {1e6 * margin:,.3g} us"
        console.print(f"  {name} {1e6 * value:,.4g} us, {known} (before {1e6 * before:,.4g})")
    for one, other in found["alike"]:
        console.print(
            f"note: these points can't tell {one} and {other} apart: give others, or --fit one of the two",
            style="yellow",
        )
    for names in found["flat"]:
        those = " and ".join(names) + (" together" if len(names) > 1 else "")
        console.print(
            f"note: of {those} these points say less than was known before: what is printed is mostly that",
            style="yellow",
        )
    if found["share"] < 1:
        console.print(
            f"note: {found['share']:.0%} of the change was taken: fitted to the other loads, more of it predicts the "
            "highest one worse",
            style="yellow",
        )
    for name in MEASURES:
        before, after = found["before"][name], found["after"][name]
        if after is not None:
            console.print(
                f"{name.upper()}: mean error {before['mape']:.1%} before, {after['mape']:.1%} after (bias "
                f"{before['bias']:+.1%} and {after['bias']:+.1%}), of the points that were fitted to"
            )
    for row in found["refused"][:5]:
        console.print(f"not run: {row['id']}: {row['why']}", style="yellow")
    console.print(f"preset: {output}")
