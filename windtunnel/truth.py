"""Writes docs/truth.md and its record: `windtunnel calibrate truth`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.documents import read_json
from engine.results.files import write_json, write_whole
from studies.measured.judge import OF_REQUESTS, by_limit, errors_of, summary
from studies.measured.point import LATENCIES
from studies.measured.truth import SETS, described, render
from windtunnel.measured import predict_points, read_points


def write_truth(
    output: Path,
    public: Path | None,
    on_progress: Callable[[str], None] = lambda what: None,
    workers: int | None = None,
) -> dict[str, Any]:
    """Write the page `output` and, beside it, its record (.json); with `public` predict all sets anew from there.

    Raises InputError if the record is missing, or a file of a set.
    """
    path = output.with_suffix(".json")
    record: dict[str, Any]
    if public is None:
        record = read_json(path, "give --public DIR to make it")
    else:
        missed = read_json(path, "remove it")["missed"] if path.is_file() else "Nothing noted."
        record = {"sets": [_one(each, public, on_progress, workers) for each in SETS], "missed": missed}
        write_json(path, record)
    write_whole(output, render(record))
    return record


def _one(each: dict[str, Any], public: Path, on_progress: Callable[[str], None], workers: int | None) -> dict[str, Any]:
    on_progress(each["name"])
    given, only = each.get("given", {}), each.get("only")
    files, ready, refused = read_points(public / each["file"], given, only=only)
    results = predict_points(ready, workers)
    records = [record for record in results if record is not None]
    rows = judged_rows(each, records)
    found = summary(records, len(ready) + len(refused))
    return {
        "name": each["name"],
        "file": each["file"],
        "only": only,
        "given": given,
        "fitted": each["fitted"],
        "peers": each["peers"],
        "assumed": list(dict.fromkeys(text for file in files for text in file.every_assumption)),
        "rows": rows,
        "groups": _rounded(found["groups"]),
        "requests": _rounded({name: found[name] for name in OF_REQUESTS if name in found}),
        "refused": len(refused),
        "points": [
            described(one.point, record["predicted"]) for one, record in zip(ready, results, strict=True) if record
        ],
    }


def judged_rows(each: dict[str, Any], records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the first table for a set: the errors of its points that nothing was fitted to."""
    fitted = re.compile(each["fitted_rows"]) if each.get("fitted_rows") else None
    whole = each["fitted"] is not None and fitted is None
    judged = [record for record in records if fitted is None or not fitted.search(record["id"])]
    free, limited = by_limit(judged)
    rows = [
        {
            "name": each["name"],
            "points": len(free),
            "errors": _errors(free),
            "targets": each["targets"],
            "fitted": whole,
        }
    ]
    if limited:
        targets = each.get("limited_targets", [0.10, 0.15, 0.10])
        rows.append({"name": f"{each['name']}: KV-limited", "points": len(limited), "errors": _errors(limited),
                     "targets": targets, "fitted": whole})  # fmt: skip
    return rows


def _errors(records: list[dict[str, Any]]) -> dict[str, Any]:
    found = errors_of(records)
    return {name: _rounded(found[name]) for name in LATENCIES if found[name]}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value
