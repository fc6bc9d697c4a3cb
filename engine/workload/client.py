"""When requests are sent: each at its time, but no more than so many at once, and a turn after the one before.

The engine's driver and the simulator ask the same three things: when the next one is sent (`next_at`), which it is
(`pop`), and they say when one is finished (`finished`), which may let another go.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import count
from math import inf

from engine.errors import InputError
from engine.scheduling.request import Request
from engine.specs.checks import MOST_SECONDS


@dataclass(frozen=True, kw_only=True)
class ClientSpec:
    """How a load generator sends requests.

    `max_concurrency` requests are in the system at once, at most (None: no bound; vLLM's bench has the same flag): the
    next one is sent when one has ended, `overhead_s` after it. A turn of a conversation that is being thought about is
    not in the system: others are sent meanwhile. `users` in its place are so many people, each with one conversation
    at a time, who keep their place while they think. The first of either start evenly over `ramp_up_s`.
    """

    max_concurrency: int | None = None
    users: int | None = None
    ramp_up_s: float = 0.0
    overhead_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("max_concurrency", "users"):
            given = getattr(self, name)
            if given is not None and (isinstance(given, bool) or not 1 <= given <= 1 << 24):
                raise InputError(f"{name} {given}: give 1 or more, or leave it out for no bound")
        if self.max_concurrency is not None and self.users is not None:
            raise InputError(f"max_concurrency {self.max_concurrency} and users {self.users} both bound the load: "
                             "leave one out")  # fmt: skip
        for name in ("ramp_up_s", "overhead_s"):
            if not 0 <= getattr(self, name) <= MOST_SECONDS:
                raise InputError(f"{name} {getattr(self, name)}: give 0 or more")
            if getattr(self, name) and self.seats is None:
                raise InputError(f"{name} {getattr(self, name)} needs max_concurrency or users")

    @property
    def seats(self) -> int | None:
        """How many requests, or users, there are at once at most; None: no bound."""
        return self.max_concurrency if self.users is None else self.users


@dataclass(frozen=True)
class Turn:
    """A request that is sent `think_s` seconds after another has ended, and not before its `arrived_at`."""

    request: Request
    after: int  # the other's id
    think_s: float


class Client:
    """Sends requests; a `Turn` among them waits for the one before. `arrived_at` becomes when a request is sent.

    Args:
        requests: in order of arrival; the turns that follow one another stand right after the first of them.
    """

    def __init__(self, requests: Iterable[Request | Turn], spec: ClientSpec | None = None) -> None:
        self.spec = spec or ClientSpec()
        self._coming: Iterator[Request | Turn] = iter(requests)
        self._turns: dict[int, Turn] = {}  # by the id of the request that they follow
        self._ready: list[tuple[float, int, Request]] = []  # turns whose time is known
        self._number = count()
        self._seats: list[float] | None = None  # when each free one is free
        if self.spec.seats is not None:
            every = self.spec.ramp_up_s / self.spec.seats
            self._seats = [every * place for place in range(self.spec.seats)]
            heapify(self._seats)
        self._keeps_seats = self.spec.users is not None  # from a conversation's first turn to its last
        self._next: Request | None = None
        self._advance()

    @property
    def next_at(self) -> float:
        """When the next request is sent; infinity if that hangs on one that has not ended, or none is left."""
        fresh = inf if self._next is None else self._next.arrived_at
        turn = self._ready[0][0] if self._ready else inf
        if self._keeps_seats:
            return min(self._seated(fresh), turn)
        return self._seated(min(fresh, turn))

    def pop(self) -> Request:
        """Take the next request, which is sent at `next_at`."""
        at = self.next_at
        fresh = inf if self._next is None else self._next.arrived_at
        is_turn = bool(self._ready) and self._ready[0][0] < (self._seated(fresh) if self._keeps_seats else fresh)
        if is_turn:
            _, _, request = heappop(self._ready)
        else:
            assert self._next is not None, "nothing is left to send"
            request = self._next
            self._advance()
        if self._seats is not None and not (is_turn and self._keeps_seats):
            heappop(self._seats)
        request.arrived_at = at
        return request

    def finished(self, request: Request, time: float) -> None:
        """A request has ended at `time`."""
        turn = self._turns.pop(request.id, None)
        kept = self._keeps_seats and turn is not None
        if self._seats is not None and not kept:
            heappush(self._seats, time + self.spec.overhead_s)
        if kept:
            time += self.spec.overhead_s
        if turn is not None:
            at = max(time + turn.think_s, turn.request.arrived_at)
            heappush(self._ready, (at, next(self._number), turn.request))

    def _seated(self, at: float) -> float:
        """When what is due `at` finds a seat; infinity if none is free."""
        if self._seats is None:
            return at
        return max(at, self._seats[0]) if self._seats else inf

    def _advance(self) -> None:
        """Find the next request that hangs on no other."""
        for request in self._coming:
            if isinstance(request, Request):
                self._next = request
                return
            self._turns[request.after] = request
        self._next = None
