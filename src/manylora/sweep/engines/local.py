"""All members of a sweep in one bank, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from manylora.sweep.room import room_for
from manylora.training.run import run_loop, save_member

if TYPE_CHECKING:
    from manylora.adapters.adapter import Adapter
    from manylora.config import Config
    from manylora.sweep.director import Director
    from manylora.sweep.ledger import Ledger
    from manylora.training.folder import RunFolder
    from manylora.training.member import Member
    from manylora.training.prepare import Stock


def run(
    config: Config,
    stock: Stock,
    folder: RunFolder,
    director: Director,
    ledger: Ledger,
    *,
    likely: Sequence[Config],
    resume: bool,
) -> None:
    """Train a sweep to its end; `likely` are configurations that it will train.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is written. UserError: see `training.loop.Loop`.
    """
    said = len(stock.notes)
    room = room_for(config, stock, likely, director.num_trials)
    for note in (*stock.notes[said:], room.reason):
        ledger.note(note)

    def make(name: str) -> tuple[Member, Adapter]:
        said = len(stock.notes)
        made = stock.member(director.config(name), name)
        for note in stock.notes[said:]:
            ledger.note(note)
        return made

    run_loop(
        stock,
        folder,
        director,
        make,
        ledger.open,
        hand=lambda member, adapter: hand_over(member, adapter, director, folder, stock),
        resume=resume,
        num_slots=room.num_slots,
        budget_tokens=room.budget_tokens,
        resident_bytes=room.resident_bytes,
    )


def hand_over(member: Member, adapter: Adapter, director: Director, folder: RunFolder, stock: Stock) -> None:
    """Write what a member ended with; one that was stopped is trained again alone on its full schedule, as far."""
    config = director.config(member.name)
    if member.state == "stopped":
        config = config.model_copy(update={"train": config.train.model_copy(update={"stop_after": member.step})})
    save_member(config, adapter, folder.adapter(member.name), stock.base)
