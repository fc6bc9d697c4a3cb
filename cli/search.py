"""`windtunnel search`: the most load that a deployment carries within its SLOs; many at once; confirmed on hardware."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from math import inf
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cli.bench import only_group
from cli.config import ENGINE_KEYS, BenchConfig, ReplicaGroup, load, read_file
from cli.engine import engine_device, engine_spec
from cli.output import load_plugin, progress_bar, resolved
from cli.simulate import deployment_of
from engine import catalog
from engine.engine_spec import dtype_bytes, start
from engine.errors import InputError, unknown
from engine.run_folder import run_folder, write_config, write_summary
from engine.serve import serve
from engine.specs import SLO
from simulator.cluster import Deployment
from simulator.predictor import calibration as store
from studies.confirm import confirm, gpu_hours
from studies.search import Trial, at_rate, find_capacity, guess, judged, simulated_trial
from studies.sweep import mark_pareto, name_of, points, work_off, work_off_on_ray, write_json
from studies.validation_run import check_machine

NUM_PROMPTS = 2048  # of a search, where nothing else was asked for
SETTINGS, RESULT, SWEEP = "settings.json", "search.json", "sweep.json"
_AT_CAPACITY = {"p99_tbt_ms": "p99_itl_ms", "p50_ttft_ms": "median_ttft_ms", "output_throughput": "output_throughput",
                "mean_tpot_ms": "mean_tpot_ms"}  # fmt: skip


def run(
    config: Path | None,
    flags: dict[str, Any],
    output_dir: Path,
    *,
    sweep: Path | None,
    tolerance: float,
    gpu_price: str | None,
    workers: int | None,
    ray_address: str | None,
    confirm_top: int,
    as_json: bool,
) -> int:
    """Search, write the results and print them. Returns the exit code: 1 if a point crashed."""
    width = None if (sys.stderr if as_json else sys.stdout).isatty() else 160
    console = Console(stderr=as_json, highlight=False, soft_wrap=True, width=width)
    prices = None if gpu_price is None else _prices(gpu_price)
    if not 0 < tolerance < 1:
        raise InputError(f"tolerance {tolerance}: give a share such as 0.025")
    if workers is not None and workers < 1:
        raise InputError(f"--workers {workers}: give at least 1")
    shared: dict[str, Any] = {"tolerance": tolerance}
    if sweep is None:
        settings = load(config, flags, BenchConfig)
        _checked(settings)
        if confirm_top:
            only_group(settings)  # before the search is made
        shared["settings"] = settings.model_dump(mode="json")  # the file may be another one tomorrow
        for plugin in settings.plugin:
            load_plugin(plugin)
        for group in settings.groups():
            deployment_of(group)  # says what is wrong with it, before anything is written
        changes: list[dict[str, Any]] = [{}]
    else:
        if config is not None:
            raise InputError(f"--config {config} and --sweep {sweep} both give settings: leave one out")
        values = read_file(sweep)
        changes = points(values.pop("sweep", {}), str(sweep))
        shared["file"] = str(sweep.resolve())
    every = []
    given = {key: value for key, value in flags.items() if value is not None}
    if sweep is not None:
        _check_keys(values, changes, given, sweep)
    for change in changes:
        folder = output_dir if sweep is None else output_dir / "points" / name_of(change)
        base = {} if sweep is None else values
        every.append({"config": str(config.resolve()) if config else None, "flags": {**base, **change, **given},
                      "folder": str(folder.absolute()), "tolerance": tolerance})  # fmt: skip
    identity = {**shared, "version": version("windtunnel"), "contents": _contents(every)}
    _open(output_dir, {"points": [{**each, "folder": None} for each in every], **identity})
    rows = _search_all(every, changes, workers, ray_address, console)
    for row in rows:
        row["requests_per_dollar"] = _per_dollar(row, prices)
    mark_pareto(rows, more=("qps_per_gpu",), less=("p99_tbt_ms", "p50_ttft_ms"))
    if sweep is not None:
        write_json(output_dir / SWEEP, {"points": rows, "gpu_price": prices, **shared})
    _print_rows(rows, console, prices is not None)
    if confirm_top:
        chosen = sorted((row for row in rows if row["status"] == "done" and row["outcome"] == "found"),
                        key=lambda row: -row["qps_per_gpu"])[:confirm_top]  # fmt: skip
        _confirm_all(chosen, [every[rows.index(row)] for row in chosen], console)
        if sweep is not None:
            write_json(output_dir / SWEEP, {"points": rows, "gpu_price": prices, **shared})
    console.print(f"results: {output_dir / (RESULT if sweep is None else SWEEP)}")
    console.print(f"draw them: windtunnel report {output_dir}")
    if as_json:
        print(json.dumps({**(rows[0] if sweep is None else {"points": rows}), "output_dir": str(output_dir)}))
    failed = any(row.get("confirmed", {}).get("status", "done") != "done" for row in rows)
    return int(failed or any(row["status"] == "crashed" for row in rows))


def _check_keys(
    values: Mapping[str, Any], changes: list[dict[str, Any]], given: Mapping[str, Any], sweep: Path
) -> None:
    """InputError for a key that no point could have, and for a flag that would win over what a sweep varies."""
    varied = {key: None for change in changes for key in change}
    for key in (*values, *varied):
        if key not in BenchConfig.model_fields:
            raise unknown(f"key in {sweep}", key, (*BenchConfig.model_fields, "sweep"))
    if twice := next((key for key in varied if key in given), None):
        raise InputError(f"--{twice.replace('_', '-')} {given[twice]}: {sweep} varies {twice}: leave one out")


def _contents(every: list[dict[str, Any]]) -> dict[str, str]:
    """Hashes of the files that the points rest on, which may change: calibrations, traces, lengths, plugins."""
    found = {}
    for point in every:
        flags = point["flags"]
        names = [flags.get(key) for key in ("device", "trace", "workload", "model")]
        for name in (*names, *(flags.get("plugin") or [])):
            path = Path(str(name)).expanduser()
            files = sorted(path.glob("*.json")) if path.is_dir() else [path] if path.is_file() else []
            for file in files:
                found[str(file)] = hashlib.sha256(file.read_bytes()).hexdigest()
        device = flags.get("device")
        if device and catalog.is_name("device", str(device)):
            folder = store.folder_of(catalog.device(str(device)))
            found[str(device)] = store.fingerprint(folder) if folder is not None else ""
    return found


def search_point(point: dict[str, Any]) -> dict[str, Any]:
    """One search, in its folder, going on with the trials that are there. Importable by a process of its own."""
    folder = Path(point["folder"])
    settings = load(Path(point["config"]) if point["config"] else None, point["flags"], BenchConfig)
    workload, slos = _checked(settings)
    for plugin in settings.plugin:
        load_plugin(plugin)
    kinds = [(_simulated(group, settings.dtype), group.count) for group in settings.groups()]
    deployments = [kind for kind, count in kinds for _ in range(count)]

    def simulated(rate: float, partial: Path) -> dict[str, Any]:
        requests = at_rate(workload, rate)
        made = simulated_trial(requests, deployments, slos, rate, partial, settings.router, settings.seed)
        write_config(partial, _config(settings, deployments, len(requests), rate))
        return made.summary

    def trial(rate: float) -> Trial:
        return _kept(folder / "trials", rate, simulated)

    begin = settings.request_rate or guess(workload, deployments, settings.router)
    capacity = find_capacity(trial, begin, point["tolerance"])
    gpus = sum(kind.parallel.world_size for kind in deployments)
    found: dict[str, Any] = {
        "status": "done",
        **capacity.to_json(),
        "words": capacity.describe(),
        "slos": [str(slo) for slo in slos],
        "device": deployments[0].device.name,
        "num_gpus": gpus,
        "qps_per_gpu": capacity.qps / gpus,
        "plain_search_gpu_hours": gpu_hours(capacity.trials, gpus),
        "predictor": deployments[0].predictor.description,
        **_at_capacity(capacity.best),
        "unsteady": _unsteady(capacity.best) if capacity.outcome == "found" else None,
    }
    write_json(folder / RESULT, found)
    return found


def _simulated(group: ReplicaGroup, dtype: str) -> Deployment:
    """The group's replica, in a `dtype` that the engine was told."""
    if dtype == "auto":
        return deployment_of(group)
    return deployment_of(group, model=replace(catalog.model(group.model), dtype_bytes=dtype_bytes(dtype)))


