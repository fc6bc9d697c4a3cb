"""What a batch's time is spent on: linear layers, attention, communication and the rest, as the predictor has them.

The operators that depend on rows alone are asked one by one; attention is what is left of the batch's time without the
host's.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np

from engine.errors import InputError
from engine.results.tables import Array
from engine.scheduling.request import BatchShape
from engine.specs import HostOverhead
from engine.specs.device_folder import folder_of
from simulator.cluster import Deployment
from simulator.predictor import calibration
from simulator.predictor.base import RuntimePredictor
from simulator.predictor.learned import learned
from simulator.predictor.roofline import Roofline
from simulator.predictor.tables import TableMaker
from studies.published.placebo import CONTEXT, Shuffled

FAMILIES = ("linear", "communication")
_load = cache(calibration.load)


def split(deployment: Deployment, prompt: int, batch: int, context: int) -> dict[str, float]:
    """Return seconds by kind of operator of a whole prompt (tokens; 0: none) and `batch` decodes of `context` tokens.

    `linear_per_token` is the linear layers' time over the batch's tokens; `host` is what the host adds. Raises
    InputError for a pipeline or a device without a calibration.
    """
    if deployment.parallel.pipeline_parallel_size > 1:
        raise InputError(f"operators of {deployment.model.name}: give no pipeline stages")
    shape, predictor = batch_shape(prompt, batch, context), deployment.predictor
    if isinstance(predictor, Shuffled):  # the kinds of the batch whose time it has
        dealt = predictor.dealt(shape)
        of = (0, dealt.num_decodes, CONTEXT) if dealt.num_decodes else (dealt.num_tokens, 0, CONTEXT)
        found = split(replace(deployment, predictor=predictor.predictor), *of)
        return {**found, "linear_per_token": found["linear"] / shape.num_tokens}
    gpu, families = _roofline(predictor, shape) if isinstance(predictor, Roofline) else _learned(deployment, shape)
    rows_alone = shape._replace(num_decodes=0, decode_kv_tokens=0, prefills=())
    whole = predictor.stage_time(shape, 0)
    total, by_rows = gpu.stage_time(shape, 0), gpu.stage_time(rows_alone, 0)
    linear, communication = families["linear"], families["communication"]
    return {
        "linear": linear,
        "attention": total - by_rows,
        "communication": communication,
        "other": max(0.0, by_rows - linear - communication),
        "host": whole - total,
        "total": whole,
        "linear_per_token": linear / shape.num_tokens,
    }


def _learned(deployment: Deployment, shape: BatchShape) -> tuple[RuntimePredictor, dict[str, float]]:
    """Return the calibration's times without a host's, and those of the batch's linear layers and collectives."""
    model, device, network, parallel = deployment.model, deployment.device, deployment.network, deployment.parallel
    folder, overhead = folder_of(device), deployment.host
    if folder is None or overhead is None:
        raise InputError(f"operators of {model.name} on {device.name}: give a calibrated device")
    kernels = overhead.attention_kernel, overhead.kernels
    maker = TableMaker(_load(folder, device), model, device, network, parallel, *kernels)
    families = dict.fromkeys(FAMILIES, 0.0)
    for op, kind in maker.sorted[0].rows:
        if kind.family in families:
            families[kind.family] += float(maker.by_rows(op, 0, _rows(op.rows, shape))[0])
    return learned(model, device, network, parallel, _without_times(overhead)), families


def _roofline(predictor: Roofline, shape: BatchShape) -> tuple[RuntimePredictor, dict[str, float]]:
    """Return the same of a data sheet's times."""
    stage = predictor.stages[0]
    families = dict.fromkeys(FAMILIES, 0.0)
    for op, kind in stage.operators.rows:
        if kind.family in families:
            seconds = kind.roofline(op, stage.site, _rows(op.rows, shape))
            families[kind.family] += stage.factor(op, kind) * float(seconds[0])
    return predictor.for_host(_without_times(stage.host)), families


def _rows(rows: str, shape: BatchShape) -> Array:
    return np.array([shape.num_tokens if rows == "tokens" else shape.num_sampled])


def _without_times(host: HostOverhead) -> HostOverhead:
    return replace(host, iteration_s=0.0, sequence_s=0.0, layer_s=0.0, message_s=0.0)


def batch_shape(prompt: int, batch: int, context: int) -> BatchShape:
    """Return the batch of a whole prompt (tokens; 0: none) and `batch` decodes of `context` tokens each."""
    prefills = ((prompt, 0),) if prompt else ()
    return BatchShape(prompt + batch, batch, batch * context, prefills, batch + len(prefills), 0)
