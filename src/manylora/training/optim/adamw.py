"""Adam with decoupled weight decay, as torch computes it: the decay first, scaled by the learning rate."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from manylora.training.optim.stacked import SlotUpdate, StackedOptimizer


class AdamW(StackedOptimizer):
    """Elementwise, so the zero padding of a stack stays zero.

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
