"""What the workers of a replica need to know to start.

spec = EngineSpec.of(resolve(folder, "cpu"), folder=Path(folder))
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from engine.errors import InputError
from engine.replica_spec import ReplicaSpec
from engine.scheduling.policies import largest_batch
from engine.specs import DTYPES, ModelSpec, ParallelSpec
from engine.specs.memory import GPU_MEMORY_UTILIZATION

EXECUTORS = ("in_process", "multiprocess", "ray")
LOAD_FORMATS = ("safetensors", "dummy")
GRAPH_BACKENDS = ("flash_attn", "flashinfer")  # attention backends whose decodes run as CUDA graphs
DECODE_GRAPHS = (1, 2, 4, *range(8, 257, 8))  # batch sizes that CUDA graphs are captured for


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """One replica of the engine; `of` makes it from a ReplicaSpec.

    `folder` has the weights; without one they are dummies. `num_blocks` None measures how many KV blocks the memory
    holds. `max_batch_tokens` is the largest batch there can be; without `bounded_batches` (a policy without a token
    budget) only the largest that memory is measured for.
    """

    model: ModelSpec
    folder: Path | None
    device: Literal["cpu", "cuda"]
    max_num_seqs: int
    max_model_len: int
    max_batch_tokens: int
    block_size: int
    bounded_batches: bool = True
    parallel: ParallelSpec = field(default_factory=ParallelSpec)
    num_blocks: int | None = None
    gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION
    attention_backend: str | None = None
    cuda_graphs: tuple[int, ...] = DECODE_GRAPHS  # none: everything runs eagerly
    seed: int = 0
    keep_logits: bool = False
    port: int | None = None  # where the ranks meet; None: a free one
    interface: str | None = None  # of the network among several machines; None: Ray's

    def __post_init__(self) -> None:
        if self.model.dtype not in DTYPES:
            model = self.model
            if model.quantization != "none":
                raise InputError(
                    f"{model.name} is quantised ({model.linear_dtype or model.expert_dtype}): the engine runs none of "
                    "it: give --quantization none, or simulate it"
                )
            raise InputError(
                f"{model.name} has weights in {model.weight_dtype}, activations in {model.activation_dtype} and a KV "
                f"cache in {model.kv_cache_dtype}: the engine keeps all three in one of {', '.join(DTYPES)}"
            )
        self.parallel.validate(self.model)
        if self.parallel.data_parallel_size > 1 or self.parallel.expert_parallel_size > 1:
            raise InputError(
                f"{self.parallel}: the engine cuts experts by width alone, over tensor-parallel ranks: give "
                "--tensor-parallel-size, or simulate it"
            )

    @property
    def dtype(self) -> str:
        """What everything is kept and computed in."""
        return self.model.activation_dtype

    @classmethod
    def of(cls, replica: ReplicaSpec, folder: Path | None, **run: Any) -> EngineSpec:
        """Return what the workers of a replica need to know.

        `run` are the fields that are no part of what the replica is: attention_backend, cuda_graphs, seed, keep_logits,
        port and interface.
        """
        scheduler = replica.scheduler
        return cls(
            model=replica.model,
            folder=folder,
            device=replica.device.runs_on,
            max_num_seqs=scheduler.max_num_seqs,
            max_model_len=scheduler.max_model_len or 0,
            max_batch_tokens=largest_batch(scheduler),
            bounded_batches=scheduler.max_num_batched_tokens is not None,
            block_size=scheduler.block_size,
            parallel=replica.parallel,
            num_blocks=replica.num_gpu_blocks_override,
            gpu_memory_utilization=replica.gpu_memory_utilization,
            **run,
        )
