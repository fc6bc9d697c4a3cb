"""How a batch is formed: one small class a policy, and one line in POLICIES.

| name | from | what it does |
|---|---|---|
| sarathi | Sarathi-Serve, OSDI 2024, algorithm 3 | decodes first, then chunks of prompts that fill the token budget |
| vllm | vLLM V1 | every request catches up to its known tokens under one budget, running ones first |
| vllm_v0 | vLLM 0.2, SOSP 2023 | whole prompts first, in batches of their own; decodes wait meanwhile |
| orca | Orca, OSDI 2022 | whole prompts join the decodes at once; memory reserved for the longest request |
| request_level | FasterTransformer | a batch of requests runs to its end before the next one starts |
| chunked_only | Sarathi-Serve's ablation | chunks, of one prompt or of new ones, and decodes take turns |
| hybrid_only | Sarathi-Serve's ablation | decodes first, then whole prompts |
"""

from __future__ import annotations

from dataclasses import replace

from engine.errors import InputError, unknown
from engine.scheduling.policies.base import BatchPlan, Policy, Verbs
from engine.scheduling.policies.orca import Orca, RequestLevel
from engine.scheduling.policies.sarathi import CHUNK_SCHEDULE, ChunkedOnly, HybridOnly, Sarathi, chunk_sizes
from engine.scheduling.policies.vllm import OPTIONS, VLLM, refuse_options, resolve_vllm
from engine.scheduling.policies.vllm_v0 import VLLMV0
from engine.specs import SchedulerSpec

__all__ = [
    "ALIASES",
    "POLICIES",
    "VLLM_OPTIONS",
    "BatchPlan",
    "Policy",
    "Sarathi",
    "Verbs",
    "chunk_sizes",
    "largest_batch",
    "resolve",
]

POLICIES: dict[str, type[Policy]] = {
    "sarathi": Sarathi,
    "vllm": VLLM,
    "vllm_v0": VLLMV0,
    "orca": Orca,
    "request_level": RequestLevel,
    "chunked_only": ChunkedOnly,
    "hybrid_only": HybridOnly,
}
VLLM_OPTIONS = OPTIONS
ALIASES = {"faster_transformer": "request_level"}


def largest_batch(spec: SchedulerSpec) -> int:
    """Return the tokens of the largest batch that memory is kept for, of a resolved spec.

    Beside a prompt longer than its budget, hybrid_only may run a token of each other request. Policies without a budget
    have no bound but the KV blocks, which it would take as much memory again to keep room for: the engine warns of it.
    """
    budget = spec.max_num_batched_tokens or 0
    return budget if POLICIES[spec.policy].strict_budget else max(budget, spec.max_model_len or 0)


def resolve(spec: SchedulerSpec, model_max_len: int) -> SchedulerSpec:
    """`spec` with what was left open filled in from the model and the policy; a policy without a budget gets None.

    Raises InputError for an unknown policy, for limits that contradict each other and for a chunk schedule that would
    be ignored.
    """
    spec = replace(spec, policy=ALIASES.get(spec.policy, spec.policy))
    if spec.policy not in POLICIES:
        raise unknown("scheduler", spec.policy, POLICIES)
    policy = POLICIES[spec.policy]
    max_model_len = spec.max_model_len or model_max_len
    default_budget = max(policy.default_budget(max_model_len), spec.max_num_seqs)
    budget = spec.max_num_batched_tokens or default_budget
    given = [name for name in CHUNK_SCHEDULE if getattr(spec, name) is not None]
    if spec.chunk_schedule == "dynamic" and not policy.splits_prompts:
        raise InputError(f"chunk_schedule 'dynamic' needs a scheduler that splits prompts; {spec.policy} does not")
    if spec.chunk_schedule == "fixed" and given:
        raise InputError(f"{given[0]} {getattr(spec, given[0])} needs chunk_schedule 'dynamic'")
    if spec.chunk_schedule == "dynamic":
        high = spec.chunk_schedule_high or budget
        low = spec.chunk_schedule_low or min(high, max(high // 4, spec.max_num_seqs))
        if not spec.max_num_seqs <= low <= high <= budget:
            raise InputError(
                f"dynamic chunks from {high} down to {low} tokens: chunk_schedule_low must be at least --max-num-seqs "
                f"{spec.max_num_seqs} (or decodes could keep a long prompt from ever going on), chunk_schedule_high at "
                f"least that and at most --max-num-batched-tokens {budget}"
            )
        spec = replace(
            spec,
            chunk_schedule_high=high,
            chunk_schedule_low=low,
            chunk_schedule_stages=spec.chunk_schedule_stages or 16,
            chunk_schedule_max_tokens=spec.chunk_schedule_max_tokens or max_model_len,
        )
    if issubclass(policy, VLLM):
        spec = resolve_vllm(spec)
    else:
        refuse_options(spec)
    spec = replace(spec, max_model_len=max_model_len, max_num_batched_tokens=budget if policy.has_budget else None)
    return replace(spec, watermark=policy(spec).watermark)  # which checks the limits
