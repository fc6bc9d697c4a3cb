"""What a decoder layer is made of: linear layers, norms, embedding, and the chains of elementwise operations.

Chains are plain functions, of several kernels that each read and write the whole tensor; after
`compile_elementwise(True)` they are one or two, made by torch.compile. Matrices and parameters are those of one rank,
and nothing is initialised: `engine.worker.weights` fills them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.specs import ModelSpec
from engine.worker.names import vocabulary_rows
from engine.worker.parallel import Rank

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
}
ROPE_SCALINGS = ("linear", "llama3")

Chain = TypeVar("Chain", bound=Callable[..., Any])
MOST_SHAPES = 64  # kinds of shapes that a chain is compiled for, in a process that runs several models
_compile = False


def compile_elementwise(on: bool) -> None:
    """Whether chains of elementwise operations run compiled, which pays on CUDA. They don't at first."""
    global _compile
    _compile = on


def _compiler(function: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[[Tensor, int], None]]:
    """A function compiled, and what tells the compiler of a dimension of a tensor that it varies.

    Other dimensions don't, for a model. Kernels are not tried out to be tuned: trying out one that writes to the KV
    cache would copy the cache to the host and back.
    """
    from torch import _dynamo  # not before it is wanted: it takes seconds to import

    _dynamo.config.recompile_limit = MOST_SHAPES
    compiled = torch.compile(function, dynamic=False, options={"triton.autotune_pointwise": False})
    return compiled, _dynamo.maybe_mark_dynamic


def _chain(by_token: int) -> Callable[[Chain], Chain]:
    """Makes a function a chain. Its first `by_token` arguments have a row a token, or are None.

    It is compiled twice for a model (and for a size of its KV cache): for one token, and for any other number.
    """

    def decorate(function: Chain) -> Chain:
        compiled: Callable[..., Any] | None = None
        mark: Callable[[Tensor, int], None]

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            nonlocal compiled, mark
            if not _compile:
                return function(*arguments)
            if compiled is None:
                compiled, mark = _compiler(function)
            for argument in arguments[:by_token]:
                if argument is not None:
                    mark(argument, 0)
            return compiled(*arguments)

        return cast(Chain, call)

    return decorate


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    if bias is not None:
        return functional.layer_norm(x, weight.shape, weight, bias, eps)  # float32 inside
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


@_chain(by_token=1)
def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(t, h) -> (t, h): layer norm, or without a bias x / rms(x) in float32, rounded to x's type, times weight.

    The latter is RMS norm (Zhang & Sennrich 2019).
    """
    return _norm(x, weight, bias, eps)


@_chain(by_token=3)
def residual_norm(
    residual: Tensor, branch: Tensor, other: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The residual (t, h) plus one branch, or plus the sum of two; and the norm of that."""
    total = residual + (branch if other is None else branch + other)
    return total, _norm(total, weight, bias, eps)


@_chain(by_token=1)
def activate(x: Tensor, activation: str) -> Tensor:
    """The activation of each element of the up-projection (t, w)."""
    return ACTIVATIONS[activation](x)


@_chain(by_token=1)
def gated_activate(gate_up: Tensor, activation: str) -> Tensor:
    """(t, 2w), gate and up side by side -> (t, w): activation(gate) * up (Shazeer 2020)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


@_chain(by_token=2)
def weighted_sum(outputs: Tensor, weights: Tensor) -> Tensor:
    """Outputs (t, n, h) of n experts a token, by their weights (t, n) -> (t, h), added up in float32."""
    return (outputs.float() * weights[..., None]).sum(1).to(outputs.dtype)


@_chain(by_token=1)
def rotation(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine (t, 1, r/2), float32, of each position's angle in every rotated plane."""
    angles = positions.float()[:, None, None] * frequencies
    return angles.cos(), angles.sin()


@_chain(by_token=1)
def norm_heads(qkv: Tensor, query_weight: Tensor, key_weight: Tensor, heads: int, kv_heads: int, eps: float) -> None:
    """RMS norm of every query and key head of qkv (t, heads + 2 KV heads, head_dim), in place.

    The weights (head_dim,) are one for all query heads and one for all key heads.
    """
    queries, keys = qkv[:, :heads], qkv[:, heads : heads + kv_heads]
    queries.copy_(_norm(queries, query_weight, None, eps))
    keys.copy_(_norm(keys, key_weight, None, eps))


