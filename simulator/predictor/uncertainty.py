"""How far predicted times may be off, and replicas with such errors drawn: a run under many draws gives its range.

An operator's time is off by as much in every batch of a run, so a draw has one error for each kind of operator, and one
for each of the host's constants and for the KV blocks. What an error is like comes from what was measured: of a learned
kind from its held-out errors, wider where its measurements are of other software, of another device, or do not reach;
of an estimate from what such estimates are off where there are measurements. Errors are normal in the logarithm.

    replica = drawn(deployment.replica, deployment.predictor.errors, seed=1)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, hypot, log, log1p
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np

from engine.replica_spec import ReplicaSpec
from engine.scheduling import policies
from engine.specs import HostOverhead
from simulator.predictor.calibration import INTERVAL

if TYPE_CHECKING:
    from simulator.predictor.tables import TableMaker

Z = 1.645  # standard deviations within which INTERVAL of a normal distribution lies
FEWEST = 19  # draws whose lowest and highest value are the ends of a 90 % range

# share of operators' errors that is common to a run, by family: standard deviation of a run's mean error over that of
# all its operators, between vLLM 0.14 and 0.19 and between estimates and measurements (three models, TP1, 2 and 4)
COMMON = {"linear": 0.6, "attention": 0.8, "communication": 0.6, "other": 0.9}

# standard deviations of log(true / predicted), by kind or family:
CARRIED = {  # estimates by other devices' measurements: docs/accuracy.md, "Without any measurement" (mean error x 1.25)
    "gemm": 0.16,
    "attention_prefill": 0.23,
    "attention_decode": 0.29,
    "all_reduce": 0.18,
    "elementwise": 0.26,
}
SHEET = {  # estimates from the data sheet, beside what ships of five GPUs, for layers of three models at TP1, 2 and 4
    "gemm": 0.12,
    "attention_prefill": 0.32,
    "attention_decode": 0.20,
    "all_reduce": 0.42,
    "elementwise": 0.26,
}
UNKNOWN = 0.35  # of kinds of which neither is known: not measured
OTHER_SOFTWARE = {  # kernels of another version or framework
    "attention": 0.18,  # between frameworks on one card 20 to 40 %, taken as a 90 % range
    "linear": 0.03,  # vLLM 0.14 and 0.19 on H100 and H200
    "communication": 0.02,
}
OTHER_DEVICE = {"linear": 0.05, "attention": 0.07}  # H100 and H200, each by the other's measurements
PREFIXES = 0.06  # of a prompt's attention after a prefix where only whole prompts were measured (docs/predictor.md)
OTHERS = 0.10  # of a family that one of these has no figure of: an estimate
RUN = 0.02  # of everything: repeats of a run on one server (E2E)
HOST = 0.25  # of a constant of the host without a margin: an estimate
BLOCKS = 0.02  # of KV blocks that nobody stated: beside what three servers reported

HOST_SECONDS = ("iteration_s", "sequence_s", "layer_s", "message_s", "exposed_s", "sampler_s", "sampler_logit_s",
                "receive_s", "receive_token_s", "transit_s")  # fmt: skip


@dataclass(frozen=True)
class KindError:
    """How far a kind's times may be off: standard deviations of the logarithm within what was measured, and beyond.

    `limits` has the most of a batch that was measured (fields of `lookup.Limits`).
    """

    inside: float
    beyond: float
    limits: Mapping[str, int]

    def of(self, reach: Mapping[str, float]) -> float:
        """Return the standard deviation for batches that reach so far."""
        out = any(reach[name] > self.limits.get(name, reach[name]) for name in reach if name != "prefix")
        found = self.beyond if out else self.inside
        return hypot(found, PREFIXES) if reach["prefix"] > self.limits.get("prefix", reach["prefix"]) else found


Errors = Mapping[str, KindError]  # by the estimator's name, of a kind or population


def errors_of(maker: TableMaker, host: HostOverhead) -> dict[str, KindError]:
    """Return the errors of a deployment's operators, where they are learned or carried over."""
    operators: dict[str, list[Any]] = {}
    known: dict[str, bool] = {}
    for stage, every in enumerate(maker.operators):
        for op in every:
            name = maker.name(op, stage)
            operators.setdefault(name, []).append(op)
            known[name] = known.get(name, True) and maker.knows(op, stage)
    found = {}
    for name, mine in operators.items():
        kind = name.partition(".")[0]
        if not known[name]:
            found[name] = estimate(SHEET.get(kind, UNKNOWN))
        elif name not in maker.calibration.records:
            found[name] = estimate(CARRIED.get(kind, UNKNOWN))
        else:
            found[name] = _learned(maker, name, mine, host.kernels)
    return found


