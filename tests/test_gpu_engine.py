"""The engine on a GPU: bfloat16 against transformers, CUDA graphs, every attention backend, memory.

    python -m pytest -m gpu tests/test_gpu_engine.py

What needs no GPU in particular runs on the CPU too, so that the tests themselves are tried everywhere.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoints
import numpy as np
import pytest
import stand_in_cuda
import torch
import transformers
from numpy.typing import NDArray
from stand_in_cuda import stand_in
from torch import Tensor

from engine.errors import InputError
from engine.executors.start import start
from engine.results.recorder import Recorder
from engine.runtime.driver import Driver
from engine.runtime.engine_spec import GRAPH_BACKENDS, EngineSpec
from engine.runtime.executor import Executor, Result
from engine.runtime.sequences import Sequence
from engine.scheduling.policies import resolve
from engine.scheduling.request import Batch, Request
from engine.scheduling.scheduler import Scheduler
from engine.specs import ExpertsSpec, ModelSpec, ParallelSpec, SchedulerSpec, hf_config
from engine.specs.memory import kv_bytes_per_block
from engine.worker import layers
from engine.worker.attention import BACKENDS
from engine.worker.attention.base import AttentionShape
from engine.worker.experts import Experts, choose, has_grouped_kernel, in_one_kernel, one_by_one
from engine.worker.parallel import Rank
from engine.worker.runner import RESERVED_BYTES, Pending

FAMILIES = ("llama", "qwen2", "mistral", "falcon_new", "phi", "qwen3", "qwen3_moe")
LENGTHS = (21, 1, 64, 130, 7)  # of the prompts
OUTPUT = 24 if torch.cuda.is_available() else 10
MAX_LEN, BUDGET = 256, 100  # a prompt is longer than the budget: it comes in chunks
HEADS, LAYERS = (8, 4) if torch.cuda.is_available() else (4, 2)  # of 64 dimensions, which every backend can do
SIZES: dict[str, Any] = {"vocab_size": 512, "hidden_size": 64 * HEADS, "intermediate_size": 128 * HEADS,
                         "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": 2,
                         "head_dim": 64}  # fmt: skip
SMALL = hf_config.read({"model_type": "llama", "max_position_embeddings": 256, **SIZES})
MIXTURE = replace(
    SMALL, model_type="mixtral", num_layers=2, experts=ExpertsSpec(num_experts=8, top_k=2, intermediate_size=256)
)
ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=["cpu", "stand-in", ON_GPU])
def device(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, checkpoint: Callable[[str], Path]
) -> Iterator[str]:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    threads = torch.get_num_threads()
    if request.param == "stand-in":
        for name in (*FAMILIES, "wide"):
            checkpoint(name)  # transformers looks for flash-attn when a model is first used
        with stand_in(monkeypatch):
            yield "cuda"
    else:
        yield request.param
    torch.set_num_threads(threads)
    if request.param == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


gpu_only = pytest.mark.parametrize("device", [ON_GPU], indirect=True)
real_only = pytest.mark.parametrize("device", ["cpu", ON_GPU], indirect=True)
cuda_only = pytest.mark.parametrize("device", ["stand-in", ON_GPU], indirect=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of small checkpoints: those of `checkpoints`, and "wide" with heads that every backend can do."""
    known: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in known:
            known[name] = tmp_path_factory.mktemp(name)
            if name == "wide":
                torch.manual_seed(5)
                config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=False, initializer_range=0.06)
                transformers.LlamaForCausalLM(config).save_pretrained(known[name])
            else:
                checkpoints.write(known[name], name)
        return known[name]

    return get


def spec_of(folder: Path | None, device: str, model: ModelSpec | None = None, **changes: Any) -> EngineSpec:
    """Of a checkpoint, or of a model's shapes with dummy weights, in bfloat16."""
    model = model or hf_config.read(folder or Path())
    settings: dict[str, Any] = {
        "max_num_seqs": 8,
        "max_model_len": MAX_LEN,
        "max_batch_tokens": BUDGET,
        "block_size": 16,
        "num_blocks": 100,
        "cuda_graphs": (),
        "keep_logits": folder is not None,
    }
    return EngineSpec(model=model, folder=folder, device=device, **(settings | changes))  # type: ignore[arg-type]


def serve(
    spec: EngineSpec,
    executor: Executor,
    prompts: list[list[int]],
    output: int,
    async_scheduling: bool = False,
    **settings: Any,
) -> list[Sequence]:
    """The prompts, all there at once, continued."""
    limits = SchedulerSpec(
        max_num_batched_tokens=spec.max_batch_tokens,
        max_num_seqs=spec.max_num_seqs,
        max_model_len=spec.max_model_len,
        block_size=spec.block_size,
    )
    scheduler = Scheduler(resolve(limits, spec.max_model_len), executor.num_blocks, async_scheduling=async_scheduling)
    driver = Driver(scheduler, executor, Recorder(predicted=False), **settings)
    sequences = [Sequence(Request(i, 0.0, len(ids), output), ids) for i, ids in enumerate(prompts)]
    driver.run(sequences)
    assert [len(sequence.output) for sequence in sequences] == [output] * len(prompts)
    return sequences


