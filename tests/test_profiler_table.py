"""The calibration table: what is written is read again, and what is wrong is named by file, row and column."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from engine.errors import InputError
from profiler import table

COMMON = {"device": "a40", "source": "a test", "dtype": "float16"}
HEADS = {"num_heads": 32, "num_kv_heads": 4, "head_dim": 128}
MESSAGE = {"num_bytes": 2**29, "num_ranks": 8, "ranks_per_node": 8, "network": "pcie"}
ROWS = [
    {"operator": "qkv_proj", "kind": "gemm", "m": 1, "k": 4096, "n": 6144, "time_ms": 0.1 + 0.2, "model": "org/a, b"},
    {"operator": "rotary", "kind": "elementwise", "rows": 8, "bytes_per_row": 16384, "time_ms": 1e-3, "repeats": 20},
    {"kind": "attention_prefill", "batch_size": 1, "chunk": 512, "prefix": 0, "time_ms": 0.147, **HEADS},
    {"kind": "attention_decode", "batch_size": 8, "kv_tokens": 8192, "time_ms": 1 / 3, "spread_ms": 0.0, **HEADS},
    {"kind": "all_reduce", "time_ms": 4.3, "kernel": 'a "kernel"', **MESSAGE},
    {"kind": "send", "time_ms": 4.3, "date": "2026-01-31", **MESSAGE},
    *({"kind": kind, "time_ms": 4.3, **MESSAGE} for kind in ("all_gather", "reduce_scatter", "all_to_all")),
    {
        "operator": "experts",
        "kind": "moe",
        "expert_tokens": 64,
        "hidden_size": 2048,
        "expert_width": 768,
        "local_experts": 32,
        "num_experts": 128,
        "top_k": 8,
        "expert_load": "balanced",
        "time_ms": 0.1,
    },
    {"operator": "schedule", "kind": "host", "batch_size": 8, "tensor_parallel_size": 2, "time_ms": 0.04},
]


def frame(*rows: dict[str, object]) -> pd.DataFrame:
    return pd.DataFrame([COMMON | {"operator": row["kind"]} | row for row in rows or ROWS])


def gemm(**changes: object) -> dict[str, object]:
    return ROWS[0] | changes


@pytest.mark.parametrize("name", ["table.csv", "table.parquet"])
def test_a_table_is_read_as_it_was_written(tmp_path: Path, name: str) -> None:
    valid = table.validate(frame(), "a table")
    assert list(valid.columns) == list(table.columns())
    assert set(valid["kind"]) == set(table.needs())
    table.write(valid, tmp_path / name)
    again = table.read(tmp_path / name)
    assert_frame_equal(valid, again, check_exact=True)
    assert again["time_ms"][0] == 0.1 + 0.2
    assert again["prefix"][2] == 0 and pd.isna(again["prefix"][0])
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_times_survive_to_the_last_bit(tmp_path: Path) -> None:
    times = np.random.default_rng(0).lognormal(-3, 4, 2000)
    rows = [gemm(m=m + 1, time_ms=time) for m, time in enumerate(times)]
    table.write(frame(*rows), tmp_path / "table.csv")
    assert (table.read(tmp_path / "table.csv")["time_ms"].to_numpy() == times).all()


def test_the_notes_of_an_import_travel_with_a_parquet_file(tmp_path: Path) -> None:
    rows = frame()
    rows.attrs["notes"] = ["3 times of 0 left out"]
    table.write(rows, tmp_path / "table.parquet")
    assert table.read(tmp_path / "table.parquet").attrs == rows.attrs


def test_lines_are_those_of_an_editor(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(
        "operator,kind,m,k,n,time_ms,device,source\n"
        "gemm,gemm,1,2,3,0.5,a40,test\n"
        "\n"
        "gemm,gemm,2,2,3,abc,a40,test\n"
    )  # fmt: skip
    with pytest.raises(InputError, match=r"table\.csv line 4, column 'time_ms': abc is not a number$"):
        table.read(path)


WRONG = {
    "no time": (gemm(time_ms=np.nan), "row 1, column 'time_ms' is empty: every row needs it"),
    "time zero": (gemm(time_ms=0.0), "row 1, column 'time_ms': 0.0 must be a finite number above 0"),
    "time negative": (gemm(time_ms=-0.1), "row 1, column 'time_ms': -0.1 must be a finite number above 0"),
    "time infinite": (gemm(time_ms=np.inf), "row 1, column 'time_ms': inf must be a finite number above 0"),
    "spread negative": (gemm(spread_ms=-1.0), "row 1, column 'spread_ms': -1.0 must be a finite number from 0"),
    "text": (gemm(m="many"), "row 1, column 'm': many is not a number"),
    "not a number": (gemm(m="nan"), "row 1, column 'm': nan is not a number"),
    "part of a token": (gemm(m=1.5), "row 1, column 'm': 1.5 must be a whole number above 0"),
    "size zero": (gemm(k=0), "row 1, column 'k': 0 must be a finite number above 0"),
    "too large": (gemm(k=2.0**54), "row 1, column 'k': 1.8014398509481984e+16 must be a whole number"),
    "kind": (gemm(kind="gem"), "unknown kind in a table row 1 'gem': did you mean 'gemm'?"),
    "no kind": (gemm(kind=None), "row 1, column 'kind' is empty"),
    "no operator": (gemm(operator=""), "row 1, column 'operator' is empty"),
    "no shape": (gemm(n=None), "row 1, column 'n' is empty: a row of kind gemm needs m, k, n"),
    "no network": (ROWS[4] | {"network": ""}, "row 1, column 'network' is empty: a row of kind all_reduce needs"),
    "other device": (gemm(device="a100"), "row 1, column 'device': a100 is not the a40 of the rows before"),
    "no device": (gemm(device=None), "row 1, column 'device' is empty"),
    "duplicate": (gemm(m=8, time_ms=9.0), "row 1 measures the same as row 0 (qkv_proj, gemm): combine them"),
}


@pytest.mark.parametrize(("row", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_row_is_named(row: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        table.validate(frame(gemm(m=8), row, gemm(m=9)), "a table")


@pytest.mark.parametrize("name", ["table.csv", "table.parquet"])
def test_a_wrong_file_is_named_and_a_wrong_table_is_not_written(tmp_path: Path, name: str) -> None:
    wrong = frame(gemm(), gemm(m=2, time_ms=-1.0), gemm(m=3, time_ms=-1.0))
    path = tmp_path / name
    wrong.to_csv(path, index=False) if name.endswith("csv") else wrong.to_parquet(path)
    place = "line 3" if name.endswith("csv") else "row 1"
    with pytest.raises(InputError, match=rf"{re.escape(str(path))} {place}, column 'time_ms': .* \(and 1 more rows\)"):
        table.read(path)
    with pytest.raises(InputError, match="must be a finite number above 0"):
        table.write(wrong, tmp_path / f"new_{name}")
    assert not (tmp_path / f"new_{name}").exists()


def test_rows_that_differ_in_how_they_were_measured_are_no_duplicates() -> None:
    differing = [{"backend": "b"}, {"kernel": "k"}, {"source": "s"}, {"model": "m"}, {"tensor_parallel_size": 2}]
    rows = [gemm(), *(gemm(**changes) for changes in differing)]
    assert len(table.validate(frame(*rows), "a table")) == 6
    with pytest.raises(InputError, match="row 6 measures the same as row 0"):
        table.validate(frame(*rows, gemm(repeats=3, date="2026-01-31", spread_ms=1.0)), "a table")


def test_columns_that_are_missing_unknown_or_repeated() -> None:
    with pytest.raises(InputError, match="a table has no column 'device'"):
        table.validate(frame().drop(columns="device"), "a table")
    with pytest.raises(InputError, match="a table has no column 'k': a row of kind gemm needs m, k, n"):
        table.validate(frame().drop(columns="k"), "a table")
    with pytest.raises(InputError, match="unknown column in a table 'time': did you mean 'time_ms'"):
        table.validate(frame().rename(columns={"time_ms": "time"}), "a table")
    with pytest.raises(InputError, match="a table has the column 'm' twice"):
        table.validate(pd.concat([frame(), frame()[["m"]]], axis=1), "a table")
    with pytest.raises(InputError, match="a table holds no rows"):
        table.validate(frame()[:0], "a table")


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    whole = tmp_path / "whole.parquet"
    table.write(frame(), whole)
    cases = {
        "cut.parquet": (whole.read_bytes()[:-100], "is no Parquet table, or a part of one"),
        "garbage.parquet": (b"\x00\xff" * 100, "is no Parquet table, or a part of one"),
        "empty.parquet": (b"", "is no Parquet table, or a part of one"),
        "garbage.csv": (b"\x89PNG\xff\xfe" * 20, "is no CSV table"),
        "empty.csv": (b"", "is empty: give a CSV table with a header"),
        "header.csv": (b"operator,kind,time_ms,device,source\n", "holds no rows"),
        "cut.csv": (
            b"operator,kind,m,k,n,time_ms,device,source\ngemm,gemm,1,2,3,0.5,a40,test\ngemm,gemm,2,2",
            "line 3, column 'time_ms' is empty",
        ),
        "wide.csv": (b"operator,kind\na,gemm\na,gemm,3,4\n", "is no CSV table: Expected 2 fields in line 3, saw 4"),
        "wide2.csv": (b"operator,kind\na,gemm,3,4\n", "is no table: line 2 has more values than line 1 has columns"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=re.escape(message)) as error:
            table.read(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)
    for name in ("absent.csv", "absent.parquet"):
        with pytest.raises(InputError, match=rf"can.t read .*{name}: (there is no such|No such) file"):
            table.read(tmp_path / name)
    with pytest.raises(InputError, match=r"name a file that ends in \.parquet or \.csv"):
        table.write(frame(), tmp_path / "table.xlsx")
    with pytest.raises(InputError, match=r"can.t write .*(No such file|non-existent)"):
        table.write(frame(), tmp_path / "absent" / "table.csv")


def test_the_schema_is_imported_without_pandas() -> None:
    code = "import sys, profiler.table; print([name for name in ('pandas', 'pyarrow', 'torch') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
