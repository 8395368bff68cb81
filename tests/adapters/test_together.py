"""Sites that read one input are computed together in training, and it changes nothing but the order of sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.random_bases import fill, language_base, ragged_batch, taken
from torch import Tensor, nn

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.base.frozen import FrozenModel
from manylora.base.sites import reads_along
from manylora.objectives import OBJECTIVES
from manylora.ops import low_rank
from manylora.spec import AdapterSpec
from manylora.training.checkpointing import Mode, checkpointed


class Readers(nn.Module):
    """Two maps of one input, with what a caller asks for done to it between them, and a third of their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 2)
        self.between: Any = lambda x: x

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0
        return self.last(self.one(x) + self.two(self.between(x)))


def example(rows: int) -> dict[str, Tensor]:
    return {"x": torch.randn(rows, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The names of the sites of each application of the low-rank update."""
    seen: list[list[str]] = []
    own = low_rank._applied

    def applied(x: Tensor, call: Any) -> tuple[Tensor, ...]:
        seen.append([site.name.rpartition(".")[2] for site, _ in call.sites])
        return own(x, call)

    monkeypatch.setattr(low_rank, "_applied", applied)
    return seen


def readers() -> FrozenModel:
    torch.manual_seed(0)
    module = Readers().double()
    base = FrozenModel(module, example=example)
    base.reads_along = reads_along(base.sites, lambda: module(**example(1)))
    return base


def test_readers_of_one_input_are_found() -> None:
    base = readers()
    assert base.reads_along == {"one": ("two",)}
    hook = base.model.get_submodule("two").register_forward_pre_hook(lambda module, args: (args[0] * 1.0,))
    assert reads_along(base.sites, lambda: base.model(**example(1))) == {}, "a hook gives it another input"
    hook.remove()
    base.model.between = lambda x: x.clone()
    assert reads_along(base.sites, lambda: base.model(**example(1))) == {}
    assert reads_along(base.sites, lambda: [base.model(**example(1)) for _ in range(2)]) == {}, "called more than once"


def gradients(base: FrozenModel, bank: Bank, *, joint: bool) -> list[Tensor]:
    base.reads_along = {"one": ("two",)} if joint else {}
    with bank.route((0,), (7,)):
        base.model(**example(3)).square().sum().backward()
    found = [tensor.grad for stack in bank.stacks.values() for tensor in stack.tensors.values()]
    for stack in bank.stacks.values():
        for tensor in stack.tensors.values():
            tensor.grad = None
    assert bank._ahead is None, "held beyond the route"
    return [grad for grad in found if grad is not None]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_together_and_one_by_one_agree(dropout: float, calls: list[list[str]]) -> None:
    base = readers()
    with Bank(base, dtype=torch.float64) as bank:
        fill(bank, (AdapterSpec(rank=2, dropout=dropout),))
        together = gradients(base, bank, joint=True)
        assert calls == [["one", "two"], ["last"]]
        alone = gradients(base, bank, joint=False)
        assert calls[2:] == [["one"], ["two"], ["last"]]
    assert len(together) == len(alone) == 6
    for got, want in zip(together, alone, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_another_tensor_is_computed_anew() -> None:
    base = readers()
    with Bank(base, dtype=torch.float64) as bank:
        fill(bank, (AdapterSpec(rank=2),))
        base.model.between = lambda x: x * 2
        together, alone = (gradients(base, bank, joint=joint) for joint in (True, False))
        for got, want in zip(together, alone, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_an_input_that_was_changed_in_place_is_computed_anew() -> None:
    """Autograd then refuses the backward of the first reader; what the second one gives must still be right."""
    base = readers()
    with Bank(base, dtype=torch.float64) as bank:
        fill(bank, (AdapterSpec(rank=2),))
        base.model.between = lambda x: x.mul_(2)
        outputs = []
        for joint in (True, False):
            base.reads_along = {"one": ("two",)} if joint else {}
            with bank.route((0,)):
                outputs.append(base.model(**example(3)).detach())
        torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)


def test_only_adapted_sites_with_gradients_or_without(calls: list[list[str]]) -> None:
    base = readers()
    with Bank(base, dtype=torch.float64) as bank:
        fill(bank, (AdapterSpec(rank=2),))
        with torch.no_grad(), bank.route((0,)):
            base.model(**example(3))
        assert calls == [["one", "two"], ["last"]]
        calls.clear()
        bank.put(Adapter.new(base, AdapterSpec(rank=2, sites=("two", "last"))), slot=0)
        gradients(base, bank, joint=True)
        assert calls == [["two"], ["last"]]


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_a_fleets_gradients_on_real_architectures(kind: str, mode: Mode, calls: list[list[str]]) -> None:
    base = language_base(kind)
    objectives = dict.fromkeys((-1, 0, 1, 2), OBJECTIVES.get("causal-lm"))
    found = base.reads_along
    with Bank(base, num_slots=3, dtype=torch.float64) as bank:
        fill(bank)
        batch = ragged_batch(base)
        with checkpointed(base, mode):
            together = taken(base, batch, objectives)
            # Only a layer that keeps nothing is computed again; the last one keeps all in every mode.
            sizes = [len(call) for call in calls]
            assert (sizes.count(3), sizes.count(2)) == {"none": (3, 3), "selective": (3, 3), "full": (5, 5)}[mode]
            base.reads_along = {}
            calls.clear()
            alone = taken(base, batch, objectives)
            assert {len(call) for call in calls} == {1}
    assert len(found) == 3 * 3
    assert together.keys() == alone.keys()
    for name, want in alone.items():
        torch.testing.assert_close(together[name], want, rtol=1e-9, atol=1e-11, msg=name)


def test_a_site_of_another_method_stays_by_itself(calls: list[list[str]]) -> None:
    base = readers()
    with Bank(base, dtype=torch.float64) as bank:
        fill(bank, (AdapterSpec(rank=2, full_sites=("two",)),))
        gradients(base, bank, joint=True)
        assert calls == [["one"], ["last"]]


@pytest.mark.parametrize("nested", [False, True])
def test_what_was_computed_ahead_belongs_to_its_route(nested: bool) -> None:
    """The second reader of the very same input is called in another route: after the first's, or inside of it."""
    base = readers()
    (x,) = example(3).values()
    one, two = base.sites["one"].module, base.sites["two"].module
    with Bank(base, dtype=torch.float64) as bank:
        fill(bank, (AdapterSpec(rank=2),))
        with bank.route((-1,)):
            bare = two(x)
        with bank.route((0,)):
            one(x)
            if nested:
                with bank.route((-1,)):
                    got = two(x)
        if not nested:
            with bank.route((-1,)):
                got = two(x)
        assert torch.equal(got, bare)


def test_what_was_computed_ahead_does_not_outlive_its_adapter() -> None:
    base = readers()
    (x,) = example(3).values()
    one, two = base.sites["one"].module, base.sites["two"].module
    other = Adapter.new(base, AdapterSpec(rank=2, full_sites=("two",)), seed=8)
    with Bank(base, dtype=torch.float64) as bank:
        fill(bank, (AdapterSpec(rank=2),))
        with bank.route((0,)):
            one(x)
            bank.put(other, slot=0)
            got = two(x)
            torch.testing.assert_close(got, two(x.clone()), rtol=0.0, atol=0.0)
