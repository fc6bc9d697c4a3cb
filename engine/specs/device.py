"""An accelerator by its data sheet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.errors import InputError
from engine.specs.checks import check_fields, file_name


@dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """An accelerator by its data sheet. The efficiencies are estimates: the share of the peak a good kernel attains."""

    name: str
    description: str
    peak_flops: float  # dense 16-bit FLOP/s, no sparsity
    memory_bandwidth: float  # bytes/s
    memory_bytes: int
    matmul_efficiency: float
    attention_efficiency: float
    bandwidth_efficiency: float
    network: str  # name of the NetworkSpec it usually comes with
    source: str  # where the numbers come from
    peak_fp8_flops: float | None = None  # dense FLOP/s; None: no such units, weights are widened to 16 bits
    sustained_flops: float | None = None  # of large 16-bit products over random numbers, measured; None: not known
    sustained_fp8_flops: float | None = None  # the same of 8-bit ones
    num_sms: int = 108  # streaming multiprocessors, over which a kernel's tiles are spread
    clock_hz: float = 1.98e9  # boost clock, in whose cycles a launch takes as long everywhere
    cache_bytes: int = 0  # of the last-level cache; 0: not known, and nothing is taken to stay in it
    measured_as: str | None = None  # the card whose calibration serves it, too: the same but for the memory
    calibration: str | None = None  # folder of its calibration; None: what ships under its name, if anything

    def __post_init__(self) -> None:
        file_name("device", self.name)
        check_fields(self, "peak_flops memory_bandwidth memory_bytes clock_hz")
        check_fields(self, "cache_bytes", zero=True)
        check_fields(self, "num_sms", most=1 << 16)
        for name in ("peak_fp8_flops", "sustained_flops", "sustained_fp8_flops"):
            if getattr(self, name) is not None:
                check_fields(self, name)
        for name in ("matmul_efficiency", "attention_efficiency", "bandwidth_efficiency"):
            check_fields(self, name)
            if getattr(self, name) > 1:
                raise InputError(f"device {self.name}: {name}={getattr(self, name)}: give a share between 0 and 1")

    @property
    def runs_on(self) -> Literal["cpu", "cuda"]:
        """Where the engine runs for this device."""
        return "cpu" if self.name == "cpu" else "cuda"
