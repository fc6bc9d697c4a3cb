"""A plan's answer: its rows in the units of a bill, and in words what limits the best, what it beats, and by how much.

row = row_of(candidate, rate=40.0)
print(row["usd_per_hour"], limits(best), *against(best, second, 40.0))
"""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, inf, isfinite
from typing import Any

from engine.results.metric_table import METRICS
from engine.results.metrics import summary_key
from engine.results.slo import SLO
from studies.plan.planner import Candidate, Planner
from studies.words import dollars, number, percent, seconds

FULL = 0.95  # share of the KV cache from which it is taken to be full
HELD = {"holds": "met", "none": "missed", "dismissed": "costs more"}  # an outcome in a table: other names stay
_LAYOUT = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
LATENCIES = ("p50_ttft", "p99_ttft", "p50_tbt", "p99_tbt", "p50_e2e", "p99_e2e")


def row_of(candidate: Candidate, rate: float) -> dict[str, Any]:
    """Return a candidate as `--json` prints it: settings, fleet, prices in dollars, capacity in requests/s."""
    replica = candidate.replica
    prompt, output = candidate.bound["tokens"]
    per_million = 1e6 * candidate.usd_per_hour / (3600 * rate)
    own = ("engine", "max_num_batched_tokens", "max_num_seqs", "quantization")
    return {
        "device": replica["device"],
        **dict(zip(_LAYOUT, candidate.job["layout"], strict=True)),
        **{name: replica[name] for name in own},
        "replicas": candidate.count,
        "gpus": candidate.count * candidate.gpus,
        "usd_per_hour": candidate.usd_per_hour,
        "usd_per_million_output_tokens": per_million / output,
        "usd_per_million_total_tokens": per_million / (prompt + output),
        "capacity_per_replica": candidate.capacity(rate),
        "met": candidate.outcome == "holds",
        "provenance": replica["predictor"],
    }


def price_range(row: dict[str, Any], facts: dict[str, Any], what: str = "output") -> str:
    """Return dollars per million tokens ("output" or "total") by the range of a candidate's capacity, in words.

    Of what the load takes, not of whole replicas; "" where the candidate does not meet its SLOs.
    """
    if not row["met"]:
        return ""
    each = row[f"usd_per_million_{what}_tokens"] / row["usd_per_hour"]
    low, high = (dollars(inf if end is None else end * each) for end in facts["usd_range"])
    return f"{low} to {high}"


def layout_words(row: dict[str, Any]) -> str:
    """Return a replica in words: "4 x h100_sxm (TP4), 512 tokens a batch"."""
    tp, pp, dp = (row[name] for name in _LAYOUT)
    cut = f"TP{tp}" + f"-PP{pp}" * (pp > 1) + f"-DP{dp}" * (dp > 1)
    gpus = f"{tp * pp} \N{MULTIPLICATION SIGN} " if tp * pp > 1 else ""
    budget = row["max_num_batched_tokens"]
    tokens = "" if budget is None else f", {budget:,} tokens a batch"
    weights = "" if row["quantization"] == "none" else f", {row['quantization']}"
    return f"{gpus}{row['device']} ({cut}{weights}{tokens})"


def expected(candidate: Candidate) -> dict[str, float | None]:
    """Return the latencies (s) of the whole fleet at the target rate, by the names of LATENCIES."""
    summary = (candidate.whole or candidate.trial or {"summary": {}})["summary"]
    values = {name: summary.get(summary_key(*name.split("_"))) for name in LATENCIES}
    return {name: None if value is None else value / 1e3 for name, value in values.items()}


def headroom(candidate: Candidate, rate: float) -> float | None:
    """Return by what share the rate may rise until the fleet no longer holds, as expected; None if it is unknown."""
    if not candidate.draws or not candidate.replicas:
        return None
    return candidate.replicas * candidate.capacity(rate)[1] / rate - 1


def limits(candidate: Candidate) -> str:
    """Return what keeps a candidate from more load, in a sentence, with what to change."""
    trial, alone = candidate.whole or candidate.trial or candidate.alone, candidate.alone
    if candidate.outcome != "holds" and alone is not None:
        margin = alone["margin"]
        if margin is None or margin > 1:
            times = "" if margin is None else f", {number(margin)} times over"
            return (
                f"{alone['binding_slo']} is missed even by requests that are alone{times}: a faster GPU, more tensor "
                "parallelism or a looser SLO is needed."
            )
    draw = candidate.draws.get(0) or {}
    binding = draw.get("binding_slo") or (trial or {}).get("binding_slo")
    if binding is None:
        return "Nothing was seen to limit it."
    slo = SLO.parse(binding)
    name = METRICS[slo.metric].name
    missed = [each for each in draw.get("trials", ()) if not each["holds"]]
    beyond: dict[str, Any] = min(missed, key=lambda each: each["rate"], default={})
    summary = {**(trial or {}).get("summary", {}), **beyond.get("summary", {})}
    seats, budget = candidate.replica["max_num_seqs"], candidate.replica["max_num_batched_tokens"]
    full_s = candidate.batch.get("full_s", 0.0)
    cache = summary.get("peak_kv_utilization") or 0.0
    outgrown = beyond.get("met")  # every SLO, but its queue grows
    if slo.metric in ("tbt", "tpot") and not outgrown:
        if budget and full_s > 0.5 * slo.threshold_s:
            return (
                f"{name} by the chunk ({binding}): one {budget:,}-token batch takes {seconds(full_s)}; lower the "
                "budget (--max-num-batched-tokens) for shorter gaps."
            )
        return (
            f"{name} by the decodes ({binding}): batches get longer with the requests that run together; lower "
            "--max-num-seqs or raise --tensor-parallel-size."
        )
    if cache > FULL or summary.get("preemptions"):
        lost = f", with {summary['preemptions']:,} preemptions" if summary.get("preemptions") else ""
        return (
            f"The KV cache ({binding}): at most {percent(cache)} of it is used{lost}, so requests wait for blocks; "
            "--kv-cache-dtype fp8, quantised weights or more GPUs a replica make room."
        )
    busy = summary.get("steady_utilization")
    if outgrown:
        return (
            f"Throughput: with {number(beyond['rate'])} requests/s a replica the queue grows, though no SLO is missed "
            f"at once (GPUs {percent(busy or 0.0)} busy); more replicas, a larger budget or a faster GPU carry more."
        )
    where = f" with the GPUs {percent(busy)} busy" if busy else ""
    return (
        f"{name} by queueing ({binding}): beyond the capacity prompts wait for their turn{where}; a larger token "
        f"budget or more replicas shorten the queue (at most {seats:,} requests run at once)."
    )


