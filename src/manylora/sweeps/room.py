"""How many members of a sweep train at once on this machine, from the base and the largest of its first trials."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from manylora.errors import UserError
from manylora.training.footprint import choose_concurrency, free_bytes, member_bytes, token_bytes

if TYPE_CHECKING:
    from manylora.adapters.adapter import Adapter
    from manylora.config import Config
    from manylora.training.member import Member
    from manylora.training.prepare import Stock

PROBED = 3
"""Adapters that are laid out to see how large a member gets: those of the highest ranks."""


@dataclass(frozen=True, slots=True)
class Room:
    """How many slots there are, the tokens of one forward, the bytes that residents hold together, and why."""

    num_slots: int
    budget_tokens: int
    resident_bytes: int | None
    reason: str


def room_for(config: Config, stock: Stock, likely: Sequence[Config], num_trials: int) -> Room:
    """What a fleet may hold here; `likely` are configurations that the search proposes.

    A member that turns out larger than those looked at waits until what it takes is free.

    Raises:
        UserError: none of them can be trained.
    """
    sweep = config.sweep
    assert sweep is not None
    kinds = {json.dumps([one.adapter.model_dump(mode="json"), one.train.optimizer]): one for one in likely}
    largest = sorted(kinds.values(), key=lambda one: -max(one.adapter.rank, *one.adapter.rank_pattern.values(), 0))
    longest = max(likely, key=lambda one: one.train.row_tokens * one.train.rows_per_step)
    made = _made(largest, stock)
    sizes = [member_bytes(stock.base, adapter, one.train.optimizer) for one, _, adapter in made]
    _, member, adapter = made[sizes.index(max(sizes))]
    num_slots, budget_tokens, reason = choose_concurrency(
        num_trials=num_trials,
        members_per_trial=sweep.repeats * (sweep.folds or 1),
        search=sweep.search,
        asked=None if sweep.concurrent == "auto" else sweep.concurrent,
        bytes_per_member=max(sizes),
        activations=token_bytes(stock.base, adapter, member.objective, member.epochs),
        row_tokens=max(stock.row_tokens(one) for one in likely),
        step_tokens=stock.row_tokens(longest) * longest.train.rows_per_step,
        free=free_bytes(stock.base.device),
        device_type=stock.base.device.type,
    )
    resident = num_slots * max(sizes) if sweep.concurrent == "auto" else None
    return Room(num_slots, budget_tokens, resident, reason)


def _made(configs: Sequence[Config], stock: Stock) -> list[tuple[Config, Member, Adapter]]:
    """The first of some configurations that can be trained, each with a member; the others end as trials of their own.

    Raises:
        UserError: none of them can be trained.
    """
    found, first = [], None
    for one in configs:
        if len(found) == PROBED:
            break
        try:
            found.append((one, *stock.member(one, "probe")))
        except UserError as error:
            first = first or error
    if not found and first is not None:
        raise first
    return found
