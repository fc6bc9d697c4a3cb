"""What is served, on what, and how: the frozen specs that every other module reads.

A spec is plain data with the arithmetic that is about it: parameters, FLOPs and KV bytes of a model, the layers and
ranks of a parallel layout, the time of a collective on a network. Nothing here knows a measured number; named
instances are in `engine.catalog`, the memory a model takes on a GPU is in `engine.memory`.

    python -c "from engine import catalog; print(catalog.model('Mistral-7B-v0.1').kv_bytes_per_token)"
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.errors import InputError, unknown
from engine.metric_table import find_metric


def _check(spec: object, names: str, *, zero: bool = False) -> None:
    """Raise InputError unless each of the space-separated fields is finite and positive (or zero, if allowed)."""
    for name in names.split():
        value, whole = getattr(spec, name), type(spec).__annotations__[name] in (int, int | None)
        number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            wanted = f"{'whole ' * whole}number {'of at least' if zero else 'above'} 0"
            raise InputError(f"{type(spec).__name__} {name}={value!r}: give a {wanted}")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched past the positions that a model was first trained on.

    `linear` divides each by `factor`; `llama3` only those of long wavelengths. Others are named, and no engine's here.
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The shape of a dense decoder-only transformer.

    Sizes are numbers of elements. A layer is attention (Q, K, V and output projections) and an MLP (gate, up and down
    when `gated_mlp`, else up and down). With `parallel_block` both read the same input and their outputs are added at
    once, so a tensor-parallel layer needs one all-reduce instead of two; such a layer may share one norm.
    """

    name: str
    model_type: str  # Hugging Face's: llama, mistral, qwen2, qwen, internlm, falcon, phi, ...
    num_layers: int
    hidden_size: int
    intermediate_size: int  # width of one of gate and up, also where a config counts both
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    gated_mlp: bool = True
    parallel_block: bool = False
    norms_per_layer: int = 2
    norm: Literal["rms", "layer"] = "rms"
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    lm_head_bias: bool = False
    tie_word_embeddings: bool = False
    sliding_window: int | None = None  # tokens a query attends to, itself included
    rotary_fraction: float = 1.0  # share of head_dim that is rotated; 0: no rotary embedding
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    activation: str = "silu"  # of the MLP: silu, gelu, gelu_tanh
    dtype_bytes: int = 2  # of a weight and of a KV element, as served

    def __post_init__(self) -> None:
        _check(self, "num_layers hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim")
        _check(self, "vocab_size max_position_embeddings rope_theta dtype_bytes norm_eps")
        _check(self, "rotary_fraction", zero=True)
        if self.sliding_window is not None:
            _check(self, "sliding_window")
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"{self.name}: num_key_value_heads={self.num_key_value_heads} does not divide "
                f"num_attention_heads={self.num_attention_heads}: query heads share KV heads in equal groups"
            )
        if self.norm not in ("rms", "layer"):
            raise unknown("norm", str(self.norm), ("rms", "layer"))
        if self.norms_per_layer not in ((1, 2) if self.parallel_block else (2,)):
            raise InputError(
                f"{self.name}: norms_per_layer={self.norms_per_layer}: give 2 (1 only with parallel_block, where "
                "attention and MLP may share a norm)"
            )
        if self.rotary_fraction > 1:
            raise InputError(f"{self.name}: rotary_fraction={self.rotary_fraction}: give a share between 0 and 1")

    @property
    def q_size(self) -> int:
        """Width of the query (and of the attention output before its projection): heads * head_dim."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of the key, and of the value: KV heads * head_dim."""
        return self.num_key_value_heads * self.head_dim

    @property
    def mlp_matrices(self) -> int:
        """Weight matrices of an MLP: gate, up and down, or up and down."""
        return 3 if self.gated_mlp else 2

    @property
    def norm_size(self) -> int:
        """Parameters of one norm: a weight, and for layer norm a bias too."""
        return self.hidden_size * (2 if self.norm == "layer" else 1)

    @property
    def matmul_parameters(self) -> int:
        """Parameters of the matrices that a token is multiplied with: projections, MLPs and LM head, no embedding."""
        attention = self.hidden_size * (self.q_size + 2 * self.kv_size) + self.q_size * self.hidden_size
        mlp = self.mlp_matrices * self.hidden_size * self.intermediate_size
        return self.num_layers * (attention + mlp) + self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """Distinct parameters, exactly; an LM head that is tied to the embedding counts once."""
        bias = (self.q_size + 2 * self.kv_size) * self.qkv_bias + self.hidden_size * self.attention_output_bias
        bias += ((self.mlp_matrices - 1) * self.intermediate_size + self.hidden_size) * self.mlp_bias
        embedding = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        return (
            self.matmul_parameters
            + embedding
            + self.num_layers * (bias + self.norms_per_layer * self.norm_size)
            + self.norm_size  # before the LM head
            + self.vocab_size * self.lm_head_bias
        )

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token leaves in the cache, over all layers and KV heads."""
        return 2 * self.num_layers * self.kv_size * self.dtype_bytes

    def flops_per_token(self, context: int) -> int:
        """FLOPs of one token that attends to `context` tokens, itself included (a sliding window caps it).

        2 per matmul parameter, the LM head among them (so this is a token whose logits are wanted), plus
        4 * context * q_size per layer for QK^T and PV (Kaplan et al. 2020, section 2.1). The embedding look-up, norms,
        activations and softmax are not counted.
        """
        attended = context if self.sliding_window is None else min(context, self.sliding_window)
        return 2 * self.matmul_parameters + 4 * attended * self.q_size * self.num_layers

    @classmethod
    def from_hf(cls, source: str | Path | Mapping[str, Any], name: str | None = None) -> "ModelSpec":
        """The spec of a Hugging Face `config.json`: the file, a folder that holds it, or its contents.

        Raises InputError for what is not a dense decoder, and for a missing key. See `engine.hf_config`.
        """
        from engine import hf_config  # it imports this module

        return hf_config.read(source, name)


@dataclass(frozen=True, kw_only=True)
class ParallelSpec:
    """How a replica is cut over GPUs. Stage s of the pipeline is ranks s*tp .. (s+1)*tp - 1."""

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1

    def __post_init__(self) -> None:
        _check(self, "tensor_parallel_size pipeline_parallel_size")

    def __str__(self) -> str:
        return f"TP{self.tensor_parallel_size}-PP{self.pipeline_parallel_size}"

    @property
    def world_size(self) -> int:
        """GPUs of a replica."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def stage_layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers of each stage, as even as can be.

        The remainder goes one layer each to the stages just before the last, which has the LM head to compute already:
        vLLM's rule, 10 layers on 4 stages are (2, 3, 3, 2).
        """
        stages = self.pipeline_parallel_size
        each, extra = divmod(num_layers, stages)
        return tuple(each + (stages - 1 - extra <= stage < stages - 1) for stage in range(stages))

    def kv_heads_per_rank(self, model: ModelSpec) -> int:
        """KV heads on each rank; where there are fewer heads than ranks, several ranks hold a copy of the same one."""
        return max(1, model.num_key_value_heads // self.tensor_parallel_size)

    def fits(self, model: ModelSpec) -> bool:
        """Whether `model` can be cut this way (its memory is another question)."""
        tp, heads, kv_heads = self.tensor_parallel_size, model.num_attention_heads, model.num_key_value_heads
        kv_fits = kv_heads % tp == 0 or tp % kv_heads == 0
        whole = heads % tp == 0 and kv_fits and model.intermediate_size % tp == 0
        return whole and self.pipeline_parallel_size <= model.num_layers

    def validate(self, model: ModelSpec) -> None:
        """Raise InputError when `model` can't be cut this way; the message says which sizes would do."""
        tp, pp = self.tensor_parallel_size, self.pipeline_parallel_size
        if pp > model.num_layers:
            raise InputError(
                f"pipeline_parallel_size={pp} is more than the {model.num_layers} layers of {model.name}: "
                f"use at most {model.num_layers}"
            )
        if not self.fits(model):
            sizes = [
                str(size)
                for size in range(1, model.num_attention_heads + 1)
                if ParallelSpec(tensor_parallel_size=size).fits(model)
            ]
            raise InputError(
                f"{model.name} can't be cut into tensor_parallel_size={tp}: it must divide {model.num_attention_heads} "
                f"attention heads and MLP width {model.intermediate_size}, and divide or be a multiple of "
                f"{model.num_key_value_heads} KV heads: use {', '.join(sizes)}"
            )


@dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """An accelerator by its data sheet. The efficiencies are estimates: the share of the peak a good kernel attains."""

    name: str
    description: str
    peak_flops: float  # dense 16-bit FLOP/s, no sparsity
    memory_bandwidth: float  # bytes/s
    memory_bytes: int
    matmul_efficiency: float
    attention_efficiency: float
    bandwidth_efficiency: float
    network: str  # name of the NetworkSpec it usually comes with
    source: str  # where the numbers come from
    num_sms: int = 108  # streaming multiprocessors, over which a kernel's tiles are spread
    calibration: str | None = None  # folder of its calibration; None: what ships under its name, if anything

    def __post_init__(self) -> None:
        _check(self, "peak_flops memory_bandwidth memory_bytes num_sms")
        for name in ("matmul_efficiency", "attention_efficiency", "bandwidth_efficiency"):
            _check(self, name)
            if getattr(self, name) > 1:
                raise InputError(f"device {self.name}: {name}={getattr(self, name)}: give a share between 0 and 1")


@dataclass(frozen=True)
class Link:
    """A connection between GPUs: the time of a message is latency_s + bytes / bandwidth (one GPU, one direction)."""

    latency_s: float
    bandwidth_bytes_per_s: float

    def __post_init__(self) -> None:
        _check(self, "latency_s", zero=True)
        _check(self, "bandwidth_bytes_per_s")


