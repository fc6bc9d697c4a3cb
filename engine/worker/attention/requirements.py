"""What the backends that run on CUDA need, as reasons why they can't run."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import torch

from engine.worker.attention.base import AttentionShape


def cuda_reasons(shape: AttentionShape, capability: tuple[int, int] = (8, 0)) -> list[str]:
    """Why a 16-bit CUDA kernel for devices from `capability` on can't serve `shape`."""
    reasons = []
    if shape.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"it computes in float16 or bfloat16, not {str(shape.dtype).removeprefix('torch.')}")
    if shape.device.type != "cuda" or not torch.cuda.is_available():
        reasons.append("it needs a CUDA device")
    elif torch.cuda.get_device_capability(shape.device) < capability:
        reasons.append(f"it needs a device of compute capability {capability[0]}.{capability[1]} or more")
    return reasons


def package_reason(module: str, package: str) -> str | None:
    """Why a package can't be used. Imports it if it is there: one built for another torch fails at that."""
    if find_spec(module) is None:
        return f"the package {package} is not installed"
    try:
        import_module(module)
    except (ImportError, OSError) as error:
        return f"the package {package} can't be imported: {error}"
    return None
