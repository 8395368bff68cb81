"""Adam with decoupled weight decay, as torch computes it: the decay first, scaled by the learning rate."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from manylora.training.optim.stacked import StackedOptimizer


class AdamW(StackedOptimizer):
    """Elementwise, so the zero padding of a stack stays zero.

    Source: Loshchilov and Hutter (1711.05101), algorithm 2, in torch.optim.AdamW's order of operations.
    """

    state_names = ("mean", "square")

    def rule(self, value: Tensor, grad: Tensor, state: Mapping[str, Tensor], vectors: Mapping[str, Tensor]) -> None:
        mean, square = state["mean"], state["square"]
        value.mul_(vectors["decay"])
        mean.lerp_(grad, 1 - vectors["beta1"])
        square.mul_(vectors["beta2"]).add_((1 - vectors["beta2"]) * grad * grad)
        bound = (square.sqrt() / vectors["correction2"]).add_(vectors["epsilon"])
        value.sub_(vectors["rate"] / vectors["correction1"] * (mean / bound))
