"""Checks a calibration on whole iterations of the engine, which its operators were not learned from.

A profile's folder has them. What the host adds to an iteration was learned from their batches' sizes, nothing else.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import InputError
from engine.specs import DeviceSpec, ExpertsSpec, ModelSpec, ParallelSpec, RopeScaling, catalog
from engine.specs.device_folder import measured_host, profile_settings
from profiler.iterations import shape_of
from profiler.session import ITERATIONS
from simulator.predictor.calibration_errors import errors
from simulator.predictor.learned import learned


def profiled_device(folder: Path) -> DeviceSpec:
    """The device that a profile is of."""
    return DeviceSpec(**profile_settings(folder)["provenance"]["device_spec"])


def profiled_models(folder: Path) -> dict[str, ModelSpec]:
    """The models of a profile, by name."""
    identity = profile_settings(folder)["identity"]
    models = {}
    for name, shape in zip(identity["models"], identity["shapes"], strict=True):
        scaling = shape.pop("rope_scaling")
        del shape["dtype_bytes"]  # of identity["dtype"]
        scaling = None if scaling is None else RopeScaling(**scaling)
        if experts := shape.pop("experts", None):
            shape["experts"] = ExpertsSpec(**{**experts, "dense_layers": tuple(experts["dense_layers"])})
        shape["full_attention_layers"] = tuple(shape.get("full_attention_layers", ()))
        models[name] = ModelSpec(**{**shape, "name": name, "rope_scaling": scaling}).in_dtype(identity["dtype"])
    return models


def check_iterations(device: DeviceSpec, folder: Path) -> dict[str, dict[str, Any]]:
    """Errors of predicted durations of the iterations in a profile's folder, by model; none if it has no iterations."""
    path = folder / ITERATIONS
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
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
