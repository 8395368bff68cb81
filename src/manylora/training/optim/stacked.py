"""What every optimiser over stacks shares: places by slot, clipping by slot, and saving one slot's state."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from manylora.adapters.bank import Bank
from manylora.errors import CheckpointBroken, ConfigError, nearest_names
from manylora.memory.allocator import lying_apart
from manylora.methods import METHODS
from manylora.spec import match_pattern
from manylora.training.optim import OPTIMIZERS
from manylora.training.optim.rule import Rule, Shape
from manylora.types import Stack

WATCHED_STEPS = 2
"""After so many steps every factor that a forward reaches has had a gradient: b in the first, a in the second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """How a member is updated, whatever its rate: an optimiser by its name in OPTIMIZERS, and all that it is told.

    `own` are the settings that this optimiser alone has, None: their defaults; the others have the meaning of the keys
    of the same name under `train`. `clip_norm` bounds the Euclidean norm of the slot's whole gradient; None: no bound.
    """

    name: str = "adamw"
    own: Any = None
    weight_decay: float = 0.0
    decay: Literal["decoupled", "l2"] = "decoupled"
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    clip_norm: float | None = None
    rate_ratio: float = 1.0
    rate_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.own is None:
            object.__setattr__(self, "own", OPTIMIZERS.get(self.name).settings())

    def check(self, sites: Collection[str]) -> None:
        """Raise what cannot be of these settings where an adapter stands on `sites`.

        Raises:
            ConfigError: a pattern of `rate_pattern` that none of them matches.
        """
        for pattern in self.rate_pattern:
            if not any(match_pattern({pattern: True}, site) for site in sites):
                parts = [site.split(".") for site in sites]
                endings = dict.fromkeys(".".join(part[-count:]) for count in (1, 2) for part in parts)
                raise ConfigError(
                    f"train.rate_pattern: {pattern!r} matches none of the adapter's {len(sites)} sites",
                    nearest=nearest_names(pattern, [*endings, *sites]),
                    allowed="the end of a site's name, or a regular expression for it, as in adapter.rank_pattern",
                    next_step="list them: manylora inspect BASE --sites",
                )

    def for_rule(self) -> OptimizerSettings:
        """What is left to a rule: the same but for what is done to gradients and rates before it is asked."""
        return replace(self, clip_norm=None, rate_ratio=1.0, rate_pattern={})

    def rate_factor(self, site: str, method: str, tensor: str) -> float:
        """What the learning rate is multiplied by for one tensor of a site."""
        factor = match_pattern(self.rate_pattern, site)
        ratio = self.rate_ratio if tensor in METHODS.get(method).raised else 1.0
        return ratio if factor is None else factor * ratio

    @property
    def one_rate(self) -> bool:
        """Whether all tensors have the same learning rate."""
        return self.rate_ratio == 1.0 and not self.rate_pattern


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotUpdate:
    """One step of one slot: `rate` is its learning rate, `step` counts from 1."""

    rate: float
    step: int
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)


def gradient_norms(bank: Bank) -> list[float]:
    """The Euclidean norm of each slot's gradient, 0 without one; NaN or inf where the gradient is.

    Norms of tensors are taken in the factors' own dtype, as torch.nn.utils.clip_grad_norm_ does, and added in float64,
    in the order of the stacks' names: in which order they came about is another after a run resumes.
    """
    owners: list[int] = []
    norms: list[Tensor] = []
    for _, stack in sorted(bank.stacks.items(), key=lambda item: str(item[0])):
        for tensor in stack.tensors.values():
            if tensor.grad is not None:
                owners += stack.slots
                norms.append(torch.linalg.vector_norm(tensor.grad.flatten(1), dim=1))
    # Free places, whose slot is -1, add up behind the last slot.
    squares = torch.zeros(bank.num_slots + 1, dtype=torch.float64, device=bank.base.device)
    if norms:
        index = torch.tensor(owners, device=squares.device) % (bank.num_slots + 1)
        squares.index_add_(0, index, torch.cat(norms).double().square())
    return squares[:-1].sqrt().tolist()


def drop_gradients(bank: Bank) -> None:
    for stack in bank.stacks.values():
        for tensor in stack.tensors.values():
            tensor.grad = None


class _Group:
    """Tensors that are updated together, all by the same settings."""

    __slots__ = ("grads", "optimizer", "settings", "state", "values")

    def __init__(self, settings: SlotUpdate):
        self.settings = settings
        self.optimizer = settings.optimizer
        self.values: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.state: dict[str, list[Tensor]] = defaultdict(list)


