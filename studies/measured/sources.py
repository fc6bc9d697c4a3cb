"""What results files do not say of themselves, as data: `sources.json` (whose rows) and `clients.json` (sent how).

A source is a bundle of settings that its rows leave open: the engine and its limits, the client, and in words what had
to be assumed. A file of one's own (YAML) has the same keys, and flags win over both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from engine.documents import read_yaml
from engine.errors import InputError, unknown

_SETTINGS = {"engine", "usage", "max_model_len", "quantization", "num_gpu_blocks_override", "async_scheduling",
             "enable_prefix_caching", "gpu_memory_utilization", "max_num_batched_tokens", "max_num_seqs",
             "kv_cache_dtype"}  # fmt: skip


class Client(BaseModel, extra="forbid"):
    """How a load generator sends: a closed loop of `requests_per_user` x the concurrency."""

    description: str = ""
    source: str = ""
    requests_per_user: int = Field(10, ge=1, le=10_000)
    shortest: float = Field(1.0, gt=0, le=1)  # lengths are drawn from this share of the nominal one up to it
    warmup_requests: int = Field(0, ge=0)  # left out of its figures
    ramp_up_s: float = Field(0.0, ge=0, allow_inf_nan=False)
    statistic: Literal["mean", "median"] = "mean"


class Alternative(BaseModel, extra="forbid"):
    """What rows of a source might have had instead of what is assumed."""

    instead: str
    settings: dict[str, Any] = {}
    requests_per_user: int | None = Field(None, ge=1, le=10_000)
    first_wave_left_out: bool = False


class Source(BaseModel, extra="forbid"):
    """What a kind of results file leaves open."""

    description: str = ""
    format: str | None = None  # of the files it speaks of; None: any
    when: str | None = None  # of a format's rows those that have a value in this column
    engine: str | None = None
    usage: str | None = None
    device: str | None = None  # where the file's words leave it open
    cards: dict[str, str] = {}  # devices by names that leave open which card it is
    client: str = "vllm-bench"
    max_num_batched_tokens: int | str | None = None  # or "isl + concurrency"
    max_num_seqs: int | str | None = None  # or "concurrency"
    max_model_len: int | None = None
    async_scheduling: bool | None = None
    enable_prefix_caching: bool | None = None
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)
    quantization: str | None = None
    kv_cache_dtype: str | dict[str, str] | None = None  # or one for each device, where it is known
    num_gpu_blocks_override: int | None = None
    num_prompts_in_turn: int | None = Field(None, ge=1)
    warmup_requests: int | None = Field(None, ge=0)
    assumed: list[str] = []
    alternatives: list[Alternative] = []

    def settings(self, device: str, isl: int = 0, concurrency: int = 0) -> dict[str, Any]:
        """Return the settings of a replica that it decides, for a row of a device, input length and concurrency."""
        by_rule = {"isl + concurrency": isl + concurrency, "concurrency": concurrency}
        found = self.model_dump(include=_SETTINGS, exclude_none=True)
        for name in ("max_num_batched_tokens", "max_num_seqs"):
            if isinstance(value := found.get(name), str):
                if value not in by_rule:
                    raise unknown(f"rule for {name}", value, by_rule)
                found[name] = by_rule[value]
        if isinstance(self.kv_cache_dtype, dict):
            found["kv_cache_dtype"] = self.kv_cache_dtype.get(device)
        return {name: value for name, value in found.items() if value is not None}


def _shipped(what: str) -> dict[str, Any]:
    return dict(json.loads(Path(__file__).with_name(f"{what}.json").read_text(encoding="utf-8")))


def client(name: str) -> Client:
    """Return a client by its name. Raises InputError for an unknown one."""
    known = _shipped("clients")
    if name not in known:
        raise unknown("client", name, known)
    return Client(**known[name])


def sources() -> dict[str, Source]:
    """Return the sources that ship, by name."""
    return {name: Source(**data) for name, data in _shipped("sources").items()}


def source(name: str) -> Source:
    """Return a source by its name, or from a YAML file. Raises InputError for an unknown or broken one."""
    if not name.endswith((".yaml", ".yml", ".json")):
        known = sources()
        if name not in known:
            raise unknown("source", name, known)
        return known[name]
    try:
        data = read_yaml(Path(name), "give a YAML file of a source's keys")
        return Source.model_validate({} if data is None else data)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"source {name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def source_for(form: str, has: set[str]) -> tuple[str, Source] | None:
    """Return the source that ships for a row of a format, with its name; `has` are the columns that have a value."""
    fitting = [(name, each) for name, each in sources().items() if each.format == form]
    special = [pair for pair in fitting if pair[1].when in has]
    return next(iter(special or [pair for pair in fitting if pair[1].when is None]), None)
