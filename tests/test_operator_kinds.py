"""A kind of operator is one object in each package: kinds defined here go all the way, and unknown ones raise."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest

import profiler.kinds
import simulator.predictor.kinds
from engine.errors import InputError
from engine.scheduling.request import BatchShape
from engine.specs import HostOverhead, ParallelSpec, catalog, device_folder
from profiler import operators, table
from profiler.importers import read_source
from profiler.kind import OfRows, Operator
from profiler.points import Limits, Point, message_points, points
from profiler.session import Part, Session
from profiler.timing import Timing
from simulator.predictor import calibration as store
from simulator.predictor import calibration_errors, calibration_fit
from simulator.predictor.attention import AttentionDecode
from simulator.predictor.kind import CLOCK_HZ, BatchModel, RowsModel
from simulator.predictor.learned import learned
from simulator.predictor.roofline import Roofline
from studies.calibration.kinds import PAGES, page_of

DEVICE = catalog.device("a100_pcie")
NETWORK = catalog.network("pairwise_nvlink")
MODEL = catalog.model("microsoft/phi-2")
LIMITS = Limits(max_tokens=256, max_requests=8, max_length=512, kv_tokens=4096)
HOST = HostOverhead(name="some", iteration_s=1e-3, sequence_s=1e-5, layer_s=1e-6, source="a test")
SLOW = HostOverhead(name="slow", iteration_s=0.0, sequence_s=0.0, layer_s=1.0, source="a test")
ONE_TOKEN, DECODES = BatchShape(1, 0, 0, ((1, 0),), 1, 0), BatchShape(8, 8, 4000, (), 8, 8)
PROMPTS = BatchShape(300, 0, 0, ((200, 0), (100, 400)), 1, 0)
FLOOR_S = 5e-6
EXPERT_MODULES = ["first", "second"]


# -- kinds that the project does not have --------------------------------------------------------------------------


@dataclass(frozen=True)
class Experts(OfRows):
    """Grouped GEMMs: each token goes to `top_k` of `num_experts`, the busiest of which gets `imbalance` its share."""

    kind: ClassVar[str] = "experts"
    columns: ClassVar[Mapping[str, Any]] = {
        **{"rows": "whole", "top_k": "whole", "num_experts": "whole", "k": "whole", "n": "whole"},
        "imbalance": "number",
    }
    share: ClassVar[float] = 2.0

    top_k: int = 0
    num_experts: int = 0
    k: int = 0
    n: int = 0

    def at(self, rows: Any, imbalance: float = 1.0) -> dict[str, Any]:
        work = {"top_k": self.top_k, "num_experts": self.num_experts, "k": self.k, "n": self.n}
        return {"rows": rows, **work, "imbalance": imbalance}

    def points(self, limits: Limits) -> Iterator[Point]:
        for point in super().points(limits):
            yield from (self.at(point["rows"], imbalance) for imbalance in (1.0, 1.5))

    @classmethod
    def calls(cls, bench: Any, point: Point) -> list[Any]:
        return bench.in_turns(EXPERT_MODULES, lambda module, x: module, int(point["rows"]), int(point["k"]))  # type: ignore[no-any-return]


def expert_bytes(columns: Mapping[str, Any]) -> Any:
    """Weights of the experts that are reached, in 16 bits."""
    reached = np.minimum(columns["num_experts"], np.asarray(columns["rows"]) * columns["top_k"])
    return 2.0 * reached * columns["k"] * columns["n"] * np.asarray(columns["imbalance"], float)


class ExpertsModel(RowsModel[Experts]):
    kind = "experts"
    columns = ("rows", "top_k", "num_experts", "k", "n", "imbalance")

    @classmethod
    def groups(cls, rows: pd.DataFrame) -> pd.Series:
        return rows["rows"].astype(str)

    @classmethod
    def launch_floor(cls, op: Experts, site: Any) -> float:
        return FLOOR_S

    @classmethod
    def data_sheet(cls, op: Experts, site: Any, rows: Any) -> Any:
        return op.count * expert_bytes(op.at(rows)) / site.bandwidth

    def fit(self, frame: pd.DataFrame) -> "ExpertsModel":
        bytes_ = expert_bytes({name: frame[name].to_numpy(float) for name in self.columns})
        self.per_byte_ = float(np.median(frame["time_ms"].to_numpy(float) / 1e3 / bytes_))
        self.range_ = [int(frame["rows"].min()), int(frame["rows"].max())]
        return self

    def seconds(self, columns: Mapping[str, Any]) -> Any:
        return self.per_byte_ * expert_bytes({name: np.asarray(columns[name], float) for name in self.columns})

    def in_range(self, columns: Mapping[str, Any]) -> Any:
        return (columns["rows"] >= self.range_[0]) & (columns["rows"] <= self.range_[1])

    def to_json(self) -> dict[str, Any]:
        return {"per_byte": self.per_byte_, "range": self.range_}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], device: Any) -> "ExpertsModel":
        model = cls(device)
        model.per_byte_, model.range_ = data["per_byte"], data["range"]
        return model


@dataclass(frozen=True)
class Ragged(Operator):
    """One kernel over all prompts of a batch, as long as its longest prompt takes."""

    kind: ClassVar[str] = "ragged"
    columns: ClassVar[Mapping[str, Any]] = {"chunk": "whole"}

    def points(self, limits: Limits) -> Iterator[Point]:
        yield {"chunk": limits.max_tokens}


class RaggedModel(BatchModel[Ragged]):
    kind = "ragged"
    columns = ("chunk",)

    @classmethod
    def data_sheet(cls, op: Ragged, site: Any, shape: BatchShape) -> float:
        return op.count * 1e-6 * max((chunk + prefix for chunk, prefix in shape.prefills), default=0)


EXPERTS = Experts("moe_experts", 32, top_k=2, num_experts=8, k=1024, n=2048)
KNOWN = operators.inventory


def measure(point: Point) -> Timing:
    """A law without noise: experts attain 80 % of the bandwidth; of other kinds the time hardly matters."""
    if point["kind"] == "experts":
        return Timing(float(expert_bytes(point)) / (0.8 * DEVICE.memory_bandwidth), 0.0, 10)
    sizes = [float(value) for name, value in point.items() if isinstance(value, int) and "head" not in name]
    return Timing(5e-6 + 1e-12 * float(np.prod(sizes)), 0.0, 10)


def emitted(monkeypatch: pytest.MonkeyPatch, *more: Operator) -> None:
    """Have the inventory contain some more operators, wherever it is asked for."""
    for module in ("profiler.points", "simulator.predictor.roofline", "simulator.predictor.tables"):
        monkeypatch.setattr(f"{module}.inventory", lambda *arguments: (*KNOWN(*arguments), *more))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(device_folder, "CALIBRATIONS", tmp_path / "calibration_data")
    monkeypatch.setenv("WINDTUNNEL_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "calibration_data" / DEVICE.name


@pytest.fixture
def experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The project with one more kind."""
    monkeypatch.setitem(profiler.kinds.KINDS, "experts", Experts)
    monkeypatch.setitem(simulator.predictor.kinds.KINDS, "experts", ExpertsModel)
    emitted(monkeypatch, EXPERTS)


