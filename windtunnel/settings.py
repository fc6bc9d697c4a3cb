"""The settings of a run, from flags, keywords or a YAML file: pydantic models, which the flags are generated from.

Names follow vLLM where vLLM has one. In a file the same names are keys, with underscores; a flag wins over the file.
"""

from __future__ import annotations

from collections.abc import Collection
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from engine.documents import read_yaml
from engine.errors import InputError
from engine.replica_spec import SETTINGS, ReplicaSettings, ReplicaSpec, resolve
from engine.results.slo import SLO
from engine.specs import DeviceSpec, ParallelSpec, SchedulerSpec
from engine.specs.checks import short
from engine.workload.workload import WorkloadSpec
from windtunnel.names import unknown_setting
from windtunnel.trace_check import check_no_result

MOST_REPLICAS = 10_000  # of a cluster, which take some 30 KB each
MOST_DRAWS = 1000
TOLERANCE = 0.025  # of a capacity search, a share of the capacity

# what is not given is what the specs say; here no default of a replica is decided
_PARALLEL, _SCHEDULER, _WORKLOAD = ParallelSpec(), SchedulerSpec(), WorkloadSpec()
_REPLICA = {name: parameter.default for name, parameter in signature(resolve).parameters.items()}


SCHEDULER_FIELDS = (  # settings of the same name as a field of SchedulerSpec
    *SETTINGS,
    "chunk_schedule",
    "chunk_schedule_low",
    "chunk_schedule_high",
    "chunk_schedule_stages",
    "chunk_schedule_max_tokens",
)


def _field(default: Any, panel: str, help: str) -> Any:
    return Field(default, description=help, json_schema_extra={"panel": panel})


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), defer_build=True)


Settings = TypeVar("Settings", bound=_Settings)


