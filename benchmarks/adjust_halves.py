"""Does `calibrate adjust` help? Fits each public set's low-load half and predicts its high-load half.

    python benchmarks/adjust_halves.py DIR [PART_OF_A_SET_S_NAME ...]   # the folder of the public measurements
    python benchmarks/adjust_halves.py DIR --engine vllm@0.15 Qwen   # from an engine that was fitted elsewhere

At most twelve points of the low half are fitted to, evenly chosen: what a user would measure. The other half
is then predicted with the engine as it ships (or the one given), and with the preset that was fitted. Sets of one run
have no halves; KV-limited points are left out, of which no constant says how many blocks there were.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path

import yaml

from studies.measured.judge import by_limit, errors_of
from studies.measured.truth import SETS
from windtunnel.measured import adjust_preset, read_points, validate_measured

MOST = 12  # points to fit to


def pattern(ids: list[str]) -> str:
    """Return a regular expression of these ids alone."""
    return f"^({'|'.join(re.escape(name) for name in ids)})$"


def main(folder: Path, wanted: list[str], engine: str | None) -> None:
    for each in SETS:
        if wanted and not any(part in each["name"] for part in wanted):
            continue
        path, given = folder / each["file"], {**each.get("given", {}), **({"engine": engine} if engine else {})}
        _, ready, _ = read_points(path, given, only=each.get("only"))
        if len(ready) < 4:
            continue
        ordered = sorted(ready, key=lambda one: one.point.load_number)
        middle = ordered[len(ordered) // 2].point.load_number
        low = [one.point.id for one in ordered if one.point.load_number < middle]
        high = [one.point.id for one in ordered if one.point.load_number >= middle]
        chosen = [low[i * len(low) // min(MOST, len(low))] for i in range(min(MOST, len(low)))]
        found = adjust_preset(path, given, only=pattern(chosen), workers=None)
        print(f"{each['name']}: {found['points']} points fitted to, {len(high)} predicted", flush=True)
        for name, value in found["constants"].items():
            print(f"  {name} {found['before_constants'][name]:.4g} -> {value:.4g} +- {found['margins'][name]:.2g}")
        print(f"  share of the change taken: {found['share']}")
        print(f"  can't be told apart: {found['alike']}; hardly told: {found['flat']}", flush=True)
        with tempfile.TemporaryDirectory() as place:
            preset = Path(place) / "mine.yaml"
            preset.write_text(yaml.safe_dump(found["preset"]))
            for words, other in (("as it ships", {}), ("adjusted", {"engine": str(preset)})):
                results = validate_measured(path, {**given, **other}, only=pattern(high), workers=None)
                free, _ = by_limit(results["records"])
                errors = errors_of(free)
                shown = [
                    f"{measure} {errors[measure]['mape']:.2%} ({errors[measure]['bias']:+.2%})"
                    for measure in ("tpot", "ttft", "e2e")
                    if errors[measure]
                ]
                print(f"  {len(free)} of them not KV-limited, {words}: {', '.join(shown)}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("part", nargs="*", help="of a set's name")
    parser.add_argument("--engine", help="start from this preset instead of the set's own")
    asked = parser.parse_intermixed_args()
    main(asked.folder, asked.part, asked.engine)