def _kept(folder: Path, rate: float, make: Callable[[float, Path], dict[str, Any]]) -> Trial:
    """The trial of a rate: the one that is in `folder` already, or what `make` gives, kept there."""
    place = folder / f"{rate:.6g}"
    if not (place / "summary.json").is_file():
        with run_folder(place) as partial:
            write_summary(partial, make(rate, partial))
    return judged(json.loads((place / "summary.json").read_text("utf-8")), rate, place)


def _config(settings: BenchConfig, deployments: list[Deployment], num_prompts: int, rate: float) -> dict[str, Any]:
    """The settings of a trial, by which `simulate` runs it again: to its end, if it was given up."""
    found = resolved(settings, deployments[:1], num_prompts)
    return {key: value for key, value in found.items() if key not in ENGINE_KEYS} | {"request_rate": rate}


def _at_capacity(best: Trial | None) -> dict[str, Any]:
    """What the run at the capacity was like."""
    summary = best.summary if best is not None else {}
    return {name: summary.get(key) for name, key in _AT_CAPACITY.items()}


def _unsteady(best: Trial | None) -> str | None:
    """Why a capacity holds for so many requests and may not for more; None if its run was seen to be sustained."""
    judged_steady = best.summary["saturation"] if best is not None else {"growing": False}
    return None if judged_steady["growing"] is False else str(judged_steady["verdict"])


