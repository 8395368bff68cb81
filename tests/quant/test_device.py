"""Packed weights on an accelerator: the same codes as on the CPU, and the same values."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from manylora import quant

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.mark.parametrize("shape", [(1, 7), (33, 129), (256, 512)])
def test_codes_and_values_are_those_of_the_cpu(case: tuple[str, dict[str, Any]], shape: tuple[int, int]) -> None:
    name, options = case
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    weight[0] = 0.0
    here, there = quant.pack(weight, name, **options), quant.pack(weight.cuda(), name, **options)
    # The offset of nested scales is a mean, whose last bit depends on the order of adding.
    assert torch.equal(there.tensors()["codes"].cpu(), here.tensors()["codes"])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(here.to("cuda").dense(dtype).cpu(), here.dense(dtype))
