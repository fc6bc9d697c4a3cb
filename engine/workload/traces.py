"""Reads recorded request traces: lengths in tokens and, where there are any, arrival times.

The format is told from the column names, whether the file is CSV or JSON lines: plain
`num_prefill_tokens,num_decode_tokens[,arrived_at]`, Azure's `TIMESTAMP,ContextTokens,GeneratedTokens`, BurstGPT's
`Timestamp,...,Request tokens,Response tokens,...`, and Mooncake's `timestamp,input_length,output_length`.
"""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

MAX_TOKENS = 10_000_000  # a longer request is a mistake in the input, and sums of lengths stay far from overflow


@dataclass(frozen=True, eq=False)
class Trace:
    """The requests of a trace in order of arrival: prompt (n,) and output (n,) tokens, `arrived_at` (n,) seconds.

    The first request arrives at 0; `arrived_at` is None where the trace has no times. `num_failed` rows that say that
    the request failed are left out.
    """

    prompt: NDArray[np.int64]
    output: NDArray[np.int64]
    arrived_at: NDArray[np.float64] | None
    num_failed: int = 0


@dataclass(frozen=True)
class _Format:
    prompt: str
    output: str
    time: str
    seconds: float | None  # per unit of the time column; None: it holds dates
    zero_output_is_failure: bool = False


_FORMATS = (
    _Format("num_prefill_tokens", "num_decode_tokens", "arrived_at", 1.0),
    _Format("ContextTokens", "GeneratedTokens", "TIMESTAMP", None),
    _Format("Request tokens", "Response tokens", "Timestamp", 1.0, zero_output_is_failure=True),
    _Format("input_length", "output_length", "timestamp", 1e-3),
)


def read_trace(path: Path) -> Trace:
    """Read a trace; raises `InputError` with the file, the line and the value for whatever is wrong with it."""
    frame = _read_frame(path)
    form = _format_of(path, frame)
    failed = np.zeros(len(frame), np.bool_)
    if form.zero_output_is_failure:
        failed = np.asarray(_numbers(path, frame, form.output) == 0)
        frame = frame[~failed]
    if not len(frame):
        raise InputError(f"{path} holds no requests: give a trace with at least one")
    prompt, output = _tokens(path, frame, form.prompt), _tokens(path, frame, form.output)
    if form.time not in frame:
        return Trace(prompt, output, None, int(failed.sum()))
    times = _dates(path, frame, form.time) if form.seconds is None else _numbers(path, frame, form.time) * form.seconds
    order = np.argsort(times, kind="stable")
    return Trace(prompt[order], output[order], times[order] - times.min(), int(failed.sum()))


def _read_frame(path: Path) -> "pd.DataFrame":
    """The file as a table whose index is the line number that an editor shows."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            first = next((line for line in file if line.strip()), "")
        if not first:
            raise InputError(f"{path} is empty: give a CSV or JSON lines trace")
        return _read_json_lines(path) if first.lstrip().startswith("{") else _read_csv(path)
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


def _read_json_lines(path: Path) -> "pd.DataFrame":
    import pandas as pd

    wanted = {column for form in _FORMATS for column in (form.prompt, form.output, form.time)}
    rows, lines = [], []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path} line {number}: no JSON ({error}): {line.strip()[:60]}") from error
            if not isinstance(row, dict):
                raise InputError(f"{path} line {number}: {line.strip()[:60]} is no object of columns")
            rows.append({column: row[column] for column in row if column in wanted} or dict.fromkeys(row))
            lines.append(number)
    return pd.DataFrame(rows, index=lines)


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
