"""How far predictions are from what was measured: by point, by group, and over all.

Aggregated points: the mean of |predicted - measured| / measured over points, and the mean with its sign. A file with a
line a request is one point, of its means after the warm-up, with the errors of its requests beside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from engine.replica_spec import ReplicaSpec
from simulator.predictor.uncertainty import interval
from studies.measured.point import MEASURES, Point

Prediction = Mapping[str, Any]
Record = TypeVar("Record", bound=Mapping[str, Any])
OF_REQUESTS = {  # what there is of a run with a line a request, in words
    "per_request": "each request's own, mean error",
    "cold": "mean of the warm-up",
    "p90": "P90",
    "p99": "P99",
}


def point_record(point: Point, replica: ReplicaSpec, predicted: Prediction) -> dict[str, Any]:
    """Return what is reported of one point: figures in seconds and tokens/s, errors as shares."""
    predicted = _with_e2e(point, predicted)
    record: dict[str, Any] = {
        "id": point.id,
        "group": group_of(replica),
        "load": point.load,
        "engine": replica.engine.name,
        "predictor": predicted["predictor"],
        "measured": dict(point.measured),
        "predicted": {name: predicted[name] for name in MEASURES if name in predicted},
        "error": {
            name: predicted[name] / value - 1
            for name, value in point.measured.items()
            if predicted.get(name) is not None
        },
        **{name: predicted[name] for name in ("kv_limited", "in_range", "preemptions", "where", "num_gpu_blocks")},
    }
    if draws := [_with_e2e(point, each) for each in predicted.get("draws", ())]:
        ranges = {name: interval([each[name] for each in draws]) for name in record["error"]}
        record["range"] = ranges
        record["covered"] = {name: each["low"] <= point.measured[name] <= each["high"] for name, each in ranges.items()}
    if point.per_request:
        record["requests"] = _per_request(point, predicted["per_request"])
    return record


def _with_e2e(point: Point, predicted: Prediction) -> Prediction:
    """Return a prediction with the E2E that is TTFT + TPOT x (output - 1), where it is so measured."""
    if point.output_tokens is None or not {"ttft", "tpot"} <= predicted.keys():
        return predicted
    return {**predicted, "e2e": predicted["ttft"] + predicted["tpot"] * (point.output_tokens - 1)}


def group_of(replica: ReplicaSpec) -> str:
    """Return the group of a point: model, device, format, layout."""
    model = replica.model
    form = model.dtype if model.quantization in (None, "none") else model.quantization
    return f"{model.name.rpartition('/')[2]} {replica.device.name} {form} {replica.parallel}"


def summary(records: Sequence[Mapping[str, Any]], num_points: int) -> dict[str, Any]:
    """Return the errors over all points and by group, as the last line of `--json`."""
    groups = []
    free, limited = by_limit(records)
    if limited and free:
        groups.append({"group": "not KV-limited", **errors_of(free)})
    if limited:
        groups.append({"group": "KV-limited", **errors_of(limited)})
    names = list(dict.fromkeys(record["group"] for record in free))
    groups += [{"group": name, **errors_of([each for each in free if each["group"] == name])} for name in names]
    found: dict[str, Any] = {"points": num_points, "predicted": len(records), **errors_of(records), "groups": groups}
    del found["count"]
    single = [record["requests"] for record in records if "requests" in record]
    if len(single) == 1:
        found |= single[0]
    return found


def by_limit(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Return the records that are not KV-limited, and those that are."""
    limited = [record for record in records if record["kv_limited"]]
    return [record for record in records if not record["kv_limited"]], limited


def groups_of(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return all the points as a group, and the groups of a summary."""
    every = {"group": "all", "count": results["predicted"], **{name: results[name] for name in MEASURES}}
    return [every, *results["groups"]]


def errors_of(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return how many records there are, and of each measure `mape` and `bias`; None where none has it.

    With ranges of reruns also `covered`, the share of the measured values that lie within.
    """
    found: dict[str, Any] = {"count": len(records)}
    for measure in MEASURES:
        errors = [record["error"][measure] for record in records if measure in record["error"]]
        found[measure] = {"mape": float(np.mean(np.abs(errors))), "bias": float(np.mean(errors))} if errors else None
        within = [record["covered"][measure] for record in records if measure in record.get("covered", ())]
        if within:
            found[measure]["covered"] = float(np.mean(within))
    return found


def _per_request(point: Point, predicted: Mapping[str, Any]) -> dict[str, Any]:
    """Return errors of the requests themselves after the warm-up, of the warm-up's mean, and of percentiles."""
    warm = point.warmup_requests
    found: dict[str, dict[str, float | None]] = {name: {} for name in OF_REQUESTS}
    for measure, theirs in point.per_request.items():
        ours = np.asarray(predicted[measure])
        found["per_request"][measure] = float(np.mean(np.abs(ours[warm:] / theirs[warm:] - 1)))
        found["cold"][measure] = float(ours[:warm].mean() / theirs[:warm].mean() - 1) if warm else None
        for part in (90, 99):
            mine, real = (np.percentile(values[warm:], part) for values in (ours, theirs))
            found[f"p{part}"][measure] = float(mine / real - 1)
    return found
