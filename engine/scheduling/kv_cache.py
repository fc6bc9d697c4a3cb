"""KV-cache blocks of one replica: who holds which, how many are free, and which hold a prefix that others can use.

PagedAttention's block table, no tensors. With prefix caching a full block is known by the hash of its tokens and all
before it, blocks are counted by their holders, and a block that nobody holds keeps its content until it is taken for
another, the least recently released first (vLLM V1's rules, v1/core/block_pool.py). Without it no hash is looked at.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Sequence

from engine.scheduling.request import Request

_NOBODYS = object()  # stands for the hash of a block whose content can't be found any more, though it has one


class KVCache:
    """Hands out `num_blocks` blocks of `block_size` tokens each.

    Args:
        watermark: fraction of the blocks that admission leaves free, so that the requests already running can grow for
            a while before one of them has to be preempted.
        prefix_caching: keep the content of released blocks, to be found again by `match`.
        null_blocks: blocks beyond `num_blocks` that the watermark counts although nobody ever holds them.
        reuse_unhashed_first: released blocks without a hash are taken before all others (vLLM from 0.3x on), else they
            wait in line like those that have one.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        watermark: float = 0.0,
        prefix_caching: bool = False,
        reuse_unhashed_first: bool = False,
        null_blocks: int = 0,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.watermark_blocks = int(watermark * (num_blocks + null_blocks))
        self.prefix_caching = prefix_caching
        self.reuse_unhashed_first = reuse_unhashed_first
        self.evictions = 0  # blocks that lost a content that could have been found again
        self.num_free = num_blocks
        # without prefix caching a stack, the lowest ids first; with it a line, the next to be taken first, and before
        # them the blocks that were never taken, from `_fresh` on, and before these what is to be reused first (a stack)
        self._stack = list(range(num_blocks - 1, -1, -1)) if not prefix_caching else []
        self._line: OrderedDict[int, None] = OrderedDict()
        self._fresh = 0
        self._holders = [0] * num_blocks if prefix_caching else []
        self._hash_of: list[object] = [None] * num_blocks if prefix_caching else []
        self._with_hash: dict[
            object, int | dict[int, None]
        ] = {}  # the block of a content, or all, first registered first

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    # -- taking and giving back ------------------------------------------------------------------------------------

    def allocate(self, request: Request, tokens: int, prefix: Sequence[int] = (), spare: int = 0) -> bool:
        """Give `request` blocks until it can hold `tokens` tokens; False, and nothing taken, if too few are free.

        `prefix` is what `match` found for a request that holds no block: it comes first. `spare` blocks have to remain
        free.
        """
        held = len(request.blocks) + len(prefix)
        need = max(0, -(-tokens // self.block_size) - held)
        idle = sum([not self._holders[block] for block in prefix]) if prefix else 0  # these leave the line as well
        if need + idle + spare > self.num_free:
            return False
        if prefix:
            for block in prefix:
                if not self._holders[block]:
                    del self._line[block]
                self._holders[block] += 1
            request.blocks.extend(prefix)
            request.num_cached_blocks = len(prefix)
            self.num_free -= idle
            request.allocated_tokens = len(request.blocks) * self.block_size
        return not need or self.grow(request, need)

    def grow(self, request: Request, count: int = 1) -> bool:
        """Give `request` `count` more blocks; False, and nothing taken, if fewer are free."""
        if count > self.num_free:
            return False
        self.num_free -= count
        if self.prefix_caching:
            request.blocks.extend([self._pop() for _ in range(count)])
        elif count == 1:  # as it mostly is
            request.blocks.append(self._stack.pop())
        else:
            request.blocks.extend(self._stack[: -count - 1 : -1])
            del self._stack[-count:]
        request.allocated_tokens += count * self.block_size
        return True

    def grow_each(self, growing: Collection[Request]) -> None:
        """Give each request one more block; enough have to be free."""
        block_size, pop = self.block_size, self._pop if self.prefix_caching else self._stack.pop
        for request in growing:
            request.blocks.append(pop())
            request.allocated_tokens += block_size
        self.num_free -= len(growing)

    def grow_since(self, growing: Iterable[Request], ahead: int, since: int) -> list[int]:
        """Give each request blocks for `ahead` tokens beyond those that are computed; enough have to be free.

        Returns, for each block given, how many tokens after the computed ones less `since` it begins.
        """
        block_size, pop = self.block_size, self._pop if self.prefix_caching else self._stack.pop
        taken: list[int] = []
        for request in growing:
            first = request.allocated_tokens - request.num_computed_tokens
            while first < ahead:
                request.blocks.append(pop())
                request.allocated_tokens += block_size
                taken.append(first + since)
                first += block_size
        self.num_free -= len(taken)
        return taken

    def release(self, request: Request) -> None:
        """Take back every block of `request`, its last one first."""
        if not self.prefix_caching:
            self._stack.extend(reversed(request.blocks))
            self.num_free += len(request.blocks)
        else:
            holders, line, hash_of, unhashed_first = self._holders, self._line, self._hash_of, self.reuse_unhashed_first
            before, stack = len(line) + len(self._stack), self._stack
            hashed = request.num_cached_blocks if request.block_hashes is None else 0
            for block in reversed(request.blocks[hashed:]):
                holders[block] = left = holders[block] - 1
                if not left:
                    if unhashed_first and hash_of[block] is None:
                        stack.append(block)
                    else:
                        line[block] = None
            for block in request.blocks[hashed - 1 :: -1] if hashed else ():  # nobody else has or will look for these
                holders[block] = 0
                hash_of[block] = _NOBODYS
                line[block] = None
            self.num_free += len(line) + len(stack) - before
        request.blocks.clear()
        request.allocated_tokens = 0
        request.num_cached_blocks = 0

    # -- prefixes --------------------------------------------------------------------------------------------------

    def match(self, request: Request) -> list[int]:
        """The blocks that hold the beginning of `request`'s known tokens, but for the last token, if any do."""
        hashes = request.block_hashes
        if not self.prefix_caching or not hashes:
            return []
        found = []
        for block_hash in hashes[: (request.num_tokens - 1) // self.block_size]:
            blocks = self._with_hash.get(block_hash)
            if blocks is None:
                break
            found.append(blocks if isinstance(blocks, int) else next(iter(blocks)))
        return found

    def register(self, request: Request, tokens: int) -> None:
        """Let others find the full blocks of the first `tokens` tokens of `request`, which it has computed or will."""
        hashes = request.block_hashes
        if hashes is None:  # they are counted only
            request.num_cached_blocks = max(request.num_cached_blocks, tokens // self.block_size)
            return
        first, last = request.num_cached_blocks, min(tokens // self.block_size, len(hashes))
        if first >= last:
            return
        request.num_cached_blocks = last
        self.register_blocks(zip(request.blocks[first:last], hashes[first:last], strict=True))

    def register_blocks(self, blocks: Iterable[tuple[int, int]]) -> None:
        """Let others find blocks, each with the hash of its content; of equal ones the first is found."""
        hash_of, with_hash = self._hash_of, self._with_hash
        for block, block_hash in blocks:
            hash_of[block] = block_hash
            others = with_hash.setdefault(block_hash, block)
            if others != block:  # found before: that one comes first
                if isinstance(others, int):
                    with_hash[block_hash] = {others: None, block: None}
                else:
                    others[block] = None

    def register_decodes(self, requests: Iterable[Request]) -> None:
        """Let others find the blocks that the next token of each of `requests` fills."""
        block_size = self.block_size
        for request in requests:
            tokens = request.num_computed_tokens + request.num_in_flight_tokens + 1
            if tokens >= (request.num_cached_blocks + 1) * block_size:
                self.register(request, min(tokens, request.num_tokens))

    def forget(self, request: Request, tokens: int) -> None:
        """Let nobody find the blocks of `request` past its first `tokens` tokens: they will not be computed."""
        first = tokens // self.block_size
        for block in request.blocks[first : request.num_cached_blocks]:
            self._unregister(block)
        request.num_cached_blocks = min(request.num_cached_blocks, first)

    def _unregister(self, block: int) -> None:
        block_hash = self._hash_of[block]
        self._hash_of[block] = None
        if not isinstance(block_hash, int):
            return
        others = self._with_hash[block_hash]
        if isinstance(others, int):
            del self._with_hash[block_hash]
        else:
            del others[block]
            if not others:
                del self._with_hash[block_hash]

    def _pop(self) -> int:
        """Take the block at the head of the line, without the content it had."""
        if self._stack:
            block = self._stack.pop()
        elif self._fresh < self.num_blocks:
            block = self._fresh
            self._fresh += 1
        else:
            block = self._line.popitem(False)[0]
        self._holders[block] = 1
        block_hash = self._hash_of[block]
        if block_hash is not None:
            self.evictions += 1
            if block_hash is not _NOBODYS:
                if self._with_hash[block_hash].__class__ is not int:  # others have the same content
                    self._unregister(block)
                    return block
                del self._with_hash[block_hash]
            self._hash_of[block] = None
        return block

    # -- for tests and debugging -----------------------------------------------------------------------------------

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Assert that each block is either free or held, by as many of `requests` (all holders) as it is counted."""
        requests = list(requests)
        held = Counter(block for request in requests for block in request.blocks)
        free = [*self._stack, *self._line, *(range(self._fresh, self.num_blocks) if self.prefix_caching else ())]
        assert len(free) == self.num_free, "the count of free KV blocks is wrong"
        assert sorted([*held, *free]) == list(range(self.num_blocks)), "a KV block is lost, or both held and free"
        assert all(len(set(request.blocks)) == len(request.blocks) for request in requests), "a request holds one twice"
        if not self.prefix_caching:
            assert all(count == 1 for count in held.values()), "a KV block is held twice"
            return
        assert all(self._holders[block] == held[block] for block in range(self.num_blocks)), "holders are miscounted"
        registered = {
            block: key
            for key, blocks in self._with_hash.items()
            for block in ([blocks] if isinstance(blocks, int) else blocks)
        }
        known = {block: key for block, key in enumerate(self._hash_of) if isinstance(key, int)}
        assert registered == known, "a KV block is found by another hash than its own"
