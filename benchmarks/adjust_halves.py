"""Does `calibrate adjust` help? Fits each public set's low-load half and predicts its high-load half.

    python benchmarks/adjust_halves.py DIR [PART_OF_A_SET_S_NAME ...]   # the folder of the public measurements

At most twelve points of the low half are fitted to, evenly chosen: what a user would measure. The last half of the
loads is then predicted with the engine as it ships, and with the preset that was fitted. Sets of
one run have no halves.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import yaml

from engine.workload.workload import WorkloadSpec
from studies.measured.truth import SETS
from windtunnel.measured import adjust_preset, read_points, validate_measured

MOST = 12  # points to fit to


def load_of(workload: object) -> float:
    """Return the concurrency, the rate, or the requests given at once."""
    assert isinstance(workload, WorkloadSpec)
    rate = workload.request_rate if workload.request_rate != float("inf") else None
    return float(workload.max_concurrency or rate or workload.num_prompts or 0)


def pattern(ids: list[str]) -> str:
    """Return a regular expression of these ids alone."""
    return f"^({'|'.join(re.escape(name) for name in ids)})$"


def main(folder: Path, wanted: list[str]) -> None:
    for each in SETS:
        if wanted and not any(part in each["name"] for part in wanted):
            continue
        path, given = folder / each["file"], each.get("given", {})
        _, ready, _ = read_points(path, given, only=each.get("only"))
        if len(ready) < 4:
            continue
        ordered = sorted(ready, key=lambda one: load_of(one.point.workload))
        middle = load_of(ordered[len(ordered) // 2].point.workload)
        low = [one.point.id for one in ordered if load_of(one.point.workload) < middle]
        high = [one.point.id for one in ordered if load_of(one.point.workload) >= middle]
        chosen = [low[i * len(low) // min(MOST, len(low))] for i in range(min(MOST, len(low)))]
        found = adjust_preset(path, given, only=pattern(chosen), workers=None)
        print(f"{each['name']}: {found['points']} points fitted to, {len(high)} predicted", flush=True)
        for name, value in found["constants"].items():
            print(f"  {name} {found['before_constants'][name]:.4g} -> {value:.4g} +- {found['margins'][name]:.2g}")
        print(f"  can't be told apart: {found['alike']}; hardly told: {found['flat']}", flush=True)
        with tempfile.TemporaryDirectory() as place:
            preset = Path(place) / "mine.yaml"
            preset.write_text(yaml.safe_dump(found["preset"]))
            for words, engine in (("as it ships", {}), ("adjusted", {"engine": str(preset)})):
                results = validate_measured(path, {**given, **engine}, only=pattern(high), workers=None)
                shown = [
                    f"{measure} {results[measure]['mape']:.2%} ({results[measure]['bias']:+.2%})"
                    for measure in ("tpot", "ttft", "e2e")
                    if results[measure]
                ]
                print(f"  high half, {words}: {', '.join(shown)}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
