"""What no estimate may violate, whatever device, model, parallel layout and format: properties, not numbers."""

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise

import pytest

from engine.scheduling.request import BatchShape
from engine.specs import DeviceSpec, ModelSpec, ParallelSpec, catalog, memory
from simulator.predictor.base import RuntimePredictor
from simulator.predictor.learned import learned
from simulator.predictor.roofline import Roofline

HOST = catalog.host_overhead("cuda_graphs")
MODELS = ("Llama-3.1-8B", "Qwen3-32B", "Qwen3-30B-A3B", "gpt-oss-120b", "gemma-3-27b-it", "falcon-180B")
FORMATS = ("none", "fp8", "int4")
DEVICES = tuple(name for name in catalog.DEVICES if name != "cpu")
ON_ONE_SWITCH = (
    "a100_sxm",
    "h100",
    "h200",
)  # B200's products are so short that the latencies of data sheets outweigh them
TOKENS = (1, 7, 64, 500, 512, 2048, 8192, 16384)
CALIBRATED = (("a100_sxm", "Llama-3.1-8B"), ("a100_pcie", "Qwen3-32B"), ("a40", "phi-2"))


def plain_cuts(model: ModelSpec) -> list[ParallelSpec]:
    """Tensor parallelism of 1 to 8 as far as it divides."""
    return [cut for tp in (1, 2, 4, 8) if (cut := ParallelSpec(tensor_parallel_size=tp)).fits(model)]


def cuts(model: ModelSpec) -> list[ParallelSpec]:
    """The fewest and the most tensor-parallel ranks; of mixtures by expert too, and replicas that share them."""
    plain = plain_cuts(model)
    if model.experts is None:
        return [plain[0], plain[-1]]
    by_expert = ParallelSpec(tensor_parallel_size=4, expert_parallel_size=4)
    return [plain[0], plain[-1], by_expert, ParallelSpec(data_parallel_size=8, expert_parallel_size=8)]


def prompt(tokens: int, prefix: int = 0) -> BatchShape:
    return BatchShape(tokens, 0, 0, ((tokens, prefix),), 1, 0)


def decode(requests: int, context: int) -> BatchShape:
    return BatchShape(requests, requests, requests * context, (), requests, requests)


def predictors(device: DeviceSpec, model: ModelSpec) -> Iterator[tuple[str, ModelSpec, ParallelSpec, RuntimePredictor]]:
    network = catalog.network(device.network)
    for quantization in FORMATS:
        mine = model.quantized(quantization)
        for cut in cuts(model):
            yield (
                f"{device.name} {model.name} {quantization} {cut}",
                mine,
                cut,
                Roofline(mine, device, network, cut, HOST),
            )


def assert_sane(
    name: str, device: DeviceSpec, model: ModelSpec, cut: ParallelSpec, predictor: RuntimePredictor
) -> None:
    """More of anything never takes less time, and nothing is faster than the peaks allow."""
    batches = [
        [prompt(tokens) for tokens in TOKENS],
        [prompt(512, prefix) for prefix in (0, 16, 512, 4096, 100_000)],
        [decode(requests, 700) for requests in (1, 2, 8, 9, 64, 255, 256, 1024)],
        [decode(32, context) for context in (1, 50, 1000, 20_000)],
    ]
    for shapes in batches:
        times = [predictor.stage_time(shape, 0) for shape in shapes]
        assert all(later >= sooner * (1 - 1e-9) for sooner, later in pairwise(times)), (name, shapes, times)
        for shape, seconds in zip(shapes, times, strict=True):
            assert seconds >= least(device, model, cut, shape), (name, shape, seconds)


@lru_cache
def passed(model: ModelSpec, cut: ParallelSpec) -> tuple[float, float]:
    """Bytes of a rank's weights that a single token passes, without the tables, and FLOPs of a token on it."""
    experts, tp = model.experts, cut.tensor_parallel_size
    if experts is not None:  # of a mixture as if it had no experts but the chosen; a rank may have none of them
        model = model.__class__(**{**vars(model), "experts": None, "intermediate_size": tp, "attention_sinks": False})
    vocabulary = model.vocab_size * model.hidden_size
    tables = (2 - model.tie_word_embeddings) * -(-model.vocab_size // tp) * model.hidden_size * model.weight_itemsize
    norms = model.num_layers * (model.norms_per_layer + 1) * 4 * model.hidden_size * model.weight_itemsize
    return memory.weight_bytes(model, cut, 0) - tables - norms, 2 * (model.matmul_parameters - vocabulary) / tp


def least(device: DeviceSpec, model: ModelSpec, cut: ParallelSpec, shape: BatchShape) -> float:
    """Seconds at the peaks: the weights are read once, the products are computed."""
    plain = ParallelSpec(tensor_parallel_size=cut.tensor_parallel_size)
    weights, flops = passed(model, plain)
    peak = max(device.peak_flops, device.peak_fp8_flops or 0)
    return max(weights / device.memory_bandwidth, flops * shape.num_tokens / peak)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", MODELS)
def test_estimates_from_data_sheets_are_sane(device: str, model: str) -> None:
    spec = catalog.device(device)
    every = list(predictors(spec, catalog.model(model)))
    assert len(every) >= 6
    for name, quantised, cut, predictor in every:
        assert_sane(name, spec, quantised, cut, predictor)


@pytest.mark.parametrize(("device", "model"), CALIBRATED)
def test_calibrated_times_are_sane(device: str, model: str) -> None:
    spec, named = catalog.device(device), catalog.model(model)
    for tp in (1, 2):
        cut = ParallelSpec(tensor_parallel_size=tp)
        assert_sane(f"{device} {model} {cut}", spec, named, cut,
                    learned(named, spec, catalog.network(spec.network), cut, HOST))  # fmt: skip


@pytest.mark.parametrize("device", ON_ONE_SWITCH)
def test_twice_the_ranks_are_not_slower_for_long_prompts(device: str) -> None:
    spec = catalog.device(device)
    for model in map(catalog.model, MODELS):
        if model.matmul_parameters < 4e9:
            continue  # the least mixture's all-reduces outweigh its products
        for quantization in FORMATS:
            mine = model.quantized(quantization)
            for tokens in (2048, 4096, 16384):
                times = [
                    Roofline(mine, spec, catalog.network(spec.network), cut, HOST).stage_time(prompt(tokens), 0)
                    for cut in plain_cuts(mine)
                ]
                assert len(times) > 2 and times == sorted(times, reverse=True), (device, model.name, tokens, times)
