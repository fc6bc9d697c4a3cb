"""Workloads: how long the requests are and when they arrive.

Lengths come from a distribution or a recorded trace, arrivals from a process or the same trace. The two have
generators of their own, spawned from one seed: the same requests come at every rate, and the gaps between them are
the same draws scaled, so that two rates differ in nothing but the rate. A shorter run is the start of a longer one.

    make_workload(WorkloadSpec(lengths="azure_conv", request_rate=2.0, num_prompts=500, max_model_len=8192))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.errors import InputError, unknown
from engine.scheduling.request import Request
from engine.scheduling.scheduler import Scheduler
from engine.workload.lengths import builtin_names, draw_lengths, load
from engine.workload.traces import MAX_TOKENS, read_trace

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

MOST_PROMPTS = 100_000_000  # their arrays take some gigabytes
ARRIVALS = ("burst", "gamma", "poisson", "static", "trace")
SYNTHETIC = ("fixed", "uniform", "zipf")
DEFAULT_LENGTHS = "openchat_sharegpt4"
_DEFAULT_NUM_PROMPTS = 1_000
_BLOCK = 4_096  # requests made at a time while iterating


@dataclass(frozen=True)
class WorkloadSpec:
    """What to ask of a server. Lengths are in tokens, `request_rate` in requests/s.

    lengths: a built-in distribution, a distribution's .json file, or `fixed`, `uniform` or `zipf` over `input_len`
        and `output_len`. A number is that length; LOW:HIGH is a range, both ends in it. `fixed` takes numbers only.
        Zipf makes a length l of its range as likely as l ** -zipf_alpha.
    trace: a recorded trace, which takes the place of `lengths`.
    arrival: `poisson`, `gamma` (gaps with the coefficient of variation `arrival_cv`), `static` (evenly spaced), `trace`
        (as recorded, `rate_scale` times as fast) or `burst` (all at 0). None is `trace` for a trace that has arrival
        times when no `request_rate` is given, and `poisson` otherwise. The first request of a process arrives at 0.
    num_prompts: None is every row of a trace, or 1000 requests of a distribution.
    max_model_len: requests with more tokens, prompt and output together, are dropped, and others take their place.
    clip_tokens: longer requests are shortened to this many tokens instead, the prompt first, then the output.
    """

    lengths: str = DEFAULT_LENGTHS
    input_len: str | int | None = None
    output_len: str | int | None = None
    zipf_alpha: float = 1.2
    trace: Path | None = None
    arrival: str | None = None
    request_rate: float | None = None
    arrival_cv: float = 1.0
    rate_scale: float = 1.0
    num_prompts: int | None = None
    max_model_len: int | None = None
    clip_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_lengths()
        self._check_arrival()
        _check_whole("num_prompts", self.num_prompts, 1)
        if self.num_prompts is not None and self.num_prompts > MOST_PROMPTS:
            raise InputError(f"num_prompts {self.num_prompts}: give at most {MOST_PROMPTS:,}")
        _check_whole("max_model_len", self.max_model_len, 2)
        _check_whole("clip_tokens", self.clip_tokens, 2)
        _check_whole("seed", self.seed, 0)
        if self.clip_tokens is not None and self.max_model_len is not None and self.clip_tokens > self.max_model_len:
            raise InputError(
                f"clip_tokens {self.clip_tokens} is more than max_model_len {self.max_model_len}, so what is clipped "
                "would be dropped: lower clip_tokens"
            )

    def _check_lengths(self) -> None:
        if self.trace is not None and self.lengths != DEFAULT_LENGTHS:
            raise InputError(f"lengths {self.lengths!r} and trace {self.trace} both give the lengths: leave one out")
        if not self.lengths.endswith(".json") and self.lengths not in (*builtin_names(), *SYNTHETIC):
            raise unknown("lengths", self.lengths, (*builtin_names(), *SYNTHETIC))
        for name, value in (("input_len", self.input_len), ("output_len", self.output_len)):
            if self.lengths in SYNTHETIC:
                _range(name, value, fixed=self.lengths == "fixed")
            elif value is not None:
                source = f"lengths {self.lengths!r}" if self.trace is None else f"trace {self.trace}"
                raise InputError(
                    f"{name} {value} has no meaning with {source}: leave it out, or choose lengths "
                    f"{', '.join(SYNTHETIC[:-1])} or {SYNTHETIC[-1]}"
                )
        _check_number("zipf_alpha", self.zipf_alpha, 1e-3, 100, "")

    def _check_arrival(self) -> None:
        if self.arrival is not None and self.arrival not in ARRIVALS:
            raise unknown("arrival", self.arrival, ARRIVALS)
        if self.request_rate is not None:
            _check_number("request_rate", self.request_rate, 1e-9, 1e9, " requests/s (all at once: arrival 'burst')")
        _check_number("arrival_cv", self.arrival_cv, 1e-3, 1e3, " (evenly spaced: arrival 'static')")
        _check_number("rate_scale", self.rate_scale, 1e-9, 1e9, "")
        if self.arrival in ("poisson", "gamma", "static") and self.request_rate is None:
            raise InputError(f"arrival {self.arrival!r} needs a request_rate in requests/s")
        if self.arrival == "trace" and self.trace is None:
            raise InputError("arrival 'trace' needs a trace: give one, or choose arrival 'poisson' with a request_rate")
        if self.arrival in ("trace", "burst") and self.request_rate is not None:
            fix = "use rate_scale to speed the trace up" if self.arrival == "trace" else "all requests come at once"
            raise InputError(
                f"request_rate {self.request_rate} has no meaning with arrival {self.arrival!r}: leave it out ({fix})"
            )
        if self.arrival_cv != 1 and self.arrival != "gamma":
            raise InputError(f"arrival_cv {self.arrival_cv} needs arrival 'gamma'")


@dataclass(frozen=True, eq=False)
class Workload:
    """Requests in order of arrival: `arrived_at` (n,) seconds, `prompt_tokens` (n,) and `output_tokens` (n,).

    `num_dropped` requests were longer than max_model_len and came before the last one that was kept; `num_failed` rows
    of the trace record a failure instead of a length.
    """

    name: str
    arrived_at: Floats
    prompt_tokens: Ints
    output_tokens: Ints
    num_dropped: int
    num_failed: int = 0

    def __post_init__(self) -> None:
        columns = {
            "arrived_at": self.arrived_at,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
        }
        for name, column in columns.items():
            if column.ndim != 1 or len(column) != len(self.arrived_at) or not len(column):
                shapes = ", ".join(f"{name} {column.shape}" for name, column in columns.items())
                raise InputError(f"workload {self.name}: {shapes}: give three lists, equally long and not empty")
            low = 0 if name == "arrived_at" else 1
            bad = ~(np.isfinite(column) & (column >= low))
            if name != "arrived_at":
                bad |= column != np.floor(column)
            if bad.any():
                wanted = "a finite time (s) of at least 0" if low == 0 else "a whole number of at least 1"
                row = int(bad.argmax())
                raise InputError(f"workload {self.name}: {name}[{row}] is {column[row]}: give {wanted}")
        if (falls := np.diff(self.arrived_at) < 0).any():
            row = int(falls.argmax()) + 1
            raise InputError(
                f"workload {self.name}: arrived_at[{row}] is {self.arrived_at[row]}, earlier than the one before: "
                "sort the requests by arrival"
            )

    def __len__(self) -> int:
        return len(self.arrived_at)

    def check_fits(self, scheduler: Scheduler) -> None:
        """Raise InputError if a request could never run there: what is refused is too long."""
        prompts, outputs = self.prompt_tokens, self.output_tokens
        for row in map(int, [(prompts + outputs).argmax(), prompts.argmax()]):
            scheduler.check(Request(row, 0.0, int(prompts[row]), int(outputs[row])))

    def requests(self) -> Iterator[Request]:
        """Fresh requests with ids from 0, made as they are asked for."""
        for start in range(0, len(self), _BLOCK):
            end = min(start + _BLOCK, len(self))
            columns = (self.arrived_at, self.prompt_tokens, self.output_tokens)
            yield from map(Request, range(start, end), *(column[start:end].tolist() for column in columns))


def make_workload(spec: WorkloadSpec) -> Workload:
    """The workload that `spec` describes; the same spec gives the same one."""
    lengths_rng, arrivals_rng = np.random.default_rng(spec.seed).spawn(2)
    if spec.trace is not None:
        return _replay(spec, spec.trace, arrivals_rng)
    limit = spec.max_model_len if spec.clip_tokens is None else None  # nothing that is clipped is too long
    n = _DEFAULT_NUM_PROMPTS if spec.num_prompts is None else spec.num_prompts
    prompt, output, dropped = draw_lengths(_ranks_to_lengths(spec), n, lengths_rng, limit)
    prompt, output = _clip(prompt, output, spec.clip_tokens)
    return Workload(spec.lengths, _arrivals(spec, n, None, arrivals_rng), prompt, output, dropped)


def _replay(spec: WorkloadSpec, path: Path, rng: np.random.Generator) -> Workload:
    trace = read_trace(path)
    prompt, output = _clip(trace.prompt, trace.output, spec.clip_tokens)
    fits = np.arange(len(prompt))
    if spec.max_model_len is not None:
        fits = np.flatnonzero(prompt + output <= spec.max_model_len)
    if not len(fits) or len(fits) < (spec.num_prompts or 0):
        within = "" if spec.max_model_len is None else f" of at most {spec.max_model_len} tokens (max_model_len)"
        wanted = "" if spec.num_prompts is None else f", {spec.num_prompts} are asked for: lower num_prompts"
        raise InputError(f"{path} has {len(fits)} requests{within}{wanted or ': raise max_model_len'}")
    rows = fits[: spec.num_prompts]
    dropped = int(rows[-1]) + 1 - len(rows) if spec.num_prompts is not None else len(prompt) - len(fits)
    recorded = None if trace.arrived_at is None else trace.arrived_at[rows]
    arrived_at = _arrivals(spec, len(rows), recorded, rng)
    return Workload(path.stem, arrived_at, prompt[rows], output[rows], dropped, trace.num_failed)


def _arrivals(spec: WorkloadSpec, n: int, recorded: Floats | None, rng: np.random.Generator) -> Floats:
    """Arrival times (n,) in seconds, not falling; `recorded` (n,) are the trace's own."""
    arrival = spec.arrival or ("trace" if recorded is not None and spec.request_rate is None else "poisson")
    if spec.rate_scale != 1 and arrival != "trace":
        raise InputError(f"rate_scale {spec.rate_scale} needs arrival 'trace': set request_rate instead")
    if arrival == "trace":
        if recorded is None:
            raise InputError(f"trace {spec.trace} has no arrival times: choose arrival 'poisson' with a request_rate")
        return recorded / spec.rate_scale
    if arrival == "burst":
        return np.zeros(n)
    if spec.request_rate is None:
        raise InputError(f"arrival {arrival!r} needs a request_rate in requests/s")
    if arrival == "static":
        return np.arange(n) / spec.request_rate
    shape = 1 / spec.arrival_cv**2  # a gamma of this shape and scale 1 / shape has mean 1
    gaps = rng.exponential(size=n - 1) if arrival == "poisson" else rng.gamma(shape, 1 / shape, n - 1)
    return np.concatenate(([0.0], np.cumsum(gaps))) / spec.request_rate


