"""The settings of a run, from flags, keywords or a YAML file: pydantic models, which the flags are generated from.

Names follow vLLM where vLLM has one. In a file the same names are keys, with underscores; a flag wins over the file.
"""

from __future__ import annotations

from collections.abc import Collection
from inspect import signature
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine.errors import InputError
from engine.replica_spec import ReplicaSettings, ReplicaSpec, resolve
from engine.results.slo import SLO
from engine.specs import DeviceSpec, ParallelSpec, SchedulerSpec
from engine.workload.workload import WorkloadSpec
from windtunnel.names import unknown_setting
from windtunnel.trace_check import check_no_result

TOLERANCE = 0.025  # of a capacity search, a share of the capacity

# what is not given is what the specs say; here no default of a replica is decided
_PARALLEL, _SCHEDULER = ParallelSpec(), SchedulerSpec()
_REPLICA = {name: parameter.default for name, parameter in signature(resolve).parameters.items()}


def _field(default: Any, panel: str, help: str) -> Any:
    return Field(default, description=help, json_schema_extra={"panel": panel})


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


Settings = TypeVar("Settings", bound=_Settings)


class ServingSettings(_Settings):
    """A model, how it is cut over GPUs, and how its batches are formed."""

    model: str = _field("", "Deployment", "Model: a known Hugging Face name, or a folder or file with a config.json.")
    tensor_parallel_size: int = _field(
        _PARALLEL.tensor_parallel_size, "Deployment", "Number of GPUs that share each layer."
    )
    pipeline_parallel_size: int = _field(_PARALLEL.pipeline_parallel_size, "Deployment", "Number of pipeline stages.")
    dtype: str = _field(
        _REPLICA["dtype"],
        "Deployment",
        "Data type: bfloat16, float16, float32 or auto (the profile's, else float32 on a CPU, else bfloat16).",
    )
    gpu_memory_utilization: float = _field(
        _REPLICA["gpu_memory_utilization"], "Deployment", "Share of the GPU memory to use."
    )
    num_gpu_blocks_override: int | None = _field(
        _REPLICA["num_gpu_blocks_override"], "Deployment", "Number of KV blocks. Default: as many as fit in the memory."
    )
    scheduler: str = _field(
        _SCHEDULER.policy,
        "Scheduler",
        "Batching policy: sarathi, vllm (V1), vllm_v0, orca, request_level, chunked_only or hybrid_only.",
    )
    max_num_batched_tokens: int | None = _field(
        _SCHEDULER.max_num_batched_tokens, "Scheduler", "Token budget of a batch. Default: the policy's."
    )
    max_num_seqs: int = _field(_SCHEDULER.max_num_seqs, "Scheduler", "Maximum number of requests running at once.")
    max_model_len: int | None = _field(
        _SCHEDULER.max_model_len,
        "Scheduler",
        "Maximum length of a request (tokens); longer ones are dropped and counted. Default: the model's.",
    )
    block_size: int = _field(_SCHEDULER.block_size, "Scheduler", "Number of tokens in a KV block.")
    watermark: float = _field(_SCHEDULER.watermark, "Scheduler", "Share of the KV blocks that admission keeps free.")
    async_scheduling: bool = _field(
        _REPLICA["async_scheduling"],
        "Scheduler",
        "true: schedule the next batch while one runs (one pipeline stage only).",
    )
    chunk_schedule: Literal["fixed", "dynamic"] = _field(
        _SCHEDULER.chunk_schedule,
        "Scheduler",
        "Chunk size of prompts: fixed or dynamic.",
    )
    chunk_schedule_low: int | None = _field(None, "Scheduler", "Smallest chunk of the dynamic schedule (tokens).")
    chunk_schedule_high: int | None = _field(None, "Scheduler", "Largest chunk of the dynamic schedule (tokens).")
    chunk_schedule_stages: int | None = _field(None, "Scheduler", "Number of chunk sizes in the dynamic schedule.")
    chunk_schedule_max_tokens: int | None = _field(
        None, "Scheduler", "Prompt length that the dynamic schedule spans (tokens)."
    )

    def parallel_spec(self) -> ParallelSpec:
        return ParallelSpec(
            tensor_parallel_size=self.tensor_parallel_size, pipeline_parallel_size=self.pipeline_parallel_size
        )

    def scheduler_spec(self) -> SchedulerSpec:
        return SchedulerSpec(
            policy=self.scheduler,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_num_seqs=self.max_num_seqs,
            max_model_len=self.max_model_len,
            block_size=self.block_size,
            watermark=self.watermark,
            chunk_schedule=self.chunk_schedule,
            chunk_schedule_low=self.chunk_schedule_low,
            chunk_schedule_high=self.chunk_schedule_high,
            chunk_schedule_stages=self.chunk_schedule_stages,
            chunk_schedule_max_tokens=self.chunk_schedule_max_tokens,
        )

    def _replica_settings(self) -> ReplicaSettings:
        return {
            "parallel": self.parallel_spec(),
            "scheduler": self.scheduler_spec(),
            "dtype": self.dtype,
            "async_scheduling": self.async_scheduling,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "num_gpu_blocks_override": self.num_gpu_blocks_override,
        }


