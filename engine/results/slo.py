"""A bound on a statistic of a latency metric: `SLO.parse("p99_tbt<=0.1")`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from engine.errors import InputError, unknown
from engine.results.metric_table import find_metric
from engine.specs.checks import check_fields

_SLO_TEXT = re.compile(
    r"(?P<statistic>[^\W_]+(?:\.\d+)?)_(?P<metric>\w+)\s*<=?\s*(?P<value>[^\s<>]+?)\s*(?P<unit>ms|s|)"
)
_SLO_EXAMPLE = "write it as p99_tbt<=0.1 or median_scheduling_delay<=2s or mean_ttft<=300ms"


@dataclass(frozen=True)
class SLO:
    """A bound on a statistic of a latency metric: percentile (pNN), mean or max of `metric` <= threshold_s seconds.

    `metric` is a key of `engine.results.metric_table.METRICS`; it may be given by any of its names.
    """

    metric: str
    statistic: str
    threshold_s: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "metric", find_metric(self.metric).key)  # tbt for itl
        if self.statistic not in ("mean", "max"):
            percentile = re.fullmatch(r"p(\d+(?:\.\d+)?)", self.statistic)
            if percentile is None:
                raise unknown("SLO statistic", self.statistic, ("p50", "p99", "p99.9", "mean", "max", "median"))
            if float(percentile[1]) > 100:
                raise InputError(f"SLO statistic {self.statistic!r}: give a percentile from p0 to p100")
            object.__setattr__(self, "statistic", f"p{float(percentile[1]):g}")  # p99 for p99.0 and p099
        check_fields(self, "threshold_s")

    @property
    def percentile(self) -> float | None:
        """99.9 for p99.9; None for mean and max."""
        return float(self.statistic[1:]) if self.statistic.startswith("p") else None

    @classmethod
    def parse(cls, text: str) -> SLO:
        """Read `p99_tbt<=0.1`: statistic, metric and threshold in seconds, or with a suffix s or ms; `<` means `<=`."""
        match = _SLO_TEXT.fullmatch(text.strip().lower())
        if match is None:
            raise InputError(f"can't read the SLO {text!r}: {_SLO_EXAMPLE}")
        metric, statistic = match["metric"], match["statistic"]
        try:
            threshold = float(match["value"]) / (1000 if match["unit"] == "ms" else 1)
            return cls(metric, "p50" if statistic == "median" else statistic, threshold)
        except InputError as error:
            raise InputError(f"can't read the SLO {text!r}: {error}; {_SLO_EXAMPLE}") from None
        except ValueError:
            raise InputError(f"can't read the SLO {text!r}: {match['value']!r} is no number; {_SLO_EXAMPLE}") from None

    def __str__(self) -> str:
        return f"{self.statistic}_{self.metric}<={repr(self.threshold_s).removesuffix('.0')}s"
