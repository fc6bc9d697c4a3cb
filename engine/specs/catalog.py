"""The models, devices, networks and host overheads that have a name, and their look-ups.

Models are the published configs in data/models.json, of Gemma 3 its text decoder; devices that nobody measured here are
in data/devices.json.

Names ignore case, and a model's organisation may be left out. Instead of a name, a look-up takes a file of the user's
own: for a model a Hugging Face folder or config.json, for a device or network a YAML file whose keys are the fields of
DeviceSpec or NetworkSpec. Data-sheet peaks are exact; efficiencies, link times and host times are estimates until a
calibration replaces them, and each `source` says what it rests on.

    python -c "from engine.specs import catalog; print(catalog.network('pairwise_nvlink', internode='infiniband_200g'))"
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from engine.documents import given_path, read_json, read_yaml
from engine.errors import InputError, unknown
from engine.specs import DeviceSpec, HostOverhead, Link, ModelSpec, NetworkSpec, hf_config
from engine.specs.checks import build

MOST_PATH = 4096
MIB, GIB = 1 << 20, 1 << 30
_CARDS = {"A100-SXM4-40GB": "a100_sxm_40gb", "A100-SXM": "a100_sxm", "A100 80GB PCIe": "a100_pcie"} | {
    **{"H100": "h100_sxm", "H200": "h200_sxm"},
    **{name: name.lower() for name in ("A40", "L40S", "L4")},
}  # NVIDIA's names
DATA = Path(__file__).parent / "data"
DEVICE_FILE = "device.json"  # in a calibration's folder: the DeviceSpec that was measured
Spec = TypeVar("Spec", DeviceSpec, NetworkSpec)


def _models() -> dict[str, ModelSpec]:
    """The models of data/models.json: of each the part of its published config.json that says its shape.

    One that is `like` another has that one's keys where it has none of its own.
    """
    data = json.loads((DATA / "models.json").read_text(encoding="utf-8"))

    def config(name: str) -> dict[str, Any]:
        own = dict(data[name])
        return {**config(own.pop("like")), **own} if "like" in own else own

    return {name: hf_config.read(config(name), name) for name in data}


MODELS = _models()

_SHEET = "NVIDIA data sheet for the peaks, CUDA's total for the memory; efficiencies are estimates"
_SUSTAINED = f"{_SHEET}; sustained rates as SemiAnalysis measured them on H100 and H200 (December 2024)"
DEVICES = {
    spec.name: spec
    for spec in (
        DeviceSpec(
            name="a100_pcie",
            description="NVIDIA A100 80GB PCIe",
            peak_flops=312e12,
            memory_bandwidth=1.935e12,
            memory_bytes=int(79.1 * GIB),
            clock_hz=1.41e9,
            cache_bytes=40 * MIB,
            matmul_efficiency=0.8,
            attention_efficiency=0.55,
            bandwidth_efficiency=0.85,
            network="pairwise_nvlink",
            source=_SHEET,
        ),
        DeviceSpec(
            name="a100_sxm",
            description="NVIDIA A100 80GB SXM4",
            peak_flops=312e12,
            memory_bandwidth=2.039e12,
            memory_bytes=int(79.1 * GIB),
            clock_hz=1.41e9,
            cache_bytes=40 * MIB,
            matmul_efficiency=0.8,
            attention_efficiency=0.55,
            bandwidth_efficiency=0.85,
            network="nvswitch_a100",
            source=_SHEET,
        ),
        DeviceSpec(
            name="a40",
            description="NVIDIA A40 48GB PCIe, ECC on",
            peak_flops=149.7e12,
            memory_bandwidth=0.696e12,
            memory_bytes=int(44.4 * GIB),
            num_sms=84,
            clock_hz=1.74e9,
            cache_bytes=6 * MIB,
            matmul_efficiency=0.7,
            attention_efficiency=0.5,
            bandwidth_efficiency=0.85,
            network="a40_measured",
            source=_SHEET,
        ),
        DeviceSpec(
            name="h100_sxm",
            description="NVIDIA H100 80GB SXM5",
            peak_flops=989e12,
            peak_fp8_flops=1979e12,
            sustained_flops=720e12,
            sustained_fp8_flops=1280e12,
            memory_bandwidth=3.35e12,
            memory_bytes=int(79.1 * GIB),
            num_sms=132,
            clock_hz=1.98e9,
            cache_bytes=50 * MIB,
            matmul_efficiency=0.7,
            attention_efficiency=0.55,
            bandwidth_efficiency=0.85,
            network="nvswitch_h100",
            source=_SUSTAINED,
        ),
        DeviceSpec(
            name="h200_sxm",
            description="NVIDIA H200 141GB SXM5",
            peak_flops=989e12,
            peak_fp8_flops=1979e12,
            sustained_flops=720e12,
            sustained_fp8_flops=1280e12,
            memory_bandwidth=4.8e12,
            memory_bytes=int(139.8 * GIB),
            num_sms=132,
            clock_hz=1.98e9,
            cache_bytes=50 * MIB,
            matmul_efficiency=0.7,
            attention_efficiency=0.55,
            bandwidth_efficiency=0.85,
            network="nvswitch_h100",
            source=_SUSTAINED,
        ),
        DeviceSpec(
            name="l4",
            description="NVIDIA L4 24GB PCIe",
            peak_flops=121e12,
            peak_fp8_flops=242e12,
            memory_bandwidth=0.3e12,
            memory_bytes=int(22.0 * GIB),
            num_sms=58,
            clock_hz=2.04e9,
            cache_bytes=48 * MIB,
            matmul_efficiency=0.6,
            attention_efficiency=0.45,
            bandwidth_efficiency=0.85,
            network="pcie",
            source=_SHEET + "; the 72 W limit keeps long matrix products well under the peak",
        ),
        DeviceSpec(
            name="l40s",
            description="NVIDIA L40S 48GB PCIe",
            peak_flops=362e12,
            peak_fp8_flops=733e12,
            memory_bandwidth=0.864e12,
            memory_bytes=int(44.4 * GIB),
            num_sms=142,
            clock_hz=2.52e9,
            cache_bytes=96 * MIB,
            matmul_efficiency=0.7,
            attention_efficiency=0.5,
            bandwidth_efficiency=0.85,
            network="pcie",
            source=_SHEET,
        ),
        DeviceSpec(
            name="cpu",
            description="a generic server CPU, 16 cores",
            peak_flops=1e12,
            memory_bandwidth=80e9,
            memory_bytes=64 * GIB,
            num_sms=1,
            matmul_efficiency=0.5,
            attention_efficiency=0.3,
            bandwidth_efficiency=0.6,
            network="shared_memory",
            source="an estimate throughout, to run the engine and its tests without a GPU",
        ),
    )
}
DEVICES["a100_sxm_40gb"] = replace(
    DEVICES["a100_sxm"],
    name="a100_sxm_40gb",
    description="NVIDIA A100 40GB SXM4",
    memory_bandwidth=1.555e12,
    memory_bytes=int(39.4 * GIB),
    measured_as="a100_sxm",
)
DEVICES |= {
    name: DeviceSpec(name=name, **values)
    for name, values in json.loads((DATA / "devices.json").read_text(encoding="utf-8")).items()
}
_DEVICE_ALIASES = {  # a100 as in the Sarathi-Serve paper
    "a100": "a100_pcie", "a100_sxm_80gb": "a100_sxm", "h100": "h100_sxm", "h200": "h200_sxm",
}  # fmt: skip
_SEVERAL_CARDS = {  # aliases that leave open which card is meant, and the others that may be
    "a100": "a100_sxm",
}

INTERNODES = {  # between nodes, per GPU and step of a collective; and where the numbers come from
    "ethernet_100g": (
        Link(30e-6, 10e9),
        "100 Gb/s = 12.5 GB/s line rate, 80% of it and 30 us are an estimate",
    ),
    "infiniband_200g": (
        Link(5e-6, 22e9),
        "200 Gb/s = 25 GB/s line rate, 5 us are an estimate; 20-22 GB/s in microsoft/vidur's all-reduce over two nodes",
    ),
}

_IB, _IB_SOURCE = INTERNODES["infiniband_200g"]
_ETHERNET, _ETHERNET_SOURCE = INTERNODES["ethernet_100g"]
NETWORKS = {
    spec.name: spec
    for spec in (
        NetworkSpec(
            name="nvswitch_a100",
            description="8 GPUs on NVSwitch, NVLink 3",
            gpus_per_node=8,
            node=Link(3e-6, 230e9),
            switched=True,
            internode=_IB,
            source="data sheet 300 GB/s per direction; an estimate of what NCCL attains, from published nccl-tests and "
            f"ai-dynamo/aiconfigurator's A100-SXM table (small messages 10 to 22 us on 2 to 8 GPUs); {_IB_SOURCE}",
        ),
        NetworkSpec(
            name="nvswitch_h100",
            description="8 GPUs on NVSwitch, NVLink 4",
            gpus_per_node=8,
            node=Link(3e-6, 360e9),
            switched=True,
            internode=_IB,
            source=f"data sheet 450 GB/s per direction, 80% and 3 us a step are an estimate; {_IB_SOURCE}",
        ),
        NetworkSpec(
            name="pairwise_nvlink",
            description="4 A100 PCIe, bridged two by two, over PCIe 4 x16 (Azure NC96ads v4)",
            gpus_per_node=4,
            pair=Link(10e-6, 190e9),
            node=Link(9e-6, 23.6e9),
            internode=_ETHERNET,
            source="data sheet 300 GB/s per direction and 32 GB/s PCIe; fitted to microsoft/vidur's all-reduce "
            f"measurements of 2 and 4 such GPUs; {_ETHERNET_SOURCE}",
        ),
        NetworkSpec(
            name="pairwise_nvlink_a40",
            description="8 A40, bridged two by two, over PCIe 4 x16",
            gpus_per_node=8,
            pair=Link(10e-6, 45e9),
            node=Link(10e-6, 20e9),
            internode=_ETHERNET,
            source="data sheet 56.25 GB/s per direction and 32 GB/s PCIe; what is attained of them is an estimate; "
            + _ETHERNET_SOURCE,
        ),
        NetworkSpec(
            name="a40_measured",
            description="8 A40 as microsoft/vidur measured them: no use of NVLink to be seen",
            gpus_per_node=8,
            node=Link(2.4e-6, 5.3e9),
            internode=Link(55e-6, 2.2e9),
            source="fitted to microsoft/vidur's all-reduce of 4 A40 (8 of them attain 1.7 GB/s), and its send between "
            "nodes",
        ),
        NetworkSpec(
            name="pcie",
            description="8 GPUs over PCIe 4 x16, no bridges",
            gpus_per_node=8,
            node=Link(10e-6, 20e9),
            internode=_ETHERNET,
            source=f"32 GB/s line rate, what is attained of it is an estimate; {_ETHERNET_SOURCE}",
        ),
        NetworkSpec(
            name="nvswitch_b200",
            description="8 GPUs on NVSwitch, NVLink 5",
            gpus_per_node=8,
            node=Link(3e-6, 720e9),
            internode=_IB,
            source=f"data sheet 900 GB/s per direction, 80% and 3 us a step are an estimate; {_IB_SOURCE}",
        ),
        NetworkSpec(
            name="infinity_fabric_mi300x",
            description="8 MI300X, each linked with each",
            gpus_per_node=8,
            node=Link(5e-6, 310e9),
            internode=_IB,
            source="data sheet 7 links of 64 GB/s per direction, what is attained of them is an estimate; "
            + _IB_SOURCE,
        ),
        NetworkSpec(
            name="pcie_gen5",
            description="8 GPUs over PCIe 5 x16, no bridges",
            gpus_per_node=8,
            node=Link(8e-6, 40e9),
            internode=_ETHERNET,
            source=f"64 GB/s line rate, what is attained of it is an estimate; {_ETHERNET_SOURCE}",
        ),
        NetworkSpec(
            name="shared_memory",
            description="processes on one CPU",
            gpus_per_node=64,
            node=Link(50e-6, 2e9),
            internode=_ETHERNET,
            source=f"an estimate; {_ETHERNET_SOURCE}",
        ),
    )
}

_LAUNCH_SOURCE = "per layer: what a40.csv took at TP1 to launch a model of one layer, its embedding and norm included"
HOST_OVERHEADS = {
    spec.name: spec
    for spec in (
        HostOverhead(
            name="cuda_graphs",
            iteration_s=0.5e-3,
            sequence_s=3e-6,
            layer_s=5e-6,
            source="an estimate, not measured: an engine of 2025, CUDA graphs replayed, scheduling while the GPU works",
        ),
        HostOverhead(
            name="eager_cpu",
            iteration_s=0.6e-3,
            sequence_s=8e-6,
            layer_s=0.0,
            source="an estimate for any CPU: rounded from one profile of this engine on one thread of an AMD EPYC (a "
            "Llama of 6 layers, batches of up to 16 sequences, one process); on a CPU launching is in the operators' "
            "times",
        ),
        HostOverhead(
            name="eager",
            iteration_s=0.971e-3,
            sequence_s=48.7e-6,
            layer_s=0.339e-3,
            source="fitted to microsoft/vidur's cpu_overheads: a100.csv at TP1, a Python engine in one process; a "
            f"replica of several GPUs is taken to cost no more; {_LAUNCH_SOURCE}",
        ),
        HostOverhead(
            name="sarathi_osdi24",
            attention_kernel="flash_attention/paged, blocks of 16 tokens",
            iteration_s=0.835e-3,
            sequence_s=69.5e-6,
            layer_s=0.339e-3,
            message_s=2.32e-3,
            lone_message=True,
            source="fitted to microsoft/vidur's cpu_overheads/a100_codellama34b_tp2.csv: the 2023-24 Python engine, "
            "Ray workers, all 48 layers, TP2, 8 to 128 sequences (a100.csv and a40.csv are of a later engine with "
            f"another scheduler, sampler and messages, cut to one layer); {_LAUNCH_SOURCE}. The whole model's "
            "execution, 28.9 ms at the least, bounds it to 0.602 ms and is no launch floor: its kernels alone take "
            "about as long. Its scripts start a Ray worker for one GPU too, which is taken to cost the message of two",
        ),
        HostOverhead(
            name="sarathi_osdi24_fig2",
            attention_kernel="flash_attention/paged, blocks of 16 tokens",
            iteration_s=16.7e-3,
            sequence_s=1.061e-3,
            layer_s=0.339e-3,
            message_s=2.32e-3,
            lone_message=True,
            source="sarathi_osdi24 with iteration_s and sequence_s fitted to the batch times of Figure 2 and Table 2 "
            "of the Sarathi-Serve paper (studies/published/fitted_host.py)",
        ),
    )
}


def is_name(kind: str, text: str) -> bool:
    """Whether `text` names a known "model", "device" or "network", rather than a file that describes one."""
    found = {
        "model": lambda: _find(MODELS, _short_names(), text),
        "device": lambda: _find(DEVICES, _DEVICE_ALIASES, text),
        "network": lambda: _find(NETWORKS, {}, text),
    }
    return found[kind]() is not None


def _short_names() -> dict[str, str]:
    """Model names without the part before the slash, where that is unambiguous."""
    short: dict[str, str] = {}
    for name in MODELS:
        key = name.split("/")[1].casefold()
        short[key] = name if key not in short else ""
    return short


_LATENT = re.compile(r"(?i)deepseek[-_.]?(v[23]|r1)(?!.*distill)|kimi[-_]k2")  # families whose attention is latent


def model(name_or_path: str) -> ModelSpec:
    """The model of that Hugging Face name, or of a folder or config.json; InputError if there is neither."""
    found = _find(MODELS, _short_names(), name_or_path)
    if found is None and _is_file(name_or_path, (".json",)):
        return hf_config.read(name_or_path)
    if found is None and _LATENT.search(name_or_path):
        raise InputError(
            f"{name_or_path} has multi-head latent attention (MLA), whose cache and kernels are not modelled: choose "
            "another model"
        )
    if found is None:
        short = (name.split("/")[1] for name in MODELS)
        error = unknown("model", name_or_path, MODELS if "/" in name_or_path else short)
        raise InputError(f"{error} (or give a folder with a config.json: here is none)")
    return MODELS[found]


def device(name_or_path: str) -> DeviceSpec:
    """The device of that name, of a YAML file with DeviceSpec's fields, or of a calibration's folder.

    `a100` is `a100_pcie`, `h100` is `h100_sxm`, `h200` is `h200_sxm`.
    """
    found = _find(DEVICES, _DEVICE_ALIASES, name_or_path)
    if found is None and len(name_or_path) < MOST_PATH and given_path(name_or_path).is_dir():
        return _of_calibration(given_path(name_or_path))
    if found is None and _is_file(name_or_path, (".yaml", ".yml")):
        return _from_yaml(DeviceSpec, name_or_path)
    if found is None:
        if name_or_path.casefold() in ("cuda", "gpu", "auto"):
            raise InputError(f"device {name_or_path!r} is not one: name the GPU, such as a100 or h100, or give cpu")
        raise unknown("device", name_or_path, (*DEVICES, *_DEVICE_ALIASES))
    return DEVICES[found]


def which_card(name: str) -> str:
    """Return which card and network a name means that leaves it open; "" for one that does not."""
    other = _SEVERAL_CARDS.get(name.casefold())
    if other is None:
        return ""
    spec = device(name)
    return (
        f"{name} is taken as {spec.name} ({spec.description}, on {spec.network}); "
        f"the other is {other} ({DEVICES[other].description}, on {DEVICES[other].network})"
    )


def device_of_hardware(hardware: str) -> str | None:
    """The device that a GPU's driver names so ("NVIDIA H200"); None for one that is not known."""
    for name, known in _CARDS.items():
        if re.search(rf"\b{re.escape(name)}", hardware):
            return known
    return None


