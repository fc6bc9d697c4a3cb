"""Reads the operator tables of ai-dynamo/aiconfigurator (`systems/data/DEVICE/...`): Parquet, latency in ms.

gemm_perf                  m, n, k, 16-bit and quantised
context_attention_perf     prefill of `batch_size` whole prompts of `isl` tokens, nothing cached before
generation_attention_perf  decode: each request attends to `step` tokens, its new one included (collect_attn.py builds
                           sequences of that length with one query token)
custom_allreduce_perf      vLLM's all-reduce in a CUDA graph, and eager, where the host's launch is in the time
nccl_perf                  NCCL; only all_reduce has a place in the calibration table
moe_perf                   experts, see aiconfigurator_experts

`message_size` counts elements, not bytes: collect_nccl.py divides nccl-tests' bytes by the element's, and
collect_all_reduce.py makes a tensor of that many bfloat16. The numbers agree: the largest all-reduces of 8 GPUs attain
the same 220 to 230 GB/s of bus bandwidth for float16, int8 and bfloat16, and vLLM's change from its own kernel to NCCL
falls on its limit of 8 MiB.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from engine.errors import InputError
from engine.specs import catalog
from profiler import table
from profiler.importers import aiconfigurator_experts
from profiler.importers.common import Part, assemble, choose_device, find, finish, nothing_known, shorten

WANTED = "AIConfigurator's {gemm,context_attention,generation_attention,custom_allreduce,nccl,moe}_perf.parquet"
PRODUCTS = {  # in the name that CUDA gives the card: name in engine.specs.catalog
    r"\bA100.*PCI": "a100_pcie",
    r"\bA100.*SXM": "a100_sxm",
    r"\bA40\b": "a40",
    r"\bH100\b(?!.*PCI)": "h100",
    r"\bH200\b": "h200",
    r"\bL4\b": "l4",
}
DTYPES = {"half": ("float16", 2), "float16": ("float16", 2), "bfloat16": ("bfloat16", 2), "int8": ("int8", 1),
          "float32": ("float32", 4)}  # fmt: skip
_COMMON = ("framework", "version", "device", "op_name", "kernel_source", "latency")


def read(place: Path, device: str | None = None, network: str | None = None) -> pd.DataFrame:
    """The tables below `place` of one device; see `profiler.importers.read_source`."""
    parts, ignored = [], []
    for path in find(place, ".parquet", WANTED):
        frame = table.read_parquet(path)
        known = next((item for item in _READERS.items() if {*item[0], *_COMMON} <= {*frame.columns}), None)
        if known is None:
            ignored.append(shorten(path, ()))
            continue
        sizes, reader = known
        if not len(frame):
            raise InputError(f"{path} holds no rows: fetch it again, or delete it")
        for name in ("latency", *sizes):
            values = table.numbers(frame, name, str(path))
            table.reject(frame, name, ~(np.isfinite(values) & (values >= 0)), "is not a size or a time", str(path))
        for product, group in frame.groupby("device"):
            rows, notes = reader(group)
            devices = tuple(name for pattern, name in PRODUCTS.items() if re.search(pattern, str(product)))
            devices = devices or (str(product),)
            name = shorten(path, ())
            rows = rows.assign(
                time_ms=group["latency"].astype("float64"),
                kernel=group["kernel_source"],
                source=f"ai-dynamo/aiconfigurator {name}",
            )
            if len(rows := rows[rows["kind"].notna()]):
                parts.append(finish(Part(rows, devices, [f"{name}: {note}" for note in notes]), name))
    if not parts:
        raise nothing_known(place, WANTED)
    chosen = choose_device((part.devices for part in parts), device, place)
    for part in parts:
        if "num_bytes" in part.rows:
            part.rows["network"] = network or _network(chosen, place)
    if ignored:
        parts[-1].notes.append(f"left out for their unknown columns: {', '.join(ignored)}")
    return assemble(parts, chosen, place)


def _network(device: str, place: Path) -> str:
    if device not in catalog.DEVICES:
        raise InputError(f"{place} has collectives of {device}: name their network (network=...)")
    return catalog.DEVICES[device].network


def _software(frame: pd.DataFrame) -> pd.Series[str]:
    return frame["framework"].astype("string").str.casefold() + " " + frame["version"].astype("string")


def _gemm(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    rows = frame[["m", "n", "k"]].assign(operator="gemm", kind="gemm", dtype=frame["gemm_dtype"])
    return rows.assign(backend=frame["framework"].str.casefold(), software=_software(frame)), []


def _attention(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    kind = frame["op_name"].map({"context_attention": "attention_prefill", "generation_attention": "attention_decode"})
    prefill, decode = kind == "attention_prefill", kind == "attention_decode"
    dtype, cache = frame["attn_dtype"], frame["kv_cache_dtype"]
    rows = frame[["batch_size", "num_heads", "head_dim"]].assign(
        operator=kind,
        kind=kind,
        num_kv_heads=frame["num_key_value_heads"],
        chunk=frame["isl"].where(prefill),
        prefix=frame["step"].where(prefill),
        kv_tokens=(frame["batch_size"] * frame["step"]).where(decode),
        dtype=dtype.where(dtype == cache, dtype + ", cache " + cache),
        backend=frame["framework"].str.casefold(),
        software=_software(frame),
    )
    return rows, []


def _collective(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    nccl = "nccl_dtype" in frame
    native = frame["nccl_dtype" if nccl else "allreduce_dtype"]
    mine = (frame["op_name"] == "all_reduce") & native.isin(list(DTYPES))
    rows = pd.DataFrame(
        {
            "operator": "all_reduce",
            "kind": pd.Series("all_reduce", frame.index).where(mine),
            "num_bytes": frame["message_size"] * native.map({name: size for name, (_, size) in DTYPES.items()}),
            "num_ranks": frame["num_gpus"],
            "ranks_per_node": frame["num_gpus"],
            "dtype": native.map({name: dtype for name, (dtype, _) in DTYPES.items()}),
            "backend": "nccl" if nccl else frame["backend"],
            # the version beside NCCL's rows is NCCL's own, whatever framework collected them
            "software": "nccl " + frame["version"] if nccl else _software(frame),
        },
        index=frame.index,
    )
    others = (frame["op_name"] + " of " + native)[~mine].value_counts(sort=False)
    return rows, [f"{count} rows of {name} left out" for name, count in others.items()]


_READERS: dict[tuple[str, ...], Callable[[pd.DataFrame], tuple[pd.DataFrame, list[str]]]] = {  # by their numbers
    ("m", "n", "k"): _gemm,
    ("batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim", "step"): _attention,
    ("num_gpus", "message_size"): _collective,
    aiconfigurator_experts.NUMBERS: aiconfigurator_experts.experts,
}
