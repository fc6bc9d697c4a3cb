"""Reads recorded request traces: lengths in tokens and, where there are any, arrival times.

The format is recognised by the column names, whether the file is CSV or JSON lines: plain
`num_prefill_tokens,num_decode_tokens[,arrived_at]`, Azure's `TIMESTAMP,ContextTokens,GeneratedTokens`, BurstGPT's
`Timestamp,...,Request tokens,Response tokens,...`, and Mooncake's `timestamp,input_length,output_length,hash_ids`. Any
other is read with its columns named: `prompt=tokens_in,output=tokens_out,time=at_s,prompt_id=which`; `session=chat` and
`priority=class` may be named for any. A ShareGPT JSON has text, whose tokens a tokenizer counts.
"""

import re
import warnings
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.documents import MOST_COLUMNS, check_table, parse_json, read_json
from engine.errors import InputError, unknown

if TYPE_CHECKING:
    import pandas as pd

MOST_NUMBER = 1e21  # a date in nanoseconds has 19 digits
MAX_TOKENS = 10_000_000  # a longer request is a mistake in the input, and sums of lengths stay far from overflow


@dataclass(frozen=True, eq=False)
class Trace:
    """The requests of a trace in order of arrival: prompt (n,) and output (n,) tokens, `arrived_at` (n,) seconds.

    The first request arrives at 0; `arrived_at` is None where the trace has no times. `num_failed` rows that say that
    the request failed are left out. `ids` are of each prompt: hash ids of its pieces, each of these tokens and all
    them (`ids_are_hashes`), or one of the whole prompt; None where the trace has none. `sessions` (n,) number the
    conversations that the requests are turns of, `priorities` (n,) are the lowest first; None where none are named.
    `notes` are what a reader of the results should know.
    """

    prompt: NDArray[np.int64]
    output: NDArray[np.int64]
    arrived_at: NDArray[np.float64] | None
    num_failed: int = 0
    ids: list[list[int]] | None = None
    ids_are_hashes: bool = False
    sessions: NDArray[np.int64] | None = None
    priorities: NDArray[np.int64] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Format:
    prompt: str
    output: str
    time: str
    seconds: float | None  # per unit of the time column; None: it holds dates
    zero_output_is_failure: bool = False
    hash_ids: str | None = None
    prompt_id: str | None = None
    session: str | None = None
    priority: str | None = None

    @property
    def columns(self) -> list[str]:
        """Every column that it may have."""
        return [name for key in _COLUMNS if (name := getattr(self, key))]


_COLUMNS = ("prompt", "output", "time", "hash_ids", "prompt_id", "session", "priority")  # that --columns may name
_LIKELY = {  # words in the names of columns that may be meant for these
    "session": {"session", "sessions", "conversation", "chat", "user"},
    "priority": {"priority", "priorities"},
    "hash_ids": {"hash", "hashes"},
    "prompt_id": {"id", "ids"},
}
HIGHEST_PRIORITY = 1 << 31
_FORMATS = (
    _Format("num_prefill_tokens", "num_decode_tokens", "arrived_at", 1.0),
    _Format("ContextTokens", "GeneratedTokens", "TIMESTAMP", None),
    _Format("Request tokens", "Response tokens", "Timestamp", 1.0, zero_output_is_failure=True),
    _Format("input_length", "output_length", "timestamp", 1e-3, hash_ids="hash_ids"),
)
MOST_TEXT_BYTES = 1 << 32  # of a ShareGPT file, which has some hundred megabytes
LEAST_TOKENS = 4  # of a prompt and of an answer in a ShareGPT file: vLLM's benchmark drops shorter ones too