def _checked(settings: BenchConfig) -> tuple[Any, list[SLO]]:
    """The workload and the SLOs of a search; InputError for what can't be searched with."""
    slos = settings.slos()
    if not slos:
        raise InputError("no SLO to search by: add --slo 'p99_tbt<=0.1'")
    if settings.arrival in ("trace", "burst"):
        raise InputError(f"--arrival {settings.arrival} has no rate to search: leave it out")
    longest = min(kind.max_model_len or 0 for kind in settings.groups()) or None
    if longest is None:
        longest = min((deployment_of(group).scheduler.max_model_len or 0) for group in settings.groups())
    prompts = settings.num_prompts or (None if settings.trace is not None else NUM_PROMPTS)
    workload = settings.model_copy(update={"num_prompts": prompts, "request_rate": settings.request_rate or 1.0})
    return workload.workload_spec(longest), slos


def _open(folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder, or go on with the same search in it. InputError if it holds anything else."""
    path = folder / SETTINGS
    if path.is_file():
        if json.loads(path.read_text("utf-8")) != json.loads(json.dumps(settings)):
            raise InputError(f"{folder} holds a search with other settings: give another --output-dir")
    elif folder.exists() and any(folder.iterdir()):
        raise InputError(f"output folder {folder} is not empty: give another --output-dir")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)


def _search_all(
    every: list[dict[str, Any]],
    changes: list[dict[str, Any]],
    workers: int | None,
    ray_address: str | None,
    console: Console,
) -> list[dict[str, Any]]:
    """A row for each point, in order: what was finished before, and what is searched now."""
    rows: list[dict[str, Any]] = [{} for _ in every]
    left = []
    for i, point in enumerate(every):
        path = Path(point["folder"]) / RESULT
        if path.is_file():
            rows[i] = json.loads(path.read_text("utf-8"))
        else:
            left.append(i)
    todo = [every[i] for i in left]
    with progress_bar("searches") as progress:
        task = progress.add_task("searching", total=len(every), completed=len(every) - len(left))
        if ray_address is not None:
            results = work_off_on_ray(search_point, todo, ray_address)
        elif len(every) == 1:  # a single search runs here, and its errors are the command's
            results = iter([(0, search_point(todo[0]))] if todo else [])
        else:
            results = work_off(search_point, todo, workers or os.cpu_count() or 1)
        for number, row in results:
            rows[left[number]] = row
            progress.advance(task)
    for row, change, point in zip(rows, changes, every, strict=True):
        row["name"] = name_of(change) or "search"
        row["settings"] = change
        row["folder"] = point["folder"]
    return rows


def _prices(text: str) -> dict[str, float]:
    """Dollars per GPU-hour by device, of "2.5" (any device: "") or "a100=2,h100=4"."""
    found = {}
    for part in text.split(","):
        name, _, price = part.rpartition("=")
        if re.fullmatch(r"\d*\.?\d+", price.strip()) is None or float(price) == 0:
            raise InputError(f"--gpu-price {text!r}: give dollars per GPU-hour such as 2.5, or a100=2,h100=4")
        found[catalog.device(name.strip()).name if name else ""] = float(price)
    return found


def _per_dollar(row: Mapping[str, Any], prices: Mapping[str, float] | None) -> float | None:
    """Requests per dollar at the capacity; None without a price of its device."""
    price = (prices or {}).get(row.get("device", ""), (prices or {}).get(""))
    if price is None or row["status"] != "done":
        return None
    return float(row["max_qps_under_slo"] * 3600 / (row["num_gpus"] * price))


def _print_rows(rows: list[dict[str, Any]], console: Console, priced: bool) -> None:
    """A single search in a sentence, several as a table."""
    if len(rows) == 1 and rows[0]["status"] == "done":
        console.print(f"capacity: {rows[0]['words']}", style="bold")
        _print_unsteady(rows, console)
        console.print(f"{len(rows[0]['trials'])} trials; times: {rows[0]['predictor']}", style="dim")
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    columns = ["point", "capacity (requests/s)", "per GPU", "P99 TBT (ms)", "P50 TTFT (ms)", "binding SLO", "Pareto"]
    if priced:
        columns.insert(3, "requests/$")
    for column in columns:
        table.add_column(column, justify="left" if column in ("point", "binding SLO") else "right")
    for row in sorted(rows, key=lambda row: -(row.get("qps_per_gpu") or -inf)):
        if row["status"] != "done":
            table.add_row(row["name"], row["status"], *[""] * (len(columns) - 4), row["error"].splitlines()[0])
            continue
        cells = [f"{row['max_qps_under_slo']:.3g}", f"{row['qps_per_gpu']:.3g}"]
        if priced:
            cells.append("-" if row["requests_per_dollar"] is None else f"{row['requests_per_dollar']:.4g}")
        cells += ["-" if row[key] is None else f"{row[key]:.4g}" for key in ("p99_tbt_ms", "p50_ttft_ms")]
        table.add_row(row["name"], *cells, row["binding_slo"] or row["outcome"], "*" if row["pareto"] else "")
    console.print(table)
    _print_unsteady(rows, console)


def _print_unsteady(rows: list[dict[str, Any]], console: Console) -> None:
    for row in rows:
        if why := row.get("unsteady"):
            which = f"{row['name']}: " if len(rows) > 1 else ""
            more = "with more requests (--num-prompts) the capacity may be lower"
            console.print(
                f"note: {which}the run at the capacity: {why.removesuffix('; raise --num-prompts')}; {more}",
                style="yellow",
            )


# -- confirming ------------------------------------------------------------------------------------------------------


def confirm_point(point: dict[str, Any]) -> dict[str, Any]:
    """Run a point's predicted capacity on this node's engine. Importable by a process of its own."""
    settings = load(Path(point["config"]) if point["config"] else None, point["flags"], BenchConfig)
    for plugin in settings.plugin:
        load_plugin(plugin)
    group = only_group(settings)
    workload, slos = _checked(settings)
    spec, scheduler = engine_spec(group, settings, engine_device(group.device), settings.seed)
    executor = start(spec, settings.executor)

    def served(rate: float, partial: Path) -> dict[str, Any]:
        made = serve(
            at_rate(workload, rate),
            scheduler,
            executor,
            vocab_size=spec.model.vocab_size,
            parallel=spec.parallel,
            sliding_window=spec.model.sliding_window,
            async_scheduling=bool(group.async_scheduling),  # as it was predicted
            seed=settings.seed,
            slos=slos,
            folder=partial,
        )
        return made.summary

    try:
        check_machine(catalog.device(group.device), spec, executor)
        found = confirm(lambda rate: _kept(Path(point["folder"]) / "confirm", rate, served), point["predicted"])
    finally:
        executor.close()
    used = gpu_hours(found.trials, spec.parallel.world_size)
    return {"status": "done", **found.to_json(), "gpu_hours": used, "hardware": executor.hardware}


def _confirm_all(rows: list[dict[str, Any]], every: list[dict[str, Any]], console: Console) -> None:
    """Confirm each row's capacity and write it beside the search; several at once where the node has GPUs for them."""
    if not rows:
        raise InputError("no capacity was found that could be confirmed: see the outcomes above")
    gpus = _gpus()
    needed = max(row["num_gpus"] for row in rows)
    slots = max(1, len(gpus) // needed)

    def visible(slot: int) -> dict[str, str]:
        mine = gpus[slot * needed : (slot + 1) * needed]
        return {"CUDA_VISIBLE_DEVICES": ",".join(mine)} if mine else {}

    work = [{**point, "predicted": row["max_qps_under_slo"]} for row, point in zip(rows, every, strict=True)]
    for number, result in work_off(confirm_point, work, slots, visible):
        row = rows[number]
        if result["status"] != "done":
            console.print(f"{row['name']}: {result['status']}: {result['error']}")
            row["confirmed"] = result
            continue
        saved = row["plain_search_gpu_hours"] - result["gpu_hours"]
        row["confirmed"] = {**result, "gpu_hours_saved": saved}
        write_json(Path(every[number]["folder"]) / "confirmation.json", row["confirmed"])
        console.print(f"{row['name']}: {_confirmed_words(row['confirmed'])}")


def _confirmed_words(result: Mapping[str, Any]) -> str:
    """What hardware said, in a sentence."""
    low, high = result["confirmed_qps"], result["missed_at_qps"]
    if result["settled"]:
        found = f"confirmed {low:.3g} requests/s on {result['hardware']} (predicted {result['error']:+.1%})"
    elif not low:
        found = f"below {high:.3g} requests/s on {result['hardware']}: no rate that was tried meets the SLOs"
    else:
        above = "above it" if high is None else f"at most {high:.3g}"
        found = f"at least {low:.3g} and {above} requests/s on {result['hardware']}: not settled in so many runs"
    saved = result["gpu_hours_saved"]
    than = f"{abs(saved):.3g} {'fewer' if saved >= 0 else 'more'} than a plain search"
    return f"{found}; {len(result['trials'])} runs, {result['gpu_hours']:.3g} GPU-hours, {than}"


def _gpus() -> list[str]:
    """This process's GPUs as CUDA_VISIBLE_DEVICES names them: from 0, whatever the numbers of the device files."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    return [str(i) for i, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]
