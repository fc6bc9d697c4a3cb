"""The engine that a replica runs, as data: its scheduler, its limits by device, its host overhead, its graphs.

Users run engines, not policies: `vllm@0.15` stands for all that vLLM 0.15 decides where nobody asks for something else.
The presets are files in `calibration_data/engines`, each with where its numbers come from; a version more is a file
more. A file of one's own has the same keys, or those that differ and a `base`.

    from engine.specs import catalog
    print(preset("vllm@0.15", catalog.device("h100")).scheduler)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from engine.documents import given_path, read_json, read_yaml
from engine.errors import InputError, unknown
from engine.scheduling import policies
from engine.specs import DeviceSpec, HostOverhead, SchedulerSpec, catalog
from engine.specs.checks import build, field_types, short, version_numbers
from engine.specs.device_folder import ENGINES, measured_host
from engine.specs.host import MOST_GRAPH
from engine.specs.memory import ProfileRun
from engine.specs.scheduler import MOST_SEQUENCES

GIB = 1 << 30
DEFAULT = "windtunnel"
LATEST = "latest"
MEASURED = "measured"  # the setting that takes the host overhead of the device's own calibration
USAGES = ("server", "offline")
GRAPH_SIZES = ("vllm", "none")
GRAPH_MODES = ("full_and_piecewise", "full", "piecewise")
_GRAPH_KEYS: dict[str, tuple[type, str]] = {
    "mode": (str, "full_and_piecewise, full or piecewise"),
    "largest": (int, "a number of tokens"),
    "largest_named": (dict, "a mapping of parts of devices' names to numbers of tokens"),
    "with_limits": (bool, "true or false"),
}
_HOST_SECONDS = ("iteration_s", "sequence_s", "layer_s")
_LEFT_OPEN: dict[str, dict[str, Any]] = {  # values that a file may take from its base
    "host": dict.fromkeys(_HOST_SECONDS, 0.0),
    "profile_run": {"base_bytes": 0, "parallel_bytes": 0, "logit_bytes": 0},
}
_WINDTUNNEL_HOSTS = {"cuda": "cuda_graphs", "cpu": "eager_cpu"}  # estimates, for devices whose host was not measured
FILES = (".yaml", ".yml", ".json")  # how the name of a file of one's own ends
_KEYS = {  # of a file: the type of each value, and how to say it
    "base": (str, "the name of an engine"),
    "description": (str, "text"),
    "source": (str, "text"),
    "scheduler": (dict, "a mapping of scheduler settings"),
    "limits": (list, "a list of tiers"),
    "gpu_memory_utilization": (int | float, "a share such as 0.9"),
    "async_scheduling": (bool, "true or false"),
    "graph_sizes": (str, "vllm or none"),
    "profile_run": (dict, "a mapping of base_bytes, parallel_bytes and logit_bytes"),
    "graphs": (dict, "a mapping of mode, largest, largest_named and with_limits"),
    "reserve_gib": (int | float, "a number of GiB"),
    "host": (str | dict, "a name of --host-overhead or a mapping"),
    "kernels": (str, "the engine and version whose operators were measured, such as vllm@0.14"),
}


@dataclass(frozen=True, kw_only=True)
class EnginePreset:
    """A named engine on a device.

    `scheduler` has the fields of a SchedulerSpec that it decides; `host_overhead` is the setting that selects `host`.
    It `ships` unless it is a file of one's own. `overrides` names the settings that were asked for instead.
    """

    name: str  # with its version, such as vllm@0.15
    description: str
    source: str  # where the numbers come from
    host_overhead: str
    host: HostOverhead
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    gpu_memory_utilization: float = 0.9
    async_scheduling: bool = False
    profile_run: ProfileRun | None = None  # how it measures its memory; None: the estimate of `engine.specs.memory`
    graph_sizes: str = "none"  # how CUDA graphs are sized: vllm, or none: batches are not padded
    graph_mode: str = "full_and_piecewise"  # full: one graph for a batch of decodes; piecewise: without its attention
    largest_graph: int = 512  # tokens
    graphs_of_limits: bool = False  # one more of exactly max_num_seqs and max_num_batched_tokens each, where they fit
    reserve_bytes: int = 0  # of each device's memory, kept off the KV cache for CUDA graphs
    ships: bool = True
    overrides: tuple[str, ...] = field(default=(), compare=False)
    note: str = field(default="", compare=False)  # on what was asked for and makes no difference to it

    @property
    def attention_kernel(self) -> str | None:
        """The attention kernel it runs, by its name in a calibration; None: the one that was measured most."""
        return self.host.attention_kernel

    def scheduler_spec(self, given: Mapping[str, Any]) -> SchedulerSpec:
        """Return the scheduler's spec with the fields of `given` in place of the preset's."""
        own = dict(self.scheduler)
        if given.get("policy") not in (None, own.get("policy")):  # what its own policy alone reads
            own = {name: value for name, value in own.items() if name not in policies.VLLM_OPTIONS}
        return SchedulerSpec(**{**own, **given})

    def padded(self, scheduler: SchedulerSpec) -> EnginePreset:
        """Return the preset with its CUDA-graph sizes for a resolved scheduler, to which batches are padded."""
        if self.graph_sizes != "vllm":
            return self
        sizes = vllm_graph_sizes(scheduler, self.largest_graph, self.graphs_of_limits)
        full = [size for size in sizes if size <= scheduler.max_num_seqs] if "full" in self.graph_mode else []
        decodes = self.host.graph_decodes or max(full, default=0)
        return replace(self, host=replace(self.host, graph_sizes=sizes, graph_decodes=decodes))


def vllm_graph_sizes(scheduler: SchedulerSpec, largest: int = 512, of_limits: bool = False) -> tuple[int, ...]:
    """Batch sizes that vLLM V1 captures (config/vllm.py: _set_cudagraph_sizes), those of its limits if it does."""
    seqs, tokens = scheduler.max_num_seqs, scheduler.max_num_batched_tokens or largest
    most = min(2 * seqs, largest)
    top = min(most, tokens)
    sizes = {1, 2, 4, *range(8, 256, 8), *range(256, largest + 1, 16)}
    if of_limits:
        sizes |= {tokens} | ({seqs} if seqs <= most else set())
    return tuple(sorted(size for size in sizes if size <= top))


def names() -> list[str]:
    """Return the presets that ship, by name and version."""
    return sorted((path.stem for path in ENGINES.glob("*.json")), key=_by_version)


def preset(
    engine: str,
    device: DeviceSpec,
    host_overhead: str = "auto",
    usage: str = "server",
    max_model_len: int = 0,
    given: Mapping[str, Any] = MappingProxyType({}),
) -> EnginePreset:
    """Return an engine on a device.

    Args:
        engine: a name, a name with a version, `NAME@latest` (as the bare name where there are several), or a file.
        host_overhead: "auto" is the preset's own, of `windtunnel` what the device's calibration measured, else an
            estimate; "measured" insists on the measured one; else a name in `catalog.HOST_OVERHEADS`.
        usage: server or offline, where the engine's limits differ.
        max_model_len: of the replica; 0 where it is not known.
        given: fields of the scheduler that were asked for, to which the engine fits its own limits.

    Raises InputError for an unknown name, a broken file, and for "measured" where nothing was.
    """
    if usage not in USAGES:
        raise unknown("usage", usage, USAGES)
    name, data = _read(engine)
    host_setting, host = _host(name, data.get("host"), host_overhead, device)
    if "kernels" in data:
        host = replace(host, kernels=data["kernels"])
    own = dict(data.get("scheduler") or {})
    limits = _limits(name, data.get("limits") or [], device, usage, max_model_len, {**own, **given})
    return EnginePreset(
        name=name,
        description=str(data.get("description", "")),
        source=str(data["source"]),
        host_overhead=host_setting,
        host=host,
        scheduler={**limits, **own},
        ships=not engine.endswith(FILES),
        note="" if limits or usage == USAGES[0] else f"--usage {usage} makes no difference to the engine {name}",
        profile_run=ProfileRun(**data["profile_run"]) if "profile_run" in data else None,
        reserve_bytes=int(data.get("reserve_gib", 0) * GIB),
        **_graphs(data.get("graphs") or {}, device),
        **{key: data[key] for key in ("gpu_memory_utilization", "async_scheduling", "graph_sizes") if key in data},
    )


def _graphs(data: Mapping[str, Any], device: DeviceSpec) -> dict[str, Any]:
    """The fields of a preset that its `graphs` decide on a device."""
    named = [size for part, size in (data.get("largest_named") or {}).items() if part in device.name.lower()]
    names = {"mode": "graph_mode", "largest": "largest_graph", "with_limits": "graphs_of_limits"}
    found = {field: data[key] for key, field in names.items() if key in data}
    return found | ({"largest_graph": named[0]} if named else {})


def _by_version(name: str) -> tuple[str, tuple[int, ...]]:
    family, _, version = name.partition("@")
    return family, version_numbers(version)


def _read(engine: str) -> tuple[str, dict[str, Any]]:
    """The preset's full name and its data."""
    if engine.endswith(FILES):
        return _read_file(given_path(engine))
    known = names()
    family, _, version = engine.partition("@")
    version = ".".join(version.split(".")[:2])  # 0.15.1 has the rules of 0.15
    if f"{family}@{version}" in known:
        engine = f"{family}@{version}"
    mine = [name for name in known if name == family or name.startswith(f"{family}@")]
    if version in ("", LATEST) and mine:
        return mine[-1], _parse(ENGINES / f"{mine[-1]}.json")
    if engine not in known and mine and re.fullmatch(r"[\d.]+", version):
        before = [name for name in mine if _by_version(name) < _by_version(engine)]
        nearest = f"the one before it is {before[-1]}" if before else f"the oldest is {mine[0]}"
        raise InputError(f"no preset of {family} {version[:20]}: {nearest}, the newest {mine[-1]}")
    if engine not in known:
        raise unknown("engine", engine, [*known, *{f"{name.split('@')[0]}@{LATEST}" for name in known if "@" in name}])
    return engine, _parse(ENGINES / f"{engine}.json")