def _of_calibration(folder: Path) -> DeviceSpec:
    """The device of a calibration's folder, to be predicted by it."""
    path = folder / DEVICE_FILE
    hint = f"make one with 'windtunnel calibrate fit --output-dir {folder}'"
    try:
        values = read_json(path, hint)
    except InputError as error:
        raise InputError(f"{folder} is no calibration ({str(error).removesuffix(f': {hint}')}): {hint}") from None
    return replace(build(DeviceSpec, values, str(path)), calibration=str(folder.resolve()))


def network(name_or_path: str, internode: str | None = None) -> NetworkSpec:
    """The network of that name, or of a YAML file with NetworkSpec's fields.

    `internode` (a name in INTERNODES) connects its nodes otherwise: `network("pairwise_nvlink", "infiniband_200g")`.
    """
    found = _find(NETWORKS, {}, name_or_path)
    if found is None and _is_file(name_or_path, (".yaml", ".yml")):
        spec = _from_yaml(NetworkSpec, name_or_path)
    elif found is None and name_or_path.casefold() in INTERNODES:
        raise InputError(f"network {name_or_path!r} connects nodes: give it as --internode-network")
    elif found is None:
        raise unknown("network", name_or_path, NETWORKS)
    else:
        spec = NETWORKS[found]
    if internode is None:
        return spec
    key = internode.casefold()
    if key not in INTERNODES:
        raise unknown("internode network", internode, INTERNODES)
    link, source = INTERNODES[key]
    return replace(spec, name=f"{spec.name}+{key}", internode=link, source=f"{spec.source}; between nodes: {source}")


def host_overhead(name: str) -> HostOverhead:
    """The host overhead of that name."""
    found = _find(HOST_OVERHEADS, {}, name)
    if found is None:
        raise unknown("host overhead", name, ("auto", "measured", *HOST_OVERHEADS))
    return HOST_OVERHEADS[found]


def _find(names: Iterable[str], aliases: Mapping[str, str], wanted: str) -> str | None:
    folded = {name.casefold(): name for name in names}
    key = wanted.casefold()
    return folded.get(key) or aliases.get(key) or None


def _is_file(text: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a path was meant: it is there, or looks like one, and then reading it says what is wrong."""
    try:
        there = Path(text).exists()
    except OSError:  # a name too long for one
        there = False
    return there or text.endswith(suffixes) or text.startswith(("/", "./", "../", "~"))


def _from_yaml(kind: type[Spec], path: str) -> Spec:
    values = read_yaml(given_path(path), f"give a YAML file with {kind.__name__}'s fields")
    if isinstance(values, dict):
        values.setdefault("name", Path(path).stem)
    return build(kind, values, path)
