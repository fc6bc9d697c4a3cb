"""What is shown of searches and sweeps, as plain numbers: their trials, their capacities, and what those cost.

search = read_search(Path("searches/yi"), "yi")
print(search.point.qps, [trial.rate for trial in search.trials])
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from engine.errors import InputError
from engine.results.metrics import summary_key
from engine.results.slo import SLO
from studies.capacity.ranges import Range, range_of, ranges_in_words, sustained_in_words
from studies.capacity.sweep import in_words, price_of
from studies.pages.compare_record import Side, read_json, readable

_TTFT, _TBT = summary_key("p50", "ttft"), summary_key("p99", "tbt")


@dataclass(frozen=True)
class Tried:
    """A trial. `margins` is value / threshold of each SLO that is known of it, infinite for one it was given up for."""

    rate: float
    met: bool
    binding: str
    margins: dict[str, float]
    stopped_early: str | None
    ttft_s: float | None  # median; None for a trial that was given up, whose values are not the whole run's
    tbt_s: float | None  # P99
    folder: Path | None


@dataclass(frozen=True)
class Load:
    """A run to its end at a rate, beside a capacity: what it gave, and each SLO's value (s)."""

    rate: float
    met: bool
    tokens: float  # output tokens/s
    ttft_s: float | None  # median
    tbt_s: float | None  # P99
    tpot_s: float | None  # mean
    slos: dict[str, float | None]


@dataclass(frozen=True)
class Point:
    """A capacity (requests/s) and what it takes. `group` is the sweep that it is of, "" for a search."""

    name: str
    group: str
    status: str  # done, refused or crashed
    error: str
    settings: dict[str, str]
    qps: float | None  # None unless done
    outcome: str  # found, none or all
    binding: str
    slos: tuple[str, ...]
    gpus: int | None
    tokens: float | None  # output tokens/s at the capacity
    ttft_s: float | None  # median there
    tbt_s: float | None  # P99 there
    tpot_s: float | None  # mean there
    per_dollar: float | None  # requests
    published: float | None  # requests/s, by somebody else's measurement
    confirmed: float | None  # requests/s, on hardware
    rate_of: str = "requests"  # or conversations
    device: str = ""
    predictor: str = ""  # where its times came from
    range: Range | None = None  # lowest and highest capacity
    range_over: str = ""  # what that is over
    usd_per_hour: float | None = None  # of all its GPUs
    loads: tuple[Load, ...] = ()  # by their rate
    unsteady: str = ""  # why the capacity may not hold for more requests

    @property
    def words(self) -> str:
        """The point's name for a reader."""
        return in_words(self.settings) if self.settings else self.name

    @property
    def range_per_gpu(self) -> Range | None:
        """Lowest and highest capacity by GPU."""
        return None if self.range is None or not self.gpus else (self.range[0] / self.gpus, self.range[1] / self.gpus)

    def usd_per_million(self, tokens: float | None) -> float | None:
        """Return dollars per million output tokens where so many come a second; None without a price."""
        return None if self.usd_per_hour is None or not tokens else self.usd_per_hour / 3600 / tokens * 1e6

    @property
    def usd(self) -> float | None:
        """Dollars per million output tokens at the capacity; None without a price."""
        return self.usd_per_million(self.tokens)

    @property
    def usd_range(self) -> Range | None:
        """Lowest and highest dollars per million output tokens, by the range of the capacity."""
        if self.usd is None or self.range is None or not self.qps:
            return None
        low, high = (self.usd * self.qps / end if end else inf for end in reversed(self.range))
        return low, high

    @property
    def per_gpu(self) -> float | None:
        """Requests/s and GPU."""
        return None if self.qps is None or not self.gpus else self.qps / self.gpus

    @property
    def tokens_per_gpu(self) -> float | None:
        """Output tokens/s and GPU."""
        return None if self.tokens is None or not self.gpus else self.tokens / self.gpus


@dataclass(frozen=True)
class Search:
    """A search: the capacity, and the trials by their rate."""

    name: str
    folder: Path
    point: Point
    words: str
    tolerance: float
    trials: list[Tried]
    ranges: Mapping[str, Any]  # `intervals` and `uncertainty` of its summary, if it has them

    @property
    def best(self) -> Path | None:
        """The folder of the run at the capacity, if all of it is still there."""
        met = [trial for trial in self.trials if trial.met]
        folder = max(met, key=lambda trial: trial.rate).folder if met else None
        return folder if folder is not None and (folder / "iterations.parquet").is_file() else None


@dataclass(frozen=True)
class Sweep:
    """A sweep and its points, in the order of its file. `settings` are what all of them have in common."""

    name: str
    folder: Path
    points: list[Point]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Response:
    """How quickly a run answers: P99 TBT and median TTFT. `is_run`: it is laid beside others, and no mere trial."""

    words: str
    tbt_s: float
    ttft_s: float
    is_run: bool


