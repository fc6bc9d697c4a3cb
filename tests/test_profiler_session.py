"""A profiling session: what it measures first, what it leaves behind, how it goes on, and the loop that it closes."""

import json
import zlib
from collections import deque
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import InputError
from engine.replica_spec import resolve
from engine.runtime.executor import RankTime, Result, Step
from engine.specs import ParallelSpec, SchedulerSpec, catalog
from engine.specs.device_folder import measured_host
from engine.workload.workload import WorkloadSpec, make_workload
from profiler import table
from profiler.importers import read_source
from profiler.iterations import bursts, run_burst, shape_of
from profiler.operators import inventory
from profiler.points import Limits, Point, farthest_first, message_points, points
from profiler.session import Bursts, Measure, Part, Session, model_record
from profiler.timing import Timing
from simulator.cluster import deploy
from simulator.predictor import calibration as store
from simulator.predictor import calibration_fit
from simulator.predictor.check import check_iterations
from studies.validation.compare import compare, run_pair

MODEL = replace(catalog.model("Meta-Llama-3-8B"), num_layers=4)
DEVICE = catalog.device("h100")
LIMITS = Limits(max_tokens=1024, max_requests=32, max_length=2048, kv_tokens=32768)
HOST_S, SEQUENCE_S = 300e-6, 8e-6


def law(point: Point) -> float:
    """Seconds of an operator on a device that doesn't exist."""
    kind, size = point["kind"], {name: int(value) for name, value in point.items() if isinstance(value, int)}
    flops, traffic = 0.0, 0.0
    if kind == "gemm":
        m, k, n = size["m"], size["k"], size["n"]
        flops, traffic = 2 * m * k * n, 2 * (m * k + k * n + m * n)
    elif kind == "elementwise":
        traffic = size["rows"] * size["bytes_per_row"]
    else:
        heads, kv, dim = size["num_heads"], size["num_kv_heads"], size["head_dim"]
        if kind == "attention_prefill":
            chunk, prefix = size["chunk"], size["prefix"]
            flops = 4 * heads * dim * (chunk * prefix + chunk * (chunk + 1) / 2)
            traffic = 4 * dim * (chunk * heads + (chunk + prefix) * kv)
        else:
            traffic = 4 * dim * (size["batch_size"] * heads + size["kv_tokens"] * kv)
    return 4e-6 + flops / (0.6 * DEVICE.peak_flops) + traffic / (0.8 * DEVICE.memory_bandwidth)


def law_of_batch(step: Step) -> float:
    """Seconds of the ranks' work on a batch, by the same law."""
    decodes, total = step.num_decodes, 0.0
    lengths = step.starts + step.chunks
    for op in inventory(MODEL, ParallelSpec(), 0):
        rows = len(step.tokens) if op.rows == "tokens" else len(step.sampled)
        if op.kind == "gemm" and rows:
            total += op.count * law({"kind": op.kind, "m": rows, "k": op.k, "n": op.n})
        elif op.kind == "elementwise" and rows:
            total += op.count * law({"kind": op.kind, "rows": rows, "bytes_per_row": op.bytes_per_row})
        elif op.kind == "attention_decode" and decodes:
            kv_tokens = int(lengths[:decodes].sum())
            total += op.count * law({"kind": op.kind, "batch_size": decodes, "kv_tokens": kv_tokens, **op.heads})
        elif op.kind == "attention_prefill":
            for chunk, prefix in zip(step.chunks[decodes:], step.starts[decodes:], strict=True):
                total += op.count * law({"kind": op.kind, "chunk": int(chunk), "prefix": int(prefix), **op.heads})
    return total


def measure(point: Point) -> Timing:
    """The law with one per cent of noise, the same at each asking."""
    seed = zlib.crc32(json.dumps(point, sort_keys=True).encode())
    seconds = law(point) * float(np.random.default_rng(seed).normal(1, 0.01))
    return Timing(seconds, seconds / 100, 10)


