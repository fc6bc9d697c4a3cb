"""A simulated cluster that serves live requests: each replica the engine's driver, its steps as long as a predictor
says, in real time.

    cluster = LiveCluster([deploy("mistralai/Mistral-7B-v0.1", "a100")] * 4, recorder, router="round_robin")
    cluster.start(asyncio.get_running_loop())

A `Backend` of the server (`engine.server.live`). Everything happens at simulated times, which follow the clock
`time_scale` times as fast; what reaches a client late, for the machine is busy, makes no later event late. So the run
is what `simulate` gives for the same arrivals.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush
from operator import itemgetter
from time import perf_counter
from typing import Any

import numpy as np

from engine.errors import InputError, unknown
from engine.results.recorder import Recorder
from engine.runtime.driver import Driver, VirtualClock
from engine.runtime.sequences import Sequence as TokenSequence
from engine.scheduling.request import Request
from engine.scheduling.scheduler import Scheduler
from engine.server.live import Channel, Channels, Gauges
from simulator.alarm import Alarm
from simulator.cluster import Deployment, FrontEnd
from simulator.predicted_executor import PredictedExecutor
from simulator.replica import kv_share
from simulator.router import ROUTERS

_LATER = itemgetter(0)


class LiveCluster:
    """Replicas behind a router, in the server's loop.

    Args:
        recorder: of the whole cluster, in simulated seconds.
        token: what every generated token is.
        time_scale: simulated seconds in a real one.
        on_failure: called when a policy or a predictor has raised.
    """

    def __init__(
        self,
        deployments: Sequence[Deployment],
        recorder: Recorder,
        *,
        router: str = "round_robin",
        seed: int = 0,
        token: int = 0,
        time_scale: float = 1.0,
        on_failure: Callable[[], None] | None = None,
    ) -> None:
        if router not in ROUTERS:
            raise unknown("router", router, ROUTERS)
        if not 0 < time_scale <= 1e6:
            raise InputError(f"time_scale {time_scale}: give a factor above 0, such as 10 for ten times as fast")
        self.error: str | None = None
        self._alarm: Alarm | None = None  # from the start on
        self.on_failure = on_failure
        self.time_scale = time_scale
        self._choose: Any = ROUTERS[router](np.random.default_rng(seed))  # asks what `LiveReplica` knows
        self._channels = Channels()
        self.replicas = [
            LiveReplica(self, number, deployment, recorder, token) for number, deployment in enumerate(deployments)
        ]
        self._checked = list({id(each.driver.scheduler.spec): each for each in self.replicas}.values())
        self._at: dict[int, LiveReplica] = {}  # where each request is, by its id
        self._coming: list[tuple[float, int, LiveReplica, TokenSequence]] = []  # in a front end, until that time
        self._newest = 0.0  # no request arrives before this: the router chooses in the order of arrivals
        self._tokens: list[tuple[bool, int, int, float, str | None]] = []  # of a batch, before they are given out

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._origin = perf_counter()
        self._alarm = Alarm(loop, self._come)

    def close(self) -> None:
        """Let go of the loop."""
        if self._alarm is not None:
            self._alarm.close()

    def now(self) -> float:
        return (perf_counter() - self._origin) * self.time_scale

    def check(self, request: Request) -> None:
        for replica in self._checked:
            replica.driver.scheduler.check(request)

    def submit(self, sequence: TokenSequence, channel: Channel, place: int, arrived: float) -> None:
        request = sequence.request
        request.arrived_at = max((arrived - self._origin) * self.time_scale, self._newest)
        self._channels.add(request.id, channel, place)
        self._advance(request.arrived_at)
        if request.block_hashes is None and getattr(self._choose, "reads_prompts", False):
            sequence.hash_blocks(self.replicas[0].scheduler.spec.block_size)
            request.block_hashes = sequence.block_hashes
        replica = self._choose(request, self.replicas)
        self._at[request.id] = replica
        through = replica.front_end.through(request, request.arrived_at)
        if through > request.arrived_at:
            heappush(self._coming, (through, request.id, replica, sequence))
        else:
            replica.submit(sequence)
        self._newest = math.nextafter(request.arrived_at, math.inf)
        self._set_alarm()

    def abort(self, id: int) -> None:
        self._channels.remove(id)
        if (replica := self._at.pop(id, None)) is None:
            return
        left = [each for each in self._coming if each[1] != id]
        if len(left) < len(self._coming):
            heapify(left)
            self._coming = left
        else:
            replica.abort(id, self.now())
        self._set_alarm()

    def stop(self, id: int, tokens: int) -> None:
        self.abort(id)  # no text of a simulated model is ever complete before its length

    def gauges(self) -> Sequence[Gauges]:
        return [Gauges.of(replica.driver) for replica in self.replicas]

    def fail(self, error: Exception) -> None:
        """End everything: a policy or a predictor, a plugin's perhaps, has raised."""
        self.error = f"{type(error).__name__}: {error}"
        self._channels.fail(self.error)
        if self.on_failure is not None:
            self.on_failure()

    def _set_alarm(self) -> None:
        """Come again when the first batch in flight ends, or a request comes through a front end."""
        due = min(replica.due for replica in self.replicas)
        if self._coming:
            due = min(due, self._coming[0][0])
        if due < math.inf and self._alarm is not None:
            self._alarm.set((due - self.now()) / self.time_scale)

    def _come(self) -> None:
        try:
            self._advance(self.now())
            self._set_alarm()
        except Exception as error:
            self.fail(error)
            raise

    def _advance(self, now: float) -> None:
        """Let everything happen that happens until `now`."""
        while self._coming and self._coming[0][0] <= now:
            through, _, replica, sequence = heappop(self._coming)
            replica.advance(through)
            replica.take_up(sequence, through)
        for replica in self.replicas:
            replica.advance(now)

    def token(self, sequence: TokenSequence, token: int) -> None:
        """A replica has generated a token."""
        request = sequence.request
        if sequence.finish_reason is not None:
            self._at.pop(request.id, None)
        times = request.token_times
        self._tokens.append((len(times) > 1, request.id, token, times[-1], sequence.finish_reason))

    def give_out(self) -> None:
        """Give out the tokens of a batch, first tokens first: a TTFT shows the time that the others' sending takes."""
        tokens, self._tokens = self._tokens, []
        tokens.sort(key=_LATER)
        for _, id, token, time, finish_reason in tokens:
            self._channels.deliver(id, token, time, finish_reason)


