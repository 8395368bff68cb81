"""PiSSA: training moves the leading singular directions of the weight itself.

The paper takes these out of the base. Here the base is shared and stays as it is: the starting factors are kept beside
the trained ones as anchors, and the update is s (B A - B0 A0).
"""

from __future__ import annotations

from torch import Tensor

from manylora.methods.inits.init import Init
from manylora.methods.inits.svd import leading_factors
from manylora.types import Start


def pissa(start: Start) -> tuple[Tensor, Tensor]:
    """a = sqrt(S_R / s) V_R^T and b = U_R sqrt(S_R / s) of the weight as it is in use: dense, or unpacked.

    Source: PiSSA (2404.02948), equations 2 and 3, with the scale s divided out so that s B A is the leading part.
    """
    return leading_factors(start.site.weight(), start.rank, start.scale, start.generator)


PISSA = Init(pissa, anchored=True)
