"""The latency metrics, each defined once, in `METRICS`.

SLOs, the summary of a run, goodput, the early stopping of a search, the printed table and the pages all read this
table, so a metric that is added to it is in all of them:

    add_metric(Metric(key="decode_time", name="decode time", definition="last token - first token",
                      value=lambda row: row["last_token_s"] - row["first_token_s"]))
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.errors import InputError, unknown

if TYPE_CHECKING:
    from engine.results.tables import Array

# what a metric may be computed from: columns of the finished requests (`results.recorder`), times on the run's clock
REQUEST_COLUMNS = (
    "arrived_s", "scheduled_s", "first_token_s", "last_token_s", "prompt_tokens", "output_tokens", "preemptions",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A latency in seconds: one value for each request, or one for each gap between a request's output tokens.

    `value` computes it from `REQUEST_COLUMNS`, by arithmetic that holds for the arrays of many requests and for the
    numbers of one alike; None stands for the gaps themselves. A request of fewer than `least_tokens` output tokens has
    no value. No value is below `lower_bound_s`, so a request that has not finished adds at least that to a mean; None
    if there is no such bound, and then a search never gives up a trial for a mean of the metric.
    """

    key: str
    name: str  # in tables and on pages
    definition: str
    value: Callable[[Mapping[str, Any]], Any] | None
    vllm_key: str | None = None  # of the same metric in vLLM's benchmark results, where it differs from `key`
    aliases: tuple[str, ...] = ()  # that an SLO may use, besides `vllm_key`
    least_tokens: int = 1
    lower_bound_s: float | None = 0.0
    title: str | None = None  # of the figure of its distribution; None: pages draw none, and validations omit it

    def __post_init__(self) -> None:
        for name in self.names:
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
                raise InputError(f"metric name {name!r}: use lower-case letters, digits and underscores, as in tbt")

    @property
    def per_gap(self) -> bool:
        """Whether each gap between tokens has a value, and not each request."""
        return self.value is None

    @property
    def things(self) -> str:
        """What has a value each, in words."""
        return "gaps between tokens" if self.per_gap else "requests"

    @property
    def summary_name(self) -> str:
        """Its name in the keys of a summary."""
        return self.vllm_key or self.key

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that an SLO may use."""
        return self.key, *(() if self.vllm_key is None else (self.vllm_key,)), *self.aliases

    def count(self, output_tokens: Array) -> int:
        """How many values requests of so many `output_tokens` (n,) have."""
        return int((output_tokens - 1).sum() if self.per_gap else (output_tokens >= self.least_tokens).sum())


def _ttft(row: Mapping[str, Any]) -> Any:
    return row["first_token_s"] - row["arrived_s"]


def _e2e(row: Mapping[str, Any]) -> Any:
    return row["last_token_s"] - row["arrived_s"]


_BUILT_IN = (
    Metric(
        key="ttft", name="TTFT", definition="first output token - arrival", value=_ttft,
        title="Time to first token (TTFT)",
    ),
    Metric(
        key="tbt", name="TBT", definition="each gap between output tokens", value=None, vllm_key="itl",
        title="Time between tokens (TBT)",
    ),
    Metric(
        key="tpot", name="TPOT", definition="(E2E - TTFT) / (output - 1)", least_tokens=2,
        value=lambda row: (_e2e(row) - _ttft(row)) / (row["output_tokens"] - 1),
    ),
    Metric(
        key="e2e", name="E2E", definition="last token - arrival", value=_e2e, vllm_key="e2el",
        title="End-to-end latency (E2E)",
    ),
    Metric(
        key="scheduling_delay", name="scheduling delay", definition="first scheduled - arrival",
        value=lambda row: row["scheduled_s"] - row["arrived_s"],
    ),
    Metric(
        key="normalized_latency", name="normalised latency", definition="E2E / output tokens",
        value=lambda row: _e2e(row) / row["output_tokens"],
    ),
)  # fmt: skip
METRICS = {metric.key: metric for metric in _BUILT_IN}  # in the order in which they are shown


def add_metric(metric: Metric) -> None:
    """Add an entry to `METRICS`, or replace that of its key. Raises InputError if another one has any of its names."""
    known = _by_name()
    for name in metric.names:
        if name in known and known[name].key != metric.key:
            raise InputError(f"metric {metric.key!r}: {known[name].key!r} has the name {name!r}, so choose another")
    METRICS[metric.key] = metric


def find_metric(name: str) -> Metric:
    """Return the metric of a key, of vLLM's key or of an alias. Raises InputError for an unknown one."""
    known = _by_name()
    if name not in known:
        raise unknown("metric", name, known)
    return known[name]


def drawn_metrics() -> list[Metric]:
    """Return the metrics whose distributions pages draw and validations judge."""
    return [metric for metric in METRICS.values() if metric.title is not None]


def _by_name() -> dict[str, Metric]:
    return {name: metric for metric in METRICS.values() for name in metric.names}
