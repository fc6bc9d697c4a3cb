"""The text of docs/accuracy.md, from the records of the calibrations that ship.

windtunnel calibrate accuracy --output docs/accuracy.md
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from string import Template
from typing import Any

from engine.errors import InputError
from engine.results.files import write_whole
from engine.specs import catalog
from engine.specs.device_folder import CALIBRATIONS, known_devices
from simulator.predictor import calibration as store
from simulator.predictor.calibration import Calibration
from studies.calibration.kinds import page_of
from studies.words import error_cells, markdown_table, percent

GEMM_MEAN = {"a100_pcie": 0.035, "a40": 0.045}  # over models; what was aimed at
GEMM_WORST = 0.07
MEAN = {  # of calibrations by engine version: mean error over whole shapes, head configurations or message sizes
    **{"gemm": 0.04, "gemm l40s": 0.06, "gemm.fp8": 0.05, "gemm.fp8_block": 0.05, "all_reduce": 0.06},
    **dict.fromkeys(("attention_prefill", "attention_prefill.kv_fp8"), 0.05),
    **dict.fromkeys(("attention_decode", "attention_decode.kv_fp8"), 0.04),
}

PAGE = Path(__file__).with_suffix(".md")  # what the page says, with places for the numbers
COLD_START = Path(__file__).with_name("cold_start.json")  # written by benchmarks/cold_start.py
_COLD_KINDS = {  # of the record: what the page calls it, and what is aimed at
    "gemm": ("dense layers", 0.15),
    "attention_prefill": ("attention, prefill", 0.25),
    "attention_decode": ("attention, decode", 0.25),
    "all_reduce vllm_graph": ("all-reduce, vLLM", 0.3),
    "all_reduce nccl": ("all-reduce, NCCL", 0.3),
}


def write_accuracy(path: Path | None) -> None:
    """Write the text about the calibrations that ship, or print it."""
    if not known_devices():
        raise InputError(f"{CALIBRATIONS} holds no calibration: fit one with 'windtunnel calibrate fit'")
    text = accuracy_markdown(shipped())
    if path is None:
        print(text, end="")
    else:
        write_whole(path, text)


def shipped() -> list[Calibration]:
    """Return the calibrations that ship: of each device, and engine's version that it was measured under."""
    found = []
    for name, folder in known_devices().items():
        device, versions = catalog.device(name), sorted(store.by_nearness(folder, None), key=lambda path: path.name)
        for version in versions or [folder]:
            one = store.load(version, device)
            found.append(replace(one, software=dict.fromkeys(one.models, version.name)) if versions else one)
    return found


def _title(calibration: Calibration) -> str:
    versions = sorted(set(calibration.software.values()))
    return f"{calibration.device}{f', {versions[0]}' if versions else ''}"


def _kind_words(name: str) -> str:
    """Return what a page calls an estimator: its kind, and the population where it has several."""
    variant = {"kv_fp8": "fp8 KV cache"}.get(name.partition(".")[2], name.partition(".")[2])
    return f"{page_of(name).name}{f', {variant}' if variant else ''}"


def accuracy_markdown(calibrations: Sequence[Calibration]) -> str:
    """Return the page, from the records alone."""
    rows = [
        [device, _kind_words(kind), what, percent(value), percent(target), "met" if value <= target else "**missed**"]
        for device, kind, what, value, target in targets(calibrations)
    ]
    devices = [(f"### {_title(each)}", _kinds(each), *_notes(each)) for each in calibrations]
    text = Template(PAGE.read_text(encoding="utf-8")).substitute(
        targets=markdown_table(["device", "operator", "error", "held out", "target", ""], rows, left=3),
        devices="\n\n".join(part for parts in devices for part in parts),
        models="\n\n".join(_by_model(calibrations)),
        **_learners(calibrations),
        cold_start=_cold_start(),
        sources="\n\n".join(map(_provenance, calibrations)),
    )
    return "\n\n".join(map(_wrap, filter(None, text.strip().split("\n\n")))) + "\n"


def _cold_start() -> str:
    """The errors of estimates, each device left out in turn, from their record."""
    errors = json.loads(COLD_START.read_text(encoding="utf-8"))["errors"]

    def cell(kind: str, device: str) -> str:
        found = errors[kind].get(device)
        if found is None:
            return "-"
        return percent(found["mape"]) if found["mape"] <= _COLD_KINDS[kind][1] else f"**{percent(found['mape'])}**"

    rows = [[device, *(cell(kind, device) for kind in _COLD_KINDS)] for device in errors["gemm"]]
    aims = [f"at most {percent(aim)}" for _, aim in _COLD_KINDS.values()]
    return markdown_table(["left out", *(name for name, _ in _COLD_KINDS.values())], [*rows, ["*aimed at*", *aims]])


def targets(calibrations: Sequence[Calibration]) -> list[tuple[str, str, str, float, float]]:
    """Return device, kind, which error, its value and what was aimed at."""
    found: list[tuple[str, str, str, float | None, float]] = []
    for calibration in calibrations:
        device, title = calibration.device, _title(calibration)
        for kind, record in calibration.records.items():
            held_out = record["held_out"]
            groups = held_out.get("groups_over_20us", {})
            if calibration.software and (aim := MEAN.get(f"{kind} {device}", MEAN.get(kind))) is not None:
                found.append((title, kind, "mean", held_out.get("mape"), aim))
            elif kind == "gemm" and device in GEMM_MEAN:
                found.append((device, kind, "mean over models", groups.get("mean"), GEMM_MEAN[device]))
                found.append((device, kind, "worst model", groups.get("worst"), GEMM_WORST))
            elif (aim := page_of(kind).target) is not None and record["learned_on"] == device:
                found.append((device, kind, "mean", held_out.get("mape"), aim))
    return [(device, kind, what, value, target) for device, kind, what, value, target in found if value is not None]


