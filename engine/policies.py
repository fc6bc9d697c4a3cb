"""How a batch is formed: one small class a policy, and one line in POLICIES.

A policy looks at the scheduler and plans a batch with its verbs: `take_decodes` (running requests that lack one
token), `unfinished_prefills`, `waiting` (the queue) and `admit` (any request of it). The published policies here:

| name | from | what it does |
|---|---|---|
| sarathi | Sarathi-Serve, OSDI 2024, algorithm 3 | decodes first, then chunks of prompts that fill the token budget |
| vllm | vLLM 0.2, SOSP 2023 | whole prompts first, in batches of their own; decodes wait meanwhile |
| orca | Orca, OSDI 2022 | whole prompts join the decodes at once; memory reserved for the longest request |
| faster_transformer | FasterTransformer | a batch of requests runs to its end before the next one starts |
| chunked_only | Sarathi-Serve's ablation | chunks and decodes take turns, never in one batch |
| hybrid_only | Sarathi-Serve's ablation | decodes first, then whole prompts |
"""

from __future__ import annotations

from bisect import bisect
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import TYPE_CHECKING

from engine.errors import InputError, unknown
from engine.request import Entry, Request
from engine.specs import SchedulerSpec

if TYPE_CHECKING:
    from engine.scheduler import Scheduler

_by_order = attrgetter("order")


@dataclass(slots=True)
class BatchPlan:
    """What a policy wants in the next batch.

    `decodes` are requests that `take_decodes` gave; `chunks` are entries of anything else, each a request and how many
    of its tokens are computed, in any order. `stable` promises that the policy, asked
    again after this batch, would plan the same requests with as many tokens each, if no request arrives or ends and no
    prompt reaches its end. It makes the simulator fast, and is never needed.
    """

    decodes: Sequence[Request] = ()
    chunks: Sequence[Entry] = ()
    stable: bool = field(default=False, kw_only=True)


class Policy:
    """Base of the policies: admission by a request's own tokens, and a token budget of the model's length."""

    has_budget = True
    strict_budget = True  # no batch has more tokens than the budget
    splits_prompts = False  # whether a prompt may be computed in chunks
    default_watermark = 0.01  # share of the KV blocks that admission leaves free (vLLM's)
    num_draft_tokens = 0  # tokens of an entry beyond the known ones, at most (speculative decoding)

    def __init__(self, spec: SchedulerSpec) -> None:
        self.spec = spec
        self.budget = spec.max_num_batched_tokens or 0
        self.watermark = self.default_watermark if spec.watermark is None else spec.watermark

    @staticmethod
    def default_budget(max_model_len: int) -> int:
        """Token budget where none was asked for: a whole prompt must fit (vLLM's default)."""
        return max(max_model_len, 2048)

    def reserved_tokens(self, request: Request) -> int:
        """Tokens to reserve KV blocks for at admission, at least."""
        return 0

    def check(self, request: Request) -> None:
        """Raise InputError if the policy could never run `request`."""

    def plan(self, scheduler: Scheduler) -> BatchPlan:
        """Plan the next batch."""
        raise NotImplementedError

    def requeue(self, waiting: deque[Request], victim: Request) -> None:
        """Put a preempted request back in line: by its arrival, before those that came later."""
        waiting.insert(bisect(waiting, victim.order, key=_by_order), victim)

    def victim(self, running: Sequence[Request]) -> Request:
        """Choose whom to preempt of `running`, which are in line, earliest first."""
        return running[-1]