@dataclass(frozen=True, kw_only=True)
class NetworkSpec:
    """How the GPUs of a replica are connected; ranks fill a node before the next one begins.

    `node` connects any two GPUs of a node (NVSwitch or PCIe); where `pair` is given, a bridge connects ranks 2i and
    2i+1 instead. `internode` connects GPUs of different nodes.
    """

    name: str
    description: str
    gpus_per_node: int
    node: Link
    internode: Link
    pair: Link | None = None
    source: str

    def __post_init__(self) -> None:
        _check(self, "gpus_per_node")
        if self.pair is not None and self.gpus_per_node % 2:
            raise InputError(
                f"network {self.name}: gpus_per_node={self.gpus_per_node} is odd but `pair` bridges GPUs two by two: "
                "give an even number, or no pair"
            )

    def _direct(self, a: int, b: int) -> Link:
        if a // self.gpus_per_node != b // self.gpus_per_node:
            return self.internode
        return self.pair if self.pair is not None and a // 2 == b // 2 else self.node

    def link(self, first_rank: int, last_rank: int) -> Link:
        """The slowest link between neighbours among the ranks first..last, which a ring over them waits for."""
        if not 0 <= first_rank < last_rank:
            raise InputError(f"ranks {first_rank}..{last_rank} span no link: give 0 <= first_rank < last_rank")
        links = [self._direct(rank, rank + 1) for rank in range(first_rank, last_rank)]
        return min(links, key=lambda link: (link.bandwidth_bytes_per_s, -link.latency_s))

    def allreduce_time(self, num_bytes: int, first_rank: int, num_ranks: int) -> float:
        """Seconds of a ring all-reduce of `num_bytes` on each of `num_ranks` ranks from `first_rank`; 0 for one.

        Reduce-scatter and all-gather take n-1 steps each, and every step moves bytes/n (Patarasuk & Yuan 2009):
        2(n-1)/n * bytes / bandwidth + 2(n-1) * latency.
        """
        if num_ranks == 1:
            return 0.0
        link, steps = self.link(first_rank, first_rank + num_ranks - 1), 2 * (num_ranks - 1)
        return steps * (num_bytes / num_ranks / link.bandwidth_bytes_per_s + link.latency_s)

    def send_time(self, num_bytes: int, from_rank: int, to_rank: int) -> float:
        """Seconds to send `num_bytes` from one rank to another; 0 to itself."""
        if from_rank == to_rank:
            return 0.0
        link = self._direct(from_rank, to_rank)
        return link.latency_s + num_bytes / link.bandwidth_bytes_per_s


@dataclass(frozen=True, kw_only=True)
class HostOverhead:
    """Host time of one iteration: what it adds to the GPU's time, and the time to launch the layers' kernels.

    Launching overlaps with the GPU, so a stage takes max(GPU, launch) + added. Each stage launches its own layers; what
    is added is the engine's serial path (schedule, prepare inputs, sample, process outputs, messages) and is charged
    once an iteration, to the first stage.
    """

    name: str
    iteration_s: float  # added to every iteration
    sequence_s: float  # added for each sequence of the batch
    layer_s: float  # to launch one layer
    message_s: float = 0.0  # added where there are workers to wait for: a replica of two or more ranks, however many
    graph_decodes: int = 0  # batches of decodes alone, up to this many, are launched as one CUDA graph: no layer_s
    attention_kernel: str | None = None  # that such an engine runs, by its name in a calibration; None: the usual one
    source: str

    def __post_init__(self) -> None:
        _check(self, "iteration_s sequence_s layer_s message_s graph_decodes", zero=True)

    def times(self, layers: int, sequences: int, ranks: int, stage: int = 0) -> tuple[float, float]:
        """(launch, added) seconds of a batch of `sequences` on a pipeline `stage` that has `layers`.

        `ranks` are all those of the replica. The stage takes max(GPU, launch) + added.
        """
        launch = layers * self.layer_s
        if stage:
            return launch, 0.0
        return launch, self.iteration_s + self.sequence_s * sequences + (self.message_s if ranks > 1 else 0.0)


