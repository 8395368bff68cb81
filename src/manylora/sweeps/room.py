"""How many members of a sweep train at once on this machine, from the base and the largest of its first trials."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from manylora.errors import UserError
from manylora.memory.device import SAFETY_SHARE, free_bytes
from manylora.training.checkpointing import checkpointed
from manylora.training.fitting import asked
from manylora.training.footprint import choose_concurrency, member_bytes, token_bytes

if TYPE_CHECKING:
    from manylora.adapters.adapter import Adapter
    from manylora.config import Config
    from manylora.planning.devices import Device
    from manylora.planning.planner import Plan, Planner
    from manylora.training.member import Member
    from manylora.training.prepare import Stock

PROBED = 3
"""Adapters that are laid out to see how large a member gets: those of the highest ranks."""


@dataclass(frozen=True, slots=True)
class Room:
    """How many members train at once, the tokens of one forward, the bytes that they hold together, and why.

    `coming_bytes` is what the members and their largest forward will hold; None: not known.
    """

    num_slots: int
    budget_tokens: int
    resident_bytes: int | None
    reason: str
    coming_bytes: int | None = None


def room_for(
    config: Config, stock: Stock, likely: Sequence[Config], num_trials: int, *, free: int | None = None
) -> Room:
    """What a fleet may hold here, or in `free` bytes; `likely` are configurations that the search proposes.

    A member that turns out larger than those looked at waits until what it takes is free.

    Raises:
        UserError: none of them can be trained.
    """
    sweep = config.sweep
    assert sweep is not None
    kinds = {
        json.dumps(one.model_dump(mode="json", include={"adapter": True, "train": {"optimizer"}})): one
        for one in likely
    }
    largest = sorted(kinds.values(), key=lambda one: -max(one.adapter.rank, *one.adapter.rank_pattern.values(), 0))
    longest = max(likely, key=lambda one: one.train.row_tokens * one.train.rows_per_step)
    made = _made(largest, stock)
    sizes = [
        member_bytes(stock.base, adapter, member.recipe.optimizer, copies=member.num_slots)
        for _, member, adapter in made
    ]
    _, member, adapter = made[sizes.index(max(sizes))]
    with checkpointed(stock.base, asked(config.train).mode):
        activations = token_bytes(stock.base, adapter, member.objective, member.epochs)
    row_tokens = max(stock.row_tokens(one) for one in likely)
    step_tokens = stock.row_tokens(longest) * longest.train.rows_per_step
    num_slots, budget_tokens, reason = choose_concurrency(
        num_trials=num_trials,
        members_per_trial=sweep.repeats * (sweep.folds or 1),
        search=sweep.search,
        asked=None if sweep.concurrent == "auto" else sweep.concurrent,
        bytes_per_member=max(sizes),
        activations=activations,
        row_tokens=row_tokens,
        step_tokens=step_tokens,
        free=free_bytes(stock.base.device) if free is None else free,
        device_type=stock.base.device.type,
    )
    resident = num_slots * max(sizes) if sweep.concurrent == "auto" else None
    rows = max(1, min(budget_tokens, num_slots * step_tokens) // row_tokens)
    coming = num_slots * max(sizes) + activations.total(rows, row_tokens, num_slots) if activations.followed else None
    return Room(num_slots, budget_tokens, resident, reason, coming)


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


def planned_fleet(config: Config, where: Device | None) -> tuple[Planner, Config, Plan, str]:
    """The plan of a sweep's concurrent members on a device (None: this one): all like the largest that is likely.

    Also what planned it, the configuration of that member, and why so many train at once.

    Raises:
        UserError: what `sweep` would raise of the configuration, the base or the data.
    """
    from manylora.memory.hollow import without_weights
    from manylora.memory.trace import Trace
    from manylora.planning.planner import Planner
    from manylora.sweeps.run import DEFAULT_TRIALS, LIKELY, settled
    from manylora.sweeps.search import Search
    from manylora.sweeps.space import parse_space
    from manylora.sweeps.trials import Trials

    config, _ = settled(config)
    assert config.sweep is not None
    space = parse_space(config.sweep.space)
    trials = Trials(config, space)
    planner = Planner(trials.base, where)
    stock = planner.stock_of(trials.base)
    trials.check(stock.check)
    num_trials = config.sweep.trials or (None if config.sweep.search == "grid" else DEFAULT_TRIALS)
    search = Search(config.sweep.search, space, storage=None, seed=config.sweep.seed, num_trials=num_trials,
                    study_name="planned")  # fmt: skip
    proposed = (search.propose(number) for number in range(min(LIKELY, search.num_trials)))
    likely = trials.possible(proposed, stock.check)
    trace = Trace()
    with without_weights(planner.hollow_as(trials.base), trace), trace.running():
        weights = sum(block.num_bytes for block in trace.blocks if block.category == "weights")
        free = int(SAFETY_SHARE * max(0, planner.device.free_bytes - weights))
        room = room_for(config, stock, likely, search.num_trials, free=free)
    kept = [one for one in likely if one.adapter.rank == max(other.adapter.rank for other in likely)]
    largest = max(kept, key=lambda one: one.train.row_tokens * one.train.rows_per_step)
    plan = planner.plan(largest, members=room.num_slots, budget_tokens=room.budget_tokens)
    return planner, largest, plan, room.reason
