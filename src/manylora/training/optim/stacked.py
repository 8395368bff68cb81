"""What every optimiser over stacks shares: places by slot, clipping by slot, and saving one slot's state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from manylora.adapters.bank import Bank
from manylora.errors import CheckpointBroken
from manylora.memory.allocator import lying_apart
from manylora.types import Stack


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotUpdate:
    """The settings of one slot's update: `rate` is the learning rate of this step, `step` counts from 1.

    `clip_norm` bounds the Euclidean norm of the slot's whole gradient; None: no bound.
    """

    rate: float
    step: int
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    clip_norm: float | None = None


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


class StackedOptimizer:
    """Updates the places of the slots it is given and leaves every other place of every stack alone.

    A rule subclasses it and says which tensors of state it keeps (`state_names`) and how a tensor is updated (`rule`).
    """

    state_names: tuple[str, ...] = ()

    def __init__(self, bank: Bank):
        self.bank = bank
        self._views: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def rule(
        self, values: list[Tensor], grads: list[Tensor], state: Mapping[str, list[Tensor]], update: SlotUpdate
    ) -> None:
        """Update the values and the state in place, all by the same settings; the gradients are clipped already."""
        raise TypeError(f"{type(self).__name__} states no rule")

    @torch.no_grad()
    def step(self, updates: Mapping[int, SlotUpdate], norms: list[float]) -> None:
        """Update the slots named, each by its own settings; `norms` are the gradient's norms by slot.

        The gradients of the slots named are clipped in place, as torch.nn.utils.clip_grad_norm_ does.
        """
        clips = {slot: _clip_factor(update, norms[slot]) for slot, update in updates.items()}
        # Slots are updated together where all that a rule reads of their settings is equal.
        kinds = {slot: replace(update, clip_norm=None) for slot, update in updates.items()}
        settings = list(dict.fromkeys(kinds.values()))
        kind_of = {slot: settings.index(kind) for slot, kind in kinds.items()}
        # By kind: values, gradients, and each state.
        work: list[list[list[Tensor]]] = [[[] for _ in range(2 + len(self.state_names))] for _ in settings]
        scales: dict[Any, Tensor] = {}
        for stack in self.bank.stacks.values():
            where = [(place, kind_of[slot]) for place, slot in enumerate(stack.slots) if slot in updates]
            if not where:
                continue
            whole = len(where) == len(stack.slots) and len({kind for _, kind in where}) == 1
            factors = tuple(clips.get(slot, 1.0) for slot in stack.slots)
            clipped = any(factor != 1.0 for factor in factors)
            for name, tensor in stack.tensors.items():
                grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad.contiguous()
                if clipped:
                    key = factors, grad.dtype, grad.dim()
                    if key not in scales:
                        shape = (len(factors),) + (1,) * (grad.dim() - 1)
                        scales[key] = torch.tensor(factors, dtype=grad.dtype, device=grad.device).view(shape)
                    grad.mul_(scales[key])
                states = [self._tensor(stack, name, state) for state in self.state_names]
                if whole:
                    for number, column in enumerate((tensor, grad, *states)):
                        work[where[0][1]][number].append(column)
                    continue
                by_place = self._by_place(tensor), grad.unbind(0), *map(self._by_place, states)
                for number, column in enumerate(by_place):
                    for place, kind in where:
                        work[kind][number].append(column[place])
        for setting, (values, grads, *state) in zip(settings, work, strict=True):
            if values:
                self.rule(values, grads, dict(zip(self.state_names, state, strict=True)), setting)

    def _by_place(self, stacked: Tensor) -> tuple[Tensor, ...]:
        """The places of a tensor that outlives the step, as views that are made once.

        Made anew for all sites of a fleet of 16, 20,000 views took a twentieth of its step.
        """
        found: tuple[Tensor, ...] | None = self._views.get(stacked)
        if found is None:
            found = self._views[stacked] = stacked.detach().unbind(0)
        return found

    def _tensor(self, stack: Stack, name: str, key: str) -> Tensor:
        """A tensor of state as large as the stack's; places that the stack gained since start at zero."""
        like, label = stack.tensors[name], f"{type(self).__name__}|{name}|{key}"
        held = stack.states.get(label)
        if held is None or held.shape != like.shape:
            with lying_apart():
                grown = torch.zeros_like(like, requires_grad=False)
            if held is not None:
                grown[: held.shape[0]] = held
            stack.states[label] = held = grown
        return held

    def moved(self, stack: Stack, place: int) -> dict[str, bool]:
        """By tensor: whether any step so far gave this place a gradient that is not zero."""
        return {name: bool(self._tensor(stack, name, self.state_names[0])[place].any()) for name in stack.tensors}

    def reset(self, slot: int) -> None:
        """Forget a slot's state: what is put there next begins afresh."""
        for stack, place in self.bank.places(slot):
            for name in stack.tensors:
                for key in self.state_names:
                    self._tensor(stack, name, key)[place].zero_()

    def slot_state(self, slot: int) -> dict[str, Tensor]:
        """A slot's state by `site|method|tensor|name`, on the CPU."""
        return {
            f"{stack.site.name}|{stack.method}|{name}|{key}": self._tensor(stack, name, key)[place].cpu().clone()
            for stack, place in self.bank.places(slot)
            for name in stack.tensors
            for key in self.state_names
        }

    def load_slot_state(self, slot: int, state: Mapping[str, Tensor]) -> None:
        """Restore what `slot_state` gave.

        Raises:
            CheckpointBroken: a tensor is missing or has another shape.
        """
        for stack, place in self.bank.places(slot):
            for name in stack.tensors:
                for key in self.state_names:
                    label = f"{stack.site.name}|{stack.method}|{name}|{key}"
                    target = self._tensor(stack, name, key)
                    if label not in state or state[label].shape != target[place].shape:
                        raise CheckpointBroken(f"the optimiser state of {label!r} is missing or has another shape")
                    target[place] = state[label].to(target)


def _clip_factor(update: SlotUpdate, norm: float) -> float:
    """Source: torch.nn.utils.clip_grad_norm_, whose 1e-6 keeps the quotient finite."""
    return 1.0 if update.clip_norm is None else min(1.0, update.clip_norm / (norm + 1e-6))