def _kinds(calibration: Calibration) -> str:
    head = ["operator", "left out together", "rows", "folds", "mean", "P50", "P95", "bias", "over 20 us",
            "mean of groups", "worst group", "covered", "spread"]  # fmt: skip
    rows = []
    for kind, record in calibration.records.items():
        held_out = record["held_out"]
        groups = held_out.get("groups_over_20us", {})
        worst = f" ({groups['worst_is']})" if groups.get("worst_is") else ""
        rows.append([
            _kind_words(kind) + " \\*" * (record["learned_on"] != calibration.device),
            page_of(kind).left_out(record),
            f"{record['provenance']['rows']:,}",
            str(held_out.get("folds", "")),
            *error_cells(held_out),
            percent(held_out.get("over_20us", {}).get("mape")),
            percent(groups.get("mean")),
            percent(groups.get("worst")) + worst,
            percent(record["interval"]["covers"]),
            percent(record["provenance"]["median_relative_spread"]),
        ])  # fmt: skip
    return markdown_table(head, rows, left=2)


def _notes(calibration: Calibration) -> list[str]:
    """Return what the table does not say: what was carried over, and what is wide of the mark."""
    notes = []
    for device in sorted({record["learned_on"] for record in calibration.records.values()} - {calibration.device}):
        notes.append(
            f"\\* Measured on {device}, and the error is of predicting that card. Here its coefficients are carried "
            "over to this card's data sheet, which no measurement checks."
        )
    notes += [f"{warning}." for warning in calibration.warnings(calibration.records)]
    for kind, record in calibration.records.items():
        if rule := record["provenance"].get("prefixes"):
            notes.append(f"{_kind_words(kind)}: prefixes {rule}.")
        if record["learned_on"] == calibration.device and len(record["provenance"]["measured_on"]) > 1:
            names = " and ".join(record["provenance"]["measured_on"])
            notes.append(f"{_kind_words(kind)}: learned from measurements of {names} together, and so is the error.")
        covers, meant = record["interval"]["covers"], record["interval"]["meant_to_cover"]
        if covers < meant - 0.03:
            notes.append(
                f"{_kind_words(kind)}: the intervals cover {percent(covers)}, less than the {percent(meant)} that they "
                f"are meant to: they are too narrow for what was left out ({page_of(kind).left_out(record)})."
            )
    return notes


def _by_model(calibrations: Sequence[Calibration]) -> Iterable[str]:
    grouped = [(each, groups["each"]) for each in calibrations if (groups := _groups(each, "gemm")).get("each")]
    if not grouped:
        yield "No calibration was held out by few enough groups to list."
    for calibration, each in grouped:
        ordered = sorted(each.items(), key=lambda item: -item[1])
        heads = [f"left out, on {calibration.device}", "mean over 20 us"]
        yield markdown_table(heads, [[name, percent(value)] for name, value in ordered])
        fresh = _groups(calibration, "gemm", "held_out_new_shapes")
        if fresh.get("each"):
            worst = max(fresh["each"], key=lambda name: fresh["each"][name])
            yield (
                f"Models share weight shapes (half of CodeLlama-34b's are the 70B models' too, and those share "
                f"all theirs), so a model left out is partly known. With its shapes out of the fit too the mean is "
                f"{percent(fresh['mean'])}, the worst {percent(fresh['each'][worst])} ({worst}): what to expect of "
                f"a model unlike those measured, and what the intervals are made from."
            )


def _learners(calibrations: Sequence[Calibration]) -> dict[str, str]:
    means, picks = [], []
    for calibration in calibrations:
        groups, device = _groups(calibration, "gemm"), calibration.device
        if device in GEMM_MEAN and groups.get("mean") is not None:
            means.append(f"{percent(groups['mean'])} on {device}")
        if groups.get("worst") is not None:
            picks.append(f"{groups['worst_is']} is the worst on {device} with {percent(groups['worst'])}")
    ships = f" ({' and '.join(means)})" if means else ""
    return {"ships": ships, "picks": "; ".join(picks) or "no model was held out"}


def _groups(calibration: Calibration, kind: str, held_out: str = "held_out") -> Mapping[str, Any]:
    return dict(calibration.records.get(kind, {}).get(held_out, {}).get("groups_over_20us", {}))


def _provenance(calibration: Calibration) -> str:
    rows = []
    for kind, record in calibration.records.items():
        facts, count = record["provenance"], len(record["provenance"]["sources"])
        origins = sorted({re.split(r"[\s@]", source, maxsplit=1)[0] for source in facts["sources"]})  # repositories
        words = [", ".join(facts[name]) or "unknown" for name in ("measured_on", "software", "kernels", "dates")]
        rows.append([_kind_words(kind), *words, f"{', '.join(origins)} ({count} table{'s' * (count != 1)})"])
    table = markdown_table(["operator", "measured on", "software", "kernels", "dates", "source"], rows, left=6)
    return f"### Sources of {_title(calibration)}\n\n{table}"


def _wrap(text: str) -> str:
    """Wrap a paragraph; headings, tables and comments stay."""
    if text.startswith(("#", "|", "<")):
        return text
    joined = re.sub(r"(\d) (%|us)(?!\w)", "\\1\u00a0\\2", " ".join(text.split()))  # a number stays with its unit
    return textwrap.fill(joined, 120, break_long_words=False, break_on_hyphens=False).replace("\u00a0", " ")
