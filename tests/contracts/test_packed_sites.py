"""What a packed site owes every method: what the same site would give with the dense weight of its codes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.base.frozen import FrozenModel
from manylora.base.kinds import KINDS
from manylora.base.packing.linear import pack_module
from manylora.methods import METHODS
from manylora.ops.low_rank import reference
from manylora.quant import PACKINGS
from manylora.spec import AdapterSpec
from manylora.types import Factors

COLUMNS, ROWS = 24, 20
RANKS = (3, 8, 5)
MODULES = {
    "linear": lambda: nn.Linear(COLUMNS, ROWS),
    "linear without bias": lambda: nn.Linear(COLUMNS, ROWS, bias=False),
    "conv1d": lambda: Conv1D(ROWS, COLUMNS),
}
METHOD_NAMES = [
    name for name in METHODS if all(METHODS.get(name).adapts(KINDS.get(kind)) for kind in ("linear", "conv1d"))
]


class One(nn.Module):
    """A model of one site."""

    def __init__(self, site: nn.Module):
        super().__init__()
        self.site = site

    def forward(self, x: Tensor) -> Tensor:
        return self.site(x)


def pair(kind: str, name: str, dtype: torch.dtype = torch.float64) -> tuple[FrozenModel, FrozenModel]:
    """The base with its site packed, and with the dense weight of the same codes; one fingerprint for both."""
    torch.manual_seed(3)
    plain = MODULES[kind]().to(dtype)
    weight = plain.weight.t().contiguous() if kind == "conv1d" else plain.weight
    packed = pack_module(plain, PACKINGS.get(name).pack(weight.detach()), dtype)
    plain.weight = nn.Parameter(packed.weight)

    def example(rows: int) -> dict[str, Tensor]:
        return {"x": inputs(rows, dtype)}

    return tuple(FrozenModel(One(site), example=example, fingerprint="same") for site in (packed, plain))  # pyright: ignore[reportReturnType]


def inputs(rows: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, 4, COLUMNS, generator=torch.Generator().manual_seed(5), dtype=dtype)


def bank_of(base: FrozenModel, method: str, dropout: float = 0.0) -> Bank:
    """A bank of three slots, no factor at zero."""
    bank = Bank(base, num_slots=3, dtype=torch.float64)
    for slot, rank in enumerate(RANKS):
        spec = AdapterSpec(method=method, rank=rank, alpha=6.0, dropout=dropout, sites=("site",))
        adapter = Adapter.new(base, spec, seed=slot)
        draw = torch.Generator().manual_seed(slot)
        factors = {
            site: Factors(
                held.method,
                {k: torch.randn(t.shape, generator=draw, dtype=t.dtype) * 0.5 for k, t in held.tensors.items()},
            )
            for site, held in adapter.factors.items()
        }
        bank.put(Adapter(adapter.spec, factors, base.name, base.fingerprint), slot=slot)
    return bank


def run(bank: Bank, x: Tensor, slots: tuple[int, ...], streams: tuple[int, ...] | None = None) -> list[Tensor]:
    """The output, and the gradients of a fixed direction for x and every factor."""
    leaf = x.clone().requires_grad_()
    with bank.route(slots, streams):
        y = bank.base.model(leaf)
        direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
        (y * direction.to(y.dtype)).sum().backward()
    assert leaf.grad is not None
    grads = [tensor.grad for stack in bank.stacks.values() for tensor in stack.tensors.values()]
    return [y.detach(), leaf.grad, *(grad for grad in grads if grad is not None)]


@pytest.mark.parametrize("slots", [(0, 0), (0, 1, 2), (2, -1, 0, 0), (-1, -1)])
@pytest.mark.parametrize("kind", list(MODULES))
@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("name", list(PACKINGS))
def test_outputs_and_gradients_are_those_of_the_dense_site(
    name: str, method: str, kind: str, slots: tuple[int, ...]
) -> None:
    packed, plain = pair(kind, name)
    before = {key: value.clone() for key, value in packed.model.state_dict().items()}
    x = inputs(len(slots))
    streams = tuple(range(50, 50 + len(slots)))
    got = run(bank_of(packed, method, 0.1), x, slots, streams)
    want = run(bank_of(plain, method, 0.1), x, slots, streams)
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    after = packed.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items()), "the base was written to"


@pytest.mark.parametrize("kind", list(MODULES))
@pytest.mark.parametrize("name", list(PACKINGS))
def test_lora_on_a_packed_site_has_the_gradients_of_float64_autograd(name: str, kind: str) -> None:
    packed, plain = pair(kind, name)
    slots, streams = (2, -1, 0, 0, 1), (1, 2, 3, 4, 5)
    x = inputs(len(slots))
    got = run(bank_of(packed, "lora", 0.1), x, slots, streams)
    bank = bank_of(plain, "lora", 0.1)
    site = plain.sites["site"]

    def by_hand(leaf: Tensor) -> Tensor:
        return reference(leaf, site, [use for _, uses in bank.uses(site, leaf) for use in uses], site.map)

    bank.base.model = by_hand  # pyright: ignore[reportAttributeAccessIssue] - the same call, in plain autograd
    for one, other in zip(got, run(bank, x, slots, streams), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", list(MODULES))
@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("name", list(PACKINGS))
def test_a_new_adapter_on_a_packed_site_changes_nothing_to_the_bit(
    name: str, method: str, kind: str, dtype: torch.dtype
) -> None:
    base, _ = pair(kind, name, dtype)
    x = inputs(3, dtype)
    want = base.model(x)
    bank = Bank(base, num_slots=1)
    bank.put(Adapter.new(base, AdapterSpec(method=method, rank=4, sites=("site",)), seed=1), slot=0)
    with bank.route([0, 0, 0]):
        assert torch.equal(base.model(x), want)


# A bias that the site's module has no place for is no change of its parameters, and refused by name.
@pytest.mark.parametrize(
    ("kind", "method"),
    [(k, m) for k in MODULES for m in METHOD_NAMES if (k, m) != ("linear without bias", "lora-bias")],
)
def test_the_change_of_a_packed_site_is_that_of_the_dense_one(kind: str, method: str) -> None:
    packed, plain = pair(kind, "nf4")
    changes = []
    for base in (packed, plain):
        adapter = bank_of(base, method).get(1)
        changes.append(METHODS.get(method).delta(base.sites["site"], adapter.factors["site"], adapter.spec))
    assert changes[0].keys() == changes[1].keys()
    for key, change in changes[0].items():
        torch.testing.assert_close(change, changes[1][key], rtol=1e-6, atol=1e-6)


def test_a_copy_of_a_packed_site_is_saved_without_its_codes(tmp_path) -> None:
    from safetensors.torch import load_file

    base, _ = pair("linear", "nf4", torch.float32)
    adapter = Adapter.new(base, AdapterSpec(sites=(), full_sites=("site",)), seed=1)
    adapter.save(tmp_path / "adapter", base)
    assert set(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == {
        "base_model.model.site.weight", "base_model.model.site.bias"
    }  # fmt: skip
    bank = Bank(base, num_slots=1)
    bank.put(Adapter.load(tmp_path / "adapter"), slot=0)
    x = inputs(2, torch.float32)
    with bank.route([-1, -1]):
        want = base.model(x)
    with bank.route([0, 0]):
        assert torch.equal(base.model(x), want)
