"""The singular values of B A from its factors, and other factors of the same product; nothing dense is made.

Shapes: A (R, I), B (O, R). All of it is computed in float64 on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def product_norm(a: Tensor, b: Tensor) -> float:
    """The Frobenius norm of B A."""
    return float(_core(a, b)[2].norm())


def difference_norm(a: Tensor, b: Tensor, a_other: Tensor, b_other: Tensor) -> float:
    """The Frobenius norm of B A - B' A', 0 where the factors are the same."""
    if torch.equal(a, a_other) and torch.equal(b, b_other):
        return 0.0
    return product_norm(torch.cat([a, a_other]), torch.cat([b, -b_other], dim=1))


def components(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (O, R), sigma (R,) and V (R, I) of B A = U diag(sigma) V; sigma falls.

    A rank above O or I leaves zeros at the end, in U and V too.
    """
    q_b, q_a, core = _core(a, b)
    u, sigma, v = torch.linalg.svd(core, full_matrices=False)
    spare = a.shape[0] - len(sigma)
    return (
        functional.pad(q_b @ u, (0, spare)),
        functional.pad(sigma, (0, spare)),
        functional.pad(v @ q_a.t(), (0, 0, 0, spare)),
    )


def count_for(sigma: Tensor, share: float) -> int:
    """The least number of leading components, one or more, whose sigma^2 make up `share` of the whole."""
    energy = sigma.square().cumsum(0)
    # The number of components is one more than the index of the last one.
    return min(int((energy < share * energy[-1]).sum()) + 1, len(sigma))


def halves(u: Tensor, sigma: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A = sqrt(sigma) V and B = U sqrt(sigma): each component as large in one factor as in the other."""
    root = sigma.sqrt()
    return root[:, None] * v, u * root


def levelled(a: Tensor, b: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """What `halves` gave, turned so that all components are equally large: A' = Q^T A, B' = B Q with Q orthogonal.

    Rounding adds an error of about sum_k |b_k|^2 |a_k|^2 to |B A|^2, where |b_k|^2 = |a_k|^2 = (Q^T diag(sigma) Q)_kk:
    sum sigma^2 without the turn, the most that any Q gives, and (sum sigma)^2 / R with it, the least (Schur-Horn). A
    product of low effective rank gains most.
    """
    turn = _level(sigma)
    return turn.t() @ a, b @ turn


def _level(sigma: Tensor) -> Tensor:
    """An orthogonal Q for which the diagonal of Q^T diag(sigma) Q is the mean of sigma throughout.

    Each rotation of a plane puts one more entry of the diagonal on the mean: always the smallest, with the largest.
    """
    size, mean = len(sigma), float(sigma.mean())
    held, turn = torch.diag(sigma), torch.eye(size, dtype=sigma.dtype)
    for _ in range(size - 1):
        diagonal = held.diagonal()
        low, high = int(diagonal.argmin()), int(diagonal.argmax())
        below, above, cross = mean - float(diagonal[low]), float(diagonal[high]) - mean, float(held[low, high])
        if min(below, above) <= 1e-12 * mean:
            break
        # tan t of above * tan^2 + 2 cross * tan - below = 0
        tangent = (-cross + (cross * cross + above * below) ** 0.5) / above
        cosine = (1.0 + tangent * tangent) ** -0.5
        plane = torch.tensor([[cosine, -tangent * cosine], [tangent * cosine, cosine]], dtype=sigma.dtype)
        pair = [low, high]
        held[:, pair] = held[:, pair] @ plane
        held[pair] = plane.t() @ held[pair]
        turn[:, pair] = turn[:, pair] @ plane
    return turn


def _core(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q_b, Q_a and M of B A = Q_b M Q_a^T."""
    q_b, r_b = torch.linalg.qr(b.detach().double().cpu())
    q_a, r_a = torch.linalg.qr(a.detach().double().cpu().t())
    return q_b, q_a, r_b @ r_a.t()
