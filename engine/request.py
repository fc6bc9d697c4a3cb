"""A request as the scheduler sees it (counts, never text), and a batch of them.

Progress is a count, not a phase: a request has `computed` tokens whose keys and values are in the cache and `total`
tokens that are known (prompt plus what was generated). Whatever lies between the two can be computed next, so a chunk
of a prompt, a decode and the recompute after a preemption are the same thing. Computing the last known token yields
the next one.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import NamedTuple


class Request:
    """One request on its way through a replica.

    Times are seconds on the driver's clock. `output_tokens` is the most it may generate; the simulator generates
    exactly that many.
    """

    __slots__ = (
        "arrived_at",
        "blocks",
        "capacity",
        "computed",
        "group",
        "id",
        "in_flight",
        "limit",
        "order",
        "output_tokens",
        "preemptions",
        "prompt_tokens",
        "scheduled_at",
        "token_times",
        "total",
    )

    def __init__(self, id: int, arrived_at: float, prompt_tokens: int, output_tokens: int) -> None:
        self.id = id
        self.arrived_at = arrived_at
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.limit = prompt_tokens + output_tokens  # `total` when the last allowed token has been generated
        self.computed = 0
        self.total = prompt_tokens
        self.blocks: list[int] = []  # ids of the KV blocks it holds, in token order
        self.capacity = 0  # tokens that those blocks hold
        self.order = 0  # its place in line at the scheduler, earliest first
        self.in_flight = False  # in a batch that has not committed yet
        self.group = 0  # for policies that keep batches together
        self.preemptions = 0
        self.scheduled_at: float | None = None  # when it first entered a batch
        self.token_times = array("d")  # when each output token came out

    @property
    def generated(self) -> int:
        """Output tokens generated so far."""
        return self.total - self.prompt_tokens

    def __repr__(self) -> str:
        return f"Request({self.id}, {self.computed}/{self.total} of {self.prompt_tokens}+{self.output_tokens})"


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


@dataclass(slots=True)
class Batch:
    """What one iteration computes, as plain data.

    A request in `decodes` computes its one uncomputed token. A pair in `prefills` is a request and how many of its
    tokens are computed, after the `request.computed` that are in the cache already; those whose last known token is
    among them are `ending`, and have their next token sampled like the decodes. The batch may run `repeats` times
    before anything can change from inside (a request reaching its limit, a prompt its end, the KV blocks running out),
    so a driver that sees no arrival may commit that many at once. None of `decodes` is at its limit in fewer runs than
    `left`.
    """

    decodes: list[Request]
    prefills: list[tuple[Request, int]]
    shape: BatchShape
    kv_blocks: int  # in use by the replica once this batch has its own
    ending: list[Request]
    left: int
    repeats: int = 1

    def reaching_limit(self, repeats: int = 1) -> list[Request]:
        """Those that have all their tokens when the batch has run `repeats` times; ask before it is committed."""
        ends = [] if repeats < self.left else [r for r in self.decodes if r.limit - r.total == repeats]
        return ends + [r for r in self.ending if r.total == r.limit - 1] if self.ending else ends
