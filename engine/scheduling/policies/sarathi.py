"""Sarathi-Serve's policies (OSDI 2024, algorithm 3) and those of its ablation."""

from __future__ import annotations

from engine.scheduling.policies.base import BatchPlan, Policy, Verbs, check_budget, take_prompts
from engine.scheduling.request import Entry, Request
from engine.specs import SchedulerSpec

CHUNK_MULTIPLE = 32  # tokens that the sizes of dynamic chunks are multiples of
CHUNK_SCHEDULE = ("chunk_schedule_low", "chunk_schedule_high", "chunk_schedule_stages", "chunk_schedule_max_tokens")


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
        remaining, limit = request.remaining, limit - used
        return remaining if remaining < limit else limit

    def take_chunks(self, scheduler: Verbs, used: int, apart: bool = False) -> list[Entry]:
        """Chunks of unfinished prompts, then of new ones (`apart`: else), that fit beside `used` tokens."""
        chunks: list[Entry] = []
        for request in scheduler.unfinished_prefills():
            chunk = self.room(request, used)
            if chunk > 0:
                chunks.append((request, chunk))
                used += chunk
        if apart and chunks:
            return chunks
        while scheduler.waiting and self.room(scheduler.waiting[0], used) > 0:
            request = scheduler.waiting[0]
            if not scheduler.admit(request):
                break
            chunk = self.room(request, used)
            if chunk > 0:  # a cached prefix may bring it to a stage of smaller chunks
                chunks.append((request, chunk))
                used += chunk
        return chunks

    def plan(self, scheduler: Verbs) -> BatchPlan:
        decodes = scheduler.take_decodes()
        chunks = self.take_chunks(scheduler, len(decodes)) if scheduler.waiting or scheduler.prefilling else []
        return BatchPlan(decodes, chunks, stable=not (chunks and self.chunk_sizes))


class ChunkedOnly(Sarathi):
    """Chunked prefills without hybrid batches: a batch of chunks and a batch of decodes take turns.

    As in Sarathi-Serve's own (SimpleChunkingScheduler), a batch that goes on with a prompt takes no new one.
    """

    def __init__(self, spec: SchedulerSpec) -> None:
        super().__init__(spec)
        self.prefill_turn = True

    def plan(self, scheduler: Verbs) -> BatchPlan:
        tried_prefills = self.prefill_turn
        if self.prefill_turn:
            chunks = self.take_chunks(scheduler, 0, apart=True)
            if chunks:
                self.prefill_turn = False
                return BatchPlan([], chunks)
        self.prefill_turn = True
        decodes = scheduler.take_decodes()
        if not decodes and not tried_prefills:
            return self.plan(scheduler)
        return BatchPlan(decodes, stable=tried_prefills)


class HybridOnly(Policy):
    """Hybrid batches without chunking: every decode, then whole prompts.

    The token budget bounds how many prompts join; the first always may, for a prompt may be longer than the budget.
    """

    strict_budget = False

    def plan(self, scheduler: Verbs) -> BatchPlan:
        decodes = scheduler.take_decodes()
        return BatchPlan(decodes, take_prompts(scheduler, self.budget - len(decodes), first=True), stable=True)


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
