"""The learned predictor: a stage's time as the sum of its operators' learned times, tabulated once per deployment.

Linear layers and everything else that depends on a number of rows alone become a table by that number; attention
becomes two grids, of chunk and prefix for prompts and of requests and cached tokens for decodes. All are made monotone
(more work never takes less time), for trees are not. A stage takes the longer of that sum and the host's time to launch
its layers, and the host time that is not hidden on top.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import zipfile
from bisect import bisect_right
from dataclasses import dataclass
from functools import cache
from math import ceil, inf
from pathlib import Path
from typing import Any

import numpy as np

from engine import specs
from engine.device_folder import folder_of, known_devices
from engine.errors import InputError
from engine.request import BatchShape
from engine.specs import DeviceSpec, HostOverhead, ModelSpec, NetworkSpec, ParallelSpec
from engine.tables import Array
from profiler import operators
from profiler.operators import Operator, inventory
from simulator.predictor import calibration as store
from simulator.predictor.attention import AttentionDecode, AttentionPrefill
from simulator.predictor.base import RuntimePredictor
from simulator.predictor.calibration import Calibration
from simulator.predictor.collectives import AllReduce, Send
from simulator.predictor.elementwise import Elementwise
from simulator.predictor.roofline import Roofline, attended

MOST_ROWS = 16384  # batch tokens that are tabulated; larger batches go on with the last row's time per token
MOST_REQUESTS = 1024
MOST_TOKENS = 1 << 22  # cached tokens of a decode batch
PREFIXES = np.unique(np.concatenate([[0], np.geomspace(64, 1 << 18, 33).round()]))
CHUNKS = np.unique(np.geomspace(1, 1 << 18, 61).round())
REQUESTS = np.unique(np.geomspace(1, MOST_REQUESTS, 41).round())
ROWS = np.unique(
    np.concatenate([np.arange(1, 513), np.arange(512, 2049, 8), np.arange(2048, MOST_ROWS + 1, 64)])
).astype(float)
KV_TOKENS = np.unique(np.concatenate([[1], np.geomspace(16, MOST_TOKENS, 61).round()]))
TABLES = ("tokens", "sampled", "prefill", "decode")
NO_HOST = HostOverhead(name="none", iteration_s=0.0, sequence_s=0.0, layer_s=0.0, source="the GPU alone")


@dataclass(frozen=True)
class StageTables:
    """Seconds of one stage. `tokens` (MOST_ROWS + 1,) and `sampled` (MOST_REQUESTS + 1,) by rows; `prefill` (chunks,
    prefixes); `decode` (MOST_REQUESTS + 1, kv tokens)."""

    tokens: Array
    sampled: Array
    prefill: Array
    decode: Array


class Learned(RuntimePredictor):
    """Times of one model under one parallel layout on a calibrated device."""

    def __init__(
        self,
        description: str,
        stages: list[StageTables],
        sends: list[Array],
        host: HostOverhead,
        layers: tuple[int, ...],
        ranks: int,
        limits: Limits,
    ) -> None:
        self.description = description
        self.limits = limits
        self.stages = [
            _Stage(tables, send, host, layers[i], ranks, i)
            for i, (tables, send) in enumerate(zip(stages, sends, strict=True))
        ]

    def stage_time(self, shape: BatchShape, stage: int) -> float:
        return self.stage_times(shape, stage, 1)[0]

    def stage_times(self, shape: BatchShape, stage: int, repeats: int) -> list[float]:
        return self.stages[stage].times(shape, repeats)

    def send_time(self, shape: BatchShape, stage: int) -> float:
        return _at(self.stages[stage].send, shape.num_tokens)

    def in_range(self, shape: BatchShape) -> bool:
        return self.limits.hold(shape)


@dataclass(frozen=True)
class Limits:
    """The largest batch that lies within what was measured; all 0 where some operator was not measured at all."""

    tokens: int
    chunk: int
    prefix: int
    requests: int
    kv_tokens: int
    length: int  # cached tokens of one decoding request

    def hold(self, shape: BatchShape) -> bool:
        tokens, decodes, kv, prefills, _, _ = shape
        if tokens > self.tokens or decodes > self.requests or kv > self.kv_tokens or kv > decodes * self.length:
            return False
        for chunk, prefix in prefills:  # noqa: SIM110 - asked for every batch, and all() is slow
            if chunk > self.chunk or prefix > self.prefix:
                return False
        return True


class _Stage:
    """One stage's tables as lists, and the look-ups."""

    def __init__(
        self, tables: StageTables, send: Array, host: HostOverhead, layers: int, ranks: int, stage: int
    ) -> None:
        self.tokens: list[float] = tables.tokens.tolist()
        self.sampled: list[float] = tables.sampled.tolist()
        self.prefill = tables.prefill
        self.prefill_rows: dict[int, list[Segment]] = {}
        self.decode = tables.decode
        self.decode_rows: dict[int, list[Segment]] = {}
        self.send: list[float] = send.tolist()
        # by the number of sequences: what the host adds is a straight line
        self.launch, self.added = host.times(layers, 0, ranks, stage)
        self.added_per_sequence = host.times(layers, 1, ranks, stage)[1] - self.added
        self.graph_decodes = host.graph_decodes

    def times(self, shape: BatchShape, repeats: int) -> list[float]:
        """Seconds of the batch and of its next repeats."""
        tokens, decodes, kv, prefills, sampled, growth = shape
        added = self.added + self.added_per_sequence * (decodes + len(prefills))
        if tokens <= MOST_ROWS and sampled <= MOST_REQUESTS:
            fixed = self.tokens[tokens] + self.sampled[sampled] + added
        else:
            fixed = _at(self.tokens, tokens) + _at(self.sampled, sampled) + added
        launch = added if not prefills and decodes <= self.graph_decodes else self.launch + added
        low = slope = start = 0.0
        if decodes:  # attention is linear in the cached tokens between the grid's points
            row = self.decode_rows.get(decodes) or self.decode_row(decodes)
            low, slope, start, end = row[bisect_right(_KV_STARTS, kv) - 1]
            if repeats > 1 and kv + (repeats - 1) * growth >= end:
                inside = ceil((end - kv) / growth)
                return self.times(shape, inside) + self.times(shape.after(inside), repeats - inside)
        if not prefills:
            if fixed + low >= launch:  # the GPU is the slower one from here on
                return [fixed + (low + slope * (kv + i * growth - start)) for i in range(repeats)]
            return [max(fixed + (low + slope * (kv + i * growth - start)), launch) for i in range(repeats)]
        times = []
        for i in range(repeats):
            seconds = fixed + (low + slope * (kv + i * growth - start))
            for chunk, prefix in prefills:
                seconds += self.prefill_time(chunk, prefix + i * chunk)
            times.append(seconds if seconds > launch else launch)
        return times

    def decode_row(self, requests: int) -> list[Segment]:
        """Attention of that many decodes, by their cached tokens."""
        row = self.decode_rows[requests] = _segments(self.decode[min(requests, MOST_REQUESTS)], KV_TOKENS)
        return row

    def prefill_time(self, chunk: int, prefix: int) -> float:
        """Attention of a prompt's chunk: bilinear between the grid's points."""
        row = self.prefill_rows.get(chunk)
        if row is None:
            i = min(int(np.searchsorted(CHUNKS, chunk, side="right")) - 1, len(CHUNKS) - 2)
            across = (chunk - CHUNKS[i]) / (CHUNKS[i + 1] - CHUNKS[i])
            values = self.prefill[i] + across * (self.prefill[i + 1] - self.prefill[i])
            row = self.prefill_rows[chunk] = _segments(values, PREFIXES)
        low, slope, start, _ = row[bisect_right(_PREFIX_STARTS, prefix) - 1]
        return low + slope * (prefix - start)


