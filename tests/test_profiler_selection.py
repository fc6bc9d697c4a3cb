"""Selecting one population of measurements: software, window and device, and leaving out rows that went wrong."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cli.main import run
from engine.errors import InputError
from engine.specs import catalog
from profiler.importers import Selection, read_source
from simulator.predictor import calibration_fit

DATA = Path(__file__).parents[2] / "shared" / "data" / "aiconfigurator"
real = pytest.mark.skipif(not (DATA / "h100_sxm").exists(), reason="the public tables are not here")
CARD = {"framework": "VLLM", "device": "NVIDIA H100 80GB HBM3", "kernel_source": "k"}


def gemms(version: str, dtype: str = "bfloat16", factor: float = 1.0) -> list[dict]:
    sizes = [(m, n, k) for m in (256, 512, 1024, 2048) for n in (1024, 2048, 4096) for k in (1024, 2048, 4096)]
    common = CARD | {"version": version, "op_name": "gemm", "gemm_dtype": dtype}
    return [common | {"m": m, "n": n, "k": k, "latency": factor * (0.005 + 2e-12 * m * n * k)} for m, n, k in sizes]


def save(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_parquet(path)


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """Laid out as upstream: device/operator/framework/version, and NCCL's rows of a version that they do not name."""
    place = tmp_path / "h100_sxm"
    for folder, version in (("0.14.0", "0.14.1.dev1"), ("0.19.0", "0.19.0")):
        rows = gemms(version) + gemms(version, "fp8", 0.5)
        save(place / "gemm" / "vllm" / folder / "gemm_perf.parquet", rows)
        custom = CARD | {"framework": "vLLM", "version": version, "op_name": "all_reduce", "num_gpus": 2}
        custom |= {"allreduce_dtype": "bfloat16", "latency": 0.004, "kernel_source": "vLLM_custom_graph"}
        sizes = [custom | {"message_size": size} for size in (1024, 2048)]
        save(place / "comm" / "vllm" / folder / "custom_allreduce_perf.parquet", sizes)
    nccl = CARD | {"framework": "TRTLLM", "version": "2.29.2", "op_name": "all_reduce", "nccl_dtype": "half"}
    nccl |= {"num_gpus": 2, "message_size": 1024, "latency": 0.006}
    save(place / "comm" / "nccl" / "2.27.3" / "nccl_perf.parquet", [nccl])
    return tmp_path


def test_several_versions_are_never_pooled(tables: Path) -> None:
    with pytest.raises(InputError) as error:
        read_source("aiconfigurator", tables)
    for word in ("several versions of vllm", "vllm@0.14 (custom_allreduce, gemm)", "vllm@0.19", "nccl@2.27"):
        assert word in str(error.value)
    with pytest.raises(InputError, match=r"no measurements of h100_sxm with vllm@0.15: there are .*vllm@0.19"):
        read_source("aiconfigurator", tables, select=Selection(("vllm@0.15",)))
    frame = read_source("aiconfigurator", tables, select=Selection(("vllm@0.14",)))
    assert set(frame["software"]) == {"vllm 0.14.1.dev1", "nccl 2.27.3"}  # NCCL's version is its folder's
    assert set(frame["backend"]) == {"vllm", "vllm_graph", "nccl"}
    only = read_source("aiconfigurator", tables, select=Selection(("vllm@0.19",), dtype="fp8"))
    assert set(only[only["kind"] == "gemm"]["dtype"]) == {"fp8"}


def test_each_dtype_is_learned_by_itself(tables: Path) -> None:
    frame = read_source("aiconfigurator", tables, select=Selection(("vllm@0.19",)))
    models = calibration_fit.learn(catalog.device("h100"), [frame])
    assert list(models) == ["gemm", "gemm.fp8", "all_reduce"]
    size = {"m": np.array([1024.0]), "n": np.array([2048.0]), "k": np.array([2048.0])}
    assert models["gemm.fp8"].seconds(size) == pytest.approx(models["gemm"].seconds(size) / 2, rel=0.1)
    mixed = frame[frame["kind"] == "gemm"]
    with pytest.raises(InputError, match="bfloat16 and fp8 are not one population"):
        models["gemm"].fit(mixed)


def test_windows_are_worlds_of_their_own(tmp_path: Path) -> None:
    row = CARD | {"version": "0.19.0", "op_name": "context_attention", "batch_size": 1, "isl": 1024, "step": 0}
    row |= {"num_heads": 8, "num_key_value_heads": 8, "head_dim": 128, "attn_dtype": "bfloat16"}
    rows = [row | {"kv_cache_dtype": "bfloat16", "window_size": size, "latency": 1.0 + size} for size in (0, 128)]
    save(tmp_path / "context_attention_perf.parquet", rows)
    frame = read_source("aiconfigurator", tmp_path)
    assert frame["time_ms"].tolist() == [1.0]
    assert any("1 rows of window 128 left out" in note for note in frame.attrs["notes"])
    assert read_source("aiconfigurator", tmp_path, select=Selection(window=128))["time_ms"].tolist() == [129.0]


