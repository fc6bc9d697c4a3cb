"""The policy of vLLM before V1 (vLLM 0.2, SOSP 2023)."""

from __future__ import annotations

from engine.errors import InputError
from engine.scheduling.policies.base import BatchPlan, Policy, Verbs, check_budget, take_prompts
from engine.scheduling.request import Request
from engine.specs import SchedulerSpec


class VLLMV0(Policy):
    """Prefills first: whole prompts in a batch of their own while any can be admitted, else every decode."""

    def __init__(self, spec: SchedulerSpec) -> None:
        super().__init__(spec)
        check_budget(spec)

    def check(self, request: Request) -> None:
        if request.max_total_tokens - 1 > self.budget:  # a recompute may have to compute all but the last at once
            raise InputError(
                f"request {request.id} ({request.prompt_tokens} prompt + {request.output_tokens} output tokens) can "
                f"never be scheduled whole within --max-num-batched-tokens {self.budget}: raise it to "
                f"{request.max_total_tokens - 1} or more, or use a scheduler that splits prompts (sarathi)"
            )

    def plan(self, scheduler: Verbs) -> BatchPlan:
        prompts = take_prompts(scheduler, self.budget)
        return BatchPlan([], prompts) if prompts else BatchPlan(scheduler.take_decodes(), stable=True)