def _read_file(path: Path) -> tuple[str, dict[str, Any]]:
    """A preset of the user's own, on top of its base."""
    data = _parse(path)
    base: dict[str, Any] = {"source": str(path)}
    if "base" in data:
        if data["base"].endswith(FILES):
            raise InputError(f"{path}: base {data['base']!r}: give an engine that ships: {', '.join(names())}")
        _, base = _read(data["base"])
    merged = {**base, **data}
    for key in ("scheduler", "host", "profile_run", "graphs"):
        if isinstance(base.get(key), dict) and isinstance(data.get(key), dict):
            merged[key] = {**base[key], **data[key]}
    return path.stem, merged


def _parse(path: Path) -> dict[str, Any]:
    hint = "give an engine file with keys such as base and host"
    data = read_json(path, hint) if path.suffix == ".json" else read_yaml(path, hint)
    if not isinstance(data, dict):
        raise InputError(f"{path} holds no mapping: give the keys {', '.join(sorted(_KEYS))}")
    for key in data:
        if key not in _KEYS:
            raise unknown(f"key in {path}", str(key), _KEYS)
        wanted, words = _KEYS[key]
        if not isinstance(data[key], wanted) or (isinstance(data[key], bool) and wanted is not bool):
            raise InputError(f"{path}: {key} {short(data[key])}: give {words}")
    if data.get("graph_sizes", "none") not in GRAPH_SIZES:
        raise unknown(f"graph_sizes in {path}", data["graph_sizes"], GRAPH_SIZES)
    for key, kind in (("scheduler", SchedulerSpec), ("host", HostOverhead), ("profile_run", ProfileRun)):
        for name in data[key] if isinstance(data.get(key), dict) else ():
            if name not in field_types(kind):
                raise unknown(f"key in {path}: {key}", str(name), field_types(kind))
        if isinstance(data.get(key), dict):
            left_open = _LEFT_OPEN.get(key, {}) | ({"name": path.stem} if key == "host" else {})
            values = {**left_open, **data[key]}
            if kind is HostOverhead:
                values.setdefault("source", "")
            build(kind, values, f"{path}: {key}")
    for tier in data.get("limits", ()):
        _check_tier(path, tier)
    for name, value in data.get("graphs", {}).items():
        if name not in _GRAPH_KEYS:
            raise unknown(f"key in {path}: graphs", str(name), _GRAPH_KEYS)
        kind_of, words = _GRAPH_KEYS[name]
        sizes = value.values() if isinstance(value, dict) else [value]
        wrong = any(kind_of in (int, dict) and not _is_graph_size(size) for size in sizes)
        if not isinstance(value, kind_of) or (isinstance(value, bool) and kind_of is not bool) or wrong:
            raise InputError(f"{path}: graphs {name} {short(value)}: give {words}")
    if (mode := data.get("graphs", {}).get("mode", GRAPH_MODES[0])) not in GRAPH_MODES:
        raise unknown(f"graphs mode in {path}", mode, GRAPH_MODES)
    if not 0 < data.get("gpu_memory_utilization", 0.9) <= 1:
        raise InputError(f"{path}: gpu_memory_utilization {data['gpu_memory_utilization']}: give a share such as 0.9")
    if not 0 <= data.get("reserve_gib", 0) < 1 << 20:
        raise InputError(f"{path}: reserve_gib {data['reserve_gib']}: give a number of GiB, 0 or more")
    return data