def measured(folder: Path) -> pd.DataFrame:
    """The table of a whole session, read again."""
    provenance = {
        "device": DEVICE.name, "dtype": "bfloat16", "attention_backend": "law", "collectives": "law",
        "software": "none", "date": "2026-01-01", "source": "a law", "device_spec": {},
    }  # fmt: skip
    session = Session(folder, {"dtype": "bfloat16", "models": [], "shapes": []}, provenance)
    every = list(points(MODEL, 1, LIMITS))
    session.run([Part("operators", every, lambda: measure)], 1e6, lambda part, samples, left: None)
    session.finish()
    return read_source("profile", folder)


def gpu_time(predictor: Roofline | Any, shape: BatchShape) -> float:
    return float(predictor.stage_time(shape, 0))


# -- a new kind goes all the way -----------------------------------------------------------------------------------


def test_every_kind_has_one_object_in_each_package_by_the_same_name() -> None:
    names = {kind: each.__name__ for kind, each in profiler.kinds.KINDS.items()}
    assert {kind: each.__name__ for kind, each in simulator.predictor.kinds.KINDS.items()} == names
    assert set(PAGES) == set(names)
    assert set(table.needs()) == {*names, "host"}


@pytest.mark.usefixtures("experts")
def test_a_new_kind_is_profiled_at_its_points() -> None:
    every = list(points(MODEL, 1, LIMITS))
    mine = [point for point in every if point["kind"] == "experts"]
    assert {point["operator"] for point in mine} == {"moe_experts"}
    assert {point["imbalance"] for point in mine} == {1.0, 1.5}
    assert max(int(point["rows"]) for point in mine) == LIMITS.max_tokens
    norms = [point for point in every if point["operator"] == "final_norm"]
    assert every.index(mine[3]) < every.index(norms[2])  # two for each one of an elementwise operator
    asked = []

    class Bench:
        def in_turns(self, modules: Any, run: Any, rows: int, width: int) -> list[Any]:
            asked.append((rows, width))
            return modules  # type: ignore[no-any-return]

    assert profiler.kinds.KINDS[str(mine[0]["kind"])].calls(Bench(), mine[0]) == EXPERT_MODULES  # type: ignore[arg-type]
    assert asked == [(LIMITS.max_tokens, 1024)]
    assert EXPERTS.batch(mine[0], 100) == (0, [(100, 0), (100, 0), (56, 0)])
    assert EXPERTS.size(mine[0]) == EXPERTS.size_in(256, 0, [(100, 0), (100, 0), (56, 0)])


