"""What serves live requests: the driver in a thread of its own, and the channels on which its tokens come back.

    engine = LiveEngine(driver)
    engine.start(asyncio.get_running_loop())
    channel = Channel()
    engine.submit(sequence, channel, 0)
    for event in await channel.take(): ...

The server knows a `Backend` and nothing of what is behind it: this one over an engine, or the simulator's, which lives
in the server's own loop and takes the time that a predictor says.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from engine.runtime.driver import Driver
from engine.runtime.executor import WorkerError
from engine.runtime.sequences import Sequence as TokenSequence
from engine.scheduling.request import Request

POLL_S = 1e-3  # between two looks for new requests, while a batch may still join those in flight


class Event(NamedTuple):
    """A token of one of a channel's sequences; or its end without one, if the engine failed."""

    place: int  # of the sequence in its channel
    token: int
    time: float  # s on the backend's clock
    finish_reason: str | None
    error: str | None = None


class Channel:
    """The tokens of the sequences of one HTTP request, in the order they came; lives in the server's loop."""

    __slots__ = ("_events", "_waiter")

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, event: Event) -> None:
        self._events.append(event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[Event]:
        """Wait for news, and return all there is."""
        if not self._events:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        events, self._events = self._events, []
        return events


@dataclass(frozen=True)
class Gauges:
    """How a replica stands, and what it has counted since the start."""

    running: int
    waiting: int
    kv_usage: float  # share of its KV blocks
    prefix_queries: int  # tokens
    prefix_hits: int  # tokens
    block_size: int
    num_blocks: int

    @classmethod
    def of(cls, driver: Driver, more_waiting: int = 0) -> Gauges:
        scheduler = driver.scheduler
        cache = scheduler.kv_cache
        return cls(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + more_waiting,
            kv_usage=cache.num_used / cache.num_blocks,
            prefix_queries=scheduler.prefix_query_tokens,
            prefix_hits=scheduler.prefix_hit_tokens,
            block_size=cache.block_size,
            num_blocks=driver.executor.num_blocks,
        )


class Backend(Protocol):
    """Replicas that serve, as the server sees them; called in the server's loop."""

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to serve."""

    def now(self) -> float:
        """Seconds since the start, on the replicas' clock."""

    def check(self, request: Request) -> None:
        """Raise InputError for a request that could never run."""

    def submit(self, sequence: TokenSequence, channel: Channel, place: int, arrived: float) -> None:
        """Take in a sequence that `arrived` just now (time.perf_counter); its tokens go to `channel` under `place`."""

    def abort(self, id: int) -> None:
        """Let go of a sequence whose client went away, by its request's id."""

    def stop(self, id: int, tokens: int) -> None:
        """End a sequence whose text is complete after so many tokens, by its request's id."""

    def gauges(self) -> Sequence[Gauges]:
        """How each replica stands."""

    @property
    def error(self) -> str | None:
        """What it failed of; None while it serves."""


class Channels:
    """Which channel each sequence's tokens go to; lives in the server's loop."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[Channel, int]] = {}  # by request id

    def __len__(self) -> int:
        return len(self._of)

    def add(self, id: int, channel: Channel, place: int) -> None:
        self._of[id] = channel, place

    def remove(self, id: int) -> None:
        self._of.pop(id, None)

    def deliver(self, id: int, token: int, time: float, finish_reason: str | None) -> None:
        """Give a token to whoever waits for it; nobody may, any more."""
        found = self._of.get(id) if finish_reason is None else self._of.pop(id, None)
        if found is not None:
            found[0].put(Event(found[1], token, time, finish_reason))

    def fail(self, error: str) -> None:
        """End every sequence with an error."""
        for channel, place in self._of.values():
            channel.put(Event(place, 0, 0.0, "error", error))
        self._of.clear()


class LiveEngine:
    """A Backend over one driver, which runs in a thread: it waits for its workers, and the server for nobody.

    Args:
        driver: of a real executor; its callbacks become this one's.
        on_failure: called in the server's loop when a worker has failed.
    """

    def __init__(self, driver: Driver, on_failure: Callable[[], None] | None = None) -> None:
        self.driver = driver
        self.on_failure = on_failure
        self.error: str | None = None
        driver.on_token = self._on_token
        self._channels = Channels()
        self._commands: deque[TokenSequence | tuple[int, int | None]] = deque()  # a new one; else id, tokens that count
        self._wake = threading.Event()
        self._closing = False
        self._news: list[tuple[int, int, float, str | None]] = []
        self._thread = threading.Thread(target=self._run, name="driver", daemon=True)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.driver.start()
        self._thread.start()

    def close(self) -> None:
        """Stop the thread, with whatever is unfinished let go."""
        self._closing = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    # -- in the server's loop --------------------------------------------------------------------------------------

    def now(self) -> float:
        return self.driver.time()

    def check(self, request: Request) -> None:
        self.driver.scheduler.check(request)

    def submit(self, sequence: TokenSequence, channel: Channel, place: int, arrived: float) -> None:
        sequence.request.arrived_at = arrived - self.driver.origin
        self._channels.add(sequence.request.id, channel, place)
        if self.error is not None:
            self._channels.fail(self.error)
            return
        self._command(sequence)

    def abort(self, id: int) -> None:
        self._channels.remove(id)
        self._command((id, None))

    def stop(self, id: int, tokens: int) -> None:
        self._channels.remove(id)
        self._command((id, tokens))

    def gauges(self) -> Sequence[Gauges]:
        return [Gauges.of(self.driver, len(self._commands))]

    def _command(self, what: TokenSequence | tuple[int, int | None]) -> None:
        self._commands.append(what)
        self._wake.set()

    def _deliver(self, news: list[tuple[int, int, float, str | None]]) -> None:
        for each in news:
            self._channels.deliver(*each)

    def _failed(self, error: str) -> None:
        self._channels.fail(error)
        if self.on_failure is not None:
            self.on_failure()

    # -- in the driver's thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        driver = self.driver
        try:
            while not self._closing:
                self._wake.clear()
                self._obey()
                done = driver.step(until=driver.time() + POLL_S)
                if self._news:
                    self._loop.call_soon_threadsafe(self._deliver, self._news)
                    self._news = []
                if not done and not driver.in_flight:
                    self._wake.wait()
            for id in list(driver.steps.sequences):
                driver.abort(id)
        except Exception as error:
            self.error = str(error) if isinstance(error, WorkerError) else f"{type(error).__name__}: {error}"
            self._loop.call_soon_threadsafe(self._failed, self.error)
            if not isinstance(error, WorkerError):
                raise

    def _obey(self) -> None:
        """Do what came in meanwhile; a sequence that comes to an idle engine begins when it came."""
        while self._commands:
            what = self._commands.popleft()
            if isinstance(what, TokenSequence):
                self.driver.submit(what, max(self.driver.now, what.request.arrived_at))
                continue
            id, tokens = what
            if tokens is None:
                self.driver.abort(id)
            else:
                self.driver.stop(id, tokens)

    def _on_token(self, sequence: TokenSequence, token: int) -> None:
        request = sequence.request
        self._news.append((request.id, token, request.token_times[-1], sequence.finish_reason))
