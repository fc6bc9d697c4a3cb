"""`windtunnel search`: find the capacity of a deployment, or of a sweep, under SLOs, and confirm it on hardware."""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from math import inf
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from cli.bench import only_group
from cli.engine import engine_spec
from cli.output import print_errors, progress_bar
from cli.search_point import confirm_point, search_point, settings_of
from engine.errors import InputError
from engine.results.files import write_json
from engine.specs import catalog
from engine.specs.device_folder import folder_of
from simulator.predictor import calibration as store
from studies.capacity.ranges import alike, range_of, ranges_in_words, sustained_in_words
from studies.capacity.search import check_tolerance
from studies.capacity.sweep import mark_pareto, name_of, points, price_of
from studies.jobs.pool import work_off, work_off_on_ray
from studies.words import dollars, times_kind, unlike_sources
from windtunnel.capacity import Draws, checked, deployed, open_search, read_search_file, with_range
from windtunnel.names import unknown_setting
from windtunnel.plugins import load_plugin
from windtunnel.prices import prices as parse_prices
from windtunnel.results import SEARCH_FILE
from windtunnel.run_config import hashes
from windtunnel.settings import ENGINE_KEYS, BenchConfig, load, read_file

SWEEP = "sweep.json"


def run(
    config: Path | None,
    flags: dict[str, Any],
    output_dir: Path,
    *,
    sweep: Path | None,
    tolerance: float,
    seeds: int | None,
    curve: bool,
    keep_runs: bool,
    gpu_price: str | None,
    workers: int | None,
    ray_address: str | None,
    confirm_top: int,
    as_json: bool,
) -> int:
    """Search, write the results and print them. Returns the exit code: 1 if a point crashed."""
    width = None if (sys.stderr if as_json else sys.stdout).isatty() else 160
    console = Console(stderr=as_json, highlight=False, soft_wrap=True, width=width)
    prices = None if gpu_price is None else parse_prices(gpu_price)
    check_tolerance(tolerance)
    if workers is not None and workers < 1:
        raise InputError(f"--workers {workers}: give at least 1")
    shared: dict[str, Any] = {"tolerance": tolerance, "seeds": seeds, "curve": curve}
    if sweep is None:
        settings = load(config, flags, BenchConfig)
        for plugin in settings.plugin:
            load_plugin(plugin)
        checked(settings)
        Draws.of(settings.uncertainty, seeds)  # raises InputError
        if confirm_top:  # what prevents the engine is reported before the search
            group = only_group(settings)
            engine_spec(group.replica_spec(), group.model, settings, settings.seed)
        shared["settings"] = settings.model_dump(mode="json")  # the file may change
        for group in settings.groups():
            deployed(group)  # raises InputError before anything is written
        changes: list[dict[str, Any]] = [{}]
    else:
        if config is not None:
            raise InputError(f"--config {config} and --sweep {sweep} both give settings: remove one")
        values = read_file(sweep)
        changes = points(values.pop("sweep", {}), str(sweep))
        shared["file"] = str(sweep.resolve())
    every = []
    given = {key: value for key, value in flags.items() if value is not None}
    idle = sorted(set(given) & ENGINE_KEYS) if not confirm_top else []
    if idle:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        console.print(f"note: {names} has no effect without --confirm", style="yellow")
    if sweep is not None:
        _check_keys(values, changes, given, sweep)
    for change in changes:
        folder = output_dir if sweep is None else output_dir / "points" / name_of(change)
        base = {} if sweep is None else values
        every.append({"config": str(config.resolve()) if config else None, "flags": {**base, **change, **given},
                      "folder": str(folder.absolute()), "tolerance": tolerance, "seeds": seeds, "curve": curve,
                      "keep_runs": keep_runs or sweep is None})  # fmt: skip
    for change in changes if sweep is not None else ():
        Draws.of({**values, **change, **given}.get("uncertainty"), seeds)  # raises InputError
    identity = {**shared, "version": version("windtunnel"), "contents": _contents(every)}
    with open_search(output_dir, {"points": [{**each, "folder": None} for each in every], **identity}):
        rows = _search_all(every, changes, workers, ray_address, console)
        for row in rows:
            row["requests_per_dollar"] = _per_dollar(row, prices)
            row["requests_per_dollar_range"] = _dollar_range(row)
        mark_pareto(rows, more=("qps_per_gpu",), less=("p99_tbt_ms", "p50_ttft_ms"))
        if sweep is not None:
            whole = {"points": rows, "settings": {**values, **given}, "gpu_price": prices, **shared}
            write_json(output_dir / SWEEP, whole)
        _print_rows(rows, console, prices is not None)
        if confirm_top:
            chosen = sorted((row for row in rows if row["status"] == "done" and row["outcome"] == "found"),
                            key=lambda row: -row["qps_per_gpu"])[:confirm_top]  # fmt: skip
            _confirm_all(chosen, [every[rows.index(row)] for row in chosen], console)
            if sweep is not None:
                write_json(output_dir / SWEEP, whole)
        console.print(f"results: {output_dir / (SEARCH_FILE if sweep is None else SWEEP)}")
        console.print(f"draw them: windtunnel report {output_dir}")
    if as_json:
        print(json.dumps({**(rows[0] if sweep is None else {"points": rows}), "output_dir": str(output_dir)}))
    failed = any(row.get("confirmed", {}).get("status", "done") != "done" for row in rows)
    return int(failed or any(row["status"] == "crashed" for row in rows))