class VirtualTime:
    def __init__(self) -> None:
        self.time = 50.0

    def now(self) -> float:
        return self.time

    def sleep_until(self, time: float) -> None:
        self.time = max(self.time, time)


class SyntheticWorkers:
    """An engine whose steps take the law's time, and 1 % of noise, on a virtual clock."""

    num_blocks = 2200
    hardware, attention_backend = "a device of the mind", "none"

    def __init__(self, clock: VirtualTime) -> None:
        self.clock = clock
        self.rng = np.random.default_rng(3)
        self.free = 0.0
        self.results: deque[Result] = deque()

    def launch(self, step: Step) -> None:
        host = HOST_S + SEQUENCE_S * len(step.rows)
        compute = law_of_batch(step) * float(self.rng.normal(1, 0.01))
        start = max(self.clock.now(), self.free) + host  # of which a batch that was formed ahead hides nothing here
        self.free = start + compute
        times = [RankTime(0, start, self.free)]
        self.results.append(Result(step.number, [1] * len(step.sampled), times))

    def wait(self, timeout: float | None) -> Result | None:
        self.clock.time = max(self.clock.time, self.results[0].times[0].end)
        return self.results.popleft()

    def close(self) -> None:
        pass


def scheduler_spec() -> SchedulerSpec:
    return SchedulerSpec(max_num_batched_tokens=512, max_num_seqs=32, max_model_len=2048)


def parts(measure: Measure = measure) -> list[Part | Bursts]:
    clock = VirtualTime()
    workers = SyntheticWorkers(clock)
    replica = resolve(MODEL, DEVICE, scheduler=scheduler_spec())

    def burst(count: int, prompt: int) -> list[dict[str, Any]]:
        rows = run_burst(count, prompt, replica, workers, clock=clock)
        return [{"model": MODEL.name} | row for row in rows]

    every = list(points(MODEL, 1, LIMITS))
    return [Part("operators", every, lambda: measure), Bursts("iterations", bursts(LIMITS)[:12], lambda: burst)]


def session(folder: Path, **identity: Any) -> Session:
    provenance = {
        "device": DEVICE.name, "device_spec": asdict(DEVICE), "dtype": "bfloat16", "attention_backend": "none",
        "collectives": "none", "software": "none", "date": "2026-01-01", "source": "a law",
    }  # fmt: skip
    models = {"models": [MODEL.name], "shapes": [model_record(MODEL)], "dtype": MODEL.dtype}
    return Session(folder, {**models, **identity}, provenance)


