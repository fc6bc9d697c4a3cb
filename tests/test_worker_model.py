"""The decoder against transformers: every family, chunked and decoded, over tensor- and pipeline-parallel ranks."""

import shutil
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from engine.errors import InputError
from engine.specs import ExpertsSpec, ModelSpec, ParallelSpec, RopeScaling, catalog, hf_config
from engine.specs.memory import weight_bytes
from engine.worker import layers
from engine.worker.attention.base import AttentionBackend, AttentionBatch, AttentionShape
from engine.worker.inputs import Inputs
from engine.worker.model import Decoder, check_supported
from engine.worker.names import FAMILIES
from engine.worker.parallel import Links, Rank
from engine.worker.weights import load
from profiler.operators import inventory

BLOCK = 4
PROMPTS = {"a": 21, "b": 13}  # sequence: tokens
WHOLE = [[("a", 21), ("b", 13)]]  # steps of (sequence, chunk), decodes first
CHUNKED = [[("a", 7), ("b", 6)], [("a", 9)], [("a", 4), ("b", 5)], [("a", 1), ("b", 1)], [("b", 1)]]
CUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)]
CPU = torch.device("cpu")
Step = list[tuple[str, int]]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterable[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Oracle:
    """A checkpoint, its spec, two sequences and the logits that transformers computes of all their positions."""

    def __init__(self, folder: Path, name: str) -> None:
        model = checkpoints.write(folder, name)
        self.folder, self.spec = folder, hf_config.read(folder)
        generator = torch.Generator().manual_seed(3)
        self.tokens = {
            name: torch.randint(checkpoints.VOCABULARY, (length,), generator=generator)
            for name, length in PROMPTS.items()
        }
        with torch.no_grad():
            self.logits = {name: model(tokens[None]).logits[0] for name, tokens in self.tokens.items()}


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Oracle]:
    known: dict[str, Oracle] = {}

    def get(name: str) -> Oracle:
        if name not in known:
            known[name] = Oracle(tmp_path_factory.mktemp(name), name)
        return known[name]

    return get


