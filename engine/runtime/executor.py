"""What the driver hands to the workers and gets back: plain data, and the protocol of who carries it there.

The driver owns requests and token ids; a worker owns tensors. Each running sequence has a *row* on every worker, where
its block table and its newest token are kept, so that a step carries only what is new. Rows are seats of the scheduler:
there are `max_num_seqs`, taken at admission and given back at preemption or the end.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.errors import InputError

Ints = NDArray[np.int32]
MOST_LOGPROBS = 20  # of a token, as in vLLM
LAST_SAMPLED = -1  # in Step.tokens: the token that the worker sampled last for this row


class WorkerError(RuntimeError):
    """A worker died or failed; the message names its rank."""


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. temperature 0 is greedy; top_k 0 and top_p 1 leave every token in.

    The same seed gives the same tokens whatever else is in the batch. A request without one gets its own from the
    engine's seed. Log probabilities are of the logits as the model gives them.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None  # of how many of the likeliest tokens, beside the chosen one's; None: of none at all

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature {self.temperature}: give 0 (greedy) or more")
        if self.top_k < 0:
            raise InputError(f"top_k {self.top_k}: give 0 (every token) or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p {self.top_p}: give a share above 0 and up to 1")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise InputError(f"logprobs {self.logprobs}: give 0 to {MOST_LOGPROBS}")


GREEDY = SamplingParams()


class NewBlocks(NamedTuple):
    """KV blocks that rows got since the last step: block_table[rows[i], offsets[i]] = ids[i]."""

    rows: Ints
    offsets: Ints
    ids: Ints


class Step(NamedTuple):
    """One batch, as the workers compute it. Sequences come in the batch's order: decodes, then prefills.

    Shapes: n sequences, t tokens, m of the sequences have their next token sampled.
    """

    number: int
    launched_at: float  # s of the driver's clock: of the event at which it was formed
    num_decodes: int
    rows: Ints  # (n,) each sequence's row
    starts: Ints  # (n,) tokens it has in the cache
    chunks: Ints  # (n,) tokens computed now
    tokens: Ints  # (t,) their ids, or LAST_SAMPLED
    new_blocks: NewBlocks
    sampled: Ints  # (m,) which of the n sequences are sampled
    sampling: tuple[SamplingParams, ...] | None  # (m,) None: all greedy. Seeds are filled in


def lone_step(sequences: Sequence[tuple[int, int]], num_decodes: int, block_size: int) -> Step:
    """Sequences of (chunk, tokens in the cache) that nobody asked for: rows and KV blocks from 0 on, every token 0."""
    chunks = np.array([chunk for chunk, _ in sequences], dtype=np.int32)
    starts = np.array([start for _, start in sequences], dtype=np.int32)
    rows = np.arange(len(sequences), dtype=np.int32)
    blocks = -(-(starts + chunks) // block_size)
    offsets = np.concatenate([np.arange(count, dtype=np.int32) for count in blocks])
    new = NewBlocks(np.repeat(rows, blocks), offsets, np.arange(len(offsets), dtype=np.int32))
    return Step(0, 0.0, num_decodes, rows, starts, chunks, np.zeros(int(chunks.sum()), np.int32), new, rows, None)


class RankTime(NamedTuple):
    """When a rank computed a step, in seconds of the machine's monotonic clock (time.perf_counter)."""

    rank: int
    start: float
    end: float


class Logprobs(NamedTuple):
    """Log probabilities of a sampled token and of the likeliest ones, the likeliest first."""

    chosen: float
    top: list[tuple[int, float]]  # token id, log probability


class RankReport(NamedTuple):
    """What one rank says of a finished step. The first rank of the last stage has the tokens."""

    number: int
    time: RankTime
    tokens: list[int] | None
    logits: NDArray[np.float32] | None
    logprobs: list[Logprobs | None] | None = None  # (m,) None: nobody asked


class StageTime(NamedTuple):
    """When a step was on a pipeline stage, in seconds of the driver's clock, and for how long."""

    start: float
    duration: float


class Result(NamedTuple):
    """A finished step: the sampled token ids (m,) and when each rank computed it."""

    number: int
    tokens: list[int]
    times: list[RankTime]  # of every rank, by rank
    logits: NDArray[np.float32] | None = None  # (m, vocabulary), if the executor was asked to keep them
    stages: list[StageTime] | None = None  # if they were predicted
    in_range: bool = True  # of what the predictor was calibrated on
    logprobs: list[Logprobs | None] | None = None  # (m,) of the sampled tokens; None: nobody asked


def combine(reports: Sequence[RankReport]) -> Result:
    """The result of a step that every rank has reported."""
    tokens, logits, logprobs = next(
        (each.tokens, each.logits, each.logprobs) for each in reports if each.tokens is not None
    )
    times = sorted(each.time for each in reports)
    return Result(reports[0].number, tokens, times, logits, logprobs=logprobs)


def freeze_start_up() -> None:
    """Leave everything that exists by now out of garbage collections: a full one would be a pause in the serving.

    `gc.unfreeze` undoes it, for what was made before is garbage some day.
    """
    gc.collect()
    gc.freeze()


class Executor(Protocol):
    """The ranks of one replica. Steps are computed, and results come back, in the order of launch."""

    num_blocks: int  # KV blocks, the same on every rank
    attention_backend: str  # its name
    hardware: str  # the name of the ranks' GPU or processor

    def launch(self, step: Step) -> None:
        """Start a step. May return before it is done. Raises WorkerError."""

    def wait(self, timeout: float | None) -> Result | None:
        """The next result; None if there is none within `timeout` seconds (None: wait for it). Raises WorkerError."""

    def close(self) -> None:
        """Stop the workers. Safe to call twice, and after an error."""
