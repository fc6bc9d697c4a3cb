"""The importers of published measurements: miniature files in each native form, and the real ones where they are."""

import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cli.main import run
from engine.errors import InputError
from engine.specs import ParallelSpec, catalog
from profiler.importers import read_source, vidur
from profiler.operators import inventory

DATA = Path(__file__).parents[2] / "shared" / "data"
real = pytest.mark.skipif(not (DATA / "vidur").exists(), reason="the public tables are not here")

TIMERS = ("emb", "input_layernorm", "attn_pre_proj", "attn_rope", "attn_post_proj", "post_attention_layernorm",
          "mlp_up_proj", "mlp_act", "mlp_down_proj", "add")  # fmt: skip
LLAMA = {"n_head": 32, "n_kv_head": 8, "n_embd": 4096, "n_expanded_embd": 14336, "vocab_size": 128256,
         "use_gated_mlp": True}  # fmt: skip
PHI = {"n_head": 32, "n_kv_head": 32, "n_embd": 2560, "n_expanded_embd": 10240, "vocab_size": 51200,
       "use_gated_mlp": False}  # fmt: skip
CARD = {"framework": "VLLM", "version": "0.14.0", "device": "NVIDIA A100-SXM4-80GB", "kernel_source": "k"}


def stats(name: str, median: float, std: float = 0.001) -> dict[str, float]:
    return {f"time_stats.{name}.median": median, f"time_stats.{name}.std": std}


def mlp_row(tokens: int, tp: int = 1, ms: float = 0.1, timers: tuple[str, ...] = TIMERS, **model: object) -> dict:
    row: dict[str, object] = {}
    for index, name in enumerate(timers):
        row |= stats(name, ms * (1 + index))
    return row | (model or LLAMA) | {"num_tokens": tokens, "num_tensor_parallel_workers": tp}