def _check_keys(
    values: Mapping[str, Any], changes: list[dict[str, Any]], given: Mapping[str, Any], sweep: Path
) -> None:
    """Raise InputError for an unknown key, and for a flag that would override what a sweep varies."""
    varied = {key: None for change in changes for key in change}
    for key in (*values, *varied):
        if key not in BenchConfig.model_fields:
            raise unknown_setting(f"key in {sweep}", key, (*BenchConfig.model_fields, "sweep"))
    if twice := next((key for key in varied if key in given), None):
        raise InputError(f"--{twice.replace('_', '-')} {given[twice]}: {sweep} varies {twice}: remove one")


def _contents(every: list[dict[str, Any]]) -> dict[str, str]:
    """Return hashes of the files that the points depend on: calibrations, traces, lengths, plugins."""
    found: dict[str, str] = {}
    for point in every:
        flags = point["flags"]
        names = [flags.get(key) for key in ("device", "trace", "workload", "model")]
        found |= hashes([*names, *(flags.get("plugin") or [])])
        device = flags.get("device")
        if device and catalog.is_name("device", str(device)):
            folder = folder_of(catalog.device(str(device)))
            found[str(device)] = store.fingerprint(folder) if folder is not None else ""
    return found


class _Searches:
    """The jobs of a search: each point's capacity, and as soon as that is known those of its draws."""

    def __init__(self, every: list[dict[str, Any]], left: list[int]) -> None:
        self.every = every
        self.rows: dict[int, dict[str, Any]] = {}  # of finished points
        self.done = 0
        self.total = len(left)
        self._waiting = deque((i, every[i]) for i in left)
        self._given: list[tuple[int, dict[str, Any]]] = []
        self._found: dict[int, tuple[dict[str, Any], Draws]] = {}  # capacities whose draws are not all there
        self._drawn: dict[int, dict[int, float]] = {}

    def jobs(self) -> Iterator[dict[str, Any] | None]:
        """Yield the jobs, and None while a result has to come first."""
        while self._waiting or self.done < len(self._given):
            if not self._waiting:
                yield None
                continue
            self._given.append(self._waiting.popleft())
            yield self._given[-1][1]

    def take(self, number: int, result: dict[str, Any]) -> None:
        """Take the result of the job that was yielded as that number."""
        i, job = self._given[number]
        self.done += 1
        point = self.every[i]
        if result["status"] != "done":  # also of a draw: the point has no range without it
            self.rows[i] = result
            self.total -= sum(each == i for each, _ in self._waiting)
            self._waiting = deque(each for each in self._waiting if each[0] != i)
            return
        if i in self.rows:
            return  # a draw of it failed
        if "draw" not in job:
            draws = Draws.of(settings_of(point).uncertainty, point["seeds"])
            self._found[i], self._drawn[i] = (result, draws), {}
            known = {"outcome": result["outcome"], "max_qps_under_slo": result["max_qps_under_slo"]}
            numbers = draws.numbers(result)
            self.total += len(numbers)
            more = ((i, {**point, "found": known, "draw": draw, "errors": draws.errors}) for draw in numbers)
            self._waiting.extendleft(reversed([*more]))
        else:
            self._drawn[i][job["draw"]] = result["qps"]
        found, draws = self._found[i]
        if len(self._drawn[i]) == len(draws.numbers(found)):
            drawn = [self._drawn[i][draw] for draw in sorted(self._drawn[i])]
            self.rows[i] = with_range(found, drawn, point["tolerance"], draws, Path(point["folder"]))


