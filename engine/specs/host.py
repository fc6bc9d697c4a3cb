"""Host time of an iteration."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from engine.errors import InputError
from engine.specs.checks import check_fields, short

MOST_GRAPH = 1 << 20  # tokens

Shares = tuple[tuple[str, float], ...]  # by name; from a file a mapping


@dataclass(frozen=True, kw_only=True)
class HostOverhead:
    """Host time of one iteration: what it adds to the GPU's time, and the time to launch the layers' kernels.

    Launching overlaps with the GPU, so a stage takes max(GPU, launch) + added. Each stage launches its own layers; what
    is added is the engine's serial path (schedule, prepare inputs, sample, process outputs, messages) and is charged
    once an iteration, to the first stage. Where it is `hidden` a stage takes max(GPU, launch, added) + exposed_s.
    """

    name: str
    iteration_s: float  # added to every iteration
    sequence_s: float  # added for each sequence of the batch
    layer_s: float  # to launch one layer
    message_s: float = 0.0  # added where there are workers to wait for: a replica of two or more ranks, however many
    lone_message: bool = False  # whether a replica of one rank pays message_s too: its worker is a process of its own
    graph_decodes: int = 0  # batches of decodes alone, up to this many, are launched as one CUDA graph: no layer_s
    attention_kernel: str | None = None  # that such an engine runs, by its name in a calibration; None: the usual one
    kernels: str | None = None  # the version whose operators such an engine runs (vllm@0.14); None: the latest measured
    hidden: bool = False  # whether the host works beside the GPU (asynchronous scheduling)
    exposed_s: float = 0.0  # added to every iteration even so
    graph_sizes: tuple[int, ...] = ()  # of CUDA graphs: a batch of up to the largest many tokens is padded to the next
    # of the sampler on the GPU, which top-k and top-p make sort the logits; not hidden:
    sampler_s: float = 0.0  # for each entry of the vocabulary, however many rows: they are sorted side by side
    sampler_logit_s: float = 0.0  # for each entry of each row
    # before the scheduler sees a request (HTTP, tokenizer, messages between processes; simulated only):
    receive_s: float = 0.0  # one request after the other
    receive_token_s: float = 0.0  # for each token of its prompt, as well
    transit_s: float = 0.0  # beside others: the way there and that of a token back
    factors: Shares = ()  # of the GPU's time, by kind of operator (gemm) or population of it (gemm.fp8)
    margins: Shares = ()  # how far a field of seconds may be off (90 %), as a share of it, where that is known
    source: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "graph_sizes", tuple(self.graph_sizes))  # a list, where it comes from a file
        for name in ("factors", "margins"):
            object.__setattr__(self, name, _shares(name, getattr(self, name)))
        check_fields(
            self,
            "iteration_s sequence_s layer_s message_s graph_decodes exposed_s receive_s receive_token_s transit_s "
            "sampler_s sampler_logit_s",
            zero=True,
        )
        for size in self.graph_sizes:
            if not isinstance(size, int) or isinstance(size, bool) or not 0 < size < MOST_GRAPH:
                raise InputError(f"HostOverhead graph_sizes {short(size)}: give whole numbers of tokens")

    def factor(self, name: str) -> float:
        """Return the factor of a kind of operator, or of a population of it, whose own comes first."""
        of = dict(self.factors)
        return of.get(name, of.get(name.partition(".")[0], 1.0))

    def times(
        self, layers: int, sequences: int, ranks: int, stage: int = 0, in_graph: bool = False
    ) -> tuple[float, float]:
        """(launch, added) seconds of a batch of `sequences` on a pipeline `stage` that has `layers`.

        `ranks` are all those of the replica; a batch `in_graph` is launched as one CUDA graph. The stage takes
        max(GPU, launch) + added: what is hidden is in `launch`.
        """
        launch = 0.0 if in_graph else layers * self.layer_s
        if stage:
            return launch, 0.0
        serial = (
            self.iteration_s + self.sequence_s * sequences + (self.message_s if ranks > 1 or self.lone_message else 0.0)
        )
        return (max(launch, serial), self.exposed_s) if self.hidden else (launch, serial)

    def sampling(self, vocab_size: int, rows: Any) -> Any:
        """Seconds of the GPU to sample the next token of `rows` rows, one or more."""
        return vocab_size * (self.sampler_s + self.sampler_logit_s * rows)

    @property
    def receives(self) -> bool:
        """Whether a request takes time to reach the scheduler."""
        return self.receive_s > 0 or self.receive_token_s > 0 or self.transit_s > 0

    def padded(self, num_tokens: int) -> int:
        """Tokens that a batch is computed as, with the padding of its CUDA graph."""
        place = bisect_left(self.graph_sizes, num_tokens)
        return self.graph_sizes[place] if place < len(self.graph_sizes) else num_tokens


def _shares(field: str, value: Mapping[str, float] | Sequence[tuple[str, float]]) -> Shares:
    """Return shares by name, in order. Raises InputError unless each is a number above 0."""
    pairs = value.items() if isinstance(value, Mapping) else value
    try:
        found = tuple(sorted((str(name), float(share)) for name, share in pairs))
    except (TypeError, ValueError):
        raise InputError(f"HostOverhead {field}={value!r}: give a mapping of names to numbers") from None
    for name, share in found:
        if not 0 < share < inf:
            raise InputError(f"HostOverhead {field} {name}={share!r}: give a number above 0")
    return found
