import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import lognorm, spearmanr

from engine.errors import InputError
from engine.workload.lengths import LengthDistribution, _main, builtin_names, draw_lengths, load
from engine.workload.traces import read_trace

TRACES = Path(__file__).parents[2] / "shared" / "data" / "traces"
FILES = {
    "openchat_sharegpt4": "openchat_sharegpt4_8k.csv",
    "azure_code": "azure_code_2023.csv",
    "azure_conv": "azure_conv_2023.csv",
}
# Median, P90 and standard deviation of prompt and output tokens: the first two as the Sarathi-Serve paper prints them
# (OSDI 2024), the Azure ones as the public CSV files have them.
PUBLISHED = {
    "openchat_sharegpt4": ((1730, 5696, 2088), (415, 834, 265)),
    "arxiv_summarization": ((7059, 12985, 3638), (208, 371, 101)),
    "azure_code": ((1469, 5187.6, 1973.8), (13, 55, 59.9)),
    "azure_conv": ((1020, 2734.5, 1108.8), (129, 424, 162.9)),
}


def summary(tokens):
    assert len(tokens) > 1000
    return np.median(tokens), np.quantile(tokens, 0.9), np.std(tokens)


def correlated(n, seed=0):
    rng = np.random.default_rng(seed)
    prompt = rng.lognormal(6, 1, n)
    output = np.where(prompt > np.median(prompt), 2, 1) * rng.lognormal(4, 0.5, n)
    return np.ceil(prompt).astype(np.int64), np.ceil(output).astype(np.int64)


def test_the_builtin_distributions_are_the_published_ones():
    assert set(builtin_names()) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_draws_have_the_published_quantiles(name):
    for tokens, expected in zip(load(name).draw(100_000, np.random.default_rng(1)), PUBLISHED[name], strict=True):
        assert tokens.dtype == np.int64
        assert tokens.min() >= 1
        median, p90, std = summary(tokens)
        assert (median, p90) == pytest.approx(expected[:2], rel=0.02)
        assert std == pytest.approx(expected[2], rel=0.06)  # a handful of rows make the tail of azure_code's output


@pytest.mark.parametrize("name", FILES)
def test_draws_keep_the_traces_own_dependence_and_quantiles(name):
    path = TRACES / FILES[name]
    if not path.exists():
        pytest.skip("the public traces are not here")
    trace, drawn = read_trace(path), load(name).draw(100_000, np.random.default_rng(2))
    assert spearmanr(*drawn)[0] == pytest.approx(spearmanr(trace.prompt, trace.output)[0], abs=0.02)
    assert np.corrcoef(*drawn)[0, 1] == pytest.approx(np.corrcoef(trace.prompt, trace.output)[0, 1], abs=0.02)
    for tokens, recorded in zip(drawn, (trace.prompt, trace.output), strict=True):
        assert summary(tokens)[:2] == pytest.approx(summary(recorded)[:2], rel=0.02)


@pytest.mark.parametrize("name", FILES)
def test_a_builtin_is_what_fitting_its_trace_gives(name):
    path = TRACES / FILES[name]
    if not path.exists():
        pytest.skip("the public traces are not here")
    ours, trace = load(name), read_trace(path)
    again = LengthDistribution.fit(trace.prompt, trace.output, name=name, source="", max_total=ours.max_total)
    assert np.array_equal(again.prompt, ours.prompt)
    assert np.array_equal(again.output, ours.output)


def test_arxiv_is_the_lognormals_that_its_source_names():
    ours = load("arxiv_summarization")
    inner = slice(1, None)  # no request has less than one token
    for table, (median, sigma, most) in ((ours.prompt, (7977, 0.671, 16150)), (ours.output[0], (210, 0.474, 570))):
        assert all(f"{what} {value}" in ours.source for what, value in (("median", median), ("sigma", sigma)))
        family = lognorm(sigma, scale=median)
        assert table[inner] == pytest.approx(family.ppf(ours.levels[inner] * family.cdf(most)), abs=0.1)


@pytest.mark.parametrize("name", ["openchat_sharegpt4", "arxiv_summarization"])
def test_no_draw_is_over_the_cap_of_its_trace(name):
    distribution = load(name)
    total = np.sum(distribution.draw(100_000, np.random.default_rng(3)), axis=0)
    assert 0.95 * distribution.max_total < total.max() <= distribution.max_total
    assert np.mean(total == distribution.max_total) < 0.02  # few enough to leave the quantiles alone


def test_fit_keeps_a_strong_dependence():
    prompt, output = correlated(50_000)
    drawn = LengthDistribution.fit(prompt, output, name="x", source="").draw(50_000, np.random.default_rng(4))
    expected = spearmanr(prompt, output)[0]
    assert expected > 0.4
    assert spearmanr(*drawn)[0] == pytest.approx(expected, abs=0.03)


def test_fit_and_draw_of_a_constant_is_that_constant():
    row = np.full(500, 7)
    prompt, output = LengthDistribution.fit(row, row * 3, name="x", source="").draw(1000, np.random.default_rng(5))
    assert set(prompt) == {7}
    assert set(output) == {21}


