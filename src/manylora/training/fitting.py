"""How a run's forwards fit into memory: measured before its first step, chosen once, and kept with its checkpoints."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from manylora.files import write_json_atomic
from manylora.memory.device import free_bytes
from manylora.training.checkpointing import MODES, Mode, checkpointed, choose_checkpointing, mode_named
from manylora.training.footprint import ActivationModel, member_bytes, token_bytes
from manylora.training.step import widest_row

if TYPE_CHECKING:
    from manylora.adapters.adapter import Adapter
    from manylora.base.frozen import FrozenModel
    from manylora.config import TrainConfig
    from manylora.training.member import Member

FILE_NAME = "memory.json"
PROBED_SHARE = 0.5
"""Of the free memory, what a step may take by the plan without being tried first: the plan is an estimate, and a try
costs what a step does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """How layers are computed, the most tokens of a forward (None: any), whether that is tried first, and why.

    `may_change`: what checkpointing is was left to the run, which may therefore choose a stronger one later.
    `compiled`: layers are compiled.
    `coming_bytes` is what the member and its largest step will hold; None: not known.
    """

    mode: Mode = "none"
    budget_tokens: int | None = None
    probes: bool = False
    may_change: bool = False
    compiled: bool = False
    reason: str = ""
    coming_bytes: int | None = None

    @property
    def modes(self) -> tuple[Mode, ...]:
        """What checkpointing may be: `selective` watches products, which compiled layers hide from it."""
        return modes_with(self.compiled)


def modes_with(compiled: bool) -> tuple[Mode, ...]:
    """What checkpointing may be where layers are compiled, or are not."""
    return tuple(mode for mode in MODES if mode != "selective" or not compiled)


def asked(train: TrainConfig) -> Fit:
    """What a configuration says of its layers, where nothing was measured: `auto` is then none, until it must be."""
    chosen = mode_named(train.checkpointing)
    return Fit(mode=chosen or "none", may_change=chosen is None, compiled=train.compile == "layers")


def fit(
    base: FrozenModel,
    member: Member,
    adapter: Adapter,
    mode: str,
    *,
    modes: tuple[Mode, ...] = MODES,
    device_free: int | None = None,
) -> Fit:
    """What a run of one member does about memory: `mode` is `train.checkpointing`, `modes` what `auto` may choose.

    Where the step does not fit even when its layers keep only their inputs, its forwards are bounded too. The base must
    carry no bank.

    Raises:
        ConfigError: the mode needs layers that the base does not have.
    """
    free = free_bytes(base.device) if device_free is None else device_free
    own = member_bytes(base, adapter, member.recipe.optimizer, copies=member.num_slots)
    free = max(0, free - own)
    recipe = member.recipe
    rows, (_, width) = math.ceil(recipe.rows_per_step / recipe.accumulate), widest_row(member)
    measured: dict[str, ActivationModel] = {}

    def measure(one: Mode) -> bool:
        """Whether the largest forward of a step fits under a mode."""
        with checkpointed(base, one):
            measured[one] = token_bytes(base, adapter, member.objective, member.epochs)
        return measured[one].total(rows, width) <= free

    with checkpointed(base) as found:
        possible = modes if len(found.layers) > 1 else MODES[:1]
    named = mode_named(mode)
    for one in possible if named is None else (named,):
        if measure(one):
            break
    totals = {one: model.total(rows, width) for one, model in measured.items()}
    chosen, reason = choose_checkpointing(mode, totals, free)
    if mode == "auto" and len(possible) == 1:
        reason += "; this base has no repeated layers to compute again"
    budget = None
    if totals[chosen] > free:
        budget = max(width, measured[chosen].tokens_within(free, width) // width * width)
        reason += f"; up to {budget:,} tokens a forward"
        totals[chosen] = measured[chosen].total(budget // width, width)
    probes = totals[chosen] > PROBED_SHARE * free
    coming = own + totals[chosen] if measured[chosen].followed else None
    return Fit(
        mode=chosen, budget_tokens=budget, probes=probes, may_change=mode == "auto", reason=reason, coming_bytes=coming
    )


def kept_fit(folder: Path) -> Fit | None:
    """What a run chose when it began, None where it has not yet; `folder` is that of its checkpoints."""
    path = folder / FILE_NAME
    return Fit(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def keep_fit(chosen: Fit, folder: Path) -> None:
    """Write down what a run chose, for when it resumes."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / FILE_NAME, asdict(chosen))