@dataclass
class Generated:
    """Sequences with their prompts, and the logits that each of their generated tokens was chosen by."""

    sequences: list[Sequence]
    logits: list[NDArray[np.float32]]  # a sequence: (generated tokens, vocabulary)


def generate(spec: EngineSpec, **settings: Any) -> Generated:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, spec.model.vocab_size, length).tolist() for length in LENGTHS]
    rows: list[list[NDArray[np.float32]]] = [[] for _ in prompts]

    def on_result(batch: Batch, result: Result) -> None:
        assert result.logits is not None
        for request, row in zip(batch.sampled, result.logits, strict=True):
            rows[request.id].append(row)

    executor = start(spec, "in_process")
    try:
        sequences = serve(spec, executor, prompts, OUTPUT, on_result=on_result, **settings)
    finally:
        executor.close()
    return Generated(sequences, [np.stack(each) for each in rows])


def transformers_logits(
    folder: Path, device: str, dtype: torch.dtype, sequences: list[Sequence]
) -> list[NDArray[np.float32]]:
    """What transformers computes for each generated token, given the tokens before it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    logits = []
    with torch.inference_mode():
        for sequence in sequences:
            ids = torch.tensor([sequence.tokens[:-1]], device=device)
            given = len(sequence.tokens) - len(sequence.output) - 1
            logits.append(model(ids).logits[0, given:].float().cpu().numpy())
    return logits


def rms(a: list[NDArray[np.float32]], b: list[NDArray[np.float32]]) -> float:
    assert [x.shape for x in a] == [x.shape for x in b]
    return float(np.sqrt(np.mean(np.square(np.concatenate(a) - np.concatenate(b)))))


def assert_as_good_as_transformers(generated: Generated, folder: Path, device: str) -> float:
    """The logits are as near to those of float32 as transformers' in bfloat16 are. Returns that distance."""
    exact = transformers_logits(folder, device, torch.float32, generated.sequences)
    rounded = transformers_logits(folder, device, torch.bfloat16, generated.sequences)
    tolerance = rms(rounded, exact)
    assert 0 < tolerance < 0.2 * float(np.std(np.concatenate(exact)))
    assert rms(generated.logits, exact) < 1.5 * tolerance
    for sequence, logits in zip(generated.sequences, generated.logits, strict=True):
        assert sequence.output == logits.argmax(-1).tolist()
    return tolerance