def test_fit_refuses_too_few_rows():
    with pytest.raises(InputError, match="3 rows are too few"):
        LengthDistribution.fit(np.arange(1, 4), np.arange(1, 4), name="x", source="")


def test_fit_refuses_lengths_that_are_no_pairs():
    with pytest.raises(ValueError, match="500 prompt lengths and 501"):
        LengthDistribution.fit(np.full(500, 1), np.full(501, 1), name="x", source="")


def test_saving_where_there_is_no_folder_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"cannot write .*gone/x\.json: No such file"):
        load("azure_code").save(tmp_path / "gone" / "x.json")


def test_saving_and_loading_changes_nothing(tmp_path):
    prompt, output = correlated(2_000)
    fitted = LengthDistribution.fit(prompt, output, name='a "name"', source="s", max_total=10**6)
    fitted.save(tmp_path / "x.json")
    loaded = load(str(tmp_path / "x.json"))
    assert (loaded.name, loaded.source, loaded.max_total) == ('a "name"', "s", 10**6)
    draws = [distribution.draw(1_000, np.random.default_rng(6)) for distribution in (fitted, loaded)]
    assert np.array_equal(*draws)


def test_the_command_fits_a_trace_to_a_file(tmp_path):
    prompt, output = correlated(3_000)
    rows = "\n".join(f"{p},{o}" for p, o in zip(prompt, output, strict=True))
    (tmp_path / "t.csv").write_text(f"num_prefill_tokens,num_decode_tokens\n{rows}\n")
    target = tmp_path / "mine.json"
    assert _main(["fit", str(tmp_path / "t.csv"), "--name", "mine", "--output", str(target)]) == 0
    mine = load(str(target))
    assert mine.source.startswith("t.csv; 3000 rows, fitted 2")
    drawn = mine.draw(100_000, np.random.default_rng(7))
    assert [np.median(tokens) for tokens in drawn] == pytest.approx([np.median(prompt), np.median(output)], rel=0.02)


def test_the_command_says_what_is_wrong_on_one_line(tmp_path, capsys):
    missing = tmp_path / "none.csv"
    assert _main(["fit", str(missing), "--name", "mine", "--output", str(tmp_path / "x.json")]) == 2
    error = capsys.readouterr().err
    assert str(missing) in error
    assert error.count("\n") == 1


def test_an_unknown_name_is_told_its_nearest():
    with pytest.raises(InputError, match="did you mean 'azure_conv'"):
        load("azure-conv")


BROKEN = {
    "not json": "{",
    "a list": "[]",
    "no levels": json.dumps({"name": "x", "source": "", "max_total": None, "prompt": [1, 2], "output": [[1, 2]]}),
    "text": '{"name": "x", "source": "", "max_total": null, "levels": ["a"], "prompt": [1], "output": [[1]]}',
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_an_input_error_that_names_it(tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"broken\.json is (no length distribution|not JSON)"):
        load(str(path))


def test_a_missing_file_is_an_input_error_that_names_it(tmp_path):
    with pytest.raises(InputError, match=r"gone\.json: No such file"):
        load(str(tmp_path / "gone.json"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": [0, 0.5, 0.9]}, "levels must rise from 0 to 1"),
        ({"levels": [0, float("nan"), 1]}, "levels must rise from 0 to 1"),
        ({"prompt": [1, 2]}, "one quantile for each"),
        ({"output": [[1, 2]]}, "one quantile for each"),
        ({"output": []}, "one quantile for each"),
        ({"prompt": [1, 5, 4]}, "prompt quantiles must not fall"),
        ({"prompt": [0, 5, 6]}, "prompt quantiles .* 1..10000000"),
        ({"output": [[1, 2, float("nan")]]}, "output quantiles"),
        ({"prompt": [1, 5, 8.6], "max_total": 9}, "max_total 9 leaves no output"),
        ({"max_total": 9}, "max_total 9 leaves no output after the longest prompt, 9 tokens"),
    ],
)
def test_impossible_tables_are_refused(change, message):
    tables = {"levels": [0, 0.5, 1], "prompt": [1, 5, 9], "output": [[1, 2, 3]], "max_total": None} | change
    max_total = tables.pop("max_total")
    arrays = {name: np.array(table, np.float64) for name, table in tables.items()}
    with pytest.raises(InputError, match=message):
        LengthDistribution("x", "", max_total, **arrays)


@settings(max_examples=40)
@given(st.integers(1, 60), st.integers(100, 4000), st.integers(0, 9))
def test_draws_within_a_limit_are_those_drawn_without_it_less_the_long_ones(n, limit, seed):
    at = load("azure_code").at
    prompt, output, dropped = draw_lengths(at, n, np.random.default_rng(seed), limit)
    everything = np.stack(at(np.random.default_rng(seed).random((200_000, 2))))
    kept = np.flatnonzero(everything.sum(axis=0) <= limit)[:n]
    assert np.array_equal(np.stack([prompt, output]), everything[:, kept])
    assert dropped == kept[-1] + 1 - n


def test_a_limit_that_leaves_nothing_is_an_error_and_no_hang():
    with pytest.raises(InputError, match=r"0 of .* are no longer than 3 tokens"):
        draw_lengths(load("arxiv_summarization").at, 10, np.random.default_rng(0), 3)
