"""What ships in calibration_data: it loads, is small, the pages about it are up to date, and it can be made again."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from engine.specs import ParallelSpec, catalog
from engine.specs.device_folder import CALIBRATIONS, known_devices
from profiler.importers import Selection, read_source
from simulator.cluster import deploy
from simulator.predictor import calibration as store
from simulator.predictor import calibration_errors, calibration_fit
from simulator.predictor.kinds import KINDS
from studies.calibration.accuracy import COLD_START, accuracy_markdown, shipped

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
DEVICES = ("a100_pcie", "a100_sxm", "a40")
OF_MIXTURES = {"moe", "all_gather", "reduce_scatter", "all_to_all"}  # that a calibration of dense models has not
BY_VERSION = {"h100_sxm": ("0.14", "0.19"), "h200_sxm": ("0.14", "0.19"), "l40s": ("0.14",)}


def test_these_devices_ship() -> None:
    assert tuple(known_devices()) == (*DEVICES, *BY_VERSION)
    for name, versions in BY_VERSION.items():
        found = sorted(path.name for path in (CALIBRATIONS / name).iterdir())
        assert found == [f"vllm@{version}" for version in versions]


@pytest.mark.parametrize("name", BY_VERSION)
def test_a_calibration_by_version_has_its_dtypes_and_small_errors(name: str) -> None:
    for version in BY_VERSION[name]:
        calibration = store.load(CALIBRATIONS / name, catalog.device(name), f"vllm@{version}")
        assert {"gemm", "gemm.fp8", "attention_decode", "attention_decode.kv_fp8", "all_reduce"} <= set(
            calibration.models
        )
        if name != "l40s":  # 0.14's products of 8 bits are twice as slow as 0.19's: they don't ship
            assert calibration.software["gemm.fp8"] == "vllm@0.19"
        for kind, record in calibration.records.items():
            assert record["held_out"]["mape"] < {"elementwise": 0.11, "moe": 0.1}.get(kind, 0.07), kind
            assert abs(record["held_out"]["bias"]) < 0.03, kind


@pytest.mark.parametrize("name", DEVICES)
def test_a_calibration_is_complete_and_small(name: str) -> None:
    calibration = store.load(CALIBRATIONS / name, catalog.device(name))
    assert set(calibration.models) | OF_MIXTURES == set(KINDS)
    assert sum(path.stat().st_size for path in (CALIBRATIONS / name).iterdir()) < 4_500_000
    for kind, record in calibration.records.items():
        assert record["provenance"]["sources"], kind
        assert record["held_out"]["count"] > 100
        assert 0.8 <= record["interval"]["covers"] <= 1.0


def test_the_accuracy_page_is_what_the_records_say() -> None:
    assert (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8") == accuracy_markdown(shipped())


def cold_start() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cold_start", ROOT / "benchmarks" / "cold_start.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their types up
    spec.loader.exec_module(module)
    return module


def test_estimates_are_by_the_constants_of_their_record_and_within_their_aims() -> None:
    record = json.loads(COLD_START.read_text(encoding="utf-8"))
    assert record["constants"] == cold_start().constants()
    aims = {"gemm": 0.15, "attention_prefill": 0.25, "attention_decode": 0.25}
    aims |= {"all_reduce vllm_graph": 0.3, "all_reduce nccl": 0.3}
    assert set(record["errors"]) == set(aims)
    for kind, errors in record["errors"].items():
        assert set(errors) | {"l40s"} == {"a100_sxm", "h100_sxm", "h200_sxm", "l40s"}
        assert all(error["mape"] <= aims[kind] for error in errors.values())


@pytest.mark.skipif(not DATA.exists(), reason="the public tables are not here")
def test_an_estimates_error_is_what_its_record_says() -> None:
    """Of all-reduces: the other kinds take minutes."""
    script, record = cold_start(), json.loads(COLD_START.read_text(encoding="utf-8"))
    read = {
        name: read_source("aiconfigurator", DATA / "aiconfigurator" / name / place, name, select=Selection(software))
        for name, place, software in (
            ("a100_sxm", "custom_allreduce_perf.parquet", ()),
            *((name, "comm/vllm/0.14.0", ()) for name in ("h100_sxm", "h200_sxm")),
        )
    }
    rows = {name: frame[frame["backend"] == "vllm_graph"] for name, frame in read.items()}
    for name, error in record["errors"]["all_reduce vllm_graph"].items():
        assert script.left_out("all_reduce", rows, name) == pytest.approx((error["mape"], error["bias"]), abs=2e-4)


@pytest.mark.parametrize(
    ("model", "device", "tp", "pp"),
    [
        ("mistralai/Mistral-7B-v0.1", "a100", 1, 1),
        ("01-ai/Yi-34B", "a100", 2, 1),
        ("meta-llama/Llama-2-70b-hf", "a40", 4, 2),
        ("tiiuae/falcon-180B", "a100", 4, 2),
        ("meta-llama/Llama-2-70b-hf", "a100_sxm", 4, 1),
    ],
)
def test_published_deployments_run_on_calibrated_times(model: str, device: str, tp: int, pp: int) -> None:
    from engine.scheduling.request import BatchShape
    from engine.specs.memory import weight_bytes

    parallel = ParallelSpec(tensor_parallel_size=tp, pipeline_parallel_size=pp)
    replica = deploy(model, device, parallel=parallel)
    assert "calibrated on measurements" in replica.predictor.description
    decode = BatchShape(32, 32, 32 * 1024, (), 32, 32)
    for stage in range(pp):
        seconds = replica.predictor.stage_time(decode, stage)
        least = 0.95 * weight_bytes(replica.model, parallel, stage) / replica.device.memory_bandwidth  # no embedding
        assert least < seconds < 6 * least


def test_a_chunk_after_a_prefix_costs_the_newer_kernel_no_more_than_it_cost_the_older() -> None:
    """The newer kernel was measured on whole prompts alone; what a prefix adds is known of the older one."""
    model = store.load(CALIBRATIONS / "a100_pcie", catalog.device("a100_pcie")).models["attention_prefill"]
    chunk, prefix = np.array([128.0, 512.0, 128.0, 512.0]), np.array([3584.0, 3584.0, 1024.0, 1024.0])
    columns = {"batch_size": np.ones(4), "chunk": chunk, "num_heads": np.full(4, 8), "num_kv_heads": np.ones(4)}
    columns["head_dim"] = np.full(4, 128)
    after, alone = (model.seconds({**columns, "prefix": prefix * share}) for share in (1, 0))
    assert (after >= alone).all()
    assert (after < 150e-6).all()


def test_an_h200s_prompts_take_what_an_h100s_do_and_never_less_than_the_arithmetic() -> None:
    """Its own table of vLLM 0.19 has times 260 times shorter than that."""
    chunk = np.array([512.0, 4096.0, 16384.0])
    columns = {"batch_size": np.ones(3), "chunk": chunk, "prefix": np.zeros(3), "head_dim": np.full(3, 128.0)}
    columns |= {"num_heads": np.full(3, 64.0), "num_kv_heads": np.full(3, 8.0)}
    both = [
        store.load(CALIBRATIONS / name, catalog.device(name), "vllm@0.19").models["attention_prefill"].seconds(columns)
        for name in ("h100_sxm", "h200_sxm")
    ]
    assert (both[0] == both[1]).all()
    assert (both[1] > 4 * 64 * 128 * chunk**2 / 2 / 989e12).all()


def test_a_sliding_window_shortens_long_prompts() -> None:
    from engine.scheduling.request import BatchShape

    windowed, full = (
        deploy(f"mistralai/{name}", "a100").predictor for name in ("Mistral-7B-v0.1", "Mistral-7B-Instruct-v0.3")
    )
    for chunk, prefix in ((512, 0), (4096, 0)):
        shape = BatchShape(chunk, 0, 0, ((chunk, prefix),), 1, 0)
        assert windowed.stage_time(shape, 0) == pytest.approx(full.stage_time(shape, 0), rel=0.02)
    for chunk, prefix in ((16384, 0), (4096, 12288)):
        shape = BatchShape(chunk, 0, 0, ((chunk, prefix),), 1, 0)
        assert windowed.stage_time(shape, 0) < 0.95 * full.stage_time(shape, 0)


def test_one_very_long_request_is_outside_the_range_where_many_short_ones_are_not() -> None:
    from engine.scheduling.request import BatchShape

    predictor = deploy("mistralai/Mistral-7B-Instruct-v0.3", "a100").predictor
    assert predictor.in_range(BatchShape(64, 64, 500_000, (), 64, 64))
    assert not predictor.in_range(BatchShape(1, 1, 500_000, (), 1, 1))
    assert not predictor.in_range(BatchShape(512, 0, 0, ((512, 30_000),), 0, 0))
    pcie = deploy(
        "mistralai/Mistral-7B-Instruct-v0.3", "a100", network="pcie", parallel=ParallelSpec(tensor_parallel_size=2)
    )
    assert not pcie.predictor.in_range(BatchShape(64, 64, 50_000, (), 64, 64))  # its all-reduce is an estimate


@pytest.mark.skipif(not DATA.exists(), reason="the public tables are not here")
def test_tables_of_another_network_are_left_out_of_an_evaluation() -> None:
    from cli.calibrate import read

    device = catalog.device("a100_pcie")
    frame = read(str(DATA / "aiconfigurator" / "a100_sxm"), device)
    errors = calibration_errors.evaluate(store.load(CALIBRATIONS / "a100_pcie", device), [frame])
    assert set(errors) == {"gemm", "attention_prefill", "attention_decode"}
    assert errors["gemm"]["measured_on"] == "a100_sxm"


@pytest.mark.skipif(not DATA.exists(), reason="the public tables are not here")
def test_a_calibration_is_made_again_to_the_last_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The A100 SXM's, which has every kind, of tables of both sources; but its products, whose errors take longest."""
    from cli.main import run

    sources = [f"aiconfigurator:{DATA / 'aiconfigurator' / 'a100_sxm'}", f"vidur:{DATA / 'vidur' / 'profiling'}"]
    monkeypatch.setattr(calibration_fit, "KINDS", {name: kind for name, kind in KINDS.items() if name != "gemm"})
    arguments = ["calibrate", "fit", "--device", "a100_sxm", "--source", *sources, "--output-dir", str(tmp_path)]
    assert run(arguments) == (0, "")
    names = {path.name for path in (CALIBRATIONS / "a100_sxm").iterdir()} - {"gemm.json"}
    assert len(names) > 5
    for name in sorted(names):
        assert (tmp_path / name).read_bytes() == (CALIBRATIONS / "a100_sxm" / name).read_bytes(), name


