"""A published experiment as data: a YAML file in `studies/experiments` says what to run and what was found there.

The Sarathi-Serve paper (Agrawal et al., OSDI 2024) measured a 2023-24 Python engine on A100 and A40. Each file here is
one of its figures or tables: deployments (`setups`), `workloads`, `blocks` of points to compute and `claims`, each a
published number or order with its place in the paper. Nothing in a file is a result of ours.

    experiment = load("capacity")
    print(experiment.title, len(experiment.claims))
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from engine.errors import InputError, unknown
from engine.results.slo import SLO
from engine.scheduling.policies import POLICIES
from engine.specs import catalog

FOLDER = Path(__file__).with_name("experiments")
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


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Setup(_Strict):
    """A deployment without its scheduler."""

    model: str
    device: str
    network: str | None = None
    internode_network: str | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1


class Requests(_Strict):
    """A workload without its rate; longer requests than `max_model_len` tokens are dropped."""

    lengths: str
    max_model_len: int
    arrival: Literal["poisson", "static"] = "poisson"


class Scheduling(_Strict):
    """A scheduler; what is left out is the policy's own."""

    policy: str
    max_num_batched_tokens: int | None = None
    max_num_seqs: int = 128


class Block(_Strict):
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


class Claim(_Strict):
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


class Experiment(_Strict):
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


def names() -> list[str]:
    """The studies there are, in the order of the paper."""
    order = (
        "generation_stalls",
        "tail_latency",
        "operation_split",
        "piggybacking",
        "capacity",
        "iso_qps",
        "hybrid_parallelism",
        "chunking_overhead",
        "chunk_size_tradeoff",
        "scheduler_ablation",
    )
    there = {path.stem for path in FOLDER.glob("*.yaml")}
    return [name for name in order if name in there] + sorted(there - set(order))


def load(name: str) -> Experiment:
    """The study of that name."""
    if name not in names():
        raise unknown("study", name, names())
    return read(FOLDER / f"{name}.yaml")


def read(path: Path) -> Experiment:
    """The study in a YAML file; InputError says which key is wrong, and how."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"can't read the study {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {error}".replace("\n", " ")) from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no study: give the keys {', '.join(Experiment.model_fields)}")
    values = {key: value for key, value in values.items() if not key.startswith("_")}  # anchors to share
    try:
        experiment = Experiment.model_validate(values)
    except ValidationError as error:
        raise _in_words(error, path) from None
    try:
        _check(experiment)
    except InputError as error:
        raise InputError(f"{path.name}: {error}") from None
    return experiment


def _in_words(error: ValidationError, path: Path) -> InputError:
    """The first error, with the place in the file; a key that nothing has comes first, for another then lacks."""
    first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    place = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        sections: dict[str, type[_Strict]] = {
            "setups": Setup,
            "workloads": Requests,
            "blocks": Scheduling if "schedulers" in first["loc"] else Block,
            "claims": Claim,
        }
        kind = sections.get(str(first["loc"][0]), Experiment) if len(first["loc"]) > 1 else Experiment
        return unknown(f"key in {path.name}, {place}:", str(first["loc"][-1]), kind.model_fields)
    given = "" if first["type"] == "missing" else f" {first['input']!r}"
    return InputError(f"{path.name}: {place}{given}: {first['msg']}")


NEEDS: dict[str, tuple[str, ...]] = {  # the lists that a block of each task can't do without
    "search": ("workloads", "schedulers", "slos"),
    "run": ("workloads", "schedulers", "rates"),
    "prefill": ("prompts", "chunks"),
    "operators": (),
    "piggyback": ("batches", "chunks", "prompts"),
    "decode": ("batches",),
}


def _check(experiment: Experiment) -> None:
    """Raise InputError for a name that nothing has."""
    for setup in experiment.setups.values():
        catalog.model(setup.model)
        catalog.network(setup.network or catalog.device(setup.device).network, setup.internode_network)
    for i, block in enumerate(experiment.blocks):
        for name in block.setups:
            if name not in experiment.setups:
                raise unknown(f"setup in blocks.{i}", name, experiment.setups)
        for name in block.workloads:
            if name not in experiment.workloads:
                raise unknown(f"workload in blocks.{i}", name, experiment.workloads)
        for name in NEEDS[block.task]:
            if not getattr(block, name):
                raise InputError(f"blocks.{i}: a block of task {block.task!r} needs {name}")
        for scheduling in block.schedulers.values():
            if scheduling.policy not in POLICIES:
                raise unknown(f"policy in blocks.{i}", scheduling.policy, POLICIES)
        for text in [text for slos in block.slos.values() for text in slos]:
            SLO.parse(text)
    _check_claims(experiment)


def _check_claims(experiment: Experiment) -> None:
    from studies.experiments_points import expand

    known = {point.id: point.task for point in expand(experiment, PAPER_HOST)}
    for claim in experiment.claims:
        least = {"value": 1, "order": 2}.get(claim.compare, 2)
        pairs = claim.compare == "up_to" and len(claim.of) % 2 == 1
        if len(claim.of) < least or pairs or (claim.published is None) != (claim.compare == "order"):
            raise InputError(
                f"claim {claim.says!r}: {claim.compare} needs "
                + ("two values or more, and no published number" if claim.compare == "order" else
                   f"{least} value{'s' * (least > 1)} and a published number")
            )  # fmt: skip
        for each in claim.of:
            point, _, metric = each.rpartition(":")
            if point not in known:
                raise unknown(f"point in claim {claim.says!r}:", point, known)
            if metric not in METRICS[known[point]]:
                raise unknown(f"metric in claim {claim.says!r}:", metric, METRICS[known[point]])


def hosts(given: str | None) -> list[str]:
    """The host overheads to run on: the one that was asked for, else the paper's engine's and a modern one's."""
    return [PAPER_HOST, MODERN_HOST] if given is None else [catalog.host_overhead(given).name]


def reduced(experiment: Experiment, model: str | None, num_prompts: int | None) -> Experiment:
    """The study of the models alone whose name has `model` in it, with that many requests a run."""
    changed: dict[str, Any] = {}
    if num_prompts is not None and num_prompts < 2:
        raise InputError(f"--num-prompts {num_prompts}: give 2 or more")
    kept = [
        name
        for name, setup in experiment.setups.items()
        if model is None or model.casefold() in name.casefold() or model.casefold() in setup.model.casefold()
    ]
    if not kept:
        raise InputError(f"--model {model}: this study has {', '.join(experiment.setups)}")
    changed["blocks"] = [
        block.model_copy(
            update={
                "setups": [name for name in block.setups if name in kept],
                "num_prompts": num_prompts or block.num_prompts,
            }
        )
        for block in experiment.blocks
        if set(block.setups) & set(kept)
    ]
    return experiment.model_copy(update=changed)
