"""How fast the engine is on this machine, held against what the machine can do, measured in the same run.

Random weights in the shapes of Llama-3-8B on a GPU, or of a small model on a CPU. Reported are
- an iteration of decodes, over its floor: the bytes of the weights and of the batch's keys and values over the
  bandwidth of a copy;
- the FLOP/s of a prompt, over those of a square matrix product;
- the share of the time that the GPU works while the driver serves 64 sequences;
- output tokens/s beside those of transformers' continuous batching on the same requests.

    PYTHONPATH=. python benchmarks/engine_speed.py                       # on a GPU some minutes, on a CPU less than one
    PYTHONPATH=. python benchmarks/engine_speed.py --memory-growth       # and 10,000 iterations: does memory grow?

Needs torch, numpy and (for the comparison) transformers; nothing else of what Windtunnel needs.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from engine.executors.start import start
from engine.results.recorder import Recorder
from engine.runtime.driver import Driver
from engine.runtime.engine_spec import EngineSpec
from engine.runtime.executor import LAST_SAMPLED, Executor, NewBlocks, RankTime, Result, Step
from engine.runtime.sequences import Sequence
from engine.scheduling.policies import resolve
from engine.scheduling.request import Batch, Request
from engine.scheduling.scheduler import Scheduler
from engine.specs import DTYPES, ModelSpec, SchedulerSpec, catalog
from engine.specs.memory import GIB, weight_bytes

WARM_UP, MEASURED = 10, 50  # iterations of each kind
PROMPT_WARM_UP, PROMPT_MEASURED = 3, 7
BUSY_BATCH = 64
LAUNCH_S = 3e-6  # after a kernel, until the next is under way: a longer gap is waiting
DECODE_TARGET, PREFILL_TARGET, BUSY_TARGET = 0.8, 0.7, 0.95
DECODE_TARGET_UP_TO, PREFILL_TARGET_AT = 64, 2048  # batch size; tokens
GROWTH_ITERATIONS, GROWTH_WARM_UP = 10_000, 1_000
SMALL = ModelSpec(name="small", model_type="llama", num_layers=4, hidden_size=512, intermediate_size=1408,
                  num_attention_heads=8, num_key_value_heads=2, head_dim=64, vocab_size=8192,
                  max_position_embeddings=8192)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is measured: batch sizes of decodes, tokens that each has in the cache, lengths of prompts."""

    model: ModelSpec
    device: str
    dtype: str
    batches: tuple[int, ...]
    context: int
    prompts: tuple[int, ...]
    requests: tuple[int, int, int]  # of the comparison: how many, prompt and output tokens of each
    block_size: int
    attention_backend: str | None

    @property
    def max_num_seqs(self) -> int:
        return max(*self.batches, BUSY_BATCH)

    @property
    def max_model_len(self) -> int:
        return max(*self.prompts, self.context + WARM_UP + 2 * MEASURED, sum(self.requests[1:]))

    @property
    def max_batch_tokens(self) -> int:
        return max(*self.prompts, self.max_num_seqs)

    def engine_spec(self) -> EngineSpec:
        return EngineSpec(
            model=self.model,
            folder=None,
            device="cuda" if self.device == "cuda" else "cpu",
            max_num_seqs=self.max_num_seqs,
            max_model_len=self.max_model_len,
            max_batch_tokens=self.max_batch_tokens,
            block_size=self.block_size,
            attention_backend=self.attention_backend,
            cuda_graphs=tuple(sorted({*self.batches, BUSY_BATCH})),
        )

    def scheduler_spec(self) -> SchedulerSpec:
        spec = SchedulerSpec(
            max_num_batched_tokens=self.max_batch_tokens,
            max_num_seqs=self.max_num_seqs,
            max_model_len=self.max_model_len,
            block_size=self.block_size,
        )
        return resolve(spec, self.max_model_len)


# -- arithmetic --------------------------------------------------------------------------------------------------------


def decode_bytes(model: ModelSpec, batch: int, context: int) -> int:
    """Bytes that an iteration of `batch` decodes must read: every matrix, and the keys and values of its tokens."""
    return model.matmul_parameters * model.weight_itemsize + batch * context * model.kv_bytes_per_token


def prompt_flops(model: ModelSpec, tokens: int) -> int:
    """FLOPs of a prompt: each token attends to those up to itself, and only the last one's logits are computed."""
    head = 2 * model.vocab_size * model.hidden_size
    window = model.sliding_window or tokens
    attended = sum(min(position, window) for position in range(1, tokens + 1))
    per_token = 2 * model.matmul_parameters - head
    return tokens * per_token + head + 4 * attended * model.q_size * model.num_layers