class ReplicaConfig(ServingSettings):
    """Settings that may differ between the replicas of a cluster."""

    device: str = _field(
        "",
        "Deployment",
        "Device: a100 (a100_pcie), a100_sxm, a40, h100, h200, l4, cpu, a YAML file or a calibration's folder.",
    )
    network: str | None = _field(
        _REPLICA["network"],
        "Deployment",
        "Network inside a node: nvswitch_a100, pairwise_nvlink, pcie, ... or a YAML file. Default: the device's.",
    )
    internode_network: str | None = _field(
        _REPLICA["internode_network"],
        "Deployment",
        "Network between nodes: ethernet_100g or infiniband_200g. Default: that of --network.",
    )
    host_overhead: str = _field(
        _REPLICA["host_overhead"],
        "Deployment",
        "Host overhead of an iteration: cuda_graphs, eager, eager_cpu, sarathi_osdi24, measured (by the calibration) "
        "or auto (measured if available, else eager_cpu on a CPU, else cuda_graphs).",
    )
    predictor: str = _field(
        "auto",
        "Deployment",
        "Predictor of batch times: learned, roofline, or auto (learned if the device has a calibration).",
    )

    def replica_spec(self) -> ReplicaSpec:
        """Resolve the settings into the replica they describe. Raises InputError for what can't be."""
        return resolve(self.model, self.device, **self._replica_settings())

    def _replica_settings(self) -> ReplicaSettings:
        return {
            **super()._replica_settings(),
            "network": self.network,
            "internode_network": self.internode_network,
            "host_overhead": self.host_overhead,
        }


class EngineSettings(_Settings):
    """Settings of the engine that a simulation ignores."""

    attention_backend: str | None = _field(
        None,
        "Engine",
        "Attention backend: flash_attn, flashinfer, torch_varlen or sdpa. Default: the best one installed.",
    )
    executor: str | None = _field(
        None,
        "Engine",
        "Executor: in_process (one rank), multiprocess (one node) or ray. Default: the first that suffices.",
    )
    load_format: str = _field(
        "auto", "Engine", "Weights: auto or safetensors (from the model folder), or dummy (random)."
    )
    enforce_eager: bool = _field(False, "Engine", "true: disable CUDA graphs.")
    cudagraph_capture_sizes: str | int | None = _field(
        None,
        "Engine",
        "Decode batch sizes to capture as CUDA graphs, such as 1,2,4,8; others run eagerly. Default: up to 256.",
    )
    distributed_port: int | None = _field(None, "Engine", "Port for the rendezvous of ranks. Default: a free port.")


ENGINE_KEYS = frozenset(EngineSettings.model_fields)


