"""What a run's batches and requests were like, derived from its tables once it is over.

Beside the latencies, Sarathi-Serve's and Vidur's metrics stores record how long a request is executed and how long it
is held up, the time between batches, and how large batches are. The tables of a `Recorder` have all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.results.metrics import Gaps, statistics
from engine.results.recorder import Recorder
from engine.results.tables import Array, Columns

PERCENTILES = (50.0, 90.0, 99.0)
_COLUMNS = ["replica", "stage", "start_s", "duration_s", "num_tokens", "num_decodes", "num_prefills"]
MOST_BATCHES = 2_000_000  # of a run, beyond which its iterations are not read back at once: they take 100 MiB a million
_NEAR_S = 1e-6  # a token comes at the end of its batch, but for rounding
_ROUNDING_S = 1e-9  # what sums of a request's batches are off by at most


def batch_metrics(recorder: Recorder, requests: Columns) -> dict[str, Any]:
    """Return the keys of a summary that are about batches; call after `recorder.close`, before its gaps are sorted.

    `execution_time` (ms): of each request, the time of the batches that it was in: those that ended its output tokens
    after the first, and those with prompts from its first scheduling to its first token (of several prompts in flight
    all of these count). `preemption_time`: the rest from its first scheduling to its last token, in which others ran or
    it was recomputed. Both need the exact gaps between tokens. `batches`: requests and tokens of each, with histograms
    by powers of two (`upto`: the counts of batches with at most 1, 2, 4, ...), and the time (ms) from the end of one on
    the first stage to the beginning of the next. Empty for a run of more than `MOST_BATCHES`.
    """
    if recorder.num_batches > MOST_BATCHES:
        return {}
    blocks = list(recorder.read_iterations(_COLUMNS))
    if not blocks:
        return {}
    rows = {name: np.concatenate([block[name] for block in blocks]) for name in _COLUMNS}
    first = rows["stage"] == 0
    sizes = (rows["num_decodes"] + rows["num_prefills"])[first]
    tokens = rows["num_tokens"][first]
    found: dict[str, Any] = {
        "batches": {
            "requests": _described(sizes),
            "tokens": _described(tokens),
            "between_ms": statistics(1e3 * _between({name: rows[name][first] for name in _COLUMNS}), PERCENTILES),
        }
    }
    times = execution_times(requests, recorder.gaps, rows)
    if times is not None:
        for name, seconds in zip(("execution_time", "preemption_time"), times, strict=True):
            found |= {f"{'median' if key == 'p50' else key}_{name}_ms": 1e3 * value
                      for key, value in statistics(seconds, (*PERCENTILES, 95.0, 99.9)).items()}  # fmt: skip
    return found


def _described(counts: Array) -> dict[str, Any]:
    most = int(np.ceil(np.log2(max(1, counts.max())))) if len(counts) else 0
    edges = [1 << i for i in range(most + 1)]
    histogram = np.bincount(np.searchsorted(edges, counts), minlength=len(edges))
    upto = {str(edge): int(count) for edge, count in zip(edges, histogram, strict=True)}
    return {**statistics(counts, PERCENTILES), "upto": upto}


def _between(rows: Mapping[str, Array]) -> Array:
    """Return the seconds from the end of each batch to the beginning of the next of its replica."""
    order = np.lexsort((rows["start_s"], rows["replica"]))
    starts, replicas = rows["start_s"][order], rows["replica"][order]
    ends = starts + rows["duration_s"][order]
    same = replicas[1:] == replicas[:-1]
    return np.asarray(np.maximum(0.0, (starts[1:] - ends[:-1])[same]))


def execution_times(requests: Columns, gaps: Gaps, rows: Mapping[str, Array]) -> tuple[Array, Array] | None:
    """Return the execution and the preemption time (s) of each request; None where they can't be derived.

    `rows` are the iterations of all stages. None without exact gaps, or where requests were seen from outside.
    """
    if not requests or np.isnan(requests["scheduled_s"]).any():
        return None
    count = requests["output_tokens"].astype(np.int64) - 1
    every = gaps.of(np.ones(len(count), dtype=bool), count)
    if every is None:
        return None
    whole = requests["last_token_s"] - requests["scheduled_s"]
    executed = np.zeros(len(count))
    which = np.repeat(np.arange(len(count)), count)
    total = np.cumsum(every)
    last = np.cumsum(count) - 1  # of each request, the place of its last gap
    token_times = requests["last_token_s"][which] - (total[last[which]] - total)
    for replica in np.unique(requests["replica"]).tolist():
        starts, ends, seconds, prompts = _batches(rows, replica)
        mine = requests["replica"] == replica
        done = np.concatenate([[0.0], np.cumsum(seconds * prompts)])
        begun = np.searchsorted(starts, requests["scheduled_s"][mine] - _NEAR_S)
        ended = np.searchsorted(ends, requests["first_token_s"][mine] + _NEAR_S)
        executed[mine] = np.maximum(0.0, done[np.maximum(begun, ended)] - done[begun])
        here = mine[which]
        batch = np.maximum(0, np.searchsorted(ends, token_times[here] + _NEAR_S) - 1)
        executed += np.bincount(which[here], seconds[batch], minlength=len(count))
    executed = np.minimum(executed, whole)
    preempted = whole - executed
    return executed, np.where(preempted < _ROUNDING_S, 0.0, preempted)


def _batches(rows: Mapping[str, Array], replica: int) -> tuple[Array, Array, Array, Array]:
    """Return a replica's batches in order: start on the first stage, end on the last, seconds of work, any prompts."""
    of_stage = []
    for stage in np.unique(rows["stage"][rows["replica"] == replica]).tolist():
        place = np.flatnonzero((rows["replica"] == replica) & (rows["stage"] == stage))
        of_stage.append(place[np.argsort(rows["start_s"][place], kind="stable")])
    count = min(map(len, of_stage))  # what was in flight when a run was ended early may not be on every stage
    of_stage = [place[:count] for place in of_stage]
    first, final = of_stage[0], of_stage[-1]
    seconds = np.sum([rows["duration_s"][place] for place in of_stage], axis=0)
    ends = rows["start_s"][final] + rows["duration_s"][final]
    return rows["start_s"][first], ends, seconds, rows["num_prefills"][first] > 0
