"""Distillation: to answer as a teacher does, token by token, mixed with the labels' own loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from manylora.objectives.objective import ALONE, Stateless, perplexity
from manylora.objectives.settings import DistillSettings
from manylora.types import IGNORED, Batch, Beside, Follower, Outputs, RowTotals

TEACHER = "teacher"


@dataclass(frozen=True, slots=True)
class Distill(Stateless):
    """Total: w T^2 KL(teacher ‖ own) of both at temperature T, plus (1 - w) nats; weight: supervised positions.

    The teacher is the bare base, a frozen copy of what the member starts from, or another adapter; it sees what the
    rows' own slot sees, without dropout. Metrics: `nats` of the labels, and the divergence `kl` at the temperature.

    Source: Hinton, Vinyals and Dean (1503.02531), section 2; T^2 keeps the gradient's size whatever T is.
    """

    own: DistillSettings = field(default_factory=DistillSettings)
    supervises: ClassVar[frozenset[str]] = frozenset({"positions", "rows"})

    @property
    def followers(self) -> Mapping[str, Follower]:
        if self.own.teacher == "base":
            return {}
        return {TEACHER: Follower(adapter=None if self.own.teacher == "start" else self.own.teacher)}

    def told(self, settings: DistillSettings) -> Distill:
        return Distill(settings)

    def weight(self, batch: Batch) -> Tensor:
        return batch.targets["labels"].ne(IGNORED).reshape(batch.num_rows, -1).sum(dim=1).to(torch.float64)

    def __call__(self, outputs: Outputs, batch: Batch, beside: Beside = ALONE) -> RowTotals:
        taught = beside.outputs(batch, "base" if self.own.teacher == "base" else TEACHER)
        loss = partial(distilled, temperature=self.own.temperature, share=self.own.weight)
        sums = outputs.map_supervised(batch.targets["labels"], loss, beside=taught)
        return RowTotals(sums["loss"], {"nats": sums["nats"], "kl": sums["kl"]})

    def summary(self, loss: float, metrics: Mapping[str, float]) -> Mapping[str, float]:
        return {"perplexity": perplexity(metrics["nats"])}


def distilled(logits: Tensor, labels: Tensor, taught: Tensor, *, temperature: float, share: float) -> dict[str, Tensor]:
    """`loss`, `nats` and `kl` (n,) of positions with logits (n, V), labels (n,) and a teacher's logits (n, V)."""
    own, others = ((values / temperature).log_softmax(dim=-1) for values in (logits, taught))
    kl = functional.kl_div(own, others, reduction="none", log_target=True).sum(dim=-1)
    nats = functional.cross_entropy(logits, labels, reduction="none")
    loss = share * temperature**2 * kl + (1 - share) * nats
    return {"loss": loss, "nats": nats.detach(), "kl": kl.detach()}


DISTILL = Distill()
