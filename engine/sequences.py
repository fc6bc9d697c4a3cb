"""Sequences: a request with its token ids, and the steps that a worker is sent for a batch of them.

The scheduler knows counts and the workers know tensors; what joins them is here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from engine.executor import GREEDY, LAST_SAMPLED, NewBlocks, SamplingParams, Step, num_rows
from engine.request import Batch, Request


class Sequence:
    """A request and its tokens: the prompt's, then what was generated.

    `stop_tokens` end it early; with none it runs to the request's `output_tokens`.
    """

    __slots__ = ("finish_reason", "request", "row", "sampling", "sent_blocks", "stop_tokens", "tokens")

    def __init__(
        self,
        request: Request,
        prompt: Iterable[int],
        sampling: SamplingParams = GREEDY,
        stop_tokens: frozenset[int] = frozenset(),
    ) -> None:
        self.request = request
        self.tokens = list(prompt)
        self.sampling = sampling
        self.stop_tokens = stop_tokens
        self.finish_reason: str | None = None  # "stop" or "length", once it is finished
        self.row: int | None = None  # on the workers
        self.sent_blocks = 0  # of request.blocks, that the workers know of

    @property
    def output(self) -> list[int]:
        """The generated tokens."""
        return self.tokens[self.request.prompt_tokens :]


class StepBuilder:
    """Turns batches into steps. `seed` stands in for those of sequences that have none."""

    def __init__(self, max_num_seqs: int, seed: int = 0) -> None:
        self.seed = seed
        self.sequences: dict[int, Sequence] = {}  # by request id, unfinished
        self._free_rows = list(reversed(range(num_rows(max_num_seqs))))
        self._number = 0

    def add(self, sequence: Sequence) -> None:
        """A sequence comes to the replica."""
        if sequence.sampling.temperature > 0 and sequence.sampling.seed is None:
            drawn = np.random.SeedSequence([self.seed, sequence.request.id]).generate_state(1)[0]
            sequence.sampling = replace(sequence.sampling, seed=int(drawn))
        self.sequences[sequence.request.id] = sequence

    def remove(self, sequence: Sequence) -> None:
        """A sequence is finished: its row is free for another, once the steps launched so far are done."""
        del self.sequences[sequence.request.id]
        if sequence.row is not None:
            self._free_rows.append(sequence.row)
            sequence.row = None

    def build(self, batch: Batch) -> Step:
        """The step that computes `batch`; call once for each batch, when it is formed."""
        entries = [(self.sequences[r.id], 1) for r in batch.decodes]
        entries += [(self.sequences[r.id], chunk) for r, chunk in batch.prefills]
        tokens: list[int] = []
        for sequence, chunk in entries:
            start = sequence.request.computed
            known = sequence.tokens[start : start + chunk]
            tokens += known
            if len(known) < chunk:  # its newest token is still on the worker
                tokens.append(LAST_SAMPLED)
        blocks = self._new_blocks(sequence for sequence, _ in entries)
        first = len(batch.decodes)
        ending = {r.id for r in batch.ending}
        sampled = [*range(first), *(i for i, (r, _) in enumerate(batch.prefills, first) if r.id in ending)]
        sampling = [entries[i][0].sampling for i in sampled]
        self._number += 1
        return Step(
            self._number,
            first,
            _ints([sequence.row for sequence, _ in entries]),
            _ints([sequence.request.computed for sequence, _ in entries]),
            _ints([chunk for _, chunk in entries]),
            _ints(tokens),
            blocks,
            _ints(sampled),
            None if all(each.temperature == 0 for each in sampling) else tuple(sampling),
        )

    def _new_blocks(self, sequences: Iterable[Sequence]) -> NewBlocks:
        """What the workers don't know yet of these sequences' blocks, and a row for whoever has none."""
        rows: list[int] = []
        offsets: list[int] = []
        ids: list[int] = []
        for sequence in sequences:
            blocks = sequence.request.blocks
            if sequence.request.computed == 0:  # new here, or back after a preemption with other blocks
                sequence.sent_blocks = 0
                if sequence.row is None:
                    sequence.row = self._free_rows.pop()
            sent = sequence.sent_blocks
            if sent < len(blocks):
                rows += [sequence.row or 0] * (len(blocks) - sent)
                offsets += range(sent, len(blocks))
                ids += blocks[sent:]
                sequence.sent_blocks = len(blocks)
        return NewBlocks(_ints(rows), _ints(offsets), _ints(ids))


def _ints(values: list[int] | list[int | None]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(values, dtype=np.int32)