def estimate(deviation: float) -> KindError:
    """Return the error of what was not measured at all."""
    return KindError(deviation, deviation, {})


def _learned(maker: TableMaker, name: str, operators: Sequence[Any], wanted: str | None) -> KindError:
    record, model = maker.calibration.records[name], maker.models[name]
    bands = [log(band["high"] / band["low"]) / (2 * Z) for band in record["interval"]["bands"]]
    common = COMMON.get(model.family, 1.0)
    inside = common * float(np.sqrt(np.mean(np.square(bands))))
    beyond = max(inside, common * float(record["held_out"].get("p95", 0.0)))
    more = [0.0]
    if model.learned_on != maker.sites[0].device.name:
        more.append(OTHER_DEVICE.get(model.family, OTHERS))
    if other_software(record["provenance"].get("software", []), wanted):
        more.append(OTHER_SOFTWARE.get(model.family, OTHERS))
    return KindError(hypot(inside, *more), hypot(beyond, *more), model.limits(operators, maker.sites[0]))


def other_software(measured: Iterable[str], wanted: str | None) -> bool:
    """Return whether none of the software measured ("vllm 0.14.0") is the one wanted ("vllm@0.14").

    An engine that wants none in particular is none of vLLM's.
    """
    texts = list(measured)
    if wanted is None:
        return bool(texts) and all(text.startswith("vllm ") for text in texts)
    engine, _, version = wanted.partition("@")
    return not any(text == f"{engine} {version}" or text.startswith(f"{engine} {version}.") for text in texts)


def deviations(replica: ReplicaSpec, errors: Errors) -> dict[str, float]:
    """Return the standard deviation of the logarithm of everything that is drawn, by name.

    Kinds of operators by their own, the host's constants by the field's, `kv_blocks`, and `run` of all operators.
    """
    scheduler, host = replica.scheduler, replica.engine.host
    budget = float(policies.largest_batch(scheduler))
    longest = scheduler.max_model_len or replica.model.max_position_embeddings
    reach = {
        "tokens": budget,
        "chunk": min(budget, longest),
        "requests": float(scheduler.max_num_seqs),
        "prefix": float(scheduler.enable_prefix_caching or budget < longest),
    }
    found = {name: error.of(reach) for name, error in errors.items()}
    margins = dict(host.margins)
    for name in HOST_SECONDS:
        if getattr(host, name):
            found[name] = log1p(margins[name]) / Z if name in margins else HOST
    if replica.num_gpu_blocks_override is None:
        found["kv_blocks"] = BLOCKS
    return {**found, "run": RUN}


def drawn(replica: ReplicaSpec, errors: Errors, seed: int) -> ReplicaSpec:
    """Return the replica with its errors drawn: factors of operators, the host's constants, the KV blocks.

    Replicas that are drawn with the same seed have the same error where they have one of the same name, so that two
    deployments differ by what is not common to them.
    """
    off = {name: _factor(name, deviation, seed) for name, deviation in deviations(replica, errors).items()}
    host = replica.engine.host
    changed: dict[str, Any] = {name: getattr(host, name) * off[name] for name in HOST_SECONDS if name in off}
    changed["factors"] = {name: host.factor(name) * off[name] * off["run"] for name in errors}
    blocks = replica.num_gpu_blocks_override
    if "kv_blocks" in off:
        blocks = max(1, round(replica.num_kv_blocks() * off["kv_blocks"]))
    engine = replace(replica.engine, host=replace(host, **changed))
    return replace(replica, engine=engine, num_gpu_blocks_override=blocks)


def _factor(name: str, deviation: float, seed: int) -> float:
    return exp(deviation * float(np.random.default_rng([seed, crc32(name.encode())]).standard_normal()))


def covered(draws: int) -> float:
    """Return the share that the range of so many draws is meant to cover."""
    return min(INTERVAL, (draws - 1) / (draws + 1))


def interval(values: Sequence[float]) -> dict[str, float]:
    """Return the low, mid and high of drawn values: of 19 or more the 90 % range, of fewer the lowest and highest."""
    tail = (1 - INTERVAL) / 2
    low, mid, high = np.quantile(values, [tail, 0.5, 1 - tail], method="weibull")
    return {"low": float(low), "mid": float(mid), "high": float(high)}
