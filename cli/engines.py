"""`windtunnel engines`: the engine presets that ship."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from engine.engine_preset import names, preset
from engine.specs import catalog


def show(device_name: str) -> None:
    """Print each preset with what it decides on a device, and its provenance."""
    device = catalog.device(device_name)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"engine presets, on {device.name} as a server (any setting of your own takes the place of theirs)")
    for name in names():
        engine = preset(name, device)
        console.print(f"\n{escape(name)}: {escape(engine.description)}", style="bold")
        settings = {**engine.scheduler, "gpu_memory_utilization": engine.gpu_memory_utilization}
        settings["async_scheduling"] = engine.async_scheduling
        console.print("  " + ", ".join(f"{key} {value}" for key, value in settings.items()))
        host = engine.host
        how = "hidden behind the GPU" if host.hidden else "added"
        console.print(
            f"  host overhead {host.name}: {1e3 * host.iteration_s:.3g} ms an iteration and "
            f"{1e6 * host.sequence_s:.3g} us a sequence, {how}: {host.source}"
        )
        console.print(f"  from: {engine.source}")
