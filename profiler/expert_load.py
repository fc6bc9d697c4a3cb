"""How a batch's tokens spread over the experts of a layer, and over the ranks that hold them.

Three distributions are known, those of ai-dynamo/aiconfigurator's measurements (helper.py: balanced_logits,
power_law_logits_v3):

- balanced: every expert has the same number of tokens, as far as they go round
- power_law_1.01, power_law_1.2: an expert's popularity is drawn from a power law of that exponent, between 1 and 0.8 of
  the batch's tokens (0.01 and 2 where there are fewer choices than experts); 1.01 is nearly log-uniform

Of several ranks the one with the most tokens counts: all wait for it. What is random there is an expectation here: the
popularities are the quantiles of the law, and who is on which rank is drawn a number of times, with a fixed seed.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from engine.results.tables import Array
from engine.specs.model import EXPERT_LOADS

DRAWS = 16  # of experts to ranks


@lru_cache(maxsize=4096)
def loads(distribution: str, tokens: int, num_experts: int, top_k: int, ranks: int) -> Array:
    """Return the expected tokens of each expert of the busiest of `ranks` ranks, (num_experts / ranks,), falling."""
    assert distribution in EXPERT_LOADS, distribution
    local, chosen = num_experts // ranks, tokens * top_k
    if distribution == "balanced":
        each, more = divmod(chosen, num_experts)
        spread = np.full(local, float(each))
        spread[: min(local, -(-more // ranks))] += 1.0
        return spread
    alpha = float(distribution.rsplit("_", 1)[1])
    low, high = (1.0, max(0.8 * tokens, 1.0 + 1e-9)) if chosen > num_experts else (0.01, 2.0)
    quantiles = (np.arange(num_experts) + 0.5) / num_experts
    power = 1 - alpha
    popularity = ((high**power - low**power) * quantiles + low**power) ** (1 / power)
    spread = _capped(chosen * popularity / popularity.sum(), float(tokens))
    if ranks == 1:
        return spread[::-1].copy()
    rng = np.random.default_rng(0)
    busiest = np.zeros(local)
    for _ in range(DRAWS):
        groups = rng.permutation(spread).reshape(ranks, local)
        busiest += np.sort(groups[groups.sum(axis=1).argmax()])[::-1]
    return np.asarray(busiest / DRAWS)


def touched(spread: Array) -> float:
    """Return the expected experts that any token is sent to, whose weights are read.

    One that is expected to get less than a token gets one in that share of the batches.
    """
    return float(np.minimum(spread, 1.0).sum())


def padded(spread: Array, rows: int) -> float:
    """Return the rows that the experts compute where each one's tokens are rounded up to tiles of `rows`."""
    whole = np.ceil(spread / rows) * rows
    return float(np.where(spread < 1, spread * rows, whole).sum())


def deal(spread: Array, tokens: int, top_k: int) -> NDArray[np.int64]:
    """Return top_k different experts for each token, (tokens, top_k), so that each expert gets its load to a token."""
    counts = np.floor(spread + 1e-9).astype(np.int64)
    left = tokens * top_k - int(counts.sum())
    room = np.where(counts < tokens, spread - counts, -1.0)
    counts[np.argsort(-room, kind="stable")[:left]] += 1
    # an expert's places follow one another, and a token has each `tokens`-th: none has an expert twice
    return np.repeat(np.arange(len(counts)), counts).reshape(top_k, tokens).T.copy()


def _capped(spread: Array, most: float) -> Array:
    """Return the loads with those above `most` shared out among the others: no expert gets a token twice."""
    for _ in range(8):
        above = spread > most
        if not above.any():
            break
        rest = (spread[above] - most).sum()
        spread = np.where(above, most, spread)
        spread[~above] += rest * spread[~above] / spread[~above].sum()
    return spread
