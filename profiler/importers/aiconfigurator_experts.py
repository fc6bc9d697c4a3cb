"""Reads aiconfigurator's moe_perf tables: vLLM's experts by tokens, sizes, parallel cut and distribution of the tokens.

`num_tokens` are those of all ranks, and a row is the time of the busiest one. The rows of fp8 and fp8_block include
quantising the activations (collect_moe.py gives 16-bit input).

A rank that has a share of the experts takes about that share of the time. Where a format's rows take as long whatever
the share (mxfp4 of vLLM 0.19 on H200), every rank was given all experts: its rows of shares are left out.
"""

from __future__ import annotations

import pandas as pd

FORMATS = {"int4_wo": "int4", "w4a16_mxfp4": "mxfp4"}  # others have our names
WORKING = 1024  # tokens from which on a share of the experts is a share of the time
SHARE, STILL = 4, 0.9  # of so many ranks each takes less than this part of the time that one with all experts does
NUMBERS = ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size")


def experts(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The rows as those of kind moe; and what was left out."""
    whole = (frame["inter_size"] % frame["moe_tp_size"] == 0) & (frame["num_experts"] % frame["moe_ep_size"] == 0)
    rows = pd.DataFrame(
        {
            "operator": "experts",
            "kind": pd.Series("moe", frame.index).where(whole),
            "expert_tokens": frame["num_tokens"],
            "hidden_size": frame["hidden_size"],
            "expert_width": frame["inter_size"] // frame["moe_tp_size"],
            "local_experts": frame["num_experts"] // frame["moe_ep_size"],
            "num_experts": frame["num_experts"],
            "top_k": frame["topk"],
            "expert_load": frame["distribution"],
            "dtype": frame["moe_dtype"].replace(FORMATS),
            "backend": frame["framework"].str.casefold(),
        },
        index=frame.index,
    )
    uneven = int((~whole).sum())
    notes = [f"{uneven} rows of experts that do not divide evenly over the ranks left out"] * (uneven > 0)
    for (dtype, kernel), mine in rows.groupby(["dtype", frame["kernel_source"]]):
        shares = frame["moe_ep_size"].reindex(mine.index) > 1
        if shares.any() and _all_experts(frame.loc[mine.index]):
            rows.loc[shares.index[shares], "kind"] = None
            notes.append(
                f"{int(shares.sum())} rows of {dtype} ({kernel}) on ranks with a share of the experts left out: they "
                "take as long as one rank with all of them, so all were computed"
            )
    return rows, notes


def _all_experts(frame: pd.DataFrame) -> bool:
    """Whether rows of one format take as long on ranks with a share of the experts as on one with all."""
    same = [name for name in (*NUMBERS, "distribution") if name != "moe_ep_size"]
    frame = frame[frame["num_tokens"] >= WORKING]
    alone = frame[frame["moe_ep_size"] == 1].groupby(same)["latency"].median()
    shared = frame[frame["moe_ep_size"] >= SHARE].groupby(same)["latency"].median()
    return bool((shared / alone).dropna().median() > STILL)  # NaN, of nothing to compare, is not above it
