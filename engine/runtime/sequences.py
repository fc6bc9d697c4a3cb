"""Sequences: a request with its token ids, and the steps that a worker is sent for a batch of them.

The scheduler knows counts and the workers know tensors; what joins them is here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from hashlib import blake2b

import numpy as np

from engine.runtime.executor import GREEDY, LAST_SAMPLED, Logprobs, NewBlocks, SamplingParams, Step
from engine.scheduling.request import Batch, Entry, Request


class Sequence:
    """A request and its tokens: the prompt's, then what was generated.

    `stop_tokens` end it early, but not before it has `min_tokens` of them; with none it runs to the request's
    `output_tokens`.
    """

    __slots__ = (
        "block_hashes",
        "finish_reason",
        "logprobs",
        "min_tokens",
        "request",
        "sampling",
        "sent_blocks",
        "sent_preemptions",
        "stop_tokens",
        "tokens",
    )

    def __init__(
        self,
        request: Request,
        prompt: Iterable[int],
        sampling: SamplingParams = GREEDY,
        stop_tokens: frozenset[int] = frozenset(),
        min_tokens: int = 0,
    ) -> None:
        self.request = request
        self.tokens = list(prompt)
        self.sampling = sampling
        self.stop_tokens = stop_tokens
        self.min_tokens = min_tokens
        self.logprobs: list[Logprobs] = []  # of each output token, if its sampling asks for them
        self.block_hashes: list[int] = []  # of its tokens, where prefixes are cached and nobody gave the request any
        self.finish_reason: str | None = None  # "stop", "length" or "abort", once it is finished
        self.sent_blocks = 0  # of request.blocks, that the workers know of
        self.sent_preemptions = 0  # of the request, when they were sent: after another it has other blocks

    @property
    def output(self) -> list[int]:
        """The generated tokens."""
        return self.tokens[self.request.prompt_tokens :]

    def stops_at(self, token: int) -> bool:
        """Return whether `token`, its newest, ends it."""
        return token in self.stop_tokens and len(self.tokens) - self.request.prompt_tokens >= self.min_tokens

    def hash_blocks(self, block_size: int) -> None:
        """Make a hash for each block that its tokens fill by now, of these and all before them."""
        hashes = self.block_hashes
        for end in range((len(hashes) + 1) * block_size, len(self.tokens) + 1, block_size):
            block = np.array([hashes[-1] if hashes else 0, *self.tokens[end - block_size : end]], dtype=np.uint64)
            hashes.append(int.from_bytes(blake2b(block.tobytes(), digest_size=8).digest(), "little"))


class StepBuilder:
    """Turns batches into steps. `seed` stands in for those of sequences that have none."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.sequences: dict[int, Sequence] = {}  # by request id, unfinished
        self._number = 0

    def add(self, sequence: Sequence) -> None:
        """A sequence comes to the replica."""
        if sequence.sampling.temperature > 0 and sequence.sampling.seed is None:
            drawn = np.random.SeedSequence([self.seed, sequence.request.id]).generate_state(1)[0]
            sequence.sampling = replace(sequence.sampling, seed=int(drawn))
        self.sequences[sequence.request.id] = sequence

    def remove(self, sequence: Sequence) -> None:
        """A sequence is finished."""
        del self.sequences[sequence.request.id]

    def build(self, batch: Batch, launched_at: float = 0.0, *, counted: bool = False) -> Step:
        """Build the step that computes `batch`; call once for each batch, when it is formed.

        `counted` says whether its requests count the batch among their tokens in flight already.
        """
        starts = {request: request.start - tokens * counted for request, tokens in batch.entries}
        completing = set(batch.completing)
        decodes: list[Entry] = [(request, 1) for request in batch.decodes]
        others: list[Entry] = []
        for request, tokens in batch.chunks:
            decode = tokens == 1 and starts[request] > 0 and request in completing
            (decodes if decode else others).append((request, tokens))
        entries = [(self.sequences[request.id], tokens) for request, tokens in (*decodes, *others)]
        tokens_of: list[int] = []
        for sequence, count in entries:
            start = starts[sequence.request]
            known = sequence.tokens[start : start + count]
            tokens_of += known
            if len(known) < count:  # its newest token is still on the worker
                tokens_of.append(LAST_SAMPLED)
        place = {sequence.request: i for i, (sequence, _) in enumerate(entries)}
        sampled = [place[request] for request in batch.sampled]
        sampling = [entries[i][0].sampling for i in sampled]
        self._number += 1
        return Step(
            self._number,
            launched_at,
            len(decodes),
            _ints([sequence.request.row for sequence, _ in entries]),
            _ints([starts[sequence.request] for sequence, _ in entries]),
            _ints([count for _, count in entries]),
            _ints(tokens_of),
            self._new_blocks(sequence for sequence, _ in entries),
            _ints(sampled),
            None if all(each.temperature == 0 and each.logprobs is None for each in sampling) else tuple(sampling),
        )

    def _new_blocks(self, sequences: Iterable[Sequence]) -> NewBlocks:
        """What the workers don't know yet of these sequences' blocks."""
        rows: list[int] = []
        offsets: list[int] = []
        ids: list[int] = []
        for sequence in sequences:
            request = sequence.request
            assert request.row is not None
            if sequence.sent_preemptions != request.preemptions:
                sequence.sent_blocks, sequence.sent_preemptions = 0, request.preemptions
            sent = sequence.sent_blocks
            if sent < len(request.blocks):
                rows += [request.row] * (len(request.blocks) - sent)
                offsets += range(sent, len(request.blocks))
                ids += request.blocks[sent:]
                sequence.sent_blocks = len(request.blocks)
        return NewBlocks(_ints(rows), _ints(offsets), _ints(ids))


def _ints(values: list[int] | list[int | None]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(values, dtype=np.int32)
