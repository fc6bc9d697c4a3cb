"""vLLM V1's policy: every request catches up to its known tokens, under one token budget.

Prefill and decode are one thing here: what a request has left to compute, or as much of it as the budget allows.
Running requests come first, in the order in which they were admitted; then new ones, unless somebody was preempted.
A request gets KV blocks for what it computes now and no more. Read from vLLM 0.12, 0.15 and 0.33
(v1/core/sched/scheduler.py), which its recorded schedules are replayed against.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from engine.errors import InputError, unknown
from engine.scheduling.policies.base import BatchPlan, Policy, Verbs, check_budget
from engine.scheduling.request import Entry, Request
from engine.specs import SchedulerSpec

VERSIONS = ("0.12", "0.15", "0.33")  # whose rules are known, oldest first; the newest is the default
OLD_RULES = ("0.12", "0.15")  # these admit by the first chunk alone, and hold a lone request to the threshold


def _urgency(request: Request) -> tuple[int, float, int]:
    """vLLM's order by priority: the lowest number first, then the earliest arrival."""
    return request.priority, request.arrived_at, request.id


class VLLM(Policy):
    """Continuous batching without phases, with chunked prefills and preemption by recompute."""

    splits_prompts = True
    by_admission = True
    default_watermark = 0.0
    null_blocks = 1

    def __init__(self, spec: SchedulerSpec) -> None:
        super().__init__(spec)
        check_budget(spec)
        self.old_rules = spec.vllm_version in OLD_RULES
        self.reuse_unhashed_first = not self.old_rules
        self.by_priority = spec.scheduling_policy == "priority"

    @staticmethod
    def default_budget(max_model_len: int) -> int:
        return 2048

    def enqueue(self, waiting: deque[Request], request: Request) -> None:
        if self.by_priority:
            insort(waiting, request, key=_urgency)
        else:
            waiting.append(request)

    def requeue(self, waiting: deque[Request], victim: Request) -> None:
        if self.by_priority:
            insort(waiting, victim, key=_urgency)
        else:
            waiting.appendleft(victim)

    def victim(self, running: Sequence[Request]) -> Request:
        return max(running, key=_urgency) if self.by_priority else running[-1]

    def plan(self, scheduler: Verbs) -> BatchPlan:
        threshold = self._threshold(scheduler)
        decodes: list[Request] = []
        if threshold or self.by_priority:
            chunks, left = self._in_order(scheduler, threshold)
        else:  # a prompt that is part-way is the last of the running ones: as in order, and faster
            decodes = scheduler.take_decodes()
            left = self.budget - len(decodes)
            chunks = []
            if scheduler.kv_cache.prefix_caching:
                scheduler.kv_cache.register_decodes(decodes)
            for request in scheduler.unfinished_prefills():
                tokens = min(request.remaining, left)
                if tokens > 0 and scheduler.make_room(request, request.start + tokens):
                    left -= self._take(scheduler, request, tokens, chunks)
        blocked = False
        if not scheduler.preempted:
            while scheduler.waiting and left > 0:
                tokens = self._admit(scheduler, scheduler.waiting[0], min(threshold or left, left), chunks)
                blocked = not tokens
                if blocked:
                    break
                left -= tokens
        # a request that waits for blocks may find more of its prefix cached later
        return BatchPlan(decodes, chunks, stable=not (chunks or (blocked and scheduler.kv_cache.prefix_caching)))

    def _threshold(self, scheduler: Verbs) -> int:
        """The most tokens of one request in this batch; 0 where nothing but the budget bounds them."""
        threshold = self.spec.long_prefill_token_threshold
        if not threshold or self.old_rules:
            return threshold
        requests = len(scheduler.running) + len(scheduler.waiting)
        if requests == 1:
            return 0
        if self.spec.long_prefill_token_threshold_adaptive:
            return max(threshold, self.budget // requests)
        return threshold

    def _in_order(self, scheduler: Verbs, threshold: int) -> tuple[list[Entry], int]:
        """Entries of the running requests, one after the other, and what is left of the budget."""
        left = self.budget
        planned: dict[Request, int] = {}
        passed_over = 0
        apart = not scheduler.async_scheduling  # batches in flight are of other requests
        for request in scheduler.running.copy():
            if left == 0:
                break
            if request.row is None:  # preempted for one before it
                continue
            if passed_over:
                passed_over -= 1
                continue
            tokens = min(request.remaining, threshold or left, left)
            if tokens <= 0 or (apart and request.num_in_flight_tokens):
                continue
            before = len(scheduler.preempted)
            stays = scheduler.make_room(request, request.start + tokens)
            for victim in scheduler.preempted[before:]:
                if victim in planned:
                    left += planned.pop(victim)
                elif self.old_rules and victim.order < request.order:  # which lose count of their place in line here
                    passed_over += 1
            if not stays:
                if self.by_priority and not self.old_rules:  # those after it are more urgent, and may have its blocks
                    continue
                break
            chunks: list[Entry] = []
            left -= self._take(scheduler, request, tokens, chunks)
            planned[request] = tokens
        return list(planned.items()), left

    def _admit(self, scheduler: Verbs, request: Request, most: int, chunks: list[Entry]) -> int:
        """Admit a waiting request with KV blocks for its first tokens, at most so many; how many, 0 if it can't be."""
        kv_cache = scheduler.kv_cache
        prefix = kv_cache.match(request)
        cached = len(prefix) * kv_cache.block_size
        tokens = min(request.num_tokens - cached, most)
        reserve = request.num_tokens if self.spec.scheduler_reserve_full_isl else 0
        spare = kv_cache.watermark_blocks if scheduler.running else 0
        if not scheduler.admit(request, cached + tokens, prefix, reserve, spare):
            return 0
        return self._take(scheduler, request, tokens, chunks)

    def _take(self, scheduler: Verbs, request: Request, tokens: int, chunks: list[Entry]) -> int:
        """Put tokens that a request has KV blocks for in the batch; who is admitted after it may share them at once."""
        chunks.append((request, tokens))
        if scheduler.kv_cache.prefix_caching:
            self._share(scheduler, request, tokens)
        return tokens

    def _share(self, scheduler: Verbs, request: Request, tokens: int) -> None:
        scheduler.kv_cache.register(request, min(request.start + tokens, request.num_tokens))


OPTIONS = {  # fields of a SchedulerSpec that no other policy reads, and what they are where nothing is asked for
    "scheduling_policy": "fcfs",
    "long_prefill_token_threshold": 0,
    "long_prefill_token_threshold_adaptive": False,
    "scheduler_reserve_full_isl": None,
    "vllm_version": None,
}


def refuse_options(spec: SchedulerSpec) -> None:
    """Raise InputError for an option of vllm that another policy would ignore."""
    for name, default in OPTIONS.items():
        if (value := getattr(spec, name)) != default:
            raise InputError(
                f"{name} {value} is an option of the scheduler vllm, which {spec.policy} would ignore: leave it out, "
                "or choose --scheduler vllm"
            )


def resolve_vllm(spec: SchedulerSpec) -> SchedulerSpec:
    """Fill in what depends on the version. Raises InputError for a version whose rules are not known."""
    version = spec.vllm_version or VERSIONS[-1]
    if version not in VERSIONS:
        raise unknown("vLLM version", version, VERSIONS)
    if spec.long_prefill_token_threshold_adaptive and (version in OLD_RULES or not spec.long_prefill_token_threshold):
        why = f"vLLM {version} has no such option" if version in OLD_RULES else "it raises long_prefill_token_threshold"
        fix = "leave it out" if version in OLD_RULES else "give that too, or leave it out"
        raise InputError(f"long_prefill_token_threshold_adaptive true: {why}: {fix}")
    reserve = spec.scheduler_reserve_full_isl
    return replace(
        spec,
        vllm_version=version,
        scheduler_reserve_full_isl=version not in OLD_RULES if reserve is None else reserve,
    )
