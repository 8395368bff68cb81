"""OLoRA: b starts with orthonormal columns, the first of Q in the weight's QR decomposition.

As with PiSSA the base stays as it is, and what the factors amount to at the start is taken off again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manylora.methods.inits.init import Init
from manylora.types import Start


def olora(start: Start) -> tuple[Tensor, Tensor]:
    """b = Q[:, :R], orthonormal, and a = R[:R] of W = QR. They depend on the order of the weight's columns.

    Neither is divided by the scale s, as b would no longer be orthonormal: s b a need not be the weight's own part, as
    it is taken off again. The first columns of Q depend on the first columns of W alone, so no more is decomposed.

    Source: OLoRA (2406.01775), algorithm 1.
    """
    weight = start.site.weight()
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    b = torch.linalg.qr(weight[:, : start.rank])[0]
    return b.t() @ weight, b


OLORA = Init(olora, anchored=True)
