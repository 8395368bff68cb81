"""The negative log-likelihood of each row's class, given its scores."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from manylora.objectives.objective import ALONE, Stateless
from manylora.types import IGNORED, Batch, Beside, Outputs, RowTotals


class Classification(Stateless):
    """Total: nats of a row's class; metric `accuracy`: 1 where it has the highest score. Weight: rows with a class."""

    supervises = frozenset({"rows"})

    def weight(self, batch: Batch) -> Tensor:
        return batch.targets["labels"].ne(IGNORED).to(torch.float64)

    def __call__(self, outputs: Outputs, batch: Batch, beside: Beside = ALONE) -> RowTotals:
        sums = outputs.map_supervised(batch.targets["labels"], _nats)
        return RowTotals(sums["nats"], {"accuracy": sums["accuracy"]})


def _nats(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    right = logits.argmax(dim=-1).eq(labels).to(logits.dtype)
    return {"nats": functional.cross_entropy(logits, labels, reduction="none"), "accuracy": right}


CLASSIFICATION = Classification()
