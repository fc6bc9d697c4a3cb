"""Sweeps: many points, each its own settings, and which of them no other beats.

A sweep's file holds settings like any run's, and under `sweep` lists of what varies; the points are their product. An
entry that is a mapping sets several keys at once:

    model: 01-ai/Yi-34B
    workload: openchat_sharegpt4
    sweep:
      deployment:
        - {device: a100, tensor_parallel_size: 2}
        - {device: h100, tensor_parallel_size: 1}
      scheduler: [sarathi, vllm]
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from engine.errors import InputError
from engine.results.tables import Array
from engine.specs.checks import file_name, short

MOST_POINTS = 10_000


def points(varied: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Return the product of what varies, as the settings that each point changes."""
    if not isinstance(varied, Mapping) or not varied:
        raise InputError(f"{where}: sweep: give what varies as lists, such as scheduler: [sarathi, vllm]")
    axes = []
    for key, values in varied.items():
        if not isinstance(values, list) or not values:
            raise InputError(f"{where}: sweep: {key}: {values!r}: give a list of values")
        axes.append([value if isinstance(value, Mapping) else {key: value} for value in values])
        for each in axes[-1]:
            if any(not isinstance(name, str) for name in each):
                raise InputError(f"{where}: sweep: {key}: {short(each)}: give settings by their names")
    if (count := prod(map(len, axes))) > MOST_POINTS:
        raise InputError(f"{where}: sweep: {count:,} points: give at most {MOST_POINTS:,}")
    found = [dict(itertools.chain.from_iterable(each.items() for each in point)) for point in itertools.product(*axes)]
    names = Counter(file_name("the point", name_of(point)) for point in found)
    if twice := next((name for name, count in names.items() if count > 1), None):
        raise InputError(f"{where}: sweep: the point {twice} is there twice: remove one")
    return found


def name_of(changed: Mapping[str, Any]) -> str:
    """Return a point's name, fit for a folder: the values that it changes."""
    texts = ("+".join(map(str, value)) if isinstance(value, list) else str(value) for value in changed.values())
    return ",".join("".join(c if c.isalnum() or c in ".+-" else "_" for c in text.split("/")[-1]) for text in texts)


_WORDS = {
    "tensor_parallel_size": "TP{}", "pipeline_parallel_size": "PP{}", "data_parallel_size": "DP{}",
    "max_num_batched_tokens": "budget {:,}", "max_num_seqs": "{:,} sequences", "num_replicas": "{} replicas",
    "kv_cache_dtype": "{} KV cache", "gpu_memory_utilization": "{} of the memory", "block_size": "blocks of {}",
}  # fmt: skip
_SWITCHES = {
    "enable_prefix_caching": ("prefix caching", "no prefix caching"),
    "async_scheduling": ("asynchronous", "synchronous"),
    "enable_expert_parallel": ("expert parallel", "no expert parallel"),
}
_NAMED = ("model", "device", "engine", "scheduler", "quantization", "workload", "network", "predictor", "router",
          "dtype")  # fmt: skip


def in_words(changed: Mapping[str, Any]) -> str:
    """Return a point's name for a reader: what each value is, such as "h100_sxm, TP2, budget 2,048"."""
    return ", ".join(_word(key, str(value)) for key, value in changed.items())


def _word(key: str, value: str) -> str:
    if key in _SWITCHES and value in ("True", "False"):
        return _SWITCHES[key][value == "False"]
    if key in _WORDS:
        words = _WORDS[key]
        return words.format(int(value)) if value.isdigit() else words.replace("{:,}", "{}").format(value)
    return value.split("/")[-1] if key in _NAMED else f"{key.replace('_', ' ')} {value}"


def price_of(device: str, known: Mapping[str, float]) -> float | None:
    """Return the dollars per GPU-hour of a device: its own, else that of any device ("")."""
    return known.get(device, known.get(""))


def mark_pareto(rows: Sequence[dict[str, Any]], more: Sequence[str], less: Sequence[str]) -> None:
    """Set "pareto" on each row: whether no other is at least as good in everything and better in something.

    Rows without one of the keys are not on the front.
    """
    for row in rows:
        row["pareto"] = False
    known = [row for row in rows if all(row.get(key) is not None for key in (*more, *less))]
    costs = [[*(-row[key] for key in more), *(row[key] for key in less)] for row in known]
    for row, on in zip(known, not_dominated(np.array(costs)) if known else (), strict=True):
        row["pareto"] = bool(on)


def not_dominated(costs: Array) -> Array:
    """Return which of the points (n, costs) are on the front: no other is as low in all and lower in one."""
    no_higher = np.all(costs[:, None] >= costs[None], axis=2)
    lower = np.any(costs[:, None] > costs[None], axis=2)
    dominated: Array = np.any(no_higher & lower, axis=1)
    return ~dominated