def save(path: Path, rows: list[dict], index: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    frame = pd.DataFrame(rows)
    frame.to_parquet(path) if path.suffix == ".parquet" else frame.to_csv(path, index=index)
    return path


def only(table: pd.DataFrame, **values: object) -> pd.Series:
    for column, value in values.items():
        table = table[table[column] == value]
    assert len(table) == 1, f"{len(table)} rows of {values}"
    return table.iloc[0]


def test_vidur_mlp_has_the_operators_and_shapes_of_the_inventory(tmp_path: Path) -> None:
    rows = [mlp_row(tokens, tp) for tokens in (1, 64) for tp in (1, 2, 8)]
    save(tmp_path / "compute" / "a40" / "meta-llama" / "Meta-Llama-3-8B" / "mlp.csv", rows)
    table = read_source("vidur", tmp_path)
    assert len(table) == len(rows) * len(TIMERS)
    assert set(table["device"]) == {"a40"} and set(table["model"]) == {"meta-llama/Meta-Llama-3-8B"}
    for tp in (1, 2, 8):
        operators = inventory(catalog.model("Meta-Llama-3-8B"), ParallelSpec(tensor_parallel_size=tp), 0)
        names = set(table["operator"])
        for operator in operators:
            if operator.name not in names:
                continue
            row = only(table, operator=operator.name, tensor_parallel_size=tp, **{
                "m" if operator.kind == "gemm" else "rows": 64})  # fmt: skip
            assert row["kind"] == operator.kind
            if operator.kind == "gemm":
                assert (row["k"], row["n"]) == (operator.k, operator.n)
            else:
                assert row["bytes_per_row"] == operator.bytes_per_row
    assert only(table, operator="qkv_proj", m=1, tensor_parallel_size=8)["n"] == 4096 // 8 + 2 * 128
    assert only(table, operator="mlp_gate_up_proj", m=1, tensor_parallel_size=1)["time_ms"] == 0.1 * 7
    assert only(table, operator="rotary", rows=64, tensor_parallel_size=2)["bytes_per_row"] == 2 * 2 * (4096 + 1024) / 2


def test_vidur_mlp_of_a_parallel_block_has_one_norm_and_a_wider_add(tmp_path: Path) -> None:
    timers = tuple(name for name in TIMERS if name != "post_attention_layernorm")
    save(tmp_path / "compute" / "a100" / "microsoft" / "phi-2" / "mlp.csv", [mlp_row(8, timers=timers, **PHI)])
    table = read_source("vidur", tmp_path / "compute" / "a100" / "microsoft" / "phi-2")
    assert "post_attention_norm" not in set(table["operator"])
    assert only(table, operator="mlp_up_proj")["n"] == 10240
    assert only(table, operator="mlp_residual_add")["bytes_per_row"] == 4 * 2560 * 2
    assert only(table, operator="rotary")["bytes_per_row"] == 4 * 2560 * 2  # whole heads, unlike the model's config
    assert table.attrs["notes"] == [
        "compute/a100/microsoft/phi-2/mlp.csv: has no post_attention_layernorm",
        "taken to be of a100_pcie; its place does not tell it from a100_sxm",
    ]


def test_vidur_key_value_heads_are_copied_where_ranks_outnumber_them(tmp_path: Path) -> None:
    model = LLAMA | {"n_kv_head": 4}
    save(tmp_path / "compute" / "a40" / "o" / "m" / "mlp.csv", [mlp_row(8, 8, **model)])
    row = attention_row(0, 31, 2, tp=8, kv_heads=4)
    save(tmp_path / "compute" / "a40" / "o" / "m" / "attention.csv", [row])
    table = read_source("vidur", tmp_path)
    assert only(table, operator="qkv_proj")["n"] == 4096 // 8 + 2 * 128
    decode = only(table, kind="attention_decode")
    assert (decode["num_heads"], decode["num_kv_heads"], decode["head_dim"]) == (4, 1, 128)


def attention_row(chunk: int, cached: int, batch: int, tp: int = 2, kv_heads: int = 8, ms: float = 0.2) -> dict:
    mine, other = ("attn_prefill", "attn_decode") if chunk else ("attn_decode", "attn_prefill")
    return (
        stats(mine, ms)
        | stats(other, np.nan, np.nan)
        | {"n_embd": 4096, "n_q_head": 32, "n_kv_head": kv_heads, "block_size": 16, "num_tensor_parallel_workers": tp}
        | {"batch_size": batch, "prefill_chunk_size": chunk, "kv_cache_size": cached, "is_prefill": chunk > 0}
        | {"attention_backend": "AttentionBackend.FLASH_ATTENTION"}
    )


def test_a_fit_takes_the_attention_of_another_device_of_the_source(tmp_path: Path) -> None:
    for device in ("a40", "h100"):
        save(tmp_path / "compute" / device / "o" / "m" / "mlp.csv", [mlp_row(tokens) for tokens in (1, 8, 64, 512)])
    rows = [attention_row(0, cached, batch, ms=1e-6 * batch * cached) for batch in (1, 4, 16) for cached in (512, 4096)]
    save(tmp_path / "compute" / "h100" / "o" / "m" / "attention.csv", rows)
    fit = ["calibrate", "fit", "--device", "a40", "--source", f"vidur:{tmp_path}", "--output-dir", f"{tmp_path}/mine"]
    assert run(fit) == (0, "")
    records = {path.stem: json.loads(path.read_text("utf-8")) for path in (tmp_path / "mine").glob("*.json")}
    assert records["attention_decode"]["learned_on"] == "h100_sxm" and records["gemm"]["learned_on"] == "a40"


def test_vidur_attention(tmp_path: Path) -> None:
    rows = [attention_row(512, 1024, 1, ms=0.1), attention_row(512, 1024, 1, ms=0.3), attention_row(0, 99, 8)]
    save(tmp_path / "a40" / "attention.csv", rows)
    table = read_source("vidur", tmp_path / "a40" / "attention.csv")
    prefill, decode = only(table, kind="attention_prefill"), only(table, kind="attention_decode")
    assert (prefill["chunk"], prefill["prefix"], prefill["batch_size"]) == (512, 1024, 1)
    assert (prefill["num_heads"], prefill["num_kv_heads"], prefill["head_dim"]) == (16, 4, 128)
    assert prefill["time_ms"] == pytest.approx(0.2) and prefill["repeats"] == 2
    assert prefill["spread_ms"] == pytest.approx(np.std([0.1, 0.3], ddof=1))
    assert decode["kv_tokens"] == 8 * 100 and decode["backend"] == "flash_attention" and decode["spread_ms"] == 0.001


def test_vidur_collectives_combine_the_ranks(tmp_path: Path) -> None:
    shape = {"num_workers": 8, "size": 2**20, "devices_per_node": 4, "max_devices_per_node": 8}
    ranks = [stats("all_reduce", 0.010 + 0.001 * rank) | {"rank": rank} | shape for rank in range(8)]
    other = stats("all_reduce", 0.5) | {"rank": 0} | shape | {"devices_per_node": 8}
    save(tmp_path / "network" / "a100_dgx" / "all_reduce.csv", [*ranks, other], index=True)
    send = stats("send_recv", 0.02) | {"rank": 0} | shape | {"num_workers": 2, "devices_per_node": 1}
    save(tmp_path / "network" / "a100_dgx" / "send_recv.csv", [send], index=True)
    table = read_source("vidur", tmp_path)
    row = only(table, kind="all_reduce", ranks_per_node=4)
    assert (row["num_bytes"], row["num_ranks"], row["repeats"]) == (2**20, 8, 8)
    assert row["time_ms"] == pytest.approx(0.0135)
    assert (row["device"], row["network"]) == ("a100_sxm", "nvswitch_a100")
    assert only(table, kind="send")["num_ranks"] == 2
    assert set(read_source("vidur", tmp_path, network="mine")["network"]) == {"mine"}


def test_the_networks_of_vidur_are_in_the_catalog() -> None:
    for device, network in vidur.NETWORKS.values():
        assert device in catalog.DEVICES and network in catalog.NETWORKS


def test_vidur_host_times_keep_their_files_apart(tmp_path: Path) -> None:
    row = {"schedule_median": 0.2, "sampler_e2e_median": 0.6, "ray_comm_time_mean": 6.2, "schedule_mean": 0.3}
    row |= {"model_name": "org/model", "batch_size": 8, "tensor_parallel_degree": 2}
    save(tmp_path / "cpu_overheads" / "a40.csv", [row | {"sampler_launch_median": 0.5}], index=True)
    save(tmp_path / "cpu_overheads" / "a40_other.csv", [row], index=True)
    table = read_source("vidur", tmp_path)
    assert len(table) == 4 + 3 and set(table["kind"]) == {"host"}
    assert sorted(set(table["operator"])) == ["ray_comm", "sampler", "sampler_launch", "schedule"]
    assert set(table["source"]) == {f"microsoft/vidur cpu_overheads/{name}.csv" for name in ("a40", "a40_other")}
    assert set(table["model"]) == {"org/model"} and set(table["tensor_parallel_size"]) == {2}
    assert "cpu_overheads/a40.csv: ray_comm is a mean, the other components are medians" in table.attrs["notes"]


def test_times_of_zero_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [mlp_row(1) | stats("add", 0.0), mlp_row(2)]
    save(tmp_path / "a40" / "mlp.csv", rows)
    table = read_source("vidur", tmp_path)
    assert len(table) == 2 * len(TIMERS) - 1
    assert "a40/mlp.csv: 1 times of 0, below the resolution of the measurement, left out" in table.attrs["notes"]


def test_the_device_is_chosen_where_there_are_several(tmp_path: Path) -> None:
    for folder in ("a40", "a100", "v100"):
        save(tmp_path / "compute" / folder / "o" / "m" / "mlp.csv", [mlp_row(1)])
    with pytest.raises(InputError, match="holds tables of a100_pcie, a40, v100: choose one"):
        read_source("vidur", tmp_path)
    for name, device in {"a40": "a40", "a100": "a100_pcie", "a100_sxm": "a100_sxm", "v100": "v100"}.items():
        table = read_source("vidur", tmp_path, device=name)
        assert set(table["device"]) == {device} and len(table) == len(TIMERS)
    with pytest.raises(InputError, match="holds tables of a100_pcie, a40, v100, none of h100"):
        read_source("vidur", tmp_path, device="h100")
    path = save(tmp_path / "somewhere" / "mlp.csv", [mlp_row(1)])
    with pytest.raises(InputError, match=r"don't tell the device: name it \(device=\.\.\.\)"):
        read_source("vidur", path)
    assert set(read_source("vidur", path, device="l4")["device"]) == {"l4"}


def aic(tmp_path: Path, name: str, rows: list[dict]) -> Path:
    return save(tmp_path / "a100_sxm" / f"{name}_perf.parquet", [CARD | row for row in rows])


def test_aiconfigurator_gemm_and_attention(tmp_path: Path) -> None:
    aic(tmp_path, "gemm", [{"op_name": "gemm", "gemm_dtype": "bfloat16", "m": 8, "n": 64, "k": 32, "latency": 0.01}])
    heads = {"num_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "beam_width": 1}
    dtypes = {"attn_dtype": "bfloat16", "kv_cache_dtype": "bfloat16"}
    context = {"op_name": "context_attention", "batch_size": 4, "isl": 1024, "step": 0} | heads | dtypes
    rows = [context | {"latency": ms} for ms in (1.0, 1.2)]
    aic(tmp_path, "context_attention", [*rows, context | {"kv_cache_dtype": "fp8", "latency": 0.5}])
    generation = {"op_name": "generation_attention", "batch_size": 4, "isl": 1, "step": 1023} | heads | dtypes
    aic(tmp_path, "generation_attention", [generation | {"latency": 0.1}])
    aic(tmp_path, "moe", [{"op_name": "moe", "experts": 8, "latency": 0.1}])
    table = read_source("aiconfigurator", tmp_path)
    gemm = only(table, kind="gemm")
    assert (gemm["m"], gemm["k"], gemm["n"], gemm["time_ms"]) == (8, 32, 64, 0.01)
    assert (gemm["device"], gemm["software"], gemm["backend"]) == ("a100_sxm", "vllm 0.14.0", "vllm")
    prefill = only(table, kind="attention_prefill", dtype="bfloat16")
    assert (prefill["batch_size"], prefill["chunk"], prefill["prefix"]) == (4, 1024, 0)
    assert (prefill["num_heads"], prefill["num_kv_heads"], prefill["head_dim"]) == (64, 8, 128)
    assert prefill["time_ms"] == pytest.approx(1.1) and prefill["repeats"] == 2
    assert only(table, dtype="bfloat16, cache fp8")["time_ms"] == 0.5
    decode = only(table, kind="attention_decode")
    assert decode["kv_tokens"] == 4 * 1023 and pd.isna(decode["chunk"])
    assert "left out for their unknown columns: a100_sxm/moe_perf.parquet" in table.attrs["notes"]


def test_aiconfigurator_message_sizes_are_elements(tmp_path: Path) -> None:
    size = {"num_gpus": 8, "message_size": 1024, "latency": 0.02}
    custom = {"op_name": "all_reduce", "allreduce_dtype": "bfloat16", **size}
    aic(tmp_path, "custom_allreduce", [custom | {"backend": f"vllm_{mode}"} for mode in ("graph", "eager")])
    nccl = [{"op_name": "all_reduce", "nccl_dtype": dtype, **size} for dtype in ("half", "int8")]
    gather = {"op_name": "all_gather", "nccl_dtype": "half", **size}
    aic(tmp_path, "nccl", [row | {"framework": "TRTLLM", "version": "2.27.3"} for row in [*nccl, gather]])
    table = read_source("aiconfigurator", tmp_path)
    assert len(table) == 4 and set(table["kind"]) == {"all_reduce"} and set(table["network"]) == {"nvswitch_a100"}
    assert only(table, backend="vllm_graph")["num_bytes"] == 2048
    assert only(table, backend="nccl", dtype="float16")["num_bytes"] == 2048
    assert only(table, backend="nccl", dtype="int8")["num_bytes"] == 1024
    assert only(table, backend="nccl", dtype="int8")["software"] == "nccl 2.27.3"
    assert table.attrs["notes"] == ["a100_sxm/nccl_perf.parquet: 1 rows of all_gather of half left out"]


def test_aiconfigurator_cards_of_other_names_are_not_mistaken(tmp_path: Path) -> None:
    row = {"op_name": "gemm", "gemm_dtype": "bfloat16", "m": 8, "n": 64, "k": 32, "latency": 0.01}
    path = aic(tmp_path, "gemm", [row, row | {"device": "NVIDIA B200"}])
    with pytest.raises(InputError, match="holds tables of NVIDIA B200, a100_sxm: choose one"):
        read_source("aiconfigurator", path)
    assert len(read_source("aiconfigurator", path, device="a100_sxm")) == 1
    assert set(read_source("aiconfigurator", path, device="NVIDIA B200")["device"]) == {"NVIDIA B200"}


def test_broken_sources_are_named(tmp_path: Path) -> None:
    def broken(kind: str, place: Path, message: str) -> None:
        with pytest.raises(InputError, match=re.escape(message)) as error:
            read_source(kind, place)
        assert str(tmp_path) in str(error.value)

    with pytest.raises(InputError, match="unknown source 'vidru': did you mean 'vidur'"):
        read_source("vidru", tmp_path)
    for kind, name in (("vidur", "mlp.csv"), ("aiconfigurator", "gemm")):
        broken(kind, tmp_path, "holds no table that is known here: looked for")
        broken(kind, tmp_path / "absent", "give a folder with")
        with pytest.raises(InputError, match=name):
            read_source(kind, tmp_path)
    save(tmp_path / "other" / "a.csv", [{"a": 1}])
    save(tmp_path / "other" / "a.parquet", [{"a": 1}])
    broken("vidur", tmp_path / "other", "holds no table that is known here")
    broken("aiconfigurator", tmp_path / "other", "holds no table that is known here")
    broken("vidur", save(tmp_path / "compute", [{"a": 1}]), "holds no table that is known here")  # named as a folder is

    mlp = tmp_path / "a40" / "mlp.csv"
    save(mlp, [{"version": 1}])
    broken("vidur", mlp, "is no such table of Vidur: its columns are version")
    save(mlp, [mlp_row(1), mlp_row(2) | {"num_tokens": "two"}])
    broken("vidur", mlp, f"{mlp} line 3, column 'num_tokens': two is not a number")
    save(mlp, [mlp_row(1), mlp_row(2) | stats("add", -1.0)])
    broken("vidur", mlp, f"{mlp} line 3, column 'time_stats.add.median': -1.0 is not a size or a time")
    save(mlp, [mlp_row(1) | {"use_gated_mlp": "maybe"}])
    broken("vidur", mlp, f"{mlp} line 2, column 'use_gated_mlp': maybe is neither True nor False")
    save(mlp, [mlp_row(1, 3)])
    broken("vidur", mlp, f"{mlp}: a40 can't be cut into tensor_parallel_size=3")
    save(mlp, [{name: value for name, value in mlp_row(1).items() if name != "n_embd"}])
    broken("vidur", mlp, f"{mlp} has no column 'n_embd'")
    save(mlp, [mlp_row(1), mlp_row(2)])
    mlp.write_text(mlp.read_text()[:-20])
    broken("vidur", mlp, f"{mlp} line 3, column ")
    mlp.write_text(mlp.read_text().splitlines()[0])
    broken("vidur", mlp, f"{mlp} holds no rows")

    gemm = tmp_path / "gemm_perf.parquet"
    pd.DataFrame(columns=[*CARD, "op_name", "gemm_dtype", "m", "n", "k", "latency"]).to_parquet(gemm)
    broken("aiconfigurator", gemm, f"{gemm} holds no rows")
    gemm.write_bytes(b"PAR1 and nothing else")
    broken("aiconfigurator", gemm, "is no Parquet table, or a part of one")
    row = CARD | {"op_name": "gemm", "gemm_dtype": "bfloat16", "m": 8, "n": 64, "k": 32}
    save(gemm, [row | {"latency": 1.0}, row | {"m": 9, "latency": np.nan}])
    broken("aiconfigurator", gemm, f"{gemm} row 1, column 'latency': nan is not a size or a time")


@cache
def published(kind: str, device: str) -> pd.DataFrame:
    return read_source(kind, DATA / kind, device)


@real
def test_the_published_tables_have_all_their_rows() -> None:
    def counts(table: pd.DataFrame) -> dict[str, int]:
        return {str(kind): int(count) for kind, count in table["kind"].value_counts().items()}

    # 259 or 451 token counts x tensor parallel sizes x operators; repeated shapes combined
    gemms = 4 * (3 * 259 * 4 + 259)
    assert counts(published("vidur", "a40")) == {
        "gemm": gemms, "elementwise": 6 * 3 * 259 * 4 + 5 * 259, "host": 17 * 12 * 9, "all_reduce": 3 * 993,
        "send": 2 * 993}  # fmt: skip
    assert counts(published("vidur", "a100_pcie")) == {
        "gemm": gemms + 4 * 2 * 451 * 4, "elementwise": 6 * 4 * (3 * 259 + 2 * 451) + 5 * 259,
        "attention_decode": 79 * 128, "attention_prefill": 4206, "host": 6 * 12 * 9 + 12 * 6,
        "all_reduce": 2 * 2247, "send": 2 * 993}  # fmt: skip
    assert counts(published("vidur", "a100_sxm"))["all_reduce"] == 7 * 993
    assert counts(published("aiconfigurator", "a100_sxm")) == {
        "gemm": 9240, "attention_prefill": 5457 - 408 - 1, "attention_decode": 5431 - 4,  # outliers
        "all_reduce": 138 + 126, "moe": 6360}  # fmt: skip


@real
def test_the_published_tables_have_the_values_that_an_editor_shows() -> None:
    a40, pcie = published("vidur", "a40"), published("vidur", "a100_pcie")
    sxm, aic = published("vidur", "a100_sxm"), published("aiconfigurator", "a100_sxm")
    llama = {"model": "meta-llama/Llama-2-70b-hf", "tensor_parallel_size": 8}
    up = only(a40, operator="mlp_gate_up_proj", m=512, **llama)
    assert (up["time_ms"], up["k"], up["n"]) == (0.529, 8192, 2 * 28672 // 8)
    assert only(a40, operator="mlp_residual_add", rows=512, **llama)["time_ms"] == 0.0435
    heads = {"num_heads": 32, "num_kv_heads": 4, "head_dim": 128}
    assert only(pcie, kind="attention_decode", batch_size=106, kv_tokens=106 * 3521, **heads)["time_ms"] == 0.428
    prefill = only(pcie, kind="attention_prefill", chunk=512, prefix=1024, **heads)
    assert (prefill["time_ms"], prefill["repeats"]) == (0.1475, 2)
    message = {"kind": "all_reduce", "num_bytes": 67108864, "num_ranks": 8}
    assert only(sxm, ranks_per_node=8, **message)["time_ms"] == 0.675
    assert only(sxm, ranks_per_node=4, **message)["time_ms"] == 5.239
    host = {"source": "microsoft/vidur cpu_overheads/a100_codellama34b_tp2.csv", "batch_size": 8}
    assert only(pcie, operator="model_execution", **host)["time_ms"] == pytest.approx(29.4001750)
    assert only(aic, kind="gemm", m=8192, n=65536, k=4096)["time_ms"] == pytest.approx(15.28754)
    context = only(aic, kind="attention_prefill", batch_size=2, chunk=1536, num_heads=8, num_kv_heads=8)
    assert context["time_ms"] == pytest.approx((0.165536 + 0.133429) / 2, abs=1e-6)
    nccl = only(aic, backend="nccl", num_bytes=2**29, num_ranks=8, dtype="float16")
    assert nccl["time_ms"] == pytest.approx(4.2259)


def attained(table: pd.DataFrame) -> pd.DataFrame:
    """FLOP/s and bytes/s, at 2 bytes an element, of each row; a collective's are those that cross a rank's link."""
    columns = table.select_dtypes("number").astype("float64").fillna(0.0).assign(kind=table["kind"])
    m, k, n = columns["m"], columns["k"], columns["n"]
    q = columns["batch_size"] * columns["num_heads"] * columns["head_dim"]
    chunk, prefix = columns["chunk"], columns["prefix"]
    causal = chunk * prefix + chunk * (chunk + 1) / 2
    kv = np.where(chunk > 0, columns["batch_size"] * (chunk + prefix), columns["kv_tokens"])
    ring = np.where(columns["kind"] == "all_reduce", 2 * (1 - 1 / columns["num_ranks"].clip(lower=1)), 1)
    moved = 2 * (m * (k + n) + k * n) + columns["rows"] * columns["bytes_per_row"]
    moved += 2 * (2 * kv * columns["num_kv_heads"] * columns["head_dim"] + 2 * q * chunk)
    seconds = columns["time_ms"] / 1e3
    rates = {"flops": (2 * m * k * n + 4 * q * causal) / seconds, "memory": moved / seconds}
    return table.assign(**rates, link=columns["num_bytes"] * ring / seconds)


@real
@pytest.mark.parametrize(
    ("kind", "device", "link"),
    [
        ("vidur", "a40", 56.25e9),
        ("vidur", "a100_sxm", 300e9),
        # the sender's kernel ends before the receiver has it all, so that a send seems to beat NVLink's 300 GB/s
        ("vidur", "a100_pcie", 345e9),
        ("aiconfigurator", "a100_sxm", 300e9),
    ],
)
def test_the_published_times_are_physically_possible(kind: str, device: str, link: float) -> None:
    table, spec = published(kind, device), catalog.device(device)
    long = attained(table[(table["time_ms"] > 0.02) & (table["kind"] != "host")])
    assert len(long) > 10000
    assert long["flops"].max() < spec.peak_flops
    memory = long.groupby("kind")["memory"].max() / spec.memory_bandwidth
    # what a small operator wrote last is still in the L2 cache
    assert memory.pop("elementwise") < 1.12 if kind == "vidur" else True
    assert memory.max() < 1
    assert long["link"].max() < link
    # and not implausibly slow: somewhere the device is driven near what it can do
    assert long["flops"].max() > 0.8 * spec.peak_flops
    assert memory.max() > 0.75
