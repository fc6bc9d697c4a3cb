"""What a model takes of a GPU's memory, and how many KV blocks are left.

Follows vLLM: of `gpu_memory_utilization` of the memory, what the weights and the largest batch's activations leave
over is KV cache, and the stage with the least decides for the whole pipeline. Weights are exact; activations are an
estimate (`activation_bytes`), or what an engine's profiling run finds (`profiled_bytes`). The attention
is taken to read the pages in place; the engine, which measures its memory, also counts what a backend copies together
(`gathered_bytes` in engine/worker/attention).

    from engine import specs
    from engine.specs import catalog, memory
    parallel = specs.ParallelSpec(tensor_parallel_size=2)
    memory.num_kv_blocks(catalog.model("Yi-34B"), catalog.device("a100"), parallel, specs.SchedulerSpec())
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import InputError
from engine.specs import DeviceSpec, ExpertsSpec, ModelSpec, ParallelSpec, SchedulerSpec
from engine.specs.checks import check_fields

GIB = 1 << 30
RESERVED_BYTES = GIB  # CUDA context, cuBLAS and attention workspaces, NCCL buffers, fragmentation
DEFAULT_BATCHED_TOKENS = 2048
GPU_MEMORY_UTILIZATION = 0.9  # share of a GPU's memory that a replica uses, where none is given
MOST_WAYS = 64  # parallelism that an error message suggests at most
MOST_BLOCKS = 10_000_000  # KV blocks of a replica


@dataclass(frozen=True, kw_only=True)
class ProfileRun:
    """What an engine that profiles its memory by a run of the largest batch keeps back beside that run's activations.

    `base_bytes` on every GPU, `parallel_bytes` more where a replica spans several, and `logit_bytes` at the sampler's
    peak for each sampled row and entry of the vocabulary.
    """

    base_bytes: int
    parallel_bytes: int
    logit_bytes: int
    source: str = ""

    def __post_init__(self) -> None:
        check_fields(self, "base_bytes parallel_bytes logit_bytes", zero=True)


def weight_bytes(model: ModelSpec, parallel: ParallelSpec, stage: int) -> int:
    """Bytes of the weights on each rank of a pipeline stage (the ranks of a stage hold equally much).

    Matrices are cut `tensor_parallel_size` ways, and so are their biases where the output is cut (Q, K, V, up, gate, LM
    head); norms and the other biases are on every rank, and so is a KV head that several ranks share. The first stage
    has the embedding and the last the final norm and LM head, both cut by vocabulary; a tied LM head costs nothing
    where the embedding is anyway. Quantised are the projections and the experts.
    """
    tp, last = parallel.tensor_parallel_size, parallel.pipeline_parallel_size - 1
    qkv = model.q_size // tp + 2 * parallel.kv_heads_per_rank(model) * model.head_dim
    width = model.intermediate_size // tp
    linear = model.hidden_size * (qkv + model.q_size // tp)
    layer = qkv * model.qkv_bias + model.hidden_size * model.attention_output_bias
    layer += model.norms_per_layer * model.norm_size + 2 * model.head_dim * model.qk_norm
    layer += model.num_attention_heads // tp * model.attention_sinks
    layers = parallel.layers_of(stage, model.num_layers)
    with_experts = sum(map(model.has_experts, layers))
    dense = len(layers) - with_experts
    total = len(layers) * layer + dense * (model.mlp_parameters(width, model.mlp_bias) - model.mlp_parameters(width))
    linears = len(layers) * linear + dense * model.mlp_parameters(width)
    experts = 0
    if model.experts is not None:
        each, shared, others = _expert_parameters(model, model.experts, parallel)
        experts = with_experts * each
        linears += with_experts * shared
        total += with_experts * others
    vocab = _vocab_shard(model, parallel)
    tables = (stage == 0) + (stage == last and not (model.tie_word_embeddings and stage == 0))
    total += tables * vocab * model.hidden_size
    if stage == last:
        total += model.norm_size + vocab * model.lm_head_bias
    quantized = linears * model.bytes_of(model.linear_dtype) + experts * model.bytes_of(model.expert_format)
    return round(total * model.weight_itemsize + quantized)


def _expert_parameters(model: ModelSpec, experts: ExpertsSpec, parallel: ParallelSpec) -> tuple[int, int, int]:
    """Parameters of a layer on each rank: of the experts' matrices, of the shared ones', and of routers and biases."""
    width = experts.intermediate_size // parallel.expert_tensor_size
    shared = experts.shared_intermediate_size // parallel.tensor_parallel_size
    local = experts.num_experts // parallel.expert_parallel_size
    matrices = local * model.mlp_parameters(width)
    biases = local * model.mlp_parameters(width, experts.bias) - matrices
    router = experts.num_experts * (model.hidden_size + experts.router_bias) + model.hidden_size * experts.shared_gate
    return matrices, model.mlp_parameters(shared), biases + router


def kv_bytes_per_block(model: ModelSpec, parallel: ParallelSpec, stage: int, block_size: int) -> int:
    """Bytes that a KV block of `block_size` tokens takes on each rank of a stage, over the stage's layers."""
    layers = parallel.stage_layers(model.num_layers)[stage]
    return 2 * layers * parallel.kv_heads_per_rank(model) * model.head_dim * block_size * model.kv_cache_itemsize