Segment = tuple[float, float, float, float]  # of a piecewise linear function: value at its start, slope, start, end


def _segments(values: Array, grid: Array) -> list[Segment]:
    """The segments between the points of a grid; the last goes on for ever."""
    slopes = np.diff(values) / np.diff(grid)
    ends = [*grid[1:-1].tolist(), inf]
    return list(zip(values[:-1].tolist(), slopes.tolist(), grid[:-1].tolist(), ends, strict=True))


_KV_STARTS: list[float] = KV_TOKENS[:-1].tolist()  # of the segments
_PREFIX_STARTS: list[float] = PREFIXES[:-1].tolist()


def _at(table: list[float], rows: int) -> float:
    """An entry of a table by rows; past its end the last entry, in proportion."""
    if rows < len(table):
        return table[rows]
    return table[-1] * rows / (len(table) - 1)


# -- making the tables ---------------------------------------------------------------------------------------------


def learned(
    model: ModelSpec, device: DeviceSpec, network: NetworkSpec, parallel: ParallelSpec, host: HostOverhead
) -> Learned:
    """The predictor of a deployment from the calibration that ships for its device.

    The tables are kept under a key made of the calibration's contents, this code and the arguments, in
    $WINDTUNNEL_CACHE_DIR or ~/.cache/windtunnel; a cache that can't be read or written costs time, nothing else. Raises
    InputError for a device without a calibration.
    """
    folder = folder_of(device)
    if folder is None:
        known = ", ".join(known_devices()) or "none"
        raise InputError(f"no calibration for device {device.name!r} (there are: {known}): use --predictor roofline")
    stages = range(parallel.pipeline_parallel_size)
    calibration = store.load(folder, device)
    learned_on = [model.device for model in calibration.models.values()]
    arguments = (
        model,
        device,
        network,
        parallel,
        host.attention_kernel,
        learned_on,
        store.fingerprint(folder),
        _code(),
    )
    path = _cache_folder() / f"{hashlib.sha256(repr(arguments).encode()).hexdigest()[:32]}.npz"
    maker = _Maker(calibration, model, device, network, parallel, host.attention_kernel)
    tables = _read(path, len(stages))
    if tables is None:
        tables = [maker.stage(stage) for stage in stages], [maker.sends(stage) for stage in stages]
        _write(path, *tables)
    return Learned(
        maker.describe(host),
        *tables,
        host,
        parallel.stage_layers(model.num_layers),
        parallel.world_size,
        maker.limits(),
    )


