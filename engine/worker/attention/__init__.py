"""Attention backends by name, and which of them serves: the named one, or the best that can."""

from __future__ import annotations

from engine.errors import InputError, unknown
from engine.worker.attention.base import AttentionBackend, AttentionShape
from engine.worker.attention.flash_attn import FlashAttn
from engine.worker.attention.flashinfer import FlashInfer
from engine.worker.attention.sdpa import Sdpa
from engine.worker.attention.torch_varlen import TorchVarlen

BACKENDS: dict[str, type[AttentionBackend]] = {
    backend.name: backend for backend in (FlashAttn, FlashInfer, TorchVarlen, Sdpa)
}  # the best first; the last can serve anything


def select(name: str | None, shape: AttentionShape) -> AttentionBackend:
    """The backend called `name`; None: the best one for the shape. InputError if it is unknown or can't serve."""
    if name is None:
        return next(backend for backend in BACKENDS.values() if backend.unavailable(shape) is None)(shape)
    if name not in BACKENDS:
        raise unknown("attention backend", name, BACKENDS)
    reason = BACKENDS[name].unavailable(shape)
    if reason is not None:
        others = ", ".join(other for other, backend in BACKENDS.items() if backend.unavailable(shape) is None)
        raise InputError(f"attention backend {name} can't serve here: {reason}. Available: {others}")
    return BACKENDS[name](shape)
