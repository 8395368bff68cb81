"""Stochastic gradient descent with momentum and decoupled weight decay."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from manylora.training.optim.stacked import StackedOptimizer


class Sgd(StackedOptimizer):
    """Momentum is the first of `betas`, undamped: v <- beta v + g, w <- (1 - rate decay) w - rate v.

    Source: torch.optim.SGD with `momentum`, but for the decay, which is decoupled as in 1711.05101, algorithm 1.
    """

    state_names = ("velocity",)

    def rule(self, value: Tensor, grad: Tensor, state: Mapping[str, Tensor], vectors: Mapping[str, Tensor]) -> None:
        state["velocity"].mul_(vectors["beta1"]).add_(grad)
        value.mul_(vectors["decay"]).sub_(vectors["rate"] * state["velocity"])