class DenseAttention(AttentionBackend):
    """Attention by its definition: one sequence at a time, all its keys, and a mask."""

    name = "dense"

    def plan(self, batch: AttentionBatch) -> None:
        self.batch = batch

    def decode(self, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        return self._attend(q, k_cache, v_cache, range(self.batch.num_decodes))

    def prefill(self, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        return self._attend(q, k_cache, v_cache, range(self.batch.num_decodes, len(self.batch.chunks)))

    def _attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, sequences: Iterable[int]) -> Tensor:
        outputs = []
        for n in sequences:
            chunk, length = self.batch.chunks[n], self.batch.kv_lens[n]
            query, q = q[:chunk], q[chunk:]
            k, v = (
                cache[self.batch.block_table[n].long()].flatten(0, 1)[:length].repeat_interleave(self.group, dim=1)
                for cache in (k_cache, v_cache)
            )
            ago = torch.arange(length - chunk, length)[:, None] - torch.arange(length)
            seen = (ago >= 0) & (ago < (self.shape.sliding_window or length))
            scores = torch.einsum("qhd,khd->hqk", query, k) / self.shape.head_dim**0.5
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
        assert len(q) == 0
        return torch.cat(outputs)

    @property
    def group(self) -> int:
        return self.shape.num_heads // self.shape.num_kv_heads


class ThreadLinks(Links):
    """The collectives of ranks that are threads: everyone lays a tensor on the table and waits for the others."""

    def __init__(self, rank: Rank, table: list[Tensor | None], barrier: threading.Barrier) -> None:
        self.rank, self.table, self.barrier = rank, table, barrier
        self.all_reduces = 0

    def exchange(self, tensor: Tensor) -> list[Tensor]:
        self.table[self.rank.tp_rank] = tensor.clone()
        self.barrier.wait(30)
        tensors = list(self.table)
        self.barrier.wait(30)
        return tensors

    def all_reduce(self, tensor: Tensor) -> Tensor:
        self.all_reduces += 1
        return tensor.copy_(sum(self.exchange(tensor)))

    def gather_columns(self, tensor: Tensor) -> Tensor:
        return torch.cat(self.exchange(tensor), dim=-1)


class Replica:
    """All ranks of a model in this process, with their caches: 16 blocks, dealt out in no order."""

    def __init__(self, spec: ModelSpec, folder: Path, tp: int, pp: int, dtype: torch.dtype = torch.float32) -> None:
        parallel = ParallelSpec(tensor_parallel_size=tp, pipeline_parallel_size=pp)
        kv_heads = parallel.kv_heads_per_rank(spec)
        self.stages: list[list[Decoder]] = []
        self.caches: dict[Decoder, list[tuple[Tensor, ...]]] = {}
        for stage in range(pp):
            table: list[Tensor | None] = [None] * tp
            barrier = threading.Barrier(tp)
            ranks = [Rank(stage * tp + r, parallel) for r in range(tp)]
            decoders = [Decoder(spec, rank, ThreadLinks(rank, table, barrier), dtype, CPU) for rank in ranks]
            self.stages.append(decoders)
            for decoder in decoders:
                load(decoder, folder)
                shape = 2, 16, BLOCK, kv_heads, spec.head_dim
                self.caches[decoder] = [tuple(torch.full(shape, torch.nan, dtype=dtype)) for _ in decoder.layers]
        self.shape = AttentionShape(
            spec.num_attention_heads // tp, kv_heads, spec.head_dim, BLOCK, spec.sliding_window, dtype, CPU
        )
        self.blocks = {"a": torch.tensor([9, 2, 14, 5, 0, 7]), "b": torch.tensor([3, 12, 1, 15, 4, 6])}
        self.computed = dict.fromkeys(PROMPTS, 0)

    def step(self, step: Step, tokens: dict[str, Tensor], last_tokens: Tensor | None = None) -> Tensor:
        """Logits of the step's `last_tokens`, all of them by default."""
        ids, positions, slots = [], [], []
        for name, chunk in step:
            places = torch.arange(self.computed[name], self.computed[name] + chunk)
            ids.append(tokens[name][places])
            positions.append(places)
            slots.append(self.blocks[name][places // BLOCK] * BLOCK + places % BLOCK)
            self.computed[name] += chunk
        decodes = sum(chunk == 1 for _, chunk in step)
        everything = torch.arange(sum(chunk for _, chunk in step))
        inputs = Inputs(
            torch.cat(ids),
            torch.cat(positions),
            torch.cat(slots),
            everything if last_tokens is None else last_tokens,
            decodes,
        )
        lengths = [self.computed[name] for name, _ in step]
        batch = AttentionBatch(
            num_decodes=decodes,
            chunks=[chunk for _, chunk in step],
            kv_lens=lengths,
            table=torch.stack([self.blocks[name] for name, _ in step]).int().numpy(),
            device=CPU,
        )
        hidden = None
        for decoders in self.stages:
            hidden = self._run_stage(decoders, inputs, batch, hidden)
        return hidden

    def _run_stage(
        self, decoders: list[Decoder], inputs: Inputs, batch: AttentionBatch, hidden: Tensor | None
    ) -> Tensor:
        outputs: dict[int, Tensor] = {}

        def run(number: int, decoder: Decoder) -> None:
            attention = DenseAttention(self.shape)
            attention.plan(batch)
            outputs[number] = decoder(inputs, attention, self.caches[decoder], hidden)

        threads = [threading.Thread(target=run, args=each) for each in enumerate(decoders)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(outputs) == len(decoders)
        for output in outputs.values():
            assert torch.equal(output, outputs[0])  # every rank of a stage has the result
        return outputs[0]


def assert_logits(replica: Replica, steps: list[Step], expected: Oracle, error: float = 1e-4) -> None:
    """Every position's logits, from whichever step computed it, against the oracle's, relative to their size."""
    computed: dict[str, list[Tensor]] = {name: [] for name in PROMPTS}
    for step in steps:
        logits = replica.step(step, expected.tokens)
        assert logits.dtype == torch.float32
        for (name, _), part in zip(step, logits.split([chunk for _, chunk in step]), strict=True):
            computed[name].append(part)
    for name, parts in computed.items():
        actual, wanted = torch.cat(parts), expected.logits[name]
        assert wanted.std() > 0.5  # logits that are all alike would prove nothing
        assert actual.shape == wanted[: len(actual)].shape
        assert len(actual) >= 13
        assert (actual - wanted[: len(actual)]).abs().max() < error * wanted.abs().max()


@pytest.mark.parametrize("name", checkpoints.CONFIGS)
def test_a_whole_prompt_gives_the_logits_of_transformers(name: str, oracle: Callable[[str], Oracle]) -> None:
    expected = oracle(name)
    assert_logits(Replica(expected.spec, expected.folder, 1, 1), WHOLE, expected)


@pytest.mark.parametrize(("tp", "pp"), CUTS)
@pytest.mark.parametrize("name", checkpoints.CONFIGS)
def test_chunks_and_decodes_on_every_cut(name: str, tp: int, pp: int, oracle: Callable[[str], Oracle]) -> None:
    expected = oracle(name)
    assert_logits(Replica(expected.spec, expected.folder, tp, pp), CHUNKED, expected)


def test_the_oracle_tells_a_wrong_model(oracle: Callable[[str], Oracle]) -> None:
    for name, wrong in {
        "mistral": {"sliding_window": 6},
        "llama_llama3_rope": {"rope_scaling": None},
        "llama_linear_rope": {"rope_scaling": RopeScaling(kind="linear", factor=3.1)},
        "phi": {"rotary_fraction": 1.0},
        "llama_gelu": {"activation": "gelu"},
        "llama": {"norm_eps": 1e-2},
        "mixtral": {"experts": ExpertsSpec(num_experts=4, top_k=2, intermediate_size=96, normalize=False)},
        "qwen3_moe": {
            "experts": ExpertsSpec(num_experts=6, top_k=3, intermediate_size=32, dense_layers=(1,))  # not normalised
        },
    }.items():
        expected = oracle(name)
        replica = Replica(replace(expected.spec, **wrong), expected.folder, 1, 1)
        with pytest.raises(AssertionError):
            assert_logits(replica, WHOLE, expected)


def test_only_the_last_tokens_have_logits(oracle: Callable[[str], Oracle]) -> None:
    expected = oracle("llama")
    logits = Replica(expected.spec, expected.folder, 2, 2).step(WHOLE[0], expected.tokens, torch.tensor([20, 33]))
    wanted = torch.stack([expected.logits["a"][-1], expected.logits["b"][-1]])
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "falcon_new", "phi", "qwen3"])
def test_bfloat16_is_near(name: str, oracle: Callable[[str], Oracle]) -> None:
    expected = oracle(name)
    logits = Replica(expected.spec, expected.folder, 2, 1, torch.bfloat16).step(WHOLE[0], expected.tokens)
    wanted = torch.cat(list(expected.logits.values()))
    assert logits.dtype == torch.bfloat16
    assert (logits - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize(
    ("name", "a_layer"), [("llama", 2), ("falcon_new", 1), ("falcon_multi_head", 2), ("phi", 1), ("mixtral", 2)]
)
def test_a_parallel_block_is_summed_over_ranks_once(name: str, a_layer: int, oracle: Callable[[str], Oracle]) -> None:
    expected = oracle(name)
    replica = Replica(expected.spec, expected.folder, 2, 1)
    replica.step(WHOLE[0], expected.tokens)
    counts = {decoder.links.all_reduces for decoder in replica.stages[0]}
    assert counts == {a_layer * expected.spec.num_layers + 1}  # and the embedding's


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_chains_compute_the_same(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if device == "cpu" and (torch.cuda.is_available() or shutil.which("g++") is None):
        pytest.skip("no compiler, or a device that it is for")
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    def written(x: Tensor) -> list[Tensor]:
        angles = torch.arange(len(x), device=device)[:, None, None] * frequencies
        keys, values = old.clone(), old.clone()
        slots = torch.arange(len(x), device=device) * 5 % len(old)  # 5 has no divisor in common with it
        q = layers.rotate_and_write(x.view(len(x), -1, 8), angles.cos(), angles.sin(), slots, 4, keys, values)
        heads = x.clone().view(len(x), -1, 8)
        layers.norm_heads(heads, head_weight, 2 * head_weight, 4, 2, 1e-5)
        return [heads, q, keys, values]

    def computed(x: Tensor) -> list[Tensor]:
        weights = torch.linspace(0.5, 2, 4, device=device).expand(len(x), 4).contiguous()
        return [
            *layers.rotation(torch.arange(len(x), device=device), frequencies),
            layers.norm(x, weight, None, 1e-5),
            *layers.residual_norm(x, 2 * x, None, weight, None, 1e-5),
            *layers.residual_norm(x, 2 * x, x, weight, weight, 1e-5),
            layers.activate(x, "gelu_tanh"),
            layers.gated_activate(x, "silu"),
            layers.weighted_sum(x.view(len(x), 4, 16), weights),
        ]

    weight, frequencies, old = random(64), torch.rand(3, device=device), random(256, 2, 8)
    head_weight = random(8)
    torch._dynamo.reset()
    compiling = torch.compile
    sizes = {written: (1, 7, 33, 128), computed: (1, 7, 33, 128)}
    if device == "cpu":  # a C++ compiler takes over a second a graph: it makes those that write, for any size but one
        sizes[written] = (7, 33, 128)
        for name, value in {"cpp.vec_isa_ok": False, "cpp_cache_precompile_headers": False}.items():
            monkeypatch.setattr(f"torch._inductor.config.{name}", value)  # vectors and headers take longer still
    try:
        for outputs, chains in ((written, 2), (computed, 7)):  # residual_norm is two, with a bias and without
            if device == "cpu" and outputs is computed:
                monkeypatch.setattr(
                    torch, "compile", lambda chain, **_: compiling(chain, dynamic=False, backend="aot_eager")
                )
            before = counters["stats"]["unique_graphs"]
            for tokens in sizes[outputs]:
                x = random(tokens, 64)
                layers.compile_elementwise(False)
                plain = outputs(x)
                layers.compile_elementwise(True)
                for compiled, expected in zip(outputs(x), plain, strict=True):
                    torch.testing.assert_close(compiled, expected, rtol=2e-2, atol=2e-2)
                if outputs is written:
                    assert (plain[-1] != old).flatten(1).any(1).sum() == tokens  # and no other slot is touched
                alone = 1 in sizes[outputs]  # a token alone has a graph of its own, any other number one for all
                assert counters["stats"]["unique_graphs"] - before == chains * (1 + (alone and tokens > 1))
    finally:
        layers.compile_elementwise(False)


def supported() -> list[ModelSpec]:
    """Of each shape that the engine runs one model."""
    no_shape: dict[str, Any] = {"name": "", "max_position_embeddings": 1, "rope_theta": 1.0, "rope_scaling": None}
    every = {replace(spec, **no_shape): spec for spec in catalog.MODELS.values() if spec.model_type in FAMILIES}
    return [spec for spec in every.values() if spec.quantization == "none" and not spec.full_attention_layers]


def shallow(spec: ModelSpec) -> ModelSpec:
    """Its first 7 layers: those after them are alike."""
    experts, most = spec.experts, 7
    if experts is not None:
        dense = tuple(layer for layer in experts.dense_layers if layer < most)
        experts = replace(experts, dense_layers=dense)
    return replace(spec, num_layers=min(spec.num_layers, most), experts=experts)


def shards(spec: ModelSpec, tp: int, pp: int) -> Iterable[Decoder]:
    """The decoders of a model's ranks in 16 bits, without memory: tp rank 0 and the last, of each stage."""
    parallel = ParallelSpec(tensor_parallel_size=tp, pipeline_parallel_size=pp)
    for stage in range(pp):
        for tp_rank in {0, tp - 1}:
            rank = Rank(stage * tp + tp_rank, parallel)
            links = ThreadLinks(rank, [], threading.Barrier(1))
            yield Decoder(spec, rank, links, torch.bfloat16, torch.device("meta"))


def cuts(spec: ModelSpec) -> list[tuple[int, int]]:
    return [(tp, pp) for tp in (1, 2, 4, 8) for pp in (1, 3) if ParallelSpec(tensor_parallel_size=tp).fits(spec)]


@pytest.mark.parametrize("spec", supported(), ids=lambda spec: spec.name)
def test_shards_of_published_models_are_what_profiler_and_memory_count(spec: ModelSpec) -> None:
    assert len(cuts(spec)) >= 4
    for tp, pp in cuts(spec):
        for decoder in shards(spec if (tp, pp) == (1, 1) else shallow(spec), tp, pp):
            assert_shards(decoder)


def test_shards_of_every_layout_are_what_profiler_and_memory_count(oracle: Callable[[str], Oracle]) -> None:
    for name in checkpoints.CONFIGS:
        for tp, pp in CUTS:
            for decoder in shards(oracle(name).spec, tp, pp):
                assert_shards(decoder)


def assert_shards(decoder: Decoder) -> None:
    """GEMMs by name, count and shape, the names of all other operators, and the bytes of the weights."""
    spec, rank = decoder.spec, decoder.rank
    held = sum(parameter.numel() * parameter.element_size() for parameter in decoder.parameters())
    assert held == weight_bytes(spec, rank.parallel, rank.stage)
    operators = {each.name: each for each in inventory(spec, rank.parallel, rank.stage)}
    gemms = {name: each for name, each in operators.items() if each.kind == "gemm"}
    found: dict[str, list[tuple[int, ...]]] = {}
    for name, module in decoder.named_modules():
        if isinstance(module, layers.Linear):
            found.setdefault(name.split(".")[-1], []).append(tuple(module.weight.shape))
    assert found == {name: [(each.n, each.k)] * each.count for name, each in gemms.items()}
    for name, each in operators.items():
        if each.kind in ("gemm", "elementwise", "moe") and name != "sampler":
            assert any(callable(getattr(holder, name, None)) for holder in (decoder, *decoder.layers)), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen"}, "no layers of model type 'qwen': it knows falcon, internlm, llama"),
        ({"model_type": "gemma"}, "no layers of model type 'gemma'"),
        ({"rotary_fraction": 0.0}, "no attention without rotary embeddings"),
        ({"activation": "relu2"}, "no activation 'relu2': it knows gelu, gelu_tanh, silu"),
        ({"rope_scaling": RopeScaling(kind="yarn")}, "no rope scaling 'yarn': it knows linear, llama3"),
        ({"attention_sinks": True}, "no attention sinks"),
        ({"norms_per_layer": 4}, "no layers of 4 norms"),
        (
            {"experts": ExpertsSpec(num_experts=4, top_k=2, intermediate_size=96, shared_intermediate_size=96)},
            "no experts that are shared, have biases or are not gated",
        ),
    ],
)
def test_what_has_no_layers_here_is_refused(changes: dict[str, object], message: str) -> None:
    spec = catalog.model("Llama-2-7b-hf")
    check_supported(spec)
    wrong = replace(spec, name="odd", **changes)
    with pytest.raises(InputError, match=f"the engine can't run odd, for it has {message}"):
        check_supported(wrong)
    rank = Rank(0, ParallelSpec())
    with pytest.raises(InputError, match=message):
        Decoder(wrong, rank, Links(rank), torch.float32, torch.device("meta"))


def test_a_cut_that_does_not_fit_is_refused() -> None:
    rank = Rank(0, ParallelSpec(tensor_parallel_size=3))
    with pytest.raises(InputError, match="can't be cut into tensor_parallel_size=3"):
        Decoder(catalog.model("Yi-34B"), rank, ThreadLinks(rank, [], threading.Barrier(1)), torch.float32, CPU)


@pytest.mark.parametrize("apart", [{"data_parallel_size": 2}, {"expert_parallel_size": 2}])
def test_experts_apart_are_refused(apart: dict[str, int], oracle: Callable[[str], Oracle]) -> None:
    rank = Rank(0, ParallelSpec(tensor_parallel_size=2, **apart))
    with pytest.raises(InputError, match="the engine cuts every expert over the tensor-parallel ranks"):
        Decoder(oracle("mixtral").spec, rank, ThreadLinks(rank, [], threading.Barrier(1)), torch.float32, CPU)


def test_experts_that_ranks_cannot_share_are_refused(oracle: Callable[[str], Oracle]) -> None:
    spec = oracle("mixtral").spec
    assert spec.experts is not None
    spec = replace(spec, experts=replace(spec.experts, intermediate_size=33))
    rank = Rank(0, ParallelSpec(tensor_parallel_size=2))
    with pytest.raises(InputError, match=r"can't be cut into .*2 of each expert.*width 33"):
        Decoder(spec, rank, ThreadLinks(rank, [], threading.Barrier(1)), torch.float32, torch.device("meta"))
