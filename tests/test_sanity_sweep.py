"""What must hold of any prediction, over the devices, models, layouts and dtypes that ship; properties, no numbers."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from engine.scheduling.request import BatchShape
from engine.specs import HostOverhead, ParallelSpec, catalog
from engine.specs.device_folder import known_devices
from simulator.predictor.attention import attended
from simulator.predictor.learned import Learned, carried_over, learned

HOST = HostOverhead(name="none", iteration_s=0.0, sequence_s=0.0, layer_s=0.0, source="for tests", kernels="vllm@0.19")
MODELS = {"small": "meta-llama/Llama-2-7b-hf", "large": "meta-llama/Llama-2-70b-hf"}
KV = {"bfloat16": "bfloat16", "fp8": "fp8_e4m3"}
CASES = [
    (device, "small", 1, "bfloat16") for device in [*known_devices(), "l4"]
] + [("h100_sxm", "large", tp, dtype) for tp in (4, 8) for dtype in KV] + [("h200_sxm", "large", 2, "fp8")]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _tables(tmp_path_factory: pytest.TempPathFactory) -> None:
    patch = pytest.MonkeyPatch()
    patch.setenv("WINDTUNNEL_CACHE_DIR", str(tmp_path_factory.mktemp("tables")))


@cache
def predictor(device: str, model: str, tp: int, dtype: str) -> Learned:
    spec = catalog.model(MODELS[model])
    if dtype == "fp8":
        spec = replace(spec.quantized("fp8"), kv_cache_dtype=KV[dtype])
    known = catalog.device(device)
    maker = learned if device in known_devices() else carried_over
    return maker(spec, known, catalog.network(known.network), ParallelSpec(tensor_parallel_size=tp), HOST)


def decodes(count: int, length: int) -> BatchShape:
    return BatchShape(count, count, count * length, (), count, count)


def prompts(*each: tuple[int, int]) -> BatchShape:
    return BatchShape(sum(chunk for chunk, _ in each), 0, 0, each, len(each), 0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_more_work_never_takes_less_time_unless_measured_so(case: tuple[str, str, int, str]) -> None:
    """8-bit products of more rows may run in a better kernel, as all-reduces of more bytes may: both were measured."""
    time = predictor(*case).stage_time
    least = 0.7 if case[2] > 1 else 1.0  # several ranks are Hopper's here, whose all-reduces may fall

    def rising(grid: np.ndarray) -> bool:
        return bool((grid >= least * np.maximum.accumulate(grid, axis=0)).all())

    counts, lengths = (1, 2, 3, 7, 8, 9, 16, 31, 64, 100, 128, 255, 300, 512, 1000), (1, 17, 100, 1000, 4097, 30000)
    grid = np.array([[time(decodes(count, length), 0) for length in lengths] for count in counts])
    assert rising(grid) and (np.diff(grid, axis=1) >= 0).all()
    chunks, prefixes = (1, 16, 17, 100, 128, 129, 1000, 2048, 5000, 16000), (0, 16, 500, 4000, 30000, 200000)
    grid = np.array([[time(prompts((chunk, prefix)), 0) for prefix in prefixes] for chunk in chunks])
    assert rising(grid) and (np.diff(grid, axis=1) >= 0).all()
    for chunk, prefix in ((16, 0), (128, 512), (1000, 0)):
        several = [time(prompts(*[(chunk, prefix)] * count), 0) for count in (1, 2, 3, 5, 8, 15)]
        assert rising(np.array(several))


def test_eight_bit_products_fall_where_their_kernels_do() -> None:
    """Of 17 rows the kernel is that of 64, which it does not fill: measured on the H200 under vLLM 0.14 and 0.19."""
    in_8, in_16 = (predictor("h200_sxm", "large", 2, dtype).stages[0].tokens for dtype in ("fp8", "bfloat16"))
    assert in_8[17] > 1.1 * in_8[64] and in_8[65] > 1.1 * in_8[64]
    assert in_16[17] <= in_16[64] <= in_16[65]


def test_a_slower_memory_costs_what_reads_it() -> None:
    """The A100 with 40 GB is the other with 0.76 of its bandwidth: big reads take longer, large products do not."""
    own, other = (
        learned(catalog.model(MODELS["small"]), catalog.device(name), catalog.network("nvswitch_a100"), ParallelSpec(),
                replace(HOST, kernels=None))
        for name in ("a100_sxm_40gb", "a100_sxm")
    )  # fmt: skip
    assert "of a100_sxm (nvswitch_a100" in own.description and "by the memory of a100_sxm_40gb" in own.description
    for shape, least, most in (
        (decodes(1, 1), 1.15, 1.35),  # weights
        (decodes(64, 2000), 1.15, 1.35),  # and KV
        (prompts((4096, 0)), 0.97, 1.1),
    ):
        assert least < own.stage_time(shape, 0) / other.stage_time(shape, 0) < most


def test_large_products_are_no_faster_than_the_card_sustains() -> None:
    spec, chunk = catalog.model(MODELS["large"]), 16384
    for device, dtype in (("h100_sxm", "bfloat16"), ("h100_sxm", "fp8"), ("h200_sxm", "fp8")):
        known, tp = catalog.device(device), 4 if device == "h100_sxm" else 2
        rate = known.sustained_fp8_flops if dtype == "fp8" else known.sustained_flops
        assert rate is not None and rate < (known.peak_fp8_flops if dtype == "fp8" else known.peak_flops)
        flops = 2 * (spec.matmul_parameters - spec.vocab_size * spec.hidden_size) * chunk / tp
        assert predictor(device, "large", tp, dtype).stages[0].tokens[chunk] >= flops / rate


@pytest.mark.parametrize("case", CASES, ids=str)
def test_never_below_the_data_sheet(case: tuple[str, str, int, str]) -> None:
    device, model, tp, dtype = case
    spec, known = catalog.model(MODELS[model]), catalog.device(device)
    width, time = (1 if dtype == "fp8" else 2), predictor(*case).stage_time
    head = spec.vocab_size * spec.hidden_size
    weights = width * (spec.matmul_parameters - head) + 2 * head
    cached = spec.kv_bytes_per_token // 2 * width
    for count, length in ((1, 1), (1, 4000), (64, 1000), (256, 2000)):
        assert time(decodes(count, length), 0) >= (weights + cached * count * length) / tp / known.memory_bandwidth
    for chunk, prefix in ((512, 0), (2048, 0), (8192, 8192)):
        flops = 2 * (spec.matmul_parameters - head) * chunk / (2 / width)
        flops += 4 * spec.q_size * spec.num_layers * attended(chunk, prefix, spec.sliding_window) / (2 / width)
        assert time(prompts((chunk, prefix)), 0) >= flops / tp / known.peak_flops


def test_prompts_of_a_batch_are_one_kernels_work() -> None:
    """64 prompts of 16 tokens take about as long as one of 1,024, not 64 times as long as one of 16."""
    for device in known_devices():
        stage = predictor(device, "small", 1, "bfloat16").stages[0]
        together, one = stage.together([(16, 0)] * 64), stage.together([(16, 0)])
        assert one <= together < 20 * one
        assert together < 2 * stage.together([(1024, 0)])
        long = stage.together([(4096, 0)])
        assert long <= stage.together([(4096, 0), (16, 0)]) < long + stage.together([(16, 0)])


@pytest.mark.parametrize(
    ("device", "model", "dtype", "ranks"),
    [
        ("h100_sxm", "large", "bfloat16", (4, 8)),
        ("h100_sxm", "large", "fp8", (4, 8)),
        ("h100_sxm", "small", "fp8", (1, 2, 4)),
        ("h200_sxm", "small", "bfloat16", (1, 2, 4, 8)),
        ("a100_sxm", "small", "bfloat16", (1, 2, 4)),
    ],
)
def test_twice_the_ranks_on_a_switch_are_not_slower_at_long_prefills(
    device: str, model: str, dtype: str, ranks: tuple[int, ...]
) -> None:
    for chunk in (2048, 3000, 4096, 8192, 16384):
        times = [predictor(device, model, tp, dtype).stage_time(prompts((chunk, 0)), 0) for tp in ranks]
        assert times == sorted(times, reverse=True), (chunk, times)


def test_times_past_the_measured_sizes_go_on() -> None:
    for case in CASES[:2]:
        time = predictor(*case).stage_time
        near, far = (time(decodes(64, length), 0) for length in (100_000, 800_000))
        assert far > 5 * near
        near, far = (time(prompts((1024, prefix)), 0) for prefix in (50_000, 200_000))
        assert far > 2 * near


def test_the_preset_chooses_the_versions_kernels() -> None:
    device = catalog.device("h100")
    network, model = catalog.network(device.network), catalog.model(MODELS["large"])
    both = [learned(model, device, network, ParallelSpec(tensor_parallel_size=8), replace(HOST, kernels=kernels))
            for kernels in ("vllm@0.14", "vllm@0.19")]  # fmt: skip
    assert "operators of vllm@0.14" in both[0].description and "operators of vllm@0.19" in both[1].description
    nccl = learned(model, device, network, ParallelSpec(tensor_parallel_size=8), replace(HOST, kernels=None))
    assert nccl.stage_time(decodes(1, 100), 0) > both[1].stage_time(decodes(1, 100), 0)
    eight_bits = model.quantized("fp8")
    found = learned(
        eight_bits, device, network, ParallelSpec(tensor_parallel_size=8), replace(HOST, kernels="vllm@0.14")
    )
    assert "gemm (fp8) of vllm@0.19" in found.description  # 0.14's are not to be used


def test_what_ships_is_small_and_says_what_is_doubtful() -> None:
    folders = known_devices()
    assert {"h100_sxm", "h200_sxm", "l40s"} <= set(folders)
    files = [path for folder in folders.values() for path in Path(folder).rglob("*.json")]
    assert sum(path.stat().st_size for path in files) < 40e6  # text, a third of that in a wheel
    assert "DOUBTFUL: gemm (fp8)" in predictor_of_l40s().description


def predictor_of_l40s() -> Learned:
    return predictor("l40s", "small", 1, "fp8")
