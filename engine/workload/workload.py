"""Workloads: how long the requests are and when they arrive.

Lengths come from a distribution or a recorded trace, arrivals from a process or the same trace. The two have
generators of their own, spawned from one seed: the same requests come at every rate, and the gaps between them are
the same draws scaled, so that two rates differ in nothing but the rate. A shorter run is the start of a longer one.

    make_workload(WorkloadSpec(lengths="azure_conv", request_rate=2.0, num_prompts=500, max_model_len=8192))
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.errors import InputError, unknown
from engine.scheduling.content import Content, own
from engine.scheduling.request import Request
from engine.scheduling.scheduler import Scheduler
from engine.specs import SchedulerSpec
from engine.specs.checks import MOST_WHOLE, short
from engine.workload.client import Client, ClientSpec, Turn
from engine.workload.lengths import builtin_names, draw_lengths, load
from engine.workload.traces import HIGHEST_PRIORITY, MAX_TOKENS, Trace, read_trace

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

MOST_PROMPTS = 100_000_000  # their arrays take some gigabytes
ARRIVALS = ("burst", "gamma", "poisson", "static", "trace")
SYNTHETIC = ("fixed", "uniform", "zipf", "random")
SYSTEM = 0  # the stream of a shared system prompt
DEFAULT_LENGTHS = "openchat_sharegpt4"
_DEFAULT_NUM_PROMPTS = 1_000
_HASH_ID_TOKENS, _ZIPF_ALPHA = 512, 1.2
_BLOCK = 4_096  # requests made at a time while iterating


@dataclass(frozen=True)
class WorkloadSpec:
    """What to ask of a server. Lengths are in tokens, `request_rate` in requests/s.

    lengths: a built-in distribution, a distribution's .json file, or `fixed`, `uniform`, `zipf` or `random` over
        `input_len` and `output_len`. A number is that length; LOW:HIGH is a range, both ends in it. `fixed` and
        `random` take numbers only. Zipf makes a length l of its range as likely as l ** -zipf_alpha; `random` draws
        evenly from L (1 - random_range_ratio) to L (1 + random_range_ratio), as vLLM's random dataset.
    trace: a recorded trace, which takes the place of `lengths`; `columns` names its columns where they are others
        than those of a known format (`prompt=...,output=...` and, if any, `time=...` in seconds, `hash_ids=...`);
        `tokenizer` is a folder, for traces of text. `hash_id_tokens` of a prompt share one of its hash ids. Requests of
        one `session` (a column) are turns of a conversation; each prompt holds the turn's before and its output. A turn
        is sent at its recorded time, or when the turn before has ended if that is later; where the arrivals are not
        the recorded ones, or with a think_time_s, it comes think_time_s after that end.
    priorities: priorities and the share of the requests (of a trace without its own, or of the conversations) that has
        each, such as `0=0.2,1=0.8`; the lowest goes first under a scheduler that looks at it.
    system_prompt_len: tokens before every prompt, the same for all.
    turns: requests of a conversation, a number or LOW:HIGH (drawn evenly). Each turn's prompt is the turn's before with
        its output, and a new message, which is a prompt of `lengths` (`turn_input_len` of the later ones if given). It
        comes think_time_s (on average; exponential) after the turn before has ended; `request_rate` is then of
        conversations. One that grows past max_model_len ends there.
    arrival: `poisson`, `gamma` (gaps with the coefficient of variation `arrival_cv`), `static` (evenly spaced), `trace`
        (as recorded, `rate_scale` times as fast) or `burst` (all at 0). None is `trace` for a trace that has arrival
        times when no `request_rate` is given, and `poisson` otherwise. The first request of a process arrives at 0.
    max_concurrency, users, ramp_up_s, client_overhead_s: of the client, see `engine.workload.client.ClientSpec`.
    num_prompts: None is every row of a trace, or 1000 requests of a distribution.
    max_model_len: requests with more tokens, prompt and output together, are dropped, and others take their place.
    clip_tokens: longer requests are shortened to this many tokens instead, the prompt first, then the output.
    """

    lengths: str = DEFAULT_LENGTHS
    input_len: str | int | None = None
    output_len: str | int | None = None
    zipf_alpha: float = _ZIPF_ALPHA
    random_range_ratio: float = 0.0
    trace: Path | None = None
    columns: str | None = None
    tokenizer: Path | None = None
    hash_id_tokens: int = _HASH_ID_TOKENS
    system_prompt_len: int = 0
    priorities: str | None = None
    turns: str | int | None = None
    turn_input_len: str | int | None = None
    think_time_s: float = 0.0
    max_concurrency: int | None = None
    users: int | None = None
    ramp_up_s: float = 0.0
    client_overhead_s: float = 0.0
    arrival: str | None = None
    request_rate: float | None = None
    arrival_cv: float = 1.0
    rate_scale: float = 1.0
    num_prompts: int | None = None
    max_model_len: int | None = None
    clip_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.request_rate == math.inf and self.arrival is None:  # vLLM's name for all at once
            object.__setattr__(self, "request_rate", None)
            object.__setattr__(self, "arrival", "burst")
        self._check_lengths()
        self._check_arrival()
        self._check_conversations()
        self.client()
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
                _range(
                    f"random_{name}" if self.lengths == "random" else name,
                    value,
                    fixed=self.lengths in ("fixed", "random"),
                )
            elif value is not None:
                source = f"lengths {self.lengths!r}" if self.trace is None else f"trace {self.trace}"
                raise InputError(
                    f"{name} {value} has no meaning with {source}: leave it out, or choose lengths "
                    f"{', '.join(SYNTHETIC[:-1])} or {SYNTHETIC[-1]}"
                )
        _check_number("zipf_alpha", self.zipf_alpha, 1e-3, 100, "")
        _check_number("random_range_ratio", self.random_range_ratio, 0, 1, "")
        if self.random_range_ratio and self.lengths != "random":
            raise InputError(f"random_range_ratio {self.random_range_ratio} needs lengths 'random'")
        if self.zipf_alpha != _ZIPF_ALPHA and self.lengths != "zipf":
            raise InputError(f"zipf_alpha {self.zipf_alpha} needs lengths 'zipf'")
        for name, default in (("columns", None), ("tokenizer", None), ("hash_id_tokens", _HASH_ID_TOKENS)):
            if getattr(self, name) != default and self.trace is None:
                raise InputError(f"{name} {getattr(self, name)} needs a trace")

    def _check_conversations(self) -> None:
        _check_whole("system_prompt_len", self.system_prompt_len, 0)
        _check_whole("hash_id_tokens", self.hash_id_tokens, 1)
        _check_number("think_time_s", self.think_time_s, 0, 1e9, "")
        sessions = self.has_conversations and self.turns is None
        for name in ("turn_input_len", "think_time_s"):
            if getattr(self, name) and self.turns is None and not (sessions and name == "think_time_s"):
                more = ", or a trace with sessions (columns session=NAME)" if name == "think_time_s" else ""
                raise InputError(
                    f"{name} {getattr(self, name)} needs turns{more or ', the requests of a conversation'}"
                )
        if sessions and self.clip_tokens is not None:
            raise InputError(f"clip_tokens {self.clip_tokens} has no meaning with sessions: leave one out")
        if self.priorities is not None:
            _shares(self.priorities)
        if self.turns is not None:
            _range("turns", self.turns, fixed=False, what="requests")
            if self.trace is not None:
                raise InputError(f"turns {self.turns} has no meaning with trace {self.trace}: leave one out")
            if self.clip_tokens is not None:
                raise InputError(f"clip_tokens {self.clip_tokens} has no meaning with turns: leave one out")
        if self.turn_input_len is not None:
            _range("turn_input_len", self.turn_input_len, fixed=False)
        if self.system_prompt_len and self.trace is not None:
            raise InputError(f"system_prompt_len {self.system_prompt_len} has no meaning with a trace: leave one out")

    @property
    def has_conversations(self) -> bool:
        """Whether requests are turns of conversations, of which the request rate is then."""
        named = re.findall(r"(\w+)\s*=", self.columns or "")
        return self.turns is not None or "session" in named

    def client(self) -> ClientSpec:
        """How its requests are sent."""
        return ClientSpec(
            max_concurrency=self.max_concurrency,
            users=self.users,
            ramp_up_s=self.ramp_up_s,
            overhead_s=self.client_overhead_s,
        )

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

    What the requests' tokens are matters where prefixes are cached: `contents` (n,) says which of them begin alike,
    None that none do. Requests that are turns of a conversation have the row of the turn before in `after` (n,), which
    is the row before, -1 where there is none, and come `think_s` (n,) seconds after its end, not before `arrived_at`.
    `priorities` (n,) are the lowest first; None where all are the same.
    `notes` are what a reader of the results should know.
    """

    name: str
    arrived_at: Floats
    prompt_tokens: Ints
    output_tokens: Ints
    num_dropped: int
    num_failed: int = 0
    contents: Sequence[Content | None] | None = None
    after: Ints | None = None
    think_s: Floats | None = None
    priorities: Ints | None = None
    client: ClientSpec = field(default_factory=ClientSpec)
    notes: tuple[str, ...] = ()

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
        first = np.arange(len(self.arrived_at)) if self.after is None else np.flatnonzero(self.after < 0)
        if (falls := np.diff(self.arrived_at[first]) < 0).any():
            row = int(first[falls.argmax() + 1])
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
            made = map(Request, range(start, end), *(column[start:end].tolist() for column in columns))
            if self.contents is None and self.priorities is None:
                yield from made
                continue
            for request in made:
                if self.contents is not None:
                    request.content = self.contents[request.id]
                if self.priorities is not None:
                    request.priority = int(self.priorities[request.id])
                yield request

    def notes_on(self, schedulers: Iterable[SchedulerSpec]) -> list[str]:
        """Return `notes`, and whether priorities and schedulers that look at them come together."""
        looked_at = [spec.policy == "vllm" and spec.scheduling_policy == "priority" for spec in schedulers]
        if self.priorities is not None and not any(looked_at):
            return [*self.notes, "priorities have no effect: only the scheduler vllm with --scheduling-policy priority "
                    "looks at them"]  # fmt: skip
        if self.priorities is None and any(looked_at):
            return [*self.notes, "no request has a priority, so all are of one: --priorities, or a trace's "
                    "--columns priority=NAME"]  # fmt: skip
        return list(self.notes)

    @property
    def waits(self) -> bool:
        """Whether when a request is sent hangs on how others fared."""
        return self.after is not None or self.client.seats is not None

    def sender(self) -> Client:
        """Make the client that sends these requests."""
        return Client(self._with_turns(), self.client)

    def _with_turns(self) -> Iterator[Request | Turn]:
        if self.after is None or self.think_s is None:
            yield from self.requests()
            return
        for request, after, think_s in zip(self.requests(), self.after.tolist(), self.think_s.tolist(), strict=True):
            yield request if after < 0 else Turn(request, after, think_s)


