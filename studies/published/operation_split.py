"""What a batch's time is spent on: linear layers, attention, communication and the rest, as the calibration has them.

The operators that depend on rows alone are asked one by one; attention is what is left of the batch's time without the
host's.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from engine.errors import InputError
from engine.scheduling.request import BatchShape
from engine.specs import DeviceSpec
from engine.specs.device_folder import folder_of
from simulator.cluster import Deployment
from simulator.predictor.calibration import Calibration, load
from simulator.predictor.learned import learned
from simulator.predictor.tables import TableMaker


def split(deployment: Deployment, prompt: int, batch: int, context: int) -> dict[str, float]:
    """Return seconds by kind of operator of a whole prompt (tokens; 0: none) and `batch` decodes of `context` tokens.

    `linear_per_token` is the linear layers' time over the batch's tokens; `host` is what the host adds. Raises
    InputError for a pipeline or a device without a calibration.
    """
    model, device, network, parallel = deployment.model, deployment.device, deployment.network, deployment.parallel
    folder, overhead = folder_of(device), deployment.host
    if folder is None or overhead is None or parallel.pipeline_parallel_size > 1:
        raise InputError(f"operators of {model.name} on {device.name}: give a calibrated device and no pipeline stages")
    none = replace(overhead, iteration_s=0.0, sequence_s=0.0, layer_s=0.0, message_s=0.0)
    shape = batch_shape(prompt, batch, context)
    tokens, sampled = shape.num_tokens, shape.num_sampled
    rows_alone = shape._replace(num_decodes=0, decode_kv_tokens=0, prefills=())
    gpu = learned(model, device, network, parallel, none)
    whole = deployment.predictor.stage_time(shape, 0)
    total, by_rows = gpu.stage_time(shape, 0), gpu.stage_time(rows_alone, 0)
    maker = TableMaker(
        _calibration(folder, device), model, device, network, parallel, overhead.attention_kernel, overhead.kernels
    )
    families = dict.fromkeys(("linear", "communication"), 0.0)
    for op, kind in maker.sorted[0].rows:
        if kind.family in families:
            families[kind.family] += float(
                maker.by_rows(op, 0, np.array([tokens if op.rows == "tokens" else sampled]))[0]
            )
    linear, communication = families["linear"], families["communication"]
    return {
        "linear": linear,
        "attention": total - by_rows,
        "communication": communication,
        "other": max(0.0, by_rows - linear - communication),
        "host": whole - total,
        "total": whole,
        "linear_per_token": linear / tokens,
    }


def batch_shape(prompt: int, batch: int, context: int) -> BatchShape:
    """Return the batch of a whole prompt (tokens; 0: none) and `batch` decodes of `context` tokens each."""
    prefills = ((prompt, 0),) if prompt else ()
    return BatchShape(prompt + batch, batch, batch * context, prefills, batch + len(prefills), 0)


@cache
def _calibration(folder: Path, device: DeviceSpec) -> Calibration:
    return load(folder, device)
