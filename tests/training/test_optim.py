"""What the optimisers over stacks owe: torch's own numbers for each slot, whatever its neighbours are doing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from drawn import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizers import KINDS, optimizer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.base.frozen import FrozenModel
from manylora.errors import ConfigError
from manylora.spec import AdapterSpec
from manylora.training.optim import OPTIMIZERS
from manylora.training.optim.rule import Rule
from manylora.training.optim.stacked import (
    OptimizerSettings,
    SlotUpdate,
    StackedOptimizer,
    drop_gradients,
    gradient_norms,
)
from manylora.types import Stack

SPECS = (
    AdapterSpec(rank=4, sites=("all-linear",)),
    AdapterSpec(rank=3, sites=("all-linear",)),  # padded to 4: shares the first one's stacks
    AdapterSpec(rank=2, sites=("0",), full_sites=("1",)),
)
UPDATES = (
    {"rate": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.99), "clip_norm": 0.5},
    {"rate": 3e-3, "weight_decay": 0.0, "betas": (0.8, 0.999), "clip_norm": None, "epsilon": 1e-6},
    {"rate": 5e-2, "weight_decay": 0.01, "betas": (0.9, 0.95), "clip_norm": 100.0},
)
ALIKE = ({"rate": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.99), "clip_norm": 0.5},) * 3


def bank_of(*specs: AdapterSpec, dtype: torch.dtype = torch.float64, width: int = 5) -> Bank:
    torch.manual_seed(0)
    base = FrozenModel(nn.Sequential(nn.Linear(6, width), nn.Linear(width, 7)).to(dtype))
    bank = Bank(base, num_slots=len(specs), dtype=dtype)
    for slot, spec in enumerate(specs):
        bank.put(Adapter.new(base, spec, seed=slot), slot=slot)
    return bank


def held(bank: Bank, slot: int, what: Callable[[Tensor], Tensor | None] = lambda tensor: tensor) -> list[Tensor]:
    """A slot's part of each tensor of its stacks, or of their gradients; copies."""
    found = []
    for stack, place in bank.places(slot):
        for tensor in stack.tensors.values():
            whole = what(tensor)
            assert whole is not None
            found.append(whole.detach()[place].clone())
    return found


def real(stack: Stack, place: int, name: str) -> tuple[slice, ...]:
    """Where a place's own numbers lie, without the padding of its rank."""
    if stack.method != "lora":
        return (slice(None),)
    own = slice(0, stack.ranks[place])
    return (own,) if name == "a" else (slice(None), own)


def draw_gradients(bank: Bank, draw: torch.Generator, size: float = 1.0) -> None:
    """Random gradients everywhere but in padding and in free places, as a backward gives them."""
    for stack in bank.stacks.values():
        for name, tensor in stack.tensors.items():
            tensor.grad = torch.zeros_like(tensor)
            for place, slot in enumerate(stack.slots):
                if slot != -1:
                    own = tensor.grad[place][real(stack, place, name)]
                    own.copy_(torch.randn(own.shape, generator=draw, dtype=torch.float64) * size)


def updates(
    step: int, chosen: tuple[dict, ...], slots: list[int], kind: str = "adamw", **more: Any
) -> dict[int, SlotUpdate]:
    name, own = KINDS[kind]
    return {
        slot: SlotUpdate(
            step=step,
            rate=chosen[slot]["rate"],
            optimizer=optimizer(
                name, own=own, **{key: one for key, one in (chosen[slot] | more).items() if key != "rate"}
            ),
        )
        for slot in slots
    }


def optimizer_of(bank: Bank, kind: str = "adamw") -> StackedOptimizer:
    return StackedOptimizer(bank, OPTIMIZERS.get(KINDS[kind][0]))


