import dataclasses
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InputError
from engine.workload.traces import read_trace
from engine.workload.workload import Workload, WorkloadSpec, make_workload

TRACES = Path(__file__).parents[2] / "shared" / "data" / "traces"

PLAIN = "num_prefill_tokens,num_decode_tokens,arrived_at\n"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURSTGPT = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


@pytest.fixture
def trace(tmp_path):
    def write(text, name="trace.csv"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8", newline="")
        return path

    return write


def poisson(**changes):
    return make_workload(WorkloadSpec(**({"request_rate": 1.0} | changes)))


def lengths_of(workload):
    assert len(workload)
    return list(zip(workload.prompt_tokens.tolist(), workload.output_tokens.tolist(), strict=True))


# Lengths


def test_a_distribution_gives_1000_requests_unless_told():
    workload = poisson()
    assert (workload.name, len(workload), workload.num_dropped) == ("openchat_sharegpt4", 1000, 0)
    assert len(poisson(num_prompts=7)) == 7


def test_fixed_lengths():
    assert set(lengths_of(poisson(lengths="fixed", input_len="512", output_len=128))) == {(512, 128)}


def test_uniform_lengths_cover_their_range_evenly():
    workload = poisson(lengths="uniform", input_len="3:7", output_len="1:1", num_prompts=50_000)
    counts = Counter(workload.prompt_tokens.tolist())
    assert set(counts) == {3, 4, 5, 6, 7}
    assert set(workload.output_tokens.tolist()) == {1}
    assert max(abs(count - 10_000) for count in counts.values()) < 5 * math.sqrt(10_000)


def test_zipf_lengths_follow_the_power_law():
    workload = poisson(lengths="zipf", input_len="1:4", output_len="100:200", zipf_alpha=2.0, num_prompts=100_000)
    share = np.bincount(workload.prompt_tokens)[1:] / 100_000
    assert share == pytest.approx(np.array([144, 36, 16, 9]) / 205, abs=0.01)  # 1, 1/4, 1/9, 1/16
    assert workload.output_tokens.min() == 100
    assert workload.output_tokens.max() == 200


def test_the_two_lengths_of_uniform_are_independent():
    workload = poisson(lengths="uniform", input_len="1:1000", output_len="1:1000", num_prompts=50_000)
    assert abs(np.corrcoef(workload.prompt_tokens, workload.output_tokens)[0, 1]) < 0.02


def test_long_requests_are_dropped_and_replaced():
    workload = poisson(max_model_len=4096, num_prompts=2000)
    total = workload.prompt_tokens + workload.output_tokens
    assert len(workload) == 2000
    assert total.max() <= 4096
    everything = poisson(num_prompts=2000 + workload.num_dropped)
    long = everything.prompt_tokens + everything.output_tokens > 4096
    assert workload.num_dropped == long.sum() > 100
    assert np.array_equal(everything.prompt_tokens[~long], workload.prompt_tokens)


def test_clipping_shortens_the_prompt_first_and_drops_nothing(trace):
    path = trace("num_prefill_tokens,num_decode_tokens\n10,5\n100,5\n10,100\n3,900\n")
    clipped = make_workload(WorkloadSpec(trace=path, arrival="burst", clip_tokens=50, max_model_len=50))
    assert lengths_of(clipped) == [(10, 5), (45, 5), (1, 49), (1, 49)]
    assert clipped.num_dropped == 0


@settings(max_examples=30)
@given(st.integers(2, 9000), st.integers(0, 5))
def test_clipped_lengths_stay_possible(clip_tokens, seed):
    whole = poisson(seed=seed, num_prompts=200)
    clipped = poisson(seed=seed, num_prompts=200, clip_tokens=clip_tokens)
    total = whole.prompt_tokens + whole.output_tokens
    assert np.array_equal(clipped.prompt_tokens + clipped.output_tokens, np.minimum(total, clip_tokens))
    assert clipped.prompt_tokens.min() >= 1
    assert clipped.output_tokens.min() >= 1


# Arrivals


@settings(max_examples=40)
@given(
    st.sampled_from(["poisson", "gamma", "static"]),
    st.floats(1e-3, 1e3),
    st.integers(1, 300),
    st.integers(0, 2**40),
)
def test_the_same_requests_come_at_every_rate_and_their_gaps_scale(arrival, rate, n, seed):
    spec = WorkloadSpec(arrival=arrival, request_rate=1.0, num_prompts=n, seed=seed)
    slow, fast = make_workload(spec), make_workload(dataclasses.replace(spec, request_rate=rate))
    assert len(slow) == n
    assert slow.arrived_at[0] == 0
    assert (np.diff(slow.arrived_at) >= 0).all()
    assert fast.arrived_at * rate == pytest.approx(slow.arrived_at)
    assert lengths_of(slow) == lengths_of(fast)


@pytest.mark.parametrize("changes", [{}, {"arrival": "gamma", "arrival_cv": 2.0}, {"max_model_len": 2048}])
def test_a_short_run_is_the_start_of_a_long_one(changes):
    short, long = poisson(num_prompts=50, **changes), poisson(num_prompts=5000, **changes)
    assert np.array_equal(short.arrived_at, long.arrived_at[:50])
    assert lengths_of(short) == lengths_of(long)[:50]


def test_the_seed_decides_and_the_same_seed_gives_the_same():
    one, same, other = poisson(seed=1), poisson(seed=1), poisson(seed=2)
    assert np.array_equal(one.arrived_at, same.arrived_at)
    assert lengths_of(one) == lengths_of(same)
    assert not np.array_equal(one.arrived_at, other.arrived_at)
    assert lengths_of(one) != lengths_of(other)


def test_dropping_leaves_the_arrivals_alone():
    assert np.array_equal(poisson().arrived_at, poisson(max_model_len=2048).arrived_at)


@pytest.mark.parametrize(
    ("changes", "cv"),
    [
        ({"arrival": "poisson"}, 1),
        ({"arrival": "gamma"}, 1),
        ({"arrival": "gamma", "arrival_cv": 3.0}, 3),
        ({"arrival": "gamma", "arrival_cv": 0.25}, 0.25),
        ({"arrival": "static"}, 0),
    ],
)
def test_gaps_have_the_asked_mean_and_variation(changes, cv):
    gaps = np.diff(poisson(request_rate=4.0, num_prompts=200_000, **changes).arrived_at)
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.03, abs=1e-6)


