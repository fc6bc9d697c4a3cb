"""Next tokens from logits: greedy, temperature, top-k and top-p, row by row but in one batch.

A row's randomness is a function of its seed and of the token's position alone: neither its companions in the batch,
nor preemption and recomputation, nor another split into ranks changes it. Drawing is argmax(probability / noise) with
exponential noise (torch's is never 0), which picks token i with probability p_i: the first arrival of a race.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from engine.runtime.executor import Logprobs, SamplingParams

COLDEST = 1e-30  # what is colder could be 0 in float32


NO_NUMBER = -1  # in the place of a token whose logits are none


def sample(logits: Tensor, params: tuple[SamplingParams, ...] | None, positions: Iterable[int]) -> Tensor:
    """The next token of each row: (m,) int64 on the logits' device; NO_NUMBER where one of the logits is NaN.

    logits: (m, vocabulary) float32; params: one a row, None: all greedy; positions: of the tokens sampled, one a row,
    read only where a row is random. Rows whose temperature is above 0 need a seed.
    """
    highest, tokens = logits.max(dim=-1)  # NaN counts as the highest
    tokens = torch.where(highest.isnan(), NO_NUMBER, tokens)
    if params is None:
        return tokens
    # top_k 1 is greedy too; taken here so that equal logits can't tell the two apart
    rows = [row for row, of_row in enumerate(params) if of_row.temperature > 0 and of_row.top_k != 1]
    if not rows:
        return tokens
    places = [int(position) for position in positions]
    which = _on_device(rows, torch.int64, logits.device)
    scores = _scores(logits[which], [params[row] for row in rows])
    noise = torch.empty_like(scores)
    generator = torch.Generator(logits.device)
    for of_row, row in zip(noise, rows, strict=True):
        of_row.exponential_(generator=generator.manual_seed(_noise_seed(params[row].seed, places[row])))
    drawn = (scores.softmax(dim=-1) / noise).argmax(dim=-1)
    tokens[which] = torch.where(tokens[which] == NO_NUMBER, NO_NUMBER, drawn)
    return tokens


class SampledLogprobs:
    """Log probabilities of sampled tokens, on their way from the device."""

    def __init__(self, logits: Tensor, tokens: Tensor, params: tuple[SamplingParams, ...]) -> None:
        """logits: (m, vocabulary); tokens: (m,) the sampled ones; params: one a row."""
        self._wanted = [each.logprobs for each in params]
        rows = [row for row, count in enumerate(self._wanted) if count is not None]
        which = _on_device(rows, torch.int64, logits.device)
        scores = logits[which].float().log_softmax(dim=-1)
        most = min(max(count for count in self._wanted if count is not None), logits.shape[-1])
        top, ids = scores.topk(most, dim=-1) if most else (scores[:, :0], scores[:, :0].long())
        chosen = scores.gather(1, tokens[which].clamp(min=0)[:, None])[:, 0]
        self._chosen, self._top, self._ids = (each.to("cpu", non_blocking=True) for each in (chosen, top, ids))

    def read(self) -> list[Logprobs | None]:
        """Return those of each row, None of one that did not ask; call once the device is done."""
        found: list[Logprobs | None] = [None] * len(self._wanted)
        rows = zip(self._chosen.tolist(), self._top.tolist(), self._ids.tolist(), strict=True)
        for row, count in enumerate(self._wanted):
            if count is not None:
                chosen, top, ids = next(rows)
                found[row] = Logprobs(chosen, list(zip(ids, top, strict=True))[:count])
        return found


def _scores(logits: Tensor, params: list[SamplingParams]) -> Tensor:
    """Logits over temperature, -inf where a token is left out."""
    device = logits.device
    temperatures = _on_device([max(of_row.temperature, COLDEST) for of_row in params], torch.float32, device)
    # the highest becomes 0, as it might overflow
    scores = (logits - logits.amax(dim=-1, keepdim=True)) / temperatures[:, None]
    filtered = [row for row, of_row in enumerate(params) if of_row.top_k or of_row.top_p < 1]
    if filtered:
        which = _on_device(filtered, torch.int64, device)
        scores[which] = _filter(scores[which], [params[row] for row in filtered])
    return scores


def _filter(scores: Tensor, params: list[SamplingParams]) -> Tensor:
    """The top k of each row, and of these the fewest whose probability reaches p. Of equal scores the first stay."""
    vocabulary, device = scores.shape[-1], scores.device
    top_k = _on_device([of_row.top_k or vocabulary for of_row in params], torch.int64, device)
    # 1 is all of them, also where rounding lets the sum reach 1 early
    top_p = _on_device([of_row.top_p if of_row.top_p < 1 else 2.0 for of_row in params], torch.float32, device)
    ordered, tokens = scores.sort(dim=-1, descending=True, stable=True)
    ordered.masked_fill_(torch.arange(vocabulary, device=device) >= top_k[:, None], float("-inf"))
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # of the tokens ahead in the order
    drop = before >= top_p[:, None]
    drop[:, 0] = False
    return torch.empty_like(scores).scatter_(1, tokens, ordered.masked_fill_(drop, float("-inf")))


def _on_device(values: list[int] | list[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    on_cuda = device.type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=on_cuda).to(device, non_blocking=on_cuda)


def _noise_seed(seed: int | None, position: int) -> int:
    """A generator's seed for one token, all bits of which depend on both (twice the finaliser of splitmix64).

    All bits, because torch's CPU generator takes the low 32 only, and because seeds and positions come as neighbours.
    """
    assert seed is not None, "a random row without a seed"
    mask = (1 << 64) - 1
    mixed = 0
    for part in (seed, position):
        mixed = (mixed + part + 0x9E3779B97F4A7C15) & mask
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & mask
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & mask
        mixed ^= mixed >> 31
    return mixed >> 1  # manual_seed takes 63 bits
