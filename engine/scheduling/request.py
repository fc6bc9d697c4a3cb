"""A request as the scheduler sees it (counts, never text), and a batch of them.

Progress is a count, not a phase: a request has `num_computed_tokens` tokens whose keys and values are in the cache and
`num_tokens` tokens that are known (prompt plus generated). Whatever lies between the two can be computed next, so a
chunk of a prompt, a decode, the recompute after a preemption and what a cached prefix leaves are the same thing.
Computing the last known token yields the next one.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from engine.scheduling.content import Content


class Request:
    """One request on its way through a replica.

    Times are seconds on the driver's clock. `output_tokens` is the most it may generate; the simulator generates
    exactly that many. `block_hashes` has an id for each full KV block of its tokens, the same for two requests exactly
    when all tokens up to that block's end are; None where it shares nothing. It may grow with the known tokens. With a
    `content` instead, the scheduler works them out where it caches prefixes.
    """

    __slots__ = (
        "allocated_tokens",
        "arrived_at",
        "block_hashes",
        "blocks",
        "content",
        "finished",
        "group",
        "id",
        "late_first_token",
        "max_total_tokens",
        "num_cached_blocks",
        "num_computed_tokens",
        "num_in_flight_tokens",
        "num_pending_tokens",
        "num_tokens",
        "order",
        "output_tokens",
        "preemptions",
        "prefix_hit_tokens",
        "priority",
        "prompt_tokens",
        "row",
        "scheduled_at",
        "token_times",
    )

    def __init__(
        self,
        id: int,
        arrived_at: float,
        prompt_tokens: int,
        output_tokens: int,
        block_hashes: Sequence[int] | None = None,
        priority: int = 0,
    ) -> None:
        self.id = id
        self.arrived_at = arrived_at
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.max_total_tokens = prompt_tokens + output_tokens  # `num_tokens` once the last one has been generated
        self.late_first_token = False  # the first of `token_times` is the prompt's end (engine.scheduling.osdi24)
        self.num_tokens = prompt_tokens
        self.num_computed_tokens = 0
        # of batches that have not been committed, where several are in flight:
        self.num_in_flight_tokens = 0  # tokens that they compute
        self.num_pending_tokens = 0  # tokens that they will yield, as far as the next batch is formed without them
        self.blocks: list[int] = []  # ids of the KV blocks it holds, in token order
        self.allocated_tokens = 0  # tokens that those blocks hold
        self.block_hashes = block_hashes
        self.content: Content | None = None
        self.prefix_hit_tokens = 0  # found in the cache when it was first admitted
        self.num_cached_blocks = 0  # of `blocks`, the first ones, that others can find by their hashes
        self.priority = priority  # the lowest number first, for policies that look at it
        self.order = 0  # its place in line at the scheduler, earliest first
        self.row: int | None = None  # of the workers' buffers, while it is running
        self.group = 0  # for policies that keep batches together
        self.preemptions = 0
        self.finished = False
        self.scheduled_at: float | None = None  # when it first entered a batch
        self.token_times = array("d")  # when each output token came out

    @property
    def num_output_tokens(self) -> int:
        """Output tokens generated so far."""
        return self.num_tokens - self.prompt_tokens

    @property
    def start(self) -> int:
        """Tokens before the next one to compute: those in the cache and those that batches in flight put there."""
        return self.num_computed_tokens + self.num_in_flight_tokens

    @property
    def remaining(self) -> int:
        """Tokens that can be computed next; the last one it may have is never computed."""
        known = self.num_tokens + self.num_pending_tokens
        if known >= self.max_total_tokens:
            known = self.max_total_tokens - 1
        return known - self.num_computed_tokens - self.num_in_flight_tokens

    def __repr__(self) -> str:
        progress = f"{self.num_computed_tokens}/{self.num_tokens}"
        return f"Request({self.id}, {progress} of {self.prompt_tokens}+{self.output_tokens})"


Entry = tuple[Request, int]  # a request in a batch, and how many of its tokens are computed


class BatchShape(NamedTuple):
    """The numbers that a batch's duration depends on; all that a runtime predictor gets to see.

    `prefills` has (chunk, prefix) of each prompt: the tokens computed now, and those in the cache before them.
    `decode_kv_tokens` is how many cached tokens the decodes attend to, in all, their own included; it grows by
    `decode_kv_growth` each time the batch repeats. `num_sampled` rows have their next token sampled.
    """

    num_tokens: int
    num_decodes: int
    decode_kv_tokens: int
    prefills: tuple[tuple[int, int], ...]
    num_sampled: int
    decode_kv_growth: int

    def after(self, repeats: int) -> BatchShape:
        """The shape of the same batch after `repeats` runs of it."""
        return self._replace(
            decode_kv_tokens=self.decode_kv_tokens + repeats * self.decode_kv_growth,
            prefills=tuple([(chunk, prefix + repeats * chunk) for chunk, prefix in self.prefills]),
        )


@dataclass(slots=True, eq=False)
class Batch:
    """What one iteration computes, as plain data: `entries`, each a request and how many of its tokens.

    They are kept in two lists, in the scheduler's order: `decodes`, the requests of which one token is computed, the
    last that is known, and `chunks`, entries of anything else. Requests whose last known token is computed have their
    next token sampled: the decodes and, of the chunks, those that are `completing` their prompts (or recomputes). The
    batch may run `repeats` times before anything can change from inside (a request reaching its last token or filling
    the sliding window, a prompt its end, the KV blocks running out), so a driver that sees no arrival may commit that
    many at once. None of `decodes` has its last token in fewer runs than `left`.
    """

    decodes: Sequence[Request]
    chunks: Sequence[Entry]
    completing: list[Request]
    shape: BatchShape
    kv_blocks: int  # in use by the replica once this batch has its own
    left: int
    repeats: int = 1
    prefix_hit_tokens: int = 0  # that its requests found in the cache when they were admitted for it
    dropped: set[Request] | None = None  # preempted or ended while it was in flight

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Each request of the batch, and how many of its tokens are computed."""
        return (*[(request, 1) for request in self.decodes], *self.chunks)

    @property
    def sampled(self) -> list[Request]:
        """The requests whose next token is sampled, in the order of the entries."""
        return [*self.decodes, *self.completing]

    def finishing(self, repeats: int = 1) -> list[Request]:
        """The requests that have all their tokens once it has run `repeats` times; ask before it is committed."""
        ends: list[Request] = []
        if repeats >= self.left:
            ends = [r for r in self.decodes if r.max_total_tokens - r.num_tokens == repeats]
        if self.completing:
            ends += [r for r in self.completing if r.num_tokens == r.max_total_tokens - 1]
        return ends