def _is_graph_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < MOST_GRAPH


def _check_tier(path: Path, tier: Any) -> None:
    """Raise InputError unless it is a tier of limits."""
    if not isinstance(tier, dict) or any(
        not isinstance(tier.get(usage), list)
        or len(tier[usage]) != 2
        or any(
            not isinstance(limit, int) or isinstance(limit, bool) or not 0 < limit < MOST_SEQUENCES
            for limit in tier[usage]
        )
        for usage in USAGES
    ):
        raise InputError(
            f"{path}: limits {tier!r}: give each tier server: [TOKENS, SEQUENCES] and offline: [TOKENS, SEQUENCES]"
        )
    for name, value in tier.items():
        if name not in ("least_memory_gib", "not_named", *USAGES):
            raise unknown(f"key in {path}: limits", str(name), ("least_memory_gib", "not_named", *USAGES))
        if name == "not_named" and not all(isinstance(part, str) for part in _listed(value)):
            raise InputError(f"{path}: limits not_named {value!r}: give a part of a device's name, or a list of them")
        if name == "least_memory_gib" and (not isinstance(value, int | float) or not 0 <= value < 1 << 20):
            raise InputError(f"{path}: limits least_memory_gib {value!r}: give a number of GiB")


def _host(name: str, own: Any, setting: str, device: DeviceSpec) -> tuple[str, HostOverhead]:
    """The host overhead that a setting selects, and the setting that selects the very same again."""
    if setting == "auto" and isinstance(own, dict):
        for key in _HOST_SECONDS:
            if key not in own:
                raise InputError(f"the host of the engine {name} lacks {key}: give seconds")
        return setting, build(HostOverhead, {"name": name, **own}, f"host of the engine {name}")
    if setting == "auto" and isinstance(own, str):
        return setting, catalog.host_overhead(own)
    measured = measured_host(device) if setting in ("auto", MEASURED) else None
    if measured is not None:
        return MEASURED, measured
    if setting == MEASURED:
        raise InputError(
            f"host_overhead 'measured': no calibration of {device.name} measured one: give the folder of a fitted "
            f"profile as the device, or one of auto, {', '.join(catalog.HOST_OVERHEADS)}"
        )
    host = catalog.host_overhead(_WINDTUNNEL_HOSTS[device.runs_on] if setting == "auto" else setting)
    return host.name, host


def _listed(value: str | Sequence[str]) -> Sequence[str]:
    return [value] if isinstance(value, str) else value


def _limits(
    name: str, tiers: list[dict[str, Any]], device: DeviceSpec, usage: str, max_model_len: int, given: Mapping[str, Any]
) -> dict[str, int]:
    """The token budget and sequences that the engine takes on a device: of the first tier that it belongs to.

    vLLM's rule (engine/arg_utils.py): at most as many tokens as the sequences can have, as many sequences as tokens.
    What was asked for is left as it is.
    """
    for tier in tiers:
        small = device.memory_bytes < tier.get("least_memory_gib", 0) * GIB
        if small or any(part in device.name.lower() for part in _listed(tier.get("not_named", ()))):
            continue
        tokens, sequences = tier[usage]
        if max_model_len:
            tokens = min(tokens, (given.get("max_num_seqs") or sequences) * max_model_len)
        return {
            "max_num_batched_tokens": tokens,
            "max_num_seqs": min(sequences, given.get("max_num_batched_tokens") or tokens),
        }
    if tiers:
        raise InputError(
            f"no limits of the engine {name} are for {device.name} ({device.memory_bytes / GIB:.0f} GiB): add a tier "
            f"without least_memory_gib"
        )
    return {}
