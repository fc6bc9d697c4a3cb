"""What the engine's end-to-end tests share: a checkpoint with transformers' own continuations, and a served run."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import checkpoints
import torch

from engine.results.recorder import Recorder
from engine.runtime.driver import Driver
from engine.runtime.engine_spec import EngineSpec
from engine.runtime.executor import GREEDY, Executor, Result, SamplingParams
from engine.runtime.sequences import Sequence
from engine.scheduling.policies import resolve
from engine.scheduling.request import Batch, Request
from engine.scheduling.scheduler import Scheduler
from engine.specs import ParallelSpec, SchedulerSpec, hf_config

MAX_LEN = 44  # tokens of a request
FEW_BLOCKS = 24  # so few that some of LENGTHS are preempted
LENGTHS = [(21, 10), (13, 8), (5, 12), (30, 9), (17, 11)]  # (prompt, output); no chunk size divides these
BUDGETS = {"vllm_v0": 48}  # whole prompts, recomputed ones too, have to fit


class Oracle:
    """A checkpoint, its spec, prompts of LENGTHS, and what transformers generates after them."""

    def __init__(self, folder: Path, name: str) -> None:
        self.model = checkpoints.write(folder, name)
        self.folder = folder
        self.spec = hf_config.read(folder).in_dtype("float32")
        generator = torch.Generator().manual_seed(11)
        self.prompts = [
            torch.randint(checkpoints.VOCABULARY, (prompt,), generator=generator).tolist() for prompt, _ in LENGTHS
        ]
        self.outputs = [self._generate(prompt, count) for prompt, (_, count) in zip(self.prompts, LENGTHS, strict=True)]
        assert len({token for output in self.outputs for token in output}) > 5  # the same one always would prove little

    def _generate(self, prompt: list[int], count: int) -> list[int]:
        tokens = torch.tensor([prompt])
        everything = self.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            use_cache=False,  # transformers' cache is cut at a `sliding_window` that the model itself ignores
        )
        output: list[int] = everything[0, len(prompt) :].tolist()
        assert len(output) == count
        return output

    def engine_spec(self, tp: int = 1, pp: int = 1, **changes: Any) -> EngineSpec:
        """In float32 on the CPU."""
        settings: dict[str, Any] = {
            "max_num_seqs": 4,
            "max_model_len": MAX_LEN,
            "max_batch_tokens": 4 * MAX_LEN,
            "block_size": 4,
            "num_blocks": 48,
            "attention_backend": "sdpa",  # to look for others takes seconds, for torch.compile comes with them
        }
        return EngineSpec(
            model=self.spec,
            folder=self.folder,
            device="cpu",
            parallel=ParallelSpec(tensor_parallel_size=tp, pipeline_parallel_size=pp),
            **(settings | changes),
        )


@dataclass
class Served:
    driver: Driver
    recorder: Recorder
    sequences: list[Sequence]
    batches: list[Batch] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # of each sampled sequence, in the order of results' logits
    sampled: list[int] = field(default_factory=list)  # their request ids

    @property
    def outputs(self) -> list[list[int]]:
        return [sequence.output for sequence in self.sequences]

    def new_scheduler(self) -> Scheduler:
        """One like that of this run, before the run."""
        used = self.driver.scheduler
        return Scheduler(used.spec, used.kv_cache.num_blocks, used.num_stages, async_scheduling=used.async_scheduling)


def serve(
    executor: Executor,
    oracle: Oracle,
    *,
    policy: str = "sarathi",
    stages: int = 1,
    async_scheduling: bool = False,
    prefix_caching: bool = False,
    num_blocks: int = FEW_BLOCKS,
    prompts: list[list[int]] | None = None,
    counts: list[int] | None = None,
    arrivals: list[float] | None = None,
    sampling: list[SamplingParams] | None = None,
    stop: list[frozenset[int]] | None = None,
    on_result: Callable[[Served], None] | None = None,
    recorder: Recorder | None = None,
    **settings: Any,
) -> Served:
    """Run the oracle's prompts, or others, through `executor`."""
    prompts = prompts or oracle.prompts
    counts = counts or [count for _, count in LENGTHS]
    spec = resolve(
        SchedulerSpec(policy=policy, max_num_batched_tokens=BUDGETS.get(policy, 16), max_num_seqs=4,
                      max_model_len=MAX_LEN, block_size=4, watermark=0.0, enable_prefix_caching=prefix_caching),
        MAX_LEN,
    )  # fmt: skip
    scheduler = Scheduler(spec, num_blocks, max_in_flight=stages, async_scheduling=async_scheduling)
    recorder = recorder or Recorder(predicted=False)
    sequences = [
        Sequence(
            Request(i, arrivals[i] if arrivals else 0.0, len(prompt), counts[i]),
            prompt,
            sampling[i] if sampling else GREEDY,
            stop[i] if stop else frozenset(),
        )
        for i, prompt in enumerate(prompts)
    ]
    driver = Driver(scheduler, executor, recorder, **settings)
    served = Served(driver, recorder, sequences)

    def note(batch: Batch, result: Result) -> None:
        served.batches.append(batch)
        served.results.append(result)
        for request in batch.sampled:
            served.sampled.append(request.id)
            served.lengths.append(len(sequences[request.id].tokens))
        if on_result is not None:
            on_result(served)

    driver.on_result = note
    driver.run(sequences)
    recorder.close()
    scheduler.kv_cache.check_integrity([])
    assert scheduler.kv_cache.num_used == 0
    return served


def assert_varied(served: Served) -> None:
    """Chunks that don't divide their prompts, decodes and prefills in one batch, and preemptions."""
    assert any(batch.decodes and batch.chunks for batch in served.batches)
    chunks = {chunk for batch in served.batches for _, chunk in batch.chunks}
    assert any(prompt % chunk for prompt, _ in LENGTHS for chunk in chunks if chunk < prompt)
    assert served.driver.scheduler.recomputed_tokens > 0
