"""A device with a known law through the whole of it: tables, fit, files, look-up tables, a simulation."""

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from engine.errors import InputError
from engine.scheduling.request import BatchShape
from engine.specs import HostOverhead, ParallelSpec, SchedulerSpec, catalog, device_folder
from engine.workload.workload import WorkloadSpec, make_workload
from profiler import table
from profiler.operators import inventory
from simulator.cluster import deploy, simulate
from simulator.predictor import calibration as store
from simulator.predictor import calibration_fit
from simulator.predictor.calibration_errors import held_out
from simulator.predictor.learned import learned
from simulator.predictor.tables import TableMaker

DEVICE = catalog.device("a100_pcie")
MODEL = catalog.model("microsoft/phi-2")
NO_HOST = HostOverhead(name="none", iteration_s=0.0, sequence_s=0.0, layer_s=0.0, source="a test")
NETWORK = catalog.network("pairwise_nvlink")
ONE_TOKEN = BatchShape(1, 0, 0, ((1, 0),), 1, 0)


def gemm_law(m, k, n):  # type: ignore[no-untyped-def]
    flops, traffic = 2 * m * k * n / DEVICE.peak_flops, 2 * (m * k + k * n + m * n) / DEVICE.memory_bandwidth
    return 4e-6 + np.maximum(flops / 0.7, traffic / 0.8)


@cache
def tables() -> pd.DataFrame:
    """Measurements of every kind, without noise, around the shapes of the model."""
    rng = np.random.default_rng(0)
    parts = []
    for tp in (1, 2, 4):
        for op in inventory(MODEL, ParallelSpec(tensor_parallel_size=tp), 0):
            if op.kind == "gemm":
                for i, f in enumerate((3, 4, 5)):
                    name, k, n = f"model{i}", op.k * f // 4, op.n * f // 4
                    m = np.unique(np.geomspace(1, 4096, 36).round())
                    seconds = gemm_law(m, k, n)
                    parts.append(
                        pd.DataFrame(
                            {
                                "operator": op.name,
                                "kind": "gemm",
                                "model": name,
                                "m": m,
                                "k": k,
                                "n": n,
                                "tensor_parallel_size": tp,
                                "time_ms": 1e3 * seconds,
                            }
                        )
                    )
    for i, name in enumerate(("embedding", "input_norm", "rotary", "mlp_activation", "mlp_residual_add")):
        rows = np.unique(np.geomspace(1, 4096, 36).round())
        for width in (5120, 10240):
            seconds = 2e-6 + rows * width / (DEVICE.memory_bandwidth * 0.7)
            parts.append(
                pd.DataFrame(
                    {
                        "operator": name,
                        "kind": "elementwise",
                        "model": f"model{i % 3}",
                        "rows": rows,
                        "bytes_per_row": width,
                        "time_ms": 1e3 * seconds,
                    }
                )
            )
    for heads, kv_heads in ((8, 8), (16, 16), (32, 32), (32, 8), (16, 4), (8, 2)):
        shared = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": 80}
        chunk, prefix = (grid.ravel() for grid in np.meshgrid(np.geomspace(16, 4096, 14).round(), [0, 512, 2048]))
        flops = 4.0 * heads * 80 * (chunk * prefix + chunk * (chunk + 1) / 2)
        seconds = 8e-6 + flops / (0.5 * DEVICE.peak_flops)
        parts.append(
            pd.DataFrame(
                {
                    "operator": "attention_prefill",
                    "kind": "attention_prefill",
                    "batch_size": 1,
                    "chunk": chunk,
                    "prefix": prefix,
                    **shared,
                    "time_ms": 1e3 * seconds,
                }
            )
        )
        batch, length = (
            g.ravel() for g in np.meshgrid([1, 2, 4, 8, 16, 32, 64, 128], np.geomspace(32, 4096, 12).round())
        )
        seconds = 8e-6 + 4.0 * batch * length * kv_heads * 80 / (0.8 * DEVICE.memory_bandwidth)
        parts.append(
            pd.DataFrame(
                {
                    "operator": "attention_decode",
                    "kind": "attention_decode",
                    "batch_size": batch,
                    "kv_tokens": batch * length,
                    **shared,
                    "time_ms": 1e3 * seconds,
                }
            )
        )
    size = np.unique(np.geomspace(2048, 1 << 26, 60).round())
    for kind, ranks in (("all_reduce", 2), ("all_reduce", 4), ("send", 2)):
        seconds = 2e-5 + size / 1e11
        parts.append(
            pd.DataFrame(
                {
                    "operator": kind,
                    "kind": kind,
                    "num_bytes": size,
                    "num_ranks": ranks,
                    "ranks_per_node": ranks,
                    "network": NETWORK.name,
                    "time_ms": 1e3 * seconds,
                }
            )
        )
    frame = pd.concat(parts, ignore_index=True)
    frame["time_ms"] *= np.exp(rng.normal(0, 0.005, len(frame)))
    frame = frame.assign(device=DEVICE.name, source="a law", backend="law", kernel="law", software="none", dtype="bf16")
    return table.validate(frame, "the synthetic device")


