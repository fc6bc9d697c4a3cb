"""Times operators where they stand: in whole forward passes of the engine's model, as a CPU runs them.

On a processor an operator's time depends on what its caches hold, and that is what the operators before it left there.
So the model runs as it is, and each operator takes from the end of the one before it to its own end: the times of a
pass add up to the pass. A fixed product is timed beside every pass, and times are scaled to the speed of the processor
at which that product takes `reference_s`, for a processor's speed drifts.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from engine.runtime.engine_spec import EngineSpec
from engine.runtime.executor import Step, lone_step
from engine.specs import ExpertsSpec, ParallelSpec
from engine.worker.parallel import Rank
from engine.worker.runner import ModelRunner
from engine.worker.sampler import sample
from profiler.expert_load import deal, loads
from profiler.grids import Point
from profiler.operators import inventory
from profiler.timing import Timing
from profiler.workbench import NoLinks

BUDGET_S = 0.1  # for the passes of one batch
LEAST, MOST = 4, 40  # passes


class Reference:
    """A fixed product, by whose time a processor's speed is known."""

    def __init__(self, reference_s: float | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self._left = torch.randn(160, 160, generator=generator)
        self._right = torch.randn(160, 160, generator=generator)
        self.reference_s = reference_s or statistics.median(self._once() for _ in range(300))

    def drift(self) -> float:
        """How much longer things take now than they are scaled to."""
        return statistics.median(self._once() for _ in range(9)) / self.reference_s

    def _once(self) -> float:
        start = time.perf_counter()
        torch.mm(self._left, self._right)
        return time.perf_counter() - start


class InSitu:
    """A rank of a model whose operators are timed as it runs. Nothing is sent to other ranks."""

    def __init__(self, spec: EngineSpec, reference: Reference) -> None:
        self.spec, self.reference = spec, reference
        rank = Rank(0, ParallelSpec(tensor_parallel_size=spec.parallel.tensor_parallel_size))
        self._runner = ModelRunner(spec, rank, NoLinks(rank))
        assert spec.num_blocks is not None
        self._runner.allocate(spec.num_blocks)
        self._operators = {op.name: op for op in inventory(spec.model, spec.parallel, 0)}
        self._seen: dict[tuple[Any, ...], Timing] = {}
        self._log: list[tuple[str, float]] = []
        self._last = 0.0
        self._watch()

    def measure(self, point: Point) -> Timing:
        """The time of one run of an operator: of a pass that was made already, if that had it."""
        op = self._operators[str(point["operator"])]
        key = op.name, op.size(point)
        if key not in self._seen:
            self._run(*op.batch(point, self.spec.max_model_len))
        return self._seen[key]

    # -- inside ----------------------------------------------------------------------------------------------------

    def _run(self, decodes: int, sequences: list[tuple[int, int]]) -> None:
        """Passes of a batch; keeps the time of every operator in them."""
        step = self._step(decodes, sequences)
        self._pass(step)  # what is slow only once
        passes: list[dict[str, float]] = []
        began = time.perf_counter()
        while len(passes) < LEAST or (len(passes) < MOST and time.perf_counter() - began < BUDGET_S):
            before = self.reference.drift()
            spent = self._pass(step)
            drift = (before + self.reference.drift()) / 2
            passes.append({name: seconds / drift for name, seconds in spent.items()})
        tokens = len(step.tokens)
        for name in passes[0]:
            size = self._operators[name].size_in(tokens, decodes, sequences)
            if size is None:
                continue
            seconds = [each[name] for each in passes]
            timing = Timing(statistics.median(seconds), statistics.pstdev(seconds), len(seconds))
            self._seen.setdefault((name, size), timing)

    def _pass(self, step: Step) -> dict[str, float]:
        """Seconds of one run of each operator in a pass, on average over the layers."""
        with torch.inference_mode():
            self._runner.attention.plan(self._runner.rows.inputs(step)[1])  # the tables are known when it counts
            inputs, batch, _ = self._runner.rows.inputs(step)
            start = time.perf_counter()
            self._runner.attention.plan(batch)
            planned = time.perf_counter() - start
            self._log.clear()
            self._last = time.perf_counter()
            logits = self._runner.model(inputs, self._runner.attention, self._runner.kv_caches, None)
            sample(logits.float(), None, ())
            self._mark("sampler")
        spent, count = defaultdict[str, float](float), defaultdict[str, int](int)
        for name, seconds in self._log:
            spent[name] += seconds
            count[name] += 1
        for name in spent:
            if self._operators[name].plans:
                spent[name] += planned
        return {name: spent[name] / count[name] for name in spent}

    def _step(self, decodes: int, sequences: list[tuple[int, int]]) -> Step:
        step = lone_step(sequences, decodes, self.spec.block_size)
        ids = np.random.default_rng(0).permutation(self.spec.num_blocks or 0)[: len(step.new_blocks.ids)]
        tokens = np.random.default_rng(1).integers(0, self.spec.model.vocab_size, len(step.tokens))
        blocks = step.new_blocks._replace(ids=ids.astype(np.int32))
        return step._replace(tokens=tokens.astype(np.int32), new_blocks=blocks)

    def _watch(self) -> None:
        """Have every operator note its end."""
        decoder, attention = self._runner.model, self._runner.attention
        for name in ("embedding", "final_norm", "lm_head"):
            self._wrap(getattr(decoder, name), "forward", name)
        layer: Any
        for layer in decoder.layers:
            if layer.mixture is not None:
                layer.expert_choice = self._dealt(layer.expert_choice, layer.mixture)
            for name in self._operators:
                part = getattr(layer, name, None)
                if isinstance(part, torch.nn.Module):
                    self._wrap(part, "forward", name)
                elif part is not None:
                    self._wrap(layer, name, name)
        self._wrap(attention, "decode", "attention_decode")
        self._wrap(attention, "prefill", "attention_prefill")

    @staticmethod
    def _dealt(choice: Callable[..., Any], mixture: ExpertsSpec) -> Callable[..., Any]:
        """The choice of experts, with its outcome replaced: tokens spread over experts as the mixture's load has it."""
        known: dict[int, torch.Tensor] = {}

        def dealt(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            weights, _ = choice(logits)
            if (tokens := len(logits)) not in known:
                spread = loads(mixture.load, tokens, mixture.num_experts, mixture.top_k, 1)
                known[tokens] = torch.from_numpy(deal(spread, tokens, mixture.top_k))
            return weights, known[tokens]

        return dealt

    def _wrap(self, owner: Any, method: str, name: str) -> None:
        run: Callable[..., Any] = getattr(owner, method)

        def noted(*arguments: Any) -> Any:
            value = run(*arguments)
            self._mark(name)
            return value

        setattr(owner, method, noted)

    def _mark(self, name: str) -> None:
        now = time.perf_counter()
        self._log.append((name, now - self._last))
        self._last = now