class _Groups:
    """The groups of one step: tensors go together where all that a rule reads of their settings is equal."""

    def __init__(self, updates: Mapping[int, SlotUpdate]):
        self._settings: dict[OptimizerSettings, OptimizerSettings] = {}
        self._by_update: dict[SlotUpdate, _Group] = {}
        self._by_factor: dict[tuple[int, float], _Group] = {}
        self._updates = updates
        self._vary = {slot for slot, update in updates.items() if not update.optimizer.one_rate}
        self._of_slot = {slot: self._of(slot, 1.0) for slot in updates if slot not in self._vary}

    def __iter__(self) -> Iterator[_Group]:
        return iter(self._by_update.values())

    def of_stack(self, stack: Stack) -> _Where | None:
        """The groups that all tensors of a stack belong to; None: they differ."""
        if self._vary and not self._vary.isdisjoint(stack.slots):
            return None
        groups = self._of_slot
        return _where([(place, groups[slot]) for place, slot in enumerate(stack.slots) if slot in groups], stack)

    def of_tensor(self, stack: Stack, name: str) -> _Where:
        """The groups that one tensor of a stack belongs to."""
        found = []
        for place, slot in enumerate(stack.slots):
            if slot in self._of_slot:
                found.append((place, self._of_slot[slot]))
            elif slot in self._updates:
                factor = self._updates[slot].optimizer.rate_factor(stack.site.name, stack.method, name)
                found.append((place, self._of(slot, factor)))
        return _where(found, stack)

    def _of(self, slot: int, factor: float) -> _Group:
        """The group of a slot's tensors whose rate is multiplied by a factor."""
        found = self._by_factor.get((slot, factor))
        if found is None:
            update = self._updates[slot]
            optimizer = update.optimizer.for_rule()
            # Equal settings are one object, so that what follows from them is found by identity.
            optimizer = self._settings.setdefault(optimizer, optimizer)
            update = replace(update, rate=factor * update.rate, optimizer=optimizer)
            found = self._by_factor[slot, factor] = self._by_update.setdefault(update, _Group(update))
        return found


_Where = _Group | list[tuple[int, _Group]]
"""The group of a whole stacked tensor, or of each of its places that are stepped."""


def _where(places: list[tuple[int, _Group]], stack: Stack) -> _Where:
    one = len(places) == len(stack.slots) and len({group for _, group in places}) == 1
    return places[0][1] if one else places