def test_poisson_arrivals_in_a_window_have_poisson_counts():
    arrived_at = poisson(request_rate=5.0, num_prompts=100_000).arrived_at
    counts = np.bincount(arrived_at.astype(np.int64))[:-1]
    assert counts.mean() == pytest.approx(5, rel=0.03)
    assert counts.var() == pytest.approx(5, rel=0.06)


def test_static_and_burst():
    assert poisson(arrival="static", request_rate=4.0, num_prompts=3).arrived_at.tolist() == [0, 0.25, 0.5]
    assert poisson(arrival="burst", request_rate=None, num_prompts=3).arrived_at.tolist() == [0, 0, 0]


# Traces


def test_a_trace_arrives_as_recorded_from_0_in_order_of_time(trace):
    path = trace(PLAIN + "7,70,12.5\n5,50,10\n6,60,11\n", "mine.csv")
    workload = make_workload(WorkloadSpec(trace=path))
    assert workload.name == "mine"
    assert workload.arrived_at.tolist() == [0, 1, 2.5]
    assert lengths_of(workload) == [(5, 50), (6, 60), (7, 70)]
    assert make_workload(WorkloadSpec(trace=path, rate_scale=2.0)).arrived_at.tolist() == [0, 0.5, 1.25]
    assert make_workload(WorkloadSpec(trace=path, num_prompts=2)).arrived_at.tolist() == [0, 1]


def test_a_rate_replaces_the_times_of_a_trace_but_not_its_lengths(trace):
    path = trace(PLAIN + "5,50,10\n6,60,11\n7,70,12.5\n")
    workload = make_workload(WorkloadSpec(trace=path, request_rate=2.0))
    assert np.array_equal(workload.arrived_at, poisson(request_rate=2.0, num_prompts=3).arrived_at)
    assert lengths_of(workload) == [(5, 50), (6, 60), (7, 70)]


def test_long_rows_are_left_out_before_rows_are_taken(trace):
    path = trace(PLAIN + "5,5,0\n90,90,1\n6,6,2\n90,91,3\n7,7,4\n")
    spec = WorkloadSpec(trace=path, max_model_len=100)
    whole, two = make_workload(spec), make_workload(dataclasses.replace(spec, num_prompts=2))
    assert (lengths_of(whole), whole.num_dropped) == ([(5, 5), (6, 6), (7, 7)], 2)
    assert (lengths_of(two), two.num_dropped) == ([(5, 5), (6, 6)], 1)
    assert two.arrived_at.tolist() == [0, 2]


def test_azure_dates_have_seven_digits(trace):
    path = trace(AZURE + "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n")
    workload = make_workload(WorkloadSpec(trace=path))
    assert workload.arrived_at == pytest.approx([0, 4.314579], abs=1e-9)
    assert lengths_of(workload) == [(374, 44), (396, 109)]


