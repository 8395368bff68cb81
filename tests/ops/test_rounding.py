"""Factors on a grid: how far rounding may go, and the gradient that passes through it."""

from __future__ import annotations

import pytest
import torch
from drawn import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.ops.rounding import GRIDS, INT8, Grid, fake_quantised, straight_through

GRID_OF = {**GRIDS, "three bits, groups of 5": Grid(largest=3, group=5)}


@settings(max_examples=examples(150), deadline=None)
@given(
    name=st.sampled_from(sorted(GRID_OF)),
    columns=st.integers(1, 150),
    exponent=st.integers(-20, 20),
    seed=st.integers(0, 2**31),
    spikes=st.booleans(),
)
def test_no_number_moves_by_more_than_half_a_step(name, columns, exponent, seed, spikes):
    grid = GRID_OF[name]
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    if spikes:
        x[:, 0] *= 1e4
    codes, steps = grid.encode(x)
    assert int(codes.abs().max()) <= grid.largest
    inverse_step = 1.0 / grid.spread(steps, columns, torch.float64)
    apart = (x.double() - grid.decode(codes, steps).double()).abs()
    # A part in 2**22 for x / step, which is itself a float32 number.
    assert bool((apart <= 1.0 / (2.0 * inverse_step) * (1 + 2.0**-22 * 2 * grid.largest)).all())


@settings(max_examples=examples(100), deadline=None)
@given(name=st.sampled_from(sorted(GRID_OF)), columns=st.integers(1, 150), seed=st.integers(0, 2**31))
def test_numbers_on_a_grid_are_found_on_the_same_grid_again(name, columns, seed):
    grid = GRID_OF[name]
    x = torch.randn(4, columns, generator=torch.Generator().manual_seed(seed)).exp()
    codes, steps = grid.encode(x)
    kept = grid.decode(codes, steps)
    again = grid.encode(kept)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], steps)
    assert torch.equal(grid.rounded(x), kept)  # what training computes with is what is stored


def test_the_largest_number_of_each_group_has_the_largest_code():
    codes, _ = Grid(largest=127, group=16).encode(torch.randn(64, 64))
    assert bool((codes.unflatten(1, (-1, 16)).abs().amax(-1) == 127).all())


def test_zeros_stay_zero_and_still_get_a_gradient():
    b = torch.zeros(6, 3, requires_grad=True)
    _, rounded = fake_quantised(torch.randn(3, 4), b, "int8")
    assert torch.equal(rounded, torch.zeros(6, 3))
    rounded.sum().backward()
    assert torch.equal(b.grad, torch.ones(6, 3))


@pytest.mark.parametrize("scheme", sorted(GRIDS))
def test_components_of_zeros_change_nothing_of_the_others(scheme):
    a, b = torch.randn(3, 70), torch.randn(90, 3)
    wide_a, wide_b = torch.cat([a, torch.zeros(5, 70)]), torch.cat([b, torch.zeros(90, 5)], dim=1)
    own, padded = fake_quantised(a, b, scheme), fake_quantised(wide_a, wide_b, scheme)
    assert torch.equal(padded[0][:3], own[0])
    assert torch.equal(padded[1][:, :3], own[1])
    assert not padded[0][3:].any()


def test_without_a_scheme_the_factors_are_themselves():
    a, b = torch.randn(3, 7), torch.randn(9, 3)
    assert all(one is other for one, other in zip(fake_quantised(a, b, None), (a, b), strict=True))


def test_a_stack_of_adapters_is_rounded_one_by_one():
    a, b = torch.randn(4, 3, 70), torch.randn(4, 90, 3)
    together = fake_quantised(a, b, "int4")
    for place in range(4):
        alone = fake_quantised(a[place], b[place], "int4")
        assert torch.equal(together[0][place], alone[0])
        assert torch.equal(together[1][place], alone[1])


def differences(function, x: torch.Tensor, width: float = 1e-6) -> torch.Tensor:
    """The gradient of a function of x by central differences."""
    slopes = torch.zeros_like(x)
    for place in range(x.numel()):
        shift = torch.zeros_like(x).view(-1)
        shift[place] = width
        shift = shift.view_as(x)
        slopes.view(-1)[place] = (function(x + shift) - function(x - shift)) / (2 * width)
    return slopes


def test_the_gradient_is_that_of_the_clipped_identity_inside_and_beyond_the_grid():
    torch.manual_seed(0)
    step, largest = torch.tensor(0.1, dtype=torch.float64), 7
    x = (torch.rand(40, dtype=torch.float64) - 0.5) * 2.4  # a grid reaches to 0.75
    weights = torch.randn(40, dtype=torch.float64)
    limit = (largest + 0.5) * step
    assert 0 < int((x.abs() > limit).sum()) < 40

    def surrogate(x: torch.Tensor) -> torch.Tensor:
        return (weights * x.clamp(-limit, limit)).sum()

    leaf = x.clone().requires_grad_()
    (weights * straight_through(leaf, step, largest)).sum().backward()
    assert torch.allclose(leaf.grad, differences(surrogate, x), atol=1e-8)


@pytest.mark.parametrize("scheme", sorted(GRIDS))
def test_the_gradient_of_a_loss_is_its_own_at_the_rounded_factors(scheme):
    torch.manual_seed(1)
    a, b = torch.randn(3, 9, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    x = torch.randn(5, 9, dtype=torch.float64)

    def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ a.t() @ b.t()).square().sum()

    leaves = a.clone().requires_grad_(), b.clone().requires_grad_()
    loss(*fake_quantised(*leaves, scheme)).backward()
    kept_a, kept_b = fake_quantised(a, b, scheme)
    assert torch.allclose(leaves[0].grad, differences(lambda value: loss(value, kept_b), kept_a), atol=1e-6)
    assert torch.allclose(leaves[1].grad, differences(lambda value: loss(kept_a, value), kept_b), atol=1e-6)
    assert not torch.allclose(leaves[0].grad, differences(lambda value: loss(value, b), a), atol=1e-6)


def test_gaussian_rows_lose_what_is_known_of_them():
    torch.manual_seed(2)
    x = torch.randn(2000, 128)
    for largest, known in ((7, 0.1169), (3, 0.2728), (1, 0.7609), (127, 0.00645)):
        found = float((Grid(largest).rounded(x) - x).square().mean().sqrt())
        assert found == pytest.approx(known, rel=0.02)


def test_the_step_is_the_inverse_of_the_scale():
    _, steps = INT8.encode(torch.tensor([[127.0, -3.0]]))
    assert float(steps) == 1.0