def assert_same_but_for_ties(a: Generated, b: Generated, tolerance: float) -> None:
    """Logits are close, and tokens equal up to one that was nearly chosen in the other run too (then they differ)."""
    equal = 0
    for ours, theirs, x, y in zip(a.sequences, b.sequences, a.logits, b.logits, strict=True):
        pairs = list(zip(ours.output, theirs.output, strict=True))
        parted = next((i for i, (s, t) in enumerate(pairs) if s != t), len(pairs))
        equal += parted
        upto = min(parted + 1, len(pairs))
        assert rms([x[:upto]], [y[:upto]]) < 2 * tolerance
        if parted < len(pairs):
            token, other = pairs[parted]
            assert x[parted][token] - x[parted][other] < 8 * tolerance
    assert equal > OUTPUT * len(LENGTHS) / 2


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_transformers(
    name: str, device: str, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(name)
    layers.compile_elementwise(False)  # for so many models it would take minutes; the wide one's are compiled
    monkeypatch.setattr("engine.worker.runner.compile_elementwise", lambda on: None)
    assert_as_good_as_transformers(generate(spec_of(folder, device)), folder, device)


def test_the_wide_checkpoint_too(device: str, checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("wide")
    assert_as_good_as_transformers(generate(spec_of(folder, device, block_size=256)), folder, device)


def test_scheduling_ahead_changes_nothing(device: str, checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("wide")
    spec = spec_of(folder, device)
    plain, ahead = generate(spec), generate(spec, async_scheduling=True)
    tolerance = assert_as_good_as_transformers(ahead, folder, device)
    assert_same_but_for_ties(plain, ahead, tolerance)


@cuda_only
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "sdpa"])
def test_backends_agree_and_cuda_graphs_change_nothing(
    backend: str, device: str, checkpoint: Callable[[str], Path]
) -> None:
    folder = checkpoint("wide")
    spec = spec_of(folder, device, block_size=256, attention_backend=backend)
    shape = AttentionShape(HEADS, 2, 64, 256, None, torch.bfloat16, torch.device(device))
    if (reason := BACKENDS[backend].unavailable(shape)) is not None:
        pytest.skip(reason)
    plain = generate(spec)
    tolerance = assert_as_good_as_transformers(plain, folder, device)
    assert_same_but_for_ties(plain, generate(replace(spec, attention_backend="sdpa")), tolerance)
    if not BACKENDS[backend].supports_cuda_graph:
        return
    for ahead in (False, True):
        graphs = generate(replace(spec, cuda_graphs=(1, 2, 4, 8)), async_scheduling=ahead)  # 3 and 5 are padded
        assert_same_but_for_ties(plain, graphs, tolerance)


@pytest.mark.parametrize(("seqs", "padded"), [(6, {1: 1, 3: 4, 5: 6, 6: 6}), (8, {5: 8}), (12, {8: 8, 9: 0})])
@cuda_only
def test_the_most_sequences_have_a_graph_too(
    seqs: int, padded: dict[int, int], device: str, checkpoint: Callable[[str], Path]
) -> None:
    """9 to 12 sequences run eagerly because no size that was asked for holds them."""
    spec = spec_of(checkpoint("wide"), device, block_size=256, max_num_seqs=seqs, cuda_graphs=(1, 2, 4, 8))
    executor: Any = start(spec, "in_process")
    assert {n: executor._runner._graphs.size_for(n) for n in padded} == padded
    executor.close()


@cuda_only
def test_a_backend_without_graphs_that_nobody_asked_for_is_warned_of(
    device: str, checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    spec = spec_of(checkpoint("wide"), device, cuda_graphs=(1, 2))
    float32 = replace(spec, model=spec.model.in_dtype("float32"))  # only sdpa computes in it
    for quiet in (replace(float32, attention_backend="sdpa"), replace(float32, cuda_graphs=())):
        start(quiet).close()
        assert capsys.readouterr().err == ""
    start(float32).close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the attention backend sdpa has no CUDA graphs")
    assert {name for name, backend in BACKENDS.items() if backend.supports_cuda_graph} == set(GRAPH_BACKENDS)


def test_experts_without_a_kernel_for_all_run_without_graphs_and_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = spec_of(None, "cuda", MIXTURE, attention_backend="flashinfer", cuda_graphs=(1, 2))
    with stand_in(monkeypatch):
        start(spec).close()
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
        executor: Any = start(spec)
        assert executor._runner._graphs is None
        executor.close()
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("warning: the experts are computed one after the other, which no CUDA graph can hold")
        start(replace(spec, cuda_graphs=())).close()
        assert capsys.readouterr().err == ""


@cuda_only
def test_a_graph_of_experts_sorts_each_batch_anew(device: str) -> None:
    rank, place = Rank(0, ParallelSpec()), torch.device(device)
    if not has_grouped_kernel(MIXTURE, rank, torch.bfloat16, place):
        pytest.skip("no grouped products on this GPU")
    new = partial(layers.new_parameter, dtype=torch.bfloat16, device=place)
    captured, plain = (Experts(MIXTURE, rank, new, products) for products in (in_one_kernel, one_by_one))
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(device, torch.bfloat16)

    with torch.inference_mode():
        for ours, theirs in zip(captured.parameters(), plain.parameters(), strict=True):
            ours.copy_(random(*ours.shape) / ours.shape[-1] ** 0.5)
            theirs.copy_(ours)
        x, logits = random(24, MIXTURE.hidden_size), random(24, 8)
        for _ in range(2):  # what is made at the first call must not be captured
            captured(x, *choose(logits, MIXTURE.experts))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = captured(x, *choose(logits, MIXTURE.experts))
        for favour in (0, 3, 7):
            x.copy_(random(24, MIXTURE.hidden_size))
            logits.copy_(random(24, 8) + 4 * (torch.arange(8, device=device) == favour))
            graph.replay()
            expected = plain(x, *choose(logits, MIXTURE.experts))
            assert expected.std() > 0.3
            torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


@cuda_only
def test_batches_without_a_bound_are_warned_of(
    device: str, checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    executor: Any = start(spec_of(checkpoint("wide"), device, bounded_batches=False, num_blocks=None))
    assert "no token budget: beside the KV cache there is room for a batch of 100 tokens" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"or --max-num-seqs 8, or raise"), executor._runner._memory("computing"):
        raise torch.OutOfMemoryError("no room")
    executor.close()


@pytest.mark.parametrize("device", ["stand-in"], indirect=True)
def test_the_copies_of_a_full_cache_have_room(device: str, checkpoint: Callable[[str], Path]) -> None:
    """8 sequences of 256 tokens, padded, of one layer of all; the stand-in's activations take nothing."""
    spec = spec_of(checkpoint("wide"), device, cuda_graphs=(), attention_backend="sdpa", num_blocks=4)
    executor: Any = start(spec)
    runner = executor._runner
    layer_bytes = 2 * 2 * 64 * 2  # of a token
    room = int(stand_in_cuda.MEMORY * 0.9) - RESERVED_BYTES
    assert runner.free_blocks() == (room - 8 * 256 * layer_bytes) // (16 * LAYERS * layer_bytes)
    runner.attention.gathered_bytes = lambda tokens, sequences, length: tokens * layer_bytes  # as torch_varlen's
    assert runner.free_blocks() == room // (16 * (LAYERS + 1) * layer_bytes)
    executor.close()


LARGE = ModelSpec(name="large", model_type="llama", num_layers=6, hidden_size=2048, intermediate_size=8192,
                  num_attention_heads=16, num_key_value_heads=4, head_dim=128, vocab_size=128_000,
                  max_position_embeddings=8192)  # fmt: skip


@gpu_only
def test_the_profiled_kv_cache_leaves_room_for_the_largest_batch(device: str) -> None:
    limits = {"max_num_seqs": 64, "max_model_len": 4096, "max_batch_tokens": 8192, "num_blocks": None}
    spec = spec_of(None, device, LARGE, **limits, cuda_graphs=(64,), gpu_memory_utilization=0.8)
    gc.collect()
    torch.cuda.empty_cache()
    executor = start(spec, "in_process")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, LARGE.vocab_size, 128 if i else 4000).tolist() for i in range(64)]
    serve(spec, executor, prompts, 40)  # a batch of 8192 tokens, then one of 64 decodes
    free, total = torch.cuda.mem_get_info()
    assert total - free <= 0.8 * total
    held = executor.num_blocks * kv_bytes_per_block(LARGE, spec.parallel, 0, spec.block_size)
    assert held > 0.5 * total  # it is used
    executor.close()