class _Maker:
    """Fills the tables of one deployment from a calibration; what it lacks, the roofline estimates."""

    def __init__(
        self,
        calibration: Calibration,
        model: ModelSpec,
        device: DeviceSpec,
        network: NetworkSpec,
        parallel: ParallelSpec,
        kernel: str | None = None,
    ) -> None:
        self.kernel = kernel  # of attention, where it was measured; else the one measured most
        self.models = calibration.models
        self.device = device
        self.network = network
        self.tp = parallel.tensor_parallel_size
        self.ranks_per_node = min(self.tp, network.gpus_per_node)
        self.window = model.sliding_window
        self.estimate = Roofline(model, device, network, parallel, NO_HOST)
        every = [inventory(model, parallel, stage) for stage in range(parallel.pipeline_parallel_size)]
        self.operators = [[part for op in stage for part in self.as_measured(op)] for stage in every]

    def as_measured(self, op: Operator) -> tuple[Operator, ...]:
        """An operator, or its parts where only these were measured."""
        model = self.models.get("elementwise")
        if not isinstance(model, Elementwise) or model.knows(op.name):
            return (op,)
        return op.parts if any(model.knows(part.name) for part in op.parts) else (op,)

    def stage(self, stage: int) -> StageTables:
        """The tables of one stage."""
        tokens, sampled = np.zeros(len(ROWS)), np.zeros(len(ROWS))
        for op in self.operators[stage]:
            if op.kind in ("gemm", "elementwise", "all_reduce"):
                seconds = self.by_rows(op, stage, ROWS)
                tokens += seconds if op.rows == "tokens" else 0.0
                sampled += seconds if op.rows == "sampled" else 0.0
        return StageTables(
            _spread(tokens, MOST_ROWS), _spread(sampled, MOST_REQUESTS), self.prefill(stage), self.decode(stage)
        )

    def by_rows(self, op: Operator, stage: int, rows: Array) -> Array:
        """Seconds of all runs of an operator, for each number of rows (at least 1)."""
        if not self.knows(op):
            return self.estimate.stages[stage].operator_times(op, rows)
        columns: dict[str, Any] = {
            "operator": op.name,
            "m": rows,
            "k": op.k,
            "n": op.n,
            "rows": rows,
            "bytes_per_row": op.bytes_per_row,
            "num_bytes": rows * op.bytes_per_row,
            "num_ranks": self.tp,
            "ranks_per_node": self.ranks_per_node,
            "network": self.network.name,
        }
        return op.count * self.ask(op.kind, columns, len(rows))

    def knows(self, op: Operator) -> bool:
        """Whether an operator's time is learned; collectives only over links like those that were measured."""
        model = self.models.get(op.kind)
        if isinstance(model, AllReduce):
            return self.network.name in model.networks_ and self.tp <= self.network.gpus_per_node
        if isinstance(model, Send):
            return self.network.name in model.networks_
        return model is not None

    def ask(self, kind: str, columns: dict[str, Any], count: int) -> Array:
        """A model's times; a column may be one value for all rows."""
        model = self.models[kind]
        asked = {name: np.broadcast_to(np.asarray(columns[name]), count) for name in model.columns}
        if isinstance(model, AttentionPrefill | AttentionDecode) and self.kernel in model.kernels_:
            asked["kernel"] = np.full(count, self.kernel)
        return model.seconds(asked)

    def prefill(self, stage: int) -> Array:
        """Attention of one prompt by (chunk, prefix)."""
        (op,) = [op for op in self.operators[stage] if op.kind == "attention_prefill"]
        chunks, prefixes = (grid.ravel() for grid in np.meshgrid(CHUNKS, PREFIXES, indexing="ij"))
        if op.kind in self.models:
            seen = prefixes if self.window is None else np.minimum(prefixes, self.window)
            heads = {"num_heads": op.num_heads, "num_kv_heads": op.num_kv_heads, "head_dim": op.head_dim}
            columns = {"batch_size": 1, "chunk": chunks, "prefix": seen, **heads}
            seconds = op.count * self.ask(op.kind, columns, len(chunks))
            full = chunks * seen + chunks * (chunks + 1) / 2
            seconds *= self.carried_over(op, full, chunks, seen + chunks)
            seconds *= attended(chunks, prefixes, self.window) / full  # within the chunk the window hides more
        else:
            one = self.estimate.stages[stage].prefill_time
            seconds = np.array([one(int(chunk), int(prefix)) for chunk, prefix in zip(chunks, prefixes, strict=True)])
        grid = seconds.reshape(len(CHUNKS), len(PREFIXES))
        return np.maximum.accumulate(np.maximum.accumulate(grid, axis=0), axis=1)

    def decode(self, stage: int) -> Array:
        """Attention of decodes by (number of requests from 0 on, cached tokens in all)."""
        (op,) = [op for op in self.operators[stage] if op.kind == "attention_decode"]
        requests, kv = (grid.ravel() for grid in np.meshgrid(REQUESTS, KV_TOKENS, indexing="ij"))
        kv = np.maximum(requests, kv)
        if op.kind in self.models:
            heads = {"num_heads": op.num_heads, "num_kv_heads": op.num_kv_heads, "head_dim": op.head_dim}
            seconds = op.count * self.ask(op.kind, {"batch_size": requests, "kv_tokens": kv, **heads}, len(kv))
            seconds *= self.carried_over(op, kv, requests, kv)
        else:
            parts = self.estimate.stages[stage]
            seconds = parts.decode_per_request * requests + parts.decode_per_kv_token * kv
        # along the cached tokens alone: the same tokens in fewer requests may well take longer
        grid = np.maximum.accumulate(seconds.reshape(len(REQUESTS), len(KV_TOKENS)), axis=1)
        every = np.arange(MOST_REQUESTS + 1)
        return np.stack([np.interp(every, REQUESTS, column) for column in grid.T], axis=1)

    def carried_over(self, op: Operator, attended: Array, tokens: Array, kv_tokens: Array) -> Array:
        """What to multiply the times of attention with that was learned on another device: the ratio of the rooflines.

        `attended` counts the (query, key) pairs, `tokens` the queries, `kv_tokens` the keys that are read.
        """
        learned_on = self.models[op.kind].device
        flops = 4.0 * attended * op.num_heads * op.head_dim
        traffic = 4.0 * (tokens * op.num_heads + kv_tokens * op.num_kv_heads) * op.head_dim

        def least(device: DeviceSpec) -> Array:
            seconds: Array = np.maximum(flops / device.peak_flops, traffic / device.memory_bandwidth)
            return seconds

        ratio: Array = least(self.device) / least(learned_on)
        return ratio

    def sends(self, stage: int) -> Array:
        """Seconds to send a batch to the next stage, by its tokens; 0 on the last."""
        op = next((op for op in self.operators[stage] if op.kind == "send"), None)
        if op is None:
            return np.zeros(MOST_ROWS + 1)
        num_bytes = ROWS * op.bytes_per_row
        if self.knows(op):
            spans = (stage + 1) * self.tp % self.network.gpus_per_node == 0  # the next stage begins on another node
            columns = {
                "num_bytes": num_bytes,
                "num_ranks": 2,
                "ranks_per_node": 1 if spans else 2,
                "network": self.network.name,
            }
            return _spread(self.ask("send", columns, len(ROWS)), MOST_ROWS)
        one = self.estimate.stages[stage].send_time
        return _spread(np.array([one(int(rows)) for rows in ROWS]), MOST_ROWS)

    def limits(self) -> Limits:
        """The largest batch of which every operator lies within what was measured."""
        if not all(self.knows(op) for stage in self.operators for op in stage):
            return Limits(0, 0, 0, 0, 0, 0)
        gemms = [op for stage in self.operators for op in stage if op.kind == "gemm" and op.rows == "tokens"]
        inside = np.ones(len(ROWS), dtype=bool)
        for op in gemms:
            columns = {"m": ROWS, "k": np.full(len(ROWS), op.k), "n": np.full(len(ROWS), op.n)}
            inside &= self.models["gemm"].in_range(columns)
        (prefill,) = [op for op in self.operators[0] if op.kind == "attention_prefill"]
        heads = {"num_heads": prefill.num_heads, "num_kv_heads": prefill.num_kv_heads, "head_dim": prefill.head_dim}

        def edges(kind: str, name: str, grid: Array) -> Array:
            """The grid, and where kernels' measurements begin and end."""
            model = self.models[kind]
            assert isinstance(model, AttentionPrefill | AttentionDecode)
            return np.union1d(grid, [edge for kernel in model.kernels_.values() for edge in kernel["range"][name]])

        def most(kind: str, sizes: Array, **columns: Any) -> int:
            full = {name: np.broadcast_to(np.asarray(value), len(sizes)) for name, value in (heads | columns).items()}
            model = self.models[kind]
            known = model.in_range({name: full[name] for name in model.columns})
            return int(sizes[known].max()) if known.any() else 0

        prompts, decodes = "attention_prefill", "attention_decode"
        chunks, prefixes = edges(prompts, "chunk", CHUNKS), edges(prompts, "prefix", PREFIXES)
        requests, lengths = edges(decodes, "batch_size", REQUESTS), edges(decodes, "length", KV_TOKENS)
        return Limits(
            tokens=int(ROWS[inside].max()) if inside.any() else 0,
            chunk=most(prompts, chunks, batch_size=1, chunk=chunks, prefix=0),
            prefix=max(most(prompts, prefixes, batch_size=1, chunk=chunk, prefix=prefixes) for chunk in (1, 512)),
            requests=max(
                most(decodes, requests, batch_size=requests, kv_tokens=length * requests) for length in (16, 512)
            ),
            kv_tokens=max(
                count * most(decodes, lengths, batch_size=count, kv_tokens=count * lengths) for count in (1, 8, 64)
            ),
            length=most(decodes, lengths, batch_size=1, kv_tokens=lengths),
        )

    def describe(self, host: HostOverhead) -> str:
        """One line for reports: what was measured, what was carried over or estimated."""
        text = f"calibrated on measurements of {self.device.name} ({self.network.name}, host overhead {host.name})"
        carried = {model.device.name for model in self.models.values()} - {self.device.name}
        if carried:
            text += f"; attention carried over from {', '.join(sorted(carried))}"
        lacking = sorted({op.kind for stage in self.operators for op in stage if not self.knows(op)})
        if lacking:
            text += f"; an estimate from the data sheet: {', '.join(kind.replace('_', ' ') for kind in lacking)}"
        return text


