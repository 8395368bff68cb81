"""Other factors of the same product, of which rounding takes less.

B A = U S V by the QR of both factors; B = U sqrt(S) and A = sqrt(S) V, then both turned by an orthogonal matrix so that
all components are equally large (`spectrum.levelled`). That undoes whatever mixing training left between the components
(factors that nearly cancel each other lose several times their product's size), and gains on every product whose
singular values differ. Where they do not, it is a toss of a coin, so both are tried.
"""

from __future__ import annotations

from torch import Tensor

from manylora.adapters.compress.spectrum import components, difference_norm, halves, levelled
from manylora.ops.rounding import Grid


def balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same product and rank, float32, whose components are equally large."""
    u, sigma, v = components(a, b)
    a_new, b_new = levelled(*halves(u, sigma, v), sigma)
    return a_new.float(), b_new.float()


def better(a: Tensor, b: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The factors as they are, or balanced: those of which the grid keeps more. Float32, on the CPU.

    Factors that were trained on the grid lose nothing as they are, and stay so.
    """

    def error(pair: tuple[Tensor, Tensor]) -> float:
        return difference_norm(*plain, grid.rounded(pair[0]), grid.rounded(pair[1].t()).t())

    plain = a.detach().float().cpu(), b.detach().float().cpu()
    return min((plain, balanced(*plain)), key=error)
