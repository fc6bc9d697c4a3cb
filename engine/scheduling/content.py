"""What the tokens of a request are, as far as it matters which requests begin alike: for prefix caching.

A request's tokens are pieces of *streams*, one after the other; a stream stands for its tokens and for all that comes
before them. So two requests agree up to a token exactly when it belongs to the same stream in both. A shared system
prompt is a stream, a conversation another, and each of a trace's hash ids is one of 512 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

MOST_BLOCKS = 1 << 24  # KV blocks of a request; a stream's number times this, plus the block's place, is its hash


@dataclass(frozen=True)
class Content:
    """`streams`, and the token at which each of them ends (not in it): rising, the last one unbounded."""

    streams: tuple[int, ...]
    ends: tuple[float, ...]

    @classmethod
    def of(cls, *pieces: tuple[int, float]) -> Content:
        """Make a content of (stream, end) pieces; those without a token are left out."""
        kept, start = [], 0.0
        for stream, end in pieces:
            if end > start:
                kept.append((stream, end))
                start = end
        return cls(tuple(stream for stream, _ in kept), tuple(end for _, end in kept))

    def block_hashes(self, tokens: int, block_size: int) -> list[int]:
        """Return a hash for each full block of the first `tokens` tokens, the same where all up to its end is."""
        hashes: list[int] = []
        blocks = tokens // block_size
        for stream, end in zip(self.streams, self.ends, strict=True):
            first, last = len(hashes), blocks if end >= tokens else int(end) // block_size
            hashes += range(stream * MOST_BLOCKS + first, stream * MOST_BLOCKS + last)
            if last == blocks:
                break
        return hashes

    def pieces(self, tokens: int) -> list[tuple[int, int, int]]:
        """Return (stream, start, end) of each piece of the first `tokens` tokens."""
        found, start = [], 0
        for stream, end in zip(self.streams, self.ends, strict=True):
            if start < tokens:
                found.append((stream, start, int(min(end, tokens))))
                start = int(min(end, tokens))
        return found


def own(request_id: int) -> tuple[int, float]:
    """The piece of a stream that no other request has, to the end."""
    return -1 - request_id, inf
