"""Optimisers that update each number by itself, so that the zero padding of a stack stays zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from manylora.settings import flag, number
from manylora.training.optim.rule import Rule, Shape

if TYPE_CHECKING:
    from torch import Tensor

    from manylora.training.optim.stacked import OptimizerSettings, SlotUpdate


class AdamW(Rule):
    """Adam with decoupled weight decay, as torch computes it: the decay first, scaled by the learning rate.

    Source: Loshchilov and Hutter (1711.05101), algorithm 2, by the kernel of torch.optim.AdamW(fused=True), which reads
    and writes each number once.
    """

    state = ("mean", "square")
    decays = True

    def update(
        self, values: list[Tensor], grads: list[Tensor], state: Mapping[str, list[Tensor]], settings: SlotUpdate
    ) -> None:
        import torch

        shared = settings.optimizer
        step = torch.tensor(float(settings.step), device=values[0].device)
        torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage] - what torch.optim calls for `fused`
            values, grads, state["mean"], state["square"], [], [step] * len(values),
            lr=settings.rate, beta1=shared.betas[0], beta2=shared.betas[1], weight_decay=shared.weight_decay,
            eps=shared.epsilon, amsgrad=False, maximize=False,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class SgdSettings:
    """What stochastic gradient descent alone can be told."""

    momentum: float | None = number(
        None, "share of the velocity that each step keeps; null: the first of betas", at_least=0, below=1
    )
    nesterov: bool = flag(False, "step from where the velocity leads (Nesterov's momentum)")

    def kept(self, betas: tuple[float, float]) -> float:
        """The share of the velocity that each step keeps."""
        return betas[0] if self.momentum is None else self.momentum


class Sgd(Rule):
    """Stochastic gradient descent with momentum m, undamped: v <- m v + g, w <- w - rate v.

    With Nesterov's momentum: w <- w - rate (g + m v).

    Source: torch.optim.SGD with `momentum` and `nesterov`.
    """

    settings = SgdSettings
    state = ("velocity",)

    def state_shapes(self, shape: Shape, settings: OptimizerSettings) -> Mapping[str, Shape]:
        return {} if settings.own.momentum == 0 else super().state_shapes(shape, settings)

    def update(
        self, values: list[Tensor], grads: list[Tensor], state: Mapping[str, list[Tensor]], settings: SlotUpdate
    ) -> None:
        own: SgdSettings = settings.optimizer.own
        momentum = own.kept(settings.optimizer.betas)
        velocities = state.get("velocity", grads)
        for value, grad, velocity in zip(values, grads, velocities, strict=True):
            if velocity is not grad:
                velocity.mul_(momentum).add_(grad)
            change = grad.add_(velocity, alpha=momentum) if own.nesterov else velocity
            value.add_(change, alpha=-settings.rate)


@dataclass(frozen=True, slots=True, kw_only=True)
class RmspropSettings:
    """What RMSprop alone can be told."""

    smoothing: float = number(
        0.99, "share of the average of squares that each step keeps", at_least=0, below=1, elsewhere=("alpha", "rho")
    )
    momentum: float = number(0.0, "share of the velocity that each step keeps", at_least=0, below=1)
    centered: bool = flag(False, "divide by the spread of the gradient, not by its size")


class Rmsprop(Rule):
    """Gradients over the root of a running average of their squares.

    q <- s q + (1 - s) g^2, v <- m v + g / (sqrt(q) + epsilon), w <- w - rate v. Centered: q - c^2 in place of q, with
    the running average c of g.

    Source: torch.optim.RMSprop (Hinton's lecture; centered: Graves, 1308.0850).
    """

    settings = RmspropSettings

    def state_shapes(self, shape: Shape, settings: OptimizerSettings) -> Mapping[str, Shape]:
        own: RmspropSettings = settings.own
        kept = {"square": True, "mean": own.centered, "velocity": own.momentum > 0}
        return {name: shape for name, asked in kept.items() if asked}

    def update(
        self, values: list[Tensor], grads: list[Tensor], state: Mapping[str, list[Tensor]], settings: SlotUpdate
    ) -> None:
        own: RmspropSettings = settings.optimizer.own
        for place, (value, grad, square) in enumerate(zip(values, grads, state["square"], strict=True)):
            square.mul_(own.smoothing).addcmul_(grad, grad, value=1 - own.smoothing)
            if own.centered:
                mean = state["mean"][place].lerp_(grad, 1 - own.smoothing)
                # Of a gradient that stays as it is rounding may leave less than nothing.
                size = square.addcmul(mean, mean, value=-1).clamp_(min=0).sqrt_()
            else:
                size = square.sqrt()
            change = grad.div_(size.add_(settings.optimizer.epsilon))
            if own.momentum > 0:
                change = state["velocity"][place].mul_(own.momentum).add_(change)
            value.add_(change, alpha=-settings.rate)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdagradSettings:
    """What Adagrad alone can be told."""

    rate_decay: float = number(
        0.0, "how fast the rate falls: after t steps it is 1 / (1 + t rate_decay) of itself", at_least=0,
        elsewhere=("lr_decay",),
    )  # fmt: skip
    initial_accumulator: float = number(
        0.0, "what each sum of squares starts from", at_least=0, elsewhere=("initial_accumulator_value",)
    )


class Adagrad(Rule):
    """Gradients over the root of the sum q of all their squares so far: w <- w - rate g / (sqrt(q) + epsilon).

    Source: torch.optim.Adagrad (Duchi, Hazan and Singer, 2011).
    """

    settings = AdagradSettings
    state = ("square",)

    def update(
        self, values: list[Tensor], grads: list[Tensor], state: Mapping[str, list[Tensor]], settings: SlotUpdate
    ) -> None:
        own: AdagradSettings = settings.optimizer.own
        rate = settings.rate / (1 + (settings.step - 1) * own.rate_decay)
        for value, grad, square in zip(values, grads, state["square"], strict=True):
            square.addcmul_(grad, grad)
            # What the sum starts from is added here: state starts at zero, and is zero where a slot holds nothing.
            size = square.add(own.initial_accumulator).sqrt_().add_(settings.optimizer.epsilon)
            value.addcdiv_(grad, size, value=-rate)


ADAMW = AdamW()
SGD = Sgd()
RMSPROP = Rmsprop()
ADAGRAD = Adagrad()
