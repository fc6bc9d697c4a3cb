"""Fitting host overheads, and what the predictors make of them."""

from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from engine.errors import InputError
from engine.scheduling.request import BatchShape
from engine.specs import HostOverhead, ParallelSpec, catalog
from profiler import table
from profiler.importers import vidur
from simulator.predictor import host
from simulator.predictor.roofline import Roofline

PUBLIC = Path(__file__).parents[2] / "shared" / "data" / "vidur" / "profiling" / "cpu_overheads"
LAW = HostOverhead(name="law", iteration_s=2e-3, sequence_s=50e-6, layer_s=0.3e-3, message_s=4e-3, source="for tests")
PHI, LLAMA = "microsoft/phi-2", "meta-llama/Llama-2-7b-hf"  # 32 layers each
SHARES = {"schedule": 0.1, "prepare_inputs": 0.2, "sampler": 0.3, "process_outputs": 0.3, "ray_comm": 0.1}


def measured(
    models: tuple[str, ...] = (PHI, LLAMA),
    ranks: tuple[int, ...] = (1, 2, 4),
    batches: tuple[int, ...] = (8, 16, 32, 64, 128),
    launch: str = "model_execution_launch",
    gpu_ms: float = 0.0,
) -> pd.DataFrame:
    """Host rows that follow LAW; each component has a share of what is added, the message its own."""
    rows = []
    for model, tp, batch in product(models, ranks, batches):
        own = 1e3 * (LAW.iteration_s + LAW.sequence_s * batch)
        times = {name: share * own for name, share in SHARES.items()}
        times["ray_comm"] += 1e3 * LAW.message_s * (tp > 1)
        times[launch] = 1e3 * 32 * LAW.layer_s * (1 if tp == 1 else 3) + gpu_ms * batch
        rows += [(name, model, tp, batch, time) for name, time in times.items()]
    columns = ["operator", "model", "tensor_parallel_size", "batch_size", "time_ms"]
    return table.validate(
        pd.DataFrame(rows, columns=columns).assign(kind="host", device="a100_pcie", source="a law"), "the test's table"
    )


def constants(overhead: HostOverhead) -> tuple[float, float, float, float]:
    return overhead.iteration_s, overhead.sequence_s, overhead.message_s, overhead.layer_s


# -- the fit -----------------------------------------------------------------------------------------------------------


def test_a_known_law_is_found_again() -> None:
    found = host.fit(measured(), name="mine")
    assert constants(found.overhead) == pytest.approx(constants(LAW), rel=1e-6)
    assert found.overhead.name == "mine" and found.overhead.source == "fitted to a law"
    assert (found.held_out, found.launch, found.iterations) == ("model", "measured", 30)
    assert found.held_out_error == pytest.approx(0, abs=1e-6)


def test_launching_is_shared_out_over_the_layers_that_were_run() -> None:
    assert host.fit(measured(), layers=1).overhead.layer_s == pytest.approx(32 * LAW.layer_s)


def test_outliers_and_noise_hardly_move_it() -> None:
    frame = measured()
    noisy = frame["time_ms"] * np.random.default_rng(0).normal(1, 0.02, len(frame))
    noisy[frame["batch_size"].eq(32) & frame["model"].eq(PHI)] *= 3
    found = host.fit(frame.assign(time_ms=noisy))
    assert constants(found.overhead) == pytest.approx(constants(LAW), rel=0.05)
    assert found.held_out_error > 0.05  # the outliers are in what is held out


def test_without_one_rank_the_messages_constant_is_the_messages() -> None:
    found = host.fit(measured(ranks=(2, 4))).overhead
    assert found.iteration_s == pytest.approx(0.9 * LAW.iteration_s)  # ray_comm's share went over
    assert found.message_s == pytest.approx(LAW.message_s + 0.1 * LAW.iteration_s)
    for batch in (1, 64):
        assert found.times(0, batch, 2)[1] == pytest.approx(LAW.times(0, batch, 2)[1])


def test_execution_that_contains_the_gpu_only_bounds_launching() -> None:
    found = host.fit(measured(ranks=(1,), launch="model_execution", gpu_ms=0.1))
    assert found.launch == "upper bound"
    assert found.overhead.layer_s == pytest.approx(LAW.layer_s + 0.1e-3 * 8 / 32)


def test_no_coefficient_is_negative() -> None:
    frame = measured()
    falling = frame["time_ms"].where(frame["operator"] != "ray_comm", 10.0 / frame["batch_size"].astype(float))
    assert min(constants(host.fit(frame.assign(time_ms=falling)).overhead)) >= 0