class ServingSettings(_Settings):
    """A model, how it is cut over GPUs, and how its batches are formed."""

    model: str = _field("", "Deployment", "Model: a known Hugging Face name, or a folder or file with a config.json.")
    tensor_parallel_size: int = _field(
        _PARALLEL.tensor_parallel_size, "Deployment", "Number of GPUs that share each layer."
    )
    pipeline_parallel_size: int = _field(_PARALLEL.pipeline_parallel_size, "Deployment", "Number of pipeline stages.")
    data_parallel_size: int = _field(
        _PARALLEL.data_parallel_size,
        "Deployment",
        "Number of replicas that share the experts of a mixture, each with its own attention and KV cache. "
        "--num-replicas is then a multiple of it.",
    )
    enable_expert_parallel: bool = _field(
        False,
        "Deployment",
        "Whether the ranks that share the experts hold whole experts, instead of a share of each.",
    )
    expert_exchange: Literal["all_gather", "all_to_all"] = _field(
        _PARALLEL.expert_exchange,
        "Deployment",
        "How tokens reach experts of other replicas: all_gather (with reduce-scatter) or all_to_all (whole experts).",
    )
    dtype: str = _field(
        _REPLICA["dtype"],
        "Deployment",
        "Data type: bfloat16, float16, float32 or auto (the profile's, else float32 on a CPU, else bfloat16).",
    )
    quantization: str = _field(
        _REPLICA["quantization"],
        "Deployment",
        "Format of the weights of linear layers and experts: none, fp8, fp8_block, int4, mxfp4 (experts alone) or auto "
        "(the config's).",
    )
    kv_cache_dtype: str = _field(
        _REPLICA["kv_cache_dtype"],
        "Deployment",
        "Data type of the KV cache: fp8 (fp8_e4m3), fp8_e5m2, bfloat16, float16, float32 or auto (the config's, else "
        "--dtype).",
    )
    engine: str = _field(
        _REPLICA["engine"],
        "Deployment",
        "Engine preset, which supplies every setting that is not given: windtunnel, vllm@0.15, vllm@latest, vllm-v0, "
        "orca, sarathi-osdi24 (list: `windtunnel engines`), or a YAML file.",
    )
    usage: Literal["server", "offline"] = _field(
        _REPLICA["usage"], "Deployment", "Limits of the engine preset to use: server or offline."
    )
    gpu_memory_utilization: float | None = _field(
        None, "Deployment", "Share of the GPU memory to use. Default: the engine's, mostly 0.9."
    )
    num_gpu_blocks_override: int | None = _field(
        _REPLICA["num_gpu_blocks_override"], "Deployment", "Number of KV blocks. Default: as many as fit in the memory."
    )
    scheduler: str | None = _field(
        None,
        "Scheduler",
        "Batching policy: sarathi, vllm (V1), vllm_v0, orca, request_level, chunked_only or hybrid_only. Default: the "
        "engine's (windtunnel: sarathi).",
    )
    max_num_batched_tokens: int | None = _field(
        _SCHEDULER.max_num_batched_tokens,
        "Scheduler",
        "Token budget of a batch. Default: the engine's for the device, or the policy's.",
    )
    max_num_seqs: int | None = _field(
        None, "Scheduler", "Maximum number of requests running at once. Default: the engine's (windtunnel: 128)."
    )
    max_model_len: int | None = _field(
        _SCHEDULER.max_model_len,
        "Scheduler",
        "Maximum length of a request (tokens); longer ones are dropped and counted. Default: the model's.",
    )
    block_size: int | None = _field(None, "Scheduler", "Number of tokens in a KV block. Default: the engine's, 16.")
    watermark: float | None = _field(
        None, "Scheduler", "Share of the KV blocks that admission keeps free. Default: the engine's or the policy's."
    )
    enable_prefix_caching: bool | None = _field(
        None, "Scheduler", "true: reuse the KV blocks of prompts with a common prefix. Default: the engine's."
    )
    async_scheduling: bool | None = _field(
        None,
        "Scheduler",
        "true: schedule the next batch while one runs (one pipeline stage only). Default: the engine's (windtunnel: "
        "false).",
    )
    scheduling_policy: Literal["fcfs", "priority"] | None = _field(
        None, "Scheduler", "Order of the vllm policy: fcfs or priority. Default: fcfs."
    )
    long_prefill_token_threshold: int | None = _field(
        None, "Scheduler", "Maximum tokens of one request in a batch of the vllm policy. Default: 0, no limit."
    )
    long_prefill_token_threshold_adaptive: bool | None = _field(
        None, "Scheduler", "true: raise that threshold when few requests share the budget (vllm 0.33). Default: false."
    )
    scheduler_reserve_full_isl: bool | None = _field(
        None,
        "Scheduler",
        "true: admit a request only when blocks for its whole prompt are free (vllm). Default: by version.",
    )
    vllm_version: str | None = _field(
        None, "Scheduler", "Version whose rules the vllm policy follows. Default: the engine's."
    )

    @field_validator("vllm_version", mode="before")
    @classmethod
    def _version_as_text(cls, value: Any) -> Any:
        return str(value) if type(value) in (int, float) else value  # YAML reads 0.15 as a number

    chunk_schedule: Literal["fixed", "dynamic"] | None = _field(
        None, "Scheduler", "Chunk size of prompts: fixed or dynamic. Default: the engine's, or fixed."
    )
    chunk_schedule_low: int | None = _field(None, "Scheduler", "Smallest chunk of the dynamic schedule (tokens).")
    chunk_schedule_high: int | None = _field(None, "Scheduler", "Largest chunk of the dynamic schedule (tokens).")
    chunk_schedule_stages: int | None = _field(None, "Scheduler", "Number of chunk sizes in the dynamic schedule.")
    chunk_schedule_max_tokens: int | None = _field(
        None, "Scheduler", "Prompt length that the dynamic schedule spans (tokens)."
    )

    def parallel_spec(self) -> ParallelSpec:
        every = self.tensor_parallel_size * self.data_parallel_size
        return ParallelSpec(
            tensor_parallel_size=self.tensor_parallel_size,
            pipeline_parallel_size=self.pipeline_parallel_size,
            data_parallel_size=self.data_parallel_size,
            expert_parallel_size=every if self.enable_expert_parallel else 1,
            expert_exchange=self.expert_exchange,
        )

    def scheduler_settings(self) -> dict[str, Any]:
        """The fields of a SchedulerSpec that are given."""
        names = [name for name in SCHEDULER_FIELDS if getattr(self, name) is not None]
        given = {name: getattr(self, name) for name in names}
        return given if self.scheduler is None else {"policy": self.scheduler, **given}

    def _checked(self, replica: ReplicaSpec) -> ReplicaSpec:
        """Return the replica. Raises InputError for a setting that means nothing to its model."""
        if self.enable_expert_parallel and replica.model.experts is None:
            raise InputError(f"enable_expert_parallel true: {replica.model.name} has no experts: leave it out")
        return replica

    def _replica_settings(self) -> ReplicaSettings:
        return {
            "engine": self.engine,
            "usage": self.usage,
            "parallel": self.parallel_spec(),
            "scheduler": self.scheduler_settings(),
            "dtype": self.dtype,
            "quantization": self.quantization,
            "kv_cache_dtype": self.kv_cache_dtype,
            "async_scheduling": self.async_scheduling,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "num_gpu_blocks_override": self.num_gpu_blocks_override,
        }


