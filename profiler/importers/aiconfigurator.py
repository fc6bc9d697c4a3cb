"""Reads the operator tables of ai-dynamo/aiconfigurator (`systems/data/DEVICE/...`): Parquet, latency in ms.

gemm_perf                  m, n, k, 16-bit and quantised. The rows of fp8 and fp8_block include quantising the
                           activations: collect_gemm.py times vLLM's whole linear layer on 16-bit input (fp8 with a
                           static scale a tensor, fp8_block with scales computed on the way)
context_attention_perf     prefill of `batch_size` whole prompts of `isl` tokens, nothing cached before
generation_attention_perf  decode: each request attends to `step` tokens, its new one included (collect_attn.py builds
                           sequences of that length with one query token)
custom_allreduce_perf      vLLM's all-reduce in a CUDA graph, and eager, where the host's launch is in the time
nccl_perf                  NCCL; only all_reduce has a place in the calibration table
moe_perf                   experts, see aiconfigurator_experts

A folder may hold every device, framework and version, as the public repository does, or an older, flat layout. One
version of one framework is selected (`Selection`): rows of two are two populations, and never in one table. NCCL's rows
belong to the version that their folder names: they name the framework that collected them, and may name another
version.

`message_size` counts elements, not bytes: collect_nccl.py divides nccl-tests' bytes by the element's, and
collect_all_reduce.py makes a tensor of that many bfloat16. The numbers agree: the largest all-reduces of 8 GPUs attain
the same 220 to 230 GB/s of bus bandwidth for float16, int8 and bfloat16, and vLLM's change from its own kernel to NCCL
falls on its limit of 8 MiB.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from engine.errors import InputError
from engine.specs import catalog
from profiler import table
from profiler.importers import aiconfigurator_experts
from profiler.importers.common import Part, assemble, choose_device, find, finish, nothing_known, shorten
from profiler.importers.outliers import without_outliers

WANTED = "AIConfigurator's {gemm,context_attention,generation_attention,custom_allreduce,nccl,moe}_perf.parquet"
PRODUCTS = {  # in the name that CUDA gives the card: name in engine.specs.catalog
    r"\bA100.*PCI": "a100_pcie",
    r"\bA100.*SXM": "a100_sxm",
    r"\bA40\b": "a40",
    r"\bH100\b(?!.*PCI)": "h100_sxm",
    r"\bH200\b": "h200_sxm",
    r"\bL4\b": "l4",
    r"\bL40S\b": "l40s",
}
DTYPES = {"half": ("float16", 2), "float16": ("float16", 2), "bfloat16": ("bfloat16", 2), "int8": ("int8", 1),
          "float32": ("float32", 4)}  # fmt: skip
NCCL = "nccl"
_FORMATS = ("gemm_dtype", "moe_dtype", "attn_dtype", "kv_cache_dtype")
_COMMON = ("framework", "version", "device", "op_name", "kernel_source", "latency")
_BACKENDS = {"vllm_custom_graph": "vllm_graph", "vllm_custom_eager": "vllm_eager"}  # by `kernel_source`


@dataclass(frozen=True)
class Selection:
    """Which measurements to take.

    `software` names frameworks with the beginning of a version (`vllm@0.14`, `vllm@0.19.1`, `nccl@2.27`), one each;
    `dtype` is that of the matrix products (bfloat16, fp8, fp8_block) and `kv_dtype` that of the KV cache, None for
    every one, each under its own name; `window` is attention's sliding window in tokens, 0 for none.
    """

    software: tuple[str, ...] = ()
    dtype: str | None = None
    kv_dtype: str | None = None
    window: int = 0

    def named(self, framework: str) -> str | None:
        """Return the version that is asked for of a framework. Raises InputError for two of one framework."""
        mine = [text.partition("@")[2] for text in self.software if text.partition("@")[0].casefold() == framework]
        if len(mine) > 1:
            raise InputError(f"software {', '.join(self.software)}: give one version of {framework}")
        return mine[0] if mine else None


def read(
    place: Path, device: str | None = None, network: str | None = None, select: Selection | None = None
) -> pd.DataFrame:
    """The tables below `place` of one device and software; see `profiler.importers.read_source`."""
    select = select or Selection()
    found, ignored = [], []
    for path in find(place, ".parquet", WANTED):
        frame = table.read_parquet(path)
        known = next((item for item in _READERS.items() if {*item[0], *_COMMON} <= {*frame.columns}), None)
        if known is None:
            ignored.append(shorten(path, ()))
            continue
        if not len(frame):
            raise InputError(f"{path} holds no rows: fetch it again, or delete it")
        for name in ("latency", *known[0]):
            values = table.numbers(frame, name, str(path))
            table.reject(frame, name, ~(np.isfinite(values) & (values >= 0)), "is not a size or a time", str(path))
        found += [_File(path, rows, *_labels(path, rows), _devices(str(product)), known[1])
                  for product, rows in frame.groupby("device")]  # fmt: skip
    if not found:
        raise nothing_known(place, WANTED)
    devices = {file.devices for file in found}
    chosen = choose_device(devices, device, place)
    mine = [file for file in found if chosen in file.devices]
    notes: list[str] = []
    wanted = _versions(mine, select, chosen, place, notes)
    parts = []
    for file in mine:
        name = shorten(file.path, ())
        frame, left_out = _selected(file, wanted, select, name)
        notes += left_out
        if not len(frame):
            continue
        rows, remarks = file.reader(frame)
        rows = rows.assign(
            time_ms=frame["latency"].astype("float64"),
            kernel=frame["kernel_source"],
            software=f"{file.framework} " + frame["version"].astype("string") if file.framework != NCCL
            else f"{NCCL} {file.version}",
            source=f"ai-dynamo/aiconfigurator {name}",
        )  # fmt: skip
        if "num_bytes" in rows:
            rows["network"] = network or _network(chosen, place)
        if len(rows := rows[rows["kind"].notna()]):
            parts.append(finish(Part(rows, file.devices, [f"{name}: {note}" for note in remarks]), name))
    if not parts:
        raise InputError(
            f"{place} holds no row of {chosen} that was asked for: {'; '.join(notes) or 'nothing is left'}"
        )
    if chosen in catalog.DEVICES:
        spec = catalog.DEVICES[chosen]
        parts = [without_outliers(part, spec, select.window) for part in parts]
        if not any(len(part.rows) for part in parts):
            raise InputError(f"{place} holds no row of {chosen} that can be believed: {parts[-1].notes[-1]}")
    if ignored:
        notes.append(f"left out for their unknown columns: {', '.join(ignored)}")
    parts[-1].notes.extend(notes)
    return assemble(parts, chosen, devices, place)


@dataclass(frozen=True)
class _File:
    """The rows of one device in one file. `version` is the folder's, of NCCL's rows; of others each row has its own."""

    path: Path
    rows: pd.DataFrame
    framework: str
    version: str
    devices: tuple[str, ...]
    reader: Callable[[pd.DataFrame], tuple[pd.DataFrame, list[str]]]

    @property
    def versions(self) -> list[str]:
        return [self.version] if self.version else sorted(self.rows["version"].astype(str).unique(), key=_order)


def _devices(product: str) -> tuple[str, ...]:
    return tuple(name for pattern, name in PRODUCTS.items() if re.search(pattern, product)) or (product,)


def _labels(path: Path, rows: pd.DataFrame) -> tuple[str, str]:
    """A file's framework, and the version of all its rows where they are not to be believed (NCCL's)."""
    if "nccl_dtype" in rows:
        numbered = re.fullmatch(r"\d+(\.\d+)+\S*", path.parent.name)
        return NCCL, path.parent.name if numbered else str(rows["version"].iloc[0])
    frameworks = sorted(rows["framework"].astype(str).str.casefold().unique())
    if len(frameworks) > 1:
        raise InputError(f"{path} mixes rows of {' and '.join(frameworks)}: give files of one framework each")
    return frameworks[0], ""


def _order(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0]))


def _release(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _versions(files: Iterable[_File], select: Selection, device: str, place: Path, notes: list[str]) -> dict[str, str]:
    """The one version to take, or its beginning, by framework. Raises InputError where there are several."""
    there: dict[str, dict[str, set[str]]] = {}  # framework: release: tables
    for file in files:
        for version in file.versions:
            tables = there.setdefault(file.framework, {}).setdefault(_release(version), set())
            tables.add(file.path.name.removesuffix(".parquet").removesuffix("_perf"))
    listed = "; ".join(
        f"{framework}@{release} ({', '.join(sorted(tables))})"
        for framework, releases in sorted(there.items())
        for release, tables in sorted(releases.items(), key=lambda item: _order(item[0]))
    )
    for text in select.software:
        framework, _, version = text.partition("@")
        every = [each for file in files if file.framework == framework.casefold() for each in file.versions]
        if not any(_begins(each, version) for each in every):
            raise InputError(f"{place} holds no measurements of {device} with {text}: there are {listed}")
    engines = sorted(set(there) - {NCCL})
    given = {framework: select.named(framework) for framework in there}
    named = {framework: version for framework, version in given.items() if version is not None}
    asked = [framework for framework in engines if framework in named]
    if len(asked) > 1:
        raise InputError(f"software {', '.join(select.software)}: give one framework beside nccl")
    if not asked and len(engines) > 1:
        raise InputError(
            f"{place} holds measurements of {device} with several frameworks: choose one (software=...) of {listed}"
        )
    wanted = {}
    for framework in [*(asked or engines), *([NCCL] if NCCL in there else [])]:
        releases = sorted(there[framework], key=_order)
        if framework not in named and len(releases) > 1:
            raise InputError(
                f"{place} holds measurements of {device} with several versions of {framework}: choose one "
                f"(software=...) of {listed}"
            )
        wanted[framework] = named.get(framework, releases[0])
    if others := sorted(set(engines) - set(wanted)):
        notes.append(f"left out, of other frameworks: {', '.join(others)}")
    return wanted


def _begins(version: str, start: str) -> bool:
    return version == start or re.match(re.escape(start) + r"(?!\d)", version) is not None


def _selected(file: _File, wanted: dict[str, str], select: Selection, name: str) -> tuple[pd.DataFrame, list[str]]:
    """The rows of a file that are asked for, of one window; of several versions each format's last.

    A start like 0.19 leaves several: not every format is measured again.
    """
    frame, notes = file.rows, list[str]()
    if file.framework not in wanted:
        return frame.iloc[:0], notes
    mine = [version for version in file.versions if _begins(version, wanted[file.framework])]
    if not mine:
        return frame.iloc[:0], notes
    if not file.version and len(file.versions) > 1:
        frame = frame[frame["version"].astype(str).isin(mine)]
        place = frame["version"].astype(str).map({version: at for at, version in enumerate(mine)})
        formats = [column for column in _FORMATS if column in frame]
        last = place.groupby([frame[column] for column in formats]).transform("max") if formats else place.max()
        for older in sorted(set(place[place < last])):
            count, than = int(((place == older) & (place < last)).sum()), mine[int(place[place >= last].max())]
            notes.append(f"{name}: {count} rows of version {mine[older]} left out beside {than}")
        frame = frame[place == last]
    if "window_size" in frame:
        others = frame["window_size"] != select.window
        if others.any():
            windows = ", ".join(str(each) for each in sorted(frame["window_size"][others].unique()))
            notes.append(f"{name}: {int(others.sum())} rows of window {windows} left out")
        frame = frame[~others]
    elif select.window and "isl" in frame:
        notes.append(f"{name}: measured without a window, left out")
        frame = frame.iloc[:0]
    for column, wanted_dtype in (("gemm_dtype", select.dtype), ("kv_cache_dtype", select.kv_dtype)):
        if wanted_dtype is not None and column in frame:
            frame = frame[frame[column] == wanted_dtype]
    return frame, notes


def _network(device: str, place: Path) -> str:
    if device not in catalog.DEVICES:
        raise InputError(f"{place} has collectives of {device}: name their network (network=...)")
    return catalog.DEVICES[device].network


def _gemm(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    rows = frame[["m", "n", "k"]].assign(operator="gemm", kind="gemm", dtype=frame["gemm_dtype"])
    return rows.assign(backend=frame["framework"].str.casefold()), []


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
    )
    return rows, []


def _collective(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    nccl = "nccl_dtype" in frame
    native = frame["nccl_dtype" if nccl else "allreduce_dtype"]
    mine = (frame["op_name"] == "all_reduce") & native.isin(list(DTYPES))
    kernels = frame["kernel_source"].astype("string").str.casefold()
    rows = pd.DataFrame(
        {
            "operator": "all_reduce",
            "kind": pd.Series("all_reduce", frame.index).where(mine),
            "num_bytes": frame["message_size"] * native.map({name: size for name, (_, size) in DTYPES.items()}),
            "num_ranks": frame["num_gpus"],
            "ranks_per_node": frame["num_gpus"],
            "dtype": native.map({name: dtype for name, (dtype, _) in DTYPES.items()}),
            "backend": NCCL if nccl else frame["backend"] if "backend" in frame else kernels.replace(_BACKENDS),
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
