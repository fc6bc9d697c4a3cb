"""From the timestamps of requests to latencies, percentiles, goodput and verdicts.

The metrics themselves are defined in `engine.results.metric_table`. Goodput: requests/s that meet every SLO. The keys
of a summary are those of vLLM's serving benchmark where it has one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engine.results.metric_table import METRICS, Metric, drawn_metrics, find_metric
from engine.results.slo import SLO
from engine.results.tables import Array, Columns
from engine.scheduling.scheduler import Scheduler
from engine.workload.client import ClientSpec

PERCENTILES = (90.0, 95.0, 99.0, 99.9)
SKETCH_K = 4096  # of the KLL sketch: percentile ranks within 0.1 %

QUANTILES = np.array([*np.arange(199) / 200, 0.995, 0.999, 1.0])  # at which a distribution is drawn


def summary_key(statistic: str, metric: str) -> str:
    """The key in a summary, in ms, of a statistic (mean, p50, p99, ...) of a metric: vLLM's names where it has one.

    Raises InputError for an unknown metric.
    """
    return f"{'median' if statistic == 'p50' else statistic}_{find_metric(metric).summary_name}_ms"


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

    def of(self, chosen: Array, counts: Array) -> Array | None:
        """The gaps (s) of the `chosen` (n,) requests, of which each has `counts` (n,), in the order they were added.

        None where they are not kept exactly, or not in order any more: ask before the statistics.
        """
        if not self.exact or len(self._sorted) or int(counts.sum()) != self.count:
            return None
        every = np.concatenate(self._blocks) if self._blocks else self._sorted
        return np.asarray(every[np.repeat(chosen, counts)])

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
    return {metric.key: _values(metric, requests) for metric in METRICS.values() if not metric.per_gap}


def _values(metric: Metric, requests: Columns) -> Array:
    """One value of a per-request metric (s) for each request; NaN where it is undefined."""
    assert metric.value is not None, f"{metric.key} has a value for each gap"
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(requests["output_tokens"] >= metric.least_tokens, metric.value(requests), np.nan)


def distributions(requests: Columns, summary: Mapping[str, Any]) -> dict[str, tuple[Array, Array]]:
    """Quantiles, and the values (s) there, of each metric whose distribution is drawn; none of one without a value.

    `requests` have the columns of a Recorder, `summary` is of the same run.
    """
    found: dict[str, tuple[Array, Array]] = {}
    for metric in drawn_metrics():
        if metric.per_gap:
            if pairs := summary["tbt_quantiles_s"]:
                quantiles, gaps = np.array(pairs, dtype=float).T
                found[metric.key] = quantiles, gaps
            continue
        values = _values(metric, requests)
        values = values[~np.isnan(values)]
        if len(values):
            found[metric.key] = QUANTILES, np.quantile(values, QUANTILES)
    return found


def tbt_percentiles(slos: Sequence[SLO]) -> tuple[float, ...]:
    """The percentiles of a request's own gaps that goodput under `slos` needs."""
    return tuple(sorted({s.percentile for s in slos if find_metric(s.metric).per_gap and s.percentile is not None}))


def meets(requests: Columns, slos: Sequence[SLO]) -> Array:
    """Which requests meet every SLO on their own.

    Of a metric that each request has one value of, that is held against the threshold whatever the statistic; of its
    gaps (TBT) the SLO's own statistic is taken. A metric that it lacks is met.
    """
    good = np.ones(len(requests["arrived_s"]), dtype=bool)
    for slo in slos:
        good &= ~(_own_value(requests, slo) > slo.threshold_s)
    return good


def _own_value(requests: Columns, slo: SLO) -> Array:
    """What each request on its own has of an SLO's metric (s)."""
    metric = find_metric(slo.metric)
    if not metric.per_gap:
        return _values(metric, requests)
    if slo.statistic == "mean":
        return _values(find_metric("tpot"), requests)  # the mean of a request's gaps
    return requests["max_tbt_s" if slo.percentile is None else f"p{slo.percentile:g}_tbt_s"]


