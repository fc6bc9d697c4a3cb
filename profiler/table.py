"""The calibration table: one format for whatever was measured, whoever measured it.

A row is one operator at one shape on one device: the median of its time and where that number comes from. Every kind
of operator has its own shape columns and leaves the others empty. Shapes are per rank, times in milliseconds.

what     operator (its name in `profiler.operators`, or a generic one where the source has none), kind, model and
         tensor_parallel_size where known, dtype of weights and activations
shape    gemm: (m, k) x (k, n). elementwise: `rows` of `bytes_per_row` bytes read and written. attention_prefill:
         `batch_size` requests that each compute `chunk` new tokens after `prefix` cached ones. attention_decode:
         `batch_size` requests of one new token that attend to `kv_tokens` in all, their own included (as
         `engine.scheduling.request.BatchShape` counts them). Both with `num_heads` query and `num_kv_heads` KV heads of
         `head_dim`. all_reduce, send: `num_bytes` on each of `num_ranks` ranks, `ranks_per_node` of them on a node.
         host: a component of the iteration (schedule, sampler, ...) by `batch_size`
measured time_ms: the median. spread_ms: standard deviation of the repeats. repeats: how many measurements time_ms is
         the median of; an importer counts the source's rows, each of them a summary already
how      backend (vllm, nccl, flash_attention, ...), kernel, device (one a table), network (of all_reduce and send),
         software (with version), date (ISO), source (where the number was published or how it was measured)

    python -c "from pathlib import Path; from profiler import table; print(table.read(Path('gemm.csv')))"
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from engine.documents import check_table
from engine.errors import InputError, unknown
from engine.results.folders import FULL
from profiler.kind import Form
from profiler.kinds import KINDS

if TYPE_CHECKING:
    import pandas as pd

_TEXT, _WHOLE, _NUMBER = "string", "Int64", "float64"  # the dtypes of the columns in pandas; the first two have nulls
_WHAT: dict[str, Form] = {"operator": "text", "kind": "text", "model": "text", "tensor_parallel_size": "whole"}
HOST = "host"  # the kind of rows that are of no operator: the host's work
_HOW: dict[str, Form] = {
    **{"dtype": "text", "time_ms": "number", "spread_ms": "number from 0", "repeats": "whole"},
    **dict.fromkeys(("backend", "kernel", "device", "network", "software", "date", "source"), "text"),
}
REQUIRED = ("operator", "kind", "time_ms", "device", "source")  # by every row
MEASURED = ("time_ms", "spread_ms", "repeats", "date")
MOST_BYTES = 1 << 30  # of a CSV table
MAX_WHOLE = 2**53  # the whole numbers that a float holds exactly


def needs() -> dict[str, Mapping[str, Form]]:
    """Return the columns that a row can't do without, by kind: of every kind of operator, and of the host."""
    return {**{name: kind.columns for name, kind in KINDS.items()}, HOST: {"batch_size": "whole"}}


def columns() -> dict[str, Form]:
    """Return the columns of a table, in order, with what each may hold.

    Raises ValueError where two kinds of operators disagree about a column.
    """
    shapes: dict[str, Form] = {}
    for kind, own in needs().items():
        for column, form in own.items():
            if {**_WHAT, **_HOW, **shapes}.get(column, form) != form:
                raise ValueError(f"kind {kind!r} has a column {column!r} of {form}: elsewhere it is of another form")
            shapes |= {column: form} if column not in _WHAT and column not in _HOW else {}
    return {**_WHAT, **shapes, **_HOW}


def key() -> list[str]:
    """Return the columns that tell rows apart: at most one row each."""
    return [column for column in columns() if column not in MEASURED]


def _dtype(form: Form) -> str:
    return _TEXT if form == "text" else _WHOLE if form.startswith("whole") else _NUMBER


def read(path: Path) -> pd.DataFrame:
    """Read a calibration table, Parquet or CSV; raises InputError with file, row and column for what is wrong."""
    if path.suffix == ".csv":
        return _validated(read_csv(path), str(path), "line")
    return _validated(read_parquet(path), str(path), "row")


