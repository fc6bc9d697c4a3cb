"""The published experiments there are: YAML files in `studies/published/experiments`, read and checked.

experiment = load("capacity")
print(experiment.title, len(experiment.claims))

And the record of what each gave, as far as its claims are about it, which docs/studies.md is written from.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from engine.documents import read_json, read_yaml
from engine.errors import InputError, unknown
from engine.results.slo import SLO
from engine.scheduling.policies import POLICIES
from engine.specs import catalog
from engine.workload.workload import MOST_PROMPTS
from studies.published.experiment import CONTROLS, METRICS, MODERN_HOST, NEEDS, PAPER_HOST, SECTIONS, Experiment
from studies.published.judge import Records
from studies.published.points import expand

DIGITS = 5  # of a record
FOLDER = Path(__file__).with_name("experiments")
_ORDER = (  # of the paper
    "generation_stalls", "tail_latency", "batch_times", "operation_split", "piggybacking", "capacity", "iso_qps",
    "hybrid_parallelism", "chunking_overhead", "chunk_size_tradeoff", "scheduler_ablation",
)  # fmt: skip


def names() -> list[str]:
    """Return the names of the studies there are, in the order of the paper."""
    there = {path.stem for path in FOLDER.glob("*.yaml")}
    return [name for name in _ORDER if name in there] + sorted(there - set(_ORDER))


def load(name: str) -> Experiment:
    """Return the study of that name."""
    if name not in names():
        raise unknown("study", name, names())
    return read(FOLDER / f"{name}.yaml")


def read(path: Path) -> Experiment:
    """Read the study in a YAML file; InputError says which key is wrong, and how."""
    values = read_yaml(path, "give a study's file")
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no study: give the keys {', '.join(Experiment.model_fields)}")
    values = {key: value for key, value in values.items() if not str(key).startswith("_")}  # anchors to share
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
    """Word the first error, with its place in the file; an unknown key comes first, for another is then missing."""
    first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    place = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        above = reversed(first["loc"][:-1])
        kind = next((SECTIONS[part] for part in above if part in SECTIONS), Experiment)
        return unknown(f"key in {path.name}, {place}:", str(first["loc"][-1]), kind.model_fields)
    given = "" if first["type"] == "missing" else f" {first['input']!r}"
    return InputError(f"{path.name}: {place}{given}: {first['msg']}")


def _check(experiment: Experiment) -> None:
    """Raise InputError for a name that nothing has."""
    for setup in experiment.setups.values():
        catalog.model(setup.model)
        catalog.network(setup.network or catalog.device(setup.device).network, setup.internode_network)
    for i, block in enumerate(experiment.blocks):
        _check_names(block.setups, f"setup in blocks.{i}", experiment.setups)
        _check_names(block.workloads, f"workload in blocks.{i}", experiment.workloads)
        for name in NEEDS[block.task]:
            if not getattr(block, name):
                raise InputError(f"blocks.{i}: a block of task {block.task!r} needs {name}")
        _check_names([each.policy for each in block.schedulers.values()], f"policy in blocks.{i}", POLICIES)
        for text in [text for slos in block.slos.values() for text in slos]:
            SLO.parse(text)
    _check_claims(experiment)


def _check_claims(experiment: Experiment) -> None:
    known = {point.id: point.task for point in expand(experiment, PAPER_HOST)}
    for claim in experiment.claims:
        least = 1 if claim.compare == "value" else 2
        pairs = claim.compare == "up_to" and len(claim.of) % 2 == 1
        if len(claim.of) < least or pairs or (claim.published is None) != (claim.compare == "order"):
            needs = f"{least} value{'s' * (least > 1)} and a published number"
            if claim.compare == "order":
                needs = "two values or more, and no published number"
            raise InputError(f"claim {claim.says!r}: {claim.compare} needs {needs}")
        _check_values(claim.of, f"claim {claim.says!r}", known)
    _check_values(experiment.marks, "marks", known)


def _check_values(names: Iterable[str], where: str, known: dict[str, str]) -> None:
    for name in names:
        point, _, metric = name.rpartition(":")
        _check_names([point], f"point in {where}:", known)
        _check_names([metric], f"metric in {where}:", METRICS[known[point]])


def _check_names(names: Iterable[str], what: str, known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise unknown(what, name, known)


def hosts(given: str | None) -> list[str]:
    """Return what to run on: the host overhead asked for, else the paper's engine's, a modern one's and the controls.

    The controls are the fitted host overhead and the placebos.
    """
    return [PAPER_HOST, MODERN_HOST, *CONTROLS] if given is None else [catalog.host_overhead(given).name]


def reduced(experiment: Experiment, model: str | None, num_prompts: int | None) -> Experiment:
    """Return the study of only the models whose name has `model` in it, with that many requests a run."""
    if num_prompts is not None and not 2 <= num_prompts <= MOST_PROMPTS:
        raise InputError(f"--num-prompts {num_prompts}: give 2 to {MOST_PROMPTS:,}")
    kept = {
        name
        for name, setup in experiment.setups.items()
        if model is None or model.casefold() in f"{name}\n{setup.model}".casefold()
    }
    if not kept:
        raise InputError(f"--model {model}: this study has {', '.join(experiment.setups)}")
    blocks = []
    for block in experiment.blocks:
        if setups := [name for name in block.setups if name in kept]:
            changed = {"setups": setups, "num_prompts": num_prompts or block.num_prompts}
            blocks.append(block.model_copy(update=changed))
    return experiment.model_copy(update={"blocks": blocks})


def kept(experiment: Experiment, records: Mapping[str, Records], seeds: int) -> dict[str, Any]:
    """Return of a study what its section of the page needs: the values that claims are about, by host and point."""
    asked: dict[str, set[str]] = {}
    for claim in experiment.claims:
        for name in claim.of:
            point, _, metric = name.rpartition(":")
            asked.setdefault(point, set()).add(metric)
    return {
        "seeds": seeds,
        "records": {
            host: {point: _shortened(record, asked.get(point, set())) for point, record in found.items()
                   if point in asked or "fine_qps" in record}
            for host, found in records.items()
        },
    }  # fmt: skip


def _shortened(record: Mapping[str, Any], metrics: set[str]) -> dict[str, Any]:
    fine = {name: _digits(record[name]) for name in ("fine_qps", "coarse_qps") if name in record}
    wanted = metrics | ({"qps"} if fine else set())
    found = {}
    for part in ("values", "draws"):
        if part in record:
            found[part] = {name: _digits(value) for name, value in record[part].items() if name in wanted}
    return found | fine


def _digits(value: Any) -> Any:
    return list(map(_digits, value)) if isinstance(value, list) else float(f"{value:.{DIGITS}g}")


def read_record(path: Path) -> dict[str, Any]:
    """Read a record; an empty one where there is no file. Raises InputError for a file that is none."""
    if not path.exists():
        return {}
    found = read_json(path, "give another --record")
    if not isinstance(found, dict) or not all(isinstance(each, dict) and "records" in each for each in found.values()):
        raise InputError(f"{path} is no record of studies: give another --record")
    return found
