"""Routers: which replica a request goes to. One function or small class a router, and one line in ROUTERS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count

import numpy as np

from engine.scheduling.request import Request
from simulator.replica import Replica

Router = Callable[[Request, Sequence[Replica]], Replica]


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


ROUTERS: dict[str, Callable[[np.random.Generator], Router]] = {
    "round_robin": round_robin,
    "random": random,
    "least_outstanding_requests": least_outstanding_requests,
    "least_outstanding_tokens": least_outstanding_tokens,
}