def _spread(values: Array, most: int) -> Array:
    """A table by every number of rows from 0 (0 s) to `most`, linear between ROWS and never falling."""
    table = np.interp(np.arange(most + 1), ROWS, np.maximum.accumulate(values))
    table[0] = 0.0
    return table


# -- keeping them --------------------------------------------------------------------------------------------------


def _cache_folder() -> Path:
    return Path(os.environ.get("WINDTUNNEL_CACHE_DIR") or Path.home() / ".cache" / "windtunnel")


@cache
def _code() -> str:
    """A hash of the code that makes the tables."""
    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(operators.__file__), Path(specs.__file__)]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


def _read(path: Path, stages: int) -> tuple[list[StageTables], list[Array]] | None:
    try:
        with np.load(path) as data:
            tables = [StageTables(*(data[f"{name}{i}"] for name in TABLES)) for i in range(stages)]
            return tables, [data[f"send{i}"] for i in range(stages)]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _write(path: Path, tables: list[StageTables], sends: list[Array]) -> None:
    arrays = {f"{name}{i}": getattr(table, name) for i, table in enumerate(tables) for name in TABLES}
    arrays |= {f"send{i}": send for i, send in enumerate(sends)}
    partial: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npz", delete=False) as file:
            partial = Path(file.name)
            np.savez_compressed(file, **arrays)
        partial.replace(path)
    except OSError:  # a home that can't be written to: the tables are made again next time
        if partial is not None:
            partial.unlink(missing_ok=True)
