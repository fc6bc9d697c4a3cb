"""Replays recorded schedules of vLLM V1 through our scheduler and says where they first differ.

A recording is of vLLM's own scheduler in virtual time, where a law gives each batch its duration in whole nanoseconds:
8 ms + 60 us a token + 65 ns a context token of the decodes. The folder has VERSION/CASE.json (settings),
VERSION/CASE.steps.jsonl.xz and VERSION/CASE.requests.jsonl.xz (every batch; first and last token of each request) and
workloads/NAME.jsonl.xz. Here the engine's own driver runs the same requests in virtual time, synchronous or
asynchronous as recorded; compared are each step's entries (request, tokens, tokens before) in their order, who was
preempted, free blocks, running and waiting requests and the time, and each request's first and last token and hits.

    python benchmarks/vllm_reference.py FOLDER                  # a line a case, and how many are equal
    python benchmarks/vllm_reference.py FOLDER --case d_mixed

Exits 1 unless there are cases and all are equal.
"""

from __future__ import annotations

import argparse
import json
import lzma
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from engine.results.recorder import Recorder
from engine.runtime.driver import Driver, VirtualClock
from engine.runtime.sequences import Sequence
from engine.scheduling.policies import resolve
from engine.scheduling.policies.vllm import VERSIONS
from engine.scheduling.request import Batch, BatchShape, Request
from engine.scheduling.scheduler import Scheduler
from engine.specs import SchedulerSpec
from simulator.predicted_executor import PredictedExecutor
from simulator.predictor.base import RuntimePredictor

TIME_TOLERANCE_NS = 1000
SETTINGS = {"vllm", "case", "workload", "max_num_batched_tokens", "max_num_seqs", "num_gpu_blocks", "block_size",
            "enable_prefix_caching", "async_scheduling", "scheduler", "max_model_len"}  # fmt: skip
RESULTS = {"requests", "steps", "preemptions", "hit_tokens", "prompt_tokens", "resume_hit_tokens", "scheduled_tokens",
           "min_free", "max_running", "max_waiting", "end_ns", "ttft_p50_ns", "ttft_p99_ns", "sha256",
           "same_as"}  # fmt: skip
OPTIONS = {"long_prefill_token_threshold", "long_prefill_token_threshold_adaptive", "scheduler_reserve_full_isl",
           "watermark", "policy"}  # fmt: skip
RENAMED = {"policy": "scheduling_policy"}

Row = dict[str, Any]


def law(tokens: int, context: int) -> int:
    """Nanoseconds of a batch."""
    return 8_000_000 + 60_000 * tokens + 65 * context


def read_lines(path: Path) -> list[Any]:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_steps(path: Path, prompts: list[int], asynchronous: bool) -> list[Row]:
    """The recorded steps in full; what follows from the step before is left out in the file."""
    rows: list[Row] = []
    computed: dict[int, int] = {}
    end, entries = 0, []
    for short in read_lines(path):
        before = rows[-1] if rows else {}
        entries = short.get("b", entries)
        batch = []
        for entry in entries:
            number, count, start = entry[:3] if isinstance(entry, list) else (entry, 1, computed[entry])
            batch.append((number, count, start))
            computed[number] = start + count
        time = short.get("t", before["start"] if asynchronous and before else end)
        context = sum(start for number, count, start in batch if count == 1 and start >= prompts[number])
        start_ns = max(time, end)
        end = start_ns + law(sum(count for _, count, _ in batch), context)
        rows.append({"t": time, "start": start_ns, "b": batch, "pre": short.get("pre", []),
                     **{key: short.get(key, before.get(key)) for key in ("free", "run", "wait")}})  # fmt: skip
    return rows


class Durations(RuntimePredictor):
    """The law's nanoseconds of each batch in turn, worked out when it is scheduled."""

    def __init__(self) -> None:
        self.coming: list[float] = []

    def stage_time(self, shape: BatchShape, stage: int) -> float:
        return self.coming.pop(0)


