"""KV blocks: none is ever lost or held twice, a request that does not fit takes none, and what is found is right."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from random_examples import random_examples

from engine.scheduling.kv_cache import KVCache
from engine.scheduling.request import Request


def requests(count: int) -> list[Request]:
    return [Request(i, 0.0, 1, 1) for i in range(count)]


operations = st.lists(
    st.tuples(st.integers(0, 4), st.one_of(st.just("release"), st.integers(1, 60))), min_size=1, max_size=60
)


@random_examples(200)
@given(num_blocks=st.integers(1, 24), block_size=st.sampled_from([1, 3, 4, 16]), steps=operations)
def test_blocks_are_conserved_and_nothing_is_taken_on_failure(
    num_blocks: int, block_size: int, steps: list[tuple[int, int | str]]
) -> None:
    cache = KVCache(num_blocks, block_size)
    holders = requests(5)
    held = [0] * 5  # blocks that each should hold, counted naively
    for who, what in steps:
        request, before = holders[who], list(holders[who].blocks)
        if what == "release":
            cache.release(request)
            held[who] = 0
        else:
            wanted = 0
            while wanted * block_size < int(what):
                wanted += 1
            extra = max(0, wanted - held[who])
            fits = extra <= num_blocks - sum(held)
            assert cache.allocate(request, int(what)) is fits
            held[who] += extra if fits else 0
            assert request.blocks[: len(before)] == before  # what is in the cache stays where it is
        assert [len(r.blocks) for r in holders] == held
        assert [r.allocated_tokens for r in holders] == [blocks * block_size for blocks in held]
        assert cache.num_used == sum(held)
        cache.check_integrity(holders)


@random_examples(200)
@given(
    num_blocks=st.integers(1, 50),
    block_size=st.sampled_from([1, 4, 16]),
    quarters=st.integers(0, 3),
    used_tokens=st.integers(0, 800),
    new_tokens=st.integers(1, 800),
)
def test_admission_leaves_the_watermark_free(
    num_blocks: int, block_size: int, quarters: int, used_tokens: int, new_tokens: int
) -> None:
    cache = KVCache(num_blocks, block_size, quarters / 4)
    old, new = requests(2)
    cache.allocate(old, used_tokens)
    left = cache.num_free - cache.blocks_for(new_tokens)
    assert cache.allocate(new, new_tokens, spare=cache.watermark_blocks) == (left >= num_blocks * quarters // 4)
    assert cache.num_free == (num_blocks - len(old.blocks) - len(new.blocks))
    cache.check_integrity([old, new])


def test_watermark_by_hand() -> None:
    cache = KVCache(num_blocks=10, block_size=4, watermark=0.25)  # 2 whole blocks stay free
    old, new = requests(2)
    assert not cache.allocate(new, 33, spare=cache.watermark_blocks)  # 9 blocks
    assert cache.allocate(old, 32, spare=cache.watermark_blocks)  # 8 blocks
    assert not cache.allocate(new, 1, spare=cache.watermark_blocks)
    assert cache.allocate(old, 40)  # running requests may use what admission leaves
    assert not cache.allocate(new, 1)


def test_blocks_go_round_in_a_fixed_order() -> None:
    """The same run must hand out the same ids: they are part of a measured run's memory layout."""
    cache = KVCache(num_blocks=6, block_size=2)
    first, second = requests(2)
    cache.allocate(first, 5)
    cache.allocate(second, 2)
    assert (first.blocks, second.blocks) == ([0, 1, 2], [3])
    cache.release(first)
    cache.allocate(second, 5)
    assert second.blocks == [3, 0, 1]


def test_integrity_check_sees_a_lost_block_and_one_held_twice() -> None:
    cache = KVCache(num_blocks=4, block_size=2)
    first, second = requests(2)
    cache.allocate(first, 4)
    cache.allocate(second, 2)
    cache.check_integrity([first, second])
    with pytest.raises(AssertionError, match="lost, or both"):
        cache.check_integrity([first])
    second.blocks.append(first.blocks[0])
    with pytest.raises(AssertionError, match="held twice"):
        cache.check_integrity([first, second])


# -- prefix caching ----------------------------------------------------------------------------------------------------


def chained(tokens: list[int], block_size: int) -> list[int]:
    """A hash for each full block, of all tokens up to its end."""
    return [hash(tuple(tokens[:end])) for end in range(block_size, len(tokens) + 1, block_size)]


