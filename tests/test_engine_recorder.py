"""The recorder: rows against what happened, written down naively, however often it flushes and wherever it writes."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.results.metrics import Gaps
from engine.results.recorder import ITERATION_COLUMNS, Recorder
from engine.results.tables import to_arrow
from engine.scheduling.policies import resolve
from engine.scheduling.request import Request
from engine.scheduling.scheduler import Scheduler
from engine.specs import SchedulerSpec

SCHEMA = pa.schema([(name, pa.from_numpy_dtype(kind)) for name, kind in ITERATION_COLUMNS.items()])


def kept(recorder: Recorder) -> pa.Table:
    return to_arrow(recorder.iterations_kept())


def new_scheduler() -> Scheduler:
    spec = resolve(SchedulerSpec(max_num_batched_tokens=16, max_num_seqs=8, block_size=2, watermark=0.0), 48)
    return Scheduler(spec, 60)


def drive(recorder: Recorder, seed: int = 0, count: int = 60) -> tuple[list[Request], list[dict[str, object]]]:
    """A run with preemptions and repeats on a random clock; what was reported, kept naively."""
    rng = np.random.default_rng(seed)
    scheduler = new_scheduler()
    requests = [
        Request(i, float(i) / 8, int(rng.integers(1, 24)), int(rng.integers(1, 24)) if i % 7 else 1)
        for i in range(count)
    ]
    to_come, rows, now, left = list(requests), [], 0.0, count
    while left:
        while to_come and (to_come[0].arrived_at <= now or not (scheduler.running or scheduler.waiting)):
            now = max(now, to_come[0].arrived_at)
            scheduler.add(to_come.pop(0))
        batch = scheduler.schedule()
        assert batch is not None
        recorder.scheduled(batch, now)
        runs = int(rng.integers(1, batch.repeats + 1))
        running, waiting = len(scheduler.running), len(scheduler.waiting)
        durations = rng.uniform(0.01, 0.4, runs).tolist()
        starts, times = [], []
        for duration in durations:
            starts.append(now)
            now += duration
            times.append(now)
        before = {r.id: list(r.token_times) for r in requests}
        longest = recorder.completed(batch, times)
        stopped = scheduler.commit(batch, repeats=runs)[0]
        recorder.iterations(
            2, 0, starts, durations, batch, [batch.kv_blocks] * runs, running, waiting, longest, bool(rng.integers(2))
        )
        for i, time in enumerate(times):
            gaps = [0.0]  # that a token at this time ended
            for request in requests:
                if time in request.token_times:
                    at = request.token_times.index(time)
                    gaps += [time - request.token_times[at - 1]] if at else []
                    assert list(request.token_times[: len(before[request.id])]) == before[request.id]
            rows.append(
                {
                    "start_s": starts[i],
                    "duration_s": durations[i],
                    "num_tokens": len(batch.decodes) + sum(chunk for _, chunk in batch.chunks),
                    "num_decodes": len(batch.decodes),
                    "num_prefills": len(batch.chunks),
                    "num_running": running,
                    "num_waiting": waiting,
                    "max_tbt_s": max(gaps),
                }
            )
        for request in stopped:
            recorder.finished(request, replica=2)
        left -= len(stopped)
    recorder.close()
    assert scheduler.recomputed_tokens > 0
    return requests, rows


def test_every_request_and_every_batch_gets_its_row() -> None:
    recorder = Recorder(tbt_percentiles=(50.0, 99.0))
    requests, rows = drive(recorder)
    table = kept(recorder)
    assert table.schema == SCHEMA
    assert table.num_rows == len(rows) == recorder.num_batches
    assert any(row["num_prefills"] for row in rows)
    for name in rows[0]:
        assert table[name].to_pylist() == pytest.approx([row[name] for row in rows]), name
    assert set(table["replica"].to_pylist()) == {2}
    assert set(table["predicted"].to_pylist()) == {True}
    assert set(table["in_range"].to_pylist()) == {True, False}

    columns = recorder.requests()
    assert sorted(columns["request_id"]) == list(range(len(requests)))
    every_gap: list[float] = []
    for row, who in enumerate(columns["request_id"].tolist()):
        request = requests[who]
        tokens = list(request.token_times)
        own = [after - before for before, after in pairwise(tokens)]
        every_gap += own
        expected = {
            "arrived_s": request.arrived_at,
            "scheduled_s": request.scheduled_at,
            "first_token_s": tokens[0],
            "last_token_s": tokens[-1],
            "prompt_tokens": request.prompt_tokens,
            "output_tokens": request.output_tokens,
            "preemptions": request.preemptions,
            "max_tbt_s": max(own, default=np.nan),
            "p50_tbt_s": np.percentile(own, 50) if own else np.nan,
            "p99_tbt_s": np.percentile(own, 99) if own else np.nan,
            "replica": 2,
        }
        assert {name: columns[name][row] for name in expected} == pytest.approx(expected, nan_ok=True)
        assert request.arrived_at <= expected["scheduled_s"] < expected["first_token_s"]
    assert columns["preemptions"].sum() > 0
    assert recorder.gaps.count == len(every_gap)
    naive = Gaps()
    naive.add(np.array(every_gap))
    assert recorder.gaps.statistics([50.0, 99.0]) == pytest.approx(naive.statistics([50.0, 99.0]))


@pytest.mark.parametrize("block_rows", [1, 7, 100])
def test_flushing_often_gives_the_same_tables(block_rows: int) -> None:
    once, often = Recorder(tbt_percentiles=(90.0,)), Recorder(tbt_percentiles=(90.0,), block_rows=block_rows)
    drive(once)
    drive(often)
    assert len(often._iteration_table.blocks) > len(once._iteration_table.blocks) == 1
    assert kept(often).combine_chunks().equals(kept(once).combine_chunks())
    assert once.requests().keys() == often.requests().keys()
    for name, column in once.requests().items():
        np.testing.assert_array_equal(often.requests()[name], column, err_msg=name)
        assert often.requests()[name].dtype == column.dtype
    assert often.num_batches == once.num_batches
    assert often.gaps.statistics([50.0]) == pytest.approx(once.gaps.statistics([50.0]))


@pytest.mark.parametrize("block_rows", [7, 1 << 16])
def test_a_folder_gets_the_tables_that_memory_would_have(tmp_path: Path, block_rows: int) -> None:
    memory, disk = Recorder(tbt_percentiles=(90.0,)), Recorder(tmp_path, (90.0,), block_rows=block_rows)
    drive(memory)
    drive(disk)
    assert {path.name for path in tmp_path.iterdir()} == {"requests.parquet", "iterations.parquet"}
    iterations = pq.read_table(tmp_path / "iterations.parquet")
    assert iterations.schema == SCHEMA
    assert iterations.combine_chunks().equals(kept(memory).combine_chunks())
    requests = pq.read_table(tmp_path / "requests.parquet")
    assert requests.schema == pa.table(memory.requests()).schema
    for name, column in memory.requests().items():
        np.testing.assert_array_equal(requests[name].to_numpy(), column, err_msg=name)
        np.testing.assert_array_equal(disk.requests()[name], column, err_msg=name)
    assert kept(disk).num_rows == 0  # they are on disk, and not twice


def test_the_same_run_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        drive(Recorder(tmp_path / name, block_rows=50))
    for name in ("requests.parquet", "iterations.parquet"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_measured_run_says_so() -> None:
    recorder = Recorder(predicted=False)
    drive(recorder, count=10)
    assert set(kept(recorder)["predicted"].to_pylist()) == {False}


def test_a_sketch_counts_every_gap() -> None:
    exact, sketch = Recorder(), Recorder(exact_gaps=False, block_rows=20)
    drive(exact)
    drive(sketch)
    assert sketch.gaps.count == exact.gaps.count > 0
    one, other = exact.gaps.statistics([50.0]), sketch.gaps.statistics([50.0])
    assert [other[key] for key in ("mean", "std", "max")] == pytest.approx([one[key] for key in ("mean", "std", "max")])


def test_times_keep_their_last_digit_late_in_a_run() -> None:
    """A day into a run a gap of a millisecond must still be told from one of 1.000001 ms."""
    recorder = Recorder()
    request = Request(2**40, 86_400.0, 3, 3)
    request.scheduled_at = 86_400.0
    request.token_times.extend([86_400.5, 86_400.501, 86_400.502000001])
    recorder.finished(request, 0)
    recorder.close()
    columns = recorder.requests()
    assert columns["request_id"].tolist() == [2**40]
    assert columns["last_token_s"].tolist() == [86_400.502000001]
    assert columns["max_tbt_s"][0] == pytest.approx(0.001000001, rel=1e-6)


def test_a_run_without_a_batch_has_empty_tables() -> None:
    recorder = Recorder()
    recorder.close()
    assert kept(recorder).schema == SCHEMA
    assert kept(recorder).num_rows == 0
    assert recorder.requests() == {}