def busy(intervals: Iterable[tuple[float, float]]) -> float:
    """Time that is covered by the intervals (start, end), however they overlap."""
    covered, reached = 0.0, -float("inf")
    for begin, end in sorted(intervals):
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered


# -- the machine -------------------------------------------------------------------------------------------------------


def median_time(work: Callable[[], object], device: str, repeats: int = 10) -> float:
    """Seconds of one call: median of several, after some that warm up."""
    times = []
    for _ in range(3 + repeats):
        if device == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
            times.append(float(begin.elapsed_time(end)) / 1e3)
        else:
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
    return statistics.median(times[3:])


def copy_bandwidth(device: str) -> float:
    """Bytes/s, read and written, of a copy inside the device's memory."""
    size = min(4 * GIB, torch.cuda.mem_get_info()[0] // 4) if device == "cuda" else GIB // 4
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_time(lambda: target.copy_(source), device)


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of the product of two square matrices of random numbers."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, dtype=torch.float32, device=device).to(dtype) for _ in range(2))
    # long enough that the GPU's clock is what a long prompt gets
    return 2 * size**3 / median_time(lambda: a @ b, device, repeats=300 if device == "cuda" else 10)


# -- steps by hand -----------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """Runs steps on an executor, two in flight as with async scheduling."""

    case: Case
    executor: Executor
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    number: int = 0

    def run(self, steps: Iterable[Step]) -> list[RankTime]:
        """When each step was computed."""
        times, in_flight = [], 0
        for step in steps:
            self.executor.launch(step)
            in_flight += 1
            if in_flight == 2:
                times.append(self._wait())
                in_flight -= 1
        return [*times, *(self._wait() for _ in range(in_flight))]

    def _wait(self) -> RankTime:
        result = self.executor.wait(None)
        assert result is not None
        return result.times[0]

    def prompts(self, rows: Iterable[int], tokens: int, room: int) -> Iterator[Step]:
        """Whole prompts, as many in a batch as go in; each row gets KV blocks for `room` tokens, of its own."""
        blocks = -(-room // self.case.block_size)
        at_once = max(1, self.case.max_batch_tokens // tokens)
        left = list(rows)
        while left:
            some, left = np.array(left[:at_once], dtype=np.int32), left[at_once:]
            new = NewBlocks(
                np.repeat(some, blocks),
                np.tile(np.arange(blocks, dtype=np.int32), len(some)),
                (some[:, None] * blocks + np.arange(blocks, dtype=np.int32)).ravel().astype(np.int32),
            )
            ids = self.rng.integers(0, self.case.model.vocab_size, len(some) * tokens).astype(np.int32)
            yield self._step(0, some, some * 0, np.full(len(some), tokens, dtype=np.int32), ids, new)

    def decodes(self, batch: int, context: int, count: int) -> Iterator[Step]:
        """The same sequences, rows 0 .. batch - 1, `count` tokens on from `context` tokens in the cache."""
        rows = np.arange(batch, dtype=np.int32)
        ones, last = np.ones(batch, dtype=np.int32), np.full(batch, LAST_SAMPLED, dtype=np.int32)
        none = NewBlocks(*(np.empty(0, dtype=np.int32),) * 3)
        for i in range(count):
            yield self._step(batch, rows, np.full(batch, context + i, dtype=np.int32), ones, last, none)

    def _step(self, decodes: int, rows: Any, starts: Any, chunks: Any, tokens: Any, new: NewBlocks) -> Step:
        self.number += 1
        every = np.arange(len(rows), dtype=np.int32)
        return Step(self.number, 0.0, decodes, rows, starts, chunks, tokens, new, every, None)

    @property
    def room(self) -> int:
        """Tokens that a row of the decodes needs."""
        return self.case.context + WARM_UP + MEASURED + 1

    def rows_with_room(self) -> int:
        return self.executor.num_blocks // -(-self.room // self.case.block_size)


def iteration_s(times: list[RankTime], warm_up: int) -> float:
    """Seconds from one step's end to the next one's: the median, the host's part and idle gaps included."""
    ends = [each.end for each in times[warm_up:]]
    return statistics.median(after - before for before, after in pairwise(ends))


# -- what is measured --------------------------------------------------------------------------------------------------


def measure_decodes(bench: Bench, bandwidth: float) -> list[dict[str, float]]:
    case, rows = bench.case, []
    batches = [batch for batch in case.batches if batch <= bench.rows_with_room()]
    bench.run(bench.prompts(range(max(batches)), case.context, bench.room))
    for batch in batches:
        seconds = iteration_s(bench.run(bench.decodes(batch, case.context, WARM_UP + MEASURED)), WARM_UP)
        floor = decode_bytes(case.model, batch, case.context + WARM_UP + MEASURED // 2) / bandwidth
        rows.append({"batch": batch, "iteration_ms": seconds * 1e3, "floor_ms": floor * 1e3, "share": floor / seconds})
    return rows


def measure_prompts(bench: Bench, rate: float) -> list[dict[str, float]]:
    rows = []
    for tokens in bench.case.prompts:
        steps = (step for _ in range(PROMPT_WARM_UP + PROMPT_MEASURED) for step in bench.prompts([0], tokens, tokens))
        seconds = iteration_s(bench.run(steps), PROMPT_WARM_UP)
        flops = prompt_flops(bench.case.model, tokens) / seconds
        rows.append({"tokens": tokens, "iteration_ms": seconds * 1e3, "flops": flops, "share": flops / rate})
    return rows


def measure_busy(bench: Bench) -> dict[str, float] | None:
    """The device's work in an iteration of 64 decodes, launches included, over what it takes with the driver."""
    case = bench.case
    if bench.rows_with_room() < BUSY_BATCH:
        return None
    bench.run(bench.prompts(range(BUSY_BATCH), case.context, bench.room))
    bench.run(bench.decodes(BUSY_BATCH, case.context, WARM_UP))
    steps = bench.decodes(BUSY_BATCH, case.context + WARM_UP, MEASURED)
    if case.device == "cuda":
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            bench.run(steps)
            torch.cuda.synchronize()
        kernels = [event.time_range for event in profiler.events() if event.device_type.name == "CUDA"]
        work = busy((each.start / 1e6, each.end / 1e6 + LAUNCH_S) for each in kernels) / MEASURED
    else:
        work = statistics.median(each.end - each.start for each in bench.run(steps))
    ends = []

    def on_result(batch: Batch, result: Result) -> None:
        if len(batch.decodes) == BUSY_BATCH and not batch.chunks:
            ends.append(result.times[0])

    serve(case, bench.executor, BUSY_BATCH, case.context, WARM_UP + MEASURED, on_result)
    seconds = iteration_s(ends, WARM_UP)
    return {"batch": BUSY_BATCH, "work_ms": work * 1e3, "iteration_ms": seconds * 1e3, "share": work / seconds}


def serve(
    case: Case,
    executor: Executor,
    count: int,
    prompt: int,
    output: int,
    on_result: Callable[[Batch, Result], None] | None = None,
) -> float:
    """Serve `count` requests that are all there at once; seconds it took."""
    rng = np.random.default_rng(0)
    scheduler = Scheduler(
        case.scheduler_spec(),
        executor.num_blocks,
        sliding_window=case.model.sliding_window,
        async_scheduling=case.device == "cuda",
    )
    recorder = Recorder(predicted=False)
    driver = Driver(scheduler, executor, recorder, on_result=on_result)
    sequences = [
        Sequence(Request(i, 0.0, prompt, output), rng.integers(0, case.model.vocab_size, prompt).tolist())
        for i in range(count)
    ]
    started = time.perf_counter()
    driver.run(sequences)
    return time.perf_counter() - started


def measure_throughput(case: Case, executor: Executor) -> float:
    """Output tokens/s of the engine on the requests of the comparison."""
    count, prompt, output = case.requests
    serve(case, executor, min(count, 8), prompt, 4)
    return count * output / serve(case, executor, count, prompt, output)


def measure_transformers(case: Case) -> float | str:
    """Output tokens/s of transformers' continuous batching on the same requests, or why there is no such number."""
    try:
        from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig
    except ImportError as error:
        return f"transformers can't be imported: {error}"
    spec = case.model
    if spec.model_type not in ("llama", "mistral"):
        return f"{spec.model_type} is not compared"
    config = LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_attention_heads,
        num_key_value_heads=spec.num_key_value_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.max_position_embeddings,
        tie_word_embeddings=spec.tie_word_embeddings,
    )
    count, prompt, output = case.requests
    rng = np.random.default_rng(0)

    def prompts(number: int) -> list[list[int]]:
        return [rng.integers(3, spec.vocab_size, prompt).tolist() for _ in range(number)]

    try:
        with torch.device(case.device):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.dtype)).eval()
        seconds = 0.0
        wanted = GenerationConfig(max_new_tokens=output, do_sample=False, eos_token_id=-1, pad_token_id=0)
        for _ in range(2):  # first for what is slow only once: its cache is made and its graphs are captured in a call
            inputs = prompts(count)  # new ones, as it shares the cache of equal prefixes
            started = time.perf_counter()
            answers = model.generate_batch(inputs=inputs, generation_config=wanted, persistent_manager=True)
            seconds = time.perf_counter() - started
            made = sum(len(answer.generated_tokens) for answer in answers.values())
            if made != count * output:
                return f"generate_batch made {made} of {count * output} tokens"
        model.destroy_cached_continuous_batching_manager()
    except Exception as error:  # whatever it is, the engine's own numbers stand
        return f"generate_batch failed: {type(error).__name__}: {error}".splitlines()[0]
    return count * output / seconds


def measure_growth(case: Case, executor: Executor) -> dict[str, float]:
    """Bytes that memory grew by from the 1,000th to the 10,000th iteration of requests that come and go."""
    seen: list[tuple[int, int]] = []
    iterations = 0

    def on_result(batch: Batch, result: Result) -> None:
        nonlocal iterations
        iterations += 1
        if iterations in (GROWTH_WARM_UP, GROWTH_ITERATIONS):
            device = torch.cuda.memory_reserved() if case.device == "cuda" else 0
            seen.append((device, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))

    while iterations < GROWTH_ITERATIONS:
        serve(case, executor, 4 * BUSY_BATCH, min(64, case.context), 64, on_result)
    (device_before, host_before), (device_after, host_after) = seen
    return {
        "iterations": GROWTH_ITERATIONS - GROWTH_WARM_UP,
        "device_bytes": device_after - device_before,
        "host_bytes": host_after - host_before,
    }


# -- the report --------------------------------------------------------------------------------------------------------


def verdict(name: str, share: float, target: float) -> str:
    return f"{'met' if share >= target else 'MISSED'}: {name} {share:.1%}, target {target:.0%}"


def report(case: Case, *, compare: bool, growth: bool) -> dict[str, Any]:
    """Measure everything, printing as it comes."""
    bandwidth = copy_bandwidth(case.device)
    rate = matmul_rate(case.device, getattr(torch, case.dtype))
    started = time.perf_counter()
    executor = start(case.engine_spec(), "in_process")
    bench = Bench(case, executor)
    found: dict[str, Any] = {
        "hardware": executor.hardware,
        "torch": torch.__version__,
        "model": case.model.name,
        "dtype": case.dtype,
        "attention_backend": executor.attention_backend,
        "block_size": case.block_size,
        "num_gpu_blocks": executor.num_blocks,
        "start_s": time.perf_counter() - started,
        "copy_bytes_per_s": bandwidth,
        "matmul_flops": rate,
        "context": case.context,
    }
    print(
        f"{executor.hardware}, torch {torch.__version__}; {case.model.name} in {case.dtype}, "
        f"{executor.attention_backend} attention, blocks of {case.block_size} tokens; "
        f"{executor.num_blocks * case.block_size:,} tokens of KV cache; started in {found['start_s']:.1f} s"
    )
    print(f"copy {bandwidth / 1e9:,.0f} GB/s, matrix product {rate / 1e12:,.2f} TFLOP/s\n", flush=True)

    found["decode"] = measure_decodes(bench, bandwidth)
    print(f"{'decodes':>8}{'iteration (ms)':>16}{'floor (ms)':>12}{'of the floor':>14}   context {case.context} tokens")
    for row in found["decode"]:
        print(f"{row['batch']:>8}{row['iteration_ms']:>16.3f}{row['floor_ms']:>12.3f}{row['share']:>14.1%}")

    found["prefill"] = measure_prompts(bench, rate)
    print(f"\n{'prompt':>8}{'iteration (ms)':>16}{'TFLOP/s':>12}{'of the product':>16}", flush=True)
    for row in found["prefill"]:
        print(f"{row['tokens']:>8}{row['iteration_ms']:>16.3f}{row['flops'] / 1e12:>12.2f}{row['share']:>16.1%}")

    found["busy"] = measure_busy(bench)
    if found["busy"] is not None:
        row = found["busy"]
        print(f"\n{BUSY_BATCH} decodes with the driver: {row['iteration_ms']:.3f} ms an iteration, of which the device "
              f"works {row['work_ms']:.3f} ms: busy {row['share']:.1%} of the time", flush=True)  # fmt: skip

    count, prompt, output = case.requests
    found["requests"] = {"count": count, "prompt_tokens": prompt, "output_tokens": output}
    found["engine_tokens_per_s"] = measure_throughput(case, executor)
    print(f"\n{count} requests of {prompt} + {output} tokens: {found['engine_tokens_per_s']:,.0f} output tokens/s")
    if growth:
        found["growth"] = row = measure_growth(case, executor)
        print(f"memory after {row['iterations']:,} more iterations: device {row['device_bytes'] / GIB:+.3f} GiB, "
              f"host {row['host_bytes'] / GIB:+.3f} GiB", flush=True)  # fmt: skip
    if compare:
        executor.close()
        del bench, executor
        gc.collect()
        if case.device == "cuda":
            torch.cuda.empty_cache()
        answer = measure_transformers(case)
        found["transformers_tokens_per_s"] = answer
        if isinstance(answer, str):
            print(f"transformers: no number ({answer})")
        else:
            ratio = found["engine_tokens_per_s"] / answer
            print(
                f"transformers' generate_batch: {answer:,.0f} output tokens/s; the engine makes {ratio:.2f} times that"
            )
    found["targets"] = targets(found) if case.device == "cuda" else []
    print("\n" + ("\n".join(found["targets"]) or "the engine's targets are for a GPU: none is judged here"))
    return found


def targets(found: dict[str, Any]) -> list[str]:
    """Which targets are met: the engine's, for a GPU."""
    lines = [
        verdict(f"{row['batch']} decodes over the bandwidth floor", row["share"], DECODE_TARGET)
        for row in found["decode"]
        if row["batch"] <= DECODE_TARGET_UP_TO
    ]
    lines += [
        verdict(f"a prompt of {row['tokens']} tokens over the matrix product", row["share"], PREFILL_TARGET)
        for row in found["prefill"]
        if row["tokens"] == PREFILL_TARGET_AT
    ]
    if found["busy"] is not None:
        lines.append(verdict(f"busy at {BUSY_BATCH} decodes", found["busy"]["share"], BUSY_TARGET))
    return lines


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def parse(arguments: list[str] | None = None) -> tuple[Case, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", help="a known name or a config.json; default: Llama-3-8B, on a CPU a small one")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16, on a CPU float32")
    parser.add_argument("--batches", type=numbers, help="batch sizes of the decodes, such as 1,8,64")
    parser.add_argument("--context", type=int, help="tokens that each decode has in the cache")
    parser.add_argument("--prompts", type=numbers, help="lengths of the prompts (tokens)")
    parser.add_argument("--requests", type=numbers, help="of the comparison: count,prompt tokens,output tokens")
    parser.add_argument("--block-size", type=int, help="tokens in a KV block; default 16, for flash-attn 256")
    parser.add_argument("--attention-backend", help="default: the best that is installed")
    parser.add_argument(
        "--transformers",
        action=argparse.BooleanOptionalAction,
        help="the comparison; default: on a GPU, where it is fast",
    )
    parser.add_argument(
        "--memory-growth", action="store_true", help="also run 10,000 iterations and look at the memory"
    )
    parser.add_argument("--json", action="store_true", help="print every number as JSON, as the last line")
    given = parser.parse_args(arguments)
    gpu = given.device == "cuda"
    dtype = given.dtype or ("bfloat16" if gpu else "float32")
    model = catalog.model(given.model) if given.model else catalog.model("Meta-Llama-3-8B") if gpu else SMALL
    case = Case(
        model=model.in_dtype(dtype),
        device=given.device,
        dtype=dtype,
        batches=given.batches or (1, 2, 4, 8, 16, 32, 64, 128, 256),
        context=given.context or (1024 if gpu else 64),
        prompts=given.prompts or ((512, 1024, 2048, 4096, 8192) if gpu else (512, 1024, 2048)),
        requests=given.requests or ((128, 256, 128) if gpu else (16, 32, 16)),
        block_size=given.block_size or (256 if gpu and find_spec("flash_attn") else 16),
        attention_backend=given.attention_backend,
    )
    return case, given


def main(arguments: list[str] | None = None) -> None:
    case, given = parse(arguments)
    print(f"weights {weight_bytes(case.model, case.engine_spec().parallel, 0) / GIB:.2f} GiB, of which a decode reads "
          f"{decode_bytes(case.model, 0, 0) / GIB:.2f} GiB")  # fmt: skip
    found = report(
        case,
        compare=case.device == "cuda" if given.transformers is None else given.transformers,
        growth=given.memory_growth,
    )
    if given.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
