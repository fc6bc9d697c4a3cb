"""The GEMM estimator on a device whose law is known, and at its edges."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from engine.specs import catalog
from simulator.predictor.forest import Forest
from simulator.predictor.gemm import Gemm, roofline

A100 = catalog.device("a100")
DATA = Path(__file__).parents[2] / "shared" / "data"


def law(m: np.ndarray, k: np.ndarray, n: np.ndarray) -> np.ndarray:
    """A launch, and tiles of 128 x 128 in waves over the SMs at 80 % of the peak, or 90 % of the bandwidth."""
    waves = np.ceil(np.ceil(m / 128) * np.ceil(n / 128) / A100.num_sms)
    compute = waves * A100.num_sms * 128 * 128 * 2 * k / (0.8 * A100.peak_flops)
    memory = 2 * (m * k + k * n + m * n) / (0.9 * A100.memory_bandwidth)
    return 3e-6 + np.maximum(compute, memory)


def rows(seed: int, count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    m = np.exp(rng.uniform(0, np.log(4096), count)).round()
    k, n = (128 * rng.integers(8, 160, count).astype(float) for _ in range(2))
    return {"m": m, "k": k, "n": n}


@pytest.fixture(scope="module")
def model() -> Gemm:
    columns = rows(0, 6000)
    return Gemm(A100).fit(pd.DataFrame({**columns, "time_ms": 1e3 * law(**columns)}))


def test_a_known_law_is_recovered_on_shapes_never_seen(model: Gemm) -> None:
    columns = rows(1, 2000)
    error = np.abs(model.seconds(columns) / law(**columns) - 1)
    assert error.mean() < 0.04
    assert np.percentile(error, 95) < 0.12


def test_no_prediction_beats_the_device(model: Gemm) -> None:
    columns = {name: np.array([1.0, 7, 512, 1e5, 1e6, 3]) for name in ("m", "k", "n")}
    assert (model.seconds(columns) >= roofline(**columns, device=A100)).all()


def test_past_the_measured_sizes_time_goes_on_in_proportion_to_the_roofline(model: Gemm) -> None:
    columns = {"m": np.array([model.limits_[0][1], 8192, 65536]), "k": np.full(3, 4096.0), "n": np.full(3, 4096.0)}
    ratio = model.seconds(columns) / roofline(**columns, device=A100)
    assert ratio == pytest.approx(np.full(3, ratio[0]), rel=0.15)  # but for the launch and the last wave
    assert (np.diff(model.seconds(columns)) > 0).all()
    assert model.in_range(columns).tolist() == [True, False, False]


def test_what_is_written_predicts_the_same_to_the_last_bit(model: Gemm) -> None:
    columns = rows(2, 500)
    again = Gemm.from_json(model.to_json(), A100)
    assert (again.seconds(columns) == model.seconds(columns)).all()
    assert again.to_json() == model.to_json()


def test_the_same_rows_give_the_same_model() -> None:
    columns = rows(0, 800)
    frame = pd.DataFrame({**columns, "time_ms": 1e3 * law(**columns)})
    assert Gemm(A100).fit(frame).to_json() == Gemm(A100).fit(frame).to_json()


def test_boosted_trees_are_read_as_they_were_written_and_keep_close_values_apart() -> None:
    x = np.repeat([[12.0, 0.0], [12.00035, 1.0], [3.0, 2.0]], 40, axis=0)  # log2 of 4096, of 4097
    y = np.repeat([0.1, 0.6, -0.3], 40)
    forest = Forest.boost(x, y, trees=12, max_leaf_nodes=4, min_samples_leaf=2, learning_rate=0.5)
    assert forest.predict(x) == pytest.approx(y, abs=0.01)
    again = Forest.from_lines(forest.to_lines())
    assert (again.predict(x) == forest.predict(x)).all() and again.to_lines() == forest.to_lines()


def test_a_card_whose_cache_holds_layers_is_learned_by_boosted_trees_the_same_each_time() -> None:
    columns = rows(0, 60)
    frame = pd.DataFrame({**columns, "time_ms": 1e3 * law(**columns)})
    first, second = (Gemm(catalog.device("l40s")).fit(frame) for _ in range(2))
    assert first.to_json() == second.to_json()
    assert len(first.forest_.to_lines()) == 100 != len(Gemm(A100).fit(frame).forest_.to_lines())


@pytest.mark.parametrize("line", ["3:0.5 1.0", "3:0.5 1.0 2.0 3.0", "3:x 1 2", ""])
def test_a_forest_says_what_is_wrong_with_its_text(line: str) -> None:
    with pytest.raises(ValueError, match=r"tree|float"):
        Forest.from_lines([line])


def test_a_forest_is_read_as_it_was_written() -> None:
    x = np.random.default_rng(0).random((500, 4)).astype(np.float32).astype(float)
    forest = Forest.fit(x, x[:, 0] * x[:, 1], trees=3, max_leaf_nodes=40)
    again = Forest.from_lines(forest.to_lines())
    assert (again.predict(x) == forest.predict(x)).all()
    assert (again.right == forest.right).all()


@pytest.mark.skipif(not DATA.exists(), reason="the public tables are not here")
@pytest.mark.parametrize(("device", "left_out", "most"), [("a100_pcie", "codellama/CodeLlama-34b-Instruct-hf", 0.04)])
def test_a_model_left_out_is_predicted(device: str, left_out: str, most: float) -> None:
    from profiler.importers import read_source

    frame = read_source("vidur", DATA / "vidur" / "profiling" / "compute", device=device)
    frame = frame[frame["kind"] == "gemm"].reset_index(drop=True)
    out = (frame["model"] == left_out).to_numpy()
    assert out.sum() > 1000
    model = Gemm(catalog.device(device)).fit(frame[~out].reset_index(drop=True))
    predicted = model.seconds({name: frame[name][out].to_numpy() for name in model.columns})
    measured = frame["time_ms"][out].to_numpy() / 1e3
    assert np.abs(predicted / measured - 1).mean() < most
