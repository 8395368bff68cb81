"""Which token comes next: the likeliest, or one drawn from a row's own random stream.

A row is drawn with one uniform number a token, from a generator of its own, so its text depends on its seed and its
logits and on no neighbour.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from manylora.errors import ConfigError
from manylora.ops.dropout import mix
from manylora.settings import LEAST

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is chosen: at `temperature` 0 the likeliest one; above it, drawn.

    `top_k` keeps the k likeliest tokens (0: all); `top_p` then keeps the fewest tokens whose probability together
    reaches it (1: all). The likeliest token always stays.

    Raises:
        ConfigError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.temperature) or self.temperature < 0 or 0 < self.temperature < LEAST:
            allowed = f"0 (greedy), or at least {LEAST:g}"
            raise ConfigError(f"temperature is {self.temperature!r}", allowed=allowed)
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k!r}", allowed="0 (all tokens) or above")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p is {self.top_p!r}", allowed="above 0, at most 1 (all tokens)")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """(rows, V) to float32 (rows, V): log-probabilities of what may be drawn, -inf for what may not.

        Not renormalised after the cuts. Temperature comes first, then top_k, then top_p, each on what the last left.
        """
        if self.greedy:
            return torch.log_softmax(logits.float(), dim=-1)
        scores = torch.log_softmax(logits.float() / self.temperature, dim=-1)
        if 0 < self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k, dim=-1).values[:, -1:]
            scores = torch.log_softmax(scores.masked_fill(scores < least, -math.inf), dim=-1)
        if self.top_p < 1.0:
            ordered, order = scores.sort(dim=-1, descending=True, stable=True)
            mass = ordered.exp()
            # A token stays while those before it fall short of top_p, so the first always does.
            beyond = mass.cumsum(dim=-1) - mass >= self.top_p
            scores = scores.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -math.inf)
        return scores

    def choose(self, logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """(rows, V) to (rows,): the next token of each row. Greedy choice leaves the generators as they are."""
        return logits.argmax(dim=-1) if self.greedy else draw(self.log_probabilities(logits), generators)


def row_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One random stream a row, on the CPU whatever the base's device, so that a seed means one thing everywhere."""
    # Mixed, because torch seeds its CPU generator from the low 32 bits alone.
    return [torch.Generator().manual_seed(mix(seed, 0) >> 1) for seed in seeds]


def draw(scores: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """(rows, V) log-weights to (rows,): one index each, by inverting the cumulative distribution in index order.

    Index order, not order of likelihood: rounding that swaps two near-equal tokens then moves no other boundary.
    """
    cumulative = scores.double().exp().cumsum(dim=-1)
    uniform = torch.stack([torch.rand((), generator=generator) for generator in generators])
    # A float32 uniform is at most 1 - 2**-24, so the product stays below the total and index V is never reached.
    wanted = uniform.to(cumulative.device, torch.float64)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, wanted, right=True).squeeze(1)
