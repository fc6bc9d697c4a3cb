"""How far the simulator is from a server that was measured from outside: latencies, throughput, the server's gauges.

    results = compare_outside(measured, simulated, gauges)

What happens inside a server (its batches, their times) is not seen, so errors are found but not taken apart as for
this machine's own engine (`studies.validation.compare`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from engine.results.metric_table import METRICS, drawn_metrics
from engine.results.recorder import Run
from engine.results.tables import Array, Columns
from engine.workload.workload import Workload
from studies.validation.compare import STATISTICS, compare_runs
from studies.validation.record import latency_curves
from studies.words import percent, statistic_name

GAUGES = {"num_requests_running": "num_running", "num_requests_waiting": "num_waiting", "kv_cache_usage_perc": "kv"}


def as_served(workload: Workload, requests: Columns) -> Workload:
    """Return a workload as a server got it: its own counts of tokens, and what came unasked at the times it came.

    `requests` are those that were answered, as measured; where others hang on them (a closed loop, turns) every request
    stays, and the times are the simulation's to find.
    """
    order = np.argsort(requests["arrived_s"], kind="stable")
    ids = requests["request_id"][order]
    prompts, outputs = workload.prompt_tokens.copy(), workload.output_tokens.copy()
    prompts[ids], outputs[ids] = requests["prompt_tokens"][order], requests["output_tokens"][order]
    if workload.waits:
        return replace(workload, prompt_tokens=prompts, output_tokens=outputs)
    contents = workload.contents
    return replace(
        workload,
        arrived_at=requests["arrived_s"][order].astype(np.float64).clip(0.0),
        prompt_tokens=prompts[ids],
        output_tokens=outputs[ids],
        contents=None if contents is None else [contents[id] for id in ids.tolist()],
    )


def compare_outside(
    measured: Run, simulated: Run, simulated_iterations: Columns, gauges: Columns, kv_blocks: Sequence[int]
) -> dict[str, Any]:
    """Return every comparison as plain numbers (shares are fractions, times seconds).

    Args:
        gauges: samples of the server's own, `time_s` and a column for each of `GAUGES`; none where it has none.
        kv_blocks: of each simulated replica.
    """
    metrics = [*(metric.key for metric in drawn_metrics()), "tpot"]
    result = {
        "load": None,
        "requests": len(measured.requests["arrived_s"]),
        "engine_s": measured.summary["duration"],
        **dict.fromkeys(("iterations", "batches", "replay")),
        **compare_runs(measured, simulated, metrics),
        "gauges": compare_gauges(gauges, simulated_iterations, kv_blocks),
        "curves": latency_curves(measured, simulated),
    }
    return {**result, "largest": in_words(result)}


def compare_gauges(gauges: Columns, iterations: Columns, kv_blocks: Sequence[int]) -> dict[str, Any]:
    """Return mean and peak of the server's gauges and of the simulation's at the same times; of KV use per replica."""
    times = gauges.get("time_s", np.empty(0))
    ended = iterations["start_s"] + iterations["duration_s"]
    during = (times >= 0) & (times <= ended.max(initial=0.0))
    if not during.any():
        return {}
    found = {}
    for name, column in GAUGES.items():
        if np.isnan(values := gauges[name][during]).all():
            continue
        ours = _at(times[during], iterations, column, kv_blocks)
        values = values / len(kv_blocks) if column == "kv" else values
        found[name] = {
            "samples": int(during.sum()),
            "engine_mean": float(np.nanmean(values)),
            "simulated_mean": float(ours.mean()),
            "engine_max": float(np.nanmax(values)),
            "simulated_max": float(ours.max()),
        }
    return found


def _at(times: Array, iterations: Columns, column: str, kv_blocks: Sequence[int]) -> Array:
    """A state at `times`: the sum over the replicas, of KV use the mean; 0 where no batch runs."""
    total = np.zeros(len(times))
    first_stage = iterations["stage"] == 0
    for replica, blocks in enumerate(kv_blocks):
        mine = first_stage & (iterations["replica"] == replica)
        if not mine.any():
            continue
        starts = iterations["start_s"][mine]
        place = np.searchsorted(starts, times, side="right") - 1
        running = (place >= 0) & (times <= (starts + iterations["duration_s"][mine])[place])
        values = iterations["kv_blocks"][mine] / blocks / len(kv_blocks) if column == "kv" else iterations[column][mine]
        total += np.where(running, values[place], 0.0)
    return total


def in_words(result: dict[str, Any]) -> str:
    """Return the largest error, in a sentence."""
    every = [
        (abs(found["error"]), f"the {statistic_name(statistic)} of {METRICS[key].name}", found["error"])
        for key, statistics in result["latencies"].items()
        for statistic, found in statistics.items()
        if statistic in STATISTICS and found["error"] is not None
    ]
    if not every:
        return "there is nothing to compare"
    _, what, error = max(every)
    return f"{what} is furthest off: simulated {percent(error, sign=True)}"
