"""A normal start with a deviation of 1 / rank, as PEFT's `init_lora_weights="gaussian"`."""

from __future__ import annotations

import torch
from torch import Tensor

from manylora.types import Site


def gaussian(site: Site, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """a (R, I) ~ N(0, 1/R^2) and b (O, R) = 0; for an embedding a = 0 and b ~ N(0, 1/R^2)."""
    rows, columns = site.out_in
    if site.kind == "embedding":
        return torch.zeros(rank, columns), torch.randn(rows, rank, generator=generator) / rank
    return torch.randn(rank, columns, generator=generator) / rank, torch.zeros(rows, rank)