def _ranks_to_lengths(spec: WorkloadSpec) -> Callable[[Floats], tuple[Ints, Ints]]:
    """What turns uniform ranks (n, 2) into prompt (n,) and output (n,) tokens."""
    if spec.lengths not in SYNTHETIC:
        return load(spec.lengths).at
    alpha = spec.zipf_alpha if spec.lengths == "zipf" else 0.0
    prompt, output = (
        _power_law(*_range(name, value, fixed=False), alpha)
        for name, value in (("input_len", spec.input_len), ("output_len", spec.output_len))
    )
    return lambda ranks: (prompt(ranks[:, 0]), output(ranks[:, 1]))


def _power_law(low: int, high: int, alpha: float) -> Callable[[Floats], Ints]:
    """Inverse distribution function of the lengths low..high, each as likely as length ** -alpha."""
    weights = np.cumsum((np.arange(low, high + 1) / low) ** -alpha)
    return partial(_invert, low, weights / weights[-1])


def _invert(low: int, cumulative: Floats, ranks: Floats) -> Ints:
    return low + np.searchsorted(cumulative, ranks, side="right").astype(np.int64)


def _clip(prompt: Ints, output: Ints, clip_tokens: int | None) -> tuple[Ints, Ints]:
    """Shorten to `clip_tokens` in all, the prompt first; one token of it stays."""
    if clip_tokens is None:
        return prompt, output
    prompt = np.maximum(1, np.minimum(prompt, clip_tokens - output))
    return prompt, np.minimum(output, clip_tokens - prompt)


def _range(name: str, value: str | int | None, *, fixed: bool) -> tuple[int, int]:
    """The range, both ends in it, that a number or LOW:HIGH stands for."""
    form = "a number of tokens" if fixed else "a number of tokens, or LOW:HIGH with LOW <= HIGH"
    if value is None:
        raise InputError(f"{name} is missing: give {form}")
    ends = str(value).split(":")
    try:
        low, high = int(ends[0]), int(ends[-1])
    except ValueError:
        low, high = 0, 0
    if len(ends) > (1 if fixed else 2) or not 1 <= low <= high <= MAX_TOKENS:
        raise InputError(f"{name} {value!r} must be {form}, from 1 to {MAX_TOKENS}")
    return low, high


def _check_whole(name: str, value: int | None, low: int) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
        raise InputError(f"{name} {value!r} must be a whole number, {low} or more")


def _check_number(name: str, value: float, low: float, high: float, hint: str) -> None:
    if isinstance(value, bool) or not math.isfinite(value) or not low <= value <= high:
        raise InputError(f"{name} {value!r} must be a number from {low:g} to {high:g}{hint}")
