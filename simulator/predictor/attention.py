"""How long attention takes, learned from measurements of head configurations and kernels unlike those predicted.

A kernel's time is a sum of physical terms (launch, the longest loop over KV tiles, the work of all tiles over the
multiprocessors, bytes) that forests correct: `attention_model` has what both phases share. The terms follow
FlashAttention-2 (Dao 2023, section 3.2): a thread block computes a tile of query rows of one head and loops over the KV
in tiles; grouped-query decoding packs the heads of a group into a tile and splits the KV over thread blocks
(Flash-Decoding), multi-head decoding does neither. Beyond what was measured times rise with chunk, prefix, KV length
and batch; within, the trees' steps are small but not monotone.

    AttentionDecode(device).fit(rows).seconds({"batch_size": ..., "kv_tokens": ..., "num_heads": ..., ...})
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from engine.results.tables import Array
from engine.specs import DeviceSpec
from profiler.kinds import AttentionDecode as DecodeOperator
from profiler.kinds import AttentionPrefill as PrefillOperator
from simulator.predictor.attention_model import HEADS, WIDTH, AttentionModel, Columns, floats, held, larger, span
from simulator.predictor.grids import CHUNKS, KV_TOKENS, PREFIXES, REQUESTS
from simulator.predictor.kind import DecodeModel, PromptModel, Site, slower_clock

QUERY_TILE, KV_TILE = 128, 64  # rows and KV tokens of a FlashAttention-2 tile at head_dim 128
# A decode's time is the p-norm of reading (this many times that at the peak bandwidth) and of the rest. Fitted to the
# rows above 20 us that vLLM 0.14 was measured with on both H100 and H200: 3.0 % off these, 3.2 % off 0.19's (those of
# at least a block a multiprocessor), where all by the data sheets' bandwidths would be 27 and 26 % off.
READING, READING_NORM = 1.12, 3.0


class AttentionPrefill(AttentionModel[PrefillOperator], PromptModel[PrefillOperator]):
    """Prompts: `batch_size` requests that each compute `chunk` tokens after `prefix` cached ones, under a causal mask.

    A kernel that was measured without prefixes is taken to skip what the mask hides, as current ones do; of one with
    prefixes the measurements tell. One forest corrects the times of prompts without a prefix; a small second one says
    what a prefix changes beyond the terms, and is shared by the kernels.
    """

    kind: ClassVar[str] = "attention_prefill"
    columns: ClassVar[tuple[str, ...]] = ("batch_size", "chunk", "prefix", *HEADS)
    sizes: ClassVar[tuple[str, ...]] = ("batch_size", "chunk", "prefix")
    held_out: ClassVar[tuple[str, str]] = ("chunk", "chunk")
    launch_s: ClassVar[float] = 10e-6

    @classmethod
    def data_sheet(cls, op: PrefillOperator, site: Site, chunk: int, prefix: int) -> float:
        window = op.sliding_window
        flops: float = 4.0 * attended(chunk, prefix, window) * op.num_heads * op.head_dim
        kv_tokens = prefix + chunk if window is None else min(prefix + chunk, window + chunk)
        moved = chunk * op.num_heads * site.width + kv_tokens * op.num_kv_heads * site.kv_width
        traffic = 2.0 * moved * op.head_dim
        return op.count * max(flops / site.attention_flops, traffic / site.bandwidth)

    def times(self, op: PrefillOperator, site: Site, prompts: Array, chunks: Array, prefixes: Array) -> Array:
        window = op.sliding_window
        seen = prefixes if window is None else np.minimum(prefixes, window)
        columns = self.asked({**op.at(chunks, seen), "batch_size": prompts}, len(chunks), site)
        # between two iterations the KV leaves the cache, which measurements may have read it from
        least = self._roofline(floats({name: columns[name] for name in self.columns}))
        seconds: Array = op.count * np.maximum(self.seconds(columns), least)
        full = chunks * seen + chunks * (chunks + 1) / 2
        seconds *= attended(chunks, prefixes, window) / full  # within the chunk the window hides more
        return seconds

    def limits(self, operators: Sequence[PrefillOperator], site: Site) -> dict[str, int]:
        op = operators[0]  # those of all stages are alike
        chunks, prefixes = self._edges("chunk", CHUNKS), self._edges("prefix", PREFIXES)
        beside = [self._most(op, site, prefixes, batch_size=1, chunk=chunk, prefix=prefixes) for chunk in (1, 512)]
        return {"chunk": self._most(op, site, chunks, batch_size=1, chunk=chunks, prefix=0), "prefix": max(beside)}

    def seconds(self, columns: Columns) -> Array:
        """Predicted times. To a kernel that was measured without prefixes one adds at most what it adds to another."""
        predicted = super().seconds(columns)
        measured = [name for name, kernel in self.kernels_.items() if kernel["range"]["prefix"][1] > 0]
        asked = np.broadcast_to(columns.get("kernel", np.array(self.kernel or self.default_)), len(predicted))
        prefix = np.broadcast_to(np.asarray(columns["prefix"], float), len(predicted))
        capped = (prefix > 0) & ~np.isin(asked, measured)
        if not measured or not capped.any():
            return predicted
        like = np.full(len(predicted), measured[0])
        whole = {**columns, "prefix": np.zeros(len(predicted))}
        added = super().seconds({**columns, "kernel": like}) - super().seconds({**whole, "kernel": like})
        most = super().seconds({**whole, "kernel": asked}) + np.maximum(added, 0.0)
        return larger(np.where(capped, np.minimum(predicted, most), predicted), self._roofline(floats(columns)))

    def work(self, columns: Columns) -> tuple[Array, Array]:
        b, c, p, h, kv, d = (columns[name] for name in self.columns)
        return 4 * b * h * d * (c * p + c * (c + 1) / 2), 2 * d * b * (WIDTH * c * h + self.kv_width * (p + c) * kv)

    def _tiles(self, columns: Columns) -> tuple[Array, Array, Array, Array]:
        """Thread blocks; KV tiles of the longest one; KV tiles of all that the mask shows, and that it hides."""
        b, c, p, h, _, _ = (columns[name] for name in self.columns)
        rows = np.ceil(c / QUERY_TILE)
        blocks, longest = rows * b * h, np.ceil((p + c) / KV_TILE)
        hidden = blocks * (rows - 1) / 2 * (QUERY_TILE / KV_TILE)
        return blocks, longest, blocks * longest - hidden, hidden

    def terms(self, columns: Columns) -> Array:
        b, c, _, h, kv, d = (columns[name] for name in self.columns)
        blocks, longest, shown, hidden = self._tiles(columns)
        processors = self.device.num_sms
        tile = 4 * QUERY_TILE * KV_TILE * d * processors / self.device.peak_flops  # seconds of one on a multiprocessor
        new = (
            2 * b * c * (WIDTH * h + self.kv_width * kv) * d / self.device.memory_bandwidth
        )  # cached KV is read behind the arithmetic
        work = [longest * tile, shown / processors * tile, blocks / processors * tile, hidden / processors * tile]
        return np.stack([np.full(len(b), slower_clock(self.device)), new, *work], axis=1)

    def terms_of(self, columns: Columns) -> Array:
        usable = np.ones(6, dtype=bool)
        usable[5] = (columns["prefix"] > 0).any()  # without prefixes, hidden and shown work can't be told apart
        return usable

    def features(self, columns: Columns) -> Array:
        b, c, _, h, kv, _ = (columns[name] for name in self.columns)
        blocks, longest, shown, _ = self._tiles(columns)
        flops, traffic = self.work(columns)
        waves, roof = blocks / self.device.num_sms, self._roofline(columns)
        logs = [b, c, h, kv, h / kv, longest, shown, waves, longest / shown, roof, flops / traffic, b * h]
        filled = [waves / np.ceil(waves), c / (np.ceil(c / 128) * 128), c / (np.ceil(c / 64) * 64)]
        return np.stack([*(np.log2(values) for values in logs), *filled], axis=1)

    def extent(self, columns: Columns) -> dict[str, Array]:
        b, c, p = (columns[name] for name in self.sizes)
        return {"batch_size": b, "chunk": c, "prefix": p, "length": p + c, "tokens": b * c}

    def _correct(self, columns: Columns, residual: Array, kernels: Array, weights: Array) -> None:
        first, later = columns["prefix"] == 0, columns["prefix"] > 0
        if not first.any():
            first = np.ones(len(residual), dtype=bool)
        x = self._seen(_without_prefix(columns), kernels)
        self.forest_ = self._forest(x[first], residual[first], weights[first], self.leaves)
        if later.any():
            left = (residual - self.forest_.predict(x))[later]
            self.prefix_range_ = {size: span(columns[size][later]) for size in ("chunk", "prefix")}
            x = self._of_prefix(columns)[later]
            self.prefix_forest_ = self._forest(x, left, weights[later], self.prefix_leaves)

    def _of_prefix(self, columns: Columns) -> Array:
        """The second forest's input."""
        c, p = (held(columns[name], self.prefix_range_[name]) for name in ("chunk", "prefix"))
        rows = np.ceil(c / QUERY_TILE)
        logs = [c, p + 1, p + c, rows * (p + c)]
        return np.stack([*(np.log2(values) for values in logs), p / (p + c), c / (rows * QUERY_TILE)], axis=1)

    def _correction(self, columns: Columns, kernels: Array) -> Array:
        correction = super()._correction(_without_prefix(columns), kernels)
        if self.prefix_forest_ is not None:
            correction += np.where(columns["prefix"] > 0, self.prefix_forest_.predict(self._of_prefix(columns)), 0.0)
        return correction


