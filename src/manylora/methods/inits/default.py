"""The start of the LoRA reference code: one factor random, the other zero, so that step 0 is the base itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from manylora.types import Site


def default(site: Site, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """a (R, I) ~ U(-1/sqrt(I), 1/sqrt(I)) and b (O, R) = 0; for an embedding a = 0 and b ~ N(0, 1).

    Source: loralib and PEFT, `kaiming_uniform_(a=sqrt(5))`, whose bound is 1/sqrt(fan_in).
    """
    rows, columns = site.out_in
    if site.kind == "embedding":
        return torch.zeros(rank, columns), torch.randn(rows, rank, generator=generator)
    bound = 1 / math.sqrt(columns)
    return (torch.rand(rank, columns, generator=generator) * 2 - 1) * bound, torch.zeros(rows, rank)