def make_workload(spec: WorkloadSpec) -> Workload:
    """The workload that `spec` describes; the same spec gives the same one."""
    lengths_rng, arrivals_rng, priorities_rng = np.random.default_rng(spec.seed).spawn(3)
    made = _made(spec, lengths_rng, arrivals_rng)
    if spec.priorities is None:
        return made
    if made.priorities is not None:
        raise InputError(
            f"priorities {spec.priorities} and a column of trace {spec.trace} both give them: leave one out"
        )
    levels, shares = _shares(spec.priorities)
    of_first = priorities_rng.choice(levels, len(made), p=shares)
    first = np.arange(len(made)) if made.after is None else np.maximum.accumulate(
        np.where(made.after < 0, np.arange(len(made)), 0)
    )  # fmt: skip
    return replace(made, priorities=of_first[first])


def _made(spec: WorkloadSpec, lengths_rng: np.random.Generator, arrivals_rng: np.random.Generator) -> Workload:
    """The workload without drawn priorities."""
    if spec.trace is not None:
        return _replay(spec, spec.trace, lengths_rng, arrivals_rng)
    limit = spec.max_model_len if spec.clip_tokens is None else None  # nothing that is clipped is too long
    n = _DEFAULT_NUM_PROMPTS if spec.num_prompts is None else spec.num_prompts
    system = spec.system_prompt_len
    if limit is not None and limit - system < 2:
        raise InputError(f"system_prompt_len {system} leaves no room in max_model_len {limit}: lower it")
    room = None if limit is None else limit - system
    if spec.turns is not None:
        return _conversations(spec, n, room, lengths_rng, arrivals_rng)
    prompt, output, dropped = draw_lengths(_ranks_to_lengths(spec), n, lengths_rng, room)
    prompt, output = _clip(prompt + system, output, spec.clip_tokens)
    contents = [Content.of((SYSTEM, system), own(i)) for i in range(n)] if system else None
    arrived_at = _arrivals(spec, n, None, arrivals_rng)
    return Workload(spec.lengths, arrived_at, prompt, output, dropped, contents=contents, client=spec.client())