class RunConfig(ReplicaConfig):
    """Everything that decides a run."""

    num_replicas: int = _field(1, "Deployment", "Number of replicas behind the router.")
    router: str = _field(
        "round_robin",
        "Deployment",
        "Router: round_robin, random, least_outstanding_requests or least_outstanding_tokens.",
    )
    workload: str | None = _field(
        None,
        "Workload",
        "Distribution of lengths: openchat_sharegpt4 (the default), arxiv_summarization, azure_code, azure_conv, "
        "fixed, uniform, zipf or FILE.json.",
    )
    trace: Path | None = _field(
        None, "Workload", "Recorded trace to replay (CSV or JSONL; docs/settings.md) in place of --workload."
    )
    input_len: str | int | None = _field(
        None, "Workload", "Prompt length in tokens: N for fixed, LOW:HIGH for uniform and zipf."
    )
    output_len: str | int | None = _field(
        None, "Workload", "Output length in tokens: N for fixed, LOW:HIGH for uniform and zipf."
    )
    zipf_alpha: float = _field(1.2, "Workload", "Exponent of the zipf distribution.")
    clip_tokens: int | None = _field(
        None, "Workload", "Truncate longer requests to this many tokens. Default: drop them."
    )
    num_prompts: int | None = _field(
        None, "Workload", "Number of requests. Default: 1000, 2048 in a search, or the whole trace."
    )
    request_rate: float | None = _field(None, "Workload", "Arrival rate (requests per second).")
    arrival: str | None = _field(
        None,
        "Workload",
        "Arrival process: poisson, gamma, static, burst (all at once) or trace (as recorded). Default: trace for a "
        "--trace without --request-rate, else poisson.",
    )
    arrival_cv: float = _field(1.0, "Workload", "Coefficient of variation of gamma arrivals.")
    rate_scale: float = _field(1.0, "Workload", "Factor by which recorded arrivals are sped up.")
    seed: int = _field(0, "Workload", "Random seed.")
    plugin: list[Path] = _field(
        [], "Extensions", "Python file that registers policies, routers, predictors or metrics; repeatable."
    )
    slo: list[str] = _field(
        [], "Goals", "Latency goal such as 'p99_tbt<=0.1' (seconds) or 'mean_ttft<=300ms'; repeatable."
    )

    def workload_spec(self, max_model_len: int, burst: bool = False) -> WorkloadSpec:
        """Return the workload without requests over `max_model_len` tokens. `burst`: all at once, at no rate."""
        if self.trace is not None:
            check_no_result(self.trace)
        named = {} if self.workload is None else {"lengths": self.workload}
        return WorkloadSpec(
            **named,
            input_len=self.input_len,
            output_len=self.output_len,
            zipf_alpha=self.zipf_alpha,
            trace=self.trace,
            arrival="burst" if burst else self.arrival,
            request_rate=None if burst else self.request_rate,
            arrival_cv=self.arrival_cv,
            rate_scale=self.rate_scale,
            num_prompts=self.num_prompts,
            max_model_len=max_model_len,
            clip_tokens=self.clip_tokens,
            seed=self.seed,
        )

    def slos(self) -> list[SLO]:
        return [SLO.parse(text) for text in self.slo]


class ReplicaGroup(ReplicaConfig):
    """An entry of `replicas` in a file: `count` replicas that differ from the rest of the file in the keys it gives."""

    count: int = 1


class FileConfig(RunConfig):
    """A run's YAML file: the flags' names, and `replicas` for a cluster of several kinds."""

    replicas: list[dict[str, Any]] = Field([], description="Groups of replicas of different kinds.")

    def groups(self) -> list[ReplicaGroup]:
        """Return the kinds of replica and the count of each."""
        shared = {key: value for key, value in self.model_dump().items() if key in ReplicaConfig.model_fields}
        if not self.replicas:
            return [ReplicaGroup(**shared, count=self.num_replicas)]
        if "num_replicas" in self.model_fields_set:
            raise InputError("num_replicas and replicas both set the number of replicas: remove one")
        groups = []
        for i, group in enumerate(self.replicas):
            found = _validate(ReplicaGroup, {**shared, **_underscored(group)}, f"replicas[{i}]")
            if found.count < 1:
                raise InputError(f"replicas[{i}] count {found.count}: give at least 1")
            groups.append(found)
        return groups