@real_only
def test_memory_does_not_grow(device: str) -> None:
    """From the 1,000th to the 10,000th iteration of requests that come and go."""
    warm_up, last = (1_000, 10_000) if device == "cuda" else (50, 110)
    dtype = "bfloat16" if device == "cuda" else "float32"  # a CPU keeps code for each shape in 16 bits that it has met
    model = SMALL.in_dtype(dtype)
    spec = spec_of(None, device, model, max_num_seqs=16, cuda_graphs=(1, 8, 16))
    executor = start(spec, "in_process")
    rng = np.random.default_rng(0)
    iterations = 0
    seen: list[tuple[int, int]] = []

    def on_result(batch: Batch, result: Result) -> None:
        nonlocal iterations
        iterations += 1
        if iterations in (warm_up, last):
            gc.collect()
            on_device = torch.cuda.memory_reserved() if device == "cuda" else 0
            pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
            seen.append((on_device, pages * 4096))

    while iterations < last:
        lengths = rng.integers(1, 100, 64)
        prompts = [rng.integers(0, model.vocab_size, length).tolist() for length in lengths]
        serve(spec, executor, prompts, int(rng.integers(10, 60)), async_scheduling=True, on_result=on_result)
    executor.close()
    (device_before, host_before), (device_after, host_after) = seen
    assert device_after - device_before <= 4 << 20
    assert host_after - host_before <= 64 << 20


@real_only
def test_too_little_memory_is_told(device: str) -> None:
    spec = spec_of(None, device, SMALL, num_blocks=9_999_999, block_size=4096)
    where = "GPU" if device == "cuda" else "CPU"
    with pytest.raises(InputError, match=f"{where} out of memory.*--num-gpu-blocks-override 9999999"):
        start(spec, "in_process")


@gpu_only
def test_a_share_that_is_too_small_is_told(device: str) -> None:
    spec = spec_of(None, device, LARGE, num_blocks=None, gpu_memory_utilization=0.01)
    with pytest.raises(InputError, match="raise --gpu-memory-utilization"):
        start(spec, "in_process")


def test_a_steps_end_that_was_polled_sets_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the origin of a rank that never waits would stay where it began, and the GPU's clock run away from it."""

    class Event:
        def __init__(self) -> None:
            self.answers = [False, True, True]

        def record(self) -> None:
            pass

        def query(self) -> bool:
            return self.answers.pop(0)

    seen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    runner: Any = SimpleNamespace(rank=SimpleNamespace(tp_rank=1), _clock=SimpleNamespace(set=seen.append))
    ended: Any = Event()
    pending = Pending(runner, 1, ended, ended)
    assert not pending.ready() and seen == []
    assert pending.ready() and seen == [ended]
    late = Pending(runner, 2, ended, ended)
    assert not late.ready()
    monkeypatch.setattr("engine.worker.runner.JUST_NOW_S", 0.0)
    assert late.ready() and seen == [ended]  # nobody knows how long ago it was
