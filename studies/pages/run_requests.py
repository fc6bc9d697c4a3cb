"""The requests of a run as a report shows them: a sample by prompt length, the slowest, and hits of the prefix cache.

found = read_requests(columns)
print(found.slowest["e2e_s"], found.hit_percent)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.results.tables import Array, Columns

MOST_DOTS = 2000  # requests that are drawn one by one
MOST_SLOW = 20
BANDS = 12  # of prompt lengths
FEWEST_IN_BAND = 5
HIT_BINS = 60


@dataclass(frozen=True, eq=False)
class Requests:
    """What is drawn of single requests; times are seconds, counted from the run's first arrival."""

    count: int
    prompt_tokens: Array  # (dots,) a sample, by which the three below are too
    ttft_s: Array
    hit_share: Array  # of the prompt that the prefix cache had
    ids: Array
    band_tokens: Array  # (bands,) middles of bands of prompt lengths, of all requests
    band_ttft_s: Array  # (bands, 2) median and P99 in each
    slowest: Columns  # (MOST_SLOW,) by end-to-end latency: id, arrived_s, waited_s (NaN: unknown), first_s, e2e_s, ...
    hit_edges_s: Array  # (bins + 1,)
    hit_percent: Array  # (bins,) of the prompt tokens of the requests that were first scheduled then; NaN for none


def read_requests(columns: Columns) -> Requests:
    """Return what is drawn of requests. `columns` are `requests.parquet`'s; old runs lack the prefix cache's hits."""
    count = len(columns["arrived_s"])
    origin = float(columns["arrived_s"].min())
    ids = columns.get("request_id", np.arange(count))
    prompts = columns["prompt_tokens"]
    hits = columns.get("prefix_hit_tokens", np.zeros(count, dtype=np.int32))
    ttft = columns["first_token_s"] - columns["arrived_s"]
    chosen = np.arange(count)
    if count > MOST_DOTS:
        chosen = np.sort(np.random.default_rng(0).choice(chosen, MOST_DOTS, replace=False))
    middles, statistics = _bands(prompts, ttft)
    edges, percent = _hits(columns["scheduled_s"] - origin, prompts, hits)
    return Requests(
        count=count,
        prompt_tokens=prompts[chosen].astype(np.int32),
        ttft_s=ttft[chosen].astype(np.float32),
        hit_share=(hits[chosen] / np.maximum(prompts[chosen], 1)).astype(np.float32),
        ids=ids[chosen].astype(np.int32),
        band_tokens=middles,
        band_ttft_s=statistics,
        slowest=_slowest(columns, ids, hits, origin),
        hit_edges_s=edges,
        hit_percent=percent,
    )


def _bands(prompts: Array, ttft: Array) -> tuple[Array, Array]:
    """Return the middle of bands of prompt lengths, of about as many requests each, and median and P99 TTFT in each."""
    edges = np.unique(np.quantile(prompts, np.linspace(0, 1, BANDS + 1)))
    band = np.clip(np.searchsorted(edges, prompts, side="right") - 1, 0, max(len(edges) - 2, 0))
    found = [
        (float(np.median(prompts[mine])), *np.quantile(ttft[mine], [0.5, 0.99]).tolist())
        for i in range(max(len(edges) - 1, 1))
        if (mine := band == i).sum() >= FEWEST_IN_BAND
    ]
    rows = np.array(found, dtype=float).reshape(-1, 3)
    return rows[:, 0], rows[:, 1:]


def _slowest(columns: Columns, ids: Array, hits: Array, origin: float) -> Columns:
    took = columns["last_token_s"] - columns["arrived_s"]
    order = np.argsort(-took, kind="stable")[:MOST_SLOW]
    since = {"waited_s": "scheduled_s", "first_s": "first_token_s", "e2e_s": "last_token_s"}
    after = {name: columns[until] - columns["arrived_s"] for name, until in since.items()}
    every = {**columns, **after, "id": ids, "hits": hits, "arrived_s": columns["arrived_s"] - origin}
    kept = ("id", "arrived_s", *since, "prompt_tokens", "output_tokens", "hits", "preemptions")
    return {name: every[name][order] for name in kept}


def _hits(scheduled: Array, prompts: Array, hits: Array) -> tuple[Array, Array]:
    """Return edges of time and the share (%) of prompt tokens found by requests that were first scheduled between."""
    known = ~np.isnan(scheduled)
    if not known.any() or not hits.any():
        return np.zeros(1), np.empty(0)
    bins = int(np.clip(known.sum() // 8, 4, HIT_BINS))
    edges = np.linspace(0.0, max(float(scheduled[known].max()), 1e-9), bins + 1)
    place = np.clip((scheduled[known] / edges[-1] * bins).astype(int), 0, bins - 1)
    tokens = np.bincount(place, prompts[known], bins)
    found = np.bincount(place, hits[known], bins)
    return edges, np.where(tokens > 0, 100 * found / np.maximum(tokens, 1), np.nan)