def test_azure_dates_may_carry_a_time_zone_and_no_fraction(trace):
    path = trace(AZURE + "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:01+00:00,2399,6\n")
    assert read_trace(path).arrived_at == pytest.approx([0, 0.99007], abs=1e-9)


def test_burstgpt_rows_without_a_response_are_failures(trace):
    path = trace(
        BURSTGPT + "5,ChatGPT,472,18,490,Conversation log\n45,ChatGPT,1087,0,1087,API log\n118,GPT-4,417,276,693,x\n"
    )
    workload = make_workload(WorkloadSpec(trace=path))
    assert lengths_of(workload) == [(472, 18), (417, 276)]
    assert workload.arrived_at.tolist() == [0, 113]
    assert (workload.num_failed, workload.num_dropped) == (1, 0)


def test_mooncake_lines_count_in_milliseconds(trace):
    rows = [
        {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]},
        {"timestamp": 30535, "input_length": 6472, "output_length": 26, "hash_ids": []},
    ]
    path = trace("".join(json.dumps(row) + "\n\n" for row in rows), "mooncake.jsonl")
    workload = make_workload(WorkloadSpec(trace=path))
    assert workload.arrived_at == pytest.approx([0, 3.053])
    assert lengths_of(workload) == [(6955, 52), (6472, 26)]


def test_what_editors_and_spreadsheets_add_does_no_harm(trace):
    path = trace("\ufeffid, num_prefill_tokens ,num_decode_tokens\r\na,5,50.0\r\n\r\nb,6,60\r\n\r\n")
    assert lengths_of(make_workload(WorkloadSpec(trace=path, arrival="burst"))) == [(5, 50), (6, 60)]


@pytest.mark.parametrize(("name", "seconds"), [("azure_code_2023.csv", 3435.95), ("azure_conv_2023.csv", 3501.72)])
def test_the_public_azure_traces_are_read(name, seconds):
    if not (TRACES / name).exists():
        pytest.skip("the public traces are not here")
    workload = make_workload(WorkloadSpec(trace=TRACES / name))
    assert workload.arrived_at[-1] == pytest.approx(seconds, abs=0.01)
    assert len(workload) == (TRACES / name).read_text().count("\n") - 1


# Requests


def test_requests_are_made_lazily_of_plain_numbers():
    workload = poisson(num_prompts=10_000)
    requests = workload.requests()
    first = next(requests)
    kinds = {type(value) for value in (first.id, first.prompt_tokens, first.output_tokens)}
    assert kinds == {int}
    assert type(first.arrived_at) is float
    rest = [first, *requests]
    assert [request.id for request in rest] == list(range(10_000))
    assert [(request.prompt_tokens, request.output_tokens) for request in rest] == lengths_of(workload)
    assert [request.arrived_at for request in rest] == workload.arrived_at.tolist()
    assert next(workload.requests()) is not first


# What is wrong with the input