@_chain(by_token=4)
def rotate_and_write(
    qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, heads: int, keys: Tensor, values: Tensor
) -> Tensor:
    """Rotated queries (t, heads, head_dim) of qkv (t, heads + 2 KV heads, head_dim).

    Its rotated keys and its values go to the `slots` (t,) of `keys` and `values` (slots, KV heads, head_dim). This is
    the rotary embedding of Su et al. 2021, computed in float32. Plane i is elements i and i + r/2 of a head (Hugging
    Face's order of the weights); those past r stay as they are.
    """
    rotated = _rotate(qkv[:, : -values.shape[1]], cos, sin)  # queries and keys as one: a kernel less
    keys.index_copy_(0, slots, rotated[:, heads:])
    values.index_copy_(0, slots, qkv[:, -values.shape[1] :])
    return rotated[:, :heads]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    a, b, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    return torch.cat(((a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest), dim=-1)


def rotary_frequencies(spec: ModelSpec) -> Tensor:
    """Radians a position in each of the r/2 rotated planes (float32), after the model's `rope_scaling`.

    `llama3` divides those of wavelengths above original_max_position / low_freq_factor by the factor, leaves those
    below original_max_position / high_freq_factor, and goes smoothly from one to the other in between.
    """
    rotated = int(spec.head_dim * spec.rotary_fraction)
    frequencies = 1.0 / spec.rope_theta ** (torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)
    scaling = spec.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((scaling.original_max_position / wavelengths - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


class TensorModule(nn.Module):
    """A module that returns a tensor."""

    __call__: Callable[..., Tensor]


NewParameter = Callable[..., nn.Parameter]  # sizes -> an empty parameter of the decoder's type, on its device


def new_parameter(*sizes: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """An uninitialised parameter, without a gradient."""
    return nn.Parameter(torch.empty(sizes, dtype=dtype, device=device), requires_grad=False)


class Linear(TensorModule):
    """(t, k) -> (t, n) with this rank's weight (n, k), which may be one that exists.

    The outputs of a row-parallel layer are summed over ranks, so only one of them may add the bias that all hold.
    """

    def __init__(
        self,
        k: int,
        n: int,
        bias: bool,
        new: NewParameter,
        *,
        adds_bias: bool = True,
        weight: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.weight = new(n, k) if weight is None else weight
        self.bias = new(n) if bias else None
        self.adds_bias = adds_bias

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias if self.adds_bias else None)


class Norm(TensorModule):
    """RMS or layer norm over the hidden size, or another `size`, computed in float32."""

    def __init__(self, spec: ModelSpec, new: NewParameter, size: int | None = None) -> None:
        super().__init__()
        self.eps = spec.norm_eps
        self.weight = new(size or spec.hidden_size)
        self.bias = new(size or spec.hidden_size) if spec.norm == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        return norm(x, self.weight, self.bias, self.eps)

    def of_sum(self, residual: Tensor, branch: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The residual plus its branches, and the norm of that."""
        return residual_norm(residual, branch, other, self.weight, self.bias, self.eps)


class Embedding(TensorModule):
    """This rank's rows of the embedding table. A token of another rank's gets zeros, to be summed over the ranks."""

    def __init__(self, spec: ModelSpec, rank: Rank, new: NewParameter) -> None:
        super().__init__()
        rows = vocabulary_rows(spec, rank)
        self.weight = new(rows, spec.hidden_size)
        self.first, self.whole = rank.tp_rank * rows, rank.tp_size == 1

    def forward(self, token_ids: Tensor) -> Tensor:
        if self.whole:
            return functional.embedding(token_ids, self.weight)
        row = token_ids - self.first
        elsewhere = (row < 0) | (row >= self.weight.shape[0])
        return functional.embedding(row.masked_fill(elsewhere, 0), self.weight).masked_fill(elsewhere[:, None], 0)
