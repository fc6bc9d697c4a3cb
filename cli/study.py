"""`windtunnel study list | run`: simulate published experiments and compare with the published numbers."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import typer
from rich.console import Console

from cli.output import progress_bar
from engine.errors import InputError
from engine.results.files import write_whole
from studies.jobs.cache import claimed
from studies.published import library as studies
from studies.published.run import StudyCrashedError, run


def show() -> None:
    """Print the name, title and source of each study."""
    console = Console(highlight=False, soft_wrap=True)
    width = max(map(len, studies.names()))
    for name in studies.names():
        found = studies.load(name)
        console.print(f"[bold]{name:<{width}}[/bold]  {found.title} ({found.source})")


def run_study(
    name: str,
    model: str | None,
    host_overhead: str | None,
    num_prompts: int | None,
    workers: int | None,
    output_dir: Path | None,
    *,
    as_json: bool,
    as_markdown: bool,
    confirm: bool,
) -> None:
    """Run a study, write its page and print the comparison; exit code 1 if a point crashed."""
    if confirm:
        raise InputError("study --confirm is not implemented: use windtunnel search --confirm")
    if as_json and as_markdown:
        raise InputError("--json and --markdown exclude each other: remove one")
    if workers is not None and workers < 1:
        raise InputError(f"--workers {workers}: give at least 1")
    whole = studies.load(name)
    hosts = studies.hosts(host_overhead)
    experiment = studies.reduced(whole, model, num_prompts)
    only = f"only the models with {model} in their name" if model else ""
    few = f"{num_prompts} requests a run" if num_prompts else ""
    left_out = " and ".join(filter(None, [only, few]))
    target = output_dir or Path("runs") / "studies" / (name if not left_out else f"{name}-reduced")
    console = Console(stderr=as_json or as_markdown, highlight=False, soft_wrap=True, markup=False)
    started = time.perf_counter()
    with claimed(target, name):
        with progress_bar("points") as progress:
            task = progress.add_task(name, total=1)
            try:
                records = run(
                    experiment,
                    hosts,
                    target,
                    workers,
                    lambda what, done, of: progress.update(task, description=what or name, completed=done, total=of),
                )
            except StudyCrashedError as error:
                progress.stop()
                for crash in error.crashes:
                    print(crash.trace, file=sys.stderr, end="")
                    print(f"error: {crash.point} on {crash.host} crashed: {crash.error}", file=sys.stderr)
                kept = "the other points are kept: rerun to resume"
                print(
                    f"error: {len(error.crashes)} points of {name} crashed: no page was written ({kept})",
                    file=sys.stderr,
                )
                raise typer.Exit(1) from None
        from studies.pages.study import markdown, summary_lines, to_json, write_page

        results = {"study": name, "reduced": left_out, **to_json(experiment, records)}
        write_whole(target / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
        page = write_page(name, experiment, records, target / "report.html", left_out)
    for line in summary_lines(experiment, records):
        console.print(line)
    count = sum(map(len, records.values()))
    console.print(f"{count} points, {time.perf_counter() - started:.0f} s", style="dim")
    console.print(f"report: {page}")
    if as_markdown:
        print(markdown(name, experiment, records))
    if as_json:
        print(json.dumps({**results, "output_dir": str(target)}, allow_nan=False))
