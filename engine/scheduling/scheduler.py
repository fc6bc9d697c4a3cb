"""The scheduler: which requests run in the next batch, and how many tokens of each.

It owns the queue, the running requests and the KV cache's blocks; it owns no clock. The engine's driver and the
simulator's replica make the same two calls:

    while (batch := scheduler.schedule()) is not None: launch(batch)
    ...
    finished = scheduler.commit(batch).finished          # when the batch is done

`schedule` gives None while nothing can run or as many batches are in flight as there may be: one a pipeline stage, or
two with asynchronous scheduling. How a batch is formed is the policy's business (engine/scheduling/policies/); the
verbs a policy uses are here.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Collection, Sequence
from operator import attrgetter

from engine.errors import InputError
from engine.scheduling.content import Content, own
from engine.scheduling.kv_cache import KVCache
from engine.scheduling.policies import POLICIES, BatchPlan
from engine.scheduling.request import Batch, BatchShape, Entry, Request
from engine.specs import SchedulerSpec

UNBOUNDED = 1 << 30  # repeats of a batch that nothing bounds

_by_order = attrgetter("order")


class Scheduler:
    """Scheduler of one replica.

    Args:
        spec: what the policy may do; `max_model_len` and `max_num_batched_tokens` are filled in (`policies.resolve`).
        num_blocks: KV blocks of the replica.
        max_in_flight: batches that may be under way at once, each of other requests: the number of pipeline stages.
        sliding_window: tokens that the model's attention looks back, if it is bounded.
        async_scheduling: form each batch while the one before is computed. Then two are in flight, a request may be in
            both, and a request that has its last token gives up its seat and blocks when that token is there (vLLM V1).
    """

    def __init__(
        self,
        spec: SchedulerSpec,
        num_blocks: int,
        max_in_flight: int = 1,
        sliding_window: int | None = None,
        async_scheduling: bool = False,
    ) -> None:
        if async_scheduling and max_in_flight > 1:
            raise ValueError("async scheduling is for one pipeline stage: several batches are in flight already")
        self.spec = spec
        self.async_scheduling = async_scheduling
        self.max_in_flight = 2 if async_scheduling else max_in_flight
        self.num_stages = max_in_flight
        self.sliding_window = sliding_window
        self.policy = POLICIES[spec.policy](spec)
        self.kv_cache = KVCache(
            num_blocks,
            spec.block_size,
            self.policy.watermark,
            spec.enable_prefix_caching,
            reuse_unhashed_first=self.policy.reuse_unhashed_first,
            null_blocks=self.policy.null_blocks,
        )
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # admitted, earliest in line first
        self.prefilling: list[Request] = []  # those of `running` with more than their last known token to compute
        # of `running`, those that lack one token and may run for it; what follows is kept up to date about them, for
        # to look at each request for each batch would take much longer
        self.decoding: list[Request] = []
        self._full: dict[Request, None] = {}  # those that need a block before they run again
        self._kv_tokens = 0  # their tokens in the cache (or on the way there), in all
        self._left = 0  # none has its last token in fewer runs than this; 0 where that is not known
        self._in_flight: list[Batch] = []
        self._free_rows = list(range(spec.max_num_seqs - 1, -1, -1))
        self.prefix_query_tokens = 0  # of admitted requests, looked up in the cache of prefixes
        self.prefix_hit_tokens = 0  # of these, found there
        self.resumed_query_tokens = self.resumed_hit_tokens = 0  # of both, those of requests that had been preempted
        self._hits = 0  # of these, for the batch that is planned
        self.recomputed_tokens = 0  # computed tokens that preemptions threw away
        self.preempted: list[Request] = []  # for the newest batch, in order
        self._next_order = 0

    @property
    def in_flight(self) -> int:
        """Batches that have been scheduled and not committed."""
        return len(self._in_flight)

    # -- what a driver calls ---------------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Raise InputError if `request` could never run here, however long it waited."""
        if request.prompt_tokens < 1 or request.output_tokens < 1:
            raise InputError(
                f"request {request.id} has {request.prompt_tokens} prompt + {request.output_tokens} output tokens: "
                f"give at least one of each, or drop the request"
            )
        if self.spec.max_model_len is not None and request.max_total_tokens > self.spec.max_model_len:
            raise InputError(
                f"request {request.id} has {request.prompt_tokens} prompt + {request.output_tokens} output tokens, "
                f"over --max-model-len {self.spec.max_model_len}: raise it or drop the request"
            )
        tokens = max(self.policy.reserved_tokens(request), request.max_total_tokens - 1)  # the last is never computed
        kv_cache = self.kv_cache
        room = kv_cache.num_blocks - kv_cache.watermark_blocks
        if kv_cache.blocks_for(tokens) > room:
            raise InputError(
                f"request {request.id} needs KV cache for {tokens} tokens but there is room for "
                f"{room * kv_cache.block_size} ({room} blocks of {kv_cache.block_size}): lower --max-model-len "
                f"or --watermark, raise --gpu-memory-utilization, --num-gpu-blocks-override or --tensor-parallel-size"
            )
        self.policy.check(request)

    def add(self, request: Request) -> None:
        """Put a request in line. Raises InputError if it could never run."""
        self.check(request)
        if self.kv_cache.prefix_caching and request.block_hashes is None and request.content is not None:
            self._hash_blocks(request, request.content)  # without a content only itself finds its blocks, preempted
        request.order = self._next_order
        self._next_order += 1
        self.policy.enqueue(self.waiting, request)

    def schedule(self) -> Batch | None:
        """Form the next batch, with KV blocks allocated for it; None if there is none."""
        if len(self._in_flight) >= self.max_in_flight or not (self.running or self.waiting):
            return None
        if self.preempted:
            self.preempted.clear()
        running = len(self.running)
        plan = self.policy.plan(self)
        try:
            decodes, chunks = plan.decodes, plan.chunks
        except AttributeError:
            raise InputError(
                f"the policy {self.spec.policy} planned {plan!r}: return a BatchPlan from plan()"
            ) from None
        while not decodes and not chunks:
            if self._in_flight or not self.preempted or len(self.running) >= running:
                return None
            running = len(self.running)
            self.preempted.clear()  # those who were to run gave up their blocks: who can run now?
            plan = self.policy.plan(self)
            decodes, chunks = plan.decodes, plan.chunks
        window = self.sliding_window
        num_decodes = num_sampled = num_tokens = growth = len(decodes)
        everyone = num_decodes == len(self.decoding)
        to_window = UNBOUNDED  # runs until the next request fills the window: so long `growth` holds
        if window is None:
            kv_tokens = (self._kv_tokens if everyone else sum([r.start for r in decodes])) + num_tokens
        else:
            starts = [r.num_computed_tokens + r.num_in_flight_tokens for r in decodes]
            if max(starts, default=0) + 1 >= window:
                starts = [start for start in starts if start + 1 < window]
            if starts:
                to_window = window - max(starts)
            growth = len(starts)
            kv_tokens = sum(starts) + growth + window * (num_decodes - growth)
        left = self._left if everyone else 0
        if not left:
            if self.async_scheduling:
                left = min([_output_left(r) for r in decodes], default=UNBOUNDED)
            else:  # none has a token pending
                left = min([r.max_total_tokens - r.num_tokens for r in decodes], default=UNBOUNDED)
            if everyone:
                self._left = left
        prefills: list[tuple[int, int]] = []
        completing: list[Request] = []
        for request, tokens in chunks:
            if request.row is None:
                raise InputError(
                    f"the policy {self.spec.policy} planned {tokens} tokens of request {request.id}, which does not "
                    f"run: admit it first (scheduler.admit)"
                )
            start = request.num_computed_tokens + request.num_in_flight_tokens
            known = request.num_tokens + request.num_pending_tokens
            remaining = (known if known < request.max_total_tokens else request.max_total_tokens - 1) - start
            num_tokens += tokens
            if 0 < tokens < remaining:
                prefills.append((tokens, start))
                continue
            if not 0 < tokens <= remaining + self.policy.num_draft_tokens:
                raise InputError(
                    f"the policy {self.spec.policy} planned {tokens} tokens of {request}: it has {remaining} to compute"
                )
            completing.append(request)
            if tokens == remaining == 1 and start > 0:  # a decode, whoever planned it
                num_decodes += 1
                kv_tokens += start + 1 if window is None else min(start + 1, window)
            else:
                prefills.append((tokens, start))
        shape = BatchShape(num_tokens, num_decodes, kv_tokens, tuple(prefills), num_sampled + len(completing), growth)
        # after a preemption there are free blocks, which the next plan may use for another
        stable = plan.stable and num_decodes == num_sampled and not self.preempted
        kv_cache = self.kv_cache
        caching = kv_cache.prefix_caching
        if stable and caching:
            stable = not self._cache_matters()
        repeats = self._repeats(plan, min(left, to_window)) if stable else 1
        kv_blocks = kv_cache.num_blocks - kv_cache.num_free
        batch = Batch(decodes, chunks, completing, shape, kv_blocks, left, repeats)
        self._in_flight.append(batch)
        if caching:
            batch.prefix_hit_tokens, self._hits = self._hits, 0
            kv_cache.register_decodes(decodes)
            for request, tokens in chunks:
                kv_cache.register(request, min(request.start + tokens, request.num_tokens))
        if self.max_in_flight > 1:
            for request, tokens in batch.entries:
                request.num_in_flight_tokens += tokens
            if self.async_scheduling:
                self._count_ahead(batch)
        return batch

    def commit(
        self,
        batch: Batch,
        accepted: Sequence[int] | None = None,
        stopped: Collection[Request] = (),
        repeats: int = 1,
    ) -> tuple[list[Request], list[int]]:
        """Count a batch in flight, the oldest, as computed; requests that are finished by it leave the replica.

        Returns these, and for each KV block that repeats took the round (1, 2, ...) that took it.

        Args:
            accepted: how many new tokens each of `batch.entries` got: 0 where its last known token was not computed,
                else 1, or more with accepted speculative ones. None: 1 for each of `batch.sampled`.
            stopped: of `batch.sampled`, those that a stop token ended before they had all their tokens.
            repeats: stands for so many rounds of commit and schedule that gave this batch each time; at most
                `batch.repeats`, and 1 with asynchronous scheduling (see `advance`).
        """
        self._in_flight.remove(batch)
        taken: list[int] = []
        if self.async_scheduling:
            if accepted is not None:
                raise ValueError("with async scheduling the next batch is formed for one new token each")
            finished = self._commit_ahead(batch)
        elif accepted is not None:
            finished = self._commit_accepted(batch, accepted)
        else:
            finished = batch.finishing(repeats)
            decodes, chunks = batch.decodes, batch.chunks
            if batch.dropped is not None:
                finished = [request for request in finished if not request.finished]
                decodes = [request for request in decodes if not request.finished]
                chunks = [entry for entry in chunks if not entry[0].finished]
            if self.max_in_flight > 1:
                for request in decodes:
                    request.num_in_flight_tokens -= 1
                for request, tokens in chunks:
                    request.num_in_flight_tokens -= tokens
            taken = self._progress(decodes, chunks, repeats, 0)
            if repeats > 1 and self.kv_cache.prefix_caching:
                self._register_repeats(decodes, chunks)
            for request, _ in chunks:
                if request.num_tokens - request.num_computed_tokens <= 1:
                    self._completed(request)
        if stopped:
            finished += [request for request in stopped if not request.finished and request not in finished]
        for request in finished:
            self._finish(request)
        return finished, taken

    def abort(self, request: Request) -> None:
        """Let go of a request wherever it is; what batches in flight make of it counts for nothing."""
        if request in self.running:
            self._finish(request)
        else:
            self.waiting.remove(request)
            request.finished = True

    def advance(self, batch: Batch, repeats: int) -> list[int]:
        """Do as `repeats` rounds of committing this batch and scheduling it again; it stays in flight.

        With asynchronous scheduling `batch` is the newest, the one before it in flight is of the same requests with as
        many tokens each, and a round commits the older and schedules a newer. Returns, for each KV block taken
        meanwhile, the round (1, 2, ...) that took it.
        """
        taken = self._progress(batch.decodes, batch.chunks, repeats, 1)
        if self.kv_cache.prefix_caching:
            self._register_repeats(batch.decodes, batch.chunks)
        batch.repeats = max(1, batch.repeats - repeats)
        batch.left -= repeats
        batch.shape = batch.shape.after(repeats)
        batch.kv_blocks = self.kv_cache.num_used
        if self.async_scheduling:
            self._stop_last(batch)
        return taken

    def rounds(self, spare: int = 0) -> int:
        """How many times every running request may run, its run in flight included, before the blocks may run out.

        `spare` of the free blocks, at most as many as there are, are not to be taken.

        `Batch.repeats` has regard to it; a driver with several batches in flight asks again when it plans ahead, for
        the batches formed later may have taken blocks.
        """
        free, growing = self.kv_cache.num_free - spare, len(self.running)
        if free >= growing:
            return free // growing * self.kv_cache.block_size
        # runs until each takes a block
        if self.async_scheduling:
            left = sorted([r.allocated_tokens - r.start for r in self.running])
        else:
            left = sorted([r.allocated_tokens - r.num_computed_tokens for r in self.running])
        return max(1, min(left[free], left[0] + self.kv_cache.block_size))

    # -- the verbs of a policy -------------------------------------------------------------------------------------

    def take_decodes(self) -> list[Request]:
        """Give every running request that is free to run and lacks one token, with a KV slot for it.

        When the blocks run out a request is preempted, by default the latest in line: it gives up its blocks and goes
        back to the queue, to be recomputed.
        """
        if self._full:
            full = sorted(self._full, key=_by_order) if len(self._full) > 1 else list(self._full)
            if len(full) <= self.kv_cache.num_free and not self.async_scheduling:
                self.kv_cache.grow_each(full)
                full.clear()
            for request in full:
                start = request.num_computed_tokens + request.num_in_flight_tokens
                if start == request.allocated_tokens > 0 and not self.kv_cache.grow(request):
                    self.make_room(request, start + 1)  # it holds blocks: it was not preempted and has not stopped
            self._full.clear()
        if self._in_flight and not self.async_scheduling:
            return [request for request in self.decoding if not request.num_in_flight_tokens]
        return self.decoding.copy()

    def unfinished_prefills(self) -> list[Request]:
        """Admitted requests, free to run, whose prompt (or recompute) is not finished; earliest in line first."""
        if self.async_scheduling or not self._in_flight:
            return self.prefilling.copy()
        return [request for request in self.prefilling if not request.num_in_flight_tokens]

    def admit(
        self,
        request: Request,
        tokens: int | None = None,
        prefix: Sequence[int] | None = None,
        reserve: int = 0,
        spare: int | None = None,
    ) -> bool:
        """Move `request` from the queue to the running requests; False, and nothing done, if that can't be.

        It gets KV blocks for `tokens` tokens (None: for all that are known, and for what the policy reserves), those
        of its cached prefix (None: looked up) among them. There must be a seat, and blocks for `reserve` tokens of it,
        and `spare` blocks must remain free (None: the watermark's).
        """
        if not self._free_rows or request.num_pending_tokens:  # its newest token is not known yet
            return False
        if tokens is None:
            tokens = max(self.policy.reserved_tokens(request), request.num_tokens)
        kv_cache = self.kv_cache
        if prefix is None:
            prefix = kv_cache.match(request) if kv_cache.prefix_caching else ()
        spare = kv_cache.watermark_blocks if spare is None else spare
        if reserve > tokens:
            spare += kv_cache.blocks_for(reserve) - kv_cache.blocks_for(tokens)
        if not kv_cache.allocate(request, tokens, prefix, spare):
            return False
        if self.policy.by_admission:
            request.order = self._next_order
            self._next_order += 1
        if self.waiting[0] is request:
            self.waiting.popleft()
        else:
            self.waiting.remove(request)
        if prefix or kv_cache.prefix_caching:
            request.num_computed_tokens = hits = len(prefix) * kv_cache.block_size
            self.prefix_query_tokens += request.num_tokens
            self.prefix_hit_tokens += hits
            self._hits += hits
            if request.preemptions:
                self.resumed_query_tokens += request.num_tokens
                self.resumed_hit_tokens += hits
            else:
                request.prefix_hit_tokens = hits
        request.row = self._free_rows.pop()
        insort(self.running, request, key=_by_order)
        insort(self.prefilling, request, key=_by_order)
        return True

    def make_room(self, request: Request, tokens: int) -> bool:
        """Give a running request KV blocks for `tokens` tokens, preempting as need be; False if it was preempted."""
        while not self.kv_cache.allocate(request, tokens):
            if self.async_scheduling:  # what is in flight is computed before its blocks are written again
                victim = self.policy.victim(self.running)
            else:
                victim = self.policy.victim([r for r in self.running if not r.num_in_flight_tokens])
            self.preempt(victim)
            if victim is request:
                return False
        return True

    def preempt(self, victim: Request) -> None:
        """Take a running request's blocks away and put it back in line, to be recomputed."""
        lost = victim.start
        if victim.num_cached_blocks * self.kv_cache.block_size > lost:  # planned for this batch
            self.kv_cache.forget(victim, lost)
        if self.kv_cache.prefix_caching and victim.block_hashes is None:
            self._hash_blocks(victim, Content.of(own(victim.id)))
            hashes = victim.block_hashes or ()
            self.kv_cache.register_blocks(zip(victim.blocks[: victim.num_cached_blocks], hashes, strict=False))
        self._leave(victim)
        self.recomputed_tokens += lost
        self.preempted.append(victim)
        victim.num_computed_tokens = 0
        victim.preemptions += 1
        self.policy.requeue(self.waiting, victim)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _hash_blocks(self, request: Request, content: Content) -> None:
        request.block_hashes = content.block_hashes(request.max_total_tokens, self.kv_cache.block_size)

    def _decode(self, request: Request) -> None:
        """A running request now lacks one token."""
        insort(self.decoding, request, key=_by_order)
        start = request.start
        self._kv_tokens += start
        self._left = min(self._left, _output_left(request))
        if start == request.allocated_tokens:
            self._full[request] = None

    def _stop_decoding(self, request: Request) -> None:
        """A running request lacks no token any more, or does not run any more."""
        place = bisect_left(self.decoding, request.order, key=_by_order)
        if place < len(self.decoding) and self.decoding[place] is request:
            del self.decoding[place]
            self._kv_tokens -= request.start if self.async_scheduling else request.num_computed_tokens
            self._left = 0
            self._full.pop(request, None)

    def _leave(self, request: Request) -> None:
        """A request runs no more: its seat and its blocks are free."""
        self.running.remove(request)
        if request in self.prefilling:
            self.prefilling.remove(request)
        else:
            self._stop_decoding(request)
        assert request.row is not None
        self._free_rows.append(request.row)
        request.row = None
        self.kv_cache.release(request)
        if request.num_in_flight_tokens or self.max_in_flight == 1:
            request.num_in_flight_tokens = 0
            for batch in self._in_flight:
                batch.dropped = {request} if batch.dropped is None else batch.dropped | {request}

    def _finish(self, request: Request) -> None:
        """A request is done with, wherever it is."""
        request.finished = True
        if request.row is not None:
            self._leave(request)
        else:
            self.waiting.remove(request)

    def _progress(self, decodes: Sequence[Request], chunks: Sequence[Entry], repeats: int, ahead: int) -> list[int]:
        """Count `repeats` runs as computed, with KV blocks for `ahead` more; gives the rounds that took a block."""
        taken: list[int] = []
        if decodes:
            self._kv_tokens += repeats * len(decodes)
            self._left = max(0, self._left - repeats)
        some = repeats + ahead > 1  # one run, already allocated for, takes no block
        offset = 1 if self.async_scheduling else 0  # of the two runs in flight, the older is counted
        ahead += offset
        growing: list[Request] = []
        for request in decodes:
            request.num_computed_tokens = after = request.num_computed_tokens + repeats
            request.num_tokens = after + 1  # a decode lacks one
            if after + ahead >= request.allocated_tokens:
                growing.append(request)
        if growing:
            if some:
                taken = self.kv_cache.grow_since(growing, ahead, repeats - offset)
            ahead = offset + offset  # with the two in flight
            for request in growing:
                if request.num_computed_tokens + ahead == request.allocated_tokens:
                    self._full[request] = None
        for request, tokens in chunks:
            request.num_computed_tokens += repeats * tokens
        return taken

    def _cache_matters(self) -> bool:
        """Whether what running requests put in the prefix cache may change the batches before one of them ends."""
        if self.num_stages > 1:  # batches in flight fill blocks in turn, each has to be found from then on
            return any(request.block_hashes is not None for request in self.running)
        if not self.waiting or not self._free_rows:
            return False
        first = self.waiting[0]  # it waits for KV blocks, of which it may share more soon
        hashes = first.block_hashes
        if not hashes:
            return False
        found = len(self.kv_cache.match(first))
        if found >= len(hashes):
            return False
        coming = hashes[found]
        others = [r.block_hashes for r in self.running if r.block_hashes is not None]
        return any(len(known) > found and known[found] == coming for known in others)

    def _register_repeats(self, decodes: Sequence[Request], chunks: Sequence[Entry]) -> None:
        """Let others find the KV blocks that repeats, just counted, have filled: in the order of the runs."""
        filled: list[tuple[int, int, int, int]] = []  # run, place in the batch, block, hash
        block_size = self.kv_cache.block_size
        for place, request in enumerate(decodes):
            last = request.num_computed_tokens + request.num_in_flight_tokens
            end = (request.num_cached_blocks + 1) * block_size
            if end <= last:
                _fill(filled, place, request, end, min(last, request.num_tokens), 1, block_size)
        for place, (request, tokens) in enumerate(chunks, len(decodes)):
            end = (request.num_cached_blocks + 1) * block_size
            _fill(filled, place, request, end, min(request.start, request.num_tokens), tokens, block_size)
        if len(filled) > 1:
            filled.sort()
        self.kv_cache.register_blocks([(block, block_hash) for _, _, block, block_hash in filled])

    def _completed(self, request: Request) -> None:
        """A chunk of `request` left no more than one token, which is computed like a decode; it is counted."""
        request.num_tokens += 1 - (request.num_tokens - request.num_computed_tokens)
        if request in self.prefilling:
            self.prefilling.remove(request)
        else:  # a decode that was planned among the chunks
            self._stop_decoding(request)
            self._kv_tokens += 1  # which is computed by now
        self._decode(request)

    def _count_ahead(self, batch: Batch) -> None:
        """The next batch will be formed before this one's tokens are known: count them."""
        self._kv_tokens += len(batch.decodes)
        self._left = max(0, self._left - 1)
        for request in batch.decodes:
            request.num_pending_tokens += 1
            if request.num_computed_tokens + request.num_in_flight_tokens == request.allocated_tokens:
                self._full[request] = None
        self._stop_last(batch)
        for request in batch.completing:
            request.num_pending_tokens += 1
        for request, tokens in batch.chunks:
            if request.remaining <= 1:
                if request in self.prefilling:
                    self.prefilling.remove(request)
                else:  # a decode that was planned among the chunks
                    self._kv_tokens += tokens
                    self._stop_decoding(request)
                if request.remaining:
                    self._decode(request)

    def _stop_last(self, batch: Batch) -> None:
        """Decodes whose last token is on the way lack none."""
        if batch.left == 1:
            for request in batch.decodes:
                if not request.remaining:
                    self._stop_decoding(request)

    def _commit_ahead(self, batch: Batch) -> list[Request]:
        """Count a batch as computed whose tokens were counted when it was formed; gives the finished requests."""
        for request, tokens in batch.entries:
            if batch.dropped is None or request not in batch.dropped:
                request.num_in_flight_tokens -= tokens
                request.num_computed_tokens += tokens
        finished = []
        for request in batch.sampled:
            if request.finished:
                continue
            request.num_pending_tokens -= 1
            request.num_tokens += 1
            if request.num_tokens == request.max_total_tokens:
                finished.append(request)
            if self.kv_cache.prefix_caching and request.row is not None:
                self.kv_cache.register(request, request.start - request.num_pending_tokens)
        return finished

    def _commit_accepted(self, batch: Batch, accepted: Sequence[int]) -> list[Request]:
        """Count a batch as computed with so many new tokens for each entry; gives the finished requests."""
        finished = []
        sampled = set(batch.sampled)
        for (request, tokens), new in zip(batch.entries, accepted, strict=True):
            if (new > 0) != (request in sampled):
                raise ValueError(f"{new} new tokens for {tokens} computed of {request}")
            if batch.dropped is not None and request in batch.dropped:
                continue
            if self.max_in_flight > 1:
                request.num_in_flight_tokens -= tokens
            if request not in self.prefilling:
                self._stop_decoding(request)
            elif new:
                self.prefilling.remove(request)
            request.num_tokens += min(new, request.max_total_tokens - request.num_tokens)
            request.num_computed_tokens = min(request.num_computed_tokens + tokens, request.num_tokens - 1)
            if new:
                self._decode(request)
            elif request.num_tokens - request.num_computed_tokens == 1:
                self._completed(request)
            if request.num_tokens == request.max_total_tokens:
                finished.append(request)
        return finished

    def _repeats(self, plan: BatchPlan, most: int) -> int:
        """How often, at most `most` times, the batch may run before a prompt ends or the blocks may run out."""
        for request, tokens in plan.chunks:
            most = min(most, (request.num_tokens - request.start - 1) // tokens)
        return min(most, self.rounds()) if most > 1 else 1


def _output_left(request: Request) -> int:
    """Tokens that a request may still get beyond those that batches in flight will yield."""
    return request.max_total_tokens - request.num_tokens - request.num_pending_tokens


def _fill(
    filled: list[tuple[int, int, int, int]],
    place: int,
    request: Request,
    end: int,
    last: int,
    tokens: int,
    block_size: int,
) -> None:
    """Note the blocks of `request` that end at `end` or later and at `last` or before, and in which run they did."""
    blocks, hashes, k = request.blocks, request.block_hashes, request.num_cached_blocks
    if hashes is None:  # they are counted only
        request.num_cached_blocks = max(k, last // block_size)
        return
    while end <= last and k < len(hashes):
        filled.append((-((last - end) // tokens), place, blocks[k], hashes[k]))  # the last run is 0
        k += 1
        end += block_size
    request.num_cached_blocks = k