@dataclass(frozen=True, kw_only=True)
class SchedulerSpec:
    """How batches are formed. None leaves a limit to the policy or to the model.

    `watermark` is the share of KV blocks that admission leaves free. The dynamic chunk schedule is Sarathi-Serve's: the
    token budget falls linearly from `chunk_schedule_high` to `chunk_schedule_low` over `chunk_schedule_stages` equal
    stages of a prompt's first `chunk_schedule_max_tokens` tokens, in multiples of 32 tokens.
    `engine.policies.resolve` fills in what is left open.
    """

    policy: str = "sarathi"
    max_num_batched_tokens: int | None = None
    max_num_seqs: int = 128
    max_model_len: int | None = None
    block_size: int = 16  # tokens a KV block holds
    watermark: float | None = None
    chunk_schedule: Literal["fixed", "dynamic"] = "fixed"
    chunk_schedule_low: int | None = None
    chunk_schedule_high: int | None = None
    chunk_schedule_stages: int | None = None
    chunk_schedule_max_tokens: int | None = None

    def __post_init__(self) -> None:
        _check(self, "max_num_seqs block_size")
        if self.watermark is not None:
            _check(self, "watermark", zero=True)
            if self.watermark >= 1:
                raise InputError(f"SchedulerSpec watermark={self.watermark}: give a share of the KV blocks, below 1")
        optional = ["chunk_schedule_low", "chunk_schedule_high", "chunk_schedule_stages", "chunk_schedule_max_tokens"]
        for name in ("max_num_batched_tokens", "max_model_len", *optional):
            if getattr(self, name) is not None:
                _check(self, name)
        if self.chunk_schedule not in ("fixed", "dynamic"):
            raise unknown("chunk_schedule", str(self.chunk_schedule), ("fixed", "dynamic"))
        low, high = self.chunk_schedule_low, self.chunk_schedule_high
        if low is not None and high is not None and low > high:
            raise InputError(f"chunk_schedule_low={low} is above chunk_schedule_high={high}: exchange them")


_SLO_TEXT = re.compile(
    r"(?P<statistic>[^\W_]+(?:\.\d+)?)_(?P<metric>\w+)\s*<=?\s*(?P<value>[^\s<>]+?)\s*(?P<unit>ms|s|)"
)
_SLO_EXAMPLE = "write it as p99_tbt<=0.1 or median_scheduling_delay<=2s or mean_ttft<=300ms"


@dataclass(frozen=True)
class SLO:
    """A bound on a statistic of a latency metric: percentile (pNN), mean or max of `metric` <= threshold_s seconds.

    `metric` is a key of `engine.metric_table.METRICS`; it may be given by any of its names.
    """

    metric: str
    statistic: str
    threshold_s: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "metric", find_metric(self.metric).key)  # tbt for itl
        if self.statistic not in ("mean", "max"):
            percentile = re.fullmatch(r"p(\d+(?:\.\d+)?)", self.statistic)
            if percentile is None:
                raise unknown("SLO statistic", self.statistic, ("p50", "p99", "p99.9", "mean", "max", "median"))
            if float(percentile[1]) > 100:
                raise InputError(f"SLO statistic {self.statistic!r}: give a percentile from p0 to p100")
            object.__setattr__(self, "statistic", f"p{float(percentile[1]):g}")  # p99 for p99.0 and p099
        _check(self, "threshold_s")

    @property
    def percentile(self) -> float | None:
        """99.9 for p99.9; None for mean and max."""
        return float(self.statistic[1:]) if self.statistic.startswith("p") else None

    @classmethod
    def parse(cls, text: str) -> "SLO":
        """Read `p99_tbt<=0.1`: statistic, metric and threshold in seconds, or with a suffix s or ms; `<` means `<=`."""
        match = _SLO_TEXT.fullmatch(text.strip().lower())
        if match is None:
            raise InputError(f"can't read the SLO {text!r}: {_SLO_EXAMPLE}")
        metric, statistic = match["metric"], match["statistic"]
        try:
            threshold = float(match["value"]) / (1000 if match["unit"] == "ms" else 1)
            return cls(metric, "p50" if statistic == "median" else statistic, threshold)
        except InputError as error:
            raise InputError(f"can't read the SLO {text!r}: {error}; {_SLO_EXAMPLE}") from None
        except ValueError:
            raise InputError(f"can't read the SLO {text!r}: {match['value']!r} is no number; {_SLO_EXAMPLE}") from None

    def __str__(self) -> str:
        return f"{self.statistic}_{self.metric}<={repr(self.threshold_s).removesuffix('.0')}s"