def scheduler_of(case: Row) -> Scheduler:
    """Our scheduler with a case's settings. Raises ValueError for one that we do not know."""
    if unknown := (set(case) - SETTINGS - RESULTS) | (set(case["scheduler"]) - OPTIONS):
        raise ValueError(f"unsupported settings: {', '.join(sorted(unknown))}")
    release = tuple(int(part) for part in case["vllm"].split(".")[:2])
    known = [version for version in VERSIONS if tuple(map(int, version.split("."))) <= release]
    if not known:
        raise ValueError(f"vLLM {case['vllm']} is older than the rules that are known ({VERSIONS[0]})")
    spec = SchedulerSpec(
        policy="vllm",
        vllm_version=known[-1],
        max_num_batched_tokens=case["max_num_batched_tokens"],
        max_num_seqs=case["max_num_seqs"],
        max_model_len=case["max_model_len"],
        block_size=case["block_size"],
        enable_prefix_caching=case["enable_prefix_caching"],
        **{"watermark": 0.0, **{RENAMED.get(name, name): value for name, value in case["scheduler"].items()}},
    )
    blocks = case["num_gpu_blocks"] - 1  # one of vLLM's is never handed out
    return Scheduler(resolve(spec, case["max_model_len"]), blocks, async_scheduling=case["async_scheduling"])


def requests_of(workload: list[Row]) -> list[Request]:
    """The recorded requests, times in nanoseconds."""
    requests = []
    for row in workload:
        hashes = [first + i for first, length in row["hash_runs"] for i in range(length)]
        lengths = row["prompt"], row["output"]
        requests.append(Request(row["id"], float(row["arrival_ns"]), *lengths, hashes, row.get("priority", 0)))
    return sorted(requests, key=lambda request: (request.arrived_at, request.id))


def replay(case: Row, workload: list[Row]) -> tuple[list[Row], dict[int, Row]]:
    """Our steps, and each request's first and last token (ns) and admissions ([step, hit tokens])."""
    scheduler, recorder, clock, predictor = scheduler_of(case), Recorder(), VirtualClock(), Durations()
    driver = Driver(scheduler, PredictedExecutor(predictor, 0, clock=clock), recorder, clock=clock)
    steps: list[Row] = []
    admissions: dict[int, list[list[int]]] = {row["id"]: [] for row in workload}
    schedule, admit = scheduler.schedule, scheduler.admit

    def noting() -> Batch | None:
        batch = schedule()
        if batch is not None:
            counted = scheduler.max_in_flight > 1  # among the tokens in flight already
            entries = [(r.id, tokens, r.start - tokens * counted) for r, tokens in in_order(batch)]
            context = sum(
                start for (_, count, start), (r, _) in zip(entries, in_order(batch), strict=True)
                if count == 1 and start >= r.prompt_tokens
            )  # fmt: skip
            predictor.coming.append(float(law(batch.shape.num_tokens, context)))
            steps.append({"t": driver.now, "b": entries, "pre": [r.id for r in scheduler.preempted],
                          "free": scheduler.kv_cache.num_free, "run": len(scheduler.running),
                          "wait": len(scheduler.waiting)})  # fmt: skip
        return batch

    def admitting(request: Request, *arguments: Any) -> bool:
        admitted = admit(request, *arguments)
        if admitted:
            admissions[request.id].append([len(steps), request.num_computed_tokens])
        return admitted

    scheduler.schedule, scheduler.admit = noting, admitting  # type: ignore[method-assign, assignment]
    driver.run(Sequence(request, [0] * request.prompt_tokens) for request in requests_of(workload))
    recorder.close()
    scheduler.kv_cache.check_integrity([])
    table = recorder.requests()
    # a recording has the preemptions of calls that gave a batch; where two are in flight, others may give none
    preemptions = Counter(number for step in steps for number in step["pre"])
    columns = ("request_id", "first_token_s", "last_token_s")
    rows = {
        int(number): {
            "first_ns": first,
            "last_ns": last,
            "preemptions": preemptions[int(number)],
            "admissions": admissions[int(number)],
        }
        for number, first, last in zip(*(table[name].tolist() for name in columns), strict=True)
    }
    return steps, rows