class PrefixCaching(RuleBasedStateMachine):
    """Requests of few distinct tokens come, grow and go; each block's content is kept beside it and compared."""

    @initialize(num_blocks=st.integers(1, 12), block_size=st.sampled_from([1, 2, 4]), unhashed_first=st.booleans())
    def begin(self, num_blocks: int, block_size: int, unhashed_first: bool) -> None:
        self.cache = KVCache(num_blocks, block_size, prefix_caching=True, reuse_unhashed_first=unhashed_first)
        self.size = block_size
        self.holders: dict[int, tuple[Request, list[int]]] = {}
        self.content: dict[int, tuple[int, ...]] = {}  # of each block: its tokens and all before, as computed last
        self.released: list[int] = []  # blocks in the order in which they were let go
        self.next_id = 0

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=24))
    def admit(self, tokens: list[int]) -> None:
        request = Request(self.next_id, 0.0, len(tokens), 8, chained(tokens, self.size))
        self.next_id += 1
        found = self.cache.match(request)
        assert len(found) * self.size < len(tokens)  # the last token is always computed
        for place, block in enumerate(found):  # what is found holds just these tokens
            assert self.content[block] == tuple(tokens[: (place + 1) * self.size])
        longest = self.longest_known(tokens)
        assert len(found) == longest
        held = {block for other, _ in self.holders.values() for block in other.blocks}
        free = self.cache.num_blocks - len(held)
        need = self.cache.blocks_for(len(tokens)) - len(found) + len(set(found) - held)
        assert self.cache.allocate(request, len(tokens), found) is (need <= free)
        if need <= free:
            assert request.blocks[: len(found)] == found
            self.holders[request.id] = (request, tokens)
            self.compute(request, tokens)

    def longest_known(self, tokens: list[int]) -> int:
        """Blocks of the beginning that are registered somewhere, counted from the contents."""
        known = {self.content[block] for block in self.registered()}
        count = 0
        while (count + 1) * self.size < len(tokens) and tuple(tokens[: (count + 1) * self.size]) in known:
            count += 1
        return count

    def registered(self) -> set[int]:
        return {block for block in self.content if len(self.content[block]) % self.size == 0}

    def compute(self, request: Request, tokens: list[int]) -> None:
        """The request's blocks hold its tokens now; a block that was taken has lost what it held."""
        for place, block in enumerate(request.blocks):
            self.content[block] = tuple(tokens[: (place + 1) * self.size])
            if len(tokens) < (place + 1) * self.size:  # a part of a block is found by nobody
                del self.content[block]
        self.cache.register(request, len(tokens))

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), token=st.integers(0, 1))
    def grow(self, data: st.DataObject, token: int) -> None:
        request, tokens = self.holders[data.draw(st.sampled_from(sorted(self.holders)))]
        held = {block for other, _ in self.holders.values() for block in other.blocks}
        full = len(tokens) == request.allocated_tokens
        if full:
            assert self.cache.grow(request) is (len(held) < self.cache.num_blocks)
            if len(held) == self.cache.num_blocks:
                return
            self.content.pop(request.blocks[-1], None)
        tokens.append(token)
        request.num_tokens = len(tokens)
        request.block_hashes = chained(tokens, self.size)
        self.compute(request, tokens)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        request, _ = self.holders.pop(data.draw(st.sampled_from(sorted(self.holders))))
        self.cache.release(request)
        assert request.blocks == [] and request.allocated_tokens == 0

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "cache"):
            self.cache.check_integrity([request for request, _ in self.holders.values()])


PrefixCaching.TestCase.settings = random_examples(100, stateful_step_count=40)
test_prefix_caching = PrefixCaching.TestCase


def asking(tokens: list[int], block_size: int = 2) -> Request:
    return Request(0, 0.0, len(tokens), 4, chained(tokens, block_size))


def admitted(cache: KVCache, tokens: list[int]) -> Request:
    request = asking(tokens, cache.block_size)
    assert cache.allocate(request, len(tokens), cache.match(request))
    cache.register(request, len(tokens))
    return request


def test_a_shared_block_is_freed_by_its_last_holder() -> None:
    cache = KVCache(6, 2, prefix_caching=True)
    first, second = admitted(cache, [1, 1, 2, 2, 3]), admitted(cache, [1, 1, 2, 2, 4])
    assert first.blocks[:2] == second.blocks[:2] and cache.num_used == 4
    cache.release(first)
    assert cache.num_used == 3
    cache.release(second)
    assert cache.num_used == 0
    assert len(cache.match(asking([1, 1, 2, 2, 9]))) == 2  # found again while nobody holds it


def test_a_fully_cached_prompt_is_computed_from_its_last_block_on() -> None:
    cache = KVCache(6, 2, prefix_caching=True)
    admitted(cache, [1, 1, 2, 2])
    assert len(cache.match(asking([1, 1, 2, 2]))) == 1
    assert len(cache.match(asking([1, 1, 2, 2, 5]))) == 2


def test_the_tail_of_the_least_recently_released_goes_first() -> None:
    cache = KVCache(4, 2, prefix_caching=True)
    old, new = admitted(cache, [1, 1, 2, 2]), admitted(cache, [3, 3, 4, 4])
    cache.release(old)
    cache.release(new)
    admitted(cache, [7, 7])
    assert cache.evictions == 1
    assert len(cache.match(asking([1, 1, 2, 2, 0]))) == 1  # its head is still there
    assert len(cache.match(asking([3, 3, 4, 4, 0]))) == 2


def test_blocks_without_a_hash_wait_in_line_or_go_first() -> None:
    for first, kept in ((False, 0), (True, 1)):
        cache = KVCache(2, 2, prefix_caching=True, reuse_unhashed_first=first)
        whole, part = admitted(cache, [1, 1]), admitted(cache, [3])
        cache.release(whole)
        cache.release(part)
        admitted(cache, [9])
        assert len(cache.match(asking([1, 1, 0]))) == kept
