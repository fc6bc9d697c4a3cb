"""docs/studies.md and the record that it is written from: what each study gave, as far as its claims are about it.

windtunnel study run all --record docs/studies.json
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.documents import read_json
from engine.errors import InputError
from studies.published.experiment import Experiment
from studies.published.judge import Records

DIGITS = 5


def kept(experiment: Experiment, records: Mapping[str, Records], seeds: int) -> dict[str, Any]:
    """Return of a study what its section of the page needs: the values that claims are about, by host and point."""
    asked: dict[str, set[str]] = {}
    for claim in experiment.claims:
        for name in claim.of:
            point, _, metric = name.rpartition(":")
            asked.setdefault(point, set()).add(metric)
    return {
        "seeds": seeds,
        "records": {
            host: {point: _shortened(record, asked.get(point, set())) for point, record in found.items()
                   if point in asked or "fine_qps" in record}
            for host, found in records.items()
        },
    }  # fmt: skip


def _shortened(record: Mapping[str, Any], metrics: set[str]) -> dict[str, Any]:
    fine = {name: _digits(record[name]) for name in ("fine_qps", "coarse_qps") if name in record}
    wanted = metrics | ({"qps"} if fine else set())
    found = {}
    for part in ("values", "draws"):
        if part in record:
            found[part] = {name: _digits(value) for name, value in record[part].items() if name in wanted}
    return found | fine


def _digits(value: Any) -> Any:
    return list(map(_digits, value)) if isinstance(value, list) else float(f"{value:.{DIGITS}g}")


def read(path: Path) -> dict[str, Any]:
    """Read a record; an empty one where there is no file. Raises InputError for a file that is none."""
    if not path.exists():
        return {}
    found = read_json(path, "give another --record")
    if not isinstance(found, dict) or not all(isinstance(each, dict) and "records" in each for each in found.values()):
        raise InputError(f"{path} is no record of studies: give another --record")
    return found
