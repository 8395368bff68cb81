"""Stochastic gradient descent with momentum and decoupled weight decay."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from manylora.training.optim.stacked import SlotUpdate, StackedOptimizer


class Sgd(StackedOptimizer):
    """Momentum is the first of `betas`, undamped: v <- beta v + g, w <- (1 - rate decay) w - rate v.

    Source: torch.optim.SGD with `momentum`, but for the decay, which is decoupled as in 1711.05101, algorithm 1.
    """

    state_names = ("velocity",)

    def rule(
        self, values: list[Tensor], grads: list[Tensor], state: Mapping[str, list[Tensor]], update: SlotUpdate
    ) -> None:
        for value, grad, velocity in zip(values, grads, state["velocity"], strict=True):
            velocity.mul_(update.betas[0]).add_(grad)
            value.mul_(1.0 - update.rate * update.weight_decay).add_(velocity, alpha=-update.rate)
