"""A load on a server, measured from outside: requests sent when the workload's client sends them.

    measured = asyncio.run(Generator(endpoint, prompts, workload, model="llama").run(recorder))

Open and closed loops, conversations and traces are the same three questions of a client as in the engine and in the
simulator (`engine.workload.client`). A request arrives when it is really sent; how far that is from when it should have
been is the generator's own lateness, and reported.
"""

from __future__ import annotations

import asyncio
from array import array
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf, nan
from time import perf_counter
from typing import Any

import numpy as np

from engine.loadgen.client import Answer, Endpoint, all_done, parse_metrics
from engine.loadgen.prompts import Prompts
from engine.results.metrics import statistics
from engine.results.recorder import Recorder
from engine.results.tables import Columns
from engine.scheduling.request import Request
from engine.workload.workload import Workload

LEAD_S = 0.02  # from the start to the first request
SAMPLE_S = 1.0  # between two looks at the server's gauges
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
_OLD_NAMES = {"gpu_cache_usage_perc": "kv_cache_usage_perc"}  # of vLLM


@dataclass
class Measured:
    """What a generator has measured beside the recorder's tables; times are seconds since the start."""

    sent: int = 0
    lateness_s: array[float] = field(default_factory=lambda: array("d"))
    errors: Counter[str] = field(default_factory=Counter)
    details: list[dict[str, Any]] = field(default_factory=list)  # of each finished request, for vLLM's result JSON
    asked_tokens: int = 0  # prompt tokens that were meant, of requests whose server counts them
    counted_tokens: int = 0  # what the server counted of these
    uncounted: int = 0  # requests whose server counts no output tokens: events stand for tokens
    merged_tokens: int = 0  # tokens that came in one event with another
    ignore_eos: bool = False  # whether requests asked for their whole length
    short: int = 0  # requests that got fewer tokens than they asked for
    samples: list[tuple[float, dict[str, float]]] = field(default_factory=list)  # of the server's gauges
    interrupted: bool = False

    def describe(self) -> dict[str, Any]:
        """Return a summary's entries."""
        late = 1e3 * np.frombuffer(self.lateness_s) if self.lateness_s else np.zeros(0)
        found = statistics(late, (50.0, 99.0))
        return {
            "generator_lateness_ms": {name: found[name] for name in ("mean", "p50", "p99", "max") if name in found},
            "errors": dict(self.errors.most_common()),
        }

    def notes(self) -> list[str]:
        """Return what a reader of the results should know."""
        notes = []
        if self.asked_tokens and self.counted_tokens != self.asked_tokens:
            off = self.counted_tokens / self.asked_tokens - 1
            notes.append(f"prompts have {off:+.1%} of the tokens that were meant, as the server counts")
        if self.uncounted:
            notes.append(f"{self.uncounted:,} answers have no usage: an event counts as a token")
        if self.merged_tokens:
            notes.append(f"{self.merged_tokens:,} tokens came in one event with another: gaps of 0 between these")
        if self.short:
            why = "the server does not heed ignore_eos" if self.ignore_eos else "--ignore-eos asks for whole ones"
            notes.append(f"{self.short:,} answers are shorter than asked for: {why}")
        if self.interrupted:
            notes.append("interrupted: what was finished by then")
        return notes

    def gauges(self) -> Columns:
        """Return the samples of the server's gauges, summed over its engines: time_s, and one column for each."""
        times = np.array([time for time, _ in self.samples])
        return {"time_s": times} | {
            name: np.array([values.get(name, nan) for _, values in self.samples]) for name in GAUGES
        }