def summarize(
    requests: Columns,
    gaps: Gaps,
    slos: Sequence[SLO],
    num_arrived: int,
    num_dropped: int,
    client: ClientSpec | None = None,
) -> dict[str, Any]:
    """The summary of a run: vLLM's benchmark keys, then ours. Latencies in ms, rates per second.

    `num_arrived` requests came in; those that are not among `requests` failed. `num_dropped` were too long to be asked.
    `client` says whether it was a closed loop.
    """
    count = len(requests.get("arrived_s", ()))
    if not count:
        raise ValueError("no request finished, so there is nothing to summarise")
    max_concurrency, users = (None, None) if client is None else (client.max_concurrency, client.users)
    calm = steady(requests, max_concurrency, gaps)  # first: the statistics of all gaps sort them
    percentiles = tuple(sorted({50.0, *PERCENTILES, *(s.percentile for s in slos if s.percentile is not None)}))
    table = {name: statistics(column[~np.isnan(column)], percentiles) for name, column in latencies(requests).items()}
    table |= {metric.key: gaps.statistics(percentiles) for metric in METRICS.values() if metric.per_gap}
    start, end = float(requests["arrived_s"].min()), float(requests["last_token_s"].max())
    duration = end - start
    input_tokens, output_tokens = int(requests["prompt_tokens"].sum()), int(requests["output_tokens"].sum())
    good = int(meets(requests, slos).sum())
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
    for metric in METRICS:
        for statistic, value in table[metric].items():
            summary[summary_key(statistic, metric)] = 1e3 * value
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
    bound = f"{users} users" if users is not None else f"at most {max_concurrency} requests at once"
    closed = client is not None and client.seats is not None
    why = f"{bound}: the client waits, so no queue shows saturation"
    summary["saturation"] = _unknown(why) if closed else saturation(requests)
    return summary | calm