class AttentionDecode(AttentionModel[DecodeOperator], DecodeModel[DecodeOperator]):
    """Decodes: `batch_size` requests of one new token each that attend to `kv_tokens` in all, their own included.

    Times rise with the KV length of a request at a given batch, and with the batch at a given length. They may fall
    with the batch at a given `kv_tokens`: multi-head kernels use a thread block a head, however long the KV.
    """

    kind: ClassVar[str] = "attention_decode"
    columns: ClassVar[tuple[str, ...]] = ("batch_size", "kv_tokens", *HEADS)
    sizes: ClassVar[tuple[str, ...]] = ("batch_size", "length")
    held_out: ClassVar[tuple[str, str]] = ("batch", "batch_size")
    launch_s: ClassVar[float] = 12e-6

    @classmethod
    def seen(cls, op: DecodeOperator, requests: Array, kv_tokens: Array) -> Array:
        return np.asarray(op.seen(requests, kv_tokens))

    @classmethod
    def straight(cls, op: DecodeOperator) -> bool:
        return not op.windowed_apart

    @classmethod
    def data_sheet(cls, op: DecodeOperator, site: Site) -> tuple[float, float]:
        """Each cached token is read once, and a request's query and output once."""
        kv_bytes = 2 * op.num_kv_heads * op.head_dim * site.kv_width
        kv_flops = 4 * op.num_heads * op.head_dim
        per_request = op.count * 2 * op.num_heads * op.head_dim * site.width / site.bandwidth
        return per_request, op.count * max(kv_bytes / site.bandwidth, kv_flops / site.attention_flops)

    def times(self, op: DecodeOperator, site: Site, requests: Array, kv_tokens: Array) -> Array:
        columns = self.asked(op.at(requests, kv_tokens), len(kv_tokens), site)
        numbers = floats({name: columns[name] for name in self.columns})
        seconds = larger(self.seconds(columns), self._roofline(numbers))  # as of prompts
        return np.asarray(op.count * self._by_memory(numbers, seconds, site.device))

    def _by_memory(self, columns: Columns, seconds: Array, device: DeviceSpec) -> Array:
        """Times on a device with like multiprocessors and another memory: only the share that is reading changes."""
        own, other = self.device.memory_bandwidth, device.memory_bandwidth
        if own == other:
            return seconds
        share = np.minimum(1.0, READING * self.work(columns)[1] / own / seconds) ** READING_NORM
        return np.asarray(seconds * (1 - share * (1 - (own / other) ** READING_NORM)) ** (1 / READING_NORM))

    def limits(self, operators: Sequence[DecodeOperator], site: Site) -> dict[str, int]:
        op = operators[0]  # those of all stages are alike
        requests, lengths = self._edges("batch_size", REQUESTS), self._edges("length", KV_TOKENS)
        batches = [self._most(op, site, requests, batch_size=requests, kv_tokens=each * requests) for each in (16, 512)]
        tokens = [
            count * self._most(op, site, lengths, batch_size=count, kv_tokens=count * lengths) for count in (1, 8, 64)
        ]
        return {
            "requests": max(batches),
            "kv_tokens": max(tokens),
            "length": self._most(op, site, lengths, batch_size=1, kv_tokens=lengths),
        }

    def work(self, columns: Columns) -> tuple[Array, Array]:
        b, kv_tokens, h, kv, d = (columns[name] for name in self.columns)
        return 4 * h * d * kv_tokens, 2 * d * (WIDTH * b * h + self.kv_width * kv_tokens * kv)

    def _shape(self, columns: Columns) -> tuple[Array, Array, Array, Array]:
        """KV tokens of a request; whether the KV is split; thread blocks before splitting; parts of a KV."""
        b, kv_tokens, h, kv, _ = (columns[name] for name in self.columns)
        length, blocks, split = np.maximum(1.0, kv_tokens / b), b * kv, h > kv
        parts = np.clip(self.device.num_sms / blocks, 1, np.maximum(1, np.ceil(length / KV_TILE) / 2))
        return length, split, blocks, np.where(split, parts, 1.0)

    def terms(self, columns: Columns) -> Array:
        b, kv_tokens, h, kv, d = (columns[name] for name in self.columns)
        length, split, blocks, parts = self._shape(columns)
        bandwidth, processors = self.device.memory_bandwidth, self.device.num_sms
        tile = (
            2 * self.kv_width * KV_TILE * d * processors / bandwidth
        )  # seconds to read one tile's share of the bandwidth
        tiles = np.ceil(length / KV_TILE)
        waves = np.ceil(blocks / processors)
        terms = [
            np.full(len(b), slower_clock(self.device)),
            2 * self.kv_width * d * kv_tokens * kv / bandwidth,
            ~split * tiles * tile,
            ~split * waves * tiles * tile,
            split * tiles / parts * tile,
            split * waves * tiles / parts * tile,
            2 * WIDTH * d * b * h / bandwidth,
            split * 4 * d * b * h * parts / bandwidth,  # partial results are combined in 32 bits
        ]
        return np.stack(terms, axis=1)

    def terms_of(self, columns: Columns) -> Array:
        return np.ones(8, dtype=bool)

    def features(self, columns: Columns) -> Array:
        b, _, h, kv, _ = (columns[name] for name in self.columns)
        length, split, blocks, _ = self._shape(columns)
        _, traffic = self.work(columns)
        processors = self.device.num_sms
        waves = np.ceil(blocks / processors)
        sequence = np.where(split, np.maximum(blocks * length / processors, 1), waves * length)
        work = blocks * np.ceil(length / 128) / processors
        logs = [b, length, h / kv, blocks, b * h, traffic, sequence, waves, np.ceil(length / 64), work]
        filled = [split, blocks / processors / waves, np.minimum(1, blocks / processors)]
        return np.stack([*(np.log2(values) for values in logs), *filled], axis=1)

    def extent(self, columns: Columns) -> dict[str, Array]:
        b, kv_tokens, _, kv, d = (columns[name] for name in self.columns)
        return {"batch_size": b, "length": kv_tokens / b, "kv_bytes": 2 * self.kv_width * kv_tokens * kv * d}

    def _clipped(self, columns: Columns, kernels: Array) -> dict[str, Array]:
        b = self._held("batch_size", columns["batch_size"], kernels)
        length = self._held("length", columns["kv_tokens"] / columns["batch_size"], kernels)
        return {**columns, "batch_size": b, "kv_tokens": b * length}


def attended(chunk: Any, prefix: Any, window: int | None) -> Any:
    """(query, key) pairs of `chunk` tokens over themselves and `prefix` cached ones, causal, perhaps in a window.

    Numbers or arrays, by plain arithmetic: it is asked for every prompt of every batch.
    """
    if window is None:
        return chunk * prefix + chunk * (chunk + 1) / 2
    full = prefix + chunk - window  # tokens that see a whole window: between none and all
    full = full * (full > 0)
    full = full - (full - chunk) * (full > chunk)
    rising = chunk - full  # tokens that see prefix+1, prefix+2, ...
    return full * window + rising * prefix + rising * (rising + 1) / 2


def _without_prefix(columns: Columns) -> dict[str, Array]:
    return {**columns, "prefix": np.zeros_like(columns["prefix"])}
