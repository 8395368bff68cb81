"""What objectives share: most of them want nothing but the outputs of their rows, and learn nothing of their member."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from manylora.errors import RouteError
from manylora.types import Batch, Follower, Outputs


class Stateless:
    """An objective without followers and without a state; what is minimised is up to the subclass."""

    followers: Mapping[str, Follower] = {}

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
