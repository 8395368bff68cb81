"""A base keeps the forwards that it brought, adapted or not, and gets them back."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from random_bases import fill, language_base, ragged_batch, taken
from torch import Tensor, nn

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.adapters.merge.measure import standing_in as with_parameters
from manylora.base.frozen import FrozenModel
from manylora.base.language import LanguageBase
from manylora.errors import RouteError
from manylora.forwards import Level, brought_forward, own_forward, place_stand_in, run_with, standing_in
from manylora.objectives.causal_lm import CAUSAL_LM
from manylora.spec import AdapterSpec
from manylora.training.checkpointing import checkpointed

SPECS = (
    AdapterSpec(rank=2, dropout=0.1),
    AdapterSpec(rank=8, full_sites=("re:.*norm.*", "re:.*down_proj")),
    AdapterSpec(rank=4, sites=("q_proj", "embed_tokens", "lm_head")),
)


# -- a pile of stand-ins -----------------------------------------------------------------------------------------------


class Named:
    """A forward that says who was called, from the top down."""

    def __init__(self, name: str, calls: list[str], beneath: Callable[..., Any]):
        self.name, self.calls, self.beneath = name, calls, beneath

    def __call__(self, *args: Any) -> Any:
        self.calls.append(self.name)
        return self.beneath(*args)


def placed(module: nn.Module, name: str, calls: list[str], level: Level) -> Any:
    def run(*args: Any) -> Any:
        calls.append(name)
        return stand_in.beneath(*args)

    stand_in = place_stand_in(module, run, level)
    return stand_in


def called(module: nn.Module, calls: list[str]) -> list[str]:
    del calls[:]
    module(torch.ones(1, 2))
    return list(calls)


def test_who_stands_where_is_the_level_s_affair_and_not_the_order_s() -> None:
    for order in ([Level.SITE, Level.RECOMPUTED, Level.LAYER], [Level.RECOMPUTED, Level.LAYER, Level.SITE]):
        module, calls = nn.Linear(2, 2), []
        stand_ins = [placed(module, level.name, calls, level) for level in order]
        assert called(module, calls) == ["RECOMPUTED", "LAYER", "SITE"]
        for stand_in in stand_ins:
            stand_in.remove()
        assert "forward" not in module.__dict__
        assert called(module, calls) == []


def test_what_others_put_above_stays_and_calls_through_when_we_are_gone() -> None:
    module, calls = nn.Linear(2, 2), []
    ours = placed(module, "ours", calls, Level.SITE)
    above = Named("theirs", calls, module.forward)
    module.forward = above  # as a hook does, which keeps what stood there
    second = placed(module, "second", calls, Level.SITE)
    assert called(module, calls) == ["second", "theirs", "ours"]
    ours.remove()
    assert called(module, calls) == ["second", "theirs"]
    second.remove()
    assert module.__dict__["forward"] is above
    assert called(module, calls) == ["theirs"]


def test_what_was_brought_is_known_and_comes_back() -> None:
    module, calls = nn.Linear(2, 2), []
    assert brought_forward(module) is None
    theirs = Named("theirs", calls, lambda x: nn.Linear.forward(module, x))
    module.forward = theirs
    assert brought_forward(module) is theirs
    with standing_in(module, lambda x: own_forward(module, x) + 1, Level.SITE):
        assert brought_forward(module) is theirs
        assert called(module, calls) == ["theirs"]
    assert module.__dict__["forward"] is theirs


def test_a_base_that_nobody_holds_goes_with_its_bank_open() -> None:
    base = language_base()
    gone = [weakref.ref(module) for module in (base.model, base.model.model.layers[0].mlp.up_proj)]
    bank = Bank(base)
    assert bank.base is base
    del base, bank
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_a_pile_is_gone_when_the_last_of_ours_is() -> None:
    module, calls = nn.Linear(2, 2), []
    before = dict(module.__dict__)
    ours = placed(module, "ours", calls, Level.SITE)
    module.forward = theirs = Named("theirs", calls, module.forward)
    ours.remove()
    assert module.__dict__ == before | {"forward": theirs}
    assert brought_forward(module) is theirs
    assert called(module, calls) == ["theirs"]


def test_hooks_fire_once_and_parameters_come_back() -> None:
    module, fired = nn.Linear(2, 2), []
    module.register_forward_hook(lambda *_: fired.append(1))
    weight = module.weight
    other = torch.zeros(2, 2, requires_grad=True)
    with standing_in(module, lambda x: run_with(module, {"weight": other}, x), Level.SITE):
        out = module(torch.ones(1, 2))
    assert fired == [1]
    assert torch.equal(out, module.bias[None])
    out.sum().backward()
    assert other.grad is not None
    assert module.weight is weight
    with pytest.raises(RuntimeError, match="shapes"):
        run_with(module, {"weight": torch.zeros(2, 3)}, torch.ones(1, 2))
    assert module.weight is weight


# -- bases that carry forwards of their own ----------------------------------------------------------------------------


class Counting(ModelHook):
    """accelerate's hook: sees each call of its module, and halves what comes out."""

    def __init__(self, share: float = 1.0):
        self.calls, self.share = 0, share

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return output * self.share