def read_search(folder: Path, name: str) -> Search:
    """Read a search's folder. Raises InputError where it can't be read."""
    with readable(folder, "search"):
        values = read_json(folder / "search.json")
        trials = sorted((_trial(entry, folder) for entry in values["trials"]), key=lambda trial: trial.rate)
        if not trials:
            raise InputError(f"{folder / 'search.json'} has no trial: search again into another folder")
        if (folder / "confirmation.json").is_file():
            values["confirmed"] = read_json(folder / "confirmation.json")
        point = _point({"status": "done", **values}, name, "")
        ranges: dict[str, Any] = {key: values[key] for key in ("intervals", "uncertainty") if key in values}
        return Search(name, folder, point, values.get("words", ""), float(values["tolerance"]), trials, ranges)


def read_sweep(folder: Path, name: str) -> Sweep:
    """Read a sweep's folder. Raises InputError where it can't be read."""
    with readable(folder, "sweep"):
        values = read_json(folder / "sweep.json")
        prices = values.get("gpu_price")
        prices = prices if isinstance(prices, Mapping) else {"": prices} if prices else {}
        points = [_point(entry, str(entry["name"]), name, prices) for entry in values["points"]]
        if not points:
            raise InputError(f"{folder / 'sweep.json'} has no point: sweep again into another folder")
        return Sweep(name, folder, points, values.get("settings") or {})


def responses(side: Side, search: Search | None) -> list[Response]:
    """Return how quickly a run answers, and the other trials of the search whose capacity it is, by their rate.

    None without a gap between tokens.
    """
    summary = side.record.summary
    ttft, tbt = _seconds(summary, _TTFT), _seconds(summary, _TBT)
    if ttft is None or tbt is None:
        return []
    own = Response(side.name, tbt, ttft, is_run=True)
    if search is None:
        return [own]
    found = []
    for trial in search.trials:
        if trial.tbt_s is not None and trial.ttft_s is not None:
            words = f"{side.name} at {trial.rate:.3g} {search.point.rate_of}/s"
            own_trial = trial.folder == search.best
            found.append(own if own_trial else Response(words, trial.tbt_s, trial.ttft_s, is_run=False))
    return found


def thresholds(slos: Iterable[SLO], metric: str, statistic: str) -> list[float]:
    """Return the different bounds (s) on a statistic of a metric, rising."""
    return sorted({slo.threshold_s for slo in slos if (slo.metric, slo.statistic) == (metric, statistic)})


def _trial(entry: Mapping[str, Any], search: Path) -> Tried:
    stopped = entry.get("stopped_early")
    margin = entry.get("margin")
    margins = {entry["binding_slo"]: inf if stopped or margin is None else float(margin)}
    written = Path(entry.get("folder") or "")
    # where the trial's run is, also after the search's folder was moved; None if it is gone
    places = (search / "trials" / written.name, written) if entry.get("folder") is not None else ()
    folder = next((place for place in places if (place / "summary.json").is_file()), None)
    summary = {} if folder is None else read_json(folder / "summary.json")
    if not stopped:
        for each in summary.get("slos", ()):
            margins[each["slo"]] = (each["value_s"] or 0.0) / SLO.parse(each["slo"]).threshold_s
    ttft, tbt = (None if stopped else _seconds(summary, key) for key in (_TTFT, _TBT))
    return Tried(float(entry["rate"]), entry["met"], entry["binding_slo"], margins, stopped, ttft, tbt, folder)


def _point(entry: Mapping[str, Any], name: str, group: str, prices: Mapping[str, float] | None = None) -> Point:
    device, gpus = str(entry.get("device") or ""), entry.get("num_gpus")
    price = price_of(device, prices or {})
    published = entry.get("published")
    return Point(
        name=name,
        group=group,
        status=entry["status"],
        error=str(entry.get("error") or ""),
        settings={key: str(value) for key, value in (entry.get("settings") or {}).items()},
        qps=float(entry["max_qps_under_slo"]) if entry["status"] == "done" else None,
        outcome=entry.get("outcome") or "",
        binding=entry.get("binding_slo") or "",
        slos=tuple(entry.get("slos") or ()),
        gpus=gpus,
        tokens=entry.get("output_throughput"),
        per_dollar=entry.get("requests_per_dollar"),
        published=float(published) if isinstance(published, int | float) else None,
        confirmed=(entry.get("confirmed") or {}).get("confirmed_qps"),
        rate_of=entry.get("rate_of", "requests"),
        device=device,
        predictor=entry.get("predictor") or "",
        range=range_of(entry),
        range_over=ranges_in_words(entry),
        usd_per_hour=price * gpus if price and gpus else None,
        loads=tuple(map(_load, entry.get("loads") or ())),
        unsteady=sustained_in_words(entry),
        **_latencies(entry),
    )


def _load(entry: Mapping[str, Any]) -> Load:
    rate, tokens = float(entry["rate"]), float(entry["output_throughput"])
    return Load(rate, entry["met"], tokens, slos=entry["slos"], **_latencies(entry))


def _latencies(entry: Mapping[str, Any]) -> dict[str, Any]:
    keys = {"ttft_s": "p50_ttft_ms", "tbt_s": "p99_tbt_ms", "tpot_s": "mean_tpot_ms"}
    return {name: _seconds(entry, key) for name, key in keys.items()}


def _seconds(values: Mapping[str, Any], key: str) -> float | None:
    value = values.get(key)
    return None if value is None else value / 1e3
