"""Loads that hang on the answers: closed loops and conversations, simulated and on the engine, prefixes cached."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_workers import FakeWorkers, VirtualTime
from hypothesis import example, given
from hypothesis import strategies as st
from random_examples import random_examples
from random_runs import assert_same, deployment, rows

from engine.errors import InputError
from engine.results.metrics import steady_window
from engine.results.recorder import Recorder, Run
from engine.results.tables import Columns
from engine.runtime.driver import Driver, VirtualClock
from engine.runtime.serve import Sender
from engine.scheduling.content import Content, own
from engine.workload.client import Client, ClientSpec
from engine.workload.workload import Workload, WorkloadSpec, make_workload
from simulator.cluster import Deployment, simulate
from simulator.predicted_executor import PredictedExecutor
from windtunnel.settings import RunConfig

LONGEST = 80  # tokens of a request in these runs


def caching(kind: Deployment, ahead: bool = False) -> Deployment:
    scheduler = replace(kind.scheduler, enable_prefix_caching=True)
    return replace(kind, replica=replace(kind.replica, scheduler=scheduler, async_scheduling=ahead))


def drive(workload: Workload, kind: Deployment) -> Run:
    recorder, clock = Recorder(), VirtualClock()
    stages = kind.parallel.pipeline_parallel_size
    executor = PredictedExecutor(kind.predictor, kind.num_kv_blocks, stages, clock=clock)
    driver = Driver(kind.new_scheduler(), executor, recorder, clock=clock)
    driver.run(Sender(workload, vocab_size=50_000, seed=1))
    recorder.close()
    return Run({}, recorder.requests(), recorder.iterations_kept())


def test_concurrent_users_replay_a_trace_as_fast_as_they_can(tmp_path: Path) -> None:
    """Without a rate a bound alone decides when a recorded request is sent, with recorded times and without."""
    for name, row in (("times", {"timestamp": 50_000.0}), ("none", {})):
        path = tmp_path / f"{name}.jsonl"
        rows_ = [
            {"input_length": 8, "output_length": 4} | {key: value * i for key, value in row.items()} for i in range(20)
        ]
        path.write_text("\n".join(map(json.dumps, rows_)))
        config = RunConfig(model="microsoft/phi-2", device="a100", trace=path, max_concurrency=2)
        result = simulate(make_workload(config.workload_spec(LONGEST)), [deployment("sarathi", 1, 60)])
        assert float(result.requests["arrived_s"].max()) < 10
    with pytest.raises(InputError, match="has no arrival times"):
        make_workload(RunConfig(model="microsoft/phi-2", device="a100", trace=path).workload_spec(LONGEST))


specs = st.builds(
    WorkloadSpec,
    lengths=st.just("uniform"),
    input_len=st.just("1:20"),
    output_len=st.just("1:12"),
    num_prompts=st.integers(1, 25),
    request_rate=st.sampled_from([5.0, 50.0, float("inf")]),
    turns=st.sampled_from([None, 3, "1:5"]),
    system_prompt_len=st.sampled_from([0, 9]),
    max_concurrency=st.sampled_from([None, 1, 3]),
    max_model_len=st.just(LONGEST),
    seed=st.integers(0, 1000),
)


@random_examples(100)
@example(  # a turn and a new conversation are sent at one time, after a batch that ends two requests
    spec=WorkloadSpec(lengths="uniform", input_len="1:20", output_len="1:12", num_prompts=13, request_rate=50.0,
                      turns=3, system_prompt_len=9, max_concurrency=3, max_model_len=LONGEST),
    policy="sarathi", stages=1, blocks=21, ahead=False, overhead=0.0, think=0.0, people=True,
)  # fmt: skip
@given(
    spec=specs,
    policy=st.sampled_from(["sarathi", "vllm", "vllm_v0", "hybrid_only"]),
    stages=st.sampled_from([1, 1, 2]),
    blocks=st.integers(21, 60),
    ahead=st.booleans(),
    overhead=st.sampled_from([0.0, 0.013]),
    think=st.sampled_from([0.0, 0.5]),
    people=st.booleans(),
)
def test_the_driver_the_fast_path_and_single_steps_agree(  # type: ignore[no-untyped-def]
    spec, policy, stages, blocks, ahead, overhead, think, people
) -> None:
    if spec.max_concurrency is not None:
        spec = replace(spec, client_overhead_s=overhead, ramp_up_s=10 * overhead)
        if people:
            spec = replace(spec, users=spec.max_concurrency, max_concurrency=None)
    if spec.turns is not None:
        spec = replace(spec, think_time_s=think)
    workload = make_workload(spec)
    kind = caching(deployment(policy, stages, blocks), ahead and stages == 1)
    fast, slow = simulate(workload, [kind]), simulate(workload, [kind], repeats=False)
    assert_same(fast, slow)
    driven = drive(workload, kind)
    orders = [np.argsort(run.requests["request_id"]) for run in (driven, fast)]
    for name, column in fast.requests.items():
        np.testing.assert_array_equal(driven.requests[name][orders[0]], column[orders[1]], err_msg=name)
    assert rows(driven) == rows(fast)


def in_system(requests: Columns) -> int:
    """Most requests in the system at once."""
    events = [(at, 1) for at in requests["arrived_s"]] + [(at, -1) for at in requests["last_token_s"]]
    level = np.cumsum([change for _, change in sorted(events)])
    return int(level.max())


@pytest.mark.parametrize("rate", [float("inf"), 100.0])
def test_a_closed_loop_holds_its_concurrency(rate: float) -> None:
    spec = WorkloadSpec(lengths="uniform", input_len="4:20", output_len="2:12", num_prompts=60, max_model_len=LONGEST,
                        request_rate=rate, max_concurrency=4)  # fmt: skip
    run = simulate(make_workload(spec), [deployment("sarathi", 1, 60)])
    assert in_system(run.requests) == 4
    open_loop = simulate(make_workload(replace(spec, max_concurrency=None)), [deployment("sarathi", 1, 60)])
    assert in_system(open_loop.requests) > 4
    window = steady_window(run.requests, 4)
    assert window is not None
    assert run.summary["steady_window_s"] == list(window)
    assert window[1] == run.requests["arrived_s"].max()
    if rate == float("inf"):  # the first four, which come at once to an idle replica, are no part of the loop
        assert window[0] == 0.0 and run.summary["steady_requests"] == 56
        order = np.argsort(run.requests["arrived_s"], kind="stable")
        ttft = (run.requests["first_token_s"] - run.requests["arrived_s"])[order][4:]
        assert run.summary["steady_mean_ttft_ms"] == pytest.approx(1e3 * ttft.mean())


def test_the_next_request_comes_so_long_after_an_answer() -> None:
    spec = WorkloadSpec(lengths="fixed", input_len=10, output_len=4, num_prompts=8, max_model_len=LONGEST,
                        arrival="burst", max_concurrency=1, client_overhead_s=0.25)  # fmt: skip
    requests = simulate(make_workload(spec), [deployment("sarathi", 1, 60)]).requests
    np.testing.assert_allclose(requests["arrived_s"][1:] - requests["last_token_s"][:-1], 0.25)
    ramped = replace(spec, num_prompts=4, max_concurrency=4, ramp_up_s=2.0, client_overhead_s=9.0)
    arrived = simulate(make_workload(ramped), [deployment("sarathi", 1, 60)]).requests["arrived_s"]
    np.testing.assert_allclose(np.sort(arrived), [0, 0.5, 1.0, 1.5])


def test_a_turn_comes_after_the_one_before_and_finds_what_that_left() -> None:
    spec = WorkloadSpec(lengths="fixed", input_len=10, output_len=6, turns=3, think_time_s=1.0, num_prompts=12,
                        max_model_len=LONGEST, request_rate=5.0)  # fmt: skip
    workload = make_workload(spec)
    assert workload.prompt_tokens[:3].tolist() == [10, 26, 42]
    run = simulate(workload, [caching(deployment("sarathi", 1, 100))])
    order = np.argsort(run.requests["request_id"])
    table = {name: column[order] for name, column in run.requests.items()}
    for row in range(12):
        if row % 3:
            assert table["arrived_s"][row] > table["last_token_s"][row - 1]
            # all but the last output token of the turn before is in the cache, in blocks of 4
            assert table["prefix_hit_tokens"][row] == (table["prompt_tokens"][row - 1] + 5) // 4 * 4
        else:
            assert table["prefix_hit_tokens"][row] == 0
    hits, asked = table["prefix_hit_tokens"].sum(), table["prompt_tokens"].sum()
    assert run.summary["prefix_hit_rate"] == pytest.approx(hits / asked)
    assert run.iterations is not None
    assert run.iterations["prefix_hit_tokens"].sum() == hits == run.summary["prefix_hit_tokens"]
    without = simulate(workload, [deployment("sarathi", 1, 100)])
    assert "prefix_hit_rate" not in without.summary
    assert without.requests["prefix_hit_tokens"].sum() == 0


def test_the_engine_reads_prefixes_that_others_wrote() -> None:
    """Fake workers that keep a real cache: each token depends on all before it, wherever its block was written."""
    spec = WorkloadSpec(lengths="uniform", input_len="3:17", output_len="1:9", turns="1:4", system_prompt_len=7,
                        num_prompts=40, max_model_len=LONGEST, request_rate=20.0, max_concurrency=8)  # fmt: skip
    workload = make_workload(spec)
    for ahead in (False, True):
        tokens = []
        for kind in (deployment("sarathi", 1, 26), caching(deployment("sarathi", 1, 26), ahead)):
            clock = VirtualTime()
            workers = FakeWorkers(clock, 1, block_size=4)
            recorder = Recorder()
            driver = Driver(kind.replica.new_scheduler(26), workers, recorder, clock=clock)
            sender, sequences = Sender(workload, vocab_size=1000, seed=3), []
            driver.on_finished = sequences.append
            driver.run(sender)
            recorder.close()
            outputs = {sequence.request.id: sequence.tokens for sequence in sequences}
            tokens.append(outputs)
        assert tokens[0] == tokens[1]
        assert driver.scheduler.prefix_hit_tokens > 200
        assert driver.scheduler.recomputed_tokens > 0


def test_hash_ids_of_a_trace_are_shared_prefixes(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 0, "input_length": 20, "output_length": 2, "hash_ids": [7, 8, 9]},
        {"timestamp": 1000, "input_length": 18, "output_length": 2, "hash_ids": [7, 8, 10]},
        {"timestamp": 2000, "input_length": 20, "output_length": 2, "hash_ids": [7, 11, 12]},
        {"timestamp": 3000, "input_length": 30, "output_length": 2, "hash_ids": [7, 8]},  # 8 tokens each: 4 are needed
    ]
    path = tmp_path / "mooncake.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    workload = make_workload(WorkloadSpec(trace=path, hash_id_tokens=8, max_model_len=LONGEST))
    assert len(workload.notes) == 1 and "1 of 4 requests have hash ids" in workload.notes[0]
    run = simulate(workload, [caching(deployment("sarathi", 1, 60))])
    assert run.requests["prefix_hit_tokens"].tolist() == [0, 16, 8, 0]


def test_prompt_ids_of_a_table_are_shared_prompts(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("at,tokens_in,tokens_out,prompt_id\n0,17,2,a\n1,17,2,b\n2,17,2,a\n3,18,2,a\n")
    columns = "prompt=tokens_in,output=tokens_out,time=at,prompt_id=prompt_id"
    workload = make_workload(WorkloadSpec(trace=path, columns=columns, max_model_len=LONGEST))
    assert "1 of 4 requests have prompt ids that contradict lengths" in workload.notes[0]
    run = simulate(workload, [caching(deployment("sarathi", 1, 60))])
    assert run.requests["prefix_hit_tokens"].tolist() == [0, 0, 16, 0]
    unread = make_workload(WorkloadSpec(trace=path, columns=columns.rpartition(",")[0], max_model_len=LONGEST))
    assert unread.contents is None and "prompt_id" in unread.notes[0]


CHATS = """at,tokens_in,tokens_out,chat,class
0,10,6,a,1
1,12,4,b,0
9,30,5,a,1
2,20,3,b,0
2,40,3,b,0
"""


def chats(folder: Path, text: str = CHATS) -> Path:
    path = folder / "chats.csv"
    path.write_text(text)
    return path


def test_sessions_of_a_trace_are_turns_at_their_recorded_times(tmp_path: Path) -> None:
    spec = WorkloadSpec(trace=chats(tmp_path), columns="prompt=tokens_in,output=tokens_out,time=at,session=chat",
                        max_model_len=LONGEST)  # fmt: skip
    workload = make_workload(spec)
    assert [note.split(": ")[1] for note in workload.notes] == [
        "class not used", "1 row is earlier than the row before",
    ]  # fmt: skip
    assert workload.prompt_tokens.tolist() == [10, 30, 12, 20, 40]
    assert workload.after is not None and workload.after.tolist() == [-1, 0, -1, 2, 3]
    run = simulate(workload, [caching(deployment("sarathi", 1, 60))])
    order = np.argsort(run.requests["request_id"])
    sent, ended, hits = (run.requests[name][order] for name in ("arrived_s", "last_token_s", "prefix_hit_tokens"))
    assert sent[:4].tolist() == [0, 9, 1, 2]
    assert sent[4] == ended[3] > 2  # recorded at 2 too, when the turn before had not ended
    assert hits.tolist() == [0, 12, 0, 12, 20]  # blocks of 4 of the 15, 15 and 22 computed tokens
    clock, sequences = VirtualTime(), []
    scheduler = caching(deployment("sarathi", 1, 60)).replica.new_scheduler(60)
    driver = Driver(scheduler, FakeWorkers(clock, 1, block_size=4), Recorder(), clock=clock)
    driver.on_finished = sequences.append
    driver.run(Sender(workload, vocab_size=1000, seed=3))
    tokens = {each.request.id: each.tokens for each in sequences}
    assert tokens[1][:16] == tokens[0] and tokens[4][:23] == tokens[3] != tokens[1][:23]


def test_sessions_of_a_trace_with_a_think_time_or_without_times(tmp_path: Path) -> None:
    columns = "prompt=tokens_in,output=tokens_out,session=chat,priority=class"
    spec = WorkloadSpec(trace=chats(tmp_path), columns=columns, max_model_len=LONGEST, think_time_s=3.0,
                        request_rate=0.5)  # fmt: skip
    workload = make_workload(spec)
    assert workload.priorities is not None and workload.priorities.tolist() == [1, 1, 0, 0, 0]
    assert workload.prompt_tokens.tolist() == [10, 30, 12, 20, 40]
    assert workload.think_s is not None and (workload.think_s > 0).all()
    run = simulate(workload, [deployment("sarathi", 1, 60)])
    order = np.argsort(run.requests["request_id"])
    sent, ended = run.requests["arrived_s"][order], run.requests["last_token_s"][order]
    np.testing.assert_allclose(sent[[1, 3, 4]] - ended[[0, 2, 3]], workload.think_s[[1, 3, 4]])


def test_sessions_that_cannot_be(tmp_path: Path) -> None:
    columns = "prompt=tokens_in,output=tokens_out,time=at,session=chat"
    back = chats(tmp_path, CHATS.replace("9,30,5,a", "-1,30,5,a"))
    told = "chats.csv line 4: session 'a' goes back in time, 1 s before its turn in line 2: put the turns of a session"
    with pytest.raises(InputError, match=told):
        make_workload(WorkloadSpec(trace=back, columns=columns))
    short = chats(tmp_path, CHATS.replace("9,30,5,a", "9,15,5,a"))
    workload = make_workload(WorkloadSpec(trace=short, columns=columns, max_model_len=LONGEST))
    assert "1 of 5 turns have prompts shorter than the turn before and its output" in workload.notes[-1]
    run = simulate(workload, [caching(deployment("sarathi", 1, 60))])
    assert run.requests["prefix_hit_tokens"][run.requests["request_id"] == 1].tolist() == [0]
    with pytest.raises(InputError, match="prompt_id and session each say what prompts share"):
        make_workload(WorkloadSpec(trace=short, columns=f"{columns},prompt_id=class"))
    with pytest.raises(InputError, match="line 3, column 'chat': the value is missing"):
        make_workload(WorkloadSpec(trace=chats(tmp_path, CHATS.replace("4,b", "4,")), columns=columns))


def test_a_known_format_takes_the_columns_that_it_lacks(tmp_path: Path) -> None:
    rows = [{"timestamp": 1000 * i, "input_length": 20 + 30 * (i // 2), "output_length": 2, "hash_ids": [7],
             "chat": i % 2, "urgency": 5 * i} for i in range(4)]  # fmt: skip
    path = tmp_path / "mooncake.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = make_workload(WorkloadSpec(trace=path, max_model_len=LONGEST))
    assert plain.notes[0] == "mooncake.jsonl: chat, urgency not used; to use: --columns session=chat"
    made = make_workload(WorkloadSpec(trace=path, columns="session=chat,priority=urgency", max_model_len=LONGEST))
    assert made.arrived_at.tolist() == [0, 2, 1, 3] and made.notes == ("mooncake.jsonl: hash_ids not used",)
    assert made.priorities is not None and made.priorities.tolist() == [0, 10, 5, 15]


def conversing(run: Run, turns: int) -> int:
    """Most conversations, of so many turns each, that have begun and not ended at once."""
    table = {name: column[np.argsort(run.requests["request_id"])] for name, column in run.requests.items()}
    begun, ended = table["arrived_s"][::turns], table["last_token_s"][turns - 1 :: turns]
    return int(max(((begun <= at) & (ended > at)).sum() for at in begun))


def test_users_keep_their_place_while_they_think_and_a_concurrency_does_not() -> None:
    spec = WorkloadSpec(lengths="fixed", input_len=8, output_len=4, turns=3, num_prompts=90, max_model_len=LONGEST,
                        think_time_s=1.0, arrival="burst", users=4)  # fmt: skip
    run = simulate(make_workload(spec), [deployment("sarathi", 1, 60)])
    assert conversing(run, 3) == 4 and in_system(run.requests) <= 4
    assert run.summary["saturation"]["verdict"].startswith("4 users: the client waits")
    seats = simulate(make_workload(replace(spec, users=None, max_concurrency=4)), [deployment("sarathi", 1, 60)])
    assert conversing(seats, 3) > 10 and in_system(seats.requests) == 4
    assert seats.summary["duration"] < run.summary["duration"]
    ramped = make_workload(replace(spec, users=4, ramp_up_s=2.0, client_overhead_s=0.5, think_time_s=0.0))
    requests = simulate(ramped, [deployment("sarathi", 1, 60)]).requests
    order = np.argsort(requests["request_id"])
    sent, ended = requests["arrived_s"][order], requests["last_token_s"][order]
    np.testing.assert_allclose(sent[0:12:3], [0, 0.5, 1.0, 1.5])
    np.testing.assert_allclose(sent[1:3] - ended[0:2], 0.5)
    driven = drive(ramped, deployment("sarathi", 1, 60))
    np.testing.assert_array_equal(driven.requests["arrived_s"][np.argsort(driven.requests["request_id"])], sent)


def test_the_urgent_go_first_where_the_scheduler_looks() -> None:
    spec = WorkloadSpec(lengths="fixed", input_len=20, output_len=10, num_prompts=300, request_rate=120.0,
                        max_model_len=LONGEST, priorities="0=0.3,7=0.7")  # fmt: skip
    workload = make_workload(spec)
    assert workload.priorities is not None and 60 < (workload.priorities == 0).sum() < 120
    np.testing.assert_array_equal(workload.arrived_at, make_workload(replace(spec, priorities=None)).arrived_at)
    waits = {}
    for policy in ("priority", "fcfs"):
        run = simulate(workload, [deployment("vllm", 1, 60, scheduling_policy=policy)])
        delay = run.requests["first_token_s"] - run.requests["arrived_s"]
        urgent = run.requests["priority"] == 0
        waits[policy] = delay[urgent].mean() / delay[~urgent].mean()
        assert ("priorities have no effect" in " ".join(run.summary["workload_notes"])) == (policy == "fcfs")
    assert waits["priority"] < 0.5 < 0.8 < waits["fcfs"] < 1.25
    same = make_workload(replace(spec, priorities=None))
    nobody = simulate(same, [deployment("vllm", 1, 60, scheduling_policy="priority")])
    assert "no request has a priority" in nobody.summary["workload_notes"][0]
    turns = make_workload(replace(spec, turns=3, priorities="0=0.5,1=0.5", max_model_len=None))
    assert turns.priorities is not None and (np.diff(turns.priorities.reshape(-1, 3)) == 0).all()
    for wrong in ("0=0.3,1=0.6", "0", "0=2,1=-1", "0=0.5,0=0.5", "a=1"):
        with pytest.raises(InputError, match="give PRIORITY=SHARE"):
            make_workload(replace(spec, priorities=wrong))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"max_concurrency": 0}, "max_concurrency 0: give 1 or more"),
        ({"client_overhead_s": 1.0}, "overhead_s 1.0 needs max_concurrency or users"),
        ({"users": 0}, "users 0: give 1 or more"),
        ({"users": 2, "max_concurrency": 3}, "max_concurrency 3 and users 2 both bound the load"),
        ({"turns": "3:1"}, "turns '3:1' must be a number of requests"),
        ({"think_time_s": 2.0}, "think_time_s 2.0 needs turns"),
        ({"turns": 2, "clip_tokens": 50}, "clip_tokens 50 has no meaning with turns"),
        ({"columns": "prompt=a"}, "columns prompt=a needs a trace"),
        ({"random_range_ratio": 0.5}, "random_range_ratio 0.5 needs lengths 'random'"),
        ({"system_prompt_len": 99}, "system_prompt_len 99 leaves no room in max_model_len 80"),
    ],
)
def test_what_can_not_be_is_refused(changes: dict[str, object], told: str) -> None:
    with pytest.raises(InputError, match=told):
        make_workload(WorkloadSpec(request_rate=1.0, max_model_len=LONGEST, **changes))  # type: ignore[arg-type]


def test_random_lengths_are_vllms() -> None:
    spec = WorkloadSpec(lengths="random", input_len=100, output_len=10, random_range_ratio=0.2, num_prompts=20_000,
                        request_rate=float("inf"))  # fmt: skip
    workload = make_workload(spec)
    assert workload.arrived_at.max() == 0
    for column, low, high in ((workload.prompt_tokens, 80, 120), (workload.output_tokens, 8, 12)):
        assert sorted(set(column.tolist())) == list(range(low, high + 1))
        assert np.bincount(column)[low:].std() < 0.1 * len(column) / (high - low + 1)


def test_a_client_sends_in_order_and_waits_for_whom_it_must() -> None:
    contents = Content.of((0, 10), (5, 10), own(3))
    assert contents.streams == (0, -4)
    assert contents.pieces(14) == [(0, 0, 10), (-4, 10, 14)]
    workload = Workload("w", np.array([0.0, 0.0, 5.0]), np.array([3, 3, 3]), np.array([1, 1, 1]), 0,
                        after=np.array([-1, 0, -1]), think_s=np.array([0.0, 2.0, 0.0]))  # fmt: skip
    client = Client(workload._with_turns(), ClientSpec(max_concurrency=1))
    first = client.pop()
    assert (first.id, client.next_at) == (0, float("inf"))
    client.finished(first, 4.5)
    assert client.next_at == 5.0
    second = client.pop()
    assert second.id == 2
    client.finished(second, 7.0)
    assert client.next_at == 7.0  # its turn was due at 6.5
    assert client.pop().id == 1 and client.next_at == float("inf")