def read_trace(path: Path, columns: str | None = None, tokenizer: Path | None = None) -> Trace:
    """Read a trace; raise `InputError` with the file, the line and the value for whatever is wrong with it.

    `columns` names those of a format that is not known; `tokenizer` is a folder, for a trace of text.
    """
    if path.suffix == ".json" and columns is None:
        return _read_conversations(path, tokenizer)
    if tokenizer is not None:
        raise InputError(f"tokenizer {tokenizer} has no meaning with {path}: it is for ShareGPT's .json files")
    named = {} if columns is None else _named(columns)
    frame = _read_frame(path, named)
    form = _form(path, frame, named)
    failed = np.zeros(len(frame), np.bool_)
    if form.zero_output_is_failure:
        failed = np.asarray(_numbers(path, frame, form.output) == 0)
        frame = frame[~failed]
    if not len(frame):
        raise InputError(f"{path} holds no requests: give a trace with at least one")
    prompt, output = _tokens(path, frame, form.prompt), _tokens(path, frame, form.output)
    ids = _ids(path, frame, form)
    sessions = None if form.session is None else _sessions(path, frame, form.session)
    priorities = None if form.priority is None else _priorities(path, frame, form.priority)
    times, order, back = None, np.arange(len(frame)), 0
    if form.time in frame:
        seconds = form.seconds
        times = _dates(path, frame, form.time) if seconds is None else _numbers(path, frame, form.time) * seconds
        if sessions is not None:
            _check_sessions(path, frame, form, sessions, times)
        order = np.argsort(times, kind="stable")
        back = int((np.diff(times) < 0).sum())
        times = times[order] - times.min()
    return Trace(
        prompt[order],
        output[order],
        times,
        int(failed.sum()),
        ids=None if ids is None else [ids[row] for row in order.tolist()],
        ids_are_hashes=form.hash_ids is not None and form.hash_ids in frame,
        sessions=None if sessions is None else sessions[order],
        priorities=None if priorities is None else priorities[order],
        notes=(*_unused(path, frame, form), *_unsorted(path, back)),
    )


def _named(text: str) -> dict[str, str]:
    """The columns that `prompt=a,output=b,...` names."""
    given = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        if key.strip() not in _COLUMNS:
            raise unknown("column", key.strip(), _COLUMNS)
        given[key.strip()] = value.strip()
    wrong = ("prompt" in given and "output" not in given) or ("output" in given and "prompt" not in given)
    if not all(given.values()) or wrong:
        raise InputError(
            f"columns {text!r}: give prompt=NAME,output=NAME (of a format that is not known) and, if there are any, "
            "time=NAME (seconds), hash_ids=NAME or prompt_id=NAME or session=NAME, and priority=NAME"
        )
    if len(both := [key for key in ("hash_ids", "prompt_id", "session") if key in given]) > 1:
        raise InputError(f"columns {text!r}: {' and '.join(both)} each say what prompts share: leave one out")
    return given


def _form(path: Path, frame: "pd.DataFrame", named: dict[str, str]) -> _Format:
    """The format of a table: the one that it is recognised as, with the columns that are named."""
    if "prompt" in named:
        form = _Format(**{"time": "", "seconds": 1.0, **named})  # type: ignore[arg-type]
    else:
        form = _format_of(path, frame)
        if "session" in named or "prompt_id" in named:
            form = replace(form, hash_ids=None)
        if "time" in named:
            form = replace(form, seconds=1.0)
        form = replace(form, **named)  # type: ignore[arg-type]
    for column in named.values():
        if column not in frame:
            raise InputError(f"{path} has no column {column!r}: its columns are {', '.join(map(str, frame.columns))}")
    return form


def _sessions(path: Path, frame: "pd.DataFrame", column: str) -> NDArray[np.int64]:
    """A number for each session, the same in all of its rows."""
    _check(path, frame, column, frame[column].notna().to_numpy(), "is no session")
    return frame[column].astype(str).factorize()[0].astype(np.int64)


def _priorities(path: Path, frame: "pd.DataFrame", column: str) -> NDArray[np.int64]:
    numbers = _numbers(path, frame, column)
    valid = (abs(numbers) < HIGHEST_PRIORITY) & (numbers == np.floor(numbers))
    _check(path, frame, column, valid, "must be a whole number (the lowest goes first)")
    return numbers.astype(np.int64)


def _check_sessions(
    path: Path, frame: "pd.DataFrame", form: _Format, sessions: NDArray[np.int64], times: NDArray[np.float64]
) -> None:
    """Raise InputError for the first session that goes back in time."""
    latest: dict[int, tuple[float, int]] = {}
    for line, session, time in zip(frame.index.tolist(), sessions.tolist(), times.tolist(), strict=True):
        before, where = latest.get(session, (time, line))
        if time < before:
            name = frame.loc[line, form.session]
            raise InputError(
                f"{path} line {line}: session {name!r} goes back in time, {before - time:g} s before its turn in line "
                f"{where}: put the turns of a session in order"
            )
        latest[session] = time, line


def _unsorted(path: Path, back: int) -> tuple[str, ...]:
    """A note on times that go back from one row to the next."""
    if not back:
        return ()
    rows = f"{back:,} rows are" if back > 1 else "1 row is"
    return (f"{path.name}: {rows} earlier than the row before: requests are sorted by time",)


