"""The scheduler against a naive one written afresh from the definitions, conservation laws, and what it refuses."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import event, example, given
from hypothesis import strategies as st
from random_examples import random_examples

from engine.errors import InputError
from engine.scheduling.policies import POLICIES, BatchPlan, Sarathi, resolve
from engine.scheduling.request import Batch, Request
from engine.scheduling.scheduler import Scheduler
from engine.specs import SchedulerSpec

Step = tuple[list[int], list[tuple[int, int]]]  # who decodes, and who prefills how many tokens
Job = tuple[int, int, int]  # arrives before batch number ... completes, prompt tokens, output tokens
MAX_MODEL_LEN = 24


def stopped_by(batch: Batch) -> list[Request]:
    """The requests that this batch gives their last token: counted anew before it is committed."""
    stopped = [r for r in batch.decodes if r.num_tokens + 1 == r.max_total_tokens]
    chunks = [(r, r.num_computed_tokens + chunk) for r, chunk in batch.chunks]
    return stopped + [r for r, computed in chunks if computed == r.num_tokens == r.max_total_tokens - 1]


def make(policy: str, blocks: int, depth: int = 1, **limits: object) -> Scheduler:
    limits = {"max_model_len": MAX_MODEL_LEN, "block_size": 2, "watermark": 0.0, **limits}
    return Scheduler(resolve(SchedulerSpec(policy=policy, **limits), MAX_MODEL_LEN), blocks, depth)  # type: ignore[arg-type]


def blocks_for(length: int, block_size: int) -> int:
    """Blocks for `length` tokens, counted."""
    return len(range(0, length, block_size))


# -- a naive scheduler, from the definitions ---------------------------------------------------------------------------


class Naive:
    """Sarathi (OSDI 2024, algorithm 3) and vLLM 0.2 with recompute, by the book: plain lists, everything recounted.

    A request's id is its place in the order of arrival. KV blocks are counted, not named.
    """

    def __init__(self, policy: str, jobs: Sequence[Job], blocks: int, block_size: int, left_free: int, budget: int,
                 seqs: int, depth: int) -> None:  # fmt: skip
        self.policy, self.budget, self.seqs, self.depth = policy, budget, seqs, depth
        self.blocks, self.block_size, self.left_free = blocks, block_size, left_free
        self.prompt = [prompt for _, prompt, _ in jobs]
        self.output = [output for _, _, output in jobs]
        self.made = [0] * len(jobs)  # output tokens so far
        self.cached = [0] * len(jobs)  # tokens in the KV cache
        self.held = [0] * len(jobs)  # KV blocks
        self.waiting: list[int] = []
        self.running: list[int] = []
        self.flying: list[Step] = []
        self.thrown_away = 0
        self.finished = 0

    def arrive(self, who: int) -> None:
        self.waiting.append(who)

    def missing(self, who: int) -> int:
        return self.prompt[who] + self.made[who] - self.cached[who]

    def is_busy(self, who: int) -> bool:
        return any(who in decodes or who in dict(prefills) for decodes, prefills in self.flying)

    def free(self) -> int:
        return self.blocks - sum(self.held)

    def decode_all(self) -> list[int]:
        decodes = []
        for who in sorted(self.running):
            if who not in self.running or self.is_busy(who) or self.missing(who) != 1:
                continue
            while self.cached[who] + 1 > self.held[who] * self.block_size:
                if self.free() > 0:
                    self.held[who] += 1
                    continue
                victim = max(other for other in self.running if not self.is_busy(other))
                self.running.remove(victim)
                self.waiting.append(victim)
                self.thrown_away += self.cached[victim]
                self.cached[victim] = self.held[victim] = 0
                if victim == who:
                    break
            if who in self.running:
                decodes.append(who)
        return decodes

    def admit_first(self, room: int, whole: bool) -> tuple[int, int] | None:
        if not self.waiting or len(self.running) == self.seqs:
            return None
        who = min(self.waiting)
        tokens = self.prompt[who] + self.made[who]
        need = blocks_for(tokens, self.block_size)
        if room < (tokens if whole else 1) or self.free() - need < self.left_free:
            return None
        self.waiting.remove(who)
        self.running.append(who)
        self.held[who] = need
        return who, min(tokens, room)

    def form(self) -> Step | None:
        if len(self.flying) == self.depth:
            return None
        prefills: list[tuple[int, int]] = []
        if self.policy == "vllm_v0":
            while (new := self.admit_first(self.budget - sum(n for _, n in prefills), whole=True)) is not None:
                prefills.append(new)
            decodes = [] if prefills else self.decode_all()
        else:
            decodes = self.decode_all()
            room = self.budget - len(decodes)
            for who in sorted(self.running):
                if who not in decodes and not self.is_busy(who) and min(room, self.missing(who)) > 0:
                    prefills.append((who, min(room, self.missing(who))))
                    room -= prefills[-1][1]
            while (new := self.admit_first(room, whole=False)) is not None:
                prefills.append(new)
                room -= new[1]
        if not decodes and not prefills:
            return None
        self.flying.append((decodes, prefills))
        return decodes, prefills

    def complete(self) -> None:
        decodes, prefills = self.flying.pop(0)
        for who, tokens in [(who, 1) for who in decodes] + prefills:
            self.cached[who] += tokens
            if self.missing(who) == 0:
                self.made[who] += 1
            if self.made[who] == self.output[who]:
                self.running.remove(who)
                self.held[who] = 0
                self.finished += 1


def naive_run(naive: Naive, jobs: Sequence[Job]) -> list[Step]:
    """Batches take equal times on a pipeline: the oldest completes when no more can start."""
    steps: list[Step] = []
    completed, arrived = 0, 0
    while naive.finished < len(jobs):
        while arrived < len(jobs) and (jobs[arrived][0] <= completed or not (naive.running or naive.waiting)):
            naive.arrive(arrived)
            arrived += 1
        while (step := naive.form()) is not None:
            steps.append(step)
        naive.complete()
        completed += 1
    return steps


def real_run(scheduler: Scheduler, jobs: Sequence[Job]) -> list[Step]:
    """The same on the real one."""
    requests = [Request(i, 0.0, prompt, output) for i, (_, prompt, output) in enumerate(jobs)]
    steps: list[Step] = []
    flying: list[Batch] = []
    completed = arrived = finished = 0
    while finished < len(jobs):
        while arrived < len(jobs) and (jobs[arrived][0] <= completed or not (scheduler.running or scheduler.waiting)):
            scheduler.add(requests[arrived])
            arrived += 1
        while (batch := scheduler.schedule()) is not None:
            flying.append(batch)
            steps.append(([r.id for r in batch.decodes], [(r.id, chunk) for r, chunk in batch.chunks]))
        batch = flying.pop(0)
        stopped = stopped_by(batch)
        assert scheduler.commit(batch)[0] == stopped
        completed += 1
        finished += len(stopped)
    return steps


@st.composite
def workloads(draw: st.DrawFn, longest: int = MAX_MODEL_LEN) -> list[Job]:
    jobs, when = [], 0
    for _ in range(draw(st.integers(1, 9))):
        when += draw(st.sampled_from([0, 0, 0, 1, 3, 8]))
        prompt = draw(st.integers(1, longest - 1))
        jobs.append((when, prompt, draw(st.integers(1, longest - prompt))))
    return jobs


def assert_as_by_the_book(policy, jobs, depth, seqs, budget, block_size, spare, quarters) -> None:  # type: ignore[no-untyped-def]
    budget = max(budget, seqs) if policy == "sarathi" else MAX_MODEL_LEN + budget
    blocks = blocks_for(MAX_MODEL_LEN, block_size) * 4 // (4 - quarters) + 1 + spare
    left_free = blocks * quarters // 4
    scheduler = make(
        policy, blocks, depth, max_num_seqs=seqs, max_num_batched_tokens=budget, block_size=block_size,
        watermark=quarters / 4,
    )  # fmt: skip
    naive = Naive(policy, jobs, blocks, block_size, left_free, budget, seqs, depth)
    expected = naive_run(naive, jobs)
    assert expected
    assert real_run(scheduler, jobs) == expected
    assert scheduler.recomputed_tokens == naive.thrown_away


by_the_book = given(
    policy=st.sampled_from(["sarathi", "vllm_v0"]),
    jobs=workloads(),
    depth=st.integers(2, 3),
    seqs=st.integers(1, 6),
    budget=st.integers(1, 16),
    block_size=st.sampled_from([1, 2, 4]),
    spare=st.integers(0, 12),
    quarters=st.sampled_from([0, 0, 1, 2]),
)


@random_examples(500)
@by_the_book
def test_sarathi_and_vllm_form_the_batches_of_a_naive_scheduler(  # type: ignore[no-untyped-def]
    policy, jobs, depth, seqs, budget, block_size, spare, quarters
) -> None:
    assert_as_by_the_book(policy, jobs, 1, seqs, budget, block_size, spare, quarters)


@random_examples(250)
@by_the_book
def test_so_they_do_in_a_pipeline(  # type: ignore[no-untyped-def]
    policy, jobs, depth, seqs, budget, block_size, spare, quarters
) -> None:
    assert_as_by_the_book(policy, jobs, depth, seqs, budget, block_size, spare, quarters)


@pytest.mark.parametrize("policy", ["sarathi", "vllm_v0"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_heavy_preemption_is_as_a_naive_scheduler_does_it(policy: str, depth: int) -> None:
    """Six long answers in a cache for two: a fixed workload where requests are thrown out again and again."""
    jobs = [(0, 2 + i % 3, 20 - i) for i in range(6)]
    scheduler = make(policy, 13, depth, max_num_seqs=6, max_num_batched_tokens=24)
    naive = Naive(policy, jobs, 13, 2, 0, 24, 6, depth)
    assert real_run(scheduler, jobs) == naive_run(naive, jobs)
    assert scheduler.recomputed_tokens == naive.thrown_away > 20


def test_preempted_requests_return_in_order_of_arrival() -> None:
    """Two batches in flight: request 2 is thrown out while request 1 waits already, and must queue behind it."""
    scheduler = make("sarathi", 24, depth=2, block_size=1, max_num_seqs=4, max_num_batched_tokens=4)
    requests = [Request(i, 0.0, 4, 12) for i in range(3)]
    for request in requests:
        scheduler.add(request)
    flying: list[Batch] = []
    finished = 0
    while finished < len(requests):
        while (batch := scheduler.schedule()) is not None:
            flying.append(batch)
        queue = [r.id for r in scheduler.waiting]
        assert queue == sorted(queue)
        stopped = stopped_by(flying[0])
        assert scheduler.commit(flying.pop(0))[0] == stopped
        finished += len(stopped)
    assert requests[1].preemptions and requests[2].preemptions


# -- conservation ------------------------------------------------------------------------------------------------------


@random_examples(600)
@given(
    policy=st.sampled_from(sorted(POLICIES)),
    jobs=workloads(),
    depth=st.integers(1, 3),
    seqs=st.integers(1, 6),
    budget=st.integers(6, 16),
    block_size=st.sampled_from([1, 2, 4]),
    spare=st.integers(0, 30),
    watermark=st.sampled_from([0.0, 0.0, 0.1, 0.3]),
    window=st.sampled_from([None, 5]),
)
def test_every_token_is_computed_once_and_every_limit_holds(  # type: ignore[no-untyped-def]
    policy, jobs, depth, seqs, budget, block_size, spare, watermark, window
) -> None:
    budget = budget if policy in ("sarathi", "chunked_only") else MAX_MODEL_LEN + budget
    blocks = int(blocks_for(MAX_MODEL_LEN, block_size) / (1 - watermark)) + 1 + spare
    scheduler = make(
        policy, blocks, depth, max_num_seqs=seqs, max_num_batched_tokens=budget, block_size=block_size,
        watermark=watermark,
    )  # fmt: skip
    scheduler.sliding_window = window
    requests = [Request(i, 0.0, prompt, output) for i, (_, prompt, output) in enumerate(jobs)]
    cached = [0] * len(jobs)  # tokens of each request in the cache, by what the batches said
    seen_preemptions = [0] * len(jobs)
    computed = lost = 0
    first_seen: list[int] = []
    flying: list[Batch] = []
    in_flight: set[int] = set()
    arrived = completed = finished = 0

    def schedule() -> Batch | None:
        nonlocal lost
        batch = scheduler.schedule()
        for request in requests:  # who was preempted for it (perhaps in vain)
            if request.preemptions > seen_preemptions[request.id]:
                assert request.preemptions == seen_preemptions[request.id] + 1
                assert request.id not in in_flight
                seen_preemptions[request.id] += 1
                lost += cached[request.id]
                cached[request.id] = 0
        return batch

    def account(batch: Batch) -> None:
        members = [r.id for r in batch.decodes] + [r.id for r, _ in batch.chunks]
        assert len(set(members)) == len(members) > 0
        assert not in_flight & set(members)
        in_flight.update(members)
        for request in batch.decodes:
            assert request.num_tokens - cached[request.id] == 1
        attended = [min(cached[r.id] + 1, window or MAX_MODEL_LEN) for r in batch.decodes]
        assert batch.shape.decode_kv_tokens == sum(attended)
        assert batch.shape.num_decodes == len(batch.decodes)
        assert all(batch.left <= r.max_total_tokens - r.num_tokens for r in batch.decodes)
        assert batch.shape.prefills == tuple((chunk, cached[r.id]) for r, chunk in batch.chunks)
        assert all(0 < chunk <= r.num_tokens - cached[r.id] for r, chunk in batch.chunks)
        assert batch.shape.num_tokens == len(batch.decodes) + sum(chunk for _, chunk in batch.chunks)
        complete = [r for r, chunk in batch.chunks if cached[r.id] + chunk == r.num_tokens]
        assert batch.shape.num_sampled == len(batch.decodes) + len(complete)
        for request, new in batch.entries:
            assert len(request.blocks) * block_size >= cached[request.id] + new
            if request.id not in first_seen:
                first_seen.append(request.id)
        assert batch.kv_blocks == sum(len(r.blocks) for r in requests)
        if policy in ("sarathi", "chunked_only"):
            assert batch.shape.num_tokens <= budget
        if policy == "vllm_v0":
            assert not (batch.decodes and batch.chunks)
            assert batch.shape.num_tokens <= budget
        if policy == "hybrid_only" and len(batch.chunks) > 1:
            assert batch.shape.num_tokens <= budget
        if policy == "chunked_only":
            assert not (batch.decodes and batch.chunks)

    while finished < len(jobs):
        while arrived < len(jobs) and (jobs[arrived][0] <= completed or not (scheduler.running or scheduler.waiting)):
            scheduler.add(requests[arrived])
            arrived += 1
        while (batch := schedule()) is not None:
            flying.append(batch)
            account(batch)
            assert len(flying) <= depth
        assert len(scheduler.running) <= seqs
        scheduler.kv_cache.check_integrity(requests)
        assert flying, "nothing runs although requests are left"
        batch = flying.pop(0)
        stopped = stopped_by(batch)
        for request, tokens in batch.entries:
            cached[request.id] += tokens
            computed += tokens
            in_flight.remove(request.id)
        assert scheduler.commit(batch)[0] == stopped
        assert [r.num_computed_tokens for r in requests] == cached
        completed += 1
        finished += len(stopped)
        assert completed < 50 * MAX_MODEL_LEN * len(jobs), "a request starves"
    assert first_seen == list(range(len(jobs)))
    assert all(r.num_output_tokens == r.output_tokens for r in requests)
    assert lost == scheduler.recomputed_tokens
    assert computed == sum(r.max_total_tokens - 1 for r in requests) + lost
    assert scheduler.kv_cache.num_used == 0
    assert scheduler.schedule() is None
    assert not (scheduler.running or scheduler.waiting or scheduler.prefilling or scheduler.decoding)


@random_examples(500)
@given(
    policy=st.sampled_from(sorted(POLICIES)),
    jobs=workloads(),
    seqs=st.integers(1, 6),
    budget=st.integers(6, 9),
    block_size=st.sampled_from([1, 2, 4]),
    spare=st.integers(0, 30),
    window=st.sampled_from([None, 5]),
)
@example(  # a decode takes the last free blocks while a long prompt, which has its own, is computed
    policy="sarathi", jobs=[(0, 1, 9), (0, 23, 1)], seqs=2, budget=6, block_size=1, spare=1, window=None
)
def test_a_batch_comes_again_as_often_as_it_says(  # type: ignore[no-untyped-def]
    policy, jobs, seqs, budget, block_size, spare, window
) -> None:
    """`Batch.repeats` against a copy that is stepped one batch at a time: the same requests, the shape foretold."""
    budget = budget if policy in ("sarathi", "chunked_only") else MAX_MODEL_LEN + budget
    scheduler = make(
        policy, blocks_for(MAX_MODEL_LEN, block_size) + 1 + spare, max_num_seqs=seqs, max_num_batched_tokens=budget,
        block_size=block_size,
    )  # fmt: skip
    scheduler.sliding_window = window
    for i, (_, prompt, output) in enumerate(jobs):
        scheduler.add(Request(i, 0.0, prompt, output))
    while (batch := scheduler.schedule()) is not None:
        last = batch
        if batch.decodes:
            assert batch.left == min(r.max_total_tokens - r.num_tokens for r in batch.decodes)
        if batch.repeats > 1:
            stepped, again = deepcopy((scheduler, batch))
            members = [[r.id for r in batch.decodes], [(r.id, chunk) for r, chunk in batch.chunks]]
            for i in range(1, batch.repeats):
                assert not stopped_by(again)
                assert not stepped.commit(again)[0]
                following = stepped.schedule()
                assert following is not None
                again = following
                assert [[r.id for r in again.decodes], [(r.id, chunk) for r, chunk in again.chunks]] == members
                assert again.shape[:5] == batch.shape.after(i)[:5]
                if i < batch.repeats - 1:  # how the last repeat would grow is never asked
                    assert again.shape.decode_kv_growth == batch.shape.decode_kv_growth
            last = again
            stopped = [scheduler_request(scheduler, r.id) for r in stopped_by(last)]
        else:
            stopped = stopped_by(last)
        finished, taken = scheduler.commit(batch, repeats=batch.repeats)
        assert finished == stopped
        assert all(1 <= round < batch.repeats for round in taken)
        if batch.repeats > 1:
            stepped.commit(last)
            assert state(scheduler) == state(stepped)
    assert not scheduler.running and not scheduler.waiting


def scheduler_request(scheduler: Scheduler, who: int) -> Request:
    return next(r for r in scheduler.running if r.id == who)


def state(scheduler: Scheduler) -> list[object]:
    """All that later batches depend on."""
    requests = [
        (r.id, r.num_computed_tokens, r.num_tokens, r.allocated_tokens, len(r.blocks)) for r in scheduler.running
    ]
    queues = [[r.id for r in queue] for queue in (scheduler.prefilling, scheduler.decoding, scheduler.waiting)]
    return [requests, queues, scheduler.kv_cache.num_used, scheduler.in_flight, scheduler._kv_tokens]


# -- several new tokens at once ----------------------------------------------------------------------------------------


class Speculating(Sarathi):
    """Sarathi whose decodes compute up to three drafted tokens beside the known one, with KV slots for all."""

    num_draft_tokens = 3

    def plan(self, scheduler: Scheduler) -> BatchPlan:
        entries = []
        for request in scheduler.take_decodes():
            tokens = min(1 + self.num_draft_tokens, request.max_total_tokens - request.start)
            if request.blocks and scheduler.make_room(request, request.start + tokens):
                entries.append((request, tokens))
        entries = [(request, tokens) for request, tokens in entries if request.blocks]  # the others were preempted
        return BatchPlan(chunks=[*entries, *self.take_chunks(scheduler, sum(tokens for _, tokens in entries))])


@random_examples(200)
@given(
    jobs=workloads(),
    depth=st.integers(1, 2),
    block_size=st.sampled_from([1, 2, 4]),
    spare=st.integers(4, 20),
    data=st.data(),
)
def test_speculative_tokens_are_accepted_one_by_one(  # type: ignore[no-untyped-def]
    jobs, depth, block_size, spare, data
) -> None:
    scheduler = make(
        "sarathi", blocks_for(MAX_MODEL_LEN, block_size) + spare, depth, max_num_seqs=6,
        max_num_batched_tokens=40, block_size=block_size,
    )  # fmt: skip
    scheduler.policy = Speculating(scheduler.spec)
    requests = [Request(i, 0.0, prompt, output) for i, (_, prompt, output) in enumerate(jobs)]
    for request in requests:
        scheduler.add(request)
    flying: list[Batch] = []
    several = 0
    while scheduler.running or scheduler.waiting:
        while (batch := scheduler.schedule()) is not None:
            flying.append(batch)
        batch = flying.pop(0)
        known = {request: request.num_tokens for request, _ in batch.entries}
        cached = {request: request.num_computed_tokens for request, _ in batch.entries}
        accepted = []
        for request, tokens in batch.entries:
            drafted = cached[request] + tokens - known[request]
            most = min(drafted + 1, request.max_total_tokens - known[request])
            accepted.append(data.draw(st.integers(1, most)) if drafted >= 0 else 0)
        finished = scheduler.commit(batch, accepted)[0]
        for (request, tokens), new in zip(batch.entries, accepted, strict=True):
            several += new > 1
            assert request.num_tokens == known[request] + new
            assert request.num_computed_tokens == min(cached[request] + tokens, request.num_tokens - 1)
            assert (request in finished) == (request.num_tokens == request.max_total_tokens) == request.finished
        scheduler.kv_cache.check_integrity(requests)
    assert all(request.num_output_tokens == request.output_tokens for request in requests)
    assert scheduler.kv_cache.num_used == 0 and scheduler._kv_tokens == 0
    event("several tokens at once" if several else "one token each")


def test_tokens_that_can_not_be_are_refused() -> None:
    scheduler = make("sarathi", 20, max_num_seqs=2, max_num_batched_tokens=4)
    scheduler.add(Request(0, 0.0, 6, 3))
    batch = scheduler.schedule()
    assert batch is not None
    with pytest.raises(ValueError, match="1 new tokens for 4 computed of Request"):
        scheduler.commit(batch, [1])  # its prompt is not finished


# -- what can never run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_request_over_max_model_len_is_refused(policy: str) -> None:
    scheduler = make(policy, 100, max_num_seqs=4)
    with pytest.raises(InputError, match=r"request 7 has 20 prompt \+ 5 output.* --max-model-len 24: raise it or drop"):
        scheduler.add(Request(7, 0.0, 20, 5))
    assert not scheduler.waiting
    scheduler.add(Request(8, 0.0, 20, 4))  # exactly 24
    assert scheduler.schedule() is not None


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_request_that_no_empty_cache_holds_is_refused(policy: str) -> None:
    scheduler = make(policy, 13, watermark=0.2, max_num_seqs=4)  # 2 of 13 blocks stay free: 22 tokens
    needs = MAX_MODEL_LEN if policy in ("orca", "request_level") else 23
    with pytest.raises(InputError, match=rf"for {needs} tokens but .* 22 \(11 blocks of 2\): lower --max-model-len"):
        scheduler.add(Request(0, 0.0, 3, 21))  # its last token is never computed
    assert not scheduler.waiting
    if policy not in ("orca", "request_level"):
        scheduler.add(Request(1, 0.0, 3, 20))
        assert scheduler.schedule() is not None


@pytest.mark.parametrize("policy", ["orca", "request_level"])
def test_a_policy_that_reserves_the_longest_length_refuses_even_short_requests(policy: str) -> None:
    with pytest.raises(InputError, match=r"request 0 needs KV cache for 24 tokens but there is room for 22"):
        make(policy, 11, max_num_seqs=4).add(Request(0, 0.0, 1, 1))
    make(policy, 12, max_num_seqs=4).add(Request(0, 0.0, 1, 1))


def test_vllm_refuses_what_can_not_be_recomputed_whole() -> None:
    scheduler = make("vllm_v0", 100, max_num_seqs=4, max_num_batched_tokens=14)
    with pytest.raises(InputError, match=r"request 3 \(10 prompt \+ 6 output.*tokens 14: raise it to 15 or more"):
        scheduler.add(Request(3, 0.0, 10, 6))
    assert not scheduler.waiting
    scheduler.add(Request(4, 0.0, 10, 5))  # at most 14 tokens are ever computed at once


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize(("prompt", "output"), [(0, 3), (3, 0), (-1, 3)])
def test_a_request_without_prompt_or_output_is_refused(policy: str, prompt: int, output: int) -> None:
    scheduler = make(policy, 100, max_num_seqs=4)
    with pytest.raises(InputError, match=rf"{prompt} prompt \+ {output} output"):
        scheduler.add(Request(0, 0.0, prompt, output))


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (
            lambda scheduler: BatchPlan([], [(r, r.remaining) for r in scheduler.waiting]),
            "does not run: admit it first",
        ),
        (lambda scheduler: None, "return a BatchPlan"),
    ],
)
def test_a_plan_that_can_not_be_is_told(plan: Any, said: str) -> None:
    scheduler = make("sarathi", 40)
    scheduler.add(Request(0, 0.0, 8, 2))
    scheduler.policy.plan = plan  # type: ignore[method-assign]
    with pytest.raises(InputError, match=f"the policy sarathi planned .*{said}"):
        scheduler.schedule()


def test_what_a_preempted_request_will_not_compute_is_found_by_nobody() -> None:
    """A batch's entry is planned and shared; then a more urgent request takes its blocks."""
    spec = SchedulerSpec(policy="sarathi", max_num_batched_tokens=64, max_num_seqs=4, max_model_len=64, block_size=4,
                         enable_prefix_caching=True)  # fmt: skip
    scheduler = Scheduler(resolve(spec, 64), 20)
    request = Request(0, 0.0, 16, 4)
    scheduler.add(request)
    assert scheduler.admit(request)
    scheduler.kv_cache.register(request, 16)
    scheduler.preempt(request)
    assert scheduler.kv_cache.match(request) == []
    scheduler.kv_cache.check_integrity([])
