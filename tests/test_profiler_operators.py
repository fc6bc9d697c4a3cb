"""The engine's operators on the bench and where they stand: every one of every family, at the sizes asked for."""

from collections.abc import Iterable
from itertools import cycle
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch

from engine.runtime.engine_spec import EngineSpec
from engine.specs import ModelSpec, ParallelSpec, hf_config
from profiler.collectives import Ranks
from profiler.in_situ import InSitu, Reference
from profiler.points import Limits, points
from profiler.timer import CudaTimer
from profiler.workbench import Workbench

LIMITS = Limits(max_tokens=40, max_requests=6, max_length=24, kv_tokens=96)
FAMILIES = [
    "llama",
    "mistral",
    "qwen2",
    "falcon_new",
    "falcon_multi_query",
    "falcon_multi_head",
    "phi",
    "qwen3",
    "mixtral",
    "qwen3_moe",
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterable[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model_of(name: str, folder: Path) -> ModelSpec:
    checkpoints.write(folder, name)
    return hf_config.read(folder).in_dtype("float32")


def rows_of(point: dict[str, Any]) -> int:
    if point["kind"] == "attention_prefill":
        return int(point["chunk"])
    return int(point.get("m") or point.get("rows") or point.get("expert_tokens") or point["batch_size"])


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_operator_runs_on_the_bench_at_its_size(name: str, tp: int, tmp_path: Path) -> None:
    model = model_of(name, tmp_path)
    bench = Workbench(model, tp, torch.device("cpu"), torch.float32, "sdpa", 4, LIMITS)
    seen = 0
    for point in points(model, tp, LIMITS):
        calls = bench.calls(point)
        assert calls
        with torch.inference_mode():
            out = calls[-1]()
        if isinstance(out, tuple):  # the sum and its norm
            out = out[0]
        assert isinstance(out, torch.Tensor)
        assert out.shape[0] == rows_of(point)
        assert not out.is_floating_point() or torch.isfinite(out).all()
        if point["kind"] == "gemm":
            assert out.shape[1] == point["n"]
        seen += 1
    assert seen > 50


def test_decodes_of_more_tokens_than_the_caches_hold_share_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("profiler.workbench.KV_BYTES", 1)
    model = model_of("llama", tmp_path)
    bench = Workbench(model, 1, torch.device("cpu"), torch.float32, "sdpa", 4, LIMITS)
    assert bench.limits.kv_tokens < LIMITS.kv_tokens
    decodes = [point for point in points(model, 1, LIMITS) if point["kind"] == "attention_decode"]
    assert max(int(point["kv_tokens"]) for point in decodes) > bench.limits.kv_tokens
    for point in decodes:
        out = bench.calls(point)[0]()
        assert isinstance(out, torch.Tensor) and torch.isfinite(out).all()


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", ["llama", "falcon_new", "phi", "qwen3_moe"])
def test_every_operator_is_timed_where_it_stands(name: str, tp: int, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("profiler.in_situ.BUDGET_S", 0.0)
    model = model_of(name, tmp_path)
    spec = EngineSpec(
        model=model, folder=None, device="cpu", max_num_seqs=6, max_model_len=24, max_batch_tokens=40,
        block_size=4, parallel=ParallelSpec(tensor_parallel_size=tp), num_blocks=30,
    )  # fmt: skip
    standing = InSitu(spec, Reference())
    every = list(points(model, tp, LIMITS))
    times = [standing.measure(point) for point in every]
    assert all(0 < timing.seconds < 1 and timing.repeats >= 4 for timing in times)
    by_name = {str(point["operator"]): timing for point, timing in zip(every, times, strict=True)}
    assert {"qkv_proj", "attention_prefill", "attention_decode", "lm_head", "sampler"} <= set(by_name)


def test_a_pass_is_the_sum_of_its_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that ticks at each look: what any operator takes is in exactly one time."""
    model = model_of("llama", tmp_path)
    spec = EngineSpec(
        model=model, folder=None, device="cpu", max_num_seqs=6, max_model_len=24, max_batch_tokens=40,
        block_size=4, num_blocks=30,
    )  # fmt: skip
    standing = InSitu(spec, Reference())
    ticks = iter(range(10**9))
    monkeypatch.setattr("profiler.in_situ.time.perf_counter", lambda: float(next(ticks)))
    monkeypatch.setattr(standing.reference, "drift", lambda: 1.0)
    monkeypatch.setattr("profiler.in_situ.BUDGET_S", 0.0)
    every = [point for point in points(model, 1, LIMITS) if point.get("m") == 6 or point.get("rows") == 6]
    assert every
    for point in every:
        standing._seen.clear()
        timing = standing.measure(point)
        assert timing.seconds == 1.0  # one look at the clock for each operator, so one tick each
        assert timing.spread_s == 0.0


def test_ranks_measure_together_and_end_with_their_owner() -> None:
    ranks = Ranks(2, "cpu")
    processes = ranks._processes
    for kind, num_bytes in (("all_reduce", 4096), ("send", 64), ("all_reduce", 1)):
        timing = ranks.measure(kind, num_bytes)
        assert 0 < timing.seconds < 5 and timing.repeats == 25
    del ranks
    for process in processes:
        process.join(10)
        assert process.exitcode is not None


@pytest.mark.parametrize("seconds", [2e-6, 30e-6, 5e-3])
def test_the_timer_takes_events_off_what_it_times(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU where an event takes as long as a short call does."""
    now = 0.0

    def spend(time: float) -> None:
        nonlocal now
        now += time

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = now
            spend(1.5e-6)

        def elapsed_time(self, end: "Event") -> float:
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: spend(cycles * 1e-9))
    timing = CudaTimer().measure([lambda: spend(seconds)] * 3)
    assert timing.seconds == pytest.approx(seconds, rel=0.03)
    assert timing.repeats >= 8


def test_the_timer_sleeps_as_long_as_it_means_to_on_a_gpu_that_was_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clock runs at 0.3 GHz for the first 60 ms of work, then at 2 GHz."""
    now = 0.0

    def sleep(cycles: float) -> None:
        nonlocal now
        slow = min(cycles / 0.3e9, max(0.0, 0.06 - now))  # s
        now += slow + (cycles - slow * 0.3e9) / 2e9

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = now

        def elapsed_time(self, end: "Event") -> float:
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    timer = CudaTimer()
    assert now < 0.5
    began = now = 1.0
    timer._run(cycle([lambda: None]), count=5, group=4)
    assert now - began == pytest.approx(20 * CudaTimer.LEAD_S, rel=0.01)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_timer_sees_the_gpus_time_and_not_the_hosts() -> None:
    timer = CudaTimer()
    short, long = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for n in (256, 8192))
    quick, slow = timer.measure([lambda: short @ short]), timer.measure([lambda: long @ long])
    assert quick.seconds < 50e-6  # a launch alone takes the host several microseconds more
    assert slow.seconds > 1e-3