def _search_all(
    every: list[dict[str, Any]],
    changes: list[dict[str, Any]],
    workers: int | None,
    ray_address: str | None,
    console: Console,
) -> list[dict[str, Any]]:
    """Return a row for each point in order: those already finished, and those searched now."""
    rows: list[dict[str, Any]] = [{} for _ in every]
    left = []
    for i, point in enumerate(every):
        path = Path(point["folder"]) / SEARCH_FILE
        if path.is_file():
            rows[i] = read_search_file(path)
        else:
            left.append(i)
    searches = _Searches(every, left)
    jobs = searches.jobs()
    workers = workers or os.cpu_count() or 1
    with progress_bar("searches") as progress:
        task = progress.add_task("searching", total=searches.total)
        if ray_address is not None:
            results = work_off_on_ray(search_point, jobs, ray_address)
        else:
            if len(every) == 1 and left:  # a single capacity is searched in this process
                searches.take(0, search_point(cast(dict[str, Any], next(jobs))))
            if workers == 1 and len(every) == 1:
                results = ((number, search_point(job)) for number, job in enumerate(filter(None, jobs)))
            else:
                results = work_off(search_point, jobs, workers)
            if len(every) == 1 and left:
                results = ((number + 1, result) for number, result in results)
        for number, result in results:
            searches.take(number, result)
            progress.update(task, completed=searches.done, total=searches.total)
    for i, row in searches.rows.items():
        rows[i] = row
    for row, change, point in zip(rows, changes, every, strict=True):
        row["name"] = name_of(change) or "search"
        row["settings"] = change
        row["folder"] = point["folder"]
    return rows


def _per_dollar(row: Mapping[str, Any], prices: Mapping[str, float] | None) -> float | None:
    """Return requests per dollar at the capacity; None without a price of its device."""
    price = price_of(row.get("device", ""), prices or {})
    if price is None or row["status"] != "done":
        return None
    return float(row["max_qps_under_slo"] * 3600 / (row["num_gpus"] * price))


def _dollar_range(row: Mapping[str, Any]) -> list[float] | None:
    """Return the lowest and highest requests per dollar by the range of the capacity; None without one or a price."""
    found, usual = range_of(row), row["requests_per_dollar"]
    if not found or not usual:
        return None
    return [usual * end / row["max_qps_under_slo"] for end in found]


def _print_rows(rows: list[dict[str, Any]], console: Console, priced: bool) -> None:
    """Print a single search as a sentence, several as a table."""
    if len(rows) == 1 and rows[0]["status"] == "done":
        console.print(f"capacity: {rows[0]['words']}", style="bold")
        if found := range_of(rows[0]):
            over = ranges_in_words(rows[0])
            console.print(f"range: {found[0]:.3g} to {found[1]:.3g} {rows[0]['rate_of']}/s over {over}")
        if usual := rows[0]["requests_per_dollar"]:
            ends = rows[0]["requests_per_dollar_range"]
            between = "" if ends is None else f" ({ends[0]:.4g} to {ends[1]:.4g})"
            million = 1e6 * rows[0]["max_qps_under_slo"] / usual / (rows[0]["output_throughput"] or inf)
            ends_usd = [million * usual / end if end else inf for end in reversed(ends or [])]
            dearest = f" ({dollars(ends_usd[0])} to {dollars(ends_usd[1])})" if ends_usd else ""
            console.print(f"price: {usual:.4g} {rows[0]['rate_of']}/${between}, ${million:.3g} per million output "
                          f"tokens{dearest}")  # fmt: skip
        print_errors(rows, console)
        _print_unsteady(rows, console)
        console.print(f"{len(rows[0]['trials'])} trials; times: {rows[0]['predictor']}", style="dim")
        return
    done = [row for row in rows if row["status"] == "done"]
    if warning := unlike_sources([row["predictor"] for row in done]):
        console.print(f"WARNING: {warning}", style="bold red")
    table = Table(box=None, header_style="bold", pad_edge=False)
    things = " or ".join(sorted({row["rate_of"] for row in rows if row.get("rate_of")})) or "requests"
    columns = ["point", f"capacity ({things}/s)", "range", "per GPU", "P99 TBT (ms)", "P50 TTFT (ms)", "binding SLO",
               "Pareto", "times"]  # fmt: skip
    if priced:
        columns.insert(4, f"{things}/$")
    for column in columns:
        table.add_column(column, justify="left" if column in ("point", "binding SLO", "times") else "right")
    ranked = sorted(rows, key=lambda row: -(row.get("qps_per_gpu") or -inf))
    for row in ranked:
        if row["status"] != "done":
            table.add_row(row["name"], row["status"], *[""] * (len(columns) - 4), row["error"].splitlines()[0])
            continue
        found = range_of(row)
        cells = [f"{row['max_qps_under_slo']:.3g}", f"{found[0]:.3g}-{found[1]:.3g}" if found else "-"]
        cells.append(f"{row['qps_per_gpu']:.3g}")
        if priced:
            ends = row["requests_per_dollar_range"]
            between = "" if ends is None else f" ({ends[0]:.4g}-{ends[1]:.4g})"
            usual = row["requests_per_dollar"]
            cells.append("-" if usual is None else f"{usual:.4g}{between}")
        cells += ["-" if row[key] is None else f"{row[key]:.4g}" for key in ("p99_tbt_ms", "p50_ttft_ms")]
        pareto = "*" if row["pareto"] else ""
        table.add_row(row["name"], *cells, row["binding_slo"] or row["outcome"], pareto, times_kind(row["predictor"]))
    console.print(table)
    _print_alike([row for row in ranked if row["status"] == "done"], console)
    print_errors(done, console)
    _print_unsteady(rows, console)


