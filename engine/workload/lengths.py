"""Joint distributions of prompt and output length, small enough to carry along and to share without their trace.

A distribution is a table of prompt quantiles and, for each of a few bins of equal mass along the prompt's rank, a
table of output quantiles. So the dependence of the two lengths comes from the bins, whatever its shape. Drawing is
two interpolations. A cap on the total shortens the output: it touches the few longest prompts only, and leaves the
prompt's quantiles as they were, which drawing again would not.

    python -m engine.workload.lengths fit trace.csv --name mine --output mine.json
"""

import argparse
import datetime
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.documents import read_json
from engine.errors import InputError, unknown
from engine.results.files import write_whole
from engine.workload.traces import MAX_TOKENS, read_trace

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_BUILTIN = Path(__file__).with_name("length_distributions")
_TAIL = (0.001, 0.002, 0.005, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999)
_LEVELS = np.union1d(np.linspace(0, 1, 101).round(2), _TAIL)
_MOST_BINS, _ROWS_PER_BIN = 8, 400
_MOST_MISSES = 100  # draws per request kept, above which a cap leaves nothing worth drawing for


@dataclass(frozen=True, eq=False)
class LengthDistribution:
    """Quantile tables (tokens) of a prompt length and of the output length given the prompt's rank.

    `prompt` (q,) holds the prompt quantiles at `levels` (q,), which rise from 0 to 1; row b of `output` (bins, q) holds
    the output quantiles at the same levels for prompts whose rank lies in [b, b + 1) / bins.
    No request is longer than `max_total` tokens, prompt and output together. `source` says where the numbers are from.
    """

    name: str
    source: str
    max_total: int | None
    levels: Floats
    prompt: Floats
    output: Floats

    def __post_init__(self) -> None:
        levels, where = self.levels, f"length distribution {self.name!r}"
        ends = levels.ndim == 1 and len(levels) > 1 and (levels[0], levels[-1]) == (0, 1)
        if not ends or not (np.diff(levels) > 0).all():
            raise InputError(f"{where}: levels must rise from 0 to 1")
        if self.prompt.shape != levels.shape or not len(self.output) or self.output.shape[1:] != levels.shape:
            raise InputError(f"{where}: prompt and each row of output need one quantile for each of the levels")
        for what, tokens in (("prompt", self.prompt), ("output", self.output)):
            if not ((tokens >= 1) & (tokens <= MAX_TOKENS)).all() or not (np.diff(tokens) >= 0).all():
                raise InputError(f"{where}: {what} quantiles must not fall and lie in 1..{MAX_TOKENS} tokens")
        if self.max_total is not None and self.max_total < self.prompt[-1] + 1:
            raise InputError(
                f"{where}: max_total {self.max_total} leaves no output after the longest "
                f"prompt, {self.prompt[-1]:.0f} tokens: raise it"
            )

    @classmethod
    def fit(
        cls, prompt: Ints, output: Ints, *, name: str, source: str, max_total: int | None = None
    ) -> "LengthDistribution":
        """The distribution of the rows `prompt` (n,) and `output` (n,), in tokens; `max_total` is the trace's cap."""
        if len(prompt) != len(output):
            raise ValueError(f"{len(prompt)} prompt lengths and {len(output)} output lengths are no pairs")
        if len(prompt) < _ROWS_PER_BIN:
            raise InputError(f"{len(prompt)} rows are too few to fit lengths to: give at least {_ROWS_PER_BIN}")
        by_prompt = np.argsort(prompt, kind="stable")
        bins = np.array_split(output[by_prompt], min(_MOST_BINS, len(prompt) // _ROWS_PER_BIN))
        return cls(
            name,
            source,
            max_total,
            _LEVELS,
            np.quantile(prompt, _LEVELS, method="inverted_cdf").astype(np.float64),
            np.array([np.quantile(rows, _LEVELS, method="inverted_cdf") for rows in bins], np.float64),
        )

    def at(self, ranks: Floats) -> tuple[Ints, Ints]:
        """Prompt (n,) and output (n,) tokens at `ranks` (n, 2), uniform in [0, 1)."""
        prompt = np.rint(np.interp(ranks[:, 0], self.levels, self.prompt)).astype(np.int64)
        # The bins' tables laid end to end are one table, so a single interpolation serves them all.
        bins = len(self.output)
        levels = (np.arange(bins)[:, None] + self.levels).ravel()
        interpolated = np.interp(np.floor(ranks[:, 0] * bins) + ranks[:, 1], levels, self.output.ravel())
        output = np.rint(interpolated).astype(np.int64)
        return prompt, output if self.max_total is None else np.minimum(output, self.max_total - prompt)

    def draw(self, n: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
        """Prompt (n,) and output (n,) tokens of `n` requests."""
        return self.at(rng.random((n, 2)))

    def save(self, path: Path) -> None:
        """Write the distribution as a JSON file that `load` reads."""
        rows = ",\n".join(f"  {_plain(row)}" for row in self.output)
        text = (
            f'{{\n "name": {json.dumps(self.name)},\n "source": {json.dumps(self.source)},\n'
            f' "max_total": {json.dumps(self.max_total)},\n "levels": {_plain(self.levels)},\n'
            f' "prompt": {_plain(self.prompt)},\n "output": [\n{rows}\n ]\n}}\n'
        )
        try:
            write_whole(path, text)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from error


def builtin_names() -> tuple[str, ...]:
    """The distributions that come along, one JSON file each."""
    return tuple(sorted(path.stem for path in _BUILTIN.glob("*.json")))


def load(name: str) -> LengthDistribution:
    """The distribution of that built-in name, or the one in a file when `name` ends with .json."""
    if name.endswith(".json"):
        path = Path(name)
    elif name in builtin_names():
        path = _BUILTIN / f"{name}.json"
    else:
        raise unknown("length distribution", name, builtin_names())
    data = read_json(path, "make one with `python -m engine.workload.lengths fit`")
    try:
        levels, prompt, output = (np.array(data[key], np.float64) for key in ("levels", "prompt", "output"))
        max_total = None if data["max_total"] is None else int(data["max_total"])
        return LengthDistribution(str(data["name"]), str(data["source"]), max_total, levels, prompt, output)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"{path} is no length distribution ({error!r}): make one with `python -m engine.workload.lengths fit`"
        ) from error


def draw_lengths(
    at: Callable[[Floats], tuple[Ints, Ints]],
    n: int,
    rng: np.random.Generator,
    max_model_len: int | None = None,
) -> tuple[Ints, Ints, int]:
    """Prompt (n,) and output (n,) tokens that `at` gives for uniform ranks (., 2), and how many were dropped.

    Drawing goes on until `n` requests of at most `max_model_len` tokens are kept. However many are asked for, the
    first ones are the same.
    """
    limit = 2 * MAX_TOKENS if max_model_len is None else max_model_len
    prompts, outputs = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    kept = drawn = dropped = 0
    while kept < n:
        rate = max(kept, 1) / max(drawn, 1)
        size = n if not drawn else min(int((n - kept) / rate) + 1_000, 4 * n + 10_000)
        prompt, output = at(rng.random((size, 2)))
        fits = np.flatnonzero(prompt + output <= limit)[: n - kept]
        end = int(fits[-1]) + 1 if kept + len(fits) == n else size  # what lies after the n-th was never asked for
        dropped += end - len(fits)
        prompts.append(prompt[fits])
        outputs.append(output[fits])
        kept, drawn = kept + len(fits), drawn + size
        if kept < n and drawn > 10_000 and kept * _MOST_MISSES < drawn:
            raise InputError(
                f"only {kept} of {drawn} requests drawn are no longer than {limit} tokens: raise max_model_len, "
                "draw shorter requests, or shorten them with clip_tokens"
            )
    return np.concatenate(prompts), np.concatenate(outputs), dropped


def _plain(values: Floats) -> list[int | float]:
    return [int(value) if value.is_integer() else value for value in values.tolist()]


def _main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m engine.workload.lengths", description="Fit a length distribution.")
    fit = parser.add_subparsers(required=True).add_parser("fit", help="turn a trace into a distribution without rows")
    fit.add_argument("trace", type=Path, help="trace file, CSV or JSONL")
    fit.add_argument("--name", required=True, help="name of the distribution")
    fit.add_argument("--output", required=True, type=Path, help="JSON file to write")
    fit.add_argument("--source", help="where the trace comes from (default: its file name)")
    fit.add_argument("--max-total", type=int, help="cap on prompt + output tokens that the trace was cut at")
    args = parser.parse_args(argv)
    try:
        trace = read_trace(args.trace)
        source = f"{args.source or args.trace.name}; {len(trace.prompt)} rows, fitted {datetime.date.today()}"
        LengthDistribution.fit(
            trace.prompt, trace.output, name=args.name, source=source, max_total=args.max_total
        ).save(args.output)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(_main())