class BenchConfig(FileConfig, EngineSettings):
    """A run on the engine: the simulator's settings and the engine's own."""


class GenerateConfig(EngineSettings, ServingSettings):
    """A generation from prompts on the engine."""

    device: str = _field("auto", "Deployment", "Device: cpu, the name of a GPU, or auto (a GPU if available).")
    max_tokens: int = _field(
        128, "Sampling", "Maximum number of tokens to generate for each prompt, within --max-model-len."
    )
    temperature: float = _field(0.0, "Sampling", "Sampling temperature; 0 always takes the most likely token.")
    top_k: int = _field(0, "Sampling", "Sample from this many most likely tokens; 0: from all.")
    top_p: float = _field(
        1.0, "Sampling", "Sample from the most likely tokens that hold this share of the probability."
    )
    seed: int = _field(0, "Sampling", "Random seed.")

    def replica_spec(self, device: DeviceSpec) -> ReplicaSpec:
        """Resolve the settings into the replica that generates on `device`. Raises InputError for what can't be."""
        return resolve(self.model, device, **self._replica_settings())


File = TypeVar("File", bound=FileConfig)


def from_flags(kind: type[Settings], flags: dict[str, Any]) -> Settings:
    """Return the settings of flags alone (those that are not None)."""
    given = {key: value for key, value in flags.items() if value is not None}
    return _validate(kind, given, "flags", given)


def load(path: Path | None, flags: dict[str, Any], kind: type[File]) -> File:
    """Return the settings of a file (if any) with `flags` (those that are not None) on top.

    Raises InputError that names what is wrong and the fix.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    return combined(load_file(path, kind), given, str(path), kind)


def load_file(path: Path | None, kind: type[FileConfig]) -> dict[str, Any]:
    """Return the settings in a file, without the engine's own where `kind` has none: its runs are simulated too."""
    values = {} if path is None else read_file(path)
    return {key: value for key, value in values.items() if key in kind.model_fields or key not in ENGINE_KEYS}


def combined(values: dict[str, Any], given: dict[str, Any], where: str, kind: type[File]) -> File:
    """Return the settings of a file called `where`, `values`, with flags on top, `given`, and check them together."""
    config = _validate(kind, values | given, where, given)
    for i, group in enumerate(config.replicas):
        if both := set(given) & set(_underscored(group)):
            key = min(both)
            raise InputError(
                f"--{key.replace('_', '-')} {given[key]} and replicas[{i}] of {where} both set {key}: change one"
            )
    for needed in ("model", "device"):
        if not getattr(config, needed) and not all(group.get(needed) for group in config.replicas or [{}]):
            raise InputError(f"no {needed} given: add --{needed} NAME")
    if config.num_replicas < 1:
        raise InputError(f"--num-replicas {config.num_replicas}: give at least 1")
    return config


def read_file(path: Path) -> dict[str, Any]:
    """Read a YAML file of settings. Raises InputError if it can't be read or is no mapping."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"can't read the config file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {error}".replace("\n", " ")) from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no settings: write one 'key: value' per line")
    return _underscored(values)


def _underscored(values: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with dashes in their keys replaced by underscores."""
    return {str(key).replace("-", "_"): value for key, value in values.items()}


_WANTED = {  # by pydantic's name of what is wrong
    "int_parsing": "give a whole number",
    "int_from_float": "give a whole number",
    "int_type": "give a whole number",
    "float_parsing": "give a number",
    "float_type": "give a number",
    "bool_parsing": "give true or false",
    "bool_type": "give true or false",
}


def _validate(kind: type[Settings], values: dict[str, Any], where: str, flags: Collection[str] = ()) -> Settings:
    """Return `values` as settings. Raises InputError that names the flag, or `where` and the key."""
    for key in values:
        if key not in kind.model_fields:
            raise unknown_setting(f"key in {where}", str(key), kind.model_fields)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        place = f"--{key.replace('_', '-')}" if key in flags else f"{where}: {key}"
        raise InputError(f"{place} {first['input']!r}: {_WANTED.get(first['type'], first['msg'])}") from None
