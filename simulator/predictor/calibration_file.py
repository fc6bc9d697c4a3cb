"""What a file of a calibration has to hold, checked once, when it is read: types, ranges, and curves that rise.

What predicts from it takes it as it is. A kind that is not named here checks its own `model`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engine.errors import InputError
from engine.specs.checks import MOST_NUMBER, MOST_SECONDS, short

Size: TypeAlias = Annotated[float, Field(gt=0, le=MOST_NUMBER)]
Seconds: TypeAlias = Annotated[float, Field(gt=0, le=MOST_SECONDS)]
Factor: TypeAlias = Annotated[float, Field(ge=0, le=1e6)]
Share: TypeAlias = Annotated[float, Field(ge=0, le=MOST_NUMBER)]
Count: TypeAlias = Annotated[int, Field(ge=1, le=1 << 40)]
Range: TypeAlias = Annotated[list[Annotated[float, Field(ge=0, le=MOST_NUMBER)]], Field(min_length=2, max_length=2)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Curve(_Part):
    bytes: list[Size] = Field(min_length=1)
    seconds: list[Seconds] = Field(min_length=1)

    @model_validator(mode="after")
    def _rises(self) -> _Curve:
        if len(self.bytes) != len(self.seconds):
            raise ValueError("not as many bytes as seconds")
        if any(a >= b for a, b in pairwise(self.bytes)) or any(a > b for a, b in pairwise(self.seconds)):
            raise ValueError("a curve that falls")
        return self


class _LayoutCurve(_Curve):
    kernel: str
    network: str
    num_ranks: Count
    ranks_per_node: Count
    range_bytes: Range


class _Collective(_Part):
    kernel: str | None
    rows: dict[str, dict[str, int]]
    curves: list[_LayoutCurve] = Field(min_length=1)

    @model_validator(mode="after")
    def _kernels(self) -> _Collective:
        if strange := {curve.kernel for curve in self.curves} - set(self.rows):
            raise ValueError(f"no rows of the kernel {min(strange)}")
        return self


class _Elementwise(_Part):
    curves: dict[str, _Curve]
    range_bytes: dict[str, Range]
    pooled: _Curve


class _Base(_Part):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    launch_s: Seconds
    arithmetic: Factor
    traffic: Factor
    cache_rate: Size
    norm: Annotated[float, Field(gt=0, le=100)]
    tiled: Factor


class _ShapeCurve(_Part):
    k: Count
    n: Count
    log_m: list[float]
    log_ratio: list[Annotated[float, Field(ge=-50, le=50)]]

    @model_validator(mode="after")
    def _pairs(self) -> _ShapeCurve:
        if not self.log_m or len(self.log_m) != len(self.log_ratio):
            raise ValueError("not as many log_m as log_ratio")
        return self


class _Gemm(_Part):
    dtype: str
    limits: list[Range] = Field(min_length=3, max_length=3)
    base: _Base
    least: Factor
    forest: list[str]
    curves: list[_ShapeCurve] = []


class _Kernel(_Part):
    best: Annotated[float, Field(gt=0, le=1e6)]
    terms: list[Share] = Field(min_length=1)
    range: dict[str, Range]


class _Heads(_Part):
    num_heads: list[Count] = Field(min_length=1)
    num_kv_heads: list[Count] = Field(min_length=1)
    head_dim: list[Count] = Field(min_length=1)


class _Attention(_Part):
    kernel: str | None
    kv_width: Count
    default: str
    kernels: dict[str, _Kernel]
    heads: _Heads
    groups: Range
    forest: list[str]
    prefix_forest: list[str]
    prefix_range: dict[str, Range] = {}

    @model_validator(mode="after")
    def _known(self) -> _Attention:
        if self.default not in self.kernels:
            raise ValueError(f"the default {self.default!r} is none of the kernels")
        return self


class _Experts(_Part):
    forests: dict[str, list[str]]
    range: dict[str, dict[str, Range]]


class _Provenance(_Part):
    rows: int
    sources: list[str]
    software: list[str]
    doubtful: str | None = None
    prefixes: str | None = None


class _HeldOut(_Part):
    mape: Share
    p50: Share
    p95: Share
    bias: float


class _Band(_Part):
    up_to_s: Seconds
    low: Annotated[float, Field(gt=0, le=1e6)]
    high: Annotated[float, Field(gt=0, le=1e6)]


class _Interval(_Part):
    covers: Factor
    bands: list[_Band] = Field(min_length=1)


class _File(_Part):
    device: str
    learned_on: str
    provenance: _Provenance
    held_out: _HeldOut
    interval: _Interval
    model: dict[str, Any]


class _Host(_Part):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    held_out: str
    held_out_error: Share
    launch: str
    iterations: int


_MODELS: dict[str, type[_Part]] = {
    "gemm": _Gemm,
    "attention_prefill": _Attention,
    "attention_decode": _Attention,
    "elementwise": _Elementwise,
    "all_reduce": _Collective,
    "send": _Collective,
    "moe": _Experts,
}


def check_file(kind: str, data: Any, where: str) -> None:
    """Raise InputError unless `data` is what the file of a kind of operator holds; it names the key and the value."""
    try:
        _File.model_validate(data)
        if kind in _MODELS:
            _MODELS[kind].model_validate(data["model"])
    except ValidationError as error:
        raise _in_words(error, where) from None


def check_host(data: Any, where: str) -> None:
    """Raise InputError unless `data` is the rest of a `host.json`, beside its overhead."""
    try:
        _Host.model_validate(data)
    except ValidationError as error:
        raise _in_words(error, where) from None


def _in_words(error: ValidationError, where: str) -> InputError:
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"])) or "it"
    given = "" if first["type"] == "missing" else f" is {short(first['input'])}"
    return InputError(f"{where} is no calibration: {place}{given}: {first['msg']}: fit it again")
