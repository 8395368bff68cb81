"""What every optimiser over stacks shares: places by slot, clipping by slot, and saving one slot's state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from manylora.adapters.bank import Bank
from manylora.errors import CheckpointBroken
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
    """The Euclidean norm of each slot's gradient, 0 without one; NaN or inf where the gradient is."""
    squares = torch.zeros(bank.num_slots, dtype=torch.float64, device=bank.base.device)
    for stack in bank.stacks.values():
        places = [place for place, slot in enumerate(stack.slots) if slot != -1]
        owners = torch.tensor([stack.slots[place] for place in places], device=bank.base.device)
        for tensor in stack.tensors.values():
            if tensor.grad is not None and places:
                grad = tensor.grad if len(places) == len(stack.slots) else tensor.grad[places]
                squares.index_add_(0, owners, grad.flatten(1).double().pow(2).sum(dim=1))
    return squares.sqrt().tolist()


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
        self._state: dict[tuple[int, str, str], Tensor] = {}

    def rule(self, value: Tensor, grad: Tensor, state: Mapping[str, Tensor], vectors: Mapping[str, Tensor]) -> None:
        """Update `value` (G, ...) and `state` in place; `vectors` hold (G, 1, ...) settings of each place."""
        raise TypeError(f"{type(self).__name__} states no rule")

    @torch.no_grad()
    def step(self, updates: Mapping[int, SlotUpdate], norms: list[float]) -> None:
        """Update the slots named, each by its own settings; `norms` are the gradient's norms by slot."""
        for stack in self.bank.stacks.values():
            places = [place for place, slot in enumerate(stack.slots) if slot in updates]
            if places:
                self._step_stack(stack, places, [updates[stack.slots[place]] for place in places], norms)

    def _step_stack(self, stack: Stack, places: list[int], updates: list[SlotUpdate], norms: list[float]) -> None:
        whole = len(places) == len(stack.slots)
        clips = [_clip_factor(update, norms[stack.slots[place]]) for place, update in zip(places, updates, strict=True)]
        for name, tensor in stack.tensors.items():
            grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            state = {key: self._tensor(stack, name, key) for key in self.state_names}
            vectors = _vectors(updates, clips, tensor)
            if whole:
                self.rule(tensor, grad * vectors["clip"], state, vectors)
                continue
            value, part = tensor[places], {key: held[places] for key, held in state.items()}
            self.rule(value, grad[places] * vectors["clip"], part, vectors)
            tensor[places] = value
            for key, held in state.items():
                held[places] = part[key]

    def _tensor(self, stack: Stack, name: str, key: str) -> Tensor:
        """A tensor of state as large as the stack's; places that the stack gained since start at zero."""
        like = stack.tensors[name]
        held = self._state.get((id(stack), name, key))
        if held is None or held.shape != like.shape:
            grown = torch.zeros_like(like, requires_grad=False)
            if held is not None:
                grown[: held.shape[0]] = held
            self._state[(id(stack), name, key)] = held = grown
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


def _vectors(updates: list[SlotUpdate], clips: list[float], like: Tensor) -> dict[str, Tensor]:
    columns = {
        "clip": clips,
        "rate": [update.rate for update in updates],
        "decay": [1.0 - update.rate * update.weight_decay for update in updates],
        "beta1": [update.betas[0] for update in updates],
        "beta2": [update.betas[1] for update in updates],
        "correction1": [1.0 - update.betas[0] ** update.step for update in updates],
        "correction2": [(1.0 - update.betas[1] ** update.step) ** 0.5 for update in updates],
        "epsilon": [update.epsilon for update in updates],
    }
    shape = (len(updates),) + (1,) * (like.dim() - 1)
    return {
        key: torch.tensor(column, dtype=like.dtype, device=like.device).view(shape) for key, column in columns.items()
    }