def prefix_use(replicas: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How much of the prompts was found in the replicas' caches; nothing where no prefix is cached.

    `prefix_hit_rate` is hit tokens over the tokens that were looked up when requests were first admitted. As in vLLM's
    counters, what requests find again after a preemption is kept apart: `prefix_resumed_hit_tokens`.
    """
    asked, hit, resumed, evicted = (
        sum(replica[f"prefix_{name}"] for replica in replicas)
        for name in ("query_tokens", "hit_tokens", "resumed_hit_tokens", "evictions")
    )
    if not asked:
        return {}
    return {
        "prefix_hit_tokens": hit,
        "prefix_hit_rate": hit / asked,
        "prefix_resumed_hit_tokens": resumed,
        "prefix_evictions": evicted,
    }


def memory_and_steady_use(replicas: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The fullest that a replica's KV cache was, and the mean share of the steady window that the stages worked."""
    found = {"peak_kv_utilization": max(replica["peak_kv_utilization"] for replica in replicas)}
    stages = [share for replica in replicas for share in replica.get("steady_stage_utilization", ())]
    return found | ({"steady_utilization": sum(stages) / len(stages)} if stages else {})


def steady_window(requests: Columns, max_concurrency: int | None = None) -> tuple[float, float] | None:
    """The part of a run (s) without its ramp-up and drain; None where nothing would be left.

    Of a closed loop from the first to the last request whose sending makes it `max_concurrency` in the system. Of an
    open loop from when the median time of a request has passed since the first arrival, so that as many are under
    way as will be, to the last arrival.
    """
    arrived = np.sort(requests["arrived_s"])
    left = np.sort(requests["last_token_s"])
    end = float(arrived[-1])
    if max_concurrency is None:
        start = float(arrived[0]) + float(np.median(requests["last_token_s"] - requests["arrived_s"]))
    else:
        inside = np.arange(1, len(arrived) + 1) - np.searchsorted(left, arrived, side="right")
        full = np.flatnonzero(inside >= max_concurrency)
        start, end = (float(arrived[full[0]]), float(arrived[full[-1]])) if len(full) else (end, end)
    return (start, end) if start < end else None


def steady(requests: Columns, max_concurrency: int | None = None, gaps: Gaps | None = None) -> dict[str, Any]:
    """`steady_*` keys of a summary: rates in the steady window and latencies (ms) of the requests that arrive in it.

    Those that a closed loop begins with, up to the one that makes `max_concurrency` in the system, are its ramp-up.
    A request's output tokens are taken to come evenly between its first and its last, its prompt to be computed evenly
    between its first batch and its first token; empty without a window. TBT needs the exact `gaps` of these requests,
    nothing of which has been asked before.
    """
    window = steady_window(requests, max_concurrency)
    if window is None:
        return {}
    start, end = window
    duration = end - start
    arrived = requests["arrived_s"]
    arrive = ((arrived >= start) if max_concurrency is None else (arrived > start)) & (arrived <= end)
    if not arrive.any():
        return {}
    first, last = requests["first_token_s"], requests["last_token_s"]

    def within(begun: Array, ended: Array) -> Array:
        """Share of each span of time that is in the window; of one without a length whether its end is."""
        inside = np.clip(np.minimum(ended, end) - np.maximum(begun, start), 0, None)
        long = ended > begun
        return np.where(long, inside / np.where(long, ended - begun, 1), (ended >= start) & (ended <= end))

    outputs = float((within(first, last) * requests["output_tokens"]).sum())
    prompts = float((within(requests["scheduled_s"], first) * requests["prompt_tokens"]).sum())
    mine = {name: column[arrive] for name, column in requests.items()}
    found: dict[str, Any] = {
        "steady_window_s": [start, end],
        "steady_requests": int(arrive.sum()),
        "steady_request_throughput": float(((last >= start) & (last <= end)).sum()) / duration,
        "steady_output_throughput": outputs / duration,
        "steady_total_token_throughput": (prompts + outputs) / duration,
    }
    table = latencies(mine)
    if gaps is not None and (own := gaps.of(arrive, requests["output_tokens"] - 1)) is not None:
        table |= {metric.key: own for metric in METRICS.values() if metric.per_gap}
    for name, values in table.items():
        for statistic, value in statistics(values[~np.isnan(values)], (50.0, 90.0, 99.0)).items():
            found[f"steady_{summary_key(statistic, name)}"] = 1e3 * value
    return found


def saturation(requests: Columns) -> dict[str, Any]:
    """Is the queue growing? Judged at each arrival from the requests that wait for their first scheduling, and from
    those that came and have not finished.

    The first fifth of the arrivals is warm-up. The rise of a count is its mean over the last twentieth of the rest less
    that over the first. What neither grows nor shrinks wanders like a random walk, by about the standard deviation of a
    step times the root of their number; what is stable stays far below that. The count is growing when it rose by more
    than that, by more than 1 % of the arrivals, and by more than two requests. `growth` is the rise per arrival: the
    share of the load that is not carried. Where requests in the system grow and nobody waits for more than two batches,
    it is not called saturated: the run may be filling up still. Near capacity short runs tell little: with Poisson
    arrivals of equal requests at 90 % load 3 runs of 300 in 100 look saturated, at 110 % load 27 are missed.
    """
    arrived = np.sort(requests["arrived_s"])
    count = len(arrived)
    warm_up = count // 5
    if count < 50:
        return _unknown(f"too few requests ({count}) to tell whether it is sustained")
    if arrived[0] == arrived[-1]:
        return _unknown("all requests arrive at once: there is no rate to sustain")
    came = np.arange(1, count + 1)

    def growth_of(left: Array) -> float | None:
        return _growth((came - np.searchsorted(np.sort(left), arrived, side="right"))[warm_up:])

    outside = bool(np.isnan(requests["scheduled_s"]).any())  # measured there: nobody knows when it was scheduled
    growth = growth_of(requests["first_token_s" if outside else "scheduled_s"])
    if growth is None:
        usual = float(np.median(requests["last_token_s"] - requests["arrived_s"]))
        if arrived[warm_up] - arrived[0] < usual:  # it is still filling up
            span = arrived[-1] - arrived[0]
            return _unknown(
                f"too short to tell whether it is sustained: all requests came within {span:.3g} s and the median one "
                f"took {usual:.3g} s; raise --num-prompts"
            )
        growth = growth_of(requests["last_token_s"])
        if growth is not None and not _anyone_waits(requests):
            return {
                "growing": None,
                "growth": growth,
                "verdict": f"too short to tell whether it is sustained: nobody waits, but requests under way grow by "
                f"{growth:.0%} of the arrivals; raise --num-prompts",
            }
    if growth is None:
        return {
            "growing": False,
            "growth": 0.0,
            "verdict": f"sustained: the queue does not grow over these {count:,} requests",
        }
    verdict = f"saturated: the queue grows by {growth:.0%} of the arrivals, so no latency here is a steady one"
    return {"growing": True, "growth": growth, "verdict": verdict}


def _anyone_waits(requests: Columns) -> bool:
    """Whether a request waited for its first batch longer than the two that may be under way, or was preempted."""
    if requests.get("preemptions", np.zeros(1)).any():
        return True
    gaps = requests.get("max_tbt_s", np.zeros(1))
    longest = float(np.nanmax(gaps)) if not np.isnan(gaps).all() else 0.0
    return bool((requests["scheduled_s"] - requests["arrived_s"] > 2 * longest).any())


def _unknown(why: str) -> dict[str, Any]:
    return {"growing": None, "growth": None, "verdict": why}


def _growth(level: Array) -> float | None:
    """The rise of a count per arrival, or None if it is not growing (see `saturation`)."""
    span = len(level)
    ends, lag = span // 20, span // 40
    rise = float(level[-ends:].mean() - level[:ends].mean())
    wander = float(np.sqrt((level[lag::lag] - level[:-lag:lag]).var() / lag * span))
    return rise / (span - ends) if rise > max(wander, 0.01 * span, 2.0) else None


def describe(summary: Mapping[str, Any]) -> list[str]:
    """The verdict of a run in words, whether bursts queue, and then each SLO's."""
    bursts = burst_finding(summary)
    found = [] if bursts is None else [bursts[0].lower() + bursts[1:]]
    return [summary["saturation"]["verdict"], *found, *map(describe_slo, summary["slos"])]


def burst_finding(summary: Mapping[str, Any]) -> str | None:
    """Return a sentence on requests that wait for long although the queue does not grow; None where none do."""
    usual, late = (summary.get(summary_key(statistic, "scheduling_delay"), 0.0) / 1e3 for statistic in ("p50", "p99"))
    if summary["saturation"]["growing"] is not False or late < max(1.0, 10 * usual):
        return None
    return f"Bursts queue: one request in a hundred waits {late:.3g} s or more for its first batch"


def describe_slo(entry: Mapping[str, Any]) -> str:
    """Whether an SLO of a summary is met, in words."""
    value = "there is no such value" if entry["value_s"] is None else f"{entry['value_s']:.3g} s"
    return f"{entry['slo']} is {'met' if entry['met'] else 'missed'}: {value}"


def replica_use(
    scheduler: Scheduler,
    busy_s: Sequence[float],
    occupied_s: float,
    duration: float,
    peak_kv_blocks: int,
    steady_busy: Sequence[float],
) -> dict[str, Any]:
    """How busy a replica's stages were. A bubble is time that a stage idles while requests are at the replica.

    `steady_busy` is the share of the steady window that each stage worked; empty without a window.
    """
    resumed_queries, resumed_hits = scheduler.resumed_query_tokens, scheduler.resumed_hit_tokens
    steady_use = {"steady_stage_utilization": list(steady_busy)} if steady_busy else {}
    return {
        "recomputed_tokens": scheduler.recomputed_tokens,
        "prefix_query_tokens": scheduler.prefix_query_tokens - resumed_queries,
        "prefix_hit_tokens": scheduler.prefix_hit_tokens - resumed_hits,
        "prefix_resumed_query_tokens": resumed_queries,
        "prefix_resumed_hit_tokens": resumed_hits,
        "prefix_evictions": scheduler.kv_cache.evictions,
        "peak_kv_blocks": peak_kv_blocks,
        "peak_kv_utilization": peak_kv_blocks / scheduler.kv_cache.num_blocks,
        "occupied_s": occupied_s,
        "stage_utilization": [min(1.0, busy / duration) for busy in busy_s],
        "stage_bubbles": [max(0.0, 1 - busy / occupied_s) if occupied_s else 0.0 for busy in busy_s],
        **steady_use,
    }
