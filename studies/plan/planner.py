"""The order of a plan's work: bounds for every point, the smallest fleets of those that may win, draws for finalists.

A point is dismissed, never simulated or after one trial, when even the fewest replicas that its bound allows cost more
than a fleet that is known to hold: the best of its own device, or FAR times the best of all. Every dismissal compares
with a fleet that was simulated, so the cheapest fleet is found as if every point had been searched. Which fleets are
searched depends on the results of earlier searches alone, not on which of those under way ends first: the answer is
the same however many processes work.

    planner = Planner(points, rate=40.0)
    for number, result in work_off(work, planner.jobs(), workers, reuse=True):
        planner.take(number, result)
    print(planner.best)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import ceil, floor, inf
from typing import Any, Literal

from simulator.predictor.uncertainty import interval
from studies.capacity.ranges import DRAWS

FAR = 1.25  # times the best price: what is sure to cost more is of no interest, whatever its device
FAR_OFF = 2.0  # times the best price: no runner-up
MOST_GROWN = 16  # times that a fleet grows because the whole of it misses
REACH = 1.7  # times the likely replicas: as many are tried before others get their turn
NEXT = 0.3  # more replicas than the fewest that are left are likely after a miss at once; fewer after a late one
AHEAD = 24  # points for each search of a fleet that is under way beside others: as many processes are kept busy,
LEAST_AHEAD = 3  # at least so many; what one finds can spare another only if it ended before that began
MOST_TRIES = 4  # of what was dismissed, to find a runner-up

Outcome = Literal["open", "refused", "crashed", "dismissed", "none", "holds"]


@dataclass(eq=False)
class Candidate:
    """A point and what is known of it.

    `job` is what its work is given; `fewest` replicas are not ruled out. Prices are dollars per hour.
    """

    name: str
    device: str
    usd_per_gpu_hour: float
    job: dict[str, Any]
    outcome: Outcome = "open"
    why: str = ""  # it was refused, has crashed, or was dismissed
    bound: dict[str, Any] = field(default_factory=dict)
    replica: dict[str, Any] = field(default_factory=dict)
    step: int = 1
    fewest: int = 1
    ruled_out: str = "its bound"  # why no fewer
    likely: float = 0.0  # requests/s of a replica, as far as was seen; 0: nothing is known
    asked: bool = False  # a fleet of it is being searched
    replicas: int | None = None  # of the smallest fleet that holds
    too_few: int | None = None
    grown: int = 0  # times, since whole fleets missed
    trial: dict[str, Any] | None = None  # of that fleet
    alone: dict[str, Any] | None = None  # of one request at a time, where no fleet holds
    draws: dict[int, dict[str, Any]] = field(default_factory=dict)
    whole: dict[str, Any] | None = None  # the trial of every replica, to its end
    batch: dict[str, Any] = field(default_factory=dict)
    curve: list[dict[str, Any]] = field(default_factory=list)  # latencies against the load

    @property
    def gpus(self) -> int:
        """GPUs of a replica."""
        return int(self.replica.get("num_gpus", 1))

    @property
    def usd_per_replica(self) -> float:
        return self.gpus * self.usd_per_gpu_hour

    @property
    def count(self) -> int:
        """Replicas: those that hold, else the fewest that are not ruled out."""
        return self.replicas or self.fewest

    @property
    def usd_per_hour(self) -> float:
        return self.count * self.usd_per_replica

    @property
    def fewest_usd(self) -> float:
        """What the fewest replicas cost that are not ruled out."""
        return self.fewest * self.usd_per_replica

    @property
    def likely_count(self) -> int:
        """Replicas that the fleet probably has."""
        return max(self.fewest, ceil(self.bound["rate"] / self.likely * (1 - 1e-9)) if self.likely else 1)

    @property
    def likely_usd(self) -> float:
        """What the fleet probably costs: the order of the search."""
        return self.usd_per_replica * max(self.fewest, self.bound["rate"] / self.likely if self.likely else 0.0)

    def dismiss(self) -> None:
        """Take it out of the search: it costs too much."""
        self.outcome, self.why = "dismissed", f"{self.fewest} replicas or more, by {self.ruled_out}"

    def capacity(self, rate: float) -> list[float]:
        """Return requests/s of a replica: low, expected and high.

        Of a finalist the range that its draws span around what its fleet carries, and that itself; of another that
        holds the rates at which its fleets were seen to hold and to miss; of one that was dismissed what its bound or
        its trials leave open.
        """
        holds, held = self.outcome == "holds", rate / self.count
        missed = rate / self.too_few if self.too_few else inf
        if 0 in self.draws and holds:
            base = self.draws[0]["qps"] or held
            mid = min(max(base, held), missed)  # the fleet itself was seen to hold, and one with fewer to miss
            drawn = interval([result["qps"] for draw, result in self.draws.items() if draw] or [base])
            low, high = (mid * drawn[end] / base for end in ("low", "high"))
            return [min(low, mid), mid, max(high, mid)]
        most = self.bound.get("most")
        most = min(inf if most is None else most, missed)
        if holds:
            return [held, held, max(held, most) if most < inf else held]
        if self.outcome == "none":
            return [0.0, 0.0, 0.0]
        high = min(most, rate / max(self.fewest - self.step, 1)) if self.fewest > self.step else most
        high = high if high < inf else self.likely
        return [0.0, min(self.likely, high), high]

    def usd_range(self, rate: float) -> tuple[float, float]:
        """Return what the load costs by this point's range of capacities (dollars per hour, not of whole replicas)."""
        low, _, high = self.capacity(rate)
        cheap, dear = (self.usd_per_replica * rate / end if end else inf for end in (high, low))
        return cheap, dear


