"""KV-cache blocks of one replica: who holds which, and how many are free (PagedAttention's block table, no tensors)."""

from collections.abc import Iterable

from engine.request import Request


class BlockManager:
    """Hands out `num_blocks` blocks of `block_size` tokens each.

    `watermark` is the fraction of the blocks that admission leaves free, so that the requests already running can
    grow for a while before one of them has to be preempted.
    """

    def __init__(self, num_blocks: int, block_size: int, watermark: float = 0.0) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.watermark_blocks = int(watermark * num_blocks)
        self.free = list(range(num_blocks - 1, -1, -1))  # a stack: the lowest ids go first

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self.free)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def can_admit(self, tokens: int) -> bool:
        """Whether a new request of `tokens` tokens fits with the watermark left free."""
        return len(self.free) - self.blocks_for(tokens) >= self.watermark_blocks

    def allocate(self, request: Request, tokens: int) -> bool:
        """Give `request` blocks until it can hold `tokens` tokens; False, and nothing taken, if too few are free."""
        need = self.blocks_for(tokens) - len(request.blocks)
        if need <= 0:
            return True
        free = self.free
        if need > len(free):
            return False
        request.blocks.extend(free[: -need - 1 : -1])
        del free[-need:]
        request.capacity = len(request.blocks) * self.block_size
        return True

    def grow(self, request: Request) -> bool:
        """Give `request` one more block; False if none is free."""
        if not self.free:
            return False
        request.blocks.append(self.free.pop())
        request.capacity += self.block_size
        return True

    def release(self, request: Request) -> None:
        """Take back every block of `request`."""
        self.free.extend(reversed(request.blocks))
        request.blocks.clear()
        request.capacity = 0

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Assert that each block is either free or held by exactly one of `requests`, which must be all holders."""
        held = [block for request in requests for block in request.blocks]
        assert sorted(held + self.free) == list(range(self.num_blocks)), "a KV block is lost or held twice"
