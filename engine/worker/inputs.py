"""A batch as tensors: what the model reads beside the KV cache."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Inputs:
    """t tokens of a batch, decodes first, and m of them whose logits are wanted. int64, on the device."""

    token_ids: Tensor  # (t,)
    positions: Tensor  # (t,) of each token in its sequence
    slots: Tensor  # (t,) where its key and value go: block * block_size + offset
    last_tokens: Tensor  # (m,) the sampled ones among the t tokens
    num_decodes: int
