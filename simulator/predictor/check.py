"""Checks a calibration on whole iterations of the engine, which its operators were not learned from.

A profile's folder has them. What the host adds to an iteration was learned from their batches' sizes, nothing else.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import InputError
from engine.specs import DeviceSpec, ModelSpec, ParallelSpec, catalog
from engine.specs.checks import MOST_SECONDS, build
from engine.specs.device_folder import PROFILE_FILE, measured_host, profile_settings
from profiler.iterations import COLUMNS, shape_of
from profiler.session import ITERATIONS
from simulator.predictor.calibration_errors import errors
from simulator.predictor.learned import learned

MOST_TOKENS = 1 << 40  # of a batch


def profiled_device(folder: Path) -> DeviceSpec:
    """The device that a profile is of."""
    return build(
        DeviceSpec, profile_settings(folder)["provenance"]["device_spec"], f"{folder / PROFILE_FILE}: device_spec"
    )


def profiled_models(folder: Path) -> dict[str, ModelSpec]:
    """The models of a profile, by name."""
    identity = profile_settings(folder)["identity"]
    models = {}
    for name, shape in zip(identity["models"], identity["shapes"], strict=True):
        values = {key: value for key, value in shape.items() if key != "dtype_bytes"}  # of identity["dtype"]
        model = build(ModelSpec, {**values, "name": name}, f"{folder / PROFILE_FILE}: shape of {name}")
        models[name] = model.in_dtype(identity["dtype"])
    return models


def read_iterations(folder: Path) -> list[dict[str, str]]:
    """Return the iterations in a profile's folder; none if it has none. Raises InputError for a damaged file."""
    path = folder / ITERATIONS
    if not path.is_file():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if reader.fieldnames is None or set(reader.fieldnames) != set(COLUMNS):
                raise ValueError(f"its columns are not {', '.join(COLUMNS)}")
            rows = list(reader)
            for row in rows:
                shape = shape_of(row)
                sizes = (shape.num_tokens, shape.num_decodes, shape.decode_kv_tokens, *sum(shape.prefills, ()))
                if not all(0 <= size < MOST_TOKENS for size in sizes) or not shape.num_tokens:
                    raise ValueError(f"line {reader.line_num}: a batch of {shape.num_tokens} tokens")
                if not 0 < float(row["duration_ms"]) < 1e3 * MOST_SECONDS:
                    raise ValueError(f"line {reader.line_num}: duration_ms {row['duration_ms']!r}")
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise InputError(f"{path} holds no iterations ({error}): profile again, or remove the file") from None
    return rows


def check_iterations(device: DeviceSpec, folder: Path) -> dict[str, dict[str, Any]]:
    """Errors of predicted durations of the iterations in a profile's folder, by model; none if it has no iterations."""
    rows = read_iterations(folder)
    if not rows:
        return {}
    network = catalog.network(device.network)
    host = measured_host(device)
    if host is None:
        raise InputError(f"the calibration in {device.calibration} has no host overhead: fit it to a whole profile")
    result = {}
    for name, model in profiled_models(folder).items():
        mine = [row for row in rows if row["model"] == name]
        if mine:
            predictor = learned(model, device, network, ParallelSpec(), host)
            predicted = np.array([predictor.stage_time(shape_of(row), 0) for row in mine])
            measured = np.array([float(row["duration_ms"]) / 1e3 for row in mine])
            result[name] = errors(measured, predicted)
    return result