def _conversations(
    spec: WorkloadSpec,
    n: int,
    room: int | None,
    lengths_rng: np.random.Generator,
    arrivals_rng: np.random.Generator,
) -> Workload:
    """`n` requests that are turns of conversations, each conversation's rows one after the other."""
    low, high = _range("turns", spec.turns, fixed=False, what="requests")
    message, output, dropped = draw_lengths(_ranks_to_lengths(spec), n, lengths_rng, room)
    later = message
    if spec.turn_input_len is not None:
        ends = _range("turn_input_len", spec.turn_input_len, fixed=False)
        later = lengths_rng.integers(ends[0], ends[1] + 1, n)
    wanted = lengths_rng.integers(low, high + 1, n)
    think_s = lengths_rng.exponential(spec.think_time_s, n) if spec.think_time_s else np.zeros(n)
    prompts, after, conversation = np.empty(n, np.int64), np.full(n, -1), np.empty(n, np.int64)
    started = turn = 0
    for row in range(n):
        prompt = int(message[row]) + spec.system_prompt_len
        if turn and turn < wanted[started - 1]:
            longer = int(prompts[row - 1] + output[row - 1] + later[row])
            if spec.max_model_len is None or longer + output[row] <= spec.max_model_len:
                prompts[row], after[row], conversation[row] = longer, row - 1, started - 1
                turn += 1
                continue
        prompts[row], conversation[row] = prompt, started
        started, turn = started + 1, 1
    begins = _arrivals(spec, started, None, arrivals_rng)
    system = (SYSTEM, spec.system_prompt_len)
    contents = [Content.of(system, (SYSTEM + 1 + number, math.inf)) for number in conversation.tolist()]
    return Workload(
        spec.lengths, begins[conversation], prompts, output, dropped,
        contents=contents, after=after, think_s=think_s, client=spec.client(),
    )  # fmt: skip


