"""How a replica is cut over GPUs: layers of each pipeline stage, heads of each tensor-parallel rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.errors import InputError, unknown
from engine.specs.checks import check_fields
from engine.specs.model import ModelSpec

MOST_RANKS = 1 << 16  # of each way to cut a replica


@dataclass(frozen=True, kw_only=True)
class ParallelSpec:
    """How a replica is cut over GPUs. Stage s of the pipeline is ranks s*tp .. (s+1)*tp - 1.

    With `data_parallel_size` so many replicas share the experts of a mixture (attention data parallelism): each has its
    own attention, KV cache and scheduler, and a share of the experts. The tp * dp ranks of a stage hold the experts cut
    `expert_parallel_size` ways by expert, and the rest by width: moe_tp * moe_ep = tp * dp.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    expert_parallel_size: int = 1
    expert_exchange: Literal["all_gather", "all_to_all"] = "all_gather"

    def __post_init__(self) -> None:
        check_fields(
            self, "tensor_parallel_size pipeline_parallel_size data_parallel_size expert_parallel_size", most=MOST_RANKS
        )
        if self.expert_exchange not in ("all_gather", "all_to_all"):
            raise unknown("expert_exchange", str(self.expert_exchange), ("all_gather", "all_to_all"))
        if self.expert_ranks % self.expert_parallel_size:
            raise InputError(
                f"expert_parallel_size={self.expert_parallel_size} does not divide the {self.expert_ranks} ranks of "
                f"tensor_parallel_size={self.tensor_parallel_size} x data_parallel_size={self.data_parallel_size}"
            )
        if self.expert_exchange == "all_to_all" and self.expert_parallel_size != self.expert_ranks:
            raise InputError(
                f"expert_exchange all_to_all is for whole experts on every rank: give expert_parallel_size="
                f"{self.expert_ranks}"
            )

    def __str__(self) -> str:
        text = f"TP{self.tensor_parallel_size}-PP{self.pipeline_parallel_size}"
        text += f"-DP{self.data_parallel_size}" * (self.data_parallel_size > 1)
        return text + f"-EP{self.expert_parallel_size}" * (self.expert_parallel_size > 1)

    @property
    def expert_ranks(self) -> int:
        """Ranks that hold a layer's experts: those of all the replicas that share them."""
        return self.tensor_parallel_size * self.data_parallel_size

    @property
    def expert_tensor_size(self) -> int:
        """Ranks over which the width of each expert is cut."""
        return self.expert_ranks // self.expert_parallel_size

    @property
    def world_size(self) -> int:
        """GPUs of a replica; with attention data parallelism of one of those that share the experts."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def stage_layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers of each stage, as even as can be.

        The remainder goes one layer each to the stages just before the last, which has the LM head to compute already:
        vLLM's rule, 10 layers on 4 stages are (2, 3, 3, 2).
        """
        stages = self.pipeline_parallel_size
        each, extra = divmod(num_layers, stages)
        return tuple(each + (stages - 1 - extra <= stage < stages - 1) for stage in range(stages))

    def layers_of(self, stage: int, num_layers: int) -> range:
        """Return the model's numbers of a stage's layers."""
        split = self.stage_layers(num_layers)
        return range(sum(split[:stage]), sum(split[: stage + 1]))

    def kv_heads_per_rank(self, model: ModelSpec) -> int:
        """KV heads on each rank; where there are fewer heads than ranks, several ranks hold a copy of the same one."""
        return max(1, model.num_key_value_heads // self.tensor_parallel_size)

    def fits(self, model: ModelSpec) -> bool:
        """Whether `model` can be cut this way (its memory is another question)."""
        tp, heads, kv_heads = self.tensor_parallel_size, model.num_attention_heads, model.num_key_value_heads
        kv_fits = kv_heads % tp == 0 or tp % kv_heads == 0
        whole = heads % tp == 0 and kv_fits and (model.intermediate_size % tp == 0 or not model.has_mlps)
        if (experts := model.experts) is not None:
            whole = whole and experts.num_experts % self.expert_parallel_size == 0
            whole = whole and experts.intermediate_size % self.expert_tensor_size == 0
            whole = whole and experts.shared_intermediate_size % tp == 0
        return whole and self.pipeline_parallel_size <= model.num_layers

    def validate(self, model: ModelSpec) -> None:
        """Raise InputError when `model` can't be cut this way; the message says which sizes would do."""
        tp, pp, experts = self.tensor_parallel_size, self.pipeline_parallel_size, model.experts
        if experts is None and (self.data_parallel_size > 1 or self.expert_parallel_size > 1):
            raise InputError(
                f"{model.name} has no experts to share (data_parallel_size={self.data_parallel_size} or "
                "enable_expert_parallel): leave these out and give more replicas instead"
            )
        if experts is not None and (
            experts.num_experts % self.expert_parallel_size or experts.intermediate_size % self.expert_tensor_size
        ):
            raise InputError(
                f"{model.name} can't be cut into expert_parallel_size={self.expert_parallel_size} by "
                f"{self.expert_tensor_size} of each expert: these must divide {experts.num_experts} experts of width "
                f"{experts.intermediate_size}"
            )
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