@pytest.mark.parametrize("models", [(PHI,), (PHI, LLAMA)])
def test_the_error_is_of_what_the_fit_did_not_see(models: tuple[str, ...]) -> None:
    frame = measured(models)
    # one batch size, or one model, takes twice as long: leaving it out must show it
    odd = frame["batch_size"] == 128 if len(models) == 1 else frame["model"] == LLAMA
    found = host.fit(frame.assign(time_ms=frame["time_ms"].where(~odd, 2 * frame["time_ms"])))
    assert found.held_out == ("batch size" if len(models) == 1 else "model")
    assert found.held_out_error > (0.1 if len(models) == 1 else 0.5)


def test_a_fit_says_what_it_lacks() -> None:
    frame = measured()
    with pytest.raises(InputError, match="no host rows of sampler"):
        host.fit(frame[frame["operator"] != "sampler"])
    with pytest.raises(InputError, match="what launching takes"):
        host.fit(frame[frame["operator"] != "model_execution_launch"])
    with pytest.raises(InputError, match="one batch size"):
        host.fit(measured(batches=(8,)))
    with pytest.raises(InputError, match="takes a third"):
        host.fit(measured((PHI,), batches=(8, 16)))


@pytest.mark.skipif(not PUBLIC.is_dir(), reason=f"needs Vidur's tables in {PUBLIC}")
def test_the_catalog_holds_what_the_public_tables_give() -> None:
    osdi = host.fit(vidur.read(PUBLIC / "a100_codellama34b_tp2.csv", "a100_sxm"))
    later = vidur.read(PUBLIC / "a100.csv", "a100_sxm")
    eager = host.fit(later[later["tensor_parallel_size"] == 1], layers=1)
    launch = host.fit(vidur.read(PUBLIC / "a40.csv", "a40"), layers=1)
    assert launch.launch == eager.launch == "measured" and osdi.launch == "upper bound"
    layer_s = launch.overhead.layer_s
    assert layer_s < osdi.overhead.layer_s == pytest.approx(0.602e-3, rel=1e-3)
    for name, found in (("sarathi_osdi24", osdi), ("eager", eager)):
        expected = (*constants(found.overhead)[:3], layer_s)
        assert constants(catalog.host_overhead(name)) == pytest.approx(expected, rel=1e-3), name
        assert found.held_out_error < 0.02


# -- what it does to an iteration --------------------------------------------------------------------------------------


def test_stages_launch_their_layers_and_the_first_pays_the_rest() -> None:
    assert LAW.times(10, 3, 1) == pytest.approx((3e-3, 2e-3 + 150e-6))
    assert LAW.times(10, 3, 2) == pytest.approx((3e-3, 2e-3 + 150e-6 + 4e-3))
    assert LAW.times(10, 3, 8) == LAW.times(10, 3, 2)
    assert LAW.times(10, 3, 2, stage=1) == pytest.approx((3e-3, 0.0))


@pytest.mark.parametrize("overhead", catalog.HOST_OVERHEADS.values(), ids=str)
def test_more_never_takes_less(overhead: HostOverhead) -> None:
    for vary in ("layers", "sequences", "ranks"):
        shapes = [{"layers": 32, "sequences": 16, "ranks": 2} | {vary: value} for value in (1, 2, 4, 128)]
        for less, more in pairwise(overhead.times(**shape) for shape in shapes):
            assert less[0] <= more[0] and less[1] <= more[1]


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("layer_s", [0.0, 1e-3, 1.0])
def test_a_stage_takes_the_longer_of_gpu_and_launch_and_what_is_added(tp: int, pp: int, layer_s: float) -> None:
    model, parallel = catalog.model(LLAMA), ParallelSpec(tensor_parallel_size=tp, pipeline_parallel_size=pp)
    device, network = catalog.device("a100"), catalog.network("pairwise_nvlink")
    free = HostOverhead(name="free", iteration_s=0.0, sequence_s=0.0, layer_s=0.0, source="for tests")
    slow = HostOverhead(
        name="slow", iteration_s=0.2, sequence_s=0.01, layer_s=layer_s, message_s=0.5, source="for tests"
    )
    gpu, loaded = (Roofline(model, device, network, parallel, overhead) for overhead in (free, slow))
    shape = BatchShape(4 + 256, 4, 4000, ((256, 100),), 5, 4)
    for stage in range(pp):
        launch = layer_s * 32 / pp
        added = 0.2 + 5 * 0.01 + 0.5 * (tp * pp > 1) if stage == 0 else 0.0
        expected = max(gpu.stage_time(shape, stage), launch) + added
        assert loaded.stage_time(shape, stage) == pytest.approx(expected)