class Generator:
    """Sends a workload's requests to an endpoint.

    Args:
        more: further fields of every request's body.
        on_progress: called with the number of requests that have ended.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        prompts: Prompts,
        workload: Workload,
        model: str,
        *,
        more: Mapping[str, Any] | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.prompts = prompts
        self.workload = workload
        self.model = model
        self.more = dict(more or {})
        self.on_progress = on_progress
        self.measured = Measured(ignore_eos=bool(self.more.get("ignore_eos")))
        self._ended = 0

    async def run(self, recorder: Recorder) -> Measured:
        """Send everything and wait for the answers; cancelled, it keeps what has ended."""
        self._recorder = recorder
        self._changed = asyncio.Event()
        tasks: set[asyncio.Task[None]] = set()
        broken: list[BaseException] = []  # by a defect of ours

        def ended(task: asyncio.Task[None]) -> None:
            tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                broken.append(error)
            self._changed.set()

        self._origin = perf_counter() + LEAD_S
        sampling = asyncio.ensure_future(self._sample())
        try:
            while (at := self.prompts.next_at) < inf or tasks:
                if at < inf and (left := self._origin + at - perf_counter()) <= 0:
                    request, prompt = self.prompts.pop_text()
                    task = asyncio.ensure_future(self._one(request, prompt))
                    tasks.add(task)
                    task.add_done_callback(ended)
                    continue
                if at == inf or self.workload.waits:
                    self._changed.clear()
                    await _wait(self._changed, None if at == inf else left)
                else:
                    await asyncio.sleep(left)
                if broken:
                    raise broken[0]
        except asyncio.CancelledError:
            self.measured.interrupted = True
            for task in tasks:
                task.cancel()
            await all_done(set(tasks))
        finally:
            sampling.cancel()
        return self.measured

    async def _one(self, request: Request, prompt: str) -> None:
        """A request's life."""
        body = self.endpoint.body(self.model, prompt, request.output_tokens, self.more)
        self.measured.sent += 1
        self.measured.lateness_s.append(perf_counter() - self._origin - request.arrived_at)
        answer = await self.endpoint.send(body)
        if answer.error is None:
            self._record(request, answer)
        else:
            self.measured.errors[answer.error] += 1
        self._ended += 1
        if self.on_progress is not None:
            self.on_progress(self._ended)
        end = answer.ended_at - self._origin
        if answer.error is None:
            self.prompts.ended(request, end, prompt, "".join(answer.text))
        else:
            self.prompts.ended(request, end)

    def _record(self, request: Request, answer: Answer) -> None:
        measured, origin = self.measured, self._origin
        times = [time - origin for time in answer.times]
        tokens = answer.output_tokens
        if tokens is None:
            measured.uncounted += 1
            tokens = len(times)
        elif tokens > len(times):
            measured.merged_tokens += tokens - len(times)
        if tokens < request.output_tokens:
            measured.short += 1
        if answer.prompt_tokens is not None:
            measured.asked_tokens += request.prompt_tokens
            measured.counted_tokens += answer.prompt_tokens
        measured.details.append(
            {
                "input_len": answer.prompt_tokens or request.prompt_tokens,
                "output_len": tokens,
                "ttft": answer.times[0] - answer.sent_at,
                "itl": np.diff(answer.times).tolist(),
            }
        )
        request.arrived_at = answer.sent_at - origin
        request.scheduled_at = nan  # nobody outside knows
        request.prompt_tokens = answer.prompt_tokens or request.prompt_tokens
        request.token_times.extend(_spread(times, max(1, tokens)))
        self._recorder.finished(request, 0)

    async def _sample(self) -> None:
        """Look at the server's gauges now and then, as long as it has any."""
        while True:
            page = await self.endpoint.metrics()
            values: dict[str, float] = {}
            for name, _, value in parse_metrics(page or ""):
                short = name.removeprefix("vllm:")
                short = _OLD_NAMES.get(short, short)
                if short in GAUGES:
                    values[short] = values.get(short, 0.0) + value
            if not values:
                return
            self.measured.samples.append((perf_counter() - self._origin, values))
            await asyncio.sleep(SAMPLE_S)


def _spread(times: list[float], tokens: int) -> list[float]:
    """Return a time for each of so many tokens, which came evenly in the events at `times`."""
    if tokens == len(times):
        return times
    place = np.arange(tokens) * len(times) // tokens
    return [*[times[each] for each in place.tolist()[:-1]], times[-1]]


async def _wait(event: asyncio.Event, timeout: float | None) -> None:
    """Wait for an event, but no longer than `timeout` seconds."""
    try:
        await asyncio.wait_for(event.wait(), timeout)
    except TimeoutError:
        return
