"""A mixture of experts on one rank: which experts a token passes, and their MLPs.

Every rank holds a share of each expert's columns, as of a plain MLP, and the whole router, so ranks choose alike. The
tokens are sorted by expert, each expert's are multiplied with its matrices, and a token's outputs are added up.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from engine.specs import ExpertsSpec, ModelSpec
from engine.worker import layers
from engine.worker.layers import NewParameter, TensorModule
from engine.worker.parallel import Rank

GROUPED_CAPABILITIES = (9, 10)  # of the GPUs for which torch has a kernel of grouped products (Hopper, Blackwell)
GROUPED_MULTIPLE = 8  # what the sizes of its 16-bit matrices must be multiples of


class Products(Protocol):
    """Rows (n, k), sorted by expert and ending at `ends` (experts,), times each one's (experts, k, m): (n, m)."""

    def __call__(self, rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor: ...


def plain(spec: ExpertsSpec) -> bool:
    """Return whether there is nothing to the experts but a router and their matrices."""
    return not (spec.shared_intermediate_size or spec.shared_gate or spec.router_bias or spec.bias)


def choose(logits: Tensor, spec: ExpertsSpec) -> tuple[Tensor, Tensor]:
    """Return weights, float32, and numbers (t, top_k) of each token's experts by the router's logits (t, experts)."""
    weights, experts = logits.softmax(-1, dtype=torch.float32).topk(spec.top_k, dim=-1)
    return (weights / weights.sum(-1, keepdim=True) if spec.normalize else weights), experts


def has_grouped_kernel(spec: ModelSpec, rank: Rank, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether torch computes this rank's experts in one kernel that finds the ends of the groups on the GPU.

    Elsewhere the host waits for the ends to launch a product an expert, which no CUDA graph can hold.
    """
    if spec.experts is None or device.type != "cuda" or dtype != torch.bfloat16:
        return False
    sizes = spec.hidden_size, spec.experts.intermediate_size // rank.tp_size
    aligned = all(size % GROUPED_MULTIPLE == 0 for size in sizes)
    return aligned and torch.cuda.get_device_capability(device)[0] in GROUPED_CAPABILITIES


def in_one_kernel(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Products by torch's grouped kernel; the host looks at no value."""
    return functional.grouped_mm(rows, matrices, offs=ends)


def one_by_one(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Products of one expert after the other; the host waits for `ends`."""
    out = rows.new_empty(rows.shape[0], matrices.shape[2])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            torch.mm(rows[start:end], matrices[expert], out=out[start:end])
        start = end
    return out


class Experts(TensorModule):
    """This rank's columns of every expert: gate and up (experts, 2w, h), down (experts, h, w)."""

    def __init__(self, spec: ModelSpec, rank: Rank, new: NewParameter, products: Products) -> None:
        super().__init__()
        assert spec.experts is not None
        count, width = spec.experts.num_experts, spec.experts.intermediate_size // rank.tp_size
        self.gate_up_proj = new(count, 2 * width, spec.hidden_size)
        self.down_proj = new(count, spec.hidden_size, width)
        self.activation, self.products = spec.activation, products

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """(t, h), and what `choose` returned of them -> (t, h), this rank's part of the sum."""
        chosen, order = experts.flatten().sort(stable=True)
        count = torch.arange(self.gate_up_proj.shape[0], device=chosen.device)
        ends = torch.searchsorted(chosen, count, right=True, out_int32=True)
        up = self.products(x[order // experts.shape[1]], self.gate_up_proj.transpose(1, 2), ends)
        down = self.products(layers.gated_activate(up, self.activation), self.down_proj.transpose(1, 2), ends)
        by_token = torch.empty_like(down).index_copy_(0, order, down)
        return layers.weighted_sum(by_token.view(*experts.shape, -1), weights)