def halved(module: Any) -> None:
    """A user's patch: what the module gives is halved."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return 0.5 * type(module).forward(module, *args, **kwargs)

    module.forward = forward


def hooked(model: Any) -> dict[str, Counting]:
    """Hooks on maps, norms, the embedding and the head, as a base may come with them."""
    hooks = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "down_proj", "input_layernorm", "embed_tokens", "lm_head")):
            hooks[name] = Counting(0.5 if name.endswith(("q_proj", "down_proj", "layernorm")) else 1.0)
            add_hook_to_module(module, hooks[name])
    return hooks


@pytest.fixture
def bases() -> tuple[LanguageBase, LanguageBase, dict[str, Counting]]:
    """A base with hooks, one whose weights are halved instead, and the hooks."""
    plain, carrying = language_base(), language_base()
    hooks = hooked(carrying.model)
    again = LanguageBase(carrying.model, name="hooked").probed()
    with torch.no_grad():
        for name, module in plain.model.named_modules():
            if name in hooks and hooks[name].share == 0.5:
                module.weight.mul_(0.5)
    return again, LanguageBase(plain.model, name="halved").probed(), hooks


def test_hooks_of_a_base_run_and_count_as_part_of_its_map(
    bases: tuple[LanguageBase, LanguageBase, dict[str, Counting]],
) -> None:
    """The bare base in a bank computes what it computes without one, its hooks among it, and gets them back."""
    carrying, plain, hooks = bases
    batch = ragged_batch(carrying)
    before = {name: module.__dict__.get("forward") for name, module in carrying.model.named_modules()}
    found = []
    for base in (carrying, plain):
        with torch.no_grad():
            alone = base.outputs(batch).hidden
        with Bank(base, num_slots=3, dtype=torch.float64) as bank, torch.no_grad(), bank.route((-1,) * batch.num_rows):
            assert torch.equal(base.outputs(batch).hidden, alone)
        found.append(alone)
    torch.testing.assert_close(found[0], found[1])
    assert all(hook.calls for name, hook in hooks.items() if name != "lm_head")
    after = {name: module.__dict__.get("forward") for name, module in carrying.model.named_modules()}
    assert after == before
    for name in hooks:
        assert before[name] is not None
        remove_hook_from_module(carrying.model.get_submodule(name))


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_an_adapted_site_keeps_its_hook_and_its_gradients_are_right(
    bases: tuple[LanguageBase, LanguageBase, dict[str, Counting]], mode: Any
) -> None:
    """Low rank beside a halving hook: base map halved, update not; whole copies run under the hook and are halved."""
    carrying, plain, hooks = bases
    batch = ragged_batch(carrying)
    with Bank(carrying, num_slots=3, dtype=torch.float64) as bank, checkpointed(carrying, mode):
        fill(bank, SPECS)
        for hook in hooks.values():
            hook.calls = 0
        own = taken(carrying, batch, dict.fromkeys((-1, 0, 1, 2), CAUSAL_LM))
        assert all(hook.calls for name, hook in hooks.items() if name != "lm_head")
    with Bank(plain, num_slots=3, dtype=torch.float64) as bank:
        fill(bank, SPECS)
        whole = [(key, stack) for key, stack in bank.stacks.items() if stack.method == "full"]
        for _, stack in whole:
            if stack.site.name in hooks and hooks[stack.site.name].share == 0.5:
                stack.tensors["weight"].data.copy_(0.5 * _weights(carrying, stack.site.name))
        other = taken(plain, batch, dict.fromkeys((-1, 0, 1, 2), CAUSAL_LM))
    halved_copies = [f"{key} weight" for key, stack in whole if hooks.get(stack.site.name, Counting()).share == 0.5]
    assert halved_copies
    assert own.keys() == other.keys()
    for name, value in other.items():
        expected = 0.5 * value if name in halved_copies else value
        torch.testing.assert_close(own[name], expected, rtol=1e-8, atol=1e-11, equal_nan=True)


def _weights(base: LanguageBase, name: str) -> Tensor:
    return base.model.get_submodule(name).get_parameter("weight").detach()


def test_a_patched_module_is_not_taken_for_the_textbook_map() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    halved(net[0])
    patched = net[0].forward
    base = FrozenModel(net, example=lambda rows: {"input": torch.randn(rows, 4, dtype=torch.float64)})
    assert not base.sites["0"].plain
    assert base.sites["2"].plain
    x = torch.randn(5, 4, dtype=torch.float64)
    expected = net(x)
    with Bank(base, dtype=torch.float64) as bank:
        bank.put(Adapter.new(base, AdapterSpec(rank=2), seed=0), slot=0)
        with bank.route([0] * 5):
            assert torch.equal(net(x), expected)
        halved(net[2])  # and one that is patched while it is adapted is neither
        with bank.route([0] * 5):
            torch.testing.assert_close(net(x), 0.5 * expected)
    assert net[0].forward is patched
    torch.testing.assert_close(net(x), 0.5 * expected)


def test_a_weight_that_is_away_between_forward_and_backward_gives_the_same_gradients() -> None:
    """accelerate's offload: a module's weights are there while it runs, and on the meta device before and after."""
    plain, away = language_base(), language_base()
    assert away.fingerprint == plain.fingerprint  # taken while the weights are there
    for name, module in away.model.named_modules():
        if name.endswith(("gate_proj", "o_proj")):
            held = {key: value.detach().clone() for key, value in module.state_dict().items()}
            hook = AlignDevicesHook(execution_device="cpu", offload=True, weights_map=held, place_submodules=False)
            add_hook_to_module(module, hook)
    assert away.model.model.layers[0].mlp.gate_proj.weight.is_meta
    batch = ragged_batch(plain)
    found = []
    for base in (plain, away):
        with Bank(base, num_slots=3, dtype=torch.float64) as bank:
            fill(bank, (AdapterSpec(rank=2, dropout=0.1), AdapterSpec(rank=8), AdapterSpec(rank=4)))
            found.append(taken(base, batch, dict.fromkeys((-1, 0, 1, 2), CAUSAL_LM)))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-8, atol=1e-11, equal_nan=True)


def test_a_layer_with_a_forward_of_its_own_is_computed_again_by_it() -> None:
    base = language_base()
    layer = base.model.model.layers[1]
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return type(layer).forward(layer, *args, **kwargs)

    layer.forward = counted
    batch = ragged_batch(base, slots=(0, 0))
    with Bank(base, dtype=torch.float64) as bank:
        fill(bank, (AdapterSpec(rank=2),))
        plain = taken(base, batch, {0: CAUSAL_LM})
        del calls[:]
        with checkpointed(base, "full"):
            again = taken(base, batch, {0: CAUSAL_LM})
        assert len(calls) == 2  # once more in backward
    assert layer.__dict__["forward"] is counted
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, rtol=1e-12, atol=1e-14)


def test_a_merge_is_measured_through_the_hooks_too() -> None:
    base = language_base()
    hooks = hooked(base.model)
    before = base.model.model.layers[0].mlp.down_proj.forward
    batch = ragged_batch(base, slots=(-1, -1))
    with torch.no_grad():
        plain = base.outputs(batch).hidden
        with with_parameters(base, lambda site: site.parameters() if site.kind == "linear" else {}):
            assert torch.equal(base.outputs(batch).hidden, plain)
    assert base.model.model.layers[0].mlp.down_proj.forward == before
    assert all(hook.calls for name, hook in hooks.items() if name != "lm_head")


def test_a_weight_that_somebody_took_away_before_the_backward_is_refused() -> None:
    """No forward of the module's own brings it back, so the gradient of the input cannot be had."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).double()
    base = FrozenModel(net, example=lambda rows: {"input": torch.randn(rows, 4, dtype=torch.float64)})
    with Bank(base, dtype=torch.float64) as bank:
        bank.put(Adapter.new(base, AdapterSpec(rank=2), seed=0), slot=0)
        with bank.route([0] * 5):
            out = net(torch.randn(5, 4, dtype=torch.float64))
        net[1].weight = nn.Parameter(net[1].weight.to("meta"), requires_grad=False)
        with pytest.raises(RouteError, match="the weight of '1' is not in memory"):
            out.sum().backward()
