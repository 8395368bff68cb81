"""What every method owes: the site's own map with the weight dense + delta, exact gradients, and rows kept apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.base.frozen import FrozenModel
from manylora.base.kinds import KINDS
from manylora.errors import RouteError
from manylora.methods import METHODS
from manylora.methods.inits import INITS
from manylora.ops.gain import Gain
from manylora.ops.gain import reference as gain_reference
from manylora.ops.low_rank import low_rank, reference
from manylora.spec import AdapterSpec
from manylora.types import Factors, Site, Use

RANKS = (3, 8, 5)
# Each method, and a low-rank one from each start that a base without packed weights and data allows.
FACTORED = [name for name in METHODS if METHODS.get(name).factored]
ANYWHERE = [name for name in INITS if not INITS.get(name).needs_packed and INITS.get(name).reads is None]
STARTS = [(method, name) for method in FACTORED for name in ANYWHERE] + [
    (name, "default") for name in METHODS if name not in FACTORED
]


def lora_in_autograd(x: Tensor, site: Site, uses: Sequence[Use]) -> Tensor:
    return reference(x, site, uses, site.map)


def dora_in_autograd(x: Tensor, site: Site, uses: Sequence[Use]) -> Tensor:
    """With the norms of the dense matrices."""
    gains = []
    for use in uses:
        held, weight = use.stack, site.weight()
        products = held.tensors["b"].detach() @ held.tensors["a"].detach()
        if held.anchors:
            products = products - held.anchors["b"] @ held.anchors["a"]
        scales = torch.tensor(held.scales, dtype=weight.dtype)[:, None, None]
        norms = (weight + scales * products).norm(dim=2)
        gains.append(Gain(held.tensors["magnitude"], norms, use.runs))
    return gain_reference(lora_in_autograd(x, site, uses), gains, site.module.bias)


def biased_in_autograd(x: Tensor, site: Site, uses: Sequence[Use]) -> Tensor:
    """With the shift of each item laid out whole."""
    y = lora_in_autograd(x, site, uses)
    shifts = torch.zeros_like(y.reshape(-1, y.shape[-1]))
    for use in uses:
        for segment in use.runs.segments if "bias" in use.stack.tensors else ():
            bias = use.stack.tensors["bias"][segment.place]
            own = use.stack.method == "lora-own-bias"
            shift = bias - site.module.bias if own else use.stack.scales[segment.place] * bias
            rows = torch.arange(segment.start, segment.stop)
            shifts = shifts.index_put((rows,), shift.expand(len(rows), -1))
    return y + shifts.view(y.shape)


IN_AUTOGRAD = {
    "lora": lora_in_autograd,
    "dora": dora_in_autograd,
    "lora-bias": biased_in_autograd,
    "lora-own-bias": biased_in_autograd,
}


def conv1d(columns: int, rows: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(rows, columns)


MODULES = {
    "linear": lambda: nn.Linear(12, 10),
    "linear without bias": lambda: nn.Linear(12, 10, bias=False),
    "conv1d": lambda: conv1d(12, 10),
    "embedding": lambda: nn.Embedding(17, 10),
}


KIND_OF = {"linear": "linear", "linear without bias": "linear", "conv1d": "conv1d", "embedding": "embedding"}


def adapts(method: str, module: str) -> bool:
    return METHODS.get(method).adapts(KINDS.get(KIND_OF[module]))


class One(nn.Module):
    """A model of one site."""

    def __init__(self, site: nn.Module):
        super().__init__()
        self.site = site

    def forward(self, x: Tensor) -> Tensor:
        return self.site(x)


def made(kind: str, dtype: torch.dtype = torch.float64) -> FrozenModel:
    torch.manual_seed(3)
    model = One(MODULES[kind]()).to(dtype)
    return FrozenModel(model, example=lambda rows: {"x": inputs(kind, rows, 4, dtype)})


def inputs(kind: str, rows: int, tokens: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    if kind == "embedding":
        return torch.randint(0, 17, (rows, tokens), generator=generator)
    return torch.randn(rows, tokens, 12, generator=generator, dtype=dtype)


def random_adapter(base: FrozenModel, spec: AdapterSpec, seed: int) -> Adapter:
    """An adapter with no factor at zero."""
    adapter = Adapter.new(base, spec, seed=seed)
    generator = torch.Generator().manual_seed(seed)

    def drawn(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: torch.randn(t.shape, generator=generator, dtype=t.dtype) * 0.5 for key, t in tensors.items()}

    factors = {
        name: Factors(held.method, drawn(held.tensors), drawn(held.anchors)) for name, held in adapter.factors.items()
    }
    return Adapter(adapter.spec, factors, base.name, base.fingerprint)


def specs(method: str, dropout: float = 0.0, init: str = "default") -> list[AdapterSpec]:
    return [
        AdapterSpec(method=method, rank=rank, alpha=6.0, dropout=dropout, sites=("site",), init=init) for rank in RANKS
    ]


def filled(kind: str, method: str, dropout: float = 0.0, init: str = "default") -> Bank:
    """A bank of four slots; the last one is empty of anything but a fourth rank's place.

    Slot 1 starts by default whatever `init` says, so that starts of different kinds stand at one site.
    """
    base = made(kind)
    bank = Bank(base, num_slots=4, dtype=torch.float64)
    for slot, spec in enumerate(specs(method, dropout, init)):
        spec = replace(spec, init="default") if slot == 1 else spec
        bank.put(random_adapter(base, spec, slot + 1), slot=slot)
    return bank


# A bias that the site's module has no place for is no change of its parameters, and refused by name.
@pytest.mark.parametrize(
    ("method", "init", "kind"),
    [
        (*start, kind)
        for start in STARTS
        for kind in MODULES
        if adapts(start[0], kind) and (start[0], kind) != ("lora-bias", "linear without bias")
    ],
)
@pytest.mark.parametrize("rows", [(0,), (1, 1), (0, 1, 2), (2, -1, 0, 0, 2, -1), (1, 0, 1, 0), (0, 2)])
def test_forward_equals_the_map_with_dense_plus_delta(kind: str, method: str, init: str, rows: tuple[int, ...]) -> None:
    bank = filled(kind, method, init=init)
    x = inputs(kind, len(rows), 4)
    with bank.route(rows):
        y = bank.base.model(x)
    own = bank.base.sites["site"].module
    for row, slot in enumerate(rows):
        weights = dict(own.named_parameters())
        if slot != -1:
            adapter = bank.get(slot)
            change = METHODS.get(method).delta(bank.base.sites["site"], adapter.factors["site"], adapter.spec)
            weights |= {name: weights[name] + value for name, value in change.items()}
        bare = MODULES[kind]().double()
        expected = torch.func.functional_call(bare, weights, (x[row : row + 1],))
        torch.testing.assert_close(y[row : row + 1], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(0, 0, 0), (0, 1, 2), (1, 0)])
@pytest.mark.parametrize(
    ("method", "init", "kind"),
    [
        (*start, kind)
        for start in STARTS
        for kind in MODULES
        if adapts(start[0], kind) and INITS.get(start[1]).starts_at_base
    ],
)
def test_a_new_adapter_changes_nothing_to_the_bit(
    kind: str, method: str, init: str, rows: tuple[int, ...], dtype: torch.dtype
) -> None:
    base = made(kind, dtype)
    x = inputs(kind, len(rows), 4, dtype)
    want = base.model(x)
    bank = Bank(base, num_slots=3)
    for slot, rank in enumerate((4, 3, 10)):
        spec = AdapterSpec(method=method, rank=rank, sites=("site",), init=init, dropout=0.1)
        bank.put(Adapter.new(base, spec, seed=1), slot=slot)
    for streams in (None, range(len(rows))):  # dropout off and on
        with bank.route(rows, streams):
            assert torch.equal(base.model(x), want)


def gradients(bank: Bank, x: Tensor, route: tuple, run) -> list[Tensor]:
    """Gradients of a fixed random functional of the output for x and every factor."""
    leaf = x.clone().requires_grad_() if x.is_floating_point() else x
    for stack in bank.stacks.values():
        for tensor in stack.tensors.values():
            tensor.grad = None
    with bank.route(*route):
        y = run(leaf)
        generator = torch.Generator().manual_seed(11)
        (y * torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)).sum().backward()
    found = [leaf.grad] if leaf.is_floating_point() else []
    return found + [tensor.grad for stack in bank.stacks.values() for tensor in stack.tensors.values()]


@pytest.mark.parametrize("rows", [(0, 0, 0), (0, 1, 2), (2, -1, 0, 0, 2, -1), (1, 0, 1, 0)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("method", "init"), [start for start in STARTS if start[0] in FACTORED])
@pytest.mark.parametrize("kind", ["linear", "linear without bias", "conv1d"])
def test_fused_gradients_equal_float64_autograd(
    kind: str, method: str, init: str, rows: tuple[int, ...], dropout: float
) -> None:
    bank = filled(kind, method, dropout, init)
    site = bank.base.sites["site"]
    x = inputs(kind, len(rows), 5)
    route = (rows, [100 + row for row in range(len(rows))])

    def plain(leaf: Tensor) -> Tensor:
        return IN_AUTOGRAD[method](leaf, site, [use for _, uses in bank.uses(site, leaf) for use in uses])

    fused = gradients(bank, x, route, bank.base.model)
    truth = gradients(bank, x, route, plain)
    for got, want in zip(fused, truth, strict=True):
        if want is None:
            assert got is None or not got.any()
        else:
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("method", "init"), [start for start in STARTS if start[0] in FACTORED])
@pytest.mark.parametrize("counts", [(3, 0, 7, 2), (0, 0, 1, 4), (5, 5, 5, 5)])
def test_ragged_selections_and_empty_rows_have_exact_gradients(counts: tuple[int, ...], method: str, init: str) -> None:
    from manylora.adapters.bank import Route

    bank = filled("linear", method, 0.1, init)
    site = bank.base.sites["site"]
    x = inputs("linear", 1, sum(counts))[0]
    route = (Route((2, 0, -1, 1), (7, 8, 9, 10), counts),)

    def plain(leaf: Tensor) -> Tensor:
        return IN_AUTOGRAD[method](leaf, site, [use for _, uses in bank.uses(site, leaf) for use in uses])

    for got, want in zip(gradients(bank, x, route, bank.base.model), gradients(bank, x, route, plain), strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_gradients_agree_with_finite_differences(init: str) -> None:
    bank = filled("linear", "lora", init=init)
    site = bank.base.sites["site"]
    x = inputs("linear", 3, 2).requires_grad_()
    with bank.route((1, -1, 0)):
        found = [use for _, uses in bank.uses(site, x) for use in uses]
        leaves = [tensor for use in found for tensor in use.stack.tensors.values()]
        assert torch.autograd.gradcheck(lambda *_: low_rank(x, site, found, with_base=True), (x, *leaves), atol=1e-6)


def test_the_base_gets_no_gradient_and_keeps_its_bytes() -> None:
    bank = filled("linear", "lora", 0.1)
    before = bank.base.model.site.weight.clone()
    gradients(bank, inputs("linear", 2, 3), ((0, 1), (1, 2)), bank.base.model)
    assert bank.base.model.site.weight.grad is None
    assert torch.equal(bank.base.model.site.weight, before)


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_padding_of_a_stack_gets_no_gradient(init: str) -> None:
    bank = filled("linear", "lora", init=init)
    gradients(bank, inputs("linear", 3, 4), ((0, 1, 2),), bank.base.model)
    for stack in bank.stacks.values():
        for place, rank in enumerate(stack.ranks):
            assert not stack.tensors["a"].grad[place, rank:].any()
            assert not stack.tensors["b"].grad[place, :, rank:].any()


def test_dropout_of_a_row_does_not_depend_on_its_neighbours_or_its_length() -> None:
    bank = filled("linear", "lora", 0.5)
    x = inputs("linear", 3, 6)
    with bank.route((0, 1, 0), (5, 6, 7)):
        together = bank.base.model(x)
    for row, slot in enumerate((0, 1, 0)):
        with bank.route((slot,), (5 + row,)):
            torch.testing.assert_close(bank.base.model(x[row : row + 1, :4]), together[row : row + 1, :4])


def test_dropout_keeps_the_expected_share_and_mean() -> None:
    from manylora.ops.dropout import dropout_mask

    mask = dropout_mask(1, "site", (400, 500), 0.1, torch.zeros((), dtype=torch.float64))
    assert abs((mask == 0).double().mean().item() - 0.1) < 0.005
    assert abs(mask.mean().item() - 1.0) < 0.005
    for quarter in range(4):  # of the draws that serve four items each
        assert abs((mask.flatten()[quarter::4] == 0).double().mean().item() - 0.1) < 0.01
    assert abs((mask[1:] * mask[:-1]).mean().item() - 1.0) < 0.01
    assert dropout_mask(1, "site", (40, 50), 0.999999, mask).isfinite().all()
    assert not torch.equal(mask, dropout_mask(2, "site", (400, 500), 0.1, mask))
    assert not torch.equal(mask, dropout_mask(1, "other", (400, 500), 0.1, mask))


def test_a_site_run_without_a_route_is_an_error_that_names_it() -> None:
    bank = filled("linear", "lora")
    with pytest.raises(RouteError, match="'site' was run without a route"):
        bank.base.model(inputs("linear", 1, 2))


class SequenceFirst(nn.Module):
    """A model whose site sees (tokens, rows, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.site = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.site(x.transpose(0, 1)).transpose(0, 1)


def test_a_site_whose_rows_do_not_lead_refuses_mixed_slots_and_serves_one() -> None:
    base = FrozenModel(SequenceFirst().double(), example=lambda rows: {"x": inputs("linear", rows, 3)})
    bank = Bank(base, num_slots=2, dtype=torch.float64)
    for slot in range(2):
        bank.put(random_adapter(base, AdapterSpec(rank=2, sites=("site",)), slot), slot=slot)
    x = inputs("linear", 3, 3)
    with bank.route((0, 1, 0)), pytest.raises(RouteError, match="'site'"):
        base.model(x)
    with bank.route((1, 1, 1)):
        base.model(x)


def test_slots_are_freed_and_used_again() -> None:
    bank = filled("linear", "lora")
    held = bank.get(1)
    num_places = sum(len(stack.slots) for stack in bank.stacks.values())
    bank.clear(1)
    with pytest.raises(RouteError, match="slot 1 is empty"), bank.route([1]):
        pass
    bank.put(held, slot=3)
    assert sum(len(stack.slots) for stack in bank.stacks.values()) == num_places
    x = inputs("linear", 1, 2)
    with bank.route([3]):
        moved = bank.base.model(x)
    bank.put(held, slot=1)
    with bank.route([1]):
        assert torch.equal(bank.base.model(x), moved)


def test_closing_a_bank_gives_the_base_back() -> None:
    base = made("linear")
    x = inputs("linear", 2, 2)
    want = base.model(x)
    names = [name for name, _ in base.model.named_parameters()]
    with Bank(base, num_slots=2, dtype=torch.float64) as bank:
        bank.put(random_adapter(base, specs("lora")[0], 1), slot=0)
        assert [name for name, _ in base.model.named_parameters()] == names
        assert list(base.model.state_dict()) == names
    assert torch.equal(base.model(x), want)
    assert "forward" not in base.model.site.__dict__


def test_ranks_are_padded_to_powers_of_two() -> None:
    bank = filled("linear", "lora")
    classes = sorted(stack.shape_class for stack in bank.stacks.values())
    assert classes == [4, 8]
    assert all(small < large for small, large in pairwise(classes))


class ByKeyword(nn.Module):
    """A model that calls its site by keyword and has parameters that no forward takes a tensor to."""

    def __init__(self) -> None:
        super().__init__()
        self.site = nn.Linear(12, 10)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.site(input=x) * self.scale


def test_a_site_may_be_called_by_keyword() -> None:
    base = FrozenModel(ByKeyword().double(), example=lambda rows: {"x": inputs("linear", rows, 3)})
    bank = Bank(base, num_slots=2, dtype=torch.float64)
    bank.put(random_adapter(base, AdapterSpec(rank=2, sites=("site",)), 0), slot=0)
    x = inputs("linear", 2, 3)
    with bank.route((-1, 0)):
        y = base.model(x)
    with bank.route((0,)):
        torch.testing.assert_close(base.model(x[1:]), y[1:])


def test_any_module_with_parameters_can_be_trained_as_a_copy() -> None:
    """A small image network: convolution, batch norm with frozen statistics, head."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    ).double()
    base = FrozenModel(net, example=lambda rows: {"input": torch.randn(rows, 1, 6, 6, dtype=torch.float64)})
    running = net[1].running_mean.clone()
    bank = Bank(base, num_slots=2, dtype=torch.float64)
    spec = AdapterSpec(rank=2, sites=("5",), full_sites=("0", "1"))
    for slot in range(2):
        bank.put(random_adapter(base, spec, slot), slot=slot)
    x = torch.randn(4, 1, 6, 6, dtype=torch.float64)
    with bank.route((0, 1, -1, 0)):
        mixed = net(x)
    for row, slot in enumerate((0, 1, -1, 0)):
        with bank.route((slot,)):
            torch.testing.assert_close(net(x[row : row + 1]), mixed[row : row + 1])
    mixed.sum().backward()
    assert all(tensor.grad is not None for stack in bank.stacks.values() for tensor in stack.tensors.values())
    assert torch.equal(net[1].running_mean, running)
