"""What the commands that run the engine share: this machine's device and the specification of a replica's workers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from engine.documents import given_path
from engine.errors import InputError, unknown
from engine.replica_spec import ReplicaSpec
from engine.runtime.engine_spec import DECODE_GRAPHS, LOAD_FORMATS, EngineSpec
from engine.specs import DeviceSpec, catalog
from windtunnel.settings import EngineSettings

MOST_PORTS = (1 << 16) - 1
_SOME_GPU = replace(  # to generate takes any GPU: nothing is computed from this data sheet
    catalog.device("h100"), name="gpu", description="a GPU that was not named", source="a placeholder"
)


def engine_device(name: str) -> DeviceSpec:
    """Return the device of that name; "auto" is any GPU if the machine has one, else the CPU."""
    if name == "auto":
        return _SOME_GPU if Path("/dev/nvidiactl").exists() else catalog.device("cpu")
    return catalog.device(name)


def engine_spec(replica: ReplicaSpec, model: str, engine: EngineSettings, seed: int) -> EngineSpec:
    """Return the specification of the replica's workers; `model` is the setting that locates the weights.

    Raises InputError for an impossible setting.
    """
    if seed < 0:
        raise InputError(f"seed {seed}: give a whole number, 0 or more")
    port = engine.distributed_port
    if port is not None and not 1 <= port <= MOST_PORTS:
        raise InputError(f"distributed_port {port}: give 1 to {MOST_PORTS}")
    return EngineSpec.of(
        replica,
        folder=_weights(model, engine.load_format),
        attention_backend=engine.attention_backend,
        cuda_graphs=_graph_sizes(engine),
        seed=seed,
        port=port,
        interface=engine.distributed_interface,
    )


def _weights(model: str, load_format: str) -> Path | None:
    """Return the folder with a model's weights; None for random ones."""
    if load_format not in ("auto", *LOAD_FORMATS):
        raise unknown("load format", load_format, ("auto", *LOAD_FORMATS))
    if load_format == "dummy":
        return None
    folder = given_path(model)
    if catalog.is_name("model", model) and not folder.is_dir():
        raise InputError(
            f"model {model} has no weights on this machine: give a folder with its safetensors, or --load-format dummy"
        )
    return folder if folder.is_dir() else folder.parent


def _graph_sizes(engine: EngineSettings) -> tuple[int, ...]:
    if engine.enforce_eager:
        return ()
    if engine.cudagraph_capture_sizes is None:
        return DECODE_GRAPHS
    try:
        sizes = tuple(int(size) for size in str(engine.cudagraph_capture_sizes).split(","))
    except ValueError:
        sizes = (0,)
    if min(sizes) < 1:
        raise InputError(f"--cudagraph-capture-sizes {engine.cudagraph_capture_sizes!r}: give numbers such as 1,2,4,8")
    return sizes