class Sarathi(Policy):
    """Stall-free batching: every decode, then unfinished prompts, then new ones, within the token budget.

    With chunk_schedule "dynamic" a prompt's chunks shrink as its prefix grows (attention over a longer prefix costs
    more), linearly from `chunk_schedule_high` to `chunk_schedule_low` over `chunk_schedule_stages` stages of the first
    `chunk_schedule_max_tokens` tokens (by default from the token budget to a quarter of it, in 16 stages of the longest
    prompt), in multiples of 32 tokens (`chunk_sizes`).
    """

    splits_prompts = True

    def __init__(self, spec: SchedulerSpec) -> None:
        super().__init__(spec)
        check_budget(spec)
        self.chunk_sizes = chunk_sizes(spec) if spec.chunk_schedule == "dynamic" else []
        self.tokens_per_chunk_size = -(-(spec.chunk_schedule_max_tokens or 1) // max(1, len(self.chunk_sizes)))

    @staticmethod
    def default_budget(max_model_len: int) -> int:
        return 512

    def room(self, request: Request, used: int) -> int:
        """Tokens of `request` that may join a batch that has `used` tokens."""
        limit = self.budget
        if self.chunk_sizes:
            stage = min(request.start // self.tokens_per_chunk_size, len(self.chunk_sizes) - 1)
            limit = min(limit, self.chunk_sizes[stage])
        return min(request.remaining, limit - used)

    def take_chunks(self, scheduler: Scheduler, used: int) -> list[Entry]:
        """Chunks of unfinished prompts, then of new ones, that fit beside `used` tokens."""
        chunks: list[Entry] = []
        for request in scheduler.unfinished_prefills():
            chunk = self.room(request, used)
            if chunk > 0:
                chunks.append((request, chunk))
                used += chunk
        while scheduler.waiting and self.room(scheduler.waiting[0], used) > 0:
            request = scheduler.waiting[0]
            if not scheduler.admit(request):
                break
            chunk = self.room(request, used)
            if chunk > 0:  # a cached prefix may bring it to a stage of smaller chunks
                chunks.append((request, chunk))
                used += chunk
        return chunks

    def plan(self, scheduler: Scheduler) -> BatchPlan:
        decodes = scheduler.take_decodes()
        chunks = self.take_chunks(scheduler, len(decodes)) if scheduler.waiting or scheduler.prefilling else []
        return BatchPlan(decodes, chunks, stable=not (chunks and self.chunk_sizes))


class ChunkedOnly(Sarathi):
    """Chunked prefills without hybrid batches: a batch of chunks and a batch of decodes take turns."""

    def __init__(self, spec: SchedulerSpec) -> None:
        super().__init__(spec)
        self.prefill_turn = True

    def plan(self, scheduler: Scheduler) -> BatchPlan:
        tried_prefills = self.prefill_turn
        if self.prefill_turn:
            chunks = self.take_chunks(scheduler, 0)
            if chunks:
                self.prefill_turn = False
                return BatchPlan([], chunks)
        self.prefill_turn = True
        decodes = scheduler.take_decodes()
        if not decodes and not tried_prefills:
            return self.plan(scheduler)
        return BatchPlan(decodes, stable=tried_prefills)


class VLLM(Policy):
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

    def plan(self, scheduler: Scheduler) -> BatchPlan:
        prompts = take_prompts(scheduler, self.budget)
        return BatchPlan([], prompts) if prompts else BatchPlan(scheduler.take_decodes(), stable=True)


class Orca(Policy):
    """Iteration-level scheduling of whole prompts beside the decodes, with memory reserved for the longest request.

    No request ever grows past what it has reserved, so no watermark is needed, and the original has none.
    """

    has_budget = False
    strict_budget = False
    default_watermark = 0.0

    def reserved_tokens(self, request: Request) -> int:
        return self.spec.max_model_len or request.max_total_tokens

    def plan(self, scheduler: Scheduler) -> BatchPlan:
        decodes = scheduler.take_decodes()
        return BatchPlan(decodes, take_prompts(scheduler), stable=True)


class FasterTransformer(Orca):
    """Request-level batches: those admitted together run until the last of them ends; only then come others.

    Under pipeline parallelism each batch in flight is such a group. Requests that end early leave the batch.
    """

    def __init__(self, spec: SchedulerSpec) -> None:
        super().__init__(spec)
        self.next_group = 0

    def plan(self, scheduler: Scheduler) -> BatchPlan:
        decodes = scheduler.take_decodes()
        if decodes:
            group = decodes[0].group
            return BatchPlan([request for request in decodes if request.group == group], stable=True)
        prompts = take_prompts(scheduler)
        self.next_group += 1
        for request, _ in prompts:
            request.group = self.next_group
        return BatchPlan([], prompts)


class HybridOnly(Policy):
    """Hybrid batches without chunking: every decode, then whole prompts.

    The token budget bounds how many prompts join; the first always may, for a prompt may be longer than the budget.
    """

    strict_budget = False

    def plan(self, scheduler: Scheduler) -> BatchPlan:
        decodes = scheduler.take_decodes()
        return BatchPlan(decodes, take_prompts(scheduler, self.budget - len(decodes), first=True), stable=True)


def take_prompts(scheduler: Scheduler, budget: int | None = None, *, first: bool = False) -> list[Entry]:
    """Admit whole prompts from the head of the queue, within `budget` tokens if there is one; the `first` in any case.

    A prompt counts with all its tokens, and those that are cached are not computed.
    """
    prompts: list[Entry] = []
    while scheduler.waiting:
        request = scheduler.waiting[0]
        over = budget is not None and request.num_tokens > budget
        if (over and not (first and not prompts)) or not scheduler.admit(request):
            break
        prompts.append((request, request.remaining))
        budget = None if budget is None else budget - request.num_tokens
    return prompts


CHUNK_MULTIPLE = 32  # tokens that the sizes of dynamic chunks are multiples of
CHUNK_SCHEDULE = ("chunk_schedule_low", "chunk_schedule_high", "chunk_schedule_stages", "chunk_schedule_max_tokens")

POLICIES: dict[str, type[Policy]] = {
    "sarathi": Sarathi,
    "vllm": VLLM,
    "orca": Orca,
    "faster_transformer": FasterTransformer,
    "chunked_only": ChunkedOnly,
    "hybrid_only": HybridOnly,
}


def check_budget(spec: SchedulerSpec) -> None:
    """Raise InputError unless every running request can decode in one batch."""
    budget = spec.max_num_batched_tokens or 0
    if budget < spec.max_num_seqs:
        raise InputError(
            f"--max-num-batched-tokens {budget} is less than --max-num-seqs {spec.max_num_seqs}, so not every running "
            f"request could decode in one batch: raise the one or lower the other"
        )


def chunk_sizes(spec: SchedulerSpec) -> list[int]:
    """The chunk size of each stage of a resolved dynamic schedule, first stage first.

    As in microsoft/sarathi-serve, sizes are rounded to multiples of 32 tokens, or of the smallest size where that is
    less. There the smallest and the largest must be multiples themselves; here they need not be, and bound the others.
    """
    high, low = spec.chunk_schedule_high or 1, spec.chunk_schedule_low or 1
    stages = spec.chunk_schedule_stages or 1
    if stages == 1:
        return [high]
    unit = min(CHUNK_MULTIPLE, low)
    even = [low + (high - low) * stage // (stages - 1) for stage in reversed(range(stages))]
    return [min(high, max(low, round(size / unit) * unit)) for size in even]


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
    spec = replace(spec, max_model_len=max_model_len, max_num_batched_tokens=budget if policy.has_budget else None)
    return replace(spec, watermark=policy(spec).watermark)  # which checks the limits
