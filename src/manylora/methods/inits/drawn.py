"""Starts that are drawn: one factor random, the other zero, so that step 0 is the base itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from manylora.methods.inits.init import Init
from manylora.types import Start


def default(start: Start) -> tuple[Tensor, Tensor]:
    """a (R, I) ~ U(-1/sqrt(I), 1/sqrt(I)) and b (O, R) = 0; for an embedding a = 0 and b ~ N(0, 1).

    Source: loralib and PEFT, `kaiming_uniform_(a=sqrt(5))`, whose bound is 1/sqrt(fan_in).
    """
    rows, columns = start.site.out_in
    if start.site.kind.zero_factor == "a":
        return torch.zeros(start.rank, columns), torch.randn(rows, start.rank, generator=start.generator)
    bound = 1 / math.sqrt(columns)
    a = (torch.rand(start.rank, columns, generator=start.generator) * 2 - 1) * bound
    return a, torch.zeros(rows, start.rank)


def gaussian(start: Start) -> tuple[Tensor, Tensor]:
    """a (R, I) ~ N(0, 1/R^2) and b (O, R) = 0; for an embedding a = 0 and b ~ N(0, 1/R^2).

    Source: PEFT, `init_lora_weights="gaussian"`.
    """
    (rows, columns), rank = start.site.out_in, start.rank
    if start.site.kind.zero_factor == "a":
        return torch.zeros(rank, columns), torch.randn(rows, rank, generator=start.generator) / rank
    return torch.randn(rank, columns, generator=start.generator) / rank, torch.zeros(rows, rank)


DEFAULT = Init(default)
GAUSSIAN = Init(gaussian)
