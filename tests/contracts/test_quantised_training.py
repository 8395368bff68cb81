"""Adapters that are trained on the grid they are stored on: what was used is what is saved and what is compressed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.adapters.compress.compressed import compress
from manylora.base.frozen import FrozenModel
from manylora.errors import SpecError
from manylora.methods import lora
from manylora.ops import low_rank
from manylora.ops.rounding import fake_quantised
from manylora.spec import AdapterSpec
from manylora.types import Factors

SCHEMES = {"int8": 8, "int4": 4}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(30, 70), nn.Linear(70, 90), nn.Linear(90, 30)

    def forward(self, tokens):
        return self.down(torch.tanh(self.up(self.embed(tokens))))


@pytest.fixture
def base() -> FrozenModel:
    torch.manual_seed(0)
    return FrozenModel(
        Net().double(), example=lambda rows: {"tokens": torch.arange(rows * 5).reshape(rows, 5) % 30}, name="net"
    )


def made(base: FrozenModel, scheme: str | None, seed: int, *, dropout: float = 0.0) -> Adapter:
    """An adapter with random factors on two linear sites and an embedding."""
    spec = AdapterSpec(rank=5, sites=("up", "down", "embed"), quantize=scheme, dropout=dropout)
    adapter = Adapter.new(base, spec, seed=seed)
    torch.manual_seed(seed)
    factors = {
        name: Factors(own.method, {key: torch.randn(value.shape) for key, value in own.tensors.items()})
        for name, own in adapter.factors.items()
    }
    return replace(adapter, factors=factors)


TOKENS = torch.randint(0, 30, (4, 5), generator=torch.Generator().manual_seed(3))


def outputs_and_gradients(base, bank, slots, streams=None):
    with bank.route(slots, streams):
        y = base.model(TOKENS)
    leaves = [tensor for stack in bank.stacks.values() for tensor in stack.tensors.values()]
    return y, torch.autograd.grad(y.square().sum(), leaves)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("slots", [(0, 0, 0, 0), (0, 1, 2, 3), (0, 0, 1, -1)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_fused_update_is_plain_autograd_on_the_grid(base, scheme, slots, dropout, monkeypatch):
    streams = (11, 12, 13, 14) if dropout else None
    with Bank(base, num_slots=4, dtype=torch.float64) as bank:
        for slot in range(4):
            bank.put(made(base, scheme, slot, dropout=dropout), slot=slot)
        y, gradients = outputs_and_gradients(base, bank, slots, streams)

        def plain(x, site, uses, *, with_base, extra=((), {})):
            own = site.map if with_base else lambda x: x.new_zeros(*x.shape[:-1], site.out_in[0])
            return low_rank.reference(x, site, uses, own)

        monkeypatch.setattr(lora, "low_rank", plain)
        wanted, wanted_gradients = outputs_and_gradients(base, bank, slots, streams)
    assert torch.allclose(y, wanted, atol=1e-10)
    for found, right in zip(gradients, wanted_gradients, strict=True):
        assert torch.allclose(found, right, atol=1e-8 * float(right.abs().max()))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_was_used_is_saved_and_compressing_it_loses_nothing(base, scheme, tmp_path):
    adapter = made(base, scheme, 1)
    with Bank(base, dtype=torch.float64) as bank:
        bank.put(adapter, slot=0)
        with bank.route([0] * 4):
            used = base.model(TOKENS)
    saved = Adapter.load(adapter.save(tmp_path / "saved"))
    with Bank(base, dtype=torch.float64) as bank:
        bank.put(saved, slot=0)
        with bank.route([0] * 4):
            assert torch.equal(base.model(TOKENS), used)
    report = compress(tmp_path / "saved", bits=SCHEMES[scheme], output=tmp_path / "small")
    assert report.error == 0
    for name, own in Adapter.load(tmp_path / "small").factors.items():
        for key, value in own.tensors.items():
            assert torch.equal(value, saved.factors[name].tensors[key])


def test_slots_on_the_grid_and_off_it_stand_side_by_side(base):
    adapters = [made(base, scheme, 1) for scheme in (None, "int4")]
    with Bank(base, num_slots=2, dtype=torch.float64) as bank:
        for slot, adapter in enumerate(adapters):
            bank.put(adapter, slot=slot)
        with bank.route([0, 0, 1, 1]):
            mixed = base.model(TOKENS)
        for slot in (0, 1):
            with bank.route([slot] * 4):
                assert torch.allclose(base.model(TOKENS)[2 * slot : 2 * slot + 2], mixed[2 * slot : 2 * slot + 2])
    assert not torch.allclose(mixed[0], mixed[2])


def test_rounding_lets_gradients_through_unchanged():
    a, b = (torch.randn(3, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    rounded = fake_quantised(a, b.t(), "int4")
    weights = [torch.randn_like(one) for one in rounded]
    sum((one * weight).sum() for one, weight in zip(rounded, weights, strict=True)).backward()
    assert torch.equal(a.grad, weights[0])
    assert torch.equal(b.grad, weights[1].t())


def test_a_start_that_is_kept_as_anchors_lies_on_no_grid(base):
    with pytest.raises(SpecError, match="keeps its start as anchors"):
        Adapter.new(base, AdapterSpec(rank=2, sites=("up",), init="pissa", quantize="int4"))
    with pytest.raises(SpecError, match="int8, int4"):
        AdapterSpec(quantize="int3")
