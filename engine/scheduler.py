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

from bisect import bisect, insort
from collections import deque
from collections.abc import Sequence
from operator import attrgetter

from engine.blocks import BlockManager
from engine.errors import InputError
from engine.policies import POLICIES, Draft
from engine.request import Batch, BatchShape, Request
from engine.specs import SchedulerSpec

MANY = 1 << 30  # repeats of a batch that nothing bounds

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
    ) -> None:
        self.spec = spec
        self.max_in_flight = max_in_flight
        self.sliding_window = sliding_window
        self.policy = POLICIES[spec.policy](spec)
        self.blocks = BlockManager(num_blocks, spec.block_size, spec.watermark)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # admitted, earliest in line first
        self.prefilling: list[Request] = []  # those of `running` whose prompt is not computed yet
        self.decoding: list[Request] = []  # the others of `running`: each lacks one token
        # of `decoding`, kept up to date: to look at each request for each batch would take much longer
        self._full: list[Request] = []  # those that need a block before they run again
        self._computed = 0  # their computed tokens, in all
        self._left = 0  # none is at its limit in fewer runs than this; 0 where that is not known
        self.in_flight = 0
        self.recomputed_tokens = 0  # computed tokens that preemptions threw away
        self._next_order = 0

    # -- what a driver calls ---------------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Raise InputError if `request` could never run here, however long it waited."""
        if request.prompt_tokens < 1 or request.output_tokens < 1:
            raise InputError(
                f"request {request.id} has {request.prompt_tokens} prompt + {request.output_tokens} output tokens: "
                f"give at least one of each, or drop the request"
            )
        if self.spec.max_model_len is not None and request.limit > self.spec.max_model_len:
            raise InputError(
                f"request {request.id} has {request.prompt_tokens} prompt + {request.output_tokens} output tokens, "
                f"over --max-model-len {self.spec.max_model_len}: raise it or drop the request"
            )
        tokens = max(self.policy.reserved_tokens(request), request.limit - 1)  # the last token is never computed
        room = self.blocks.num_blocks - self.blocks.watermark_blocks
        if self.blocks.blocks_for(tokens) > room:
            raise InputError(
                f"request {request.id} needs KV cache for {tokens} tokens but there is room for "
                f"{room * self.blocks.block_size} ({room} blocks of {self.blocks.block_size}): lower --max-model-len "
                f"or --watermark, raise --gpu-memory-utilization, --num-gpu-blocks-override or --tensor-parallel-size"
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
        window = self.sliding_window
        num_tokens = growth = len(decodes)
        everyone = len(decodes) == len(self.decoding)
        if window is None:
            kv_tokens = (self._computed if everyone else sum([r.computed for r in decodes])) + num_tokens
        else:
            kv_tokens = sum([min(r.computed + 1, window) for r in decodes])
            growth = sum([r.computed + 1 < window for r in decodes])
        chunks: tuple[tuple[int, int], ...] = ()
        ending: list[Request] = []
        if prefills:
            chunks = tuple([(chunk, request.computed) for request, chunk in prefills])
            for request, chunk in prefills:
                if not 0 < chunk <= request.total - request.computed:
                    raise ValueError(f"the policy {self.spec.policy} drafted {chunk} tokens of {request}")
                num_tokens += chunk
                if request.computed + chunk == request.total:
                    ending.append(request)
        left = (everyone and self._left) or min([r.limit - r.total for r in decodes], default=MANY)
        if everyone:
            self._left = left
        shape = BatchShape(num_tokens, len(decodes), kv_tokens, chunks, len(decodes) + len(ending), growth)
        repeats = self._repeats(draft, left) if draft.stable else 1
        return Batch(decodes, prefills, shape, self.blocks.num_used, ending, left, repeats)

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
        for request, _ in batch.prefills:
            left = request.total - request.computed
            if left <= 1:  # a last token left over is computed like a decode
                request.total += 1 - left
                self.prefilling.remove(request)
                insort(self.decoding, request, key=_by_order)
                self._computed += request.computed
                self._left = min(self._left, request.limit - request.total)
                if request.computed == request.capacity:
                    self._full.append(request)
        for request in stopped:
            self._leave(request)
        return taken

    def drop(self, request: Request) -> None:
        """Let go of a request that is in no batch, wherever it is."""
        if request in self.running:
            self._leave(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def advance(self, batch: Batch, repeats: int) -> list[int]:
        """As `repeats` rounds of committing this batch and scheduling it again; it stays in flight."""
        taken = self._progress(batch, repeats, 1)
        batch.repeats = max(1, batch.repeats - repeats)
        batch.left -= repeats
        batch.shape = batch.shape.after(repeats)
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
        left = sorted([r.capacity - r.computed for r in self.running])  # runs until each takes a block
        return max(1, min(left[free], left[0] + self.blocks.block_size))

    # -- the verbs of a policy -------------------------------------------------------------------------------------

    def take_decodes(self) -> list[Request]:
        """Every running request that is free to run and lacks one token, each with a KV slot for it.

        When the blocks run out the latest in line is preempted: it gives up its blocks and goes back to the head of
        the queue, to be recomputed.
        """
        for request in sorted(self._full, key=_by_order):
            if request.blocks and request.computed == request.capacity:  # else it has stopped or been preempted since
                self._make_room(request)
        self._full.clear()
        return [r for r in self.decoding if not r.in_flight] if self.in_flight else self.decoding.copy()

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

    def _make_room(self, request: Request) -> None:
        """Grow `request` by a block, preempting the latest in line as need be, which may be `request` itself."""
        while not self.blocks.grow(request):
            victim = next(r for r in reversed(self.running) if not r.in_flight)
            self._preempt(victim)
            if victim is request:
                return

    def _leave(self, request: Request) -> None:
        """A request runs no more: its blocks are free."""
        self.running.remove(request)
        if request in self.prefilling:
            self.prefilling.remove(request)
        else:
            self.decoding.remove(request)
            self._computed -= request.computed
            self._left = 0
        self.blocks.release(request)

    def _preempt(self, victim: Request) -> None:
        self._leave(victim)
        self.recomputed_tokens += victim.computed
        victim.computed = 0
        victim.preemptions += 1
        self.waiting.insert(bisect(self.waiting, victim.order, key=_by_order), victim)  # others may be before it

    def _progress(self, batch: Batch, repeats: int, ahead: int) -> list[int]:
        """Count `repeats` runs as computed, with KV blocks for `ahead` more; says which rounds took a block."""
        taken: list[int] = []
        if batch.decodes:
            self._computed += repeats * len(batch.decodes)
            self._left = max(0, self._left - repeats)
        for request in batch.decodes:
            request.total += repeats
            request.computed = after = request.computed + repeats
            if after + ahead >= request.capacity:
                before = after - repeats
                while after + ahead > request.capacity:
                    taken.append(request.capacity - before)
                    assert self.blocks.grow(request), "repeats went past the free KV blocks"
                if after == request.capacity:
                    self._full.append(request)
        for request, chunk in batch.prefills:
            request.computed += repeats * chunk
        return taken

    def _repeats(self, draft: Draft, left: int) -> int:
        """How often the batch may run before a request or a prompt ends or the blocks may run out."""
        repeats = left
        for request, chunk in draft.prefills:
            repeats = min(repeats, (request.total - request.computed - 1) // chunk)
        if repeats <= 1:
            return 1
        window = self.sliding_window
        if window is not None:  # `decode_kv_growth` holds until the next request fills the window
            repeats = min([repeats, *(window - r.computed for r in draft.decodes if r.computed + 1 < window)])
        return min(repeats, self.rounds()) if repeats > 1 else 1
