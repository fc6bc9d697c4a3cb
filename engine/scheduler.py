"""The scheduler: which requests run in the next batch, and how many tokens of each.

It owns the queue, the running requests and the KV blocks; it owns no clock. The engine's driver and the simulator's
replica make the same two calls:

    while (batch := scheduler.schedule()) is not None: launch(batch)
    ...
    scheduler.commit(batch, stopped)          # when the batch is done

`schedule` gives None while nothing can run or as many batches are in flight as there are pipeline stages. How a batch
is formed is the policy's business (engine/policies.py); the verbs a policy uses are here.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Sequence
from operator import attrgetter

from engine.blocks import BlockManager
from engine.errors import InputError
from engine.policies import POLICIES, Policy
from engine.request import Batch, Request
from engine.specs import SchedulerSpec

_by_order = attrgetter("order")


class Scheduler:
    """Scheduler of one replica.

    Args:
        spec: what the policy may do; `max_model_len` and `max_num_batched_tokens` are filled in (`policies.resolve`).
        num_blocks: KV blocks of the replica.
        max_in_flight: batches that may be under way at once: the number of pipeline stages.
        sliding_window: tokens that the model's attention looks back, if it is bounded.
    """

    def __init__(
        self,
        spec: SchedulerSpec,
        num_blocks: int,
        max_in_flight: int = 1,
        sliding_window: int | None = None,
        policy: Policy | None = None,
    ) -> None:
        self.spec = spec
        self.max_in_flight = max_in_flight
        self.sliding_window = sliding_window
        self.policy = policy or POLICIES[spec.policy](spec)
        self.blocks = BlockManager(num_blocks, spec.block_size, spec.watermark)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # admitted, earliest in line first
        self.prefilling: list[Request] = []  # those of `running` whose prompt is not computed yet
        self.in_flight = 0
        self.recomputed_tokens = 0  # computed tokens that preemptions threw away
        self._next_order = 0

    # -- what a driver calls ---------------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Raise InputError if `request` could never run here, however long it waited."""
        if self.spec.max_model_len is not None and request.limit > self.spec.max_model_len:
            raise InputError(
                f"request {request.id} has {request.prompt_tokens} prompt + {request.output_tokens} output tokens, "
                f"over --max-model-len {self.spec.max_model_len}: raise it or drop the request"
            )
        tokens = max(self.policy.reserved_tokens(request), request.limit)
        room = self.blocks.num_blocks - self.blocks.watermark_blocks
        if self.blocks.blocks_for(tokens) > room:
            raise InputError(
                f"request {request.id} needs KV cache for {tokens} tokens but there is room for "
                f"{room * self.blocks.block_size} ({room} blocks of {self.blocks.block_size}): lower --max-model-len, "
                f"raise --gpu-memory-utilization or --tensor-parallel-size"
            )
        self.policy.check(request)

    def add(self, request: Request) -> None:
        """Put a request in line. Raises InputError if it could never run."""
        self.check(request)
        request.order = self._next_order
        self._next_order += 1
        self.waiting.append(request)

    def schedule(self) -> Batch | None:
        """The next batch, with KV blocks allocated for it, or None."""
        if self.in_flight >= self.max_in_flight or not (self.running or self.waiting):
            return None
        draft = self.policy.form(self)
        decodes, prefills = draft.decodes, draft.prefills
        if not decodes and not prefills:
            return None
        self.in_flight += 1
        if self.max_in_flight > 1:
            for request in decodes:
                request.in_flight = True
            for request, _ in prefills:
                request.in_flight = True
        num_decodes = len(decodes)
        window = self.sliding_window
        if window is None:
            kv_tokens, growth = sum([r.computed for r in decodes]) + num_decodes, num_decodes
        else:
            kv_tokens = sum([min(r.computed + 1, window) for r in decodes])
            growth = sum([r.computed + 1 < window for r in decodes])
        batch = Batch(
            decodes,
            prefills,
            tuple([(chunk, r.computed) for r, chunk in prefills]),
            num_decodes,
            kv_tokens,
            growth,
            num_decodes,
            self.blocks.num_used,
        )
        if prefills:
            for request, chunk in prefills:
                batch.num_tokens += chunk
                batch.num_sampled += request.computed + chunk == request.total
        elif draft.stable:
            batch.repeats = self._repeats(decodes)
        return batch

    def commit(self, batch: Batch, stopped: Sequence[Request], repeats: int = 1) -> list[int]:
        """The batch is done, having run `repeats` (at most `batch.repeats`) times; `stopped` leave the replica.

        Committing more than once stands for `repeats` rounds of commit and schedule that gave this batch each time.
        Returns, for each KV block taken meanwhile, the round (1, 2, ...) that took it.
        """
        taken = self._progress(batch, repeats, 0)
        self.in_flight -= 1
        if self.max_in_flight > 1:
            for request in batch.decodes:
                request.in_flight = False
            for request, _ in batch.prefills:
                request.in_flight = False
        for request, chunk in batch.prefills:
            request.computed += chunk
            left = request.total - request.computed
            if left <= 1:  # a last token left over is computed like a decode
                self.prefilling.remove(request)
            if left == 0:
                request.total += 1
        if stopped:
            gone = set(map(id, stopped))
            self.running = [r for r in self.running if id(r) not in gone]
            for request in stopped:
                self.blocks.release(request)
        return taken

    def advance(self, batch: Batch, repeats: int) -> list[int]:
        """As `repeats` rounds of committing this batch and scheduling it again; it stays in flight."""
        taken = self._progress(batch, repeats, 1)
        batch.repeats -= repeats
        batch.decode_kv_tokens += repeats * batch.decode_kv_growth
        batch.kv_blocks = self.blocks.num_used
        return taken

    def rounds(self) -> int:
        """How many times every running request may run, its run in flight included, before the blocks may run out.

        `Batch.repeats` has regard to it; a driver with several batches in flight asks again when it plans ahead, for
        the batches formed later may have taken blocks.
        """
        free, growing = len(self.blocks.free), len(self.running)
        if free >= growing:
            return free // growing * self.blocks.block_size
        return max(1, sorted([r.capacity - r.computed for r in self.running])[free])

    # -- the verbs of a policy -------------------------------------------------------------------------------------

    def take_decodes(self) -> list[Request]:
        """Every running request that is free to run and lacks one token, each with a KV slot for it.

        When the blocks run out the latest in line is preempted: it gives up its blocks and goes back to the head of
        the queue, to be recomputed.
        """
        decodes = []
        for request in self.running:  # a preemption removes this request or later ones, so the iteration stays right
            computed = request.computed
            if request.total - computed != 1 or request.in_flight:
                continue
            if computed == request.capacity and not self._grow(request):
                continue
            decodes.append(request)
        return decodes

    def unfinished_prefills(self) -> list[Request]:
        """Admitted requests, free to run, whose prompt (or recompute) is not finished; earliest in line first."""
        return [r for r in self.prefilling if not r.in_flight]

    def admit(self) -> Request | None:
        """Move the head of the queue to the running requests, with blocks for all its tokens; None if it can't be."""
        if not self.waiting or len(self.running) >= self.spec.max_num_seqs:
            return None
        request = self.waiting[0]
        tokens = max(self.policy.reserved_tokens(request), request.total)
        if not self.blocks.can_admit(tokens):
            return None
        self.blocks.allocate(request, tokens)
        self.waiting.popleft()
        insort(self.running, request, key=_by_order)
        insort(self.prefilling, request, key=_by_order)
        return request

    # -- inside ----------------------------------------------------------------------------------------------------

    def _grow(self, request: Request) -> bool:
        while not self.blocks.allocate(request, request.computed + 1):
            victim = next(r for r in reversed(self.running) if not r.in_flight)
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, victim: Request) -> None:
        self.running.remove(victim)
        if victim in self.prefilling:
            self.prefilling.remove(victim)
        self.blocks.release(victim)
        self.recomputed_tokens += victim.computed
        victim.computed = 0
        victim.preemptions += 1
        self.waiting.appendleft(victim)

    def _progress(self, batch: Batch, repeats: int, ahead: int) -> list[int]:
        """Move the decodes `repeats` tokens on, with blocks for `ahead` more; says which rounds took a block."""
        taken: list[int] = []
        for request in batch.decodes:
            before = request.computed
            request.computed = after = before + repeats
            request.total += repeats
            if after + ahead > request.capacity:
                taken += range(request.capacity - before, repeats + ahead, self.blocks.block_size)
                assert self.blocks.allocate(request, after + ahead), "repeats went past the free KV blocks"
        return taken

    def _repeats(self, decodes: Sequence[Request]) -> int:
        """How many times this batch of decodes alone may run before a request finishes or the blocks may run out."""
        repeats = min([r.limit - r.total for r in decodes])
        window = self.sliding_window
        if window is not None:  # `decode_kv_growth` holds until the next request fills the window
            repeats = min([repeats, *(window - r.computed for r in decodes if r.computed + 1 < window)])
        return min(repeats, self.rounds()) if repeats > 1 else 1