def activation_bytes(model: ModelSpec, parallel: ParallelSpec, max_num_batched_tokens: int, max_num_seqs: int) -> int:
    """Estimated bytes per rank, at their peak, of the activations of a full batch and of what the runtime keeps.

    Per token: the residual and the layer's input (both whole), and the larger of Q, K, V with the attention output, and
    of the MLP's gate and up with their product. At the end fp32 logits of `max_num_seqs` rows over the rank's share of
    the vocabulary, twice, for the sampler sorts a copy. And RESERVED_BYTES. A layer's and the logits' buffers don't
    live at the same time, but the allocator rarely gives back the first for the second, so they are added.
    """
    logits = 2 * max_num_seqs * _vocab_shard(model, parallel) * 4
    return max_num_batched_tokens * _token_bytes(model, parallel) + logits + RESERVED_BYTES


def profiled_bytes(
    model: ModelSpec,
    parallel: ParallelSpec,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    profile: ProfileRun,
    samples: bool = True,
) -> int:
    """Bytes per rank that vLLM V1's profiling run keeps from the KV cache (gpu_worker.determine_available_memory).

    It runs a batch of `max_num_batched_tokens`, then, where the stage `samples`, the sampler on `max_num_seqs` rows
    with top-k and top-p, and takes the highest of what PyTorch had allocated: a layer's activations (as in
    `activation_bytes`), or the last hidden states with the logits. These are of the whole vocabulary on every rank
    (gathered, in 16 bits), and per logit take 4 bytes in float32, 12 sorted with their indices and 20 while PyTorch
    sorts them (the index of each, and radix sort's second buffers). CUDA graphs are captured later and come from what
    `gpu_memory_utilization` leaves free.
    """
    rows = min(max_num_seqs, max_num_batched_tokens)
    peak = max_num_batched_tokens * _token_bytes(model, parallel)
    if samples:
        gathered = _vocab_shard(model, parallel) * model.activation_itemsize * (parallel.tensor_parallel_size > 1)
        logits = rows * (model.vocab_size * profile.logit_bytes + gathered)
        peak = max(peak, max_num_batched_tokens * model.hidden_size * model.activation_itemsize + logits)
    return peak + profile.base_bytes + profile.parallel_bytes * (parallel.world_size > 1)


