"""Fits the constants that estimates of unmeasured GPUs rest on, and reports their errors with each device left out.

The tables are ai-dynamo/aiconfigurator's (vLLM 0.14, 16 bits); what is printed for all devices together is what
`simulator.predictor.carried` and `simulator.predictor.gemm.Base` hold. Of prefills the constants are fitted to the
devices of the same kind of tensor cores.

    python benchmarks/cold_start.py DATA   # the folder with a100_sxm, h100_sxm, h200_sxm and l40s

The errors and constants are written to studies/calibration/cold_start.json, of which docs/accuracy.md has its table.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from engine.results.tables import Array
from engine.specs import DeviceSpec, catalog
from profiler.importers import Selection, read_source
from simulator.predictor import carried
from simulator.predictor.calibration_errors import short
from simulator.predictor.collectives import SWITCHED, on_a_switch
from simulator.predictor.gemm import Base
from studies.calibration.accuracy import COLD_START as RECORD

DEVICES = ("a100_sxm", "h100_sxm", "h200_sxm", "l40s")
MOST = 9000  # rows of a device that constants are fitted to, evenly among all
Predict = Callable[[Array, pd.DataFrame, DeviceSpec], Array]


def _columns(rows: pd.DataFrame, names: Sequence[str]) -> dict[str, Array]:
    return {name: rows[name].to_numpy(float) for name in names}


def _gemm(constants: Array, rows: pd.DataFrame, device: DeviceSpec) -> Array:
    launch, arithmetic, traffic, rate, norm, tiled = constants
    base = Base(launch * 1e-6, arithmetic, traffic, rate * 1e10, norm, tiled)
    return carried.CarriedGemm(device, base=base).seconds(_columns(rows, carried.CarriedGemm.columns))


def _prefill(constants: Array, rows: pd.DataFrame, device: DeviceSpec) -> Array:
    launch, share, traffic, loop, rate = constants
    model = carried.CarriedPrefill(device, constants=(launch * 1e-6, share, traffic, loop, rate * 1e10))
    return model.seconds(_columns(rows, model.columns))


def _decode(constants: Array, rows: pd.DataFrame, device: DeviceSpec) -> Array:
    launch, traffic, rate, head, token = constants
    own = (launch * 1e-6, traffic, rate * 1e10, head * 1e-9, token * 1e-9)
    model = carried.CarriedDecode(device, constants=own)
    return model.seconds(_columns(rows, model.columns))


def _all_reduce(constants: Array, rows: pd.DataFrame, device: DeviceSpec) -> Array:
    base, by_ranks, traffic, mixed = constants
    rate = catalog.network(device.network).node.bandwidth_bytes_per_s
    own = (base * 1e-6, by_ranks * 1e-6, traffic, mixed)
    sizes, ranks = rows["num_bytes"].to_numpy(float), rows["num_ranks"].to_numpy(float)
    return on_a_switch(sizes, ranks, rate, own)


FITS: dict[str, tuple[Predict, list[float], list[float], list[float]]] = {  # the first guess, the least and the most
    "gemm": (_gemm, [2.5, 0.8, 1.25, 2, 3, 0.9], [0.2, 0.2, 0.8, 0.2, 1, 0], [20, 4, 4, 20, 8, 1]),
    "attention_prefill": (_prefill, [10, 0.6, 1.2, 0.5, 2], [2, 0.2, 0.5, 0, 0.5], [20, 1.2, 6, 3, 8]),
    "attention_decode": (_decode, [10, 1.2, 2, 0.1, 0.1], [2, 0.8, 0.5, 0, 0], [20, 3, 8, 50, 200]),
    "all_reduce": (_all_reduce, [4, 0.5, 1, 1], [0, 0, 0.5, 0], [20, 10, 3, 10]),
}
UNITS = {
    "gemm": [1e-6, 1, 1, 1e10, 1, 1],
    "attention_prefill": [1e-6, 1, 1, 1, 1e10],
    "attention_decode": [1e-6, 1, 1e10, 1e-9, 1e-9],
    "all_reduce": [1e-6, 1e-6, 1, 1],
}


def tables(data: Path) -> dict[str, pd.DataFrame]:
    """Return the 16-bit rows of each device."""
    found = {}
    for name in DEVICES:
        software = () if name == "a100_sxm" else ("vllm@0.14",)
        frame = read_source("aiconfigurator", data, name, select=Selection(software, "bfloat16", "bfloat16"))
        found[name] = frame[frame["dtype"] != "int8"]
    return found


def fitted(kind: str, rows: dict[str, pd.DataFrame]) -> Array:
    """Return the constants nearest to the rows of these devices, each of which counts alike."""
    predict, first, low, high = FITS[kind]
    thin = {name: part.iloc[np.linspace(0, len(part) - 1, min(len(part), MOST)).astype(int)]
            for name, part in rows.items()}  # fmt: skip

    def left(constants: Array) -> Array:
        parts = []
        for name, part in thin.items():
            measured = part["time_ms"].to_numpy(float) / 1e3
            parts.append(np.log(predict(constants, part, catalog.device(name)) / measured) / np.sqrt(len(part)))
        return np.concatenate(parts)

    found = least_squares(left, first, bounds=(low, high), loss="soft_l1", f_scale=0.002)
    return np.asarray(found.x)


def _alike(name: str, device: str) -> bool:
    """Whether two devices' prefills have the same constants."""
    return carried.tensor_cores(catalog.device(name)) == carried.tensor_cores(catalog.device(device))