@pytest.mark.usefixtures("experts")
def test_a_new_kind_is_tabled_learned_and_predicted(cache: Path, tmp_path: Path) -> None:
    frame = measured(tmp_path / "profile")
    mine = frame[frame["kind"] == "experts"]
    assert set(mine["imbalance"]) == {1.0, 1.5} and mine["num_experts"].dtype == "Int64"
    assert frame[frame["kind"] != "experts"]["imbalance"].isna().all()
    with pytest.raises(InputError, match="column 'imbalance' is empty: a row of kind experts needs rows, top_k"):
        table.validate(frame.assign(imbalance=np.nan), "a table")

    store.save(calibration_fit.fit(DEVICE, [frame], on_progress=lambda line: None), cache)
    calibration = store.load(cache, DEVICE)
    record = calibration.records["experts"]
    assert record["held_out"]["mape"] == pytest.approx(0, abs=1e-9) and record["held_out"]["folds"] == 6
    assert calibration_errors.evaluate(calibration, [frame])["experts"]["in_range"] == 1.0

    predictor = learned(MODEL, DEVICE, NETWORK, ParallelSpec(), HOST)
    assert "data sheet" not in predictor.description
    assert predictor.limits.tokens == LIMITS.max_tokens
    model = calibration.models["experts"]
    half = calibration.models | {"experts": model.from_json({**model.to_json(), "range": [1, 100]}, DEVICE)}
    store.save(store.Calibration(DEVICE.name, half, calibration.records), cache)
    assert learned(MODEL, DEVICE, NETWORK, ParallelSpec(), HOST).limits.tokens == 100
    for shape in (ONE_TOKEN, DECODES, PROMPTS):
        law = 32 * float(expert_bytes(EXPERTS.at(shape.num_tokens))) / (0.8 * DEVICE.memory_bandwidth)
        times = []
        for names in (half, half.keys() - {"experts"}):
            with pytest.MonkeyPatch.context() as patch:
                emitted(patch, *([EXPERTS] if "experts" in names else []))
                times.append(gpu_time(learned(MODEL, DEVICE, NETWORK, ParallelSpec(), HOST), shape))
        assert times[0] - times[1] == pytest.approx(law, rel=1e-6)


