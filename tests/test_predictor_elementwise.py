"""The elementwise estimator: known laws, what must hold for any fit, and public measurements where they are."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from engine.errors import InputError
from engine.results.tables import Array
from engine.specs import catalog
from profiler.importers import read_source
from simulator.predictor.curves import Curve, isotonic
from simulator.predictor.elementwise import Elementwise

DATA = Path(__file__).parents[2] / "shared" / "data"
real = pytest.mark.skipif(not (DATA / "vidur").exists(), reason="the public tables are not here")

DEVICE = catalog.device("a40")
SHARES = {"input_norm": 0.5, "rotary": 0.7, "mlp_residual_add": 0.9}  # of the bandwidth that each attains


def law(sizes: Array, share: float) -> Array:
    """Seconds: a launch, and bytes over the bandwidth attained."""
    return 3e-6 + sizes / (share * DEVICE.memory_bandwidth)


@cache
def rows() -> pd.DataFrame:
    """Two widths, times noisy by 2 % and now and then twice as long."""
    rng = np.random.default_rng(0)
    parts = []
    for name, share in SHARES.items():
        for width in (8192, 20480):
            count = np.unique(np.geomspace(1, 32768, 400).astype(int))
            seconds = law(count * float(width), share) * rng.lognormal(0, 0.02, len(count))
            seconds *= np.where(rng.random(len(count)) < 0.1, 2, 1)
            columns = {"operator": name, "rows": count, "bytes_per_row": width, "time_ms": seconds * 1e3}
            parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


@cache
def fitted() -> Elementwise:
    return Elementwise(DEVICE).fit(rows())


def ask(operator: str, count: Any, width: int = 10240) -> dict[str, Any]:
    return {"operator": np.full(len(count), operator, dtype=object), "rows": count, "bytes_per_row": width}


def test_a_known_law_is_recovered_at_another_width() -> None:
    count = np.unique(np.geomspace(1, 32768, 300).astype(int))
    for name, share in SHARES.items():
        assert fitted().seconds(ask(name, count)) == pytest.approx(law(count * 10240.0, share), rel=0.08)


def test_operators_of_the_same_kernel_share_a_curve() -> None:
    count = np.array([1, 100, 10000])
    for name, same in (("attention_residual_add", "mlp_residual_add"), ("final_norm", "input_norm"),
                       ("post_attention_norm", "input_norm")):  # fmt: skip
        assert np.array_equal(fitted().seconds(ask(name, count)), fitted().seconds(ask(same, count)))
        assert fitted().in_range(ask(name, count)).all()


def test_an_operator_never_measured_takes_the_middle_one() -> None:
    count = np.array([100, 1000, 10000])
    middle = law(count * 10240.0, sorted(SHARES.values())[1])
    assert fitted().seconds(ask("kv_write", count)) == pytest.approx(middle, rel=0.15)
    assert not fitted().in_range(ask("kv_write", count)).any()


def test_several_operators_at_once() -> None:
    names = np.array(["rotary", "input_norm", "kv_write", "rotary"], dtype=object)
    count = np.array([7, 70, 700, 7000])
    seconds = fitted().seconds({"operator": names, "rows": count, "bytes_per_row": 8192})
    single = [fitted().seconds(ask(str(name), count[[i]], 8192))[0] for i, name in enumerate(names)]
    assert seconds.tolist() == single


def test_rising_and_never_below_the_bandwidth() -> None:
    count = np.unique(np.geomspace(1, 10**7, 2000).astype(int))
    for name in (*SHARES, "sampler"):
        seconds = fitted().seconds(ask(name, count))
        assert (np.diff(seconds) >= 0).all()
        assert (seconds >= count * 10240 / DEVICE.memory_bandwidth).all()
    far = fitted().seconds(ask("rotary", np.array([10**6, 10**7])))
    assert far[1] == pytest.approx(10 * far[0])


def test_in_range() -> None:
    count = np.array([1, 32768 * 2, 32768 * 2 + 1])
    assert fitted().in_range(ask("rotary", count)).tolist() == [True, True, False]
    assert not fitted().in_range(ask("rotary", np.array([1]), 100))[0]


def test_written_and_read_again_it_predicts_the_same() -> None:
    again = Elementwise.from_json(json.loads(json.dumps(fitted().to_json())), DEVICE)
    columns = {name: rows()[name].to_numpy() for name in Elementwise.columns}
    assert np.array_equal(again.seconds(columns), fitted().seconds(columns))
    assert np.array_equal(again.in_range(columns), fitted().in_range(columns))
    assert again.to_json() == fitted().to_json()


def test_no_rows_is_an_error() -> None:
    with pytest.raises(InputError, match="elementwise"):
        Elementwise(DEVICE).fit(rows().head(0))


def test_isotonic_pools_what_falls() -> None:
    flat = np.ones(6)
    assert isotonic(np.array([1.0, 2, 3, 4, 5, 6]), flat).tolist() == [1, 2, 3, 4, 5, 6]
    assert isotonic(np.array([1.0, 9, 2, 3, 4, 10]), flat).tolist() == [1, 3, 3, 3, 4, 10]  # the outlier lifts none
    assert isotonic(np.array([3.0, 2, 1, 1, 1, 1]), flat).tolist() == [1] * 6
    assert (np.diff(isotonic(np.random.default_rng(0).normal(size=200), np.ones(200))) >= 0).all()


def test_a_curve_goes_through_the_medians() -> None:
    sizes = np.repeat([1e3, 1e4, 1e5], 5)
    seconds = np.tile([0.9, 1.0, 1.0, 1.1, 50.0], 3) * sizes
    curve = Curve.fit(sizes, seconds)
    assert curve(np.array([1e3, 1e4, 1e5])) == pytest.approx([1e3, 1e4, 1e5])
    assert curve(np.array([10.0, 3162.28, 1e6])) == pytest.approx([1e3, 3162.28, 1e6], rel=1e-4)


# -- public measurements -------------------------------------------------------------------------------------------


@real
@pytest.mark.parametrize("model", ["meta-llama/Llama-2-70b-hf", "codellama/CodeLlama-34b-Instruct-hf"])
def test_public_model_left_out(model: str) -> None:
    table = read_source("vidur", DATA / "vidur" / "profiling" / "compute", "a40")
    table = table[table["kind"] == "elementwise"].reset_index(drop=True)
    out = (table["model"] == model).to_numpy(bool)
    learned = Elementwise(DEVICE).fit(table[~out])
    held = table[out]
    measured = held["time_ms"].to_numpy(float) / 1e3
    predicted = learned.seconds({name: held[name].to_numpy() for name in Elementwise.columns})
    relative = np.abs(predicted / measured - 1)
    assert relative[measured > 20e-6].mean() < 0.05
    assert relative.mean() < 0.10


def test_messages_measured_an_octave_apart_take_a_latency_and_their_bytes_in_between() -> None:
    sizes = 2.0 ** np.arange(10, 24)
    seconds = 8e-6 + sizes / 2e11
    between = np.sqrt(sizes[1:] * sizes[:-1])
    curve = Curve.fit(sizes, seconds, knots_per_octave=4)
    assert curve.of_messages(between) == pytest.approx(8e-6 + between / 2e11, rel=1e-3)
    assert (curve.of_messages(between) <= curve(between) * (1 + 1e-9)).all()
    dense = 2.0 ** np.arange(10, 24, 0.25)
    curve = Curve.fit(dense, 8e-6 + dense / 2e11, knots_per_octave=4)
    assert (curve.of_messages(between) == curve(between)).all()