def _ids(path: Path, frame: "pd.DataFrame", form: _Format) -> list[list[int]] | None:
    """Of each prompt its hash ids, or the one that it has as a whole, numbered from 1."""
    if form.hash_ids is not None and form.hash_ids in frame:
        numbers: dict[object, int] = {}
        found = []
        for line, value in zip(frame.index, frame[form.hash_ids], strict=True):
            ids = value.strip("[]").replace(",", " ").split() if isinstance(value, str) else value
            if not isinstance(ids, list) or not all(isinstance(id, int | str) for id in ids):
                raise InputError(f"{path} line {line}, column {form.hash_ids!r}: {str(value)[:60]} is no list of ids")
            found.append([numbers.setdefault(str(id), len(numbers) + 1) for id in ids])
        return found
    if form.prompt_id is not None and form.prompt_id in frame:
        codes, _ = frame[form.prompt_id].astype(str).factorize()
        return [[int(code) + 1] for code in codes]
    return None


def _unused(path: Path, frame: "pd.DataFrame", form: _Format) -> tuple[str, ...]:
    """Notes on columns that are not read, and on those of them that --columns may name."""
    every = dict.fromkeys([*map(str, frame.columns), *frame.attrs.get("others", ())])
    names = [name for name in every if name not in form.columns]
    if not names:
        return ()
    hints: dict[str, str] = {}  # by column
    for key, words in _LIKELY.items():
        chosen = key != "priority" and (form.prompt_id or form.session)  # one of these says what prompts share
        if getattr(form, key) is None and not chosen:
            found = [n for n in names if n not in hints and words & set(re.split("[^a-z]+", n.lower()))]
            hints |= {n: f"--columns {key}={n}" for n in found[:1]}
    wanted = f"; to use: {', '.join(hints.values())}" if hints else ""
    return (f"{path.name}: {', '.join(names)[:200]} not used{wanted}",)


def _read_conversations(path: Path, tokenizer: Path | None) -> Trace:
    """The first prompt and answer of each conversation of a ShareGPT file, as vLLM's benchmark takes them."""
    texts = _conversations(path)
    if tokenizer is None:
        raise InputError(f"{path} is text: give a tokenizer folder to count its tokens")
    if find_spec("transformers") is None:
        raise InputError(f"{path} needs the package transformers to count its tokens: pip install -e '.[engine]'")
    from transformers import AutoTokenizer

    try:
        encode = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    except Exception as error:  # of many kinds, from several packages
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"can't read the tokenizer in {tokenizer} ({what}): give a model's folder") from None
    lengths = np.array([[len(encode(text)["input_ids"]) for text in pair] for pair in texts], np.int64)
    kept = lengths[(lengths >= LEAST_TOKENS).all(axis=1)]
    if not len(kept):
        raise InputError(f"{path} holds no conversation of {LEAST_TOKENS} tokens or more")
    short = len(lengths) - len(kept)
    notes = (f"{path.name}: {short:,} conversations of fewer than {LEAST_TOKENS} tokens are left out",) if short else ()
    return Trace(kept[:, 0], kept[:, 1], None, notes=notes)


def _conversations(path: Path) -> list[tuple[str, str]]:
    """The first two texts of each conversation of a ShareGPT file."""
    data = read_json(path, "give a CSV or JSON lines trace, or ShareGPT's JSON", MOST_TEXT_BYTES)
    texts = []
    for entry in data if isinstance(data, list) else []:
        turns = entry.get("conversations") if isinstance(entry, dict) else None
        if isinstance(turns, list) and len(turns) >= 2:
            first, second = (turn.get("value") if isinstance(turn, dict) else None for turn in turns[:2])
            if isinstance(first, str) and isinstance(second, str):
                texts.append((first, second))
    if not texts:
        raise InputError(f"{path} holds no conversations: ShareGPT's JSON is a list of objects with 'conversations'")
    return texts


def _read_frame(path: Path, named: dict[str, str]) -> "pd.DataFrame":
    """The file as a table whose index is the line number that an editor shows."""
    try:
        first = check_table(path)
        if not first.strip():
            raise InputError(f"{path} is empty: give a CSV or JSON lines trace")
        return _read_json_lines(path, named) if first.lstrip().startswith("{") else _read_csv(path)
    except OSError as error:
        raise InputError(f"cannot read trace {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not text ({error.reason}): give a CSV or JSON lines trace") from error