def against(best: Candidate, other: Candidate, rate: float) -> list[str]:
    """Return how a runner-up compares: its price, whether they can be told apart, and what would change the choice."""
    row = row_of(other, rate)
    more = other.usd_per_hour / best.usd_per_hour - 1
    fleet = f"{_count(row['replicas'], 'replica')} of {layout_words(row)}"
    usd = f"${number(row['usd_per_hour'])}/h ({percent(more, sign=True)})"
    words = [f"Runner-up: {fleet}, {_count(row['gpus'], 'GPU')}, {usd}."]
    (low, high), (other_low, other_high) = best.usd_range(rate), other.usd_range(rate)
    if 0 in other.draws and other_low <= high and low <= other_high:
        words.append(
            f"The two can't be told apart: their prices for this load overlap (${number(low)} to {dollars(high)}/h and "
            f"${number(other_low)} to {dollars(other_high)}/h)."
        )
    if other.device != best.device:
        even = best.usd_per_hour / row["gpus"]
        words.append(
            f"It would be the cheaper one below ${number(even)} per {other.device}-hour (now "
            f"${number(other.usd_per_gpu_hour)})."
        )
    elif more <= 0:
        words.append("It costs the same, and comes nearer to its SLOs at this load.")
    else:
        fewer = floor(best.usd_per_hour / other.usd_per_replica * (1 + 1e-9)) // other.step * other.step
        if other.step <= fewer < other.count:
            each = f"{number(rate / fewer)} requests/s each"
            words.append(f"It would have to hold with {fewer} replica{'s' * (fewer > 1)}, {each}.")
    return words


def elsewhere(best: Candidate, second: Candidate | None, known: Sequence[Candidate]) -> list[str]:
    """Return the GPU prices above which devices other than the best's and the runner-up's can't win."""
    words = []
    told = {best.device, "" if second is None else second.device}
    for device in dict.fromkeys(each.device for each in known if each.device not in told):
        mine = [each for each in known if each.device == device]
        if held := [each for each in mine if each.outcome == "holds"]:
            least = min(held, key=lambda each: each.usd_per_hour)
            gpus = least.count * least.gpus
            says = f"at ${number(least.usd_per_hour)}/h; it would be the cheaper one below"
        elif dismissed := [each for each in mine if each.outcome == "dismissed"]:
            least = min(dismissed, key=lambda each: each.fewest_usd)
            gpus = least.fewest * least.gpus
            says = "or more, so it can only win below"
        else:
            continue
        words.append(
            f"{device}: {_count(gpus, 'GPU')} {says} ${number(best.usd_per_hour / gpus)} per GPU-hour "
            f"(now ${number(least.usd_per_gpu_hour)})."
        )
    return words


def _count(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'s' * (count != 1)}"


def summary_of(planner: Planner) -> dict[str, Any]:
    """Return a plan as `plan.json` holds it. Needs a candidate that is not refused."""
    best, rate = planner.best, planner.rate
    assert best is not None
    known = [each for each in planner.candidates if each.bound]
    others = [each for each in known if each is not best]
    ranked = sorted(others, key=lambda each: (each.outcome != "holds", each.usd_per_hour))
    second = planner.runner_up
    prompt, _ = best.bound["tokens"]
    words = [limits(best), *(against(best, second, rate) if second is not None else [])]
    words += elsewhere(best, second, known) if best.outcome == "holds" else []
    return {
        "rate": rate,
        "best": row_of(best, rate),
        "candidates": [row_of(each, rate) for each in (best, *ranked)],
        "facts": [_facts(each, rate) for each in (best, *ranked)],
        "usd_per_million_input_tokens": 1e6 * best.usd_per_hour / (3600 * rate * prompt),
        "expected": expected(best),
        "headroom": headroom(best, rate),
        "fleet": best.whole or best.trial or best.alone,
        "batch": best.batch,
        "curve": best.curve,
        "words": words,
        "refused": planner.failed,
        "notes": best.bound["notes"],
    }


def _facts(candidate: Candidate, rate: float) -> dict[str, Any]:
    """Return what the page shows of a candidate beside its row."""
    return {
        "name": candidate.name,
        "outcome": candidate.outcome,
        "why": candidate.why,
        "usd_per_gpu_hour": candidate.usd_per_gpu_hour,
        "tokens_per_arrival": candidate.bound["tokens"],
        "usd_range": [value if isfinite(value) else None for value in candidate.usd_range(rate)],
        "finalist": bool(candidate.draws),
        "expected": expected(candidate),
        "replica": candidate.replica,
        "trial": candidate.whole or candidate.trial or candidate.alone,
        "draws": [candidate.draws[draw] for draw in sorted(candidate.draws)],
    }
