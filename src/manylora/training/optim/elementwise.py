"""Optimisers that update each number by itself, so that the zero padding of a stack stays zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from manylora.training.optim.rule import Rule

if TYPE_CHECKING:
    from torch import Tensor

    from manylora.training.optim.stacked import SlotUpdate


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


class Sgd(Rule):
    """Stochastic gradient descent with momentum.

    Momentum is the first of `betas`, undamped: v <- beta v + g, w <- w - rate v.

    Source: torch.optim.SGD with `momentum`.
    """

    state = ("velocity",)

    def update(
        self, values: list[Tensor], grads: list[Tensor], state: Mapping[str, list[Tensor]], settings: SlotUpdate
    ) -> None:
        for value, grad, velocity in zip(values, grads, state["velocity"], strict=True):
            velocity.mul_(settings.optimizer.betas[0]).add_(grad)
            value.add_(velocity, alpha=-settings.rate)


ADAMW = AdamW()
SGD = Sgd()
