"""Optimisers that update each number by itself, so that the zero padding of a stack stays zero."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from manylora.training.optim.stacked import SlotUpdate, StackedOptimizer


class AdamW(StackedOptimizer):
    """Adam with decoupled weight decay, as torch computes it: the decay first, scaled by the learning rate.

    Source: Loshchilov and Hutter (1711.05101), algorithm 2, by the kernel of torch.optim.AdamW(fused=True), which reads
    and writes each number once.
    """

    state_names = ("mean", "square")

    def rule(
        self, values: list[Tensor], grads: list[Tensor], state: Mapping[str, list[Tensor]], update: SlotUpdate
    ) -> None:
        step = torch.tensor(float(update.step), device=values[0].device)
        torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage] - what torch.optim calls for `fused`
            values, grads, state["mean"], state["square"], [], [step] * len(values),
            lr=update.rate, beta1=update.betas[0], beta2=update.betas[1], weight_decay=update.weight_decay,
            eps=update.epsilon, amsgrad=False, maximize=False,
        )  # fmt: skip


class Sgd(StackedOptimizer):
    """Stochastic gradient descent with momentum and decoupled weight decay.

    Momentum is the first of `betas`, undamped: v <- beta v + g, w <- (1 - rate decay) w - rate v.

    Source: torch.optim.SGD with `momentum`, but for the decay, which is decoupled as in 1711.05101, algorithm 1.
    """

    state_names = ("velocity",)

    def rule(
        self, values: list[Tensor], grads: list[Tensor], state: Mapping[str, list[Tensor]], update: SlotUpdate
    ) -> None:
        for value, grad, velocity in zip(values, grads, state["velocity"], strict=True):
            velocity.mul_(update.betas[0]).add_(grad)
            value.mul_(1.0 - update.rate * update.weight_decay).add_(velocity, alpha=-update.rate)
