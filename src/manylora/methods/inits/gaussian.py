"""A normal start with a deviation of 1 / rank, as PEFT's `init_lora_weights="gaussian"`."""

from __future__ import annotations

import torch
from torch import Tensor

from manylora.methods.inits.init import Init, Start


def gaussian(start: Start) -> tuple[Tensor, Tensor]:
    """a (R, I) ~ N(0, 1/R^2) and b (O, R) = 0; for an embedding a = 0 and b ~ N(0, 1/R^2)."""
    (rows, columns), rank = start.site.out_in, start.rank
    if start.site.kind == "embedding":
        return torch.zeros(rank, columns), torch.randn(rows, rank, generator=start.generator) / rank
    return torch.randn(rank, columns, generator=start.generator) / rank, torch.zeros(rows, rank)


GAUSSIAN = Init(gaussian)
