"""The estimators of collectives: known laws, what must hold for any fit, and public measurements where they are."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from engine.errors import InputError
from engine.results.tables import Array
from engine.specs import Link, NetworkSpec, catalog
from profiler.importers import read_source
from simulator.predictor.collectives import AllReduce, Send

DATA = Path(__file__).parents[2] / "shared" / "data"
real = pytest.mark.skipif(not (DATA / "vidur").exists(), reason="the public tables are not here")

DEVICE = catalog.device("a100_sxm")
NETWORK = NetworkSpec(
    name="made_up",
    description="made up",
    gpus_per_node=8,
    node=Link(2e-6, 100e9),
    internode=Link(20e-6, 10e9),
    source="made up",
)
SIZES = np.unique(np.geomspace(2048, 2**28, 500).astype(int))


def ring(sizes: Array, ranks: int) -> Array:
    """Seconds of the ring, with the latency of a tree."""
    return 10e-6 * np.log2(ranks) + 2 * (ranks - 1) / ranks * sizes / NETWORK.node.bandwidth_bytes_per_s


def table(ranks: int, seconds: Array, node: int | None = None, backend: str = "nccl") -> pd.DataFrame:
    columns = {"num_bytes": SIZES, "num_ranks": ranks, "ranks_per_node": node or ranks, "network": "made_up"}
    return pd.DataFrame({**columns, "backend": backend, "time_ms": seconds * 1e3})


def ask(sizes: Array, ranks: int, node: int | None = None, **more: Any) -> dict[str, Any]:
    return {"num_bytes": sizes, "num_ranks": ranks, "ranks_per_node": node or ranks, "network": "made_up"} | more


@cache
def all_reduce() -> AllReduce:
    """2 and 8 ranks; a tenth of the times are three times as long, as when two modes mix."""
    rng = np.random.default_rng(1)
    slow = [np.where(rng.random(len(SIZES)) < 0.1, 3, 1) * rng.lognormal(0, 0.02, len(SIZES)) for _ in range(2)]
    parts = [table(ranks, ring(SIZES, ranks) * factor) for ranks, factor in zip((2, 8), slow, strict=True)]
    parts.append(table(2, ring(SIZES, 2) / 2, backend="vllm_graph").iloc[::2])
    parts.append(table(2, ring(SIZES, 2) + 50e-6, backend="vllm_eager"))
    return AllReduce(DEVICE).fit(pd.concat(parts, ignore_index=True))


@cache
def send() -> Send:
    near = table(2, np.array([NETWORK.send_time(int(size), 0, 1) for size in SIZES]))
    far = table(2, np.array([NETWORK.send_time(int(size), 0, 8) for size in SIZES]), node=1)
    return Send(DEVICE).fit(pd.concat([near, far], ignore_index=True))


def test_known_laws_are_recovered_through_the_noise() -> None:
    for ranks in (2, 8):
        assert all_reduce().seconds(ask(SIZES, ranks)) == pytest.approx(ring(SIZES, ranks), rel=0.08)
    near = [NETWORK.send_time(int(size), 0, 1) for size in SIZES]
    far = [NETWORK.send_time(int(size), 0, 8) for size in SIZES]
    assert send().seconds(ask(SIZES, 2)) == pytest.approx(near, rel=0.04)
    assert send().seconds(ask(SIZES, 2, 1)) == pytest.approx(far, rel=0.04)


def test_rank_counts_never_measured() -> None:
    for ranks, rel in ((4, 0.12), (16, 0.08)):
        assert all_reduce().seconds(ask(SIZES, ranks)) == pytest.approx(ring(SIZES, ranks), rel=rel)
    assert all_reduce().seconds(ask(SIZES, 1)).tolist() == [0] * len(SIZES)


def test_times_rise_with_bytes_within_and_beyond() -> None:
    sizes = np.unique(np.geomspace(1, 2**34, 3000).astype(np.int64))
    for model, ranks in ((all_reduce(), 2), (all_reduce(), 3), (all_reduce(), 32), (send(), 2)):
        seconds = model.seconds(ask(sizes, ranks))
        assert (np.diff(seconds) >= 0).all()
        assert seconds[0] > 0
    assert all_reduce().seconds(ask(np.array([2**35]), 2)) == pytest.approx(ring(np.array([2**35]), 2), rel=0.05)


def test_the_kernel_is_chosen_and_eager_left_out() -> None:
    assert all_reduce().kernels_ == ["nccl", "vllm_graph"]
    where = ask(np.array([2**20]), 2)
    graph = all_reduce().seconds(where | {"kernel": "vllm_graph"})
    assert graph == pytest.approx(all_reduce().seconds(where) / 2, rel=0.1)
    other = AllReduce.from_json(all_reduce().to_json() | {"kernel": "vllm_graph"}, DEVICE)
    assert other.seconds(where) == graph
    with pytest.raises(InputError, match="vllm_eager"):
        all_reduce().seconds(where | {"kernel": "vllm_eager"})
    with pytest.raises(InputError, match="eager"):
        AllReduce(DEVICE).fit(table(2, ring(SIZES, 2), backend="vllm_eager"))


def test_another_network_is_an_error() -> None:
    where = ask(np.array([2**20]), 2) | {"network": "other"}
    assert all_reduce().networks_ == ["made_up"]
    assert not all_reduce().in_range(where)[0]
    with pytest.raises(InputError, match="made_up"):
        all_reduce().seconds(where)


def test_several_layouts_at_once() -> None:
    sizes, ranks = np.array([2**20, 2**12, 2**24, 2**20]), np.array([2, 8, 4, 1])
    columns = {"num_bytes": sizes, "num_ranks": ranks, "ranks_per_node": ranks, "network": "made_up"}
    single = [all_reduce().seconds(ask(sizes[[i]], int(ranks[i])))[0] for i in range(4)]
    assert all_reduce().seconds(columns).tolist() == single
    assert all_reduce().in_range(columns).tolist() == [True, True, False, False]


def test_in_range() -> None:
    sizes = np.array([2047, 2048, 2**28, 2**28 + 1])
    assert all_reduce().in_range(ask(sizes, 8)).tolist() == [False, True, True, False]
    assert not all_reduce().in_range(ask(sizes, 8, 4)).any()


def test_written_and_read_again_it_predicts_the_same() -> None:
    for model in (all_reduce(), send()):
        again = type(model).from_json(json.loads(json.dumps(model.to_json())), DEVICE)
        for ranks, node in ((2, 2), (2, 1), (4, 4), (16, 8)):
            columns = ask(SIZES, ranks, node)
            assert np.array_equal(again.seconds(columns), model.seconds(columns))
            assert np.array_equal(again.in_range(columns), model.in_range(columns))
        assert again.to_json() == model.to_json()


# -- public measurements -------------------------------------------------------------------------------------------


def every_second_size_left_out(model: type[AllReduce] | type[Send], rows: pd.DataFrame) -> float:
    """The error over the held-out sizes above 64 KiB."""
    rows = rows[(rows["kind"] == model.kind) & (rows["backend"] != "vllm_eager")].reset_index(drop=True)
    layout = [rows[name] for name in ("backend", "num_ranks", "ranks_per_node")]
    out = (rows["num_bytes"].groupby(layout).rank(method="dense") % 2 == 0).to_numpy(bool)
    held = rows[out & (rows["num_bytes"] > 2**16).to_numpy(bool)]
    columns = {name: held[name].to_numpy() for name in model.columns} | {"kernel": held["backend"].to_numpy(str)}
    predicted = model(DEVICE).fit(rows[~out]).seconds(columns)
    return float(np.abs(predicted / (held["time_ms"].to_numpy(float) / 1e3) - 1).mean())


@real
@pytest.mark.parametrize(
    ("source", "folder", "device", "model"),
    [
        ("vidur", "vidur/profiling/network", "a100_pcie", AllReduce),
        ("vidur", "vidur/profiling/network", "a100_pcie", Send),
        ("vidur", "vidur/profiling/network", "a40", AllReduce),
        ("vidur", "vidur/profiling/network", "a40", Send),
        ("aiconfigurator", "aiconfigurator/a100_sxm", "a100_sxm", AllReduce),
    ],
)
def test_public_sizes_left_out(source: str, folder: str, device: str, model: type[AllReduce] | type[Send]) -> None:
    assert every_second_size_left_out(model, read_source(source, DATA / folder, device)) < 0.10