BAD_SPECS = [
    ({"lengths": "sharegpt"}, "'sharegpt'"),
    ({"lengths": "fixed", "output_len": 5}, "input_len is missing"),
    ({"lengths": "fixed", "input_len": 5}, "output_len is missing"),
    ({"lengths": "fixed", "input_len": "5:9", "output_len": 5}, "input_len '5:9'"),
    ({"lengths": "fixed", "input_len": 0, "output_len": 5}, "input_len 0"),
    ({"lengths": "uniform", "input_len": "9:5", "output_len": 5}, "input_len '9:5'"),
    ({"lengths": "uniform", "input_len": "0:5", "output_len": 5}, "input_len '0:5'"),
    ({"lengths": "uniform", "input_len": "1:2:3", "output_len": 5}, "input_len '1:2:3'"),
    ({"lengths": "uniform", "input_len": "a:b", "output_len": 5}, "input_len 'a:b'"),
    ({"lengths": "zipf", "input_len": 5, "output_len": "5:"}, "output_len '5:'"),
    ({"lengths": "zipf", "input_len": 5, "output_len": "1:99999999999"}, "'1:99999999999'"),
    ({"lengths": "zipf", "input_len": 5, "output_len": 5, "zipf_alpha": -1.5}, "zipf_alpha -1.5"),
    ({"input_len": 77}, "input_len 77 has no meaning"),
    ({"trace": Path("t.csv"), "lengths": "azure_code"}, "t.csv both give"),
    ({"trace": Path("t.csv"), "output_len": 77}, "output_len 77 has no meaning with trace t.csv"),
    ({"arrival": "possion"}, "did you mean 'poisson'"),
    ({"request_rate": 0.0}, "request_rate 0.0"),
    ({"request_rate": -2.5}, "request_rate -2.5"),
    ({"request_rate": math.nan}, "request_rate nan"),
    ({"request_rate": None}, "needs a request_rate"),
    ({"request_rate": None, "arrival": "poisson"}, "'poisson' needs a request_rate"),
    ({"request_rate": None, "arrival": "gamma"}, "'gamma' needs a request_rate"),
    ({"request_rate": None, "arrival": "static"}, "'static' needs a request_rate"),
    ({"request_rate": 3.5, "arrival": "burst"}, "request_rate 3.5 has no meaning with arrival 'burst'"),
    ({"request_rate": None, "arrival": "trace"}, "'trace' needs a trace"),
    ({"request_rate": 3.5, "arrival": "trace", "trace": Path("t.csv")}, "request_rate 3.5 .* rate_scale"),
    ({"arrival": "gamma", "arrival_cv": 0.0}, "arrival_cv 0.0"),
    ({"arrival": "gamma", "arrival_cv": math.nan}, "arrival_cv nan"),
    ({"arrival_cv": 2.5}, "arrival_cv 2.5 needs arrival 'gamma'"),
    ({"rate_scale": 0.0}, "rate_scale 0.0"),
    ({"rate_scale": math.inf}, "rate_scale inf"),
    ({"rate_scale": 2.5}, "rate_scale 2.5 needs arrival 'trace'"),
    ({"num_prompts": 0}, "num_prompts 0"),
    ({"num_prompts": -3}, "num_prompts -3"),
    ({"num_prompts": 2.5}, "num_prompts 2.5"),
    ({"max_model_len": 1}, "max_model_len 1"),
    ({"clip_tokens": 1}, "clip_tokens 1"),
    ({"clip_tokens": 99, "max_model_len": 50}, "clip_tokens 99 is more than max_model_len 50"),
    ({"seed": -1}, "seed -1"),
    ({"max_model_len": 2}, "0 of .* no longer than 2 tokens"),
    ({"lengths": "fixed", "input_len": 500, "output_len": 500, "max_model_len": 999}, "no longer than 999 tokens"),
    ({"lengths": "gone.json"}, "gone.json"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_SPECS, ids=[message for _, message in BAD_SPECS])
def test_an_impossible_spec_is_an_input_error(changes, message):
    with pytest.raises(InputError, match=message):
        poisson(**changes)


BAD_TRACES = [
    ("", "trace.csv is empty"),
    ("\n \n", "trace.csv is empty"),
    (PLAIN, "trace.csv holds no requests"),
    ("a,b\n1,2\n", "columns a, b: .*num_prefill_tokens,num_decode_tokens; ContextTokens"),
    ("num_prefill_tokens,n\n1,2\n", "no column 'num_decode_tokens': its columns are num_prefill_tokens, n"),
    (PLAIN + "5,50,1\n6,6", "line 3, column 'arrived_at': the value is missing"),
    (PLAIN + "5,50,1\n6\n", "line 3, column 'num_decode_tokens': the value is missing"),
    (PLAIN + "5,50,1\n,60,1\n", "line 3, column 'num_prefill_tokens': the value is missing"),
    (PLAIN + "5,50,1\n6,60,2,9\n", "no table: Expected 3 fields in line 3, saw 4"),
    (PLAIN + "5,50,1,9\n6,60,2,9\n", "no table: line 2 has more values than line 1 has columns"),
    (PLAIN + "5,50,1\n\n\n6,six,2\n", "line 5, column 'num_decode_tokens': six is not a number"),
    (PLAIN + "5,50,1\n6,nan,2\n", "line 3, column 'num_decode_tokens': nan is not a number"),
    (PLAIN + "5,50,1\n6,inf,2\n", "line 3, column 'num_decode_tokens': inf is not a number"),
    (PLAIN + "5,50,1\n-6,60,2\n-7,60,2\n", r"line 3, column 'num_prefill_tokens': -6 must .* \(and 1 more rows\)"),
    (PLAIN + "5,50,1\n6,0,2\n", "line 3, column 'num_decode_tokens': 0 must be a whole number"),
    (PLAIN + "5,50,1\n6.5,60,2\n", "line 3, column 'num_prefill_tokens': 6.5 must be a whole number"),
    (PLAIN + "5,99999999999999999999,1\n", "99999999999999999999 must be .* to 10000000"),
    (PLAIN + "True,True,1\n", "line 2, column 'num_prefill_tokens': True is not a number"),
    (PLAIN + "5,50,soon\n", "line 2, column 'arrived_at': soon is not a number"),
    (PLAIN + "5,50,inf\n", "line 2, column 'arrived_at': inf is not a number"),
    (PLAIN + '5,"50,1\n', "no table: "),
    (AZURE + "yesterday,5,50\n", "line 2, column 'TIMESTAMP': yesterday is not a date"),
    (BURSTGPT + "5,ChatGPT,472,0,472,x\n", "trace.csv holds no requests"),
    (BURSTGPT + "5,ChatGPT,4,0,4,x\n6,ChatGPT,0,7,7,x\n", "line 3, column 'Request tokens': 0 must be"),
    (BURSTGPT + "5,ChatGPT,4,-1,4,x\n", "line 2, column 'Response tokens': -1 must be"),
    (
        '{"timestamp": 1, "input_length": 5, "output_length": 5}\n{"timestamp": 1,',
        'line 2 is not JSON .*{"timestamp": 1,',
    ),
    ('{"input_length": 5, "output_length": 5}\n\n[1]\n', r"line 3: \[1\] is no object"),
    ('{"input_length": 5, "output_length": 5}\n{"input_length": 5}\n', "line 2, column 'output_length': .*missing"),
    ('{"input_length": 5, "output_length": null}\n', "line 1, column 'output_length': the value is missing"),
    ('{"input_length": 5, "output_length": "x"}\n', "line 1, column 'output_length': x is not a number"),
    (
        '{"input_length": 5, "output_length": 1' + "0" * 400 + "}\n",
        "line 1 is not JSON .a number of more than 40 digits",
    ),
    ('{"prompt": 5}\n', "columns prompt: a trace needs"),
]


@pytest.mark.parametrize(("text", "message"), BAD_TRACES)
def test_a_bad_trace_is_an_input_error_that_names_the_line(trace, text, message):
    path = trace(text)
    with pytest.raises(InputError, match=message) as caught:
        make_workload(WorkloadSpec(trace=path, arrival="burst"))
    assert str(path) in str(caught.value)


def test_a_trace_that_is_missing_a_folder_or_binary_is_an_input_error(tmp_path):
    (tmp_path / "binary.csv").write_bytes(b"\x1f\x8b\x08\xff\xfe")
    for name, message in (("gone.csv", "No such file"), (".", "directory"), ("binary.csv", "not text")):
        with pytest.raises(InputError, match=message) as caught:
            read_trace(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_prompts": 9}, "has 3 requests, 9 are asked for"),
        ({"num_prompts": 3, "max_model_len": 20}, r"has 2 requests of at most 20 tokens .*, 3 are asked for"),
        ({"max_model_len": 3}, r"has 0 requests of at most 3 tokens .*raise max_model_len"),
        ({"arrival": "trace"}, "has no arrival times"),
        ({"arrival": None}, "has no arrival times: give a request_rate"),
        ({"rate_scale": 2.5}, "rate_scale 2.5 needs arrival 'trace'"),
    ],
)
def test_asking_a_trace_for_what_it_has_not(trace, changes, message):
    path = trace("num_prefill_tokens,num_decode_tokens\n5,5\n10,10\n20,20\n")
    with pytest.raises(InputError, match=message):
        make_workload(WorkloadSpec(**({"trace": path, "arrival": "burst"} | changes)))


@pytest.mark.parametrize(
    ("arrived", "prompt", "output", "told"),
    [
        ([5.0, 1.0, 3.0], [1, 1, 1], [1, 1, 1], r"arrived_at\[1\] is 1.0, earlier than the one before"),
        ([0.0, float("nan")], [1, 1], [1, 1], r"arrived_at\[1\] is nan"),
        ([-1.0, 0.0], [1, 1], [1, 1], r"arrived_at\[0\] is -1.0"),
        ([0.0, 1.0], [1, 0], [1, 1], r"prompt_tokens\[1\] is 0"),
        ([0.0, 1.0], [1, 1], [1.5, 1], r"output_tokens\[0\] is 1.5"),
        ([0.0, 1.0], [1], [1, 1], r"prompt_tokens \(1,\)"),
        ([], [], [], "not empty"),
    ],
)
def test_a_workload_made_by_hand_is_checked(arrived, prompt, output, told):
    with pytest.raises(InputError, match=told):
        Workload("mine", np.array(arrived), np.array(prompt), np.array(output), 0)


def test_an_infinite_rate_is_all_at_once() -> None:
    workload = make_workload(WorkloadSpec(request_rate=math.inf, num_prompts=5))
    assert workload.arrived_at.tolist() == [0.0] * 5
