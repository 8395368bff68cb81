"""The route of a batch on a base that may or may not carry a bank."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from manylora.errors import RouteError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from manylora.base.frozen import FrozenModel


def route_rows(
    base: FrozenModel, slots: Sequence[int], streams: Sequence[int] | None = None
) -> AbstractContextManager[object]:
    """A context in which the base's model may be run on rows of these slots (-1: the bare base).

    `streams` seed the rows' dropout; None: dropout off.

    Raises:
        RouteError: an adapter's slot is named and no bank is open on the base.
    """
    if base.bank is not None:
        return base.bank.route(tuple(slots), streams)
    named = sorted({slot for slot in slots if slot != -1})
    if named:
        raise RouteError(
            f"slot {named[0]} is asked for, and this base carries no bank",
            allowed="-1, the bare base",
            next_step="bank = manylora.Bank(base); bank.put(adapter, slot=0)",
        )
    return nullcontext()
