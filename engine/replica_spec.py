"""Everything that decides how a replica behaves, resolved once: what `simulate`, `search`, `bench` and the rest take.

A ReplicaSpec holds no setting that is left open, so two commands that resolve the same settings run the same replica.
The one thing that may wait is the number of KV blocks: None is what the memory holds, which the simulator computes
from the data sheet and the engine measures.

    from engine.replica_spec import resolve
    replica = resolve("mistralai/Mistral-7B-v0.1", "a100", scheduler=SchedulerSpec(max_model_len=8192))
    print(replica.num_kv_blocks(), replica.engine.host.name, replica.model.kv_cache_dtype)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypedDict

from engine.engine_preset import DEFAULT, EnginePreset, preset
from engine.errors import InputError, unknown
from engine.scheduling import policies
from engine.scheduling.osdi24 import Osdi24Scheduler
from engine.scheduling.scheduler import Scheduler
from engine.specs import DTYPES, DeviceSpec, ModelSpec, NetworkSpec, ParallelSpec, SchedulerSpec, catalog, memory
from engine.specs.device_folder import profiled_dtype
from engine.specs.memory import MOST_BLOCKS

FP8_CACHE = ("fp8_e4m3", "fp8_e5m2")
SETTINGS = (  # of a scheduler, by which a resolved one is written down and read again
    "max_num_batched_tokens",
    "max_num_seqs",
    "max_model_len",
    "block_size",
    "watermark",
    "enable_prefix_caching",
    "scheduling_policy",
    "long_prefill_token_threshold",
    "long_prefill_token_threshold_adaptive",
    "scheduler_reserve_full_isl",
    "vllm_version",
)


@dataclass(frozen=True, kw_only=True)
class ReplicaSpec:
    """One kind of replica, with nothing left open. `resolve` makes it from names.

    `scheduler` is resolved (`engine.scheduling.policies.resolve`). `num_gpu_blocks_override` None leaves the KV blocks
    to the memory. Raises InputError for parts that contradict each other.
    """

    model: ModelSpec
    device: DeviceSpec
    network: NetworkSpec
    parallel: ParallelSpec
    scheduler: SchedulerSpec
    engine: EnginePreset
    async_scheduling: bool
    gpu_memory_utilization: float
    num_gpu_blocks_override: int | None
    card: str = field(default="", compare=False)  # which one it is, where the device's name left that open

    def __post_init__(self) -> None:
        self.parallel.validate(self.model)
        memory.check_utilization(self.gpu_memory_utilization)
        blocks = self.num_gpu_blocks_override
        if blocks is not None and not 1 <= blocks <= MOST_BLOCKS:
            raise InputError(f"num_gpu_blocks_override {blocks}: give 1 to {MOST_BLOCKS:,} blocks")
        if self.async_scheduling and self.parallel.pipeline_parallel_size > 1:
            raise InputError("async_scheduling true is for one pipeline stage: several batches are in flight already")

    def num_kv_blocks(self) -> int:
        """Return the KV blocks: the override, or what the device's memory holds by its data sheet.

        Raises InputError where the model leaves no room for any.
        """
        if self.num_gpu_blocks_override is not None:
            return self.num_gpu_blocks_override
        return memory.num_kv_blocks(
            self.model,
            self.device,
            self.parallel,
            self.scheduler,
            self.gpu_memory_utilization,
            policies.largest_batch(self.scheduler),
            self.engine.profile_run,
            self.engine.reserve_bytes,
        )

    def with_blocks(self, num_blocks: int) -> ReplicaSpec:
        """Return the replica with so many KV blocks, such as an executor has measured."""
        return replace(self, num_gpu_blocks_override=num_blocks)

    def new_scheduler(self, num_blocks: int | None = None, simulated: bool = False) -> Scheduler:
        """Make the scheduler of one such replica; `num_blocks` None takes `num_kv_blocks()`.

        The options by which an engine counts (`engine.scheduling.osdi24`) have a meaning in `simulated` runs alone.
        """
        blocks = self.num_kv_blocks() if num_blocks is None else num_blocks
        counts = simulated and (self.scheduler.late_first_token or self.scheduler.preempt_for_every_decode)
        return (Osdi24Scheduler if counts else Scheduler)(
            self.scheduler,
            max(1, blocks - self._null_blocks),
            max_in_flight=self.parallel.pipeline_parallel_size,
            sliding_window=None if self.model.full_attention_layers else self.model.sliding_window,
            async_scheduling=self.async_scheduling,
        )

    @property
    def _null_blocks(self) -> int:
        """KV blocks that are counted and never handed out."""
        return policies.POLICIES[self.scheduler.policy].null_blocks

    def notes(self) -> list[str]:
        """Return what a reader of the results should know."""
        length, positions = self.scheduler.max_model_len or 0, self.model.max_position_embeddings
        notes = [each for each in (self.card, self.engine.note) if each]
        if length > positions:
            notes.append(
                f"--max-model-len {length} is past the {positions} positions that {self.model.name} was made for"
            )
        policy, longest = (
            policies.POLICIES[self.scheduler.policy],
            f"activation memory is counted for {length} tokens",
        )
        if not policy.has_budget:
            notes.append(f"{self.scheduler.policy} has no token budget: a batch may hold many whole prompts; {longest}")
        elif not policy.strict_budget:
            notes.append(f"{self.scheduler.policy} runs a prompt over its token budget whole; {longest}")
        if self.scheduler.policy == "vllm" and self.engine.scheduler.get("policy") == "vllm_v0":
            notes.append(f"the scheduler vllm is vLLM V1's; that of {self.engine.name} is vllm_v0")
        sharers = self.parallel.data_parallel_size
        if sharers > 1:
            notes.append(
                f"{sharers} such replicas share the experts: deploy a multiple of {sharers}. The batches of the others "
                "are taken to be as large as each one's own, and to run in step with it"
            )
        tp, node = self.parallel.tensor_parallel_size, self.network.gpus_per_node
        if tp > node:
            rate = self.network.internode.bandwidth_bytes_per_s / 1e9
            notes.append(f"TP{tp} spans {-(-tp // node)} nodes of {node} GPUs: its all-reduces go at {rate:g} GB/s")
        return notes

    def describe(self, predictor: str) -> dict[str, Any]:
        """Return a summary's entry for it; `predictor` is the line that says where the times come from."""
        blocks = self.num_kv_blocks()
        return {
            "model": self.model.name,
            "device": self.device.name,
            "network": self.network.name,
            "num_nodes": -(-self.parallel.world_size // self.network.gpus_per_node),
            "parallel": str(self.parallel),
            "num_gpus": self.parallel.world_size,
            "engine": self.engine.name,
            "engine_overrides": list(self.engine.overrides),
            "scheduler": self.scheduler.policy,
            "max_num_batched_tokens": self.scheduler.max_num_batched_tokens,
            "max_num_seqs": self.scheduler.max_num_seqs,
            "async_scheduling": self.async_scheduling,
            "prefix_caching": self.scheduler.enable_prefix_caching,
            "max_model_len": self.scheduler.max_model_len,
            "num_gpu_blocks": blocks,
            "kv_cache_tokens": (blocks - self._null_blocks) * self.scheduler.block_size,
            "predictor": predictor,
            "notes": self.notes(),
        }

    def settings(self) -> dict[str, Any]:
        """Return the settings that `resolve` filled in, by their names in a config file.

        Settings of the same file with these on top resolve to an equal replica.
        """
        engine = {"engine": self.engine.name} if self.engine.ships else {}
        scheduler = {name: getattr(self.scheduler, name) for name in SETTINGS}
        return {
            **engine,
            "scheduler": self.scheduler.policy,
            **scheduler,
            "dtype": self.model.activation_dtype if self.model.weight_dtype == self.model.activation_dtype else None,
            "quantization": self.model.quantization or "auto",
            "kv_cache_dtype": self.model.kv_cache_dtype,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "async_scheduling": self.async_scheduling,
            "host_overhead": self.engine.host_overhead,
            "num_gpu_blocks_override": self.num_gpu_blocks_override,
        }


class ReplicaSettings(TypedDict, total=False):
    """The settings of `resolve`, for those who hand them on."""

    network: str | None
    internode_network: str | None
    parallel: ParallelSpec | None
    engine: str
    usage: str
    scheduler: SchedulerSpec | Mapping[str, Any] | None
    dtype: str
    quantization: str
    kv_cache_dtype: str
    host_overhead: str
    async_scheduling: bool | None
    gpu_memory_utilization: float | None
    num_gpu_blocks_override: int | None


def resolve(
    model: str | ModelSpec,
    device: str | DeviceSpec,
    *,
    network: str | None = None,
    internode_network: str | None = None,
    parallel: ParallelSpec | None = None,
    engine: str = DEFAULT,
    usage: str = "server",
    scheduler: SchedulerSpec | Mapping[str, Any] | None = None,
    dtype: str = "auto",
    quantization: str = "auto",
    kv_cache_dtype: str = "auto",
    host_overhead: str = "auto",
    async_scheduling: bool | None = None,
    gpu_memory_utilization: float | None = None,
    num_gpu_blocks_override: int | None = None,
) -> ReplicaSpec:
    """Make a replica from names, files or specs, with what is left open filled in. Raises InputError for what can't be.

    Args:
        network: inside a node; None takes the device's usual one.
        internode_network: between nodes; None takes the network's own.
        engine: the preset that decides what is left open (None), see `engine.engine_preset.preset`.
        usage: server or offline, where the engine's limits differ.
        scheduler: fields of a SchedulerSpec in place of the engine's, or a whole one. Limits that are still open are
            filled in from the policy and the model.
        dtype: of weights, activations and KV cache. "auto" leaves a ModelSpec as it is; for a name see `dtype_on`.
        quantization: the format of the linear layers and experts, see `ModelSpec.quantized`; "auto" is the config's.
        kv_cache_dtype: of the KV cache alone, in DTYPE_BYTES, fp8 being fp8_e4m3; "auto" is the config's, else `dtype`.
        host_overhead: see `engine.engine_preset.preset`.
        num_gpu_blocks_override: KV blocks; None: what the memory holds.
    """
    card = catalog.which_card(device) if isinstance(device, str) else ""
    device = catalog.device(device) if isinstance(device, str) else device
    if isinstance(model, str):
        named = catalog.model(model)
        model = named.in_dtype(dtype_on(device, dtype))
        if named.kv_cache_dtype in FP8_CACHE:  # as its config has it
            model = replace(model, kv_cache_dtype=named.kv_cache_dtype)
    elif dtype != "auto":
        model = model.in_dtype(dtype_on(device, dtype))
    if quantization != "auto":
        model = model.quantized(quantization)
    if kv_cache_dtype != "auto":
        if kv_cache_dtype not in (*DTYPES, "fp8", *FP8_CACHE):
            raise unknown("kv_cache_dtype", kv_cache_dtype, ("auto", *DTYPES, "fp8", *FP8_CACHE))
        model = replace(model, kv_cache_dtype="fp8_e4m3" if kv_cache_dtype == "fp8" else kv_cache_dtype)
    given = dict(scheduler) if isinstance(scheduler, Mapping) else {}
    longest = given.get("max_model_len") or model.max_position_embeddings
    chosen = preset(engine, device, host_overhead, usage, longest, given)
    spec = scheduler if isinstance(scheduler, SchedulerSpec) else chosen.scheduler_spec(given)
    spec = policies.resolve(spec, model.max_position_embeddings)
    parallel = parallel or ParallelSpec()
    staged = parallel.pipeline_parallel_size > 1  # where the engine's asynchronous scheduling is not supported
    ahead = chosen.async_scheduling and not staged if async_scheduling is None else async_scheduling
    share = chosen.gpu_memory_utilization if gpu_memory_utilization is None else gpu_memory_utilization
    theirs = policies.resolve(chosen.scheduler_spec({"max_model_len": spec.max_model_len}), longest)
    asked = given if isinstance(scheduler, Mapping) else {each.name: getattr(spec, each.name) for each in fields(spec)}
    overrides = [name for name, value in asked.items() if value is not None and value != getattr(theirs, name)]
    overrides += ["async_scheduling"] * (async_scheduling not in (None, chosen.async_scheduling))
    overrides += ["gpu_memory_utilization"] * (share != chosen.gpu_memory_utilization)
    if host_overhead != "auto":
        overrides += ["host_overhead"] * (chosen.host_overhead != preset(engine, device).host_overhead)
    overrides += ["num_gpu_blocks_override"] * (num_gpu_blocks_override is not None)
    return ReplicaSpec(
        model=model,
        device=device,
        network=catalog.network(network or device.network, internode_network),
        parallel=parallel,
        scheduler=spec,
        engine=replace(chosen.padded(spec), overrides=tuple(overrides)),
        async_scheduling=ahead,
        gpu_memory_utilization=share,
        num_gpu_blocks_override=num_gpu_blocks_override,
        card=card,
    )


def dtype_on(device: DeviceSpec, dtype: str) -> str:
    """Return the dtype that a setting means on a device.

    "auto" is what the device was profiled in, else float32 on a CPU, else bfloat16. Raises InputError for one that no
    model is served in.
    """
    if dtype == "auto":
        return profiled_dtype(device) or ("float32" if device.runs_on == "cpu" else "bfloat16")
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, ("auto", *DTYPES))
    return dtype