def in_order(batch: Batch) -> list[tuple[Request, int]]:
    """The entries as vLLM has them: in the order of the running requests."""
    return sorted(batch.entries, key=lambda entry: entry[0].order)


def difference(truth: list[Row], ours: list[Row]) -> str | None:
    """The first step that differs, in words."""
    for number, (a, b) in enumerate(zip(truth, ours, strict=False)):
        if list(a["b"]) != list(b["b"]):
            only = (
                [entry for entry in a["b"] if entry not in b["b"]],
                [entry for entry in b["b"] if entry not in a["b"]],
            )
            what = f"vLLM's alone {only[0][:4]}, ours alone {only[1][:4]}" if any(only) else "another order"
            return f"step {number}: entries differ: {what}"
        for key in ("pre", "free", "run", "wait"):
            if a[key] != b[key]:
                return f"step {number}: {key} is {a[key]} in vLLM, {b[key]} here"
        if abs(a["t"] - b["t"]) > TIME_TOLERANCE_NS:
            return f"step {number}: at {a['t']} ns in vLLM, {b['t']:.0f} here"
    if len(truth) != len(ours):
        return f"vLLM has {len(truth)} steps, ours {len(ours)}"
    return None


def request_difference(truth: list[Row], ours: dict[int, Row]) -> str | None:
    for row in truth:
        mine = ours.get(row["id"])
        if mine is None:
            return f"request {row['id']} did not finish"
        for key in ("first_ns", "last_ns"):
            if abs(row[key] - mine[key]) > TIME_TOLERANCE_NS:
                return f"request {row['id']}: {key} is {row[key]} in vLLM, {mine[key]:.0f} here"
        for key in ("preemptions", "admissions"):
            if row[key] != mine[key]:
                return f"request {row['id']}: {key} {row[key]} in vLLM, {mine[key]} here"
    return None


def compare(path: Path) -> tuple[str | None, int]:
    """The first difference of a case (None: it is equal) and how many steps were compared."""
    folder = path.parents[1]
    case = json.loads(path.read_text("utf-8"))
    workload = read_lines(folder / "workloads" / f"{case['workload']}.jsonl.xz")
    logs = folder / (case["same_as"] or path.parent.name)
    prompts = [row["prompt"] for row in workload]
    truth = read_steps(logs / f"{path.stem}.steps.jsonl.xz", prompts, case["async_scheduling"])
    requests = read_lines(logs / f"{path.stem}.requests.jsonl.xz")
    if not truth or not requests:
        raise ValueError("the recording is empty")
    steps, rows = replay(case, workload)
    return difference(truth, steps) or request_difference(requests, rows), len(truth)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--case", help="only the cases of this name, of every version")
    given = parser.parse_args(arguments)
    paths = [path for path in sorted(given.folder.glob("*/*.json")) if given.case in (None, path.stem)]
    equal = 0
    for path in paths:
        name = f"{path.parent.name} {path.stem}"
        try:
            found, steps = compare(path)
        except (ValueError, KeyError, OSError, EOFError, lzma.LZMAError, RuntimeError, AssertionError) as error:
            print(f"{name}: NOT COMPARED: {type(error).__name__}: {error}", flush=True)
            continue
        equal += found is None
        print(f"{name}: {steps:,} steps, {'equal' if found is None else f'DIFFERENT: {found}'}", flush=True)
    print(f"{equal} of {len(paths)} equal")
    return 0 if paths and equal == len(paths) else 1


if __name__ == "__main__":
    sys.exit(main())
