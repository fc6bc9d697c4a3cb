"""Between numpy columns and Arrow tables, without a copy.

pyarrow's own conversions import pandas first, which takes longer than a small simulation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pathlib import Path

    import pyarrow as pa  # at run time only where a table is made or read: an engine can do without
    import pyarrow.parquet as pq

Array = NDArray[Any]
Columns = dict[str, Array]


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a Parquet file that is read in parts: by default pyarrow fetches all of it before the first part."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(path, pre_buffer=False)


def to_arrow(columns: Columns) -> pa.Table:
    """A table of numbers and truth values; `columns` are one-dimensional and equally long."""
    import pyarrow as pa

    arrays = []
    for values in columns.values():
        data = np.packbits(values, bitorder="little") if values.dtype == bool else np.ascontiguousarray(values)
        arrays.append(pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(data)]))
    return pa.Table.from_arrays(arrays, list(columns))


def to_numpy(table: pa.Table) -> Columns:
    """The columns of a table of numbers and truth values that has no nulls."""
    table = table.combine_chunks()
    return {
        name: _values(column.chunk(0)) if column.num_chunks else _empty(column)
        for name, column in zip(table.column_names, table.columns, strict=True)
    }


def _empty(column: pa.ChunkedArray) -> Array:
    return np.empty(0, dtype=column.type.to_pandas_dtype())


def _values(array: pa.Array) -> Array:
    import pyarrow as pa

    end = array.offset + len(array)
    if pa.types.is_boolean(array.type):
        bits = np.frombuffer(array.buffers()[1], np.uint8)
        return np.unpackbits(bits, count=end, bitorder="little")[array.offset :].astype(bool)
    return np.frombuffer(array.buffers()[1], array.type.to_pandas_dtype(), count=end)[array.offset :]