class StackedOptimizer:
    """Updates the places of the slots it is given by one rule and leaves every other place of every stack alone."""

    def __init__(self, bank: Bank, rule: Rule):
        self.bank = bank
        self.rule = rule
        self._prefix = type(rule).__name__
        self._views: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    @torch.no_grad()
    def step(self, updates: Mapping[int, SlotUpdate], norms: list[float]) -> None:
        """Update the slots named, each by its own settings; `norms` are the gradient's norms by slot.

        The gradients of the slots named are clipped in place, as torch.nn.utils.clip_grad_norm_ does, and may be
        written over; those of other slots stay as they are.
        """
        clips = {slot: _clip_factor(update.optimizer, norms[slot]) for slot, update in updates.items()}
        watched = [slot for slot, update in updates.items() if update.step <= WATCHED_STEPS]
        groups = _Groups(updates)
        scales: dict[Any, Tensor] = {}
        for stack in self.bank.stacks.values():
            shared = groups.of_stack(stack)
            if shared == []:
                continue
            factors = tuple(clips.get(slot, 1.0) for slot in stack.slots)
            clipped = any(factor != 1.0 for factor in factors)
            for name, tensor in stack.tensors.items():
                if watched:
                    self._watch(stack, name, watched)
                grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad.contiguous()
                if clipped:
                    key = factors, grad.dtype, grad.dim()
                    if key not in scales:
                        shape = (len(factors),) + (1,) * (grad.dim() - 1)
                        scales[key] = torch.tensor(factors, dtype=grad.dtype, device=grad.device).view(shape)
                    grad.mul_(scales[key])
                self._add(stack, name, grad, groups.of_tensor(stack, name) if shared is None else shared)
        for group in groups:
            if group.values:
                self._update(group)

    def _add(self, stack: Stack, name: str, grad: Tensor, where: _Where) -> None:
        """Add a tensor of a stack to its group; where it has several, each place, as (1, ...), to its own."""
        tensor = stack.tensors[name]
        if isinstance(where, _Group):
            where.values.append(tensor)
            where.grads.append(grad)
            for key, state in self._states(stack, name, where.optimizer).items():
                where.state[key].append(state)
            return
        values, grads = self._by_place(tensor), grad.split(1)
        settings, states = None, []
        for place, group in where:
            if group.optimizer is not settings:
                settings = group.optimizer
                states = [(key, self._by_place(held)) for key, held in self._states(stack, name, settings).items()]
            group.values.append(values[place])
            group.grads.append(grads[place])
            for key, state in states:
                group.state[key].append(state[place])

    def _update(self, group: _Group) -> None:
        """Decay the values of a group, as far as its rule does not, and update them.

        Source: decoupled, 1711.05101, algorithm 2: w <- (1 - rate decay) w first; l2, algorithm 1: g <- g + decay w, as
        the optimisers of torch do after the gradient was clipped.
        """
        settings, shared = group.settings, group.optimizer
        if shared.weight_decay and (shared.decay == "l2" or not self.rule.decays):
            if shared.decay == "l2":
                torch._foreach_add_(group.grads, group.values, alpha=shared.weight_decay)  # pyright: ignore[reportPrivateImportUsage]
            else:
                share = 1.0 - settings.rate * shared.weight_decay
                torch._foreach_mul_(group.values, share)  # pyright: ignore[reportPrivateImportUsage]
            settings = replace(settings, optimizer=replace(shared, weight_decay=0.0))
        self.rule.update(group.values, group.grads, group.state, settings)
        # torch's fused kernels write past the count by which others see that what they derived holds no more.
        torch.autograd.graph.increment_version(group.values)

    def _by_place(self, stacked: Tensor) -> tuple[Tensor, ...]:
        """The places of a tensor that outlives the step, each as (1, ...), as views that are made once.

        Made anew for all sites of a fleet of 16, 20,000 views took a twentieth of its step.
        """
        found: tuple[Tensor, ...] | None = self._views.get(stacked)
        if found is None:
            found = self._views[stacked] = stacked.detach().split(1)
        return found

    # -- state ---------------------------------------------------------------------------------------------------------

    def _states(self, stack: Stack, name: str, settings: OptimizerSettings) -> dict[str, Tensor]:
        """The state of a tensor of a stack, by name, that settings ask for."""
        like = stack.tensors[name]
        shapes = self.rule.state_shapes(like.shape[1:], settings)
        return {key: self._state(stack, name, key, shape, like.dtype) for key, shape in shapes.items()}

    def _state(self, stack: Stack, name: str, key: str, shape: Shape, dtype: torch.dtype) -> Tensor:
        """A state (P, *shape) beside a tensor of a stack; places that the stack gained since start at zero."""
        label, count = f"{self._prefix}|{name}|{key}", len(stack.slots)
        held = stack.states.get(label)
        if held is None or held.shape[0] != count:
            with lying_apart():
                grown = torch.zeros((count, *shape), dtype=dtype, device=stack.tensors[name].device)
            if held is not None:
                grown[: held.shape[0]] = held
            stack.states[label] = held = grown
        return held

    def _watch(self, stack: Stack, name: str, slots: Collection[int]) -> None:
        """Remember which places of these slots get a gradient that is not zero."""
        grad, places = stack.tensors[name].grad, [place for place, slot in enumerate(stack.slots) if slot in slots]
        if grad is not None and places:
            moved = self._moved(stack, name)
            moved[places] = moved[places] | grad.flatten(1).any(dim=1)[places]

    def _moved(self, stack: Stack, name: str) -> Tensor:
        # Beside the states, so that it comes and goes with the places; a state does not tell it: a rule may keep none.
        return self._state(stack, name, "moved", (), torch.bool)

    def moved(self, stack: Stack, place: int) -> dict[str, bool]:
        """By tensor: whether one of the first WATCHED_STEPS steps gave this place a gradient that is not zero.

        Of steps before the slot's state was loaded the state tells; True too where that cannot tell.
        """
        return {name: bool(self._moved(stack, name)[place]) for name in stack.tensors}

    def reset(self, slot: int, settings: OptimizerSettings) -> None:
        """Forget a slot's state: what is put there next begins afresh, by these settings."""
        for stack, place in self.bank.places(slot):
            for name in stack.tensors:
                for state in (self._moved(stack, name), *self._states(stack, name, settings).values()):
                    state[place].zero_()

    def slot_state(self, slot: int, settings: OptimizerSettings) -> dict[str, Tensor]:
        """A slot's state by `site|method|tensor|name`, on the CPU."""
        return {
            f"{stack.site.name}|{stack.method}|{name}|{key}": state[place].cpu().clone()
            for stack, place in self.bank.places(slot)
            for name in stack.tensors
            for key, state in self._states(stack, name, settings).items()
        }

    def load_slot_state(self, slot: int, settings: OptimizerSettings, state: Mapping[str, Tensor]) -> None:
        """Restore what `slot_state` gave.

        Raises:
            CheckpointBroken: a tensor is missing or has another shape.
        """
        for stack, place in self.bank.places(slot):
            for name in stack.tensors:
                states = self._states(stack, name, settings)
                for key, target in states.items():
                    label = f"{stack.site.name}|{stack.method}|{name}|{key}"
                    if label not in state or state[label].shape != target[place].shape:
                        raise CheckpointBroken(f"the optimiser state of {label!r} is missing or has another shape")
                    target[place] = state[label].to(target)
                self._moved(stack, name)[place] = not states or any(held[place].any() for held in states.values())


def _clip_factor(settings: OptimizerSettings, norm: float) -> float:
    """Source: torch.nn.utils.clip_grad_norm_, whose 1e-6 keeps the quotient finite."""
    return 1.0 if settings.clip_norm is None else min(1.0, settings.clip_norm / (norm + 1e-6))