def write(table: pd.DataFrame, path: Path) -> None:
    """Validate `table` and write it as Parquet or CSV, by the suffix of `path`; a failure leaves no file behind."""
    valid = validate(table, f"the table for {path.name}")
    if path.suffix not in (".csv", ".parquet"):
        raise InputError(f"can't write {path}: name a file that ends in .parquet or .csv")
    unfinished = path.with_name(path.name + ".part")
    try:
        if path.suffix == ".csv":
            valid.to_csv(unfinished, index=False, lineterminator="\n", encoding="utf-8")
        else:
            valid.to_parquet(unfinished, engine="pyarrow", index=False)
        unfinished.replace(path)
    except OSError as error:
        if error.errno in FULL:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise InputError(f"can't write {path}: {error.strerror or error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def validate(frame: pd.DataFrame, where: str) -> pd.DataFrame:
    """The table with every column of the format, in its order and as its type; an InputError names what is wrong.

    Columns that no row needs may be absent. Rows are named by the frame's index, columns by name; `where` says which
    table it is. `attrs` (an importer's notes) are kept.
    """
    return _validated(frame, where, "row")


def read_csv(path: Path) -> pd.DataFrame:
    """A CSV file as text, indexed by the line number that an editor shows; InputError if it is no table."""
    import pandas as pd  # slow to import, and a simulation reads no table

    try:
        check_table(path, MOST_BYTES)
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # values beyond the header would be cut silently
            frame = pd.read_csv(
                path,
                dtype=str,
                index_col=False,
                skip_blank_lines=False,  # they count as lines
                keep_default_na=False,
                na_values=[""],
                encoding="utf-8-sig",
                compression=None,
            )
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror or error}") from error
    except pd.errors.EmptyDataError as error:
        raise InputError(f"{path} is empty: give a CSV table with a header") from error
    except pd.errors.ParserWarning as error:
        raise InputError(f"{path} is no table: line 2 has more values than line 1 has columns") from error
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        reason = str(error).strip().removeprefix("Error tokenizing data. C error: ")
        raise InputError(f"{path} is no CSV table: {reason}") from error
    frame.columns = pd.Index([str(column).strip() for column in frame.columns])
    frame.index = pd.RangeIndex(2, len(frame) + 2)
    return frame.dropna(how="all")


def read_parquet(path: Path) -> pd.DataFrame:
    """A Parquet file as it is; InputError if it is none."""
    import pandas as pd
    import pyarrow as pa

    try:
        return pd.read_parquet(path, engine="pyarrow")
    except FileNotFoundError as error:
        raise InputError(f"can't read {path}: {error.strerror or 'there is no such file'}") from error
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is no Parquet table, or a part of one: {reason}") from error


def numbers(frame: pd.DataFrame, column: str, where: str, row: str = "row") -> NDArray[np.float64]:
    """The column as numbers (n,), NaN where it is empty; an InputError names the row that holds something else."""
    import pandas as pd

    values = frame[column]
    if values.dtype.kind in "iuf":
        return np.asarray(values.to_numpy(np.float64, na_value=np.nan))
    with contextlib.suppress(ValueError, TypeError):  # most often all are numbers
        pd.to_numeric(whole := values.to_numpy(object))
        if not np.isnan(parsed := whole.astype(str).astype(np.float64)).any():
            return parsed  # to_numeric may miss the last digit of a decimal; NumPy reads it exactly
    texts = values.astype("string").str.strip()
    texts = texts.mask(texts == "")
    judged = pd.to_numeric(texts.astype(object), errors="coerce").to_numpy(np.float64, na_value=np.nan)
    reject(frame, column, texts.notna().to_numpy() & np.isnan(judged), "is not a number", where, row)
    parsed, filled = np.full(len(values), np.nan), ~np.isnan(judged)
    parsed[filled] = texts[filled].to_numpy(object).astype(str).astype(np.float64)
    return parsed


def reject(
    frame: pd.DataFrame, column: str, wrong: NDArray[np.bool_], complaint: str, where: str, row: str = "row"
) -> None:
    """Raise InputError for the first row that is wrong, with its value; silent if there is none."""
    if not wrong.any():
        return
    first = int(np.argmax(wrong))
    more = f" (and {int(wrong.sum()) - 1} more rows)" if wrong.sum() > 1 else ""
    value = frame[column].iloc[first]
    raise InputError(f"{where} {row} {frame.index[first]}, column {column!r}: {value} {complaint}{more}")


