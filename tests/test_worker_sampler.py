"""Sampling: exact where it is greedy, right in its frequencies where it is random, and the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from engine.errors import InputError
from engine.runtime.executor import GREEDY, SamplingParams
from engine.worker.sampler import sample

VOCABULARY = 50


def random_logits(rows: int, seed: int = 0, vocabulary: int = VOCABULARY) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def allowed(logits: Tensor, params: SamplingParams) -> dict[int, float]:
    """The tokens that may be drawn and their probabilities, one token after another in plain arithmetic."""
    weights = {token: np.exp(x / params.temperature) for token, x in enumerate(logits.double().tolist())}
    ranked = sorted(weights, key=lambda token: -weights[token])
    ranked = ranked[: params.top_k or None]
    total = sum(weights[token] for token in ranked)
    kept, reached = [], 0.0
    for token in ranked:
        if params.top_p < 1 and reached >= params.top_p:
            break
        kept.append(token)
        reached += weights[token] / total
    total = sum(weights[token] for token in kept)
    return {token: weights[token] / total for token in kept}


def test_greedy_takes_the_highest():
    logits = random_logits(7)
    wanted = [max(range(VOCABULARY), key=row.__getitem__) for row in logits.tolist()]
    assert sample(logits, None, []).tolist() == wanted
    assert sample(logits, (GREEDY,) * 7, range(7)).tolist() == wanted
    assert sample(logits, None, []).dtype == torch.int64


def test_no_rows():
    assert sample(torch.empty(0, VOCABULARY), None, []).shape == (0,)
    assert sample(torch.empty(0, VOCABULARY), (), []).shape == (0,)


def test_greedy_rows_of_a_mixed_batch_stay_exact():
    logits = random_logits(40)
    params = tuple(GREEDY if row % 2 else SamplingParams(temperature=5.0, seed=row) for row in range(40))
    tokens = sample(logits, params, [3] * 40)
    assert tokens[1::2].tolist() == logits.argmax(-1)[1::2].tolist()
    assert tokens[::2].tolist() != logits.argmax(-1)[::2].tolist()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=2.5),
        SamplingParams(temperature=1.0, top_k=5),
        SamplingParams(temperature=1.0, top_p=0.8),
        SamplingParams(temperature=0.7, top_p=0.3),
        SamplingParams(temperature=2.0, top_k=10, top_p=0.6),
        SamplingParams(temperature=1.0, top_k=1000, top_p=0.999),
    ],
    ids=str,
)
def test_frequencies_are_the_distribution(params):
    draws = 8000
    logits = random_logits(1, seed=1)
    rows = tuple(SamplingParams(params.temperature, params.top_k, params.top_p, seed=row % 100) for row in range(draws))
    tokens = sample(logits.expand(draws, -1), rows, [row // 100 for row in range(draws)])
    distribution = allowed(logits[0], params)
    counts = torch.bincount(tokens, minlength=VOCABULARY).double().numpy()
    assert set(np.flatnonzero(counts)) <= set(distribution)
    wanted = np.array([draws * distribution.get(token, 0.0) for token in range(VOCABULARY)])
    common = wanted >= 5  # the rare ones together, as the test wants some of each
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(wanted[common], wanted[~common].sum())
    if expected[-1] < 5:
        observed, expected = observed[:-1], expected[:-1] * observed[:-1].sum() / expected[:-1].sum()
    assert len(expected) > 1
    assert chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize(
    "params", [{"temperature": 1e-60}, {"temperature": 3.0, "top_p": 1e-60}, {"temperature": 9.0, "top_k": 1}]
)
def test_what_leaves_one_token_is_greedy(params):
    logits = 100 * random_logits(30)
    tokens = sample(logits, tuple(SamplingParams(**params, seed=row) for row in range(30)), range(30))
    assert tokens.tolist() == logits.argmax(-1).tolist()


def test_top_k_of_equal_logits():
    logits = torch.zeros(200, VOCABULARY)
    assert sample(logits, (SamplingParams(1.0, top_k=1, seed=0),) * 200, range(200)).tolist() == [0] * 200
    tokens = sample(logits, (SamplingParams(1.0, top_k=3, seed=0),) * 200, range(200))
    assert set(tokens.tolist()) == {0, 1, 2}


def test_masked_tokens_are_never_drawn():
    logits = torch.full((500, VOCABULARY), float("-inf"))
    logits[:, 7:9] = 0.0
    tokens = sample(logits, (SamplingParams(100.0, seed=1),) * 500, range(500))
    assert set(tokens.tolist()) == {7, 8}


@settings(max_examples=30)
@given(
    order=st.permutations(range(12)),
    size=st.integers(1, 12),
    temperatures=st.lists(st.sampled_from([0.0, 0.8, 1.5]), min_size=12, max_size=12),
    top_ks=st.lists(st.sampled_from([0, 1, 4]), min_size=12, max_size=12),
    top_ps=st.lists(st.sampled_from([0.5, 0.9, 1.0]), min_size=12, max_size=12),
)
def test_a_row_does_not_depend_on_its_companions(order, size, temperatures, top_ks, top_ps):
    logits = random_logits(12)
    logits[::3] = logits[::3].round()  # with ties
    params = tuple(
        SamplingParams(*of_row, seed=row) for row, of_row in enumerate(zip(temperatures, top_ks, top_ps, strict=True))
    )
    positions = np.arange(100, 112, dtype=np.int32)
    together = sample(logits, params, positions).tolist()
    chosen = order[:size]
    some = sample(logits[chosen], tuple(params[row] for row in chosen), positions[chosen]).tolist()
    assert some == [together[row] for row in chosen]


def test_seed_and_position_both_matter():
    logits = torch.zeros(64, 1000)
    at_one_place = sample(logits, tuple(SamplingParams(1.0, seed=seed) for seed in range(64)), [5] * 64)
    with_one_seed = sample(logits, (SamplingParams(1.0, seed=5),) * 64, range(64))
    again = sample(logits, (SamplingParams(1.0, seed=5),) * 64, range(64))
    assert with_one_seed.tolist() == again.tolist()
    assert len(set(at_one_place.tolist())) > 50
    assert len(set(with_one_seed.tolist())) > 50
    # position 5 with seed 6 is not position 6 with seed 5
    swapped = sample(logits[:2], (SamplingParams(1.0, seed=5), SamplingParams(1.0, seed=6)), [6, 5]).tolist()
    assert swapped[0] != swapped[1]


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64 - 1])
def test_any_seed_will_do(seed):
    token = sample(random_logits(1), (SamplingParams(1.0, seed=seed),), [2**31 - 1])
    assert 0 <= int(token) < VOCABULARY


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": -0.1}, "temperature -0.1: give 0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"top_k": -1}, "top_k -1: give 0"),
        ({"top_p": 0.0}, "top_p 0.0: give a share"),
        ({"top_p": 1.1}, "top_p 1.1: give a share"),
    ],
)
def test_parameters_are_checked(params, message):
    with pytest.raises(InputError, match=message):
        SamplingParams(**params)


@pytest.mark.gpu
def test_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    logits = random_logits(64).cuda()
    params = tuple(SamplingParams(row % 3 * 0.7, row % 4 * 3, 1 - row % 5 / 10, seed=row) for row in range(64))
    tokens = sample(logits, params, range(64))
    assert tokens.device == logits.device
    assert tokens[::3].tolist() == logits.argmax(-1)[::3].tolist()
    for row, of_row in enumerate(params):
        if of_row.temperature:
            assert int(tokens[row]) in allowed(logits[row].cpu(), of_row)
    flipped = sample(logits.flip(0), params[::-1], range(63, -1, -1))
    assert flipped.flip(0).tolist() == tokens.tolist()
