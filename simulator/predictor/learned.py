"""The learned predictor: a stage's time as the sum of its operators' learned times, tabulated once per deployment.

`tables` makes the tables, `table_cache` keeps them, `lookup` looks a batch up in them. A stage takes the longer of that
sum and the host's time to launch its layers, and the host time that is not hidden on top.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from engine.errors import InputError
from engine.scheduling.request import BatchShape
from engine.specs import DeviceSpec, HostOverhead, ModelSpec, NetworkSpec, ParallelSpec
from engine.specs.device_folder import folder_of, known_devices
from simulator.predictor import calibration as store
from simulator.predictor import table_cache
from simulator.predictor.base import RuntimePredictor
from simulator.predictor.carried import carried
from simulator.predictor.kinds import check_kinds
from simulator.predictor.lookup import Limits, StageParts, StageTimes, at, stage_times
from simulator.predictor.tables import TableMaker
from simulator.predictor.uncertainty import KindError, errors_of


@dataclass(frozen=True)
class Known:
    """What is known of a deployment whatever its host: the times of its operators, and how far they may be off."""

    maker: TableMaker
    parts: list[StageParts]
    limits: Limits
    errors: Mapping[str, KindError]

    def predictor(self, host: HostOverhead) -> Learned:
        """Return the predictor of the deployment with a host overhead, and its factors of operators."""
        check_kinds([store.kind_name(name) for name, _ in host.factors], f"the factors of {host.name}")
        maker, parallel, model = self.maker, self.maker.parallel, self.maker.sites[0].model
        stages = range(len(self.parts))
        tables = [maker.stage(stage, self.parts[stage], host) for stage in stages]
        sampled = tables[-1].sampled + host.sampling(model.vocab_size, np.arange(len(tables[-1].sampled)))
        sampled[0] = 0.0
        tables[-1] = replace(tables[-1], sampled=sampled)
        layers, ranks = parallel.stage_layers(model.num_layers), parallel.world_size
        of_batch = [maker.batch_times(stage, host) for stage in stages]
        times = [stage_times(tables[stage], host, layers[stage], ranks, stage, of_batch[stage]) for stage in stages]
        return Learned(maker.describe(host), times, self)


class Learned(RuntimePredictor):
    """Times of one model under one parallel layout on a calibrated device."""

    def __init__(self, description: str, stages: list[StageTimes], known: Known) -> None:
        self.description = description
        self.stages = stages
        self.known = known
        self.limits, self.errors = known.limits, known.errors

    def for_host(self, host: HostOverhead) -> Learned:
        return self.known.predictor(host)

    def stage_time(self, shape: BatchShape, stage: int) -> float:
        return self.stage_times(shape, stage, 1)[0]

    def stage_times(self, shape: BatchShape, stage: int, repeats: int) -> list[float]:
        return self.stages[stage].times(shape, repeats)

    def send_time(self, shape: BatchShape, stage: int) -> float:
        return at(self.stages[stage].send, shape.num_tokens)

    def in_range(self, shape: BatchShape) -> bool:
        return self.limits.hold(shape)


def learned(
    model: ModelSpec, device: DeviceSpec, network: NetworkSpec, parallel: ParallelSpec, host: HostOverhead
) -> Learned:
    """The predictor of a deployment from the calibration that ships for its device.

    The tables are kept under a key made of the calibration's contents, this code, the operators and the arguments, in
    $WINDTUNNEL_CACHE_DIR or ~/.cache/windtunnel; a cache that can't be read or written costs time, nothing else. Raises
    InputError for a device without a calibration.
    """
    folder = folder_of(device)
    if folder is None:
        known = ", ".join(known_devices()) or "none"
        raise InputError(f"no calibration for device {device.name!r} (there are: {known}): use --predictor roofline")
    fingerprint = store.fingerprint(folder)
    calibration = _loaded(folder, device, host.kernels, fingerprint)
    return _predictor(calibration, fingerprint, model, device, network, parallel, host)


@lru_cache(maxsize=8)
def _loaded(folder: Path, device: DeviceSpec, software: str | None, fingerprint: str) -> store.Calibration:
    """A calibration, read once a process: many points of a study are of one device."""
    return store.load(folder, device, software)


def carried_over(
    model: ModelSpec, device: DeviceSpec, network: NetworkSpec, parallel: ParallelSpec, host: HostOverhead
) -> Learned:
    """The predictor of a deployment on a device without measurements: by what others' have in common."""
    return _predictor(carried(device), "", model, device, network, parallel, host)


def _predictor(
    calibration: store.Calibration,
    fingerprint: str,
    model: ModelSpec,
    device: DeviceSpec,
    network: NetworkSpec,
    parallel: ParallelSpec,
    host: HostOverhead,
) -> Learned:
    stages = range(parallel.pipeline_parallel_size)
    maker = TableMaker(calibration, model, device, network, parallel, host.attention_kernel, host.kernels)
    arguments = (
        model,
        device,
        network,
        parallel,
        host.attention_kernel,
        host.kernels,
        sorted(calibration.software.items()),
        maker.operators,
        fingerprint,
        table_cache.code_hash(),
    )
    path = table_cache.cache_folder() / f"{hashlib.sha256(repr(arguments).encode()).hexdigest()[:32]}.npz"
    parts = table_cache.read(path, len(stages))
    if parts is None:
        parts = [maker.parts(stage) for stage in stages]
        table_cache.write(path, parts)
    return Known(maker, parts, maker.limits(), errors_of(maker, host)).predictor(host)
