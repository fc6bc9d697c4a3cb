"""CUDA graphs of decode batches: the kernels of a whole iteration, launched as one.

A graph is captured for each of some batch sizes; a batch is padded to the next of them. Padding writes to a KV block of
its own and is never looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.worker.attention.base import AttentionBackend, AttentionBatch
from engine.worker.inputs import Inputs

Forward = Callable[[Inputs, AttentionBackend, Tensor | None], Tensor]


class DecodeGraphs:
    """Graphs for batches of 1 .. max(sizes) decodes.

    Args:
        forward: the model on (inputs, attention, hidden states of the stage before).
        padding_slot: where padding's keys and values go.
        hidden: an example (1, hidden_size) of what the stage before sends, if there is one.
        dtype: of what `run` gives.
    """

    def __init__(
        self,
        sizes: Iterable[int],
        forward: Forward,
        attention: AttentionBackend,
        max_blocks: int,
        padding_slot: int,
        hidden: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self._graphs: dict[int, _Graph] = {}
        stream, output, pool = torch.cuda.Stream(), None, None
        for size in sorted(sizes, reverse=True):  # the largest first: the others fit into its memory
            companion = attention.for_cuda_graph(size, max_blocks)
            graph = _Graph(size, forward, companion, padding_slot, hidden, dtype, stream, output, pool)
            output, pool = graph.output, graph.pool
            self._graphs[size] = graph
        self._sizes = sorted(self._graphs)

    def size_for(self, num_decodes: int) -> int:
        """The size that a batch is padded to; 0 if none is large enough."""
        return next((size for size in self._sizes if size >= num_decodes), 0)

    def run(self, inputs: Inputs, batch: AttentionBatch, hidden: Tensor | None) -> Tensor:
        """The model's output for a batch whose `inputs` are padded to one of the sizes; hidden (n, hidden_size).

        It is there until the next replay of any size.
        """
        return self._graphs[len(inputs.token_ids)].replay(inputs, batch, hidden)


class _Graph:
    """The model captured for `size` decodes, and the tensors that its kernels read and write."""

    def __init__(
        self,
        size: int,
        forward: Forward,
        attention: AttentionBackend,
        padding_slot: int,
        hidden: Tensor | None,
        dtype: torch.dtype,
        stream: torch.cuda.Stream,
        output: Tensor | None,
        pool: Any,
    ) -> None:
        device = attention.shape.device
        zeros = torch.zeros(size, dtype=torch.int64, device=device)
        self.inputs = Inputs(
            zeros.clone(), zeros.clone(), zeros + padding_slot, torch.arange(size, device=device), size
        )
        self.hidden = None if hidden is None else hidden.new_zeros(size, hidden.shape[1])
        self.attention = attention
        attention.plan(AttentionBatch(size, [1] * size, [1] * size, np.zeros((size, 1), np.int32), device))
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is made at the first call must not be captured
            for _ in range(2):
                example = forward(self.inputs, attention, self.hidden)
        torch.cuda.current_stream().wait_stream(stream)
        # the graphs share the room for what they put out, which would else be kept for each of them
        self.output = torch.empty_like(example, dtype=dtype) if output is None else output[:size]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.output.copy_(forward(self.inputs, attention, self.hidden))
        self.pool = self.graph.pool()

    def replay(self, inputs: Inputs, batch: AttentionBatch, hidden: Tensor | None) -> Tensor:
        self.inputs.token_ids.copy_(inputs.token_ids)
        self.inputs.positions.copy_(inputs.positions)
        self.inputs.slots.copy_(inputs.slots)
        if self.hidden is not None and hidden is not None:
            self.hidden[: len(hidden)] = hidden
        self.attention.plan(batch)
        self.graph.replay()
        return self.output[: batch.num_decodes]