class Planner:
    """Hands out the jobs of a plan and takes their results."""

    def __init__(self, candidates: Sequence[Candidate], rate: float, draws: int = DRAWS, bounds: bool = True) -> None:
        """Plan for `rate` requests/s, with so many `draws` of each finalist; without `bounds` nothing is dismissed."""
        self.candidates = list(candidates)
        self.rate = rate
        self.num_draws = draws
        self.bounds = bounds
        self.finalists: list[Candidate] = []
        self._failed: dict[int, dict[str, str]] = {}
        self._given: list[tuple[Candidate, dict[str, Any]]] = []
        self._results: dict[int, Mapping[str, Any]] = {}  # of searches of fleets, until their turn comes
        self._ahead = max(LEAST_AHEAD, len(self.candidates) // AHEAD)
        self._pending = 0
        self.cpu_s = 0.0  # of the jobs

    @property
    def holding(self) -> list[Candidate]:
        """Candidates with a fleet that holds, the cheapest first, of equals the one farthest from its SLOs."""
        found = [each for each in self.candidates if each.outcome == "holds"]
        return sorted(found, key=lambda each: (each.usd_per_hour, _margin(each.trial)))

    @property
    def best(self) -> Candidate | None:
        """The cheapest fleet that holds; else the candidate that is closest to its SLOs. None where all are refused."""
        if self.holding:
            return self.holding[0]
        closest = [each for each in self.candidates if each.outcome in ("none", "dismissed", "open")]
        return min(closest, key=lambda each: (_margin(each.alone), each.likely_usd), default=None)

    @property
    def failed(self) -> list[dict[str, str]]:
        """Jobs that were refused or have crashed, in the order in which they were given out."""
        return [self._failed[number] for number in sorted(self._failed)]

    @property
    def runner_up(self) -> Candidate | None:
        """The cheapest fleet of another device or layout than the best, else of other settings; None if none holds."""
        if not self.holding:
            return None
        best, *others = self.holding
        return min(others, key=lambda each: _kind(each) == _kind(best), default=None)

    @property
    def settled(self) -> int:
        """Candidates that are known to hold, not to, or not to matter."""
        return sum(each.outcome != "open" for each in self.candidates)

    def jobs(self) -> Iterator[dict[str, Any] | None]:
        """Yield the jobs, and None while a result has to come first."""
        for each in self.candidates:
            yield self._job(each, "bound")
        yield from self._wait()
        yield from self._sizes()
        yield from self._wait()
        yield from self._ends()

    def take(self, number: int, result: Mapping[str, Any]) -> None:
        """Take the result of the job that was yielded as that number."""
        self._pending -= 1
        result = dict(result)
        self.cpu_s += float(result.pop("cpu_s", 0.0))
        if self._given[number][1]["what"] == "size":
            self._results[number] = result
        else:
            self._heed(number, result)

    def _heed(self, number: int, result: Mapping[str, Any]) -> None:
        candidate, job = self._given[number]
        what = job["what"]
        if result["status"] != "done":
            candidate.asked = False
            self._failed[number] = {
                "name": candidate.name, "what": what, "why": str(result["error"]), "status": result["status"],
                "traceback": str(result.get("traceback") or ""),
            }  # fmt: skip
            if what not in ("draw", "curve"):  # without these its fleet is known
                candidate.outcome, candidate.why = result["status"], str(result["error"])
            return
        if what == "bound":
            kept = {name: result[name] for name in ("most", "likely", "tokens", "notes")}
            candidate.bound = {**kept, "rate": self.rate}
            candidate.replica, candidate.step = result["replica"], result["step"]
            candidate.likely = result["likely"] if result["likely"] < inf else 0.0
            most = inf if result["most"] is None else result["most"]
            least = ceil(self.rate / most * (1 - 1e-9)) if most else 0
            candidate.fewest = candidate.step * max(1, ceil(least / candidate.step))
            if not most:
                candidate.outcome, candidate.why = "none", "its shortest batches take longer than TBT may"
        elif what == "size":
            candidate.asked = False
            candidate.outcome = result["outcome"]
            candidate.replicas, candidate.too_few = result["replicas"], result["too_few"]
            candidate.trial = result["trial"]
            if result["outcome"] == "dismissed":
                candidate.outcome = "open"  # unless these cost too much, it is tried again
                candidate.fewest = max(candidate.fewest, (result["too_few"] or 0) + candidate.step)
                candidate.ruled_out = "a simulated fleet that missed"
                missed = result.get("missed")  # how near it came: the share of its requests that were finished
                done = missed["summary"]["completed"] / missed["requests"] if missed else 0.0
                likely = candidate.fewest * (1 + NEXT * (1 - done))
                candidate.likely = min(candidate.likely, self.rate / likely)
            elif result["outcome"] == "none":
                candidate.why = "not even one request at a time meets the SLOs"
        elif what == "alone":
            candidate.alone = result["trial"]
        elif what == "curve":
            candidate.curve = result["curve"]
        elif what == "draw":
            candidate.draws[job["draw"]] = dict(result)
        else:
            candidate.whole, candidate.batch = result["trial"], result["batch"]
            if candidate.outcome == "holds" and not candidate.whole["holds"]:
                candidate.too_few = candidate.replicas
                candidate.grown += 1
                if candidate.grown > MOST_GROWN:
                    candidate.outcome = "none"
                    candidate.why = f"whole fleets of up to {candidate.too_few} replicas miss"
                candidate.replicas = (candidate.replicas or 0) + candidate.step
                candidate.trial = candidate.whole = None  # of a fleet that missed; the larger one is simulated in turn

    def _wait(self) -> Iterator[None]:
        while self._pending:
            yield None

    def _job(self, candidate: Candidate, what: str, **more: Any) -> dict[str, Any]:
        job = {**candidate.job, "what": what, **more}
        self._given.append((candidate, job))
        self._pending += 1
        return job

    def _sizes(self) -> Iterator[dict[str, Any] | None]:
        """Yield the searches of fleets, the likeliest first; what misses by far is tried again when others were.

        Their results are heeded in the order in which they were given out, each when so many others are under way.
        """
        under_way: deque[int] = deque()
        while True:
            waiting = [each for each in self.candidates if each.outcome == "open" and not each.asked]
            for each in waiting:
                if each.fewest_usd > self._limit(each):
                    each.dismiss()
            waiting = [each for each in waiting if each.outcome == "open"]
            if under_way and (not waiting or len(under_way) == self._ahead):
                yield from self._result(under_way.popleft())
                continue
            if not waiting:
                return
            chosen = min(waiting, key=lambda each: each.likely_usd)
            limit, likely = self._limit(chosen), chosen.likely_count
            most = ceil(REACH * likely) if self.bounds else None
            if most is not None and limit < inf:
                most = min(most, floor(limit / chosen.usd_per_replica * (1 + 1e-9)))
            chosen.asked = True
            under_way.append(len(self._given))
            yield self._job(chosen, "size", least=chosen.fewest, likely=likely, most=most)

    def _result(self, number: int) -> Iterator[None]:
        """Wait for the result of a search of a fleet, and heed it."""
        while number not in self._results:
            yield None
        self._heed(number, self._results.pop(number))

    def _runners_up(self) -> Iterator[dict[str, Any] | None]:
        """Yield searches of what was dismissed, and may be nearer in price to the best than the runner-up."""
        tried: set[Candidate] = set()
        while self.holding and len(tried) < MOST_TRIES:
            best, second = self.holding[0], self.runner_up
            known = second is not None and _kind(second) != _kind(best)
            limit = second.usd_per_hour if second is not None and known else FAR_OFF * best.usd_per_hour
            left = [
                each
                for each in self.candidates
                if each.outcome == "dismissed" and each not in tried and _kind(each) != _kind(best)
                if (each.fewest_usd < limit * (1 - 1e-9) if known else each.likely_usd <= limit)
            ]
            chosen = min(left, key=lambda each: each.likely_usd, default=None)
            if chosen is None:
                return
            tried.add(chosen)
            chosen.outcome = "open"
            most = floor(limit / chosen.usd_per_replica * (1 - 1e-9 if known else 1 + 1e-9))
            number = len(self._given)
            yield self._job(chosen, "size", least=chosen.fewest, likely=chosen.likely_count, most=most)
            yield from self._result(number)
            if chosen.outcome == "open":
                chosen.dismiss()

    def _limit(self, candidate: Candidate) -> float:
        """Return the price above which a candidate is of no interest; infinite without bounds, or any that holds."""
        held = self.holding if self.bounds else []
        own = min((each.usd_per_hour for each in held if each.device == candidate.device), default=inf)
        return min(own, FAR * held[0].usd_per_hour) if held else inf

    def _ends(self) -> Iterator[dict[str, Any] | None]:
        """Yield the whole fleet of the best, growing until it holds, a search of a runner-up, and the draws of both."""
        yield from self._whole_fleets()
        if not self.holding:
            yield from self._closest()
            return
        best = self.holding[0]
        searches = self._runners_up()
        yield from islice(searches, 1)  # beside the best one's draws, on another processor
        yield self._job(best, "curve", replicas=best.count, start=self.rate / best.count)
        yield from self._draws([best])
        yield from searches
        yield from self._wait()
        yield from self._draws([each for each in (best, self.runner_up) if each is not None])
        yield from self._wait()

    def _draws(self, finalists: list[Candidate]) -> Iterator[dict[str, Any]]:
        """Yield the draws of those that have none yet."""
        new = [each for each in finalists if each not in self.finalists]
        self.finalists = finalists
        for draw in range(self.num_draws + 1):
            for each in new:
                yield self._job(each, "draw", draw=draw, replicas=each.count, start=self.rate / each.count)

    def _whole_fleets(self) -> Iterator[dict[str, Any] | None]:
        """Yield whole fleets until that of the best holds, and those that have grown.

        Where the best becomes dearer, or can't be simulated, what was dismissed against it is searched again.
        """
        while held := self.holding:
            best = held[0]
            unsure = [best] if best.whole is None else [each for each in held if each.whole is each.trial is None]
            if not unsure:
                return
            price = best.usd_per_hour
            yield self._job(unsure[0], "finish", replicas=unsure[0].count)
            yield from self._wait()
            now = self.holding[0].usd_per_hour if self.holding else inf
            again = [each for each in self.candidates if each.outcome == "dismissed" and price < now >= each.fewest_usd]
            for each in again:
                each.outcome, each.why = "open", ""
            if again:
                yield from self._sizes()
                yield from self._wait()

    def _closest(self) -> Iterator[dict[str, Any] | None]:
        """Yield one request at a time on every point, where no fleet holds, and the fleet of what comes closest."""
        for each in self.candidates:
            if each.outcome == "none":
                yield self._job(each, "alone", likely=each.likely)
        yield from self._wait()
        while (best := self.best) is not None and best.whole is None:
            yield self._job(best, "finish", replicas=best.count)
            yield from self._wait()


def _kind(candidate: Candidate) -> tuple[Any, ...]:
    """Return a candidate's device and layout."""
    return candidate.device, *candidate.job["layout"]


def _margin(trial: Mapping[str, Any] | None) -> float:
    """Return the worst value over its threshold; infinite where a trial was given up or there is none."""
    margin = None if trial is None else trial["margin"]
    return inf if margin is None else float(margin)