def run(folder: Path, parts: list[Part | Bursts], budget_s: float = 1e6) -> Session:
    found = session(folder)
    found.run(parts, budget_s, lambda part, samples, left: None)
    found.finish()
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished session."""
    folder = tmp_path_factory.mktemp("session") / "whole"
    run(folder, parts())
    return folder


def test_farthest_first_spans_the_range_with_any_number_of_points() -> None:
    order = farthest_first([(size,) for size in range(1, 1001)])
    assert sorted(order) == [(size,) for size in range(1, 1001)]
    assert {order[0], order[1]} == {(1,), (1000,)}
    for count in (5, 9, 17):
        logs = np.sort(np.log2([size + 1 for (size,) in order[:count]]))
        assert np.diff(logs).max() <= 2.1 * np.log2(1001 / 2) / (count - 1)


def test_every_operator_of_the_inventory_has_points_early_and_within_the_limits() -> None:
    every = list(points(MODEL, 2, LIMITS))
    names = {op.name for op in inventory(MODEL, ParallelSpec(tensor_parallel_size=2), 0)
             if op.kind not in ("all_reduce", "send")}  # fmt: skip
    assert {point["operator"] for point in every[: 3 * len(names)]} == names
    for point in every:
        assert int(point.get("m", 1)) <= LIMITS.max_tokens
        assert int(point.get("chunk", 0)) + int(point.get("prefix", 0)) <= LIMITS.max_length
        assert int(point.get("kv_tokens", 0)) <= LIMITS.kv_tokens
    assert len({json.dumps(point, sort_keys=True) for point in every}) == len(every)
    sizes = {int(point["num_bytes"]) for point in message_points(MODEL, 2, LIMITS)}
    assert max(sizes) == LIMITS.max_tokens * MODEL.hidden_size * MODEL.activation_itemsize


def test_a_session_leaves_valid_tables(whole: Path) -> None:
    frame = table.read(whole / "operators.csv")
    assert (frame["device"] == DEVICE.name).all()
    assert set(frame["kind"]) == {"gemm", "elementwise", "attention_prefill", "attention_decode", "host"}
    host = frame[frame["operator"] == "iteration_overhead"].set_index("batch_size")["time_ms"]
    for sequences in (1, 8, 32):
        assert host[sequences] == pytest.approx(1e3 * (HOST_S + SEQUENCE_S * sequences), rel=1e-6)
    assert not list(whole.glob("*.part"))


def test_a_session_killed_half_way_goes_on_to_the_same_tables(whole: Path, tmp_path: Path) -> None:
    for kill_at in (3, 200):
        folder = tmp_path / str(kill_at)
        calls = 0

        def dying(point: Point) -> Timing:
            nonlocal calls
            calls += 1
            if calls == kill_at:  # noqa: B023
                raise KeyboardInterrupt
            return measure(point)

        with pytest.raises(KeyboardInterrupt):
            run(folder, parts(dying))
        assert len((folder / "samples.jsonl").read_text().splitlines()) == kill_at - 1
        assert not (folder / "operators.csv").exists()
        with (folder / "samples.jsonl").open("a") as file:
            file.write('{"point": {"oper')  # as a kill in the middle of a line leaves it
        run(folder, parts())
        assert (folder / "operators.csv").read_text().splitlines()[:300] == (
            (whole / "operators.csv").read_text().splitlines()[:300]
        )


def test_a_point_that_cannot_be_measured_is_passed_over_and_not_asked_again(tmp_path: Path) -> None:
    asked: list[Point] = []

    def failing(point: Point) -> Timing:
        asked.append(point)
        if point["operator"] == "lm_head":
            raise RuntimeError("out of memory")
        return measure(point)

    def too_large() -> Measure:
        raise InputError("the model does not fit")

    first = list(points(MODEL, 1, LIMITS))[:60]
    every = [Part("a", first, lambda: failing), Part("b", list(points(MODEL, 2, LIMITS))[:5], too_large)]
    found = run(tmp_path / "some", every)
    assert found.failures == ["b: the model does not fit"]
    failed = [sample for sample in found.samples if "failed" in sample]
    assert {sample["point"]["operator"] for sample in failed} == {"lm_head"}
    frame = table.read(tmp_path / "some" / "operators.csv")
    assert "lm_head" not in set(frame["operator"]) and "qkv_proj" in set(frame["operator"])
    count = len(asked)
    run(tmp_path / "some", every)
    assert len(asked) == count


def test_any_budget_gives_a_usable_table(tmp_path: Path) -> None:
    found = session(tmp_path / "short")
    some = parts()
    assert isinstance(some[0], Part)
    short = replace(some[0], points=some[0].points[:60])
    found.run([short], 1e6, lambda part, samples, left: None)
    found.finish()
    models = calibration_fit.learn(DEVICE, [read_source("profile", tmp_path / "short")])
    assert set(models) == {"gemm", "elementwise", "attention_prefill", "attention_decode"}
    none_left = session(tmp_path / "none")
    none_left.run(some, 0.0, lambda part, samples, left: None)
    with pytest.raises(InputError, match="raise --budget"):
        none_left.finish()


def test_points_that_models_share_are_measured_once(tmp_path: Path) -> None:
    asked: list[Point] = []

    def noting(point: Point) -> Timing:
        asked.append(point)
        return measure(point)

    first = list(points(MODEL, 1, LIMITS))[:40]
    second = [{**point, "model": "its twin"} for point in first]
    run(tmp_path / "twins", [Part("a", first, lambda: noting), Part("b", second, lambda: noting)])
    assert len(asked) == 40


def test_another_session_or_folder_is_left_alone(whole: Path, tmp_path: Path) -> None:
    before = (whole / "samples.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"hardware None, not 'other'.*--output-dir"):
        session(whole, hardware="other")
    assert (whole / "samples.jsonl").read_bytes() == before
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty"):
        session(tmp_path)
    damaged = tmp_path / "damaged"
    session(damaged)
    (damaged / "samples.jsonl").write_text("{}}\n")
    with pytest.raises(InputError, match=r"samples\.jsonl line 1"):
        session(damaged)


def test_a_profile_of_another_device_is_refused(whole: Path) -> None:
    with pytest.raises(InputError, match="measured on h100_sxm, not on a40"):
        read_source("profile", whole, device="a40")


@pytest.fixture(scope="module")
def calibrated(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The calibration of the session."""
    folder = tmp_path_factory.mktemp("calibration") / "mine"
    fitted = calibration_fit.fit(DEVICE, [read_source("profile", whole)], on_progress=lambda line: None)
    store.save(fitted, folder, DEVICE)
    return folder


