"""One point of a search: its capacity in the simulator, that of a draw of it, and that capacity on this node's engine.

Processes of a sweep import both functions by name; both resume from the trials that are in the point's folder.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from cli.bench import only_group
from cli.engine import engine_spec
from engine.executors.start import start
from engine.runtime.serve import serve
from studies.capacity.search import confirm, gpu_hours
from studies.capacity.trial import Trial, at_rate
from studies.validation.run import check_machine
from windtunnel.capacity import CapacitySearch, checked, kept
from windtunnel.plugins import load_plugin
from windtunnel.settings import BenchConfig, load


def settings_of(point: dict[str, Any]) -> BenchConfig:
    """Return a point's settings, of its file and flags."""
    return load(Path(point["config"]) if point["config"] else None, point["flags"], BenchConfig)


def search_point(point: dict[str, Any]) -> dict[str, Any]:
    """Search one point's capacity in its folder, or that of its draw `point["draw"]` near `point["found"]`."""
    search = CapacitySearch(settings_of(point), point["tolerance"], Path(point["folder"]))
    if "draw" in point:
        return {"status": "done", "qps": search.draw(point["found"], point["draw"], point["errors"])}
    return search.first(curve=point["curve"], keep_runs=point["keep_runs"])


def confirm_point(point: dict[str, Any]) -> dict[str, Any]:
    """Run a point's predicted capacity on this node's engine and return the result."""
    settings = settings_of(point)
    for plugin in settings.plugin:
        load_plugin(plugin)
    group = only_group(settings)
    workload, slos = checked(settings)
    things = "conversations" if workload.has_conversations else "requests"
    replica = group.replica_spec()
    executor = start(engine_spec(replica, group.model, settings, settings.seed), settings.executor)

    def served(rate: float, partial: Path) -> dict[str, Any]:
        made = serve(
            at_rate(workload, rate),
            replica,
            executor,
            seed=settings.seed,
            slos=slos,
            folder=partial,
        )
        return made.summary

    def trial(rate: float) -> Trial:
        sent = at_rate(workload, rate)
        first = len(sent) if sent.after is None else int((sent.after < 0).sum())  # that come at the rate
        _say(f"{point['name']}: the engine at {rate:.3g} {things}/s, {first / rate:,.0f} s at least")
        made = kept(Path(point["folder"]) / "confirm", rate, served)
        _say(f"{point['name']}: {rate:.3g} {things}/s {'meets the SLOs' if made.met else f'misses {made.binding}'}")
        return made

    try:
        check_machine(replica, executor)
        found = confirm(trial, point["predicted"])
    finally:
        executor.close()
    used = gpu_hours(found.trials, replica.parallel.world_size)
    on = replica.device.runs_on
    return {"status": "done", **found.to_json(), "gpu_hours": used, "hardware": executor.hardware, "on": on}


def _say(text: str) -> None:
    """Print to stderr, from any process."""
    print(text, file=sys.stderr, flush=True)
