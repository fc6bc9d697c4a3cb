"""From the timestamps of requests to latencies, percentiles, goodput and verdicts: each metric is defined here, once.

TTFT: first output token - arrival. TBT (alias ITL): each gap between output tokens. TPOT: (E2E - TTFT) / (output - 1).
E2E: last token - arrival. Scheduling delay: first scheduled - arrival. Normalised latency: E2E / output tokens.
Goodput: requests/s that meet every SLO. The keys of a summary are those of vLLM's serving benchmark where it has one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engine.specs import SLO
from engine.tables import Array, Columns

PERCENTILES = (90.0, 95.0, 99.0, 99.9)
SKETCH_K = 4096  # of the KLL sketch: percentile ranks within 0.1 %


class Gaps:
    """Every gap between output tokens of a run (s), exactly or as a quantile sketch (Apache DataSketches' KLL)."""

    def __init__(self, exact: bool = True) -> None:
        self.exact = exact
        self.count = 0
        self._sum = 0.0
        self._sum_of_squares = 0.0
        self._max = 0.0
        self._blocks: list[Array] = []
        self._sorted: Array = np.empty(0)
        if not exact:
            from datasketches import kll_doubles_sketch

            self._sketch = kll_doubles_sketch(SKETCH_K)

    @property
    def method(self) -> str:
        return "exact" if self.exact else f"KLL sketch, ranks within {self._sketch.normalized_rank_error(False):.2%}"

    def add(self, gaps: Array) -> None:
        if not len(gaps):
            return
        self.count += len(gaps)
        self._sum += float(gaps.sum())
        self._sum_of_squares += float(np.square(gaps).sum())  # not a dot product: BLAS would start threads
        self._max = max(self._max, float(gaps.max()))
        if self.exact:
            self._blocks.append(gaps)
        else:
            self._sketch.update(gaps)

    def statistics(self, percentiles: Sequence[float]) -> dict[str, float]:
        """mean, std, max and the `percentiles` (as p50, p99.9, ...); empty without a gap."""
        if not self.count:
            return {}
        mean = self._sum / self.count
        return {
            "mean": mean,
            "std": max(0.0, self._sum_of_squares / self.count - mean * mean) ** 0.5,
            "max": self._max,
            **{f"p{p:g}": value for p, value in zip(percentiles, self._percentiles(percentiles), strict=True)},
        }

    def quantiles(self) -> list[tuple[float, float]]:
        """(quantile, gap in s) pairs to draw the distribution from; empty without a gap."""
        percentiles = [*np.arange(0, 99, 0.5).tolist(), 99.0, 99.5, 99.9, 99.99, 100.0]
        if not self.count:
            return []
        return [(p / 100, value) for p, value in zip(percentiles, self._percentiles(percentiles), strict=True)]

    def _percentiles(self, percentiles: Sequence[float]) -> list[float]:
        if not self.exact:
            return [float(value) for value in self._sketch.get_quantiles([p / 100 for p in percentiles])]
        if self._blocks:
            self._sorted = np.sort(np.concatenate([self._sorted, *self._blocks]))
            self._blocks = []
        count = np.array([self.count])
        return [float(interpolate(self._sorted, 0, count, percentile)[0]) for percentile in percentiles]


def statistics(values: Array, percentiles: Sequence[float]) -> dict[str, float]:
    """mean, std, max and the `percentiles` (as p50, p99.9, ...) of `values`; empty of none."""
    if not len(values):
        return {}
    return {
        "mean": float(values.mean()),
        "std": float(values.std()),
        "max": float(values.max()),
        **{f"p{p:g}": float(v) for p, v in zip(percentiles, np.percentile(values, percentiles), strict=True)},
    }


def grouped_percentile(values: Array, counts: Array, percentiles: Sequence[float]) -> list[Array]:
    """Percentiles of consecutive groups of `values`, `counts` in each, with linear interpolation; NaN of an empty one.

    Returns one array (as long as `counts`) for each percentile.
    """
    start = np.cumsum(counts) - counts
    some = counts > 0
    results = [np.full(len(counts), np.nan) for _ in percentiles]
    if not some.any():
        return results
    if list(percentiles) == [100.0]:
        results[0][some] = np.maximum.reduceat(values, start[some])
        return results
    ordered = values.copy()
    for begin, end in zip(start.tolist(), (start + counts).tolist(), strict=True):
        ordered[begin:end].sort()  # groups are a few hundred long: much faster than one sort of (group, value)
    for result, percentile in zip(results, percentiles, strict=True):
        result[some] = interpolate(ordered, start[some], counts[some], percentile)
    return results


def interpolate(ordered: Array, start: Array | int, counts: Array, percentile: float) -> Array:
    """A percentile of each group of `ordered` (sorted within it), interpolated linearly between order statistics."""
    place = (counts - 1) * (percentile / 100)
    below = np.floor(place).astype(np.int64)
    above = np.ceil(place).astype(np.int64)
    low, high = ordered[start + below], ordered[start + above]
    return low + (high - low) * (place - below)


def latencies(requests: Columns) -> Columns:
    """Each per-request metric (s) from the columns of a Recorder; NaN where it is undefined (TPOT of one token)."""
    e2e = requests["last_token_s"] - requests["arrived_s"]
    ttft = requests["first_token_s"] - requests["arrived_s"]
    output = requests["output_tokens"]
    with np.errstate(divide="ignore", invalid="ignore"):
        tpot = np.where(output > 1, (e2e - ttft) / (output - 1), np.nan)
    return {
        "ttft": ttft,
        "tpot": tpot,
        "e2e": e2e,
        "scheduling_delay": requests["scheduled_s"] - requests["arrived_s"],
        "normalized_latency": e2e / output,
    }


def tbt_percentiles(slos: Sequence[SLO]) -> tuple[float, ...]:
    """The percentiles of a request's own gaps that goodput under `slos` needs."""
    return tuple(sorted({s.percentile for s in slos if s.metric == "tbt" and s.percentile is not None}))


def meets(requests: Columns, slos: Sequence[SLO]) -> Array:
    """Which requests meet every SLO on their own.

    A request has one TTFT, E2E, TPOT, scheduling delay and normalised latency, which is held against the threshold
    whatever the statistic; of its gaps (TBT) the SLO's own statistic is taken. A metric that it lacks is met.
    """
    values = latencies(requests)
    good = np.ones(len(requests["arrived_s"]), dtype=bool)
    for slo in slos:
        if slo.metric != "tbt":
            value = values[slo.metric]
        elif slo.statistic == "mean":
            value = values["tpot"]
        else:
            value = requests["max_tbt_s" if slo.percentile is None else f"p{slo.percentile:g}_tbt_s"]
        good &= ~(value > slo.threshold_s)
    return good


def summarize(requests: Columns, gaps: Gaps, slos: Sequence[SLO], num_arrived: int, num_dropped: int) -> dict[str, Any]:
    """The summary of a run: vLLM's benchmark keys, then ours. Latencies in ms, rates per second.

    `num_arrived` requests came in; those that are not among `requests` failed. `num_dropped` were too long to be asked.
    """
    count = len(requests.get("arrived_s", ()))
    if not count:
        raise ValueError("no request finished, so there is nothing to summarise")
    percentiles = tuple(sorted({50.0, *PERCENTILES, *(s.percentile for s in slos if s.percentile is not None)}))
    values = latencies(requests)
    start, end = float(requests["arrived_s"].min()), float(requests["last_token_s"].max())
    duration = end - start
    input_tokens, output_tokens = int(requests["prompt_tokens"].sum()), int(requests["output_tokens"].sum())
    good = int(meets(requests, slos).sum())
    table = {name: statistics(column[~np.isnan(column)], percentiles) for name, column in values.items()}
    table["tbt"] = gaps.statistics(percentiles)
    summary: dict[str, Any] = {
        "duration": duration,
        "completed": count,
        "failed": num_arrived - count,
        "dropped": num_dropped,
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": count / duration,
        "request_goodput": good / duration,
        "output_throughput": output_tokens / duration,
        "total_token_throughput": (input_tokens + output_tokens) / duration,
    }
    vllm_names = {"tbt": "itl", "e2e": "e2el"}
    for metric in ("ttft", "tpot", "tbt", "e2e", "scheduling_delay", "normalized_latency"):
        for statistic, value in table[metric].items():
            key = "median" if statistic == "p50" else statistic
            summary[f"{key}_{vllm_names.get(metric, metric)}_ms"] = 1e3 * value
    summary["slos"] = [
        {
            "slo": str(slo),
            "value_s": table[slo.metric].get(slo.statistic),
            "met": table[slo.metric].get(slo.statistic, 0.0) <= slo.threshold_s,
        }
        for slo in slos
    ]
    summary["tbt_quantiles_s"] = gaps.quantiles()
    summary["requests_meeting_slos"] = good
    summary["preemptions"] = int(requests["preemptions"].sum())
    summary["token_percentiles"] = gaps.method
    summary["saturation"] = saturation(requests)
    return summary


def saturation(requests: Columns) -> dict[str, Any]:
    """Is the queue growing? Judged from the requests that wait for their first scheduling, at each arrival.

    The first fifth of the arrivals is warm-up. The rise is the queue's mean length over the last twentieth of the rest
    less that over the first. A queue that neither grows nor shrinks wanders like a random walk, by about the standard
    deviation of a step times the root of their number; a stable one stays far below that. The queue is growing when it
    rose by more than that, by more than 1 % of the arrivals, and by more than two requests. `growth` is the rise per
    arrival: the share of the load that is not carried. Near capacity short runs tell little: with Poisson arrivals of
    equal requests at 90 % load 3 runs of 300 in 100 look saturated, at 110 % load 27 are missed.
    """
    arrived = np.sort(requests["arrived_s"])
    scheduled = np.sort(requests["scheduled_s"])
    count = len(arrived)
    if count < 50:
        return {
            "growing": None,
            "growth": None,
            "verdict": f"{count} requests are too few to tell whether it is sustained",
        }
    if arrived[0] == arrived[-1]:
        return {"growing": None, "growth": None, "verdict": "all requests arrive at once: there is no rate to sustain"}
    waiting = (np.arange(1, count + 1) - np.searchsorted(scheduled, arrived, side="right"))[count // 5 :]
    span = len(waiting)
    ends, lag = span // 20, span // 40
    rise = float(waiting[-ends:].mean() - waiting[:ends].mean())
    wander = float(np.sqrt((waiting[lag::lag] - waiting[:-lag:lag]).var() / lag * span))
    growth = rise / (span - ends)
    growing = rise > max(wander, 0.01 * span, 2.0)
    if growing:
        verdict = f"saturated: the queue grows by {growth:.0%} of the arrivals, so no latency here is a steady one"
    else:
        verdict = "sustained: the queue does not grow"
    return {"growing": growing, "growth": growth, "verdict": verdict}


def describe(summary: Mapping[str, Any]) -> str:
    """The verdict of a run in words."""
    lines = [summary["saturation"]["verdict"]]
    for slo in summary["slos"]:
        value = slo["value_s"]
        shown = "no such token gap" if value is None else f"{value:.3g} s"
        lines.append(f"{slo['slo']} is {'met' if slo['met'] else 'missed'}: {shown}")
    return "; ".join(lines)
