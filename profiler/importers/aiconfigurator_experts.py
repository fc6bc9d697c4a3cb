"""Reads aiconfigurator's moe_perf tables: vLLM's experts by tokens, sizes, parallel cut and distribution of the tokens.

`num_tokens` are those of all ranks, and a row is the time of the busiest one. The rows of fp8 and fp8_block include
quantising the activations (collect_moe.py gives 16-bit input).
"""

from __future__ import annotations

import pandas as pd

FORMATS = {"int4_wo": "int4", "w4a16_mxfp4": "mxfp4"}  # others have our names
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
    return rows, [f"{uneven} rows of experts that do not divide evenly over the ranks left out"] * (uneven > 0)