@pytest.mark.usefixtures("experts")
def test_a_new_kind_that_was_not_measured_is_its_roofline_and_the_description_says_so(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = measured(tmp_path / "profile")
    fitted = calibration_fit.fit(DEVICE, [frame[frame["kind"] != "experts"]], on_progress=lambda line: None)
    store.save(fitted, cache)
    both: list[list[float]] = []
    for more in ([EXPERTS], []):
        emitted(monkeypatch, *more)
        found = learned(MODEL, DEVICE, NETWORK, ParallelSpec(), HOST)
        assert ("an estimate from the data sheet: experts" in found.description) == bool(more)
        assert found.in_range(DECODES) == (not more)
        both.append([gpu_time(found, shape) for shape in (ONE_TOKEN, DECODES)])
        estimate = Roofline(MODEL, DEVICE, NETWORK, ParallelSpec(), HOST)
        both[-1] += [gpu_time(estimate, shape) for shape in (ONE_TOKEN, DECODES)]
    bandwidth = DEVICE.memory_bandwidth * DEVICE.bandwidth_efficiency
    bytes_ = [float(expert_bytes(EXPERTS.at(shape.num_tokens))) for shape in (ONE_TOKEN, DECODES)]
    expected = [32 * (FLOOR_S + each / bandwidth) for each in bytes_]
    assert [more - less for more, less in zip(*both, strict=True)] == pytest.approx(expected * 2)
    assert expected[0] < expected[1]


def test_the_roofline_of_every_kind_has_its_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each run of an operator; the prompts of a batch are one run, and so are its decodes."""

    def times(shape: BatchShape) -> list[float]:
        predictor = Roofline(MODEL, DEVICE, NETWORK, ParallelSpec(), HOST)
        assert predictor.stage_times(shape, 0, 3) == pytest.approx(
            [predictor.stage_time(shape.after(i), 0) for i in range(3)]
        )
        return predictor.stage_times(shape, 0, 3)

    few, many = BatchShape(1, 1, 100, (), 1, 1), BatchShape(1, 1, 10_000_000, (), 1, 1)
    without = [times(few), times(many), times(PROMPTS)]
    usual = AttentionDecode.launch_s * CLOCK_HZ / DEVICE.clock_hz
    with monkeypatch.context() as patch:
        patch.setattr(AttentionDecode, "launch_floor", classmethod(lambda cls, op, site: 1e-3))
        assert times(PROMPTS) == pytest.approx(without[2])  # it has no decodes to launch
        assert times(few)[0] - without[0][0] == pytest.approx(32 * (1e-3 - usual))
        assert times(many)[0] - without[1][0] == pytest.approx(32 * (1e-3 - usual))
    for kind, runs in (("gemm", 4 * 32 + 1), ("attention_prefill", 32)):
        with monkeypatch.context() as patch:
            each = simulator.predictor.kinds.KINDS[kind]
            patch.setattr(each, "launch_floor", classmethod(lambda cls, op, site: 1.0))
            assert times(PROMPTS)[0] == pytest.approx(runs, rel=0.05)


@pytest.mark.parametrize("host", [HOST, SLOW], ids=lambda host: host.name)
def test_a_kind_of_whole_batches_is_asked_for_each(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: HostOverhead
) -> None:
    store.save(calibration_fit.fit(DEVICE, [measured(tmp_path / "profile")], on_progress=lambda line: None), cache)
    makers = [lambda: Roofline(MODEL, DEVICE, NETWORK, ParallelSpec(), host),
              lambda: learned(MODEL, DEVICE, NETWORK, ParallelSpec(), host)]  # fmt: skip
    plain = [[maker().stage_times(shape, 0, 5) for shape in (PROMPTS, DECODES)] for maker in makers]
    monkeypatch.setitem(profiler.kinds.KINDS, "ragged", Ragged)
    monkeypatch.setitem(simulator.predictor.kinds.KINDS, "ragged", RaggedModel)
    emitted(monkeypatch, Ragged("ragged", 32))
    for maker, (prompts, decodes) in zip(makers, plain, strict=True):
        predictor = maker()
        added = [32e-6 * max(200 + 200 * i, 500 + 100 * i) for i in range(5)]  # each grows by its chunk
        found = predictor.stage_times(PROMPTS, 0, 5)
        launched = host.times(32, len(PROMPTS.prefills), 1, 0)
        expected = [
            max(launched[0] + launched[1], time + more) if host is HOST else time
            for time, more in zip(prompts, added, strict=True)
        ]
        assert found == pytest.approx(expected)
        assert found == [predictor.stage_time(PROMPTS.after(i), 0) for i in range(5)]
        assert predictor.stage_times(DECODES, 0, 5) == pytest.approx(decodes)  # nothing to do


# -- what nobody knows raises --------------------------------------------------------------------------------------


def test_an_unknown_kind_in_an_inventory_raises(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save(calibration_fit.fit(DEVICE, [measured(tmp_path / "profile")], on_progress=lambda line: None), cache)
    emitted(monkeypatch, EXPERTS)
    known = "all_gather, all_reduce, all_to_all, attention_decode, attention_prefill, elementwise, gemm, moe, .*, send"
    with pytest.raises(LookupError, match=f"'moe_experts' is of kind 'experts', which profiler.kinds lacks.*{known}"):
        list(points(MODEL, 1, LIMITS))
    for maker in (Roofline, learned):
        with pytest.raises(LookupError, match=f"'experts', which simulator.predictor.kinds lacks.*{known}"):
            maker(MODEL, DEVICE, NETWORK, ParallelSpec(), HOST)
    with pytest.raises(LookupError, match=r"'experts': enter it in studies\.calibration\.kinds\.PAGES"):
        page_of("experts")


def test_an_unknown_kind_in_measured_data_raises(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = measured(tmp_path / "profile")
    foreign = frame.assign(kind=frame["kind"].replace("gemm", "gemms"))
    with pytest.raises(InputError, match=r"unknown kind in a table row 0 'gemms': did you mean 'gemm'\?"):
        table.validate(foreign[foreign["kind"] == "gemms"].reset_index(drop=True), "a table")
    told = "unknown kind of operator in the tables to {} 'gemms': did you mean 'gemm'"
    for learn in (calibration_fit.learn, calibration_fit.fit):
        with pytest.raises(InputError, match=told.format("learn from")):
            learn(DEVICE, [frame, foreign])
    calibration = calibration_fit.fit(DEVICE, [frame], on_progress=lambda line: None)
    with pytest.raises(InputError, match=told.format("compare with")):
        calibration_errors.evaluate(calibration, [foreign])
    store.save(calibration, cache)
    (cache / "experts.json").write_text("{}")
    with pytest.raises(InputError, match=rf"unknown kind of operator in {cache} 'experts': .*known are all_gather"):
        store.load(cache, DEVICE)


def test_kinds_that_disagree_about_a_column_and_estimators_of_nothing_are_defects(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(profiler.kinds.KINDS, "experts", Experts)
    assert table.columns()["imbalance"] == "number"
    monkeypatch.setattr(Experts, "columns", {"m": "text"})
    with pytest.raises(ValueError, match="kind 'experts' has a column 'm' of text"):
        table.columns()
    monkeypatch.setitem(simulator.predictor.kinds.KINDS, "experts", object)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="object derives from none of the models"):
        simulator.predictor.kinds.sort_out([EXPERTS])


def test_messages_are_measured_over_the_ranks_that_they_have() -> None:
    assert [{point["kind"] for point in message_points(MODEL, ranks, LIMITS)} for ranks in (2, 4)] == [
        {"all_reduce", "send"},
        {"all_reduce"},
    ]
    sizes = [int(point["num_bytes"]) for point in message_points(MODEL, 4, LIMITS)]
    assert max(sizes) == LIMITS.max_tokens * MODEL.hidden_size * MODEL.activation_itemsize
    assert len(sizes) == 2 * ceil(np.log2(LIMITS.max_tokens))
