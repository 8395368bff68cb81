"""How many members of a sweep train at once on this machine, from the base and the largest of its first trials."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from manylora.training.footprint import choose_concurrency, free_bytes, member_bytes, token_bytes

if TYPE_CHECKING:
    from manylora.config import Config
    from manylora.training.prepare import Stock

PROBED = 3
"""Adapters that are laid out to see how large a member gets: those of the highest ranks."""


def room_for(config: Config, stock: Stock, likely: Sequence[Config], num_trials: int) -> tuple[int, int, str]:
    """(slots, tokens of one forward, one line that says why); `likely` are configurations that the search proposes.

    Raises:
        UserError: none of them can be trained.
    """
    sweep = config.sweep
    assert sweep is not None
    kinds = {json.dumps([one.adapter.model_dump(mode="json"), one.train.optimizer]): one for one in likely}
    largest = sorted(kinds.values(), key=lambda one: -max(one.adapter.rank, *one.adapter.rank_pattern.values(), 0))
    longest = max(likely, key=lambda one: one.train.row_tokens * one.train.rows_per_step)
    made = [(one, *stock.member(one, "probe")) for one in largest[:PROBED]]
    sizes = [member_bytes(stock.base, adapter, one.train.optimizer) for one, _, adapter in made]
    _, member, adapter = made[sizes.index(max(sizes))]
    return choose_concurrency(
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
