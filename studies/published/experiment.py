"""A published experiment as data: what to run, and what was found there.

The Sarathi-Serve paper (Agrawal et al., OSDI 2024) measured a 2023-24 Python engine on A100 and A40. Each file in
`studies/published/experiments` is one of its figures or tables: deployments (`setups`), `workloads`, `blocks` of points
to compute and `claims`, each a published number or order with its place in the paper. Nothing in a file is a result of
ours. `studies.published.library` reads them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

PAPER_HOST = "sarathi_osdi24"  # the host overhead of the engine that the paper measured, on that engine
FITTED_HOST = "sarathi_osdi24_fig2"  # the same with two constants fitted to Figure 2 and Table 2
MODERN_HOST = "cuda_graphs"  # and of an engine of today
ROOFLINE_PLACEBO = "placebo_roofline"  # the paper's engine with times from another GPU's data sheet
SHUFFLED_PLACEBO = "placebo_shuffled"  # and with the calibration's times dealt out to the wrong batches
PLACEBOS = (ROOFLINE_PLACEBO, SHUFFLED_PLACEBO)
HOSTS = {  # in words, in the order of pages
    PAPER_HOST: "the paper's engine",
    FITTED_HOST: "fitted to Figure 2",
    MODERN_HOST: "a modern engine",
    ROOFLINE_PLACEBO: "roofline of an H100",
    SHUFFLED_PLACEBO: "shuffled predictor",
}
CONTROLS = (FITTED_HOST, *PLACEBOS)  # run beside, at the first seed
SEEDS = 3

Task = Literal["search", "run", "prefill", "operators", "piggyback"]
Comparison = Literal["value", "ratio", "up_to", "order"]
Drawing = Literal[
    "capacity", "completions", "over_rate", "over_chunk", "over_batch", "chunking", "operators", "piggyback", "table"
]

TOLERANCE = 0.2  # share of a published number that ours may be off, the reading of a figure included

METRICS: dict[str, tuple[str, ...]] = {  # what a point of each task gives, and claims may be about
    "search": ("qps",),
    "run": ("p50_tbt", "p99_tbt", "p50_ttft", "p99_ttft", "throughput", "max_tbt", "duration"),
    "prefill": ("seconds",),
    "operators": ("linear", "attention", "communication", "other", "host", "total", "linear_per_token"),
    "piggyback": ("alone", "with_chunk", "with_prompt"),
}
NEEDS: dict[str, tuple[str, ...]] = {  # the lists that a block of each task can't do without
    "search": ("workloads", "schedulers", "slos"),
    "run": ("workloads", "schedulers", "rates"),
    "prefill": ("prompts", "chunks"),
    "operators": (),
    "piggyback": ("batches", "chunks", "prompts"),
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


class Scheduling(Strict):
    """A scheduler; what is left out is the policy's own."""

    policy: str
    max_num_batched_tokens: int | None = None
    max_num_seqs: int = 128


class Block(Strict):
    """Points to compute: every combination of the lists that its task has a use for.

    search: the capacity under each entry of `slos`; with `fine` also at a fine tolerance, for the first seed. run: a
    load at each of `rates` (requests/s, Poisson; `.inf`: all at once). Both end after `time_limit_s` of their own time,
    if that is given, with the requests that are finished by then. prefill: prompts whole and in chunks. operators: a
    whole prompt, a decode batch or, of `beside`, a prompt with so many decodes, by kind of operator. piggyback: decodes
    of `context` tokens alone, beside a chunk and beside a whole prompt.
    """

    task: Task
    setups: list[str]
    workloads: list[str] = []
    schedulers: dict[str, Scheduling] = {}
    slos: dict[str, list[str]] = {}
    rates: list[float] = []
    num_prompts: int = 1000
    time_limit_s: float | None = None
    fine: bool = False
    timeline: bool = False
    prompts: list[int] = []
    chunks: list[int] = []
    batches: list[int] = []
    beside: list[tuple[int, int]] = []
    context: int = 1024


class Claim(Strict):
    """Something published about values `POINT:METRIC`, to be looked for among ours.

    value: of[0] is `published`. ratio: of[0] / of[1] is. up_to: the largest of of[0] / of[1], of[2] / of[3], ... is.
    order: `of` is from highest to lowest. `reading` is the share that a number read off a figure may be off; `fitted`
    says that FITTED_HOST was fitted to it.
    """

    says: str
    source: str
    compare: Comparison
    of: list[str]
    published: float | None = None
    reading: float = 0.0
    fitted: bool = False


SECTIONS: dict[str, type[Strict]] = {  # what is under a key of a study's file
    "setups": Setup, "workloads": Requests, "blocks": Block, "schedulers": Scheduling, "claims": Claim,
}  # fmt: skip


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
    marks: dict[str, float] = {}  # values POINT:METRIC that a figure marks, and another study has the claim of
    choices: list[str] = []  # what the paper leaves open, and how it is settled here; no result of ours
