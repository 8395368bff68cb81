"""Weights that are there only while they are asked for train the same adapters, to the bit."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from emptied import Emptied, emptied
from fleets import member, ragged
from random_bases import language_base
from torch import Tensor, nn

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.base.frozen import FrozenModel
from manylora.base.language import LanguageBase
from manylora.base.load import load_base
from manylora.gathering import gathered, gathered_again, is_gathered, place_gatherer
from manylora.spec import AdapterSpec
from manylora.training.checkpointing import Mode, checkpointed
from manylora.training.optim import OPTIMIZERS
from manylora.training.optim.stacked import StackedOptimizer
from manylora.training.step import train_step

NORMS = "re:.*(norm|ln_f|norm_f).*"
SPECS = {
    "mixed": AdapterSpec(rank=4, dropout=0.1, full_sites=(NORMS,)),
    "dora": AdapterSpec(method="dora", rank=8, dropout=0.1, sites=("all-linear", "lm_head")),
}
Trained = dict[str, Any]


def steps(base: LanguageBase, mode: Mode, specs: dict[str, AdapterSpec], count: int = 2) -> Trained:
    """Losses and norms of a few steps of members with these specs, and all factors after them."""
    found: Trained = {}
    with Bank(base, num_slots=len(specs), dtype=torch.float32) as bank, checkpointed(base, mode):
        members = [
            member(name, ragged(12, seed=seed), spec=spec, seed=seed) for seed, (name, spec) in enumerate(specs.items())
        ]
        for slot, one in enumerate(members):
            one.sit([slot])
            bank.put(Adapter.new(base, one.spec, seed=one.seed), slot=slot)
        optimizers = {"adamw": StackedOptimizer(bank, OPTIMIZERS.get("adamw"))}
        for step in range(count):
            for name, result in train_step(base, optimizers, members).items():
                found[f"{name} {step}"] = (result.loss, result.gradient_norm)
            for one in members:
                one.step += 1
        for slot, one in enumerate(members):
            for site, own in bank.get(slot).factors.items():
                found |= {f"{one.name} {site} {key}": value for key, value in own.tensors.items()}
    return found


def assert_equal(found: Trained, wanted: Trained) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        same = torch.equal(found[name], value) if isinstance(value, Tensor) else found[name] == value
        assert same, name


def assert_trains_the_same(base: LanguageBase, mode: Mode, specs: dict[str, AdapterSpec] = SPECS) -> Emptied:
    with emptied(base.model) as state:
        away = steps(base, mode, specs)
        assert state.present() == []
    assert not any(is_gathered(module) for module in base.model.modules())
    assert_equal(away, steps(base, mode, specs))
    assert all(math.isfinite(value[0]) for value in away.values() if isinstance(value, tuple))
    return state


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_steps_on_weights_that_come_and_go_are_those_on_weights_that_stay(quantize: str | None, mode: Mode) -> None:
    base = load_base("builtin:tiny-en", dtype="float32", device="cpu", quantize=quantize)
    state = assert_trains_the_same(base, mode)
    asked = {name.rpartition(".")[2] for name in state.opened}
    assert {"q_proj", "up_proj", "lm_head"} <= asked


@pytest.mark.parametrize(
    ("kind", "mode"), [("llama", "full"), ("qwen3", "none"), ("gpt2", "full"), ("gemma2", "none"), ("mixtral", "full")]
)
def test_so_are_they_on_models_of_other_kinds(kind: str, mode: Mode) -> None:
    """With biases, tied embeddings, two norms a head, and experts in one tensor."""
    assert_trains_the_same(language_base(kind), mode)


def test_so_are_they_where_only_the_first_layer_is_adapted_and_the_gradient_goes_through_bare_sites() -> None:
    base = load_base("builtin:tiny-en", dtype="float32", device="cpu")
    specs = {
        "one": AdapterSpec(rank=2, sites=("q_proj",), layers=(0,)),
        "all": AdapterSpec(method="full", sites=("k_proj", "embed_tokens"), layers=None),
    }
    assert_trains_the_same(base, "none", {"one": specs["one"]})
    assert_trains_the_same(base, "none", specs)


def test_packed_bases_are_read_through_the_gate_only() -> None:
    base = load_base("builtin:tiny-en", dtype="bfloat16", device="cpu", quantize="int4")
    assert_trains_the_same(base, "full", {name: replace(spec, dropout=0.0) for name, spec in SPECS.items()})


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_starts_the_same_on_weights_that_come_and_go(init: str) -> None:
    base = language_base()
    spec = AdapterSpec(rank=3, init=init, full_sites=("lm_head",))
    whole = Adapter.new(base, spec, seed=1)
    with emptied(base.model):
        away = Adapter.new(base, spec, seed=1)
        for name, own in base.sites["lm_head"].parameters().items():
            assert torch.equal(own.double(), whole.factors["lm_head"].tensors[name].double())
    for site, own in whole.factors.items():
        for name, value in own.tensors.items():
            assert torch.equal(away.factors[site].tensors[name], value)


def test_the_stand_in_notices_a_weight_that_is_kept() -> None:
    """Without the gate a graph of the module's own holds a weight that is away when its backward comes."""
    net = nn.Sequential(nn.Linear(4, 4, bias=False))
    with emptied(net):
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            net.requires_grad_(False)(torch.randn(3, 4, requires_grad=True))
        assert [tensor.untyped_storage().size() for tensor in kept] == [0]


def test_a_gate_does_nothing_where_nobody_placed_a_gatherer() -> None:
    module = nn.Linear(3, 3)
    with gathered(module) as brought, gathered(module):
        assert brought is None
    assert not is_gathered(module)
    entered: list[str] = []

    class Gate:
        def __enter__(self) -> None:
            entered.append("in")

        def __exit__(self, *_: object) -> None:
            entered.append("out")

    place_gatherer(module, Gate)
    assert is_gathered(module)
    with gathered(module), gathered(module):
        assert entered == ["in", "in"]
    assert entered == ["in", "in", "out", "out"]
    place_gatherer(module, None)
    assert not is_gathered(module)


def test_what_else_a_graph_keeps_goes_to_the_hooks_that_were_there() -> None:
    """Else a layer that is computed again would hold what it promised to drop."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
    site = FrozenModel(net).sites["0"]
    x = torch.randn(3, 4, requires_grad=True)
    packed, unpacked = [], []

    def pack(tensor: Tensor) -> tuple[str, Tensor]:
        packed.append(tensor.shape)
        return "held", tensor

    def unpack(held: tuple[str, Tensor]) -> Tensor:
        unpacked.append(held[1].shape)
        return held[1]

    with emptied(net) as state:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack), gathered_again(site.module):
            y = torch.tanh(nn.functional.linear(x, site.module.weight))
        assert packed == [(3, 4)], "the result of tanh, and no weight"
        assert state.present() == []
        y.sum().backward()
    assert unpacked == packed
    want = x.detach().clone().requires_grad_()
    torch.tanh(nn.functional.linear(want, net[0].weight)).sum().backward()
    assert torch.equal(x.grad, want.grad)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_fingerprint_is_the_same_on_weights_that_come_and_go(quantize: str | None) -> None:
    base = load_base("builtin:tiny-en", dtype="float32", device="cpu", quantize=quantize)
    base._fingerprint = None
    whole, base._fingerprint = base.fingerprint, None
    base = copy.deepcopy(base)  # what a digest has read as an array of numpy cannot be emptied
    with emptied(base.model) as state:
        assert base.fingerprint == whole
        assert state.present() == []
