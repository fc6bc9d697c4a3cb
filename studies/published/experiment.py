"""A published experiment as data: what to run, and what was found there.

The Sarathi-Serve paper (Agrawal et al., OSDI 2024) measured a 2023-24 Python engine on A100 and A40. Each file in
`studies/published/experiments` is one of its figures or tables: deployments (`setups`), `workloads`, `blocks` of points
to compute and `claims`, each a published number or order with its place in the paper. Nothing in a file is a result of
ours. `studies.published.library` reads them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

PAPER_HOST = "sarathi_osdi24"  # the host overhead of the engine that the paper measured
MODERN_HOST = "cuda_graphs"  # and of one of today

Task = Literal["search", "run", "prefill", "operators", "piggyback", "decode"]
Comparison = Literal["value", "ratio", "up_to", "order", "at_least", "at_most"]
Drawing = Literal[
    "capacity", "completions", "over_rate", "over_chunk", "parallelism", "chunking", "operators", "piggyback", "table"
]

METRICS: dict[str, tuple[str, ...]] = {  # what a point of each task gives, and claims may be about
    "search": ("qps",),
    "run": ("p50_tbt", "p99_tbt", "p50_ttft", "p99_ttft", "throughput", "max_tbt"),
    "prefill": ("seconds", "overhead"),
    "operators": ("linear", "attention", "communication", "other", "host", "total", "linear_per_token"),
    "piggyback": ("alone", "with_chunk", "with_prompt"),
    "decode": ("tbt",),
}
NEEDS: dict[str, tuple[str, ...]] = {  # the lists that a block of each task can't do without
    "search": ("workloads", "schedulers", "slos"),
    "run": ("workloads", "schedulers", "rates"),
    "prefill": ("prompts", "chunks"),
    "operators": (),
    "piggyback": ("batches", "chunks", "prompts"),
    "decode": ("batches",),
}


class Strict(BaseModel):
    """A part of a study's file, whose unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Setup(Strict):
    """A deployment without its scheduler."""

    model: str
    device: str
    network: str | None = None
    internode_network: str | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1


class Requests(Strict):
    """A workload without its rate; longer requests than `max_model_len` tokens are dropped."""

    lengths: str
    max_model_len: int
    arrival: Literal["poisson", "static"] = "poisson"


class Scheduling(Strict):
    """A scheduler; what is left out is the policy's own."""

    policy: str
    max_num_batched_tokens: int | None = None
    max_num_seqs: int = 128


class Block(Strict):
    """Points to compute: every combination of the lists that its task has a use for.

    search: the capacity under each entry of `slos`; with `exact` also at a fine tolerance. run: a load at each of
    `rates`, the median of `draws` draws of its requests. prefill: prompts whole and in chunks. operators: a prompt or a
    decode batch by kind of operator. piggyback: decodes of `context` tokens alone, beside a chunk and beside a whole
    prompt. decode: an iteration of decodes alone.
    """

    task: Task
    setups: list[str]
    workloads: list[str] = []
    schedulers: dict[str, Scheduling] = {}
    slos: dict[str, list[str]] = {}
    rates: list[float] = []
    num_prompts: int = 1000
    draws: int = 1
    exact: bool = False
    timeline: bool = False
    prompts: list[int] = []
    chunks: list[int] = []
    batches: list[int] = []
    context: int = 1024


class Claim(Strict):
    """Something published about values `POINT:METRIC`, to be looked for among ours.

    value: of[0] is `published`. ratio: of[0] / of[1] is. up_to: the largest of of[0] / of[1], of[2] / of[3], ... is.
    order: `of` is from highest to lowest. at_least, at_most: of[0] / of[1] is no less, no more, than `published`.
    """

    says: str
    source: str
    compare: Comparison
    of: list[str]
    published: float | None = None
    tolerance: float = 0.2  # share of the published number that ours may be off
    if_missed: str = ""  # what is known of why ours could differ; shown with the facts of the runs if it does


class Experiment(Strict):
    """A study: what it asks, what it runs, what was published."""

    title: str
    source: str
    shows: str
    drawing: Drawing
    setups: dict[str, Setup]
    workloads: dict[str, Requests] = {}
    blocks: list[Block]
    claims: list[Claim] = []
    choices: list[str] = []  # what the paper leaves open, and how it is settled here