def _read_csv(path: Path) -> "pd.DataFrame":
    import pandas as pd  # slow to import, and most runs read no trace

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # a row wider than the header would be cut silently
            frame = pd.read_csv(
                path,
                index_col=False,
                skip_blank_lines=False,  # they count as lines
                keep_default_na=False,
                na_values=[""],
                low_memory=False,
                encoding="utf-8-sig",
                compression=None,
            )
    except pd.errors.ParserWarning as error:
        raise InputError(f"{path} is no table: line 2 has more values than line 1 has columns") from error
    except pd.errors.ParserError as error:
        reason = str(error).strip().removeprefix("Error tokenizing data. C error: ")
        raise InputError(f"{path} is no table: {reason}") from error
    frame.columns = pd.Index([str(column).strip() for column in frame.columns])
    frame.index = pd.RangeIndex(2, len(frame) + 2)
    return frame.dropna(how="all")


def _read_json_lines(path: Path, named: dict[str, str]) -> "pd.DataFrame":
    import pandas as pd

    wanted = set(named.values())
    if "prompt" not in named:
        wanted |= {column for form in _FORMATS for column in form.columns}
    others: dict[str, None] = {}
    rows, lines = [], []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            row = parse_json(line, f"{path} line {number}", f"mend it: {line.strip()[:60]}")
            if not isinstance(row, dict):
                raise InputError(f"{path} line {number}: {line.strip()[:60]} is no object of columns")
            found = {column: row[column] for column in row if column in wanted}
            if len(found) < len(row):
                others |= dict.fromkeys(column for column in row if column not in wanted)
                if len(others) > MOST_COLUMNS:
                    raise InputError(f"{path} line {number}: more than {MOST_COLUMNS:,} columns: give a trace of fewer")
            rows.append(found or dict.fromkeys(row))
            lines.append(number)
    frame = pd.DataFrame(rows, index=lines)
    frame.attrs["others"] = list(others)  # columns that were not kept
    return frame


def _format_of(path: Path, frame: "pd.DataFrame") -> _Format:
    for form in _FORMATS:
        missing = [column for column in (form.prompt, form.output) if column not in frame]
        if not missing:
            return form
        if len(missing) == 1:
            raise InputError(f"{path} has no column {missing[0]!r}: its columns are {', '.join(frame.columns)}")
    known = "; ".join(f"{form.prompt},{form.output}" for form in _FORMATS)
    raise InputError(f"{path} has columns {', '.join(frame.columns)[:200]}: a trace needs one of these pairs: {known}")


def _numbers(path: Path, frame: "pd.DataFrame", column: str) -> NDArray[np.float64]:
    """The column as finite numbers (n,)."""
    import pandas as pd

    values = frame[column]
    if values.dtype.kind not in "iuf":
        values = pd.to_numeric(values.astype(str), errors="coerce")
    numbers = values.to_numpy(np.float64)
    _check(path, frame, column, np.isfinite(numbers), "is not a number")
    _check(path, frame, column, np.abs(numbers) <= MOST_NUMBER, "is too far from zero")
    return numbers


def _tokens(path: Path, frame: "pd.DataFrame", column: str) -> NDArray[np.int64]:
    """The column as token counts (n,)."""
    numbers = _numbers(path, frame, column)
    valid = (numbers >= 1) & (numbers <= MAX_TOKENS) & (numbers == np.floor(numbers))
    _check(path, frame, column, valid, f"must be a whole number of tokens from 1 to {MAX_TOKENS}")
    return numbers.astype(np.int64)


def _dates(path: Path, frame: "pd.DataFrame", column: str) -> NDArray[np.float64]:
    """The column of dates as seconds (n,) since the first of them."""
    import pandas as pd

    dates = pd.to_datetime(frame[column].astype(str), format="ISO8601", utc=True, errors="coerce")
    _check(path, frame, column, dates.notna().to_numpy(), "is not a date such as 2023-11-16 18:15:46.6805900")
    return np.asarray((dates - dates.min()) / pd.Timedelta(seconds=1), np.float64)


def _check(path: Path, frame: "pd.DataFrame", column: str, valid: NDArray[np.bool_], complaint: str) -> None:
    """Raise for the first row that is not valid, in its own words."""
    if valid.all():
        return
    row = int(np.argmin(valid))
    value = frame[column].iloc[row]
    where = f"{path} line {frame.index[row]}, column {column!r}"
    if value is None or value != value:
        raise InputError(f"{where}: the value is missing; complete the row or delete it")
    more = f" (and {int((~valid).sum()) - 1} more rows)" if (~valid).sum() > 1 else ""
    raise InputError(f"{where}: {value} {complaint}{more}; mend the row or delete it")
