"""Reads the profiling tables of microsoft/vidur (`data/profiling`): CSV files, times in ms at 1 us resolution.

compute/DEVICE/ORG/MODEL/mlp.csv        dense layers by number of tokens and tensor parallel size, kernel times, fp16
compute/DEVICE/ORG/MODEL/attention.csv  paged attention: prefill by chunk and cached tokens, decode by batch and cache
network/NETWORK/{all_reduce,send_recv}.csv  NCCL times of fp16 messages; `size` is in bytes (its collectives_wrapper.py
                                            writes twice the number of elements)
cpu_overheads/*.csv                     host time of an iteration by model, batch size and tensor parallel size

Which of these a file is, its columns tell. Vidur's profiler (vidur/profiling/mlp/mlp_impl.py) rotates whole heads
whatever the model's config says, keeps norm and residual add apart, and times the add after the MLP. The time of
`host` components is the median but for ray_comm, of which only the mean was published; it is what is left of the wall
time of an iteration after the other components.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from engine.errors import InputError
from engine.specs import ModelSpec, ParallelSpec
from profiler import table
from profiler.importers.common import (
    DEVICES,
    Part,
    assemble,
    choose_device,
    column,
    devices_of_path,
    find,
    finish,
    known_as,
    nothing_known,
    shorten,
)
from profiler.kind import OfRows
from profiler.operators import Operator, inventory

WANTED = (
    "Vidur's compute/DEVICE/ORG/MODEL/mlp.csv and attention.csv, network/NETWORK/all_reduce.csv and send_recv.csv, "
    "cpu_overheads/*.csv"
)
NETWORKS = {  # Vidur's folder: names in engine.specs.catalog of the device and of the network
    "a100_dgx": ("a100_sxm", "nvswitch_a100"),
    "a100_pair_nvlink": ("a100_pcie", "pairwise_nvlink"),
    "a100_pairwise_nvlink": ("a100_pcie", "pairwise_nvlink"),
    "a40_pairwise_nvlink": ("a40", "a40_measured"),
    "h100_dgx": ("h100_sxm", "nvswitch_h100"),
}
GEMMS = {
    "attn_pre_proj": ("qkv_proj",),
    "attn_post_proj": ("output_proj",),
    "mlp_up_proj": ("mlp_gate_up_proj", "mlp_up_proj"),
    "mlp_down_proj": ("mlp_down_proj",),
}
OPERATORS = GEMMS | {  # Vidur's name: names in the inventory
    "emb": ("embedding",),
    "input_layernorm": ("input_norm",),
    "post_attention_layernorm": ("post_attention_norm",),
    "attn_rope": ("rotary",),
    "mlp_act": ("mlp_activation",),
    "add": ("mlp_residual_add",),
}
COMPONENTS = {  # Vidur's column: host component
    "schedule_median": "schedule",
    "sampler_e2e_median": "sampler",
    "sampler_launch_median": "sampler_launch",
    "prepare_inputs_e2e_median": "prepare_inputs",
    "prepare_inputs_launch_median": "prepare_inputs_launch",
    "model_execution_e2e_median": "model_execution",
    "model_execution_launch_median": "model_execution_launch",
    "process_model_outputs_median": "process_outputs",
    "ray_comm_time_mean": "ray_comm",
}
_TP = "num_tensor_parallel_workers"
_SHAPE = ["n_head", "n_kv_head", "n_embd", "n_expanded_embd", "vocab_size", _TP]
_SOFTWARE = "Vidur's profiler, version unknown"
_ANCHORS = ("compute", "network", "cpu_overhead", "cpu_overheads")


def read(place: Path, device: str | None = None, network: str | None = None) -> pd.DataFrame:
    """The tables below `place` of one device; see `profiler.importers.read_source`."""
    known, ignored, others = [], [], set()
    wanted = known_as(device) if device else None
    for path in find(place, ".csv", WANTED):
        devices = _devices(path)
        if wanted and devices and wanted not in devices:
            others.add(devices)
            continue  # unread: it would take longer than those that are wanted
        frame = table.read_csv(path)
        reader = next((reader for mark, reader in _READERS.items() if mark in frame), None)
        if reader is not None and not len(frame):
            raise InputError(f"{path} holds no rows: fetch it again, or delete it")
        if reader is not None:
            known.append((path, frame, reader, devices))
        elif path.stem in ("mlp", "attention", "all_reduce", "send_recv"):
            raise InputError(f"{path} is no such table of Vidur: its columns are {', '.join(frame.columns)[:200]}")
        else:
            ignored.append(shorten(path, _ANCHORS))
    if not known and not others:
        raise nothing_known(place, WANTED)
    found = {devices for *_, devices in known} | others
    chosen = choose_device(found, device, place)
    parts = []
    for path, frame, reader, devices in known:
        if devices and chosen not in devices:
            continue
        name = shorten(path, _ANCHORS)
        rows, notes = reader(path, frame)
        rows = rows.assign(source=f"microsoft/vidur {name}")
        if reader is _collective:
            rows = rows.assign(network=network or NETWORKS.get(path.parent.name, ("", path.parent.name))[1])
        parts.append(finish(Part(rows, devices, [f"{name}: {note}" for note in notes]), name))
    if ignored:
        parts[-1].notes.append(f"left out for their unknown columns: {', '.join(ignored)}")
    return assemble(parts, chosen, found, place)


def _devices(path: Path) -> tuple[str, ...]:
    """The devices that the file may be of: in Vidur's layout its folder's (or, of host times, its own) name tells."""
    if path.parent.name in NETWORKS:
        return (NETWORKS[path.parent.name][0],)
    parts = shorten(path, _ANCHORS).split("/")
    if len(parts) > 1 and parts[0] in _ANCHORS:
        name = parts[1].removesuffix(".csv").split("_")[0].casefold()
        return DEVICES.get(name, (name,))
    return devices_of_path(path)


def _numbers(path: Path, frame: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """The columns as numbers; InputError for the first that is missing or holds something else."""
    for name in names:
        if name not in frame:
            raise InputError(f"{path} has no column {name!r}: it needs {', '.join(names)}")
    return pd.DataFrame({name: column(frame, name, path) for name in names}, index=frame.index)


def _flags(path: Path, frame: pd.DataFrame, name: str) -> NDArray[np.bool_]:
    """A column of True and False."""
    if name not in frame:
        raise InputError(f"{path} has no column {name!r}")
    values = frame[name].astype("string").str.strip().str.casefold().fillna("")
    table.reject(
        frame, name, ~values.isin(["true", "false"]).to_numpy(), "is neither True nor False", str(path), "line"
    )
    return (values == "true").to_numpy(np.bool_)


def _times(path: Path, frame: pd.DataFrame, name: str) -> dict[str, NDArray[np.float64]]:
    """Median and standard deviation (n,) of a timer, ms."""
    columns = [f"time_stats.{name}.median", f"time_stats.{name}.std"]
    median, std = _numbers(path, frame, columns).to_numpy(np.float64).T
    return {"time_ms": median, "spread_ms": std}


def _model(path: Path) -> str | None:
    """ORG/MODEL of compute/DEVICE/ORG/MODEL/file."""
    parts = shorten(path, ("compute",)).split("/")
    return "/".join(parts[2:-1]) if parts[0] == "compute" and len(parts) > 3 else None


def _mlp(path: Path, frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    timed = [name for name in OPERATORS if f"time_stats.{name}.median" in frame]
    if missing := [name for name in GEMMS if name not in timed]:
        raise InputError(f"{path} has no column 'time_stats.{missing[0]}.median'")
    shapes = _numbers(path, frame, [*_SHAPE, "num_tokens"]).astype("int64")
    shapes["use_gated_mlp"] = _flags(path, frame, "use_gated_mlp")
    times = {name: pd.DataFrame(_times(path, frame, name), index=frame.index) for name in timed}
    parts = []
    for _, group in shapes.groupby([*_SHAPE, "use_gated_mlp"]):
        first = {name: int(group[name].iloc[0]) for name in (*_SHAPE, "use_gated_mlp")}
        every = _inventory(path, first, "post_attention_layernorm" in timed)
        operators = {part.name: part for op in every for part in (op, *op.parts) if isinstance(part, OfRows)}
        for name in timed:
            operator = next(operators[known] for known in OPERATORS[name] if known in operators)
            part = times[name].loc[group.index].assign(operator=operator.name, tensor_parallel_size=first[_TP])
            parts.append(part.assign(kind=operator.kind, **operator.at(group["num_tokens"])))
    untimed = sorted(set(OPERATORS) - set(timed))
    rows = pd.concat(parts, ignore_index=True).assign(dtype="float16", backend="torch", software=_SOFTWARE)
    return rows.assign(model=_model(path)), [f"has no {', '.join(untimed)}"] if untimed else []


def _inventory(path: Path, sizes: dict[str, int], second_norm: bool) -> tuple[Operator, ...]:
    """The operators of one layer of the profiled model; one without a second norm has a parallel block."""
    try:
        model = ModelSpec(
            name=_model(path) or path.parent.name,
            model_type="profiled",
            num_layers=1,
            hidden_size=sizes["n_embd"],
            intermediate_size=sizes["n_expanded_embd"],
            num_attention_heads=sizes["n_head"],
            num_key_value_heads=sizes["n_kv_head"],
            head_dim=sizes["n_embd"] // max(1, sizes["n_head"]),
            vocab_size=sizes["vocab_size"],
            max_position_embeddings=1,
            gated_mlp=bool(sizes["use_gated_mlp"]),
            parallel_block=not second_norm,
            norms_per_layer=2 if second_norm else 1,
        )
        parallel = ParallelSpec(tensor_parallel_size=sizes[_TP])
        parallel.validate(model)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return inventory(model, parallel, 0)


def _attention(path: Path, frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    sizes = ["n_embd", "n_q_head", "n_kv_head", _TP, "batch_size", "prefill_chunk_size", "kv_cache_size"]
    shapes = _numbers(path, frame, sizes).astype("int64")
    prefill = _flags(path, frame, "is_prefill")
    rows = pd.DataFrame(
        {
            "tensor_parallel_size": shapes[_TP],
            "batch_size": shapes["batch_size"],
            "num_heads": shapes["n_q_head"] // shapes[_TP],
            "num_kv_heads": np.maximum(1, shapes["n_kv_head"] // shapes[_TP]),  # fewer heads than ranks: copies
            "head_dim": shapes["n_embd"] // shapes["n_q_head"],
        }
    )
    if "attention_backend" in frame:
        rows["backend"] = frame["attention_backend"].str.removeprefix("AttentionBackend.").str.casefold()
    if "block_size" in frame:
        rows["kernel"] = "paged, blocks of " + frame["block_size"] + " tokens"
    kinds = []
    for kind, timer, mine in (
        ("attention_prefill", "attn_prefill", prefill),
        ("attention_decode", "attn_decode", ~prefill),
    ):
        if not mine.any():
            continue
        part = rows[mine].assign(operator=kind, kind=kind, **_times(path, frame[mine], timer))
        if kind == "attention_prefill":
            part = part.assign(chunk=shapes["prefill_chunk_size"][mine], prefix=shapes["kv_cache_size"][mine])
        else:  # the cache before the token that is computed
            part["kv_tokens"] = part["batch_size"] * (shapes["kv_cache_size"][mine] + 1)
        kinds.append(part)
    rows = pd.concat(kinds, ignore_index=True)
    return rows.assign(model=_model(path), dtype="float16", software=_SOFTWARE), []


def _collective(path: Path, frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    shapes = _numbers(path, frame, ["num_workers", "size", "devices_per_node"])
    name, kind = ("all_reduce", "all_reduce") if "time_stats.all_reduce.median" in frame else ("send_recv", "send")
    rows = pd.DataFrame(_times(path, frame, name), index=frame.index).assign(
        operator=kind,
        kind=kind,
        num_bytes=shapes["size"],
        num_ranks=shapes["num_workers"],
        ranks_per_node=shapes["devices_per_node"],
        dtype="float16",
        backend="nccl",
        software=_SOFTWARE,
    )
    return rows, []


def _host(path: Path, frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    shapes = _numbers(path, frame, ["batch_size", "tensor_parallel_degree"])
    if "model_name" not in frame:
        raise InputError(f"{path} has no column 'model_name'")
    timed = {name: component for name, component in COMPONENTS.items() if name in frame}
    parts = [
        pd.DataFrame({"time_ms": column(frame, name, path)}).assign(
            operator=component,
            kind="host",
            model=frame["model_name"].to_numpy(),
            batch_size=shapes["batch_size"].to_numpy(),
            tensor_parallel_size=shapes["tensor_parallel_degree"].to_numpy(),
            software="Sarathi-Serve, version unknown",
        )
        for name, component in timed.items()
    ]
    notes = ["ray_comm is a mean, the other components are medians"] if "ray_comm" in timed.values() else []
    return pd.concat(parts, ignore_index=True), notes


_READERS: dict[str, Callable[[Path, pd.DataFrame], tuple[pd.DataFrame, list[str]]]] = {  # by a column only they have
    "time_stats.mlp_up_proj.median": _mlp,
    "time_stats.attn_prefill.median": _attention,
    "time_stats.attn_decode.median": _attention,
    "time_stats.all_reduce.median": _collective,
    "time_stats.send_recv.median": _collective,
    "schedule_median": _host,
}
