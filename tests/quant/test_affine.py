"""int8 and int4: how far a rounded weight lies from the original, and what is exact."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from drawn import examples
from hypothesis import given, settings

from manylora import quant

SLACK = 1 + 2.0**-16
"""The product s x is rounded to float32 before it is rounded to a whole number."""


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """Matrices of all dtypes whose values spread over many magnitudes, some zero, some far from zero."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 150))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    exponent = draw(st.integers(-10, 10) if dtype == torch.float16 else st.integers(-146, 100))
    spread = draw(st.sampled_from([0, 1, 6]))
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    weight *= torch.exp2(spread * torch.randn(rows, columns, generator=generator, dtype=torch.float64))
    weight += draw(st.sampled_from([0.0, 0.0, 3.0, -1000.0]))
    weight *= (torch.rand(rows, columns, generator=generator) < draw(st.sampled_from([1.0, 0.5, 0.02]))).double()
    weight *= 2.0**exponent
    return weight.clamp(-(2.0**125), 2.0**125).to(dtype).clamp(-60000, 60000).to(dtype)


def spread(scales: torch.Tensor, block: int, columns: int) -> torch.Tensor:
    """Scales (O, groups) as (O, I), float64."""
    return scales.double().repeat_interleave(block, dim=1)[:, :columns]


@settings(max_examples=examples(300), deadline=None)
@given(weights(), st.sampled_from([None, 1, 7, 32, 200]))
def test_int8_is_within_half_a_step(weight: torch.Tensor, block: int | None) -> None:
    packed = quant.pack(weight, "int8", block=block)
    columns = weight.shape[1]
    s = spread(packed.tensors()["inverse_step"], block or columns, columns)
    x = weight.float().double()
    codes = packed.tensors()["codes"]
    assert codes.abs().max() <= 127
    assert ((x - codes / s).abs() <= SLACK / (2 * s)).all()
    # The dense weight adds one rounding of the quotient to float32.
    dense = packed.dense(torch.float32).double()
    assert ((dense - codes / s).abs() <= 2.0**-24 * dense.abs() + 2.0**-149).all()


@settings(max_examples=examples(300), deadline=None)
@given(weights(), st.sampled_from([1, 7, 32, 128]), st.booleans())
def test_int4_is_within_half_a_step(weight: torch.Tensor, block: int, symmetric: bool) -> None:
    packed = quant.pack(weight, "int4", block=block, symmetric=symmetric)
    columns = weight.shape[1]
    s = spread(packed.tensors()["inverse_step"], block, columns)
    x = weight.float().double()
    dense = packed.dense(torch.float32).double()
    largest = spread(
        torch.nn.functional.pad(x.abs(), (0, -columns % block)).unflatten(1, (-1, block)).amax(2), block, columns
    )
    # Beside half a step, what float32 cannot tell apart at the magnitude of the group.
    assert ((x - dense).abs() <= SLACK / (2 * s) + 2.0**-22 * largest + 2.0**-149).all()


def test_halves_are_rounded_to_even() -> None:
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 125.5]])
    assert quant.pack(weight, "int8").tensors()["codes"].tolist() == [[127, 0, 2, 2, 0, -2, 126]]
    weight = torch.tensor([[0.0, 15.0, 0.5, 1.5, 2.5, 14.5]])
    assert quant.pack(weight, "int4").dense(torch.float32).tolist() == [[0, 15, 0, 2, 2, 14]]
    weight = torch.tensor([[7.0, 0.5, 1.5, -2.5]])
    assert quant.pack(weight, "int4", symmetric=True).dense(torch.float32).tolist() == [[7, 0, 2, -2]]


def test_the_scale_is_the_inverse_of_the_step() -> None:
    weight = torch.tensor([[0.5, -2.0], [0.25, 0.125]])
    assert quant.pack(weight, "int8").tensors()["inverse_step"].tolist() == [[63.5], [508.0]]
    packed = quant.pack(weight, "int4").tensors()
    assert packed["inverse_step"].tolist() == [[6.0], [120.0]]
    assert packed["zero"].tolist() == [[-2.0], [0.125]]
    assert quant.pack(weight, "int4", symmetric=True).tensors()["inverse_step"].tolist() == [[3.5], [28.0]]


@pytest.mark.parametrize("largest", [1e-36, 1e-6, 8e37])
def test_all_codes_are_used_at_every_magnitude(largest: float) -> None:
    weight = torch.linspace(-1, 1, 2000).view(1, -1) * largest
    assert len(quant.pack(weight, "int8").tensors()["codes"].unique()) == 255
    assert len(quant.pack(weight, "int4", block=2000).dense(torch.float32).unique()) == 16


@pytest.mark.parametrize(
    ("name", "options"), [("int8", {}), ("int8", {"block": 5}), ("int4", {}), ("int4", {"symmetric": True})]
)
def test_zeros_stay_zero(name: str, options: dict[str, Any]) -> None:
    weight = torch.zeros(3, 12)
    weight[1, 7] = 2.0
    packed = quant.pack(weight, name, **options)
    assert torch.equal(packed.dense(torch.float32), weight)


@pytest.mark.parametrize("value", [3.14159, -1e-3, 1e30, 2.0**-149, -(2.0**126)])
def test_a_group_of_equal_values_is_exact_in_int4(value: float) -> None:
    weight = torch.full((2, 130), value)
    assert torch.equal(quant.pack(weight, "int4").dense(torch.float32), weight)


def test_a_group_far_from_zero_keeps_its_range_in_int4() -> None:
    steps = torch.arange(16.0).repeat(2, 8) / 15
    for base in (0.0, 1.0, 100.0, -100.0):
        weight = base + steps
        packed = quant.pack(weight, "int4")
        error = (packed.dense(torch.float32) - weight).abs().max()
        assert float(error) <= 2.0**-22 * max(1.0, abs(base))
        assert len(packed.dense(torch.float32).unique()) == 16
        assert torch.equal(packed.dense(torch.float32)[0, [0, 15]], weight[0, [0, 15]])


def test_the_even_column_is_in_the_high_nibble_and_an_odd_one_ends_with_zero() -> None:
    packed = quant.pack(torch.tensor([[0.0, 15.0, 3.0], [1.0, 16.0, 9.0]]), "int4")
    assert packed.tensors()["codes"].tolist() == [[0x0F, 0x30], [0x0F, 0x80]]
    packed = quant.pack(torch.tensor([[-7.0, 7.0, 0.0]]), "int4", symmetric=True)
    assert packed.tensors()["codes"].tolist() == [[0x1F, 0x80]]


def test_groups_of_a_row_do_not_reach_into_the_next() -> None:
    weight = torch.tensor([[1.0, 1.0, 1.0, 1000.0, 1.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    assert quant.pack(weight, "int8", block=2).tensors()["inverse_step"].shape == (2, 3)
    assert quant.pack(weight, "int8", block=2).tensors()["inverse_step"].tolist()[1] == [63.5] * 3
    assert quant.pack(weight, "int4", block=3).tensors()["zero"].tolist() == [[1.0, 1.0], [2.0, 2.0]]


@pytest.mark.parametrize(("block", "expected"), [(64, 0.0896), (128, 0.0997)])
def test_int4_has_the_error_of_evenly_spaced_values(block: int, expected: float) -> None:
    weight = torch.randn(2000, 640, generator=torch.Generator().manual_seed(0))
    error = (quant.pack(weight, "int4", block=block).dense(torch.float32) - weight).square().mean().sqrt()
    assert float(error) == pytest.approx(expected, abs=5e-4)
