"""The engine that a replica runs, as data: its host overhead, its attention kernel, and where both come from.

from engine.specs import catalog
print(preset("auto", catalog.device("cpu")))
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import InputError
from engine.specs import DeviceSpec, HostOverhead, catalog
from engine.specs.device_folder import measured_host

MEASURED = "measured"  # the setting that takes the host overhead of the device's own calibration
_WINDTUNNEL_HOSTS = {"cuda": "cuda_graphs", "cpu": "eager_cpu"}  # estimates, for devices whose host was not measured


@dataclass(frozen=True, kw_only=True)
class EnginePreset:
    """A named engine. `host_overhead` is the setting that selects `host`."""

    name: str
    host_overhead: str
    host: HostOverhead
    source: str  # where the numbers come from

    @property
    def attention_kernel(self) -> str | None:
        """The attention kernel it runs, by its name in a calibration; None: the one that was measured most."""
        return self.host.attention_kernel


def preset(host_overhead: str, device: DeviceSpec) -> EnginePreset:
    """Return the engine that a `host_overhead` setting selects on a device.

    "auto" is this engine with the host overhead that the device's calibration measured, else an estimate; "measured"
    insists on the measured one; a name in `catalog.HOST_OVERHEADS` selects that one, and the engine it was measured on.
    Raises InputError for an unknown name, and for "measured" where nothing was.
    """
    measured = measured_host(device) if host_overhead in ("auto", MEASURED) else None
    if measured is not None:
        return EnginePreset(name="windtunnel", host_overhead=MEASURED, host=measured, source=measured.source)
    if host_overhead == MEASURED:
        raise InputError(
            f"host_overhead 'measured': no calibration of {device.name} measured one: give the folder of a fitted "
            f"profile as the device, or one of auto, {', '.join(catalog.HOST_OVERHEADS)}"
        )
    host = catalog.host_overhead(_WINDTUNNEL_HOSTS[device.runs_on] if host_overhead == "auto" else host_overhead)
    name = "windtunnel" if host.name in _WINDTUNNEL_HOSTS.values() else host.name
    return EnginePreset(name=name, host_overhead=host.name, host=host, source=host.source)
