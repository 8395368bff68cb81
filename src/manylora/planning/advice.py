"""What to change in a configuration that does not fit: settings that then do, each found by planning it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from manylora.errors import UserError
from manylora.planning.planner import Plan, Planner

if TYPE_CHECKING:
    from manylora.config import Config

MOST_PLANS = 8
"""Plans that are made in search of a setting: each takes seconds."""

HOPELESS = 1.1
"""Over what is free, a guess that is not worth a plan."""
LEFT_BY_FULL, LEFT_BY_PACKING = 0.3, 0.3
"""Guesses for guesses alone: what full checkpointing leaves of activations, and packing of weights."""


@dataclass(frozen=True, slots=True)
class Change:
    """Keys and values that make a run fit, as `--set` takes them, the plan with them, and what they cost."""

    settings: Mapping[str, Any]
    plan: Plan
    cost: str


def changes(planner: Planner, config: Config, plan: Plan, *, members: int = 1) -> tuple[list[Change], Plan]:
    """Changes after which the run fits, the least first, and the smallest plan that was seen.

    A change of how much is computed at once leaves the result as it is; the others do not, and say so.
    """
    config = _with(config, {"train.checkpointing": plan.checkpointing})
    found: list[Change] = []
    smallest, made = plan, 0
    for settings, cost in _candidates(config, planner, plan):
        if made == MOST_PLANS or len(found) == 2:
            break
        if any(way.settings.items() <= settings.items() for way in found):
            continue  # it fits without the rest
        if _guessed(config, settings, plan) > HOPELESS * plan.device.free_bytes:
            continue
        try:
            tried = planner.plan(_with(config, settings), members=members)
        except UserError:  # rows that are longer than the row, a rank below a pattern's: no way out
            continue
        made += 1
        smallest = min(smallest, tried, key=lambda one: one.total_bytes)
        if tried.fits:
            found.append(Change(settings, tried, cost))
    return found, smallest


def _guessed(config: Config, settings: Mapping[str, Any], plan: Plan) -> float:
    """About what a change comes to, so that only those with a chance are planned."""
    changed, before, held = _with(config, settings).train, config.train, plan.categories
    passing = sum(held[name] for name in ("activations", "loss", "freed and kept"))
    share = _at_once(changed) / _at_once(before)
    if changed.checkpointing == "full" != before.checkpointing:
        share *= LEFT_BY_FULL
    weights = held["weights"] * (LEFT_BY_PACKING if "quantize" in settings else 1.0)
    return plan.total_bytes - passing * (1 - share) - held["weights"] + weights


def _at_once(train: Any) -> int:
    return math.ceil(train.rows_per_step / train.accumulate) * train.row_tokens


def _candidates(config: Config, planner: Planner, plan: Plan) -> Iterator[tuple[dict[str, Any], str]]:
    train, rows = config.train, config.train.rows_per_step
    same = "same result"
    if train.checkpointing != "full":
        yield {"train.checkpointing": "full"}, f"{same}, about a third more time"
    parts = [count for count in (train.accumulate * 2, train.accumulate * 4, rows) if train.accumulate < count <= rows]
    for count in dict.fromkeys(parts):
        yield {"train.accumulate": count}, same
    if rows > train.accumulate:
        yield {"train.accumulate": rows, "train.checkpointing": "full"}, f"{same}, about a third more time"
    smallest: dict[str, Any] = {"train.accumulate": rows, "train.checkpointing": "full"}
    packed = {} if planner.hollow.format is not None else {"quantize": "nf4"}
    if packed:
        yield packed, "the base in 4 bits: a little further from the original"
        yield {**smallest, **packed}, "the base in 4 bits; about a third more time"
    if config.adapter.rank > 4:
        yield {**smallest, **packed, "adapter.rank": max(4, config.adapter.rank // 4)}, "a smaller adapter"
    if train.optimizer.name != "sgd":
        yield {**smallest, **packed, "train.optimizer": "sgd"}, "another optimiser: another learning rate too"
    for tokens in (train.row_tokens // 2, train.row_tokens // 4):
        if tokens >= 8:
            settings = {**smallest, **packed, "train.row_tokens": tokens, "train.rows_per_step": 1,
                        "train.accumulate": 1}  # fmt: skip
            yield settings, "shorter rows, fewer of them in a step"


def _with(config: Config, settings: Mapping[str, Any]) -> Config:
    """A configuration with settings laid over it; the values are known to be allowed."""
    from manylora.config import load_config

    return load_config(config.to_dict(), settings)
