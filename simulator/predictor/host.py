"""Fits a host overhead to measured host times (rows of kind `host` of a calibration table).

What an iteration adds to the GPU's time is linear in the batch: each component an engine reports is a constant and a
share for each sequence; the message to the workers is a constant that only replicas of several ranks pay. No
coefficient may be negative, and outliers weigh less (Huber 1964).

Launching is harder to see. Where the time of launching was measured (`model_execution_launch`) it is that of one rank,
since with more of them it includes waiting for each other. Otherwise the shortest `model_execution` bounds it from
above: that contains the GPU's work too.

    python -c "from pathlib import Path; from profiler.importers import vidur; from simulator.predictor import host;
    print(host.fit(vidur.read(Path('cpu_overheads/a40.csv'), 'a40'), layers=1))"
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from engine.errors import InputError
from engine.results.tables import Array
from engine.specs import HostOverhead, catalog

if TYPE_CHECKING:
    import pandas as pd

OWN = ("schedule", "prepare_inputs", "sampler", "process_outputs")  # the engine's own work
MESSAGE = "ray_comm"
OVERHEAD, LAYER_LAUNCH = "iteration_overhead", "layer_launch"  # of our own profiles
LAUNCH, EXECUTION = "model_execution_launch", "model_execution"
_SHAPE = ["model", "tensor_parallel_size", "batch_size"]


@dataclass(frozen=True)
class HostFit:
    """A fitted overhead, and how far its added time is off what the fit has not seen.

    `held_out_error` is the mean of |predicted - measured| / measured, with each `held_out` in turn left out of the
    fit. `launch` says what layer_s is: measured, or no more than an upper bound.
    """

    overhead: HostOverhead
    held_out: Literal["model", "batch size"]
    held_out_error: float
    launch: Literal["measured", "upper bound", "not measured"]
    iterations: int  # combinations of model, ranks and batch size that were fitted


def fit(frame: pd.DataFrame, *, name: str = "fitted", layers: int | None = None) -> HostFit:
    """The overhead of the host rows of a calibration table.

    Args:
        frame: the table; rows of other kinds are left out.
        name: of the overhead.
        layers: how many layers the measured models were cut to; None where they ran whole.

    Raises:
        InputError: a component is missing, or all rows are of one batch size.
    """
    rows = _wide(frame)
    batches = rows["batch_size"].nunique()
    if batches < 2:
        raise InputError("the host rows are of one batch size: a cost per sequence needs two or more")
    layer_s, launch = _launch(rows, layers)
    held_out: Literal["model", "batch size"] = "model" if rows["model"].nunique() > 1 else "batch size"
    if held_out == "batch size" and batches < 3:
        raise InputError("the host rows are of one model at two batch sizes: to judge a fit it takes a third")
    column = "model" if held_out == "model" else "batch_size"
    errors = []
    for value in rows[column].unique():
        seen, unseen = rows[rows[column] != value], rows[rows[column] == value]
        iteration_s, sequence_s, message_s = _added(seen)
        trial = HostOverhead(
            name=name,
            layer_s=layer_s,
            source="held out",
            iteration_s=iteration_s,
            sequence_s=sequence_s,
            message_s=message_s,
        )
        measured = unseen[[*OWN, MESSAGE]].sum(axis=1).to_numpy(np.float64)
        shapes = zip(unseen["batch_size"], unseen["tensor_parallel_size"], strict=True)
        predicted = np.array([1e3 * trial.times(0, int(batch), int(ranks))[1] for batch, ranks in shapes])
        errors.extend(np.abs(predicted / measured - 1))
    source = "; ".join(sorted(set(frame.loc[frame["kind"] == "host", "source"].dropna())))
    iteration_s, sequence_s, message_s = _added(rows)
    overhead = HostOverhead(
        name=name,
        layer_s=layer_s,
        iteration_s=iteration_s,
        sequence_s=sequence_s,
        message_s=message_s,
        source=f"fitted to {source}",
    )
    return HostFit(overhead, held_out, float(np.mean(errors)), launch, len(rows))


def fit_overhead(frame: pd.DataFrame, *, name: str = "measured") -> HostFit:
    """The overhead of a profile: what whole iterations took beyond the ranks' own time, by their sequences.

    Raises:
        InputError: there are no such rows, or of fewer than three batch sizes.
    """
    rows = frame[(frame["kind"] == "host") & (frame["operator"] == OVERHEAD)]
    if len(rows) < 3:
        raise InputError(
            f"the table has {len(rows)} rows of {OVERHEAD}: profile iterations of three batch sizes or more"
        )
    batch, measured = rows["batch_size"].to_numpy(np.float64), rows["time_ms"].to_numpy(np.float64)
    x = np.column_stack([np.ones(len(rows)), batch])
    errors = []
    for size in np.unique(batch):
        out = batch == size
        errors.extend(np.abs(x[out] @ _least(x[~out], measured[~out]) / measured[out] - 1))
    iteration_ms, sequence_ms = _least(x, measured)
    launch = frame[(frame["kind"] == "host") & (frame["operator"] == LAYER_LAUNCH)]
    overhead = HostOverhead(
        name=name,
        layer_s=1e-3 * float(launch["time_ms"].median()) if len(launch) else 0.0,
        iteration_s=1e-3 * float(iteration_ms),
        sequence_s=1e-3 * float(sequence_ms),
        graph_decodes=int(frame.attrs.get("graph_decodes", 0)),
        source="; ".join(sorted(set(rows["source"].dropna()))),
    )
    measured_launch: Literal["measured", "not measured"] = "measured" if len(launch) else "not measured"
    return HostFit(overhead, "batch size", float(np.mean(errors)), measured_launch, len(rows))


def _wide(frame: pd.DataFrame) -> pd.DataFrame:
    """A row for each model, number of ranks and batch size, a column (ms) for each component."""
    rows = frame[frame["kind"] == "host"]
    components = set(rows["operator"])
    if missing := [component for component in (*OWN, MESSAGE) if component not in components]:
        raise InputError(
            f"the table has no host rows of {', '.join(missing)}: a fit needs {', '.join((*OWN, MESSAGE))}"
        )
    if not components & {LAUNCH, EXECUTION}:
        raise InputError(
            f"the table has no host rows of {EXECUTION} or {LAUNCH}: one of them says what launching takes"
        )
    wide = rows.pivot_table(index=_SHAPE, columns="operator", values="time_ms", aggfunc="median").reset_index()
    return wide.dropna(subset=[*OWN, MESSAGE])


def _added(rows: pd.DataFrame) -> tuple[float, float, float]:
    """iteration_s, sequence_s, message_s (s); without rows of one rank, a message's constant is the message's alone."""
    batch = rows["batch_size"].to_numpy(np.float64)
    several = (rows["tensor_parallel_size"] > 1).to_numpy(np.float64)
    own = _least(np.column_stack([np.ones(len(rows)), batch]), rows[list(OWN)].sum(axis=1).to_numpy(np.float64))
    alone = np.ones(len(rows)) if not several.all() else np.zeros(len(rows))
    message = _least(np.column_stack([alone, batch, several]), rows[MESSAGE].to_numpy(np.float64))
    iteration_ms, sequence_ms, message_ms = own[0] + message[0], own[1] + message[1], message[2]
    return 1e-3 * float(iteration_ms), 1e-3 * float(sequence_ms), 1e-3 * float(message_ms)


def _launch(rows: pd.DataFrame, layers: int | None) -> tuple[float, Literal["measured", "upper bound"]]:
    """Seconds to launch a layer, and whether that was measured."""
    if layers is None:
        count = rows["model"].map({name: catalog.model(name).num_layers for name in rows["model"].unique()})
    else:
        count = rows["model"].map(dict.fromkeys(rows["model"].unique(), layers))
    if LAUNCH in rows:
        one = (rows["tensor_parallel_size"] == 1) & rows[LAUNCH].notna()
        if one.any():
            return float((rows[LAUNCH] / count)[one].median()) * 1e-3, "measured"
    bound = EXECUTION if EXECUTION in rows else LAUNCH
    return float((rows[bound] / count).min()) * 1e-3, "upper bound"


def _least(x: Array, y: Array) -> Array:
    """Non-negative coefficients (columns,) of y (rows,) = x (rows, columns) by Huber's loss, reweighted to its end."""
    from sklearn.linear_model import LinearRegression

    weights = np.ones(len(y))
    coefficients = np.zeros(x.shape[1])
    for _ in range(100):
        before = coefficients
        coefficients = LinearRegression(positive=True, fit_intercept=False).fit(x, y, sample_weight=weights).coef_
        if np.allclose(before, coefficients, rtol=1e-7, atol=1e-12):
            break
        off = np.abs(y - x @ coefficients)
        scale = 1.345 * 1.4826 * float(np.median(off))  # 95 % efficient for normal errors of that median
        weights = np.minimum(1.0, scale / np.maximum(off, 1e-12)) if scale > 0 else weights
    return np.asarray(coefficients)