def _token_bytes(model: ModelSpec, parallel: ParallelSpec) -> int:
    """Bytes per rank of a token's activations in the widest part of a layer.

    Of experts: for each that the token passes gate and up, or the output in the same buffer, and their product; and as
    much for the tokens of each replica that shares the experts.
    """
    tp = parallel.tensor_parallel_size
    attention = 2 * model.q_size // tp + 2 * parallel.kv_heads_per_rank(model) * model.head_dim
    widest = max(attention, model.mlp_matrices * model.intermediate_size // tp if model.has_mlps else 0)
    if (experts := model.experts) is not None:
        width = experts.intermediate_size // parallel.expert_tensor_size
        passed = experts.top_k * (max((model.mlp_matrices - 1) * width, model.hidden_size) + width)
        widest = max(widest, parallel.data_parallel_size * passed)
    return (2 * model.hidden_size + widest) * model.activation_itemsize


def num_kv_blocks(
    model: ModelSpec,
    device: DeviceSpec,
    parallel: ParallelSpec,
    scheduler: SchedulerSpec,
    gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION,
    max_num_batched_tokens: int | None = None,
    profile: ProfileRun | None = None,
    reserve_bytes: int = 0,
) -> int:
    """KV blocks of a replica: what the fullest stage has room for.

    `max_num_batched_tokens` is the largest batch, where the policy's limit is not in the scheduler spec; without
    either it is taken to be 2048. `profile` is how the engine profiles its memory; None: the estimate of
    `activation_bytes`. `reserve_bytes` of each GPU are kept for something else. Raises InputError when the weights
    leave no room, saying what would.
    """
    check_utilization(gpu_memory_utilization)
    parallel.validate(model)
    tokens = max_num_batched_tokens or scheduler.max_num_batched_tokens or DEFAULT_BATCHED_TOKENS
    usable = int(device.memory_bytes * gpu_memory_utilization) - reserve_bytes
    blocks = _blocks(model, parallel, scheduler, usable, tokens, profile)
    if blocks < 1:
        raise _too_big(model, device, parallel, scheduler, usable, tokens, profile)
    return blocks


def check_utilization(gpu_memory_utilization: float) -> None:
    """Raise InputError unless it is a share of the memory."""
    if not 0 < gpu_memory_utilization <= 1:
        raise InputError(f"gpu_memory_utilization={gpu_memory_utilization}: give a share above 0 and up to 1")


def _vocab_shard(model: ModelSpec, parallel: ParallelSpec) -> int:
    return -(-model.vocab_size // parallel.tensor_parallel_size)  # the last rank is padded


def _kept(
    model: ModelSpec, parallel: ParallelSpec, stage: int, tokens: int, seqs: int, profile: ProfileRun | None
) -> int:
    """Bytes of a stage's rank beside weights and KV cache."""
    if profile is None:
        return activation_bytes(model, parallel, tokens, seqs)
    return profiled_bytes(model, parallel, tokens, seqs, profile, stage == parallel.pipeline_parallel_size - 1)


def _blocks(
    model: ModelSpec,
    parallel: ParallelSpec,
    scheduler: SchedulerSpec,
    usable: int,
    tokens: int,
    profile: ProfileRun | None,
) -> int:
    return min(
        (usable - _kept(model, parallel, stage, tokens, scheduler.max_num_seqs, profile) - weights)
        // kv_bytes_per_block(model, parallel, stage, scheduler.block_size)
        for stage in range(parallel.pipeline_parallel_size)
        for weights in [weight_bytes(model, parallel, stage)]
    )


def _too_big(
    model: ModelSpec,
    device: DeviceSpec,
    parallel: ParallelSpec,
    scheduler: SchedulerSpec,
    usable: int,
    tokens: int,
    profile: ProfileRun | None,
) -> InputError:
    """What doesn't fit, and the smallest change that would: more TP at this PP, or more PP at this TP."""
    tp, pp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    wider = [ParallelSpec(tensor_parallel_size=n, pipeline_parallel_size=pp) for n in range(tp + 1, MOST_WAYS + 1)]
    deeper = [ParallelSpec(tensor_parallel_size=tp, pipeline_parallel_size=n) for n in range(pp + 1, MOST_WAYS + 1)]

    def first_that_fits(options: list[ParallelSpec]) -> ParallelSpec | None:
        cuts = (each for each in options if each.fits(model))
        return next((each for each in cuts if _blocks(model, each, scheduler, usable, tokens, profile) >= 1), None)

    fixes = []
    if option := first_that_fits(wider):
        fixes.append(f"raise --tensor-parallel-size to {option.tensor_parallel_size}")
    if option := first_that_fits(deeper):
        fixes.append(f"raise --pipeline-parallel-size to {option.pipeline_parallel_size}")
    weights = max(weight_bytes(model, parallel, stage) for stage in range(pp))
    activations = _kept(model, parallel, pp - 1, tokens, scheduler.max_num_seqs, profile)
    block = max(kv_bytes_per_block(model, parallel, stage, scheduler.block_size) for stage in range(pp))
    advice = " or ".join(fixes) or (
        f"{(weights + activations + block - usable) / GIB:.1f} GiB too little, and no parallelism would do: "
        "lower --max-num-batched-tokens or --max-num-seqs, or take a device with more memory"
    )
    return InputError(
        f"{model.name} needs {weights / GIB:.1f} GiB of weights and {activations / GIB:.1f} GiB of activations per GPU "
        f"at {parallel} but {device.name} has {usable / GIB:.1f} GiB usable: {advice}"
    )