def _replay(spec: WorkloadSpec, path: Path, lengths_rng: np.random.Generator, rng: np.random.Generator) -> Workload:
    trace = read_trace(path, spec.columns, spec.tokenizer)
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
    if spec.hash_id_tokens != _HASH_ID_TOKENS and not trace.ids_are_hashes:
        raise InputError(f"hash_id_tokens {spec.hash_id_tokens} needs hash ids: {path} has none that are read")
    if trace.arrived_at is not None and spec.client().seats is not None and spec.arrival == "burst":
        unused = "the recorded times are not used: a closed loop sends the next request when one has ended"
        trace = replace(trace, notes=(*trace.notes, f"{unused} (--arrival trace uses them)"))
    notes = trace.notes
    if trace.sessions is not None:
        return _sessions(spec, trace, rows, dropped, lengths_rng, rng)
    recorded = None if trace.arrived_at is None else trace.arrived_at[rows]
    arrived_at = _arrivals(spec, len(rows), recorded, rng)
    contents, odd = _shared(spec, trace, prompt, rows)
    return Workload(
        path.stem, arrived_at, prompt[rows], output[rows], dropped, trace.num_failed, contents=contents,
        priorities=None if trace.priorities is None else trace.priorities[rows],
        client=spec.client(), notes=(*notes, *odd),
    )  # fmt: skip