@pytest.mark.skipif(not DATA.exists(), reason="the public tables are not here")
@pytest.mark.parametrize(
    ("name", "source", "folder"),
    [("a40", "vidur", "vidur/profiling/compute"), ("a100_sxm", "aiconfigurator", "aiconfigurator/a100_sxm")],
)
def test_products_are_learned_again_to_the_last_digit(name: str, source: str, folder: str) -> None:
    """To measure their errors again on all folds would take half a minute."""
    from cli.calibrate import read

    device = catalog.device(name)
    frame = read(f"{source}:{DATA / folder}", device)
    shipped_text = json.loads((CALIBRATIONS / name / "gemm.json").read_text(encoding="utf-8"))
    model = calibration_fit.learn(device, [frame[frame["kind"] == "gemm"]])["gemm"]
    assert json.loads(json.dumps(model.to_json())) == shipped_text["model"]


@pytest.mark.skipif(not DATA.exists(), reason="the public tables are not here")
def test_what_was_measured_is_predicted() -> None:
    from cli.calibrate import read

    device = catalog.device("a40")
    frame = read(f"vidur:{DATA / 'vidur' / 'profiling' / 'compute'}", device)
    errors = calibration_errors.evaluate(store.load(CALIBRATIONS / "a40", device), [frame])
    assert errors["gemm"]["mape"] < 0.02  # of what it was fitted to
    l40s = catalog.device("l40s")
    experts = read(f"aiconfigurator:{DATA / 'aiconfigurator' / 'l40s' / 'moe'}", l40s)
    found = calibration_errors.evaluate(store.load_of(l40s, "vllm@0.14"), [experts])["moe"]
    assert found["mape"] < 0.03 and abs(found["bias"]) < 0.01  # a data sheet that has changed since would show
    assert np.isclose(errors["gemm"]["in_range"], 1.0)
