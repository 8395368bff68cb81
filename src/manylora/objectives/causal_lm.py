"""The negative log-likelihood of each supervised token, given those before it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from manylora.objectives.objective import ALONE, Stateless, perplexity
from manylora.ops.positions import nats
from manylora.types import IGNORED, Batch, Beside, Outputs, RowTotals


class CausalLm(Stateless):
    """Total: nats, summed over a row's supervised tokens. Weight: their number."""

    def summary(self, loss: float, metrics: Mapping[str, float]) -> Mapping[str, float]:
        return {"perplexity": perplexity(loss)}

    def weight(self, batch: Batch) -> Tensor:
        return batch.targets["labels"].ne(IGNORED).sum(dim=1).to(torch.float64)

    def __call__(self, outputs: Outputs, batch: Batch, beside: Beside = ALONE) -> RowTotals:
        sums = outputs.map_supervised(batch.targets["labels"], nats)
        return RowTotals(sums["nats"])


CAUSAL_LM = CausalLm()