class ReplicaConfig(ServingSettings):
    """Settings that may differ between the replicas of a cluster."""

    device: str = _field(
        "",
        "Deployment",
        "Device: a100 (a100_pcie), a100_sxm, a100_sxm_40gb, a40, h100 (h100_sxm), h200 (h200_sxm), l40s, l4, b200, "
        "h20, rtx_pro_6000, mi300x, cpu, a YAML file or a calibration's folder.",
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
        "Host overhead of an iteration: cuda_graphs, eager, eager_cpu, sarathi_osdi24, sarathi_osdi24_fig2, "
        "measured (by the calibration) or auto (measured if available, else eager_cpu on a CPU, else cuda_graphs).",
    )
    predictor: str = _field(
        "auto",
        "Deployment",
        "Predictor of batch times: learned (from the device's calibration), carried (an estimate by what GPUs with "
        "measurements have in common), roofline, or auto (learned if the device has a calibration, else carried; on a "
        "CPU roofline).",
    )

    def replica_spec(self) -> ReplicaSpec:
        """Resolve the settings into the replica they describe. Raises InputError for what can't be."""
        return self._checked(resolve(self.model, self.device, **self._replica_settings()))

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
    distributed_interface: str | None = _field(
        None,
        "Engine",
        "Network interface that ranks on several machines listen on, such as eth1: a private network. Default: Ray's.",
    )


ENGINE_KEYS = frozenset(EngineSettings.model_fields)


