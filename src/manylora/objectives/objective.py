"""What objectives share: most of them want nothing but the outputs of their rows, and learn nothing of their member."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar

from torch import Tensor

from manylora.errors import RouteError
from manylora.objectives import OBJECTIVES
from manylora.types import Batch, Follower, Objective, Outputs


class Stateless:
    """An objective without followers and without a state; what is minimised is up to the subclass."""

    supervises: ClassVar[frozenset[str]] = frozenset({"positions"})
    _followers: ClassVar[Mapping[str, Follower]] = {}

    @property
    def followers(self) -> Mapping[str, Follower]:
        return self._followers

    def told(self, settings: Any) -> Any:
        return self

    def summary(self, loss: float, metrics: Mapping[str, float]) -> Mapping[str, float]:
        return {}

    def begin(self) -> Mapping[str, Tensor]:
        return {}

    def update(self, state: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return state


class Alone:
    """Outputs and batch, and nothing beside them."""

    state: Mapping[str, Tensor] = {}

    def outputs(self, batch: Batch, who: str = "base") -> Outputs:
        raise RouteError(
            f"the outputs of {who!r} are asked for, and only those of the rows themselves are here",
            next_step="call objectives.forward.forward_batch, which runs others too",
        )


ALONE = Alone()
"""For an objective that is called on outputs by hand."""


@lru_cache(maxsize=256)
def objective_of(name: str, settings: Any = None) -> Objective:
    """An objective by its name, with settings of its own (None: it has none, or their defaults)."""
    return OBJECTIVES.get(name) if settings is None else OBJECTIVES.get(name).told(settings)


def perplexity(nats: float) -> float:
    """exp of the mean nats of a token; infinite where that is more than a number holds."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