def _sessions(
    spec: WorkloadSpec, trace: Trace, rows: Ints, dropped: int, lengths_rng: np.random.Generator,
    rng: np.random.Generator,
) -> Workload:  # fmt: skip
    """The rows of a trace as turns of conversations, each conversation's one after the other."""
    assert trace.sessions is not None and spec.trace is not None
    begun, session = np.unique(trace.sessions[rows], return_index=True, return_inverse=True)[1:]
    order = np.lexsort((np.arange(len(rows)), begun[session]))  # by the first turn of its session, then by time
    rows, session = rows[order], session[order]
    follows = np.concatenate(([False], session[1:] == session[:-1]))
    first = np.maximum.accumulate(np.where(follows, 0, np.arange(len(rows))))
    after = np.where(follows, np.arange(len(rows)) - 1, -1)
    recorded = None if trace.arrived_at is None else trace.arrived_at[rows]
    begins = _arrivals(spec, int((~follows).sum()), None if recorded is None else recorded[~follows], rng)
    arrived_at = begins[np.cumsum(~follows) - 1]
    as_recorded = recorded is not None and _arrival(spec, recorded) == "trace"
    if as_recorded and not spec.think_time_s:
        assert recorded is not None
        arrived_at = arrived_at + (recorded - recorded[first]) / spec.rate_scale
    think_s = lengths_rng.exponential(spec.think_time_s, len(rows)) if spec.think_time_s else np.zeros(len(rows))
    prompts, outputs = trace.prompt[rows], trace.output[rows]
    longer = np.concatenate(([True], prompts[1:] >= (prompts + outputs)[:-1]))
    anew = follows & ~longer  # a prompt that can't hold the turn before and its output is one of its own
    stream = np.cumsum(~follows | anew)
    contents = [Content.of((SYSTEM + int(number), math.inf)) for number in stream.tolist()]
    notes = trace.notes
    if anew.any():
        odd = f"{int(anew.sum()):,} of {len(rows):,} turns have prompts shorter than the turn before and its output"
        notes = (*notes, f"{odd}: these share nothing with it")
    return Workload(
        spec.trace.stem, arrived_at, prompts, outputs, dropped, trace.num_failed, contents=contents, after=after,
        think_s=think_s, priorities=None if trace.priorities is None else trace.priorities[rows],
        client=spec.client(), notes=notes,
    )  # fmt: skip


