"""Policies that reserve memory for the longest request: Orca (OSDI 2022) and batches of whole requests."""

from __future__ import annotations

from engine.scheduling.policies.base import BatchPlan, Policy, Verbs, take_prompts
from engine.scheduling.request import Request
from engine.specs import SchedulerSpec


class Orca(Policy):
    """Iteration-level scheduling of whole prompts beside the decodes, with memory reserved for the longest request.

    No request ever grows past what it has reserved, so no watermark is needed, and the original has none.
    """

    has_budget = False
    strict_budget = False
    default_watermark = 0.0

    def reserved_tokens(self, request: Request) -> int:
        return self.spec.max_model_len or request.max_total_tokens

    def plan(self, scheduler: Verbs) -> BatchPlan:
        decodes = scheduler.take_decodes()
        return BatchPlan(decodes, take_prompts(scheduler), stable=True)


class RequestLevel(Orca):
    """Request-level batches: those admitted together run until the last of them ends; only then come others.

    Under pipeline parallelism each batch in flight is such a group. Requests that end early leave the batch.
    """

    def __init__(self, spec: SchedulerSpec) -> None:
        super().__init__(spec)
        self.next_group = 0

    def plan(self, scheduler: Verbs) -> BatchPlan:
        decodes = scheduler.take_decodes()
        if decodes:
            group = decodes[0].group
            return BatchPlan([request for request in decodes if request.group == group], stable=True)
        prompts = take_prompts(scheduler)
        self.next_group += 1
        for request, _ in prompts:
            request.group = self.next_group
        return BatchPlan([], prompts)
