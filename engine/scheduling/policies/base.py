"""What every batching policy is: it looks at the scheduler and plans the next batch with its verbs."""

from __future__ import annotations

from bisect import bisect
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Protocol

from engine.errors import InputError
from engine.scheduling.kv_cache import KVCache
from engine.scheduling.request import Entry, Request
from engine.specs import SchedulerSpec

_by_order = attrgetter("order")


class Verbs(Protocol):
    """What a policy sees of the scheduler, and what it may do with it (`engine.scheduling.scheduler`)."""

    kv_cache: KVCache
    async_scheduling: bool  # whether a request in flight may be in the next batch too
    waiting: deque[Request]  # the queue
    running: list[Request]  # admitted, earliest in line first
    prefilling: list[Request]  # those of `running` with more than their last known token to compute
    preempted: list[Request]  # for the batch that is planned, in order

    def take_decodes(self) -> list[Request]:
        """Give every running request that is free to run and lacks one token, with a KV slot for it."""

    def unfinished_prefills(self) -> list[Request]:
        """Admitted requests, free to run, whose prompt (or recompute) is not finished; earliest in line first."""

    def admit(
        self,
        request: Request,
        tokens: int | None = None,
        prefix: Sequence[int] | None = None,
        reserve: int = 0,
        spare: int | None = None,
    ) -> bool:
        """Move a waiting request to the running ones, with KV blocks; False, and nothing done, if that can't be."""

    def make_room(self, request: Request, tokens: int) -> bool:
        """Give a running request KV blocks for `tokens` tokens, preempting as need be; False if it was preempted."""

    def preempt(self, victim: Request) -> None:
        """Take a running request's blocks away and put it back in line, to be recomputed."""


@dataclass(slots=True)
class BatchPlan:
    """What a policy wants in the next batch.

    `decodes` are requests that `take_decodes` gave; `chunks` are entries of anything else, each a request and how many
    of its tokens are computed, in any order. `stable` promises that the policy, asked
    again after this batch, would plan the same requests with as many tokens each, if no request arrives or ends, no
    prompt reaches its end and the first request that waits finds no more of its prefix in the cache. It makes the
    simulator fast, and is never needed.
    """

    decodes: Sequence[Request] = ()
    chunks: Sequence[Entry] = ()
    stable: bool = field(default=False, kw_only=True)


class Policy:
    """Base of the policies: admission by a request's own tokens, and a token budget of the model's length."""

    has_budget = True
    strict_budget = True  # no batch has more tokens than the budget
    splits_prompts = False  # whether a prompt may be computed in chunks
    by_admission = False  # whether running requests are in line by their admission, else by their arrival
    num_draft_tokens = 0  # tokens of an entry beyond the known ones, at most (speculative decoding)
    default_watermark = 0.01  # share of the KV blocks that admission leaves free (vLLM V0's)
    reuse_unhashed_first = False  # KV blocks without a hash are taken before all others
    null_blocks = 0  # KV blocks that nobody ever holds and the watermark counts, beside those that there are

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

    def plan(self, scheduler: Verbs) -> BatchPlan:
        """Plan the next batch."""
        raise InputError(f"the policy {type(self).__name__} has no plan(): write how it forms a batch")

    def enqueue(self, waiting: deque[Request], request: Request) -> None:
        """Put a new request in line: at the end."""
        waiting.append(request)

    def requeue(self, waiting: deque[Request], victim: Request) -> None:
        """Put a preempted request back in line: by its arrival, before those that came later."""
        waiting.insert(bisect(waiting, victim.order, key=_by_order), victim)

    def victim(self, running: Sequence[Request]) -> Request:
        """Choose whom to preempt of `running`, which are in line, earliest first."""
        return running[-1]


def take_prompts(scheduler: Verbs, budget: int | None = None, *, first: bool = False) -> list[Entry]:
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


def check_budget(spec: SchedulerSpec) -> None:
    """Raise InputError unless every running request can decode in one batch."""
    budget = spec.max_num_batched_tokens or 0
    if budget < spec.max_num_seqs:
        raise InputError(
            f"--max-num-batched-tokens {budget} is less than --max-num-seqs {spec.max_num_seqs}, so not every running "
            f"request could decode in one batch: raise the one or lower the other"
        )