def torchs(twins: list[nn.Parameter], update: SlotUpdate, kind: str) -> Callable[[], None]:
    """A step of torch's own optimiser by the same settings."""
    name, rate, shared = KINDS[kind][0], update.rate, update.optimizer
    decay, betas = shared.weight_decay, shared.betas
    within = decay if shared.decay == "l2" else 0.0
    own = dict(KINDS[kind][1])
    made: Any = {
        "adamw": lambda: torch.optim.Adam(twins, lr=rate, weight_decay=within, betas=betas, eps=shared.epsilon),
        "sgd": lambda: torch.optim.SGD(twins, lr=rate, weight_decay=within, **{"momentum": betas[0], **own}),
        "rmsprop": lambda: torch.optim.RMSprop(
            twins, lr=rate, weight_decay=within, eps=shared.epsilon, alpha=own.pop("smoothing", 0.99), **own
        ),
        "adagrad": lambda: torch.optim.Adagrad(
            twins,
            lr=rate,
            weight_decay=within,
            eps=shared.epsilon,
            lr_decay=own.get("rate_decay", 0.0),
            initial_accumulator_value=own.get("initial_accumulator", 0.0),
        ),
    }[name]()

    def step() -> None:
        with torch.no_grad():
            for twin in twins:
                twin.mul_(1 - rate * (decay - within))  # decoupled: torch's own would go through the momentum
        made.step()

    return step


