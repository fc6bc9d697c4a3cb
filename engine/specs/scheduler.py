"""How batches are formed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.errors import InputError, unknown
from engine.specs.checks import check_fields

MOST_SEQUENCES = 1 << 24  # running at once
MOST_BLOCK = 1 << 24  # tokens
MOST_TOKENS = 1 << 40  # of a batch, or a request
MOST_STAGES = 4096  # of a chunk schedule, whose sizes are made into a list


@dataclass(frozen=True, kw_only=True)
class SchedulerSpec:
    """How batches are formed. None leaves a limit to the policy or to the model.

    `watermark` is the share of KV blocks that admission leaves free. The dynamic chunk schedule is Sarathi-Serve's: the
    token budget falls linearly from `chunk_schedule_high` to `chunk_schedule_low` over `chunk_schedule_stages` equal
    stages of a prompt's first `chunk_schedule_max_tokens` tokens, in multiples of 32.
    `engine.scheduling.policies.resolve` fills in what is left open.
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

    enable_prefix_caching: bool = False
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"  # whom vllm admits first and preempts last
    long_prefill_token_threshold: int = 0  # of vllm: the most tokens of one request in a batch; 0: no such bound
    long_prefill_token_threshold_adaptive: bool = False
    scheduler_reserve_full_isl: bool | None = None  # of vllm: admit only where the whole prompt's blocks are free
    vllm_version: str | None = None  # whose rules vllm follows
    # how the engine of Sarathi-Serve's paper counted, in simulated runs (engine/scheduling/osdi24.py):
    late_first_token: bool = False
    preempt_for_every_decode: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "max_num_seqs", most=MOST_SEQUENCES)
        check_fields(self, "block_size", most=MOST_BLOCK)
        if self.watermark is not None:
            check_fields(self, "watermark", zero=True)
            if self.watermark >= 1:
                raise InputError(f"SchedulerSpec watermark={self.watermark}: give a share of the KV blocks, below 1")
        optional = ["chunk_schedule_low", "chunk_schedule_high", "chunk_schedule_stages", "chunk_schedule_max_tokens"]
        for name in ("max_num_batched_tokens", "max_model_len", *optional):
            if getattr(self, name) is not None:
                check_fields(self, name, most=MOST_STAGES if name == "chunk_schedule_stages" else MOST_TOKENS)
        if self.chunk_schedule not in ("fixed", "dynamic"):
            raise unknown("chunk_schedule", str(self.chunk_schedule), ("fixed", "dynamic"))
        if self.scheduling_policy not in ("fcfs", "priority"):
            raise unknown("scheduling_policy", str(self.scheduling_policy), ("fcfs", "priority"))
        check_fields(self, "long_prefill_token_threshold", zero=True, most=MOST_TOKENS)
        for name in (
            "enable_prefix_caching",
            "long_prefill_token_threshold_adaptive",
            "late_first_token",
            "preempt_for_every_decode",
        ):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"SchedulerSpec {name}={getattr(self, name)!r}: give true or false")
        if self.vllm_version is not None and not isinstance(self.vllm_version, str):  # YAML reads 0.15 as a number
            object.__setattr__(self, "vllm_version", str(self.vllm_version))
        low, high = self.chunk_schedule_low, self.chunk_schedule_high
        if low is not None and high is not None and low > high:
            raise InputError(f"chunk_schedule_low={low} is above chunk_schedule_high={high}: exchange them")
