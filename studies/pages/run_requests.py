"""Single requests and batches of a run as a report shows them: samples, the slowest, those around the longest gap.

found = read_requests(columns)
print(found.slowest["e2e_s"], found.hit_percent)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from engine.results.tables import Array, Columns, open_parquet
from studies.pages.run_timeline import chunks

MOST_DOTS = 2000  # requests that are drawn one by one
MOST_SLOW = 20
BANDS = 12  # of prompt lengths
FEWEST_IN_BAND = 5
HIT_BINS = 60
MOST_BATCHES = 160  # a stage
_COLUMNS = ["replica", "stage", "start_s", "duration_s", "num_tokens", "num_decodes", "num_prefills", "kv_blocks",
            "num_waiting", "max_tbt_s"]  # fmt: skip


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


@dataclass(frozen=True, eq=False)
class Excerpt:
    """Batches of one replica, one row for each on each stage; times are seconds from the run's first arrival."""

    replica: int
    stages: int
    gap_s: float | None  # the longest between tokens, which these are around; None where no gap ended
    time_s: float  # when it ended, or of the first batch
    rows: Columns  # stage, start_s, duration_s, num_tokens, num_decodes, num_prefills, kv_blocks, num_waiting


def read_excerpt(path: Path, origin_s: float) -> Excerpt | None:
    """Return the batches around the longest gap between output tokens, or the first ones; None without a batch."""
    with open_parquet(path) as file:
        if not file.metadata.num_rows:
            return None
        gap, ended, replica = _longest(file)
        nearest: Columns = {}
        for chunk in chunks(file, _COLUMNS):
            mine = chunk["replica"] == replica
            if mine.any():
                parts = [nearest] * bool(nearest) + [{name: values[mine] for name, values in chunk.items()}]
                rows = {name: np.concatenate([part[name] for part in parts]) for name in chunk}
                nearest = _nearest(rows, ended)
    order = np.lexsort((nearest["stage"], nearest["start_s"]))
    rows = {name: values[order] for name, values in nearest.items() if name not in ("replica", "max_tbt_s")}
    rows["start_s"] = rows["start_s"] - origin_s
    return Excerpt(replica, int(rows["stage"].max()) + 1, gap, ended - origin_s, rows)


def _longest(file: pq.ParquetFile) -> tuple[float | None, float, int]:
    """Return the longest gap, when it ended and on which replica; without a gap when the first batch did."""
    best: tuple[float | None, float, int] = (None, 0.0, 0)
    for i, chunk in enumerate(chunks(file, ["replica", "start_s", "duration_s", "max_tbt_s"])):
        if i == 0:
            best = (None, float(chunk["start_s"][0]), int(chunk["replica"][0]))
        gaps = np.nan_to_num(chunk["max_tbt_s"])
        at = int(np.argmax(gaps))
        if gaps[at] > (best[0] or 0.0):
            best = (float(gaps[at]), float(chunk["start_s"][at] + chunk["duration_s"][at]), int(chunk["replica"][at]))
    return best


def _nearest(rows: Columns, time: float) -> Columns:
    """Keep of each stage the batches that are nearest to a time."""
    keep = np.zeros(len(rows["stage"]), dtype=bool)
    for stage in np.unique(rows["stage"]):
        mine = np.flatnonzero(rows["stage"] == stage)
        away: Array = np.abs(rows["start_s"][mine] + rows["duration_s"][mine] - time)
        keep[mine[np.argsort(away, kind="stable")[:MOST_BATCHES]]] = True
    return {name: values[keep] for name, values in rows.items()}