def _validated(frame: pd.DataFrame, where: str, row: Literal["line", "row"]) -> pd.DataFrame:
    import pandas as pd

    forms = columns()
    for column in frame.columns:
        if column not in forms:
            raise unknown(f"column in {where}", str(column), forms)
    if repeated := [str(column) for column in frame.columns[frame.columns.duplicated()]]:
        raise InputError(f"{where} has the column {repeated[0]!r} twice: keep one of them")
    for column in REQUIRED:
        if column not in frame:
            raise InputError(f"{where} has no column {column!r}: every row needs {', '.join(REQUIRED)}")
    if not len(frame):
        raise InputError(f"{where} holds no rows: give a table with at least one measurement")

    valid = pd.DataFrame(index=frame.index)
    for column, form in forms.items():
        if column not in frame:
            valid[column] = pd.Series(np.nan, frame.index, dtype=_dtype(form))
        elif form == "text":
            texts = frame[column].astype("string")
            valid[column] = texts.mask(texts == "")
        else:
            values = numbers(frame, column, where, row)
            _check_range(frame, column, values, form, where, row)
            valid[column] = pd.Series(values, frame.index, dtype=_dtype(form))
    for column in REQUIRED:
        _check_filled(valid, column, np.ones(len(valid), np.bool_), "every row needs it", where, row)
    _check_kinds(valid, frame, where, row)
    _check_one_device(valid, where, row)
    _check_duplicates(valid, where, row)
    valid = valid.reset_index(drop=True)
    valid.attrs = dict(frame.attrs)
    return valid


def _check_range(
    frame: pd.DataFrame, column: str, values: NDArray[np.float64], form: Form, where: str, row: str
) -> None:
    zero = form.endswith("from 0")
    least = "from 0" if zero else "above 0"
    wrong = ~np.isnan(values) & ~(np.isfinite(values) & ((values >= 0) if zero else (values > 0)))
    reject(frame, column, wrong, f"must be a finite number {least}", where, row)
    if form.startswith("whole"):
        with np.errstate(invalid="ignore"):
            wrong = ~np.isnan(values) & ((values != np.floor(values)) | (values > MAX_WHOLE))
        reject(frame, column, wrong, f"must be a whole number {least}, at most 2**53", where, row)


def _check_filled(
    valid: pd.DataFrame, column: str, needed: NDArray[np.bool_], reason: str, where: str, row: str
) -> None:
    missing = needed & valid[column].isna().to_numpy()
    if missing.any():
        first = int(np.argmax(missing))
        more = f" (and {int(missing.sum()) - 1} more rows)" if missing.sum() > 1 else ""
        raise InputError(f"{where} {row} {valid.index[first]}, column {column!r} is empty: {reason}{more}")


def _check_kinds(valid: pd.DataFrame, frame: pd.DataFrame, where: str, row: str) -> None:
    kinds = valid["kind"].to_numpy(object)
    needed = needs()
    foreign = ~valid["kind"].isin(list(needed)).to_numpy(np.bool_)
    if foreign.any():
        first = int(np.argmax(foreign))
        raise unknown(f"kind in {where} {row} {valid.index[first]}", str(kinds[first]), needed)
    for kind, own in needed.items():
        rows = np.asarray(kinds == kind, np.bool_)
        reason = f"a row of kind {kind} needs {', '.join(own)}"
        for column in own if rows.any() else ():
            if column not in frame:
                raise InputError(f"{where} has no column {column!r}: {reason}")
            _check_filled(valid, column, rows, reason, where, row)


def _check_one_device(valid: pd.DataFrame, where: str, row: str) -> None:
    other = (valid["device"] != valid["device"].iloc[0]).to_numpy(np.bool_)
    if other.any():
        first = int(np.argmax(other))
        raise InputError(
            f"{where} {row} {valid.index[first]}, column 'device': {valid['device'].iloc[first]} is not the "
            f"{valid['device'].iloc[0]} of the rows before: give each device a table of its own"
        )


def _check_duplicates(valid: pd.DataFrame, where: str, row: str) -> None:
    group = valid.groupby(key(), dropna=False, sort=False).ngroup()
    again = group.duplicated().to_numpy()
    if again.any():
        first = int(np.argmax(again))
        original = int(np.argmax((group == group.iloc[first]).to_numpy()))
        more = f" (and {int(again.sum()) - 1} more rows)" if again.sum() > 1 else ""
        raise InputError(
            f"{where} {row} {valid.index[first]} measures the same as {row} {valid.index[original]} "
            f"({valid['operator'].iloc[first]}, {valid['kind'].iloc[first]}){more}: combine them, or tell them "
            "apart by kernel, software or source"
        )