def _shared(
    spec: WorkloadSpec, trace: Trace, prompts: Ints, rows: Ints
) -> tuple[list[Content | None] | None, list[str]]:
    """Which prompts of a trace begin alike by its ids, and what is odd about these, in words.

    A prompt whose ids contradict its length, or that has an id elsewhere than another prompt has, is one of its own.
    """
    if trace.ids is None:
        return None, []
    seen: dict[int, tuple[int, int]] = {}  # of each id, its start and end in a prompt
    contents: list[Content | None] = []
    odd = 0
    for number, row in enumerate(rows.tolist()):
        recorded, ids = int(trace.prompt[row]), trace.ids[row]
        step = spec.hash_id_tokens if trace.ids_are_hashes else recorded
        spans = [(id, (place * step, min((place + 1) * step, recorded))) for place, id in enumerate(ids)]
        fits = len(ids) == -(-recorded // step) and all(seen.get(id, span) == span for id, span in spans)
        if fits:
            seen.update(spans)
        odd += not fits
        pieces = [(id, min(end, int(prompts[row]))) for id, (_, end) in spans] if fits else []
        contents.append(Content.of(*pieces, own(number)))
    if not odd:
        return contents, []
    what = f"hash ids (one for each {spec.hash_id_tokens} tokens)" if trace.ids_are_hashes else "prompt ids"
    return contents, [f"{odd:,} of {len(rows):,} requests have {what} that contradict lengths: these share nothing"]


def _arrival(spec: WorkloadSpec, recorded: Floats | None) -> str:
    """The arrival process; `recorded` are a trace's own times, if it has any."""
    return spec.arrival or ("trace" if recorded is not None and spec.request_rate is None else "poisson")


def _shares(text: str) -> tuple[list[int], list[float]]:
    """The priorities that `0=0.2,1=0.8` names, and their shares."""
    try:
        pairs = [(int(key), float(share)) for key, _, share in (part.partition("=") for part in text.split(","))]
        if any(abs(level) >= HIGHEST_PRIORITY for level, _ in pairs):
            raise ValueError
    except ValueError:
        pairs = []
    levels, shares = [level for level, _ in pairs], [share for _, share in pairs]
    if not pairs or len(set(levels)) < len(levels) or min(shares) < 0 or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise InputError(
            f"priorities {short(text)}: give PRIORITY=SHARE,... with shares that add up to 1, such as 0=0.2,1=0.8"
        )
    return levels, shares


def _arrivals(spec: WorkloadSpec, n: int, recorded: Floats | None, rng: np.random.Generator) -> Floats:
    """Arrival times (n,) in seconds, not falling; `recorded` (n,) are the trace's own."""
    arrival = _arrival(spec, recorded)
    if spec.rate_scale != 1 and arrival != "trace":
        raise InputError(f"rate_scale {spec.rate_scale} needs arrival 'trace': set request_rate instead")
    if arrival == "trace":
        if recorded is None:
            raise InputError(f"trace {spec.trace} has no arrival times: choose arrival 'poisson' with a request_rate")
        return recorded / spec.rate_scale
    if arrival == "burst":
        return np.zeros(n)
    if spec.request_rate is None:
        if spec.trace is not None and spec.arrival is None:
            raise InputError(f"trace {spec.trace} has no arrival times: give a request_rate, or max_concurrency")
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
    ranges = [
        _range(name, value, fixed=False)
        for name, value in (("input_len", spec.input_len), ("output_len", spec.output_len))
    ]
    if spec.lengths == "random":  # as vLLM's: whole numbers, both ends among them
        ratio = spec.random_range_ratio
        ranges = [(max(1, int(length * (1 - ratio))), max(1, int(length * (1 + ratio)))) for length, _ in ranges]
    prompt, output = (_power_law(*ends, alpha) for ends in ranges)
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


def _range(name: str, value: str | int | None, *, fixed: bool, what: str = "tokens") -> tuple[int, int]:
    """The range, both ends in it, that a number or LOW:HIGH stands for."""
    form = f"a number of {what}" if fixed else f"a number of {what}, or LOW:HIGH with LOW <= HIGH"
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
        raise InputError(f"{name} {short(value)} must be a whole number, {low} or more")
    if value is not None and value > MOST_WHOLE:
        raise InputError(f"{name} {short(value)}: give at most {MOST_WHOLE:,}")


def _check_number(name: str, value: float, low: float, high: float, hint: str) -> None:
    if isinstance(value, bool) or not math.isfinite(value) or not low <= value <= high:
        raise InputError(f"{name} {short(value)} must be a number from {low:g} to {high:g}{hint}")