def left_out(kind: str, rows: dict[str, pd.DataFrame], device: str) -> tuple[float, float]:
    """Return mean error and bias on a device of what was fitted to others."""
    others = {name: part for name, part in rows.items() if name != device}
    if kind == "attention_prefill":
        others = {name: part for name, part in others.items() if _alike(name, device)}
    predicted = FITS[kind][0](fitted(kind, others), rows[device], catalog.device(device))
    relative = predicted / (rows[device]["time_ms"].to_numpy(float) / 1e3) - 1
    return float(np.abs(relative).mean()), float(relative.mean())


def populations(frames: dict[str, pd.DataFrame]) -> dict[tuple[str, str], dict[str, pd.DataFrame]]:
    """Return the rows of each device by kind and kernel: of all-reduces only those on a switch."""
    found: dict[tuple[str, str], dict[str, pd.DataFrame]] = {}
    for device, frame in frames.items():
        for kind in FITS:
            mine = frame[frame["kind"] == kind]
            if kind != "all_reduce":
                found.setdefault((kind, ""), {})[device] = mine
            elif catalog.device(device).network.startswith("nvswitch"):
                for kernel in ("vllm_graph", "nccl"):
                    found.setdefault((kind, kernel), {})[device] = mine[mine["backend"] == kernel]
    return found


def constants() -> dict[str, list[float]]:
    """Return those that predict today, by kind of operator and the population that they were fitted to."""
    prefill = {f"attention_prefill {name}": list(values) for name, values in carried.PREFILL.items()}
    reduce = {f"all_reduce {name}": list(values) for name, values in SWITCHED.items()}
    return {"gemm": list(astuple(Base())), **prefill, "attention_decode": list(carried.DECODE), **reduce}


def in_seconds(kind: str, found: Array) -> list[float]:
    """Return fitted constants in the units of those that predict, to four digits."""
    scaled = [value * unit for value, unit in zip(found.tolist(), UNITS[kind], strict=True)]
    return [float(f"{value:.4g}") for value in scaled]


def main(data: Path) -> None:
    """Print errors and constants, and write the record."""
    errors: dict[str, dict[str, dict[str, float]]] = {}
    fits: dict[str, list[float]] = {}
    for (kind, kernel), rows in populations(tables(data)).items():
        name = f"{kind} {kernel}".strip()
        for device in rows:
            error, bias = left_out(kind, rows, device)
            errors.setdefault(name, {})[device] = {"mape": short(error), "bias": short(bias)}
            print(f"{name} {device} left out: {error:.1%}, bias {bias:+.1%}", flush=True)
        groups: dict[str, dict[str, pd.DataFrame]] = {}
        for device, part in rows.items():
            groups.setdefault(carried.tensor_cores(catalog.device(device)), {})[device] = part
        for alike, group in groups.items() if kind == "attention_prefill" else [("", rows)]:
            of = f"{name} {alike}".strip()
            fits[of] = in_seconds(kind, fitted(kind, group))
            print(f"{of} of {', '.join(group)}: {fits[of]}", flush=True)
    RECORD.write_text(json.dumps({"constants": fits, "errors": errors}, indent=1) + "\n", encoding="utf-8")
    for name, values in constants().items():
        if fits[name] != values:
            print(f"{name}: what predicts has {values}: put the new ones there")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