class LiveReplica:
    """One replica: its driver's events happen when their simulated time has come."""

    def __init__(
        self, cluster: LiveCluster, number: int, deployment: Deployment, recorder: Recorder, token: int
    ) -> None:
        clock = VirtualClock()
        self.front_end = FrontEnd(deployment.host)
        self._cluster = cluster
        self._executor = PredictedExecutor(
            deployment.predictor,
            deployment.num_kv_blocks,
            deployment.parallel.pipeline_parallel_size,
            deployment.model.sliding_window,
            clock,
            token,
        )
        self.driver = Driver(
            deployment.replica.new_scheduler(),
            self._executor,
            recorder,
            clock=clock,
            replica=number,
            on_token=cluster.token,
        )

    @property
    def due(self) -> float:
        """When its oldest batch in flight ends; infinity without one."""
        return self._executor.due

    @property
    def outstanding_requests(self) -> int:
        """Requests waiting or running."""
        return self.driver.unfinished

    @property
    def outstanding_tokens(self) -> int:
        """Tokens still to compute or to generate for the requests here."""
        requests = [sequence.request for sequence in self.driver.steps.sequences.values()]
        return sum(request.max_total_tokens - request.num_computed_tokens for request in requests)

    @property
    def scheduler(self) -> Scheduler:
        return self.driver.scheduler

    @property
    def kv_load(self) -> float:
        """Share of the KV cache that requests here hold, with the prompts that wait (`Replica.kv_load`)."""
        requests = [sequence.request for sequence in self.driver.steps.sequences.values()]
        return kv_share(self.scheduler, sum(request.num_computed_tokens for request in requests))

    def advance(self, now: float) -> None:
        """Let everything happen that happens until `now`."""
        while self._executor.due <= now:
            self.driver.step()
            self._cluster.give_out()
            self.driver.launch()

    def submit(self, sequence: TokenSequence) -> None:
        """A sequence arrives, after `advance` to that time.

        What has happened already stays as it is: it came after that, if only by the smallest of times.
        """
        request = sequence.request
        if request.arrived_at <= self.driver.now:
            request.arrived_at = math.nextafter(self.driver.now, math.inf)
        self.take_up(sequence, request.arrived_at)

    def take_up(self, sequence: TokenSequence, at: float) -> None:
        """A sequence reaches the scheduler, after `advance` to that time."""
        self.driver.submit(sequence, max(at, self.driver.now))
        self.driver.launch()

    def abort(self, id: int, now: float) -> None:
        self.advance(now)
        self.driver.clock.sleep_until(now)
        self.driver.abort(id)
        self.driver.launch()
