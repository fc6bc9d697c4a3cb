"""What is served, on what, and how: frozen specs, plain data with the arithmetic that is about it.

Nothing here knows a measured number. Named instances are in `catalog`, the memory that a model takes in `memory`.
"""

from engine.specs.device import DeviceSpec
from engine.specs.host import HostOverhead
from engine.specs.model import DTYPE_BYTES, DTYPES, QUANTIZATIONS, ExpertsSpec, ModelSpec, RopeScaling
from engine.specs.network import Link, NetworkSpec
from engine.specs.parallel import ParallelSpec
from engine.specs.scheduler import SchedulerSpec

__all__ = [
    "DTYPES",
    "DTYPE_BYTES",
    "QUANTIZATIONS",
    "DeviceSpec",
    "ExpertsSpec",
    "HostOverhead",
    "Link",
    "ModelSpec",
    "NetworkSpec",
    "ParallelSpec",
    "RopeScaling",
    "SchedulerSpec",
]
