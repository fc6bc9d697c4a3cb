"""An excerpt of a run's batches, stage by stage: those around the longest gap between output tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from engine.results.tables import Array, Columns, open_parquet
from studies.pages.run_timeline import chunks

MOST_BATCHES = 160  # a stage
_COLUMNS = ["replica", "stage", "start_s", "duration_s", "num_tokens", "num_decodes", "num_prefills", "kv_blocks",
            "num_waiting", "max_tbt_s"]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Excerpt:
    """Batches of one replica, one row for each on each stage; times are seconds from the run's first arrival."""

    replica: int
    stages: int
    gap_s: float | None  # the longest between tokens, which these are around; None where no gap ended
    time_s: float  # when it ended, or of the first batch
    rows: Columns  # stage, start_s, duration_s, num_tokens, num_decodes, num_prefills, kv_blocks, num_waiting


def read_excerpt(path: Path, origin_s: float) -> Excerpt | None:
    """Return the batches around the longest gap between output tokens, or the first ones; None without a batch."""
    with open_parquet(path) as file:
        if not file.metadata.num_rows:
            return None
        gap, ended, replica = _longest(file)
        nearest: Columns = {}
        for chunk in chunks(file, _COLUMNS):
            mine = chunk["replica"] == replica
            if mine.any():
                parts = [nearest] * bool(nearest) + [{name: values[mine] for name, values in chunk.items()}]
                rows = {name: np.concatenate([part[name] for part in parts]) for name in chunk}
                nearest = _nearest(rows, ended)
    order = np.lexsort((nearest["stage"], nearest["start_s"]))
    rows = {name: values[order] for name, values in nearest.items() if name not in ("replica", "max_tbt_s")}
    rows["start_s"] = rows["start_s"] - origin_s
    return Excerpt(replica, int(rows["stage"].max()) + 1, gap, ended - origin_s, rows)


def _longest(file: pq.ParquetFile) -> tuple[float | None, float, int]:
    """Return the longest gap, when it ended and on which replica; without a gap when the first batch did."""
    best: tuple[float | None, float, int] = (None, 0.0, 0)
    for i, chunk in enumerate(chunks(file, ["replica", "start_s", "duration_s", "max_tbt_s"])):
        if i == 0:
            best = (None, float(chunk["start_s"][0]), int(chunk["replica"][0]))
        gaps = np.nan_to_num(chunk["max_tbt_s"])
        at = int(np.argmax(gaps))
        if gaps[at] > (best[0] or 0.0):
            best = (float(gaps[at]), float(chunk["start_s"][at] + chunk["duration_s"][at]), int(chunk["replica"][at]))
    return best


def _nearest(rows: Columns, time: float) -> Columns:
    """Keep of each stage the batches that are nearest to a time."""
    keep = np.zeros(len(rows["stage"]), dtype=bool)
    for stage in np.unique(rows["stage"]):
        mine = np.flatnonzero(rows["stage"] == stage)
        away: Array = np.abs(rows["start_s"][mine] + rows["duration_s"][mine] - time)
        keep[mine[np.argsort(away, kind="stable")[:MOST_BATCHES]]] = True
    return {name: values[keep] for name, values in rows.items()}
