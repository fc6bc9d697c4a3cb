"""docs/truth.md says what its record says, the record what is predicted today; errors where the public files are."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from engine.workload.workload import WorkloadSpec
from studies.measured.judge import summary
from studies.measured.point import Point
from studies.measured.truth import SETS, render
from windtunnel.measured import job_of, predict_points, read_points
from windtunnel.truth import judged_rows

ROOT = Path(__file__).parents[1]
PUBLIC = ROOT.parent / "shared" / "data" / "truth"
RECORD: dict[str, Any] = json.loads((ROOT / "docs" / "truth.json").read_text(encoding="utf-8"))


def test_the_page_is_that_of_its_record() -> None:
    assert (ROOT / "docs" / "truth.md").read_text(encoding="utf-8") == render(RECORD)


def test_the_record_has_every_set_and_no_measured_value() -> None:
    assert [each["name"] for each in RECORD["sets"]] == [each["name"] for each in SETS]
    for each in RECORD["sets"]:
        assert each["points"]
        for point in each["points"]:
            assert set(point) <= {"id", "settings", "workload", "statistic", "predicted"}


@pytest.mark.parametrize(("number", "place"), [(0, 0), (0, 31), (1, 5), (5, 40)])
def test_what_is_predicted_today_is_what_the_record_says(number: int, place: int) -> None:
    kept = RECORD["sets"][number]["points"][place]
    assert set(kept["workload"]) <= {each.name for each in fields(WorkloadSpec)}
    workload = WorkloadSpec(**kept["workload"])
    statistic = kept.get("statistic", "mean")
    point = Point(id=kept["id"], settings=kept["settings"], workload=workload, measured={}, statistic=statistic)
    (found,) = predict_points([job_of(point)])
    assert found is not None
    for name in ("tpot", "ttft") if statistic == "mean" else ("e2e",):
        if name in kept["predicted"]:
            assert found["predicted"][name] == pytest.approx(kept["predicted"][name], rel=1e-3)


@pytest.mark.skipif(not PUBLIC.is_dir(), reason="the public measurements are not here")
@pytest.mark.parametrize("number", [2, 3])
def test_the_errors_are_those_of_the_public_files(number: int) -> None:
    each, kept = SETS[number], RECORD["sets"][number]
    _, ready, _ = read_points(PUBLIC / each["file"], each.get("given", {}), only=each.get("only"))
    records = [record for record in predict_points(ready) if record is not None]
    found = judged_rows(each, records)
    assert [row["points"] for row in found] == [row["points"] for row in kept["rows"]]
    for ours, theirs in zip(found, kept["rows"], strict=True):
        for measure, error in theirs["errors"].items():
            assert ours["errors"][measure]["mape"] == pytest.approx(error["mape"], rel=0.02, abs=2e-4)
    assert summary(records, len(ready))["predicted"] == len(ready)


@pytest.mark.skipif(not PUBLIC.is_dir(), reason="the public measurements are not here")
def test_a_row_of_aggregates_is_predicted_as_the_record_says() -> None:
    each, kept = SETS[4], RECORD["sets"][4]["points"]
    _, ready, _ = read_points(PUBLIC / each["file"], each.get("given", {}), only=each.get("only"))
    assert [each.point.id for each in ready] == [point["id"] for point in kept]
    (found,) = predict_points(ready[:1])
    assert found is not None
    assert {name: found["predicted"][name] for name in kept[0]["predicted"]} == pytest.approx(
        kept[0]["predicted"], rel=1e-3
    )