class RunConfig(ReplicaConfig):
    """Everything that decides a run."""

    num_replicas: int = _field(1, "Deployment", "Number of replicas behind the router.")
    router: str = _field(
        "round_robin",
        "Deployment",
        "Router: round_robin, random, least_outstanding_requests, least_outstanding_tokens, kv_aware (least KV cache "
        "in use), prefix_aware (longest prefix sent before, with bounded load) or session_affinity.",
    )
    workload: str | None = _field(
        None,
        "Workload",
        "Distribution of lengths: openchat_sharegpt4 (the default), arxiv_summarization, azure_code, azure_conv, "
        "fixed, uniform, zipf, random or FILE.json.",
    )
    trace: Path | None = _field(
        None, "Workload", "Recorded trace to replay (CSV or JSONL; docs/settings.md) in place of --workload."
    )
    columns: str | None = _field(
        None,
        "Workload",
        "Columns of a trace of another format: prompt=NAME,output=NAME[,time=NAME][,hash_ids=NAME or prompt_id=NAME or "
        "session=NAME][,priority=NAME]; of a known format, those that it lacks.",
    )
    tokenizer: Path | None = _field(None, "Workload", "Model folder whose tokenizer counts the tokens of a text trace.")
    hash_id_tokens: int = _field(_WORKLOAD.hash_id_tokens, "Workload", "Prompt tokens of each of a trace's hash ids.")
    random_input_len: int | None = _field(None, "Workload", "Prompt tokens of random lengths, as in vLLM's bench.")
    random_output_len: int | None = _field(None, "Workload", "Output tokens of random lengths.")
    random_range_ratio: float = _field(
        _WORKLOAD.random_range_ratio, "Workload", "Random lengths L are drawn from L(1-r) to L(1+r)."
    )
    system_prompt_len: int = _field(
        _WORKLOAD.system_prompt_len, "Workload", "Tokens before every prompt, the same for all."
    )
    priorities: str | None = _field(
        None,
        "Workload",
        "Priorities and the share of the requests that has each, such as 0=0.2,1=0.8; the lowest goes first with "
        "--scheduling-policy priority.",
    )
    turns: str | int | None = _field(
        None, "Workload", "Requests of a conversation (N or LOW:HIGH), each going on from the one before."
    )
    turn_input_len: str | int | None = _field(
        None, "Workload", "Tokens of a later turn's message (N or LOW:HIGH); default: as a first prompt."
    )
    think_time: float = _field(
        _WORKLOAD.think_time_s, "Workload", "Seconds between an answer and the next turn, on average."
    )
    max_concurrency: int | None = _field(
        None,
        "Workload",
        "Closed loop: most requests in the system at once; the next is sent when one has ended, of another "
        "conversation while a user thinks.",
    )
    users: int | None = _field(
        None,
        "Workload",
        "Closed loop: number of users, each in one conversation at a time, who keep their place while they think "
        "(--turns or a trace's sessions, --think-time).",
    )
    ramp_up: float = _field(_WORKLOAD.ramp_up_s, "Workload", "Seconds over which the first of these are sent.")
    client_overhead_ms: float = _field(
        0.0, "Workload", "Closed loop: time from an answer to the next request that the client takes (ms)."
    )
    input_len: str | int | None = _field(
        None, "Workload", "Prompt length in tokens: N for fixed, LOW:HIGH for uniform and zipf."
    )
    output_len: str | int | None = _field(
        None, "Workload", "Output length in tokens: N for fixed, LOW:HIGH for uniform and zipf."
    )
    zipf_alpha: float = _field(1.2, "Workload", "Exponent of zipf lengths.")
    clip_tokens: int | None = _field(None, "Workload", "Shorten longer requests to this many tokens.")
    num_prompts: int | None = _field(None, "Workload", "Requests to run; default 1000, or the whole trace.")
    request_rate: float | None = _field(
        None, "Workload", "Requests (with --turns: conversations) per second; inf: all at once."
    )
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
    uncertainty: int | None = _field(
        None,
        "Goals",
        "Reruns with errors of the predicted times drawn, for the ranges of results; 19 or more give 90 % ranges. "
        "Simulated runs alone.",
    )

    @field_validator("uncertainty")
    @classmethod
    def _two_draws(cls, value: int | None) -> int | None:
        if value is not None and not 2 <= value <= MOST_DRAWS:
            raise ValueError(f"give 2 to {MOST_DRAWS:,} reruns, 19 or more for a 90 % range")
        return value

    @field_validator("plugin", "slo", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | Path) else value

    def workload_spec(self, max_model_len: int | None, burst: bool = False) -> WorkloadSpec:
        """Return the workload without requests over `max_model_len` tokens. `burst`: all at once, at no rate."""
        if self.trace is not None:
            check_no_result(self.trace)
        named: dict[str, Any] = {} if self.workload is None else {"lengths": self.workload}
        lengths: dict[str, Any] = {"input_len": self.input_len, "output_len": self.output_len}
        for name in lengths:
            if (value := getattr(self, f"random_{name}")) is None:
                continue
            if self.workload not in (None, "random") or lengths[name] is not None:
                raise InputError(f"random_{name} {value} is for random lengths: leave out workload and {name}")
            named["lengths"], lengths[name] = "random", value
        closed = not burst and (self.max_concurrency is not None or self.users is not None)
        at_once = closed and self.request_rate is None and self.arrival is None
        return WorkloadSpec(
            **named,
            **lengths,
            random_range_ratio=self.random_range_ratio,
            columns=self.columns,
            tokenizer=self.tokenizer,
            hash_id_tokens=self.hash_id_tokens,
            system_prompt_len=self.system_prompt_len,
            priorities=self.priorities,
            turns=self.turns,
            turn_input_len=self.turn_input_len,
            think_time_s=self.think_time,
            max_concurrency=self.max_concurrency if not burst else None,
            users=self.users if not burst else None,
            ramp_up_s=self.ramp_up if not burst else 0.0,
            client_overhead_s=self.client_overhead_ms / 1e3 if not burst else 0.0,
            zipf_alpha=self.zipf_alpha,
            trace=self.trace,
            arrival="burst" if burst or at_once else self.arrival,
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

    needed: ClassVar[tuple[str, ...]] = ("model", "device")

    replicas: list[dict[str, Any]] = Field([], description="Groups of replicas of different kinds.")

    def groups(self) -> list[ReplicaGroup]:
        """Return the kinds of replica and the count of each."""
        shared = {key: value for key, value in self.model_dump().items() if key in ReplicaConfig.model_fields}
        if not self.replicas:
            self._check_count(self.num_replicas)
            return [ReplicaGroup(**shared, count=self.num_replicas)]
        if "num_replicas" in self.model_fields_set:
            raise InputError("num_replicas and replicas both set the number of replicas: remove one")
        groups = []
        for i, group in enumerate(self.replicas):
            found = _validate(ReplicaGroup, {**shared, **underscored(group)}, f"replicas[{i}]")
            if found.count < 1:
                raise InputError(f"replicas[{i}] count {found.count}: give at least 1")
            groups.append(found)
        self._check_count(sum(group.count for group in groups))
        return groups

    def _check_count(self, count: int) -> None:
        if count > MOST_REPLICAS:
            raise InputError(f"num_replicas {short(count)}: give at most {MOST_REPLICAS:,}")


class BenchConfig(FileConfig, EngineSettings):
    """A run on the engine: the simulator's settings and the engine's own."""


class LoadConfig(BenchConfig):
    """A load on a server that runs already, which decides what it is itself; a file's other settings are left alone."""

    needed: ClassVar[tuple[str, ...]] = ()
    _own: ClassVar[frozenset[str]] = frozenset({"model", "max_model_len", "plugin"})

    @classmethod
    def check(cls, flags: dict[str, Any]) -> None:
        """Raise InputError for a flag that only the server itself could heed."""
        for name, value in flags.items():
            extra = cls.model_fields[name].json_schema_extra
            of_server = isinstance(extra, dict) and extra["panel"] not in ("Workload", "Goals")
            if value is not None and of_server and name not in cls._own:
                raise InputError(f"--{name.replace('_', '-')} {value} has no meaning with --url: leave it out")

    def workload_settings(self, num_prompts: int) -> dict[str, Any]:
        """Return the model and the workload, as a config file holds them."""
        values = self.model_dump(mode="json", exclude_none=True)
        own = {
            name
            for name, field in type(self).model_fields.items()
            if isinstance(field.json_schema_extra, dict) and field.json_schema_extra["panel"] in ("Workload", "Goals")
        }
        kept = {name: value for name, value in values.items() if name in own | self._own}
        return {**kept, "num_prompts": num_prompts}


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
        return self._checked(resolve(self.model, device, **self._replica_settings()))


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
        if both := set(given) & set(underscored(group)):
            key = min(both)
            raise InputError(
                f"--{key.replace('_', '-')} {given[key]} and replicas[{i}] of {where} both set {key}: change one"
            )
    for needed in kind.needed:
        if not getattr(config, needed) and not all(group.get(needed) for group in config.replicas or [{}]):
            raise InputError(f"no {needed} given: add --{needed} NAME")
    if config.num_replicas < 1:
        raise InputError(f"--num-replicas {config.num_replicas}: give at least 1")
    return config


def read_file(path: Path) -> dict[str, Any]:
    """Read a YAML file of settings. Raises InputError if it can't be read or is no mapping."""
    values = read_yaml(path, "give a YAML file of settings", ranges=True)
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no settings: write one 'key: value' per line")
    return underscored(values)


def underscored(values: dict[str, Any]) -> dict[str, Any]:
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

    def place(key: str) -> str:
        return f"--{key.replace('_', '-')}" if key in flags else f"{where}: {key}"

    for key, value in values.items():  # which pydantic would read as 1 and 0
        annotation = kind.model_fields[key].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise InputError(f"{place(key)} {value!r}: give {'a number' if _is_number(annotation) else 'text'}")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        wanted = _WANTED.get(first["type"], first["msg"].removeprefix("Value error, "))
        raise InputError(f"{place(str(first['loc'][0]))} {short(first['input'])}: {wanted}") from None


def _is_number(annotation: Any) -> bool:
    return bool({int, float} & {annotation, *get_args(annotation)})
