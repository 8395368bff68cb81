"""Learning-rate schedules: a linear warmup, then one of a few shapes; each a pure function of the step.

A shape maps the progress after warmup (0 at its first step, 1 at `total_steps`) to a share of the peak (1 down to 0).
Nothing is stored, so a resumed run and a member that is stopped early see the same rates as an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from manylora.errors import ConfigError
from manylora.table import Table

Shape = Callable[[float], float]

SCHEDULES: Table[Shape] = Table(
    "schedule",
    {
        "linear": "manylora.training.schedule:linear",
        "cosine": "manylora.training.schedule:cosine",
        "constant": "manylora.training.schedule:constant",
        "polynomial": "manylora.training.schedule:polynomial",
        "wsd": "manylora.training.schedule:wsd",
    },
)

POLYNOMIAL_POWER = 2.0
WSD_DECAY_SHARE = 0.2
"""Share of the steps after warmup in which `wsd` decays; Source: MiniCPM, arXiv 2404.06395, uses 10 to 20 %."""


def rate_at(step: int, *, schedule: str, total_steps: int, warmup_steps: int, peak: float, floor: float = 0.0) -> float:
    """The learning rate of one step, counted from 0.

    Semantics: with w warmup steps out of T, step s < w has peak * (s + 1) / w, so that the first step already learns;
    a later one has floor + (peak - floor) * shape((s - w) / (T - w)). The floor is reached at T, one step after the
    last, so the last step learns too. Against the schedulers of transformers, warmup is one step ahead and the decay
    is the same. A warmup longer than the run is cut off by its end.

    Raises:
        UnknownName: no such schedule. ConfigError: a negative count, or a floor that is negative or above the peak.
    """
    shape = SCHEDULES.get(schedule)
    if step < 0 or warmup_steps < 0 or total_steps < 0:
        raise ConfigError(f"steps count from 0, got step {step}, warmup {warmup_steps} of {total_steps} in total")
    if not 0.0 <= floor <= peak:
        raise ConfigError(f"the lowest learning rate is {floor:g}", allowed=f"0 to the peak, which is {peak:g}")
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return floor + (peak - floor) * shape(progress)


def linear(progress: float) -> float:
    """A straight line down to 0."""
    return 1.0 - progress


def cosine(progress: float) -> float:
    """Half a cosine wave down to 0; Source: SGDR, arXiv 1608.03983, equation 5, without restarts."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def constant(progress: float) -> float:
    """The peak throughout; the floor is never used."""
    return 1.0


def polynomial(progress: float) -> float:
    """A parabola down to 0: fast at first, slow at the end."""
    return (1.0 - progress) ** POLYNOMIAL_POWER


def wsd(progress: float) -> float:
    """Warmup, stable, decay: the peak until the last fifth, in which a straight line leads down to 0."""
    return min(1.0, (1.0 - progress) / WSD_DECAY_SHARE)