def _print_alike(ranked: list[dict[str, Any]], console: Console) -> None:
    """Print which points can't be told apart from the best per GPU."""
    if not ranked or range_of(ranked[0]) is None:
        return
    ranges = [range_of(row, "qps_per_gpu") for row in ranked]
    without = "" if ranked[0].get("uncertainty") else "; errors of the predicted times are not in them (--uncertainty)"
    console.print(f"ranges: over {ranges_in_words(ranked[0])}{without}", style="dim")
    if others := [ranked[i]["name"] for i in alike(ranges, 0)]:
        console.print(
            f"can't be told apart from {ranked[0]['name']} per GPU (their ranges overlap): {'; '.join(others)}"
        )


def _print_unsteady(rows: list[dict[str, Any]], console: Console) -> None:
    for row in rows:
        if words := sustained_in_words(row):
            which = f"{row['name']}: " if len(rows) > 1 else ""
            console.print(f"note: {which}the run at the capacity: {words}", style="yellow")


# -- confirming ------------------------------------------------------------------------------------------------------


def _confirm_all(rows: list[dict[str, Any]], every: list[dict[str, Any]], console: Console) -> None:
    """Confirm each row's capacity and write it beside the search; several at once if the node has GPUs for them."""
    if not rows:
        raise InputError("nothing to confirm: no search found a rate above which an SLO is missed")
    gpus = _gpus()
    needed = max(row["num_gpus"] for row in rows)
    slots = max(1, len(gpus) // needed)

    def visible(slot: int) -> dict[str, str]:
        mine = gpus[slot * needed : (slot + 1) * needed]
        return {"CUDA_VISIBLE_DEVICES": ",".join(mine)} if mine else {}

    work = [
        {**point, "predicted": row["max_qps_under_slo"], "name": row["name"]}
        for row, point in zip(rows, every, strict=True)
    ]
    for number, result in work_off(confirm_point, work, slots, visible):
        row = rows[number]
        if result["status"] != "done":
            console.print(f"{row['name']}: {result['status']}: {result['error']}")
            row["confirmed"] = result
            continue
        saved = row["plain_search_gpu_hours"] - result["gpu_hours"]
        row["confirmed"] = {**result, "gpu_hours_saved": saved}
        write_json(Path(every[number]["folder"]) / "confirmation.json", row["confirmed"])
        console.print(f"{row['name']}: {_confirmed_words(row['confirmed'], row['rate_of'])}")


def _confirmed_words(result: Mapping[str, Any], things: str) -> str:
    """Return the result of a confirmation in a sentence."""
    low, high = result["confirmed_qps"], result["missed_at_qps"]
    if result["settled"]:
        found = f"confirmed {low:.3g} {things}/s on {result['hardware']} (predicted {result['error']:+.1%})"
    elif not low:
        found = (
            f"below {high:.3g} {things}/s on {result['hardware']}, far from the prediction ('windtunnel validate' "
            "reports where it is wrong)"
        )
    else:
        above = "above it" if high is None else f"at most {high:.3g}"
        found = f"at least {low:.3g} and {above} {things}/s on {result['hardware']}: not settled within the runs"
    saved = result["gpu_hours_saved"]
    than = f"{abs(saved):.3g} {'fewer' if saved >= 0 else 'more'} than a plain search"
    unit = "CPU-hours" if result["on"] == "cpu" else "GPU-hours"
    return f"{found}; {len(result['trials'])} runs, {result['gpu_hours']:.3g} {unit}, {than}"


def _gpus() -> list[str]:
    """Return this process's GPUs as CUDA_VISIBLE_DEVICES names them, counted from 0."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    return [str(i) for i, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]