@pytest.fixture(scope="module")
def calibration() -> store.Calibration:
    return calibration_fit.fit(DEVICE, [tables()], on_progress=lambda line: None)


@pytest.fixture
def shipped(calibration: store.Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The calibration where a shipped one would be, and a cache of its own."""
    store.save(calibration, tmp_path / "calibration_data" / DEVICE.name)
    monkeypatch.setattr(device_folder, "CALIBRATIONS", tmp_path / "calibration_data")
    monkeypatch.setenv("WINDTUNNEL_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "calibration_data" / DEVICE.name


def test_held_out_errors_and_intervals_are_honest(calibration: store.Calibration) -> None:
    for kind, record in calibration.records.items():
        held_out, interval = record["held_out"], record["interval"]
        assert held_out["folds"] > 1
        assert held_out["count"] == record["provenance"]["rows"]
        assert held_out["mape"] < 0.12, kind
        assert held_out["p50"] <= held_out["p95"]
        assert 0.75 <= interval["covers"] <= 0.99, kind
        low, high = calibration.interval(kind, 1e-4)
        assert low < high
    gemm = calibration.records["gemm"]
    assert gemm["held_out"]["groups_over_20us"]["count"] == 3
    assert gemm["held_out_new_shapes"]["count"] == gemm["held_out"]["count"]  # of models, whose shapes others may have
    assert 0 < gemm["held_out_new_shapes"]["mape"] < 0.12


def test_what_is_saved_loads_the_same_and_again_gives_the_same_files(
    calibration: store.Calibration, tmp_path: Path
) -> None:
    store.save(calibration, tmp_path / "a")
    loaded = store.load(tmp_path / "a", DEVICE)
    store.save(loaded, tmp_path / "b")
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    again = calibration_fit.learn(DEVICE, [tables()])  # its errors are of the same fits, with rows left out
    assert {kind: model.to_json() for kind, model in again.items()} == {
        kind: model.to_json() for kind, model in calibration.models.items()
    }


def test_a_batch_takes_the_sum_of_its_operators(shipped: Path) -> None:
    predictor = learned(MODEL, DEVICE, NETWORK, ParallelSpec(), NO_HOST)
    shape = BatchShape(544, 32, 32 * 1000, ((512, 1024),), 33, 32)
    law = 0.0
    for op in inventory(MODEL, ParallelSpec(), 0):
        if op.kind == "gemm":
            law += op.count * gemm_law(544 if op.rows == "tokens" else 33, op.k, op.n)
        elif op.kind == "elementwise":
            law += op.count * (2e-6 + 544 * op.bytes_per_row / (0.7 * DEVICE.memory_bandwidth))
    law += 32 * (8e-6 + 4.0 * 32 * 80 * (512 * 1024 + 512 * 513 / 2) / (0.5 * DEVICE.peak_flops))
    law += 32 * (8e-6 + 4.0 * 32_000 * 32 * 80 / (0.8 * DEVICE.memory_bandwidth))
    assert predictor.stage_time(shape, 0) == pytest.approx(law, rel=0.1)
    assert "calibrated on measurements of a100_pcie" in predictor.description


def test_more_work_never_takes_less_time(shipped: Path) -> None:
    predictor = learned(MODEL, DEVICE, NETWORK, ParallelSpec(pipeline_parallel_size=2), NO_HOST)
    for stage in (0, 1):
        by_tokens = [predictor.stage_time(BatchShape(n, 0, 0, ((n, 0),), 1, 0), stage) for n in range(1, 20000, 97)]
        by_kv = [predictor.stage_time(BatchShape(64, 64, kv, (), 64, 64), stage) for kv in range(64, 3_000_000, 9973)]
        by_prefix = [
            predictor.stage_time(BatchShape(256, 0, 0, ((256, p),), 0, 0), stage) for p in range(0, 90_000, 500)
        ]
        for times in (by_tokens, by_kv, by_prefix):
            assert (np.diff(times) >= 0).all()
            assert times[-1] > times[0]
        sends = [predictor.send_time(BatchShape(n, 0, 0, ((n, 0),), 1, 0), stage) for n in (1, 100, 16384, 40000)]
        assert sends == sorted(sends)
    assert sends == [0.0] * 4  # the last stage sends nothing


def test_repeats_are_the_single_steps(shipped: Path) -> None:
    predictor = learned(MODEL, DEVICE, NETWORK, ParallelSpec(), NO_HOST)
    for shape in (BatchShape(7, 7, 900, (), 7, 7), BatchShape(107, 7, 900, ((100, 50),), 7, 7)):
        steps = [predictor.stage_time(shape.after(i), 0) for i in range(200)]
        assert predictor.stage_times(shape, 0, 200) == steps


def test_the_measured_range_is_marked(shipped: Path) -> None:
    predictor = learned(MODEL, DEVICE, NETWORK, ParallelSpec(), NO_HOST)
    assert predictor.in_range(BatchShape(512, 0, 0, ((512, 0),), 1, 0))
    assert not predictor.in_range(BatchShape(5000, 0, 0, ((5000, 0),), 1, 0))  # GEMMs were measured to 4096 rows
    assert not predictor.in_range(BatchShape(8, 8, 10_000_000, (), 8, 8))


def test_a_change_of_one_number_in_the_data_changes_the_answer(shipped: Path) -> None:
    shape = BatchShape(100, 100, 50_000, (), 100, 100)
    before = learned(MODEL, DEVICE, NETWORK, ParallelSpec(), NO_HOST).stage_time(shape, 0)
    assert learned(MODEL, DEVICE, NETWORK, ParallelSpec(), NO_HOST).stage_time(shape, 0) == before
    cached = list((shipped.parents[1] / "cache").glob("*.npz"))
    assert len(cached) == 1
    data = json.loads((shipped / "gemm.json").read_text())
    for curve in data["model"].get("curves", []):
        curve["log_ratio"] = [ratio + 0.5 for ratio in curve["log_ratio"]]
    data["model"]["limits"][0][1] = 50.0  # beyond which the multiple of the roofline is held for other shapes
    (shipped / "gemm.json").write_text(json.dumps(data))
    assert learned(MODEL, DEVICE, NETWORK, ParallelSpec(), NO_HOST).stage_time(shape, 0) != before
    assert len(list((shipped.parents[1] / "cache").glob("*.npz"))) == 2


@pytest.mark.parametrize("broken", [b"", b"not a cache", b"PK\x03\x04 half a zip"])
def test_a_broken_cache_is_made_again(shipped: Path, broken: bytes) -> None:
    shape = BatchShape(100, 100, 50_000, (), 100, 100)
    before = learned(MODEL, DEVICE, NETWORK, ParallelSpec(), NO_HOST).stage_time(shape, 0)
    (path,) = (shipped.parents[1] / "cache").glob("*.npz")
    path.write_bytes(broken)
    assert learned(MODEL, DEVICE, NETWORK, ParallelSpec(), NO_HOST).stage_time(shape, 0) == before


def test_links_that_were_not_measured_are_estimated_and_said(shipped: Path) -> None:
    predictor = learned(MODEL, DEVICE, catalog.network("pcie"), ParallelSpec(tensor_parallel_size=4), NO_HOST)
    assert "an estimate from the data sheet: all reduce" in predictor.description


def test_simulate_takes_the_calibration_by_default(shipped: Path) -> None:
    replica = deploy("microsoft/phi-2", "a100", scheduler=SchedulerSpec(max_model_len=2048))
    run = simulate(make_workload(WorkloadSpec(request_rate=5, num_prompts=50, max_model_len=2048)), [replica])
    assert "calibrated" in run.summary["replicas"][0]["predictor"]
    assert "carried over from A100, H100" in deploy("microsoft/phi-2", "l4").predictor.description
    assert "roofline" in deploy("microsoft/phi-2", "cpu").predictor.description
    with pytest.raises(InputError, match="no calibration for device 'l4'"):
        deploy("microsoft/phi-2", "l4", predictor="learned")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda text: text[: len(text) // 2], "is no calibration"),
        (lambda text: text.replace('"model"', '"modell"'), "is no calibration"),
        (lambda text: text.replace('"a100_pcie"', '"a40"'), "is of a40, not of a100_pcie"),
    ],
)
def test_a_damaged_calibration_is_told(shipped: Path, damage, told: str) -> None:  # type: ignore[no-untyped-def]
    path = shipped / "gemm.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(InputError, match=told):
        store.load(shipped, DEVICE)


def test_sources_of_another_device_are_refused() -> None:
    frame = tables()
    with pytest.raises(InputError, match=r"no measurements of l4 .* they are of a100_pcie"):
        calibration_fit.fit(catalog.device("l4"), [frame[frame["kind"] == "gemm"]], on_progress=lambda line: None)


def test_attention_is_carried_over_and_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = tables()
    frame = frame[(frame["kind"] != "gemm") | (np.arange(len(frame)) % 8 == 0)]  # of no interest here
    other = frame[~frame["kind"].isin(["attention_prefill", "attention_decode"])].assign(device="a40")
    attention = frame[frame["kind"].isin(["attention_prefill", "attention_decode"])]
    calibration = calibration_fit.fit(catalog.device("a40"), [other, attention], on_progress=lambda line: None)
    assert calibration.records["attention_decode"]["learned_on"] == "a100_pcie"
    store.save(calibration, tmp_path / "a40")
    monkeypatch.setattr(device_folder, "CALIBRATIONS", tmp_path)
    monkeypatch.setenv("WINDTUNNEL_CACHE_DIR", str(tmp_path / "cache"))
    a40 = learned(MODEL, catalog.device("a40"), NETWORK, ParallelSpec(), NO_HOST)
    assert "attention carried over from a100_pcie" in a40.description
    long = BatchShape(1, 1, 1_000_000, (), 1, 1)
    least = 32 * 4 * 1_000_000 * 32 * 80 / catalog.device("a40").memory_bandwidth
    assert a40.stage_time(long, 0) > least  # it is the A40's bandwidth that counts


def test_the_tables_are_made_in_time_to_wait_for(shipped: Path) -> None:
    """No clock: the number of rows that the estimators are asked for stays a few thousand an operator."""
    asked = 0
    maker = TableMaker(store.load(shipped, DEVICE), MODEL, DEVICE, NETWORK, ParallelSpec())
    for model in maker.models.values():

        def counting(columns, seconds=model.seconds, first=model.columns[0]):  # type: ignore[no-untyped-def]
            nonlocal asked
            asked += len(columns[first])
            return seconds(columns)

        model.seconds = counting  # type: ignore[method-assign]
    maker.stage(0)
    assert 0 < asked < 30_000


def test_a_kind_of_one_row_is_too_few_to_measure_an_error_on() -> None:
    frame = tables()
    several = pd.concat([frame[frame["kind"] == "send"], frame[frame["kind"] == "all_reduce"].iloc[:1]])
    with pytest.raises(InputError, match=r"^all reduce: one row is too few .*--budget"):
        calibration_fit.fit(DEVICE, [several], on_progress=lambda line: None)


def test_models_of_the_same_shapes_have_no_error_on_new_ones() -> None:
    frame = tables()
    gemm = frame[(frame["kind"] == "gemm") & (frame["model"] == "model0") & (frame["tensor_parallel_size"] == 1)]
    twins = pd.concat([gemm, gemm.assign(model="its twin")], ignore_index=True)
    record = calibration_fit.fit(DEVICE, [twins], on_progress=lambda line: None).records["gemm"]
    assert record["held_out"]["count"] == len(twins) and "held_out_new_shapes" not in record


def test_a_group_that_nothing_predicts_is_left_out_of_the_errors() -> None:
    found = held_out(pd.Series(["a", "a", "b"]), np.array([0, 0, 1]), np.ones(3), np.array([np.nan, np.nan, 1.1]))
    assert found["count"] == 1 and found["groups_over_20us"]["each"] == {"b": pytest.approx(0.1)}


def test_the_command_line_fits_shows_and_evaluates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = Path(__file__).parents[2] / "shared" / "data" / "vidur" / "profiling"
    if not data.exists():
        pytest.skip("the public tables are not here")
    from cli.main import run

    compute = data / "compute" / "a40"
    some = tmp_path / "some" / "compute" / "a40"
    for path in (*(compute / "microsoft").rglob("*.csv"), compute / "meta-llama" / "Llama-2-7b-hf" / "mlp.csv"):
        (few := some / path.relative_to(compute)).parent.mkdir(parents=True, exist_ok=True)
        head, *lines = path.read_text().splitlines(keepends=True)
        few.write_text("".join([head, *lines[::8]]))
    arguments = [
        "calibrate",
        "evaluate",
        "--device",
        "a40",
        "--train",
        str(some / "microsoft"),
        str(some / "meta-llama"),
        "--test",
        str(compute / "meta-llama/Llama-2-70b-hf"),
    ]
    assert run([*arguments, "--json"]) == (0, "")
    operators = json.loads(capsys.readouterr().out.splitlines()[-1])["operators"]
    assert {"count", "mape", "p50", "p95", "bias"} <= set(operators["gemm"])
    assert operators["gemm"]["count"] > 1000
    assert operators["gemm"]["mape"] < 0.08
    shutil.copytree(some / "microsoft", tmp_path / "a40" / "microsoft")
    fit = [
        "calibrate",
        "fit",
        "--device",
        "a40",
        "--source",
        f"vidur:{tmp_path / 'a40'}",
        "--output-dir",
        str(tmp_path / "out"),
    ]
    assert run(fit) == (0, "")
    assert (tmp_path / "out" / "gemm.json").exists()
    assert run(["calibrate", "show", "--device", "l4"])[0] == 2
    assert run(["calibrate", "evaluate", "--device", "a40", "--test", str(tmp_path / "nowhere")])[0] == 2


def test_operators_run_as_one_are_their_parts_where_only_these_were_measured(
    calibration: store.Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a launch floor of 2 us each, two operators that became one take 2 us less in every layer."""
    frame = tables()
    frame = frame[frame["kind"] == "elementwise"]  # the others stay as they are
    whole = frame[frame["operator"] == "input_norm"]
    fused = [whole.assign(operator=name) for name in ("mlp_residual_norm", "rotary_kv_write")]
    learned_anew = calibration_fit.learn(DEVICE, [pd.concat([frame, *fused], ignore_index=True)])
    of_one = replace(calibration, models={**calibration.models, **learned_anew})
    monkeypatch.setattr(device_folder, "CALIBRATIONS", tmp_path)
    monkeypatch.setenv("WINDTUNNEL_CACHE_DIR", str(tmp_path / "cache"))
    times = []
    for each in (calibration, of_one):
        store.save(each, tmp_path / DEVICE.name)
        times.append(learned(MODEL, DEVICE, NETWORK, ParallelSpec(), NO_HOST).stage_time(ONE_TOKEN, 0))
        shutil.rmtree(tmp_path / DEVICE.name)
    layers = MODEL.num_layers
    assert times[0] - times[1] == pytest.approx(2e-6 * (layers + layers - 1), rel=0.1)
