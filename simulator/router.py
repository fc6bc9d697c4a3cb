"""Routers: which replica a request goes to. One function or small class a router, and one line in ROUTERS.

A router knows what a gateway in front of the replicas can know: what it has sent where, what has been answered, and the
load that replicas report. `prefix_aware` and `session_affinity` keep an index of their own of what they have sent, as
gateways do, which is why they may be wrong about what a replica has evicted since.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import count

import numpy as np

from engine.scheduling.request import Request
from simulator.replica import Replica

Router = Callable[[Request, Sequence[Replica]], Replica]

MOST_LOAD = 1.25  # times the mean of outstanding requests: a replica with more gets none for its cache's sake
FEW = 4  # outstanding requests more than the least, which are never too many
MOST_SESSIONS = 1 << 18  # that are remembered, the latest


def round_robin(rng: np.random.Generator) -> Router:
    """Each in turn."""
    turn = count()
    return lambda request, replicas: replicas[next(turn) % len(replicas)]


def random(rng: np.random.Generator) -> Router:
    """Any, with equal chances."""
    return lambda request, replicas: replicas[int(rng.integers(len(replicas)))]


def least_outstanding_requests(rng: np.random.Generator) -> Router:
    """The replica with the fewest requests waiting or running; the first of them."""
    return lambda request, replicas: min(replicas, key=lambda replica: replica.outstanding_requests)


def least_outstanding_tokens(rng: np.random.Generator) -> Router:
    """The replica with the fewest tokens left to compute or generate (it is told the output lengths)."""
    return lambda request, replicas: min(replicas, key=lambda replica: replica.outstanding_tokens)


def kv_aware(rng: np.random.Generator) -> Router:
    """The replica with the least of its KV cache in use or waited for by prompts; the first of them."""
    return lambda request, replicas: min(replicas, key=lambda replica: replica.kv_load)


class PrefixAware:
    """The replica that was sent the longest part of the prompt before, unless that has too many requests already.

    Too many are over MOST_LOAD times its share (bounded loads: Mirrokni et al. 2018), and over FEW more than the least.
    It remembers as many blocks of each replica as that has, the latest used. Among equals the replica with the
    fewest outstanding requests.
    """

    reads_prompts = True

    def __init__(self, rng: np.random.Generator) -> None:
        self._known: dict[int, OrderedDict[int, None]] = {}  # blocks by the replica's place, the latest used last

    def __call__(self, request: Request, replicas: Sequence[Replica]) -> Replica:
        """Choose a replica, and remember what it has then."""
        block_size = replicas[0].scheduler.spec.block_size
        blocks = blocks_of(request, block_size, request.max_total_tokens)
        askable = blocks[: (request.prompt_tokens - 1) // block_size]
        outstanding = [replica.outstanding_requests for replica in replicas]
        most = MOST_LOAD * (sum(outstanding) + 1) / len(replicas)

        def hit(place: int) -> int:
            known: Mapping[int, None] = self._known.get(place, {})
            return next((number for number, block in enumerate(askable) if block not in known), len(askable))

        most = max(most, min(outstanding) + FEW)
        open_to_it = [place for place, load in enumerate(outstanding) if load + 1 <= most]
        chosen = max(open_to_it, key=lambda place: (hit(place), -outstanding[place]))
        known = self._known.setdefault(chosen, OrderedDict())
        for block in reversed(blocks):  # the first block of a prompt is forgotten last
            known[block] = None
            known.move_to_end(block)
        while len(known) > replicas[chosen].scheduler.kv_cache.num_blocks:
            known.popitem(last=False)
        return replicas[chosen]


class SessionAffinity:
    """The replica of the turn that the prompt continues; for what continues none, the fewest outstanding requests."""

    reads_prompts = True

    def __init__(self, rng: np.random.Generator) -> None:
        self._at: OrderedDict[int, int] = OrderedDict()  # the replica's place, by the last block of a prompt

    def __call__(self, request: Request, replicas: Sequence[Replica]) -> Replica:
        """Choose a replica, and remember the session."""
        blocks = blocks_of(request, replicas[0].scheduler.spec.block_size, request.prompt_tokens)
        before = next((block for block in reversed(blocks) if block in self._at), None)
        if before is not None:
            place = self._at.pop(before)
        else:
            place = min(range(len(replicas)), key=lambda i: replicas[i].outstanding_requests)
        if blocks:
            self._at[blocks[-1]] = place
            if len(self._at) > MOST_SESSIONS:
                self._at.popitem(last=False)
        return replicas[place]


def blocks_of(request: Request, block_size: int, tokens: int) -> Sequence[int]:
    """Return the hashes of the full blocks of the first `tokens` tokens; none where nothing is known of them."""
    if request.block_hashes is not None:
        return request.block_hashes[: tokens // block_size]
    return [] if request.content is None else request.content.block_hashes(tokens, block_size)


ROUTERS: dict[str, Callable[[np.random.Generator], Router]] = {
    "round_robin": round_robin,
    "random": random,
    "least_outstanding_requests": least_outstanding_requests,
    "least_outstanding_tokens": least_outstanding_tokens,
    "kv_aware": kv_aware,
    "prefix_aware": PrefixAware,
    "session_affinity": SessionAffinity,
}