def test_a_row_that_no_neighbour_supports_is_left_out_and_named(tmp_path: Path) -> None:
    rows = gemms("0.14.0")
    wrong = next(row for row in rows if (row["m"], row["n"], row["k"]) == (1024, 2048, 2048))
    wrong["latency"] *= 5
    save(tmp_path / "gemm_perf.parquet", rows)
    frame = read_source("aiconfigurator", tmp_path)
    assert len(frame) == len(rows) - 1
    assert any("1 outlier left out" in note and "m 1024, k 2048, n 2048" in note for note in frame.attrs["notes"])


def prompts(latency: dict[int, float]) -> list[dict]:
    row = CARD | {"version": "0.19.0", "op_name": "context_attention", "step": 0, "num_heads": 64, "head_dim": 128}
    row |= {"attn_dtype": "bfloat16", "kv_cache_dtype": "bfloat16", "num_key_value_heads": 8, "batch_size": 1}
    return [row | {"isl": size, "latency": time} for size, time in latency.items()]


def test_prefills_that_beat_the_cards_arithmetic_are_not_believed(tmp_path: Path) -> None:
    arithmetic = 1e3 * 4 * 64 * 128 * 16384 * 16385 / 2 / 989e12  # ms of 16k tokens on an H100
    save(tmp_path / "context_attention_perf.parquet", prompts({1024: 0.05, 16384: 1.5 * arithmetic}))
    assert len(read_source("aiconfigurator", tmp_path)) == 2
    save(tmp_path / "context_attention_perf.parquet", prompts({1024: 0.05, 16384: arithmetic / 20}))
    with pytest.raises(InputError, match=r"all 2 rows of bfloat16 attention_prefill .* 1 are faster .* 20 times"):
        read_source("aiconfigurator", tmp_path)
    save(tmp_path / "gemm_perf.parquet", gemms("0.19.0"))
    frame = read_source("aiconfigurator", tmp_path)  # other tables are read
    assert set(frame["kind"]) == {"gemm"} and any("something else was timed" in note for note in frame.attrs["notes"])


def test_experts_of_a_rank_that_take_as_long_as_all_are_left_out(tmp_path: Path) -> None:
    row = CARD | {"op_name": "moe", "hidden_size": 2880, "inter_size": 2880, "topk": 4, "num_experts": 128}
    row |= {"moe_tp_size": 1, "distribution": "balanced", "num_tokens": 4096}

    def measured(dtype: str, version: str, shared: float) -> list[dict]:
        mine = row | {"moe_dtype": dtype, "version": version}
        return [mine | {"moe_ep_size": ranks, "latency": 8.0 if ranks == 1 else shared} for ranks in (1, 4, 8)]

    rows = measured("bfloat16", "0.19.0", 2.0) + measured("w4a16_mxfp4", "0.19.1", 8.0)
    save(tmp_path / "moe_perf.parquet", rows)
    frame = read_source("aiconfigurator", tmp_path, select=Selection(("vllm@0.19",)))
    assert frame.groupby("dtype")["local_experts"].apply(sorted).to_dict() == {
        "bfloat16": [16, 32, 128],  # each format of the last patch release that has it
        "mxfp4": [128],
    }
    assert any("2 rows of mxfp4" in note and "take as long as" in note for note in frame.attrs["notes"])


@real
def test_the_known_outlier_is_left_out() -> None:
    frame = read_source("aiconfigurator", DATA, "h100_sxm", select=Selection(("vllm@0.14",), "bfloat16", "bfloat16"))
    mine = frame[(frame["kind"] == "gemm") & (frame["n"] == 5120) & (frame["k"] == 7168)]
    assert 2048 not in mine["m"].tolist() and 1024 in mine["m"].tolist()


def test_a_fit_into_a_folder_is_a_device(tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, folder = f"aiconfigurator:{tables}", tmp_path / "mine"
    fit = ["calibrate", "fit", "--device", "h100", "--source", source, "--output-dir", str(folder)]
    assert run(fit)[0] == 2  # of which version?
    assert run([*fit, "--software", "vllm@0.19"]) == (0, "")
    assert catalog.device(str(folder)).calibration == str(folder)
    again = tmp_path / "again"
    assert run([*fit[:-1], str(again), "--software", "vllm@0.19"]) == (0, "")
    assert all((again / path.name).read_bytes() == path.read_bytes() for path in folder.iterdir())
    capsys.readouterr()
    evaluate = ["calibrate", "evaluate", "--device", str(folder), "--test", source, "--software", "vllm@0.19"]
    assert run(evaluate) == (0, "")
    assert "interval" in capsys.readouterr().out
