"""`windtunnel engines`: the engine presets that ship, or what one of them decides for a model on a device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape

from engine.engine_preset import LATEST, EnginePreset, names, preset
from engine.replica_spec import SETTINGS, resolve
from engine.specs import ParallelSpec, catalog


def show(name: str | None, device_name: str, usage: str, model: str | None, tensor_parallel_size: int) -> None:
    """Print each preset (or the one of that name or file) with what it decides on a device, and its provenance.

    With a model, the settings are those of a replica of it, with its KV blocks.
    """
    device = catalog.device(device_name)
    console = Console(highlight=False, soft_wrap=True)
    what = f"{usage} on {device.name}" + (f", {model} with TP{tensor_parallel_size}" if model is not None else "")
    console.print(f"engine presets as a {what} (any setting of your own takes the place of theirs)")
    for each in names() if name is None else [name]:
        engine = preset(each, device, usage=usage)
        settings: dict[str, Any] = dict(engine.scheduler)
        more = {
            "gpu_memory_utilization": engine.gpu_memory_utilization,
            "async_scheduling": engine.async_scheduling,
        }
        if model is not None:
            parallel = ParallelSpec(tensor_parallel_size=tensor_parallel_size)
            replica = resolve(model, device, engine=each, usage=usage, parallel=parallel)
            engine = replica.engine
            settings = {"policy": replica.scheduler.policy}
            settings |= {key: value for key in SETTINGS if (value := getattr(replica.scheduler, key)) is not None}
            found = replica.describe("")
            more |= {"num_gpu_blocks": found["num_gpu_blocks"], "kv_cache_tokens": found["kv_cache_tokens"]}
        _print(console, engine, settings | more)
    latest = [each for each in names() if "@" in each]
    if name is None and latest:
        console.print(f"\n{latest[-1].partition('@')[0]}@{LATEST} is {latest[-1]}")


def _print(console: Console, engine: EnginePreset, settings: Mapping[str, Any]) -> None:
    console.print(f"\n{escape(engine.name)}: {escape(engine.description)}", style="bold")
    console.print("  " + ", ".join(f"{key} {value}" for key, value in settings.items()))
    host = engine.host
    how = "hidden behind the GPU" if host.hidden else "added"
    console.print(
        f"  host overhead {host.name}: {1e3 * host.iteration_s:.3g} ms an iteration and "
        f"{1e6 * host.sequence_s:.3g} us a sequence, {how}: {host.source}"
    )
    console.print(f"  CUDA graphs: {_graph_words(engine)}")
    console.print(f"  from: {engine.source}")


def _graph_words(engine: EnginePreset) -> str:
    if engine.graph_sizes == "none":
        return "batches are not padded"
    mode = {
        "full_and_piecewise": "full for decodes, piecewise for other batches",
        "full": "full, for decodes alone",
        "piecewise": "piecewise",
    }[engine.graph_mode]
    sizes = engine.host.graph_sizes
    top = f"{len(sizes)} sizes up to {sizes[-1]:,}" if sizes else f"sizes up to {engine.largest_graph:,}"
    limits = ", and of the limits themselves where they fit" if engine.graphs_of_limits else ""
    kept = f"; {engine.reserve_bytes / 2**30:.2f} GiB of each GPU kept for them" if engine.reserve_bytes else ""
    return f"{mode}; batches of {top} tokens are padded to the next{limits}{kept}"