@pytest.mark.parametrize("decay", ["decoupled", "l2"])
@pytest.mark.parametrize("chosen", [UPDATES, ALIKE], ids=["mixed", "alike"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_fifty_steps_equal_torchs_for_each_slot(kind: str, chosen: tuple[dict, ...], decay: str) -> None:
    bank = bank_of(*SPECS)
    twins = [[nn.Parameter(part) for part in held(bank, slot)] for slot in range(3)]
    truth = [torchs(twins[slot], one, kind) for slot, one in updates(1, chosen, [0, 1, 2], kind, decay=decay).items()]
    own = optimizer_of(bank, kind)
    draw = torch.Generator().manual_seed(1)
    for step in range(1, 51):
        draw_gradients(bank, draw, size=0.1 if step % 7 else 30.0)  # with and without a bound that is reached
        norms = gradient_norms(bank)
        for slot, one in enumerate(chosen):
            for twin, grad in zip(twins[slot], held(bank, slot, lambda tensor: tensor.grad), strict=True):
                twin.grad = grad
            bound = math.inf if one["clip_norm"] is None else one["clip_norm"]
            norm = torch.nn.utils.clip_grad_norm_(twins[slot], bound)
            assert norms[slot] == pytest.approx(norm.item(), rel=1e-13)
            truth[slot]()
        own.step(updates(step, chosen, [0, 1, 2], kind, decay=decay), norms)
        drop_gradients(bank)
        for slot in range(3):
            for got, want in zip(held(bank, slot), twins[slot], strict=True):
                torch.testing.assert_close(got, want.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", list(KINDS))
@settings(max_examples=examples(20), deadline=None)
@given(st.lists(st.sets(st.integers(0, 2)), min_size=1, max_size=5))
def test_slots_that_are_stepped_at_different_times_are_as_if_alone(kind: str, steps: list[set[int]]) -> None:
    """Some slots step, others wait: each has the numbers of a bank in which it is the only one that ever moves."""
    bank, lone = bank_of(*SPECS), [bank_of(*SPECS) for _ in SPECS]
    own, others = optimizer_of(bank, kind), [optimizer_of(one, kind) for one in lone]
    done = [0, 0, 0]
    for number, slots in enumerate(steps):
        before = [held(bank, slot) for slot in range(3)]
        together: dict[int, SlotUpdate] = {}
        for slot in sorted(slots):
            done[slot] += 1
            together |= updates(done[slot], UPDATES, [slot], kind)
        for one in (bank, *lone):
            draw_gradients(one, torch.Generator().manual_seed(number))
        for slot in slots:
            others[slot].step({slot: together[slot]}, gradient_norms(lone[slot]))
        waiting = set(range(3)) - slots
        grads = {slot: held(bank, slot, lambda tensor: tensor.grad) for slot in waiting}
        own.step(together, gradient_norms(bank))
        for slot in waiting:  # another optimiser may be about to step it
            assert all(map(torch.equal, held(bank, slot, lambda tensor: tensor.grad), grads[slot]))
        for slot in range(3):
            expected = held(lone[slot], slot) if slot in slots else before[slot]
            for got, want in zip(held(bank, slot), expected, strict=True):
                assert torch.equal(got, want)
            settings = updates(1, UPDATES, [slot], kind)[slot].optimizer
            for key, value in others[slot].slot_state(slot, settings).items():
                assert torch.equal(own.slot_state(slot, settings)[key], value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_padding_of_a_rank_stays_exactly_zero(kind: str, dtype: torch.dtype) -> None:
    bank = bank_of(*SPECS, dtype=dtype)
    own = optimizer_of(bank, kind)
    draw = torch.Generator().manual_seed(1)
    for step in range(1, 21):
        draw_gradients(bank, draw)
        own.step(updates(step, UPDATES, [0, 1, 2], kind), gradient_norms(bank))
    for stack in bank.stacks.values():
        for place, rank in enumerate(stack.ranks):
            if stack.method == "lora":
                assert not stack.tensors["a"][place, rank:].any()
                assert not stack.tensors["b"][place, :, rank:].any()
                assert stack.tensors["b"][place, :, :rank].all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_slot_whose_gradient_is_not_finite_leaves_the_others_alone(kind: str, bad: float) -> None:
    banks = [bank_of(*SPECS) for _ in range(2)]
    for bank in banks:
        draw_gradients(bank, torch.Generator().manual_seed(1))
    stack, place = banks[0].places(1)[0]
    stack.tensors["a"].grad[place, 0, 0] = bad
    norms = gradient_norms(banks[0])
    assert not math.isfinite(norms[1])
    before = held(banks[0], 1)
    for bank in banks:
        optimizer_of(bank, kind).step(updates(1, UPDATES, [0, 2], kind), gradient_norms(bank))
    for slot in (0, 2):
        assert norms[slot] == gradient_norms_alone(slot)
        assert all(torch.equal(a, b) for a, b in zip(held(banks[0], slot), held(banks[1], slot), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(held(banks[0], 1), before, strict=True))


def gradient_norms_alone(slot: int) -> float:
    bank = bank_of(*SPECS)
    draw_gradients(bank, torch.Generator().manual_seed(1))
    return gradient_norms(bank)[slot]


def test_views_that_are_kept_follow_a_bank_whose_members_come_and_go() -> None:
    """An optimiser that lives as long as the bank updates what one that is made anew for each step does."""
    found = []
    for fresh in (False, True):
        draw = torch.Generator().manual_seed(4)
        bank = bank_of(*SPECS)
        optimizer = optimizer_of(bank)
        for step, slots in enumerate(([0, 1, 2], [0, 2], [0, 1, 2], [1]), start=1):
            if step == 2:
                bank.clear(1)
            if step == 3:
                bank.put(Adapter.new(bank.base, AdapterSpec(rank=4, sites=("all-linear",)), seed=9), slot=1)
            draw_gradients(bank, draw)
            optimizer = optimizer_of(bank) if fresh else optimizer
            optimizer.step(updates(step, UPDATES, slots), gradient_norms(bank))
        found.append([held(bank, slot) for slot in range(3)])
    for kept, anew in zip(*found, strict=True):
        assert len(kept) == len(anew) > 0
        assert all(torch.equal(one, other) for one, other in zip(kept, anew, strict=True))


def test_norms_leave_slots_that_were_cleared_and_missing_gradients_out() -> None:
    bank = bank_of(*SPECS)
    assert gradient_norms(bank) == [0.0, 0.0, 0.0]
    draw_gradients(bank, torch.Generator().manual_seed(1))
    bank.clear(1)
    assert not any(-1 in stack.slots for stack in bank.stacks.values())
    want = torch.cat([part.flatten() for part in held(bank, 0, lambda tensor: tensor.grad)]).norm().item()
    found = gradient_norms(bank)
    assert found[0] == pytest.approx(want, rel=1e-13)
    assert found[1] == 0.0


def test_a_tensor_without_a_gradient_decays_and_no_more() -> None:
    bank = bank_of(SPECS[0])
    before = held(bank, 0)
    optimizer_of(bank).step(updates(1, UPDATES, [0]), gradient_norms(bank))
    for got, want in zip(held(bank, 0), before, strict=True):
        torch.testing.assert_close(got, want * (1 - 1e-2 * 0.1), rtol=1e-14, atol=0.0)


def test_slots_of_equal_settings_are_updated_in_one_call() -> None:
    calls = []

    class Counting(Rule):
        def update(self, values: list[Tensor], grads: list[Tensor], state: object, settings: SlotUpdate) -> None:
            calls.append((len(values), settings.rate))
            assert all(value.shape == grad.shape for value, grad in zip(values, grads, strict=True))

    bank = bank_of(SPECS[0], SPECS[0], SPECS[1])
    num_tensors = sum(len(stack.tensors) for stack in bank.stacks.values())
    draw_gradients(bank, torch.Generator().manual_seed(1))
    own = StackedOptimizer(bank, Counting())
    own.step(updates(1, ALIKE, [0, 1, 2]), gradient_norms(bank))
    assert calls == [(num_tensors, 1e-2)]  # whole stacks, no place by itself
    calls.clear()
    own.step(updates(1, (ALIKE[0], ALIKE[0], UPDATES[2]), [0, 1, 2]), gradient_norms(bank))
    assert calls == [(2 * num_tensors, 1e-2), (num_tensors, 5e-2)]
    calls.clear()
    own.step(updates(1, tuple(one | {"rate_ratio": 4.0} for one in ALIKE), [0, 1, 2]), gradient_norms(bank))
    assert sorted(calls) == [(num_tensors // 2, 1e-2), (num_tensors // 2, 4e-2)]  # whole stacks again, a and b apart


def test_the_rate_of_b_is_so_many_times_that_of_a() -> None:
    """LoRA+: where gradients are equal, one step of AdamW moves numbers of b the ratio times as far as those of a."""
    bank = bank_of(*SPECS)
    before = {slot: held(bank, slot) for slot in range(3)}
    for stack in bank.stacks.values():
        for tensor in stack.tensors.values():
            tensor.grad = torch.ones_like(tensor)
    ratios, rate = (16.0, 1.0, 0.25), 1e-3
    now = {
        slot: SlotUpdate(rate=rate, step=1, optimizer=optimizer("adamw", epsilon=1e-30, rate_ratio=ratio))
        for slot, ratio in enumerate(ratios)
    }
    optimizer_of(bank).step(now, gradient_norms(bank))
    for slot, ratio in enumerate(ratios):
        names = [(stack.method, name) for stack, _ in bank.places(slot) for name in stack.tensors]
        for (method, name), was, is_ in zip(names, before[slot], held(bank, slot), strict=True):
            factor = ratio if (method, name) == ("lora", "b") else 1.0
            torch.testing.assert_close(was - is_, torch.full_like(was, factor * rate), rtol=1e-9, atol=0.0)


def test_the_rate_of_a_site_is_that_of_the_first_pattern_it_matches() -> None:
    bank = bank_of(*SPECS)
    before = {slot: held(bank, slot) for slot in range(3)}
    for stack in bank.stacks.values():
        for tensor in stack.tensors.values():
            tensor.grad = torch.ones_like(tensor)
    patterns: tuple[dict[str, float], ...] = ({"0": 3.0, "[01]": 0.0}, {}, {"1": 0.5})
    now = {
        slot: SlotUpdate(
            rate=1e-3, step=1, optimizer=optimizer("adamw", epsilon=1e-30, rate_ratio=2.0, rate_pattern=pattern)
        )
        for slot, pattern in enumerate(patterns)
    }
    optimizer_of(bank).step(now, gradient_norms(bank))
    wanted: tuple[dict[str, float], ...] = ({"0": 3e-3, "1": 0.0}, {"0": 1e-3, "1": 1e-3}, {"0": 1e-3, "1": 5e-4})
    for slot in range(3):
        names = [(stack.site.name, stack.method, name) for stack, _ in bank.places(slot) for name in stack.tensors]
        for (site, method, name), was, is_ in zip(names, before[slot], held(bank, slot), strict=True):
            moved = wanted[slot][site] * (2.0 if (method, name) == ("lora", "b") else 1.0)
            torch.testing.assert_close(was - is_, torch.full_like(was, moved), rtol=1e-9, atol=0.0)


def test_a_pattern_that_matches_no_site_is_refused_with_near_names() -> None:
    sites = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]
    optimizer("adamw", rate_pattern={"q_proj": 2.0, r"layers\.0\..*": 0.5}).check(sites)
    with pytest.raises(ConfigError, match="'q_prj' matches none of the adapter's 2 sites") as caught:
        optimizer("adamw", rate_pattern={"v_proj": 2.0, "q_prj": 2.0}).check(sites)
    assert caught.value.nearest[0] == "q_proj"


class Factored(Rule):
    """Steps by the sign, and keeps row sums of matrices and nothing of vectors: state as small as it comes."""

    def state_shapes(self, shape: tuple[int, ...], settings: OptimizerSettings) -> dict[str, tuple[int, ...]]:
        return {"rows": shape[:1]} if len(shape) == 2 else {}

    def update(self, values: Any, grads: Any, state: Any, settings: SlotUpdate) -> None:
        matrices = [grad for grad in grads if grad.dim() == 3]
        for grad, rows in zip(matrices, state.get("rows", []), strict=True):
            assert rows.shape == grad.shape[:2]
            rows.add_(grad.sum(2))
        for value, grad in zip(values, grads, strict=True):
            value.add_(grad.sign(), alpha=-settings.rate)


@pytest.mark.parametrize("chosen", [UPDATES, ALIKE], ids=["mixed", "alike"])
def test_a_rule_may_keep_less_than_its_tensors_or_nothing(chosen: tuple[dict, ...]) -> None:
    bank = bank_of(*SPECS)
    own = StackedOptimizer(bank, Factored())
    draw_gradients(bank, torch.Generator().manual_seed(1))
    sums = {slot: [grad.sum(1) for grad in held(bank, slot, lambda t: t.grad) if grad.dim() == 2] for slot in range(3)}
    free = tuple(one | {"clip_norm": None} for one in chosen)
    one, settings = updates(1, free, [0, 1, 2]), OptimizerSettings()
    own.step(one, gradient_norms(bank))
    bank.clear(0)  # what is left moves up
    for slot in (1, 2):
        state = own.slot_state(slot, settings)
        assert [name.rsplit("|", 2)[1:] for name in state] == [
            [name, "rows"] for stack, _ in bank.places(slot) for name, t in stack.tensors.items() if t.dim() == 3
        ]
        assert all(map(torch.equal, state.values(), sums[slot]))
        own.reset(slot, settings)
        assert not any(kept.any() for kept in own.slot_state(slot, settings).values())
        own.load_slot_state(slot, settings, state)
        assert all(map(torch.equal, own.slot_state(slot, settings).values(), sums[slot]))


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_got_no_gradient_is_known_whatever_state_is_kept(kind: str) -> None:
    bank = bank_of(*SPECS)
    own, settings = optimizer_of(bank, kind), updates(1, UPDATES, [0], kind)[0].optimizer
    for slot in range(3):
        own.reset(slot, settings)
    for step in (1, 2):
        draw_gradients(bank, torch.Generator().manual_seed(step))
        for stack, place in bank.places(1):
            stack.tensors["a"].grad[place] = 0
        own.step(updates(step, UPDATES, [0, 1, 2], kind), gradient_norms(bank))
    found = {slot: [own.moved(stack, place) for stack, place in bank.places(slot)] for slot in range(3)}
    assert all(moved == {"a": False, "b": True} for moved in found[1])
    assert all(all(moved.values()) for slot in (0, 2) for moved in found[slot])
    own.reset(0, settings)
    assert not any(any(own.moved(stack, place).values()) for stack, place in bank.places(0))
    own.load_slot_state(1, settings, own.slot_state(1, settings))
    if own.slot_state(1, settings):
        assert all(own.moved(stack, place) == {"a": False, "b": True} for stack, place in bank.places(1))


class Made(TorchDispatchMode):
    """The size of the largest new tensor."""

    def __init__(self, known: set[int]):
        super().__init__()
        self.known = known
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in self.known:
            self.largest = max(self.largest, result.numel())
        return result


def test_a_step_makes_nothing_as_large_as_a_place_of_a_stack() -> None:
    """A further member costs its factors, its gradient and its states; no plan has room for more of that size."""
    bank = bank_of(SPECS[0], SPECS[1], SPECS[0], width=500)
    own = optimizer_of(bank)
    draw_gradients(bank, torch.Generator().manual_seed(0))
    own.step(updates(1, UPDATES, [0, 1, 2]), gradient_norms(bank))  # the first makes the states
    tensors = [stack.tensors[name] for stack in bank.stacks.values() for name in stack.tensors]
    known = {
        tensor.untyped_storage().data_ptr()
        for tensor in (*tensors, *(state for stack in bank.stacks.values() for state in stack.states.values()))
    }
    known |= {tensor.grad.untyped_storage().data_ptr() for tensor in tensors if tensor.grad is not None}
    with Made(known) as seen:
        own.step(updates(2, UPDATES, [0, 1]), gradient_norms(bank))
    assert 0 < seen.largest < min(tensor[0].numel() for tensor in tensors)
