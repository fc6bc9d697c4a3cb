"""`windtunnel study list | run`: simulate published experiments and compare with the published numbers."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from cli.output import progress_bar
from engine.errors import InputError
from engine.results.files import write_whole
from studies.jobs.cache import claimed
from studies.published import library as studies
from studies.published.experiment import SEEDS
from studies.published.run import StudyCrashedError, run
from windtunnel.settings import MOST_DRAWS

ALL = "all"


@dataclass(frozen=True)
class Options:
    """How studies are run, as asked for."""

    model: str | None
    host_overhead: str | None
    num_prompts: int | None
    seeds: int
    workers: int | None

    @property
    def left_out(self) -> str:
        """What of a study is not run, in words; empty for a whole one."""
        only = f"only the models with {self.model} in their name" if self.model else ""
        few = f"{self.num_prompts} requests a run" if self.num_prompts else ""
        host = f"only the host overhead {self.host_overhead}" if self.host_overhead else ""
        return " and ".join(filter(None, [only, few, host]))


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
    seeds: int | None,
    workers: int | None,
    output_dir: Path | None,
    record: Path | None,
    *,
    as_json: bool,
    as_markdown: bool,
    confirm: bool,
) -> None:
    """Run a study, or all, write pages and print the comparison; exit code 1 if a point crashed."""
    if confirm:
        raise InputError("study --confirm is not implemented: use windtunnel search --confirm")
    if as_json and as_markdown:
        raise InputError("--json and --markdown exclude each other: remove one")
    if workers is not None and workers < 1:
        raise InputError(f"--workers {workers}: give at least 1")
    if seeds is not None and not 1 <= seeds <= MOST_DRAWS:
        raise InputError(f"--seeds {seeds}: give 1 to {MOST_DRAWS:,}")
    options = Options(model, host_overhead, num_prompts, seeds or SEEDS, workers)
    if record is not None:
        if options.left_out:
            raise InputError(
                f"--record {record} is for whole studies: leave out --model, --num-prompts, --host-overhead"
            )
        studies.read_record(record)
    if name == ALL and (model or as_json):
        raise InputError("study run all takes neither --model nor --json: run a study by its name")
    for each in studies.names() if name == ALL else [name]:
        folder = None if output_dir is None else output_dir / each if name == ALL else output_dir
        _run_one(each, options, folder, record, as_json=as_json, as_markdown=as_markdown)


def _run_one(
    name: str, options: Options, output_dir: Path | None, record: Path | None, *, as_json: bool, as_markdown: bool
) -> None:
    whole = studies.load(name)
    hosts = studies.hosts(options.host_overhead)
    experiment = studies.reduced(whole, options.model, options.num_prompts)
    target = output_dir or Path("runs") / "studies" / (name if not options.left_out else f"{name}-reduced")
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
                    options.workers,
                    lambda what, done, of: progress.update(task, description=what or name, completed=done, total=of),
                    seeds=options.seeds,
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

        results = {"study": name, "reduced": options.left_out, **to_json(experiment, records)}
        write_whole(target / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
        page = write_page(name, experiment, records, target / "report.html", options.left_out)
    for line in summary_lines(experiment, records):
        console.print(line)
    count = sum(map(len, records.values()))
    console.print(f"{count} points, {time.perf_counter() - started:.0f} s", style="dim")
    console.print(f"report: {page}")
    if record is not None:
        _write_record(record, name, studies.kept(whole, records, options.seeds))
        console.print(f"record: {record} and {record.with_suffix('.md')}")
    if as_markdown:
        print(markdown(name, experiment, records))
    if as_json:
        print(json.dumps({**results, "output_dir": str(target)}, allow_nan=False))


def _write_record(path: Path, name: str, entry: dict[str, Any]) -> None:
    """Put a study in the record, and write the page of the record beside it."""
    from studies.pages.studies import render

    record = {**studies.read_record(path), name: entry}
    record = {each: record[each] for each in studies.names() if each in record}
    write_whole(path, json.dumps(record, indent=1, allow_nan=False) + "\n")
    write_whole(path.with_suffix(".md"), render(record))
