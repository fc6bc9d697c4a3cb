"""The attention estimators: known laws, what must hold for any fit, and public measurements where they are."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from engine.errors import InputError
from engine.results.tables import Array
from engine.specs import DeviceSpec, catalog
from profiler.importers import read_source
from simulator.predictor.attention import AttentionDecode, AttentionPrefill
from simulator.predictor.attention_model import kernel_names

DATA = Path(__file__).parents[2] / "shared" / "data"
real = pytest.mark.skipif(not (DATA / "aiconfigurator").exists(), reason="the public tables are not here")

DEVICE = DeviceSpec(
    name="synthetic",
    description="made up",
    peak_flops=1e14,
    memory_bandwidth=1e12,
    memory_bytes=2**36,
    matmul_efficiency=0.8,
    attention_efficiency=0.5,
    bandwidth_efficiency=0.8,
    network="pcie",
    source="made up",
)
HEADS = [(8, 1), (8, 2), (16, 2), (16, 4), (32, 4), (32, 8), (32, 32)]
NEW, OLD = "engine/new", "engine/old"


def grid(**axes: Any) -> dict[str, Array]:
    """Every combination of the axes, as columns."""
    values = np.meshgrid(*(np.asarray(axis) for axis in axes.values()), indexing="ij")
    return {name: value.ravel() for name, value in zip(axes, values, strict=True)}


def with_heads(columns: dict[str, Array], heads: list[tuple[int, int]]) -> pd.DataFrame:
    parts = [pd.DataFrame({**columns, "num_heads": h, "num_kv_heads": kv, "head_dim": 128}) for h, kv in heads]
    return pd.concat(parts, ignore_index=True)


def prefill_work(rows: pd.DataFrame) -> tuple[Array, Array]:
    """FLOPs and bytes of causal attention, by counting the pairs of each request."""
    pairs = rows["chunk"] * rows["prefix"] + rows["chunk"] * (rows["chunk"] + 1) / 2
    flops = rows["batch_size"] * pairs * 4 * rows["num_heads"] * rows["head_dim"]
    new = 2 * rows["chunk"] * (rows["num_heads"] + rows["num_kv_heads"])
    elements = rows["batch_size"] * (new + 2 * rows["prefix"] * rows["num_kv_heads"]) * rows["head_dim"]
    return flops.to_numpy(float), 2 * elements.to_numpy(float)


def decode_bytes(rows: pd.DataFrame) -> Array:
    kv = 2 * rows["kv_tokens"] * rows["num_kv_heads"] * rows["head_dim"]
    return 2 * (kv + 2 * rows["batch_size"] * rows["num_heads"] * rows["head_dim"]).to_numpy(float)


def prefill_law(rows: pd.DataFrame, share: float) -> Array:
    flops, moved = prefill_work(rows)
    return 8e-6 + flops / DEVICE.peak_flops / share + moved / DEVICE.memory_bandwidth


def decode_law(rows: pd.DataFrame) -> Array:
    return 10e-6 + decode_bytes(rows) / DEVICE.memory_bandwidth / 0.8


def table(rows: pd.DataFrame, seconds: Array, kernel: str = NEW) -> pd.DataFrame:
    backend, name = kernel.split("/")
    return rows.assign(time_ms=seconds * 1e3, backend=backend, kernel=name)


@cache
def prefill_rows() -> pd.DataFrame:
    """A new kernel with many head configurations and no prefix; one half as fast with prefixes and one of them."""
    new = with_heads(grid(batch_size=[1, 2, 8, 32], chunk=2 ** np.arange(4, 14), prefix=[0]), HEADS)
    old = with_heads(grid(batch_size=[1], chunk=np.arange(128, 4097, 256), prefix=np.arange(0, 4097, 256)), [(32, 8)])
    return pd.concat(
        [table(new, prefill_law(new, 0.6)), table(old, prefill_law(old, 0.3), OLD)],
        ignore_index=True,
    )


@cache
def decode_rows() -> pd.DataFrame:
    columns = grid(batch_size=[1, 2, 4, 8, 16, 32, 64, 128, 256], length=2 ** np.arange(4, 15))
    columns["kv_tokens"] = columns["batch_size"] * columns.pop("length")
    rows = with_heads(columns, HEADS)
    return table(rows, decode_law(rows))


@cache
def prefill() -> AttentionPrefill:
    return AttentionPrefill(DEVICE).fit(prefill_rows())


@cache
def decode() -> AttentionDecode:
    return AttentionDecode(DEVICE).fit(decode_rows())


def one(**columns: Any) -> dict[str, Any]:
    """Rows that differ in one column, of a grouped-query configuration."""
    return {"batch_size": 1, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128} | columns


def error(model: AttentionPrefill | AttentionDecode, rows: pd.DataFrame, **more: Any) -> float:
    """Mean absolute percentage error, as a fraction."""
    assert len(rows)
    columns = {name: rows[name].to_numpy() for name in model.columns}
    return float(np.abs(model.seconds(columns | more) / (rows["time_ms"].to_numpy(float) / 1e3) - 1).mean())


def test_a_known_law_is_recovered() -> None:
    rows = prefill_rows()
    assert error(prefill(), rows, kernel=kernel_names(rows)) < 0.03
    assert error(decode(), decode_rows()) < 0.03


def test_head_configurations_left_out() -> None:
    for model, rows in ((AttentionPrefill, prefill_rows()), (AttentionDecode, decode_rows())):
        out = (rows["num_heads"] == 16) & (rows["num_kv_heads"] == 4)
        assert error(model(DEVICE).fit(rows[~out]), rows[out]) < 0.08


def test_prefixes_carry_over_from_another_kernel() -> None:
    """The law holds for prefixes of the new kernel, which was never measured with any."""
    rows = with_heads(grid(batch_size=[1], chunk=[256, 512, 2048], prefix=[0, 512, 1024, 4096]), [(32, 8), (16, 4)])
    assert error(prefill(), table(rows, prefill_law(rows, 0.6))) < 0.25
    slow = prefill().seconds(one(chunk=512, prefix=np.array([2048]), kernel=OLD))
    assert slow == pytest.approx(2 * prefill().seconds(one(chunk=512, prefix=np.array([2048]))), rel=0.35)


def test_the_kernel_is_chosen() -> None:
    assert prefill().default_ == NEW
    assert sorted(prefill().to_json()["kernels"]) == [NEW, OLD]
    where = one(chunk=np.array([1024]), prefix=0)
    chosen = AttentionPrefill.from_json(prefill().to_json() | {"kernel": OLD}, DEVICE)
    assert chosen.seconds(where) == prefill().seconds({**where, "kernel": OLD})
    assert chosen.seconds(where) > 1.5 * prefill().seconds(where)
    with pytest.raises(InputError, match="old"):
        prefill().seconds({**where, "kernel": "engine/odd"})


def test_written_and_read_again_it_predicts_the_same() -> None:
    for model, rows in ((prefill(), prefill_rows()), (decode(), decode_rows())):
        again = type(model).from_json(json.loads(json.dumps(model.to_json())), DEVICE)
        columns = {name: rows[name].to_numpy() for name in model.columns}
        assert np.array_equal(model.seconds(columns), again.seconds(columns))
        assert np.array_equal(model.in_range(columns), again.in_range(columns))
        assert again.to_json() == model.to_json()


def test_the_same_rows_give_the_same_model() -> None:
    assert AttentionDecode(DEVICE).fit(decode_rows()).to_json() == decode().to_json()


def test_times_rise_beyond_the_measured_range() -> None:
    far = np.unique(np.geomspace(1, 64, 60).round(3))
    beyond = [
        prefill().seconds(one(chunk=np.ceil(8192 * far), prefix=0)),
        prefill().seconds(one(chunk=np.ceil(8192 * far), prefix=3000)),
        prefill().seconds(one(chunk=512, prefix=np.ceil(4096 * far))),
        prefill().seconds(one(batch_size=np.ceil(32 * far), chunk=512, prefix=0)),
        decode().seconds(one(batch_size=8, kv_tokens=np.ceil(8 * 16384 * far))),
        decode().seconds(one(batch_size=np.ceil(256 * far), kv_tokens=np.ceil(256 * far) * 1024)),
    ]
    for seconds in beyond:
        assert (np.diff(seconds) >= 0).all()
        assert seconds[-1] > 20 * seconds[0]


def test_never_below_the_roofline() -> None:
    rows = with_heads(grid(batch_size=[1, 64], chunk=[1, 100, 5000, 10**5], prefix=[0, 10, 10**6]), [(4, 4), (128, 1)])
    seconds = prefill().seconds({name: rows[name].to_numpy() for name in prefill().columns})
    flops, moved = prefill_work(rows)
    assert (seconds >= np.maximum(flops / DEVICE.peak_flops, moved / DEVICE.memory_bandwidth) * (1 - 1e-12)).all()
    rows = with_heads(grid(batch_size=[1, 4096], kv_tokens=[4096, 10**8]), [(4, 4), (128, 1)])
    seconds = decode().seconds({name: rows[name].to_numpy() for name in decode().columns})
    assert (seconds >= decode_bytes(rows) / DEVICE.memory_bandwidth * (1 - 1e-12)).all()


def test_in_range() -> None:
    chunks = np.array([16, 512, 8192, 8193, 15])
    assert prefill().in_range(one(chunk=chunks, prefix=0)).tolist() == [True, True, True, False, False]
    prefixes = np.array([0, 512, 3840, 4097])
    assert prefill().in_range(one(chunk=512, prefix=prefixes)).tolist() == [True, False, False, False]
    of_old = one(chunk=128, prefix=prefixes, kernel=OLD)  # each kernel by what it was measured at itself
    assert prefill().in_range(of_old).tolist() == [True, True, True, False]
    assert not prefill().in_range(one(chunk=512, prefix=0, num_heads=np.array([64])))[0]
    assert not prefill().in_range(one(chunk=512, prefix=0, head_dim=np.array([64])))[0]
    assert prefill().in_range(one(chunk=512, prefix=0, num_heads=np.array([16]), num_kv_heads=4))[0]
    kv_tokens = np.array([16, 16384, 16385])
    assert decode().in_range(one(kv_tokens=kv_tokens)).tolist() == [True, True, False]


def test_no_rows_is_an_error() -> None:
    with pytest.raises(InputError, match="attention_decode"):
        AttentionDecode(DEVICE).fit(decode_rows().head(0))


# -- public measurements -------------------------------------------------------------------------------------------


@cache
def measured() -> pd.DataFrame:
    tables = [
        read_source("vidur", DATA / "vidur/profiling/compute/a100/meta-llama/Llama-2-70b-hf", "a100_pcie"),
        read_source("aiconfigurator", DATA / "aiconfigurator" / "a100_sxm"),
    ]
    return pd.concat(tables, ignore_index=True)


def left_out(model: type[AttentionPrefill] | type[AttentionDecode], heads: tuple[int, int]) -> float:
    """The error over times above 20 us of a head configuration that nothing was learned from."""
    rows = measured()[measured()["kind"] == model.kind].reset_index(drop=True)
    out = ((rows["num_heads"] == heads[0]) & (rows["num_kv_heads"] == heads[1])).to_numpy(bool)
    fitted = model(catalog.device("a100_sxm")).fit(rows[~out])
    long = out & (rows["time_ms"] > 0.02).to_numpy(bool) & (rows["device"] == "a100_sxm").to_numpy(bool)
    return error(fitted, rows[long])


@real
def test_public_prefill_of_head_configurations_left_out() -> None:
    errors = [left_out(AttentionPrefill, heads) for heads in ((32, 8), (64, 8), (8, 1), (16, 4), (32, 32), (12, 2))]
    assert np.mean(errors) < 0.05
    assert max(errors) < 0.10


@real
def test_public_decode_of_head_configurations_left_out() -> None:
    errors = [left_out(AttentionDecode, heads) for heads in ((32, 8), (64, 8), (8, 1), (16, 4), (4, 4), (12, 2))]
    assert np.mean(errors) < 0.04
    assert max(errors) < 0.10


@real
def test_public_prefill_with_prefixes_left_out() -> None:
    """Every fourth chunk of the kernel that was measured with prefixes, held out whole."""
    rows = measured()[measured()["kind"] == "attention_prefill"].reset_index(drop=True)
    old = (rows["device"] == "a100_pcie").to_numpy(bool)
    chunks = np.unique(rows["chunk"][old].to_numpy(int))
    out = old & np.isin(rows["chunk"].to_numpy(int), chunks[1:-1:4])
    fitted = AttentionPrefill(catalog.device("a100_sxm")).fit(rows[~out])
    assert error(fitted, rows[out], kernel=kernel_names(rows[out])) < 0.05
    assert len(json.dumps(fitted.to_json(), indent=1)) < 300_000