@pytest.fixture
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINDTUNNEL_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.usefixtures("_own_cache")
def test_the_loop_recovers_the_law(whole: Path, calibrated: Path) -> None:
    device = catalog.device(str(calibrated))
    assert replace(device, calibration=None) == DEVICE
    host = measured_host(device)
    assert host is not None
    assert host.iteration_s == pytest.approx(HOST_S, rel=0.02)
    assert host.sequence_s == pytest.approx(SEQUENCE_S, rel=0.05)
    (found,) = check_iterations(device, whole).values()
    assert found["count"] > 100
    assert found["mape"] < 0.03
    assert abs(found["bias"]) < 0.02


@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize("ahead", [False, True])
def test_the_simulator_agrees_with_the_engine_on_the_synthetic_device(
    calibrated: Path, tmp_path: Path, ahead: bool
) -> None:
    clock = VirtualTime()
    workers = SyntheticWorkers(clock)
    deployment = deploy(
        MODEL, str(calibrated), scheduler=scheduler_spec(), num_gpu_blocks_override=workers.num_blocks,
        async_scheduling=ahead,
    )  # fmt: skip
    assert deployment.predictor.description.startswith("calibrated on measurements of h100")
    spec = WorkloadSpec(lengths="uniform", input_len="100:1000", output_len="20:200", request_rate=60, num_prompts=150)
    workload = make_workload(spec)
    folder = None if ahead else tmp_path / "pair"  # in memory or on disk
    pair = run_pair(workload, deployment, workers, folder, clock=clock)
    found = compare(pair, deployment, workload)
    assert found["replay"]["same"]
    assert found["iterations"]["mape"] < 0.03
    for metric in ("ttft", "tbt", "e2e"):
        for statistic in ("p50", "p99"):
            assert abs(found["latencies"][metric][statistic]["error"]) < 0.06, (metric, statistic)
    assert found["latencies"]["e2e"]["pearson_r"] > 0.99
    assert abs(found["throughput"]["output_throughput"]["error"]) < 0.02


def test_a_row_of_the_iterations_is_its_batch() -> None:
    row: dict[str, Any] = {"num_tokens": "70", "num_decodes": "6", "decode_kv_tokens": "900",
                           "prefills": "40@0 24@128", "num_sampled": "7"}  # fmt: skip
    shape = shape_of(row)
    assert (shape.num_tokens, shape.prefills, shape.num_sampled) == (70, ((40, 0), (24, 128)), 7)
