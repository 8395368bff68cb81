"""All members of a sweep in one bank, in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from manylora.adapters.bank import Bank
from manylora.files import write_json_atomic
from manylora.sweeps.engines import Engine
from manylora.sweeps.room import Room, room_for
from manylora.training.expected import expected
from manylora.training.run import run_loop, save_member

if TYPE_CHECKING:
    from manylora.adapters.adapter import Adapter
    from manylora.config import Config
    from manylora.runs.folder import RunFolder
    from manylora.spec import AdapterSpec
    from manylora.sweeps.director import Director
    from manylora.sweeps.ledger import Ledger
    from manylora.training.loop import Make
    from manylora.training.member import Member
    from manylora.training.prepare import Stock

ROOM_FILE = "room.json"


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
    # What memory held when the sweep began decides its batches to the end: it resumes to the same bytes.
    kept = folder.checkpoints / ROOM_FILE
    if resume and kept.is_file():
        room = Room(**json.loads(kept.read_text(encoding="utf-8")))
    else:
        room = room_for(config, stock, likely, director.num_trials)
        folder.checkpoints.mkdir(exist_ok=True)
        write_json_atomic(kept, asdict(room))
    for note in (*stock.new_notes(), room.reason, expected(stock.base, room.coming_bytes).line()):
        ledger.note(note)
    with Bank(stock.base, num_slots=room.num_slots * stock.slots_per_member) as bank:
        run_loop(
            stock,
            folder,
            director,
            maker(stock, director.config, ledger.note),
            ledger.open,
            bank=bank,
            slots=range(bank.num_slots),
            hand=lambda member, adapter: hand_over(member, adapter, director.config(member.name), folder, stock),
            resume=resume,
            budget_tokens=room.budget_tokens,
            resident_bytes=room.resident_bytes,
        )


def maker(stock: Stock, config_of: Callable[[str], Config], note: Callable[[str], None]) -> Make:
    """What makes a loop's members by name, and notes what each brings that is new."""

    def make(name: str, shape: AdapterSpec | None) -> tuple[Member, Adapter]:
        made = stock.member(config_of(name), name, shape=shape)
        for line in stock.new_notes():
            note(line)
        return made

    return make


def hand_over(member: Member, adapter: Adapter, config: Config, folder: RunFolder, stock: Stock) -> None:
    """Write what a member ended with; one that was stopped is trained again alone on its full schedule, as far."""
    if member.state == "stopped":
        config = config.model_copy(update={"train": config.train.model_copy(update={"stop_after": member.step})})
    save_member(config, adapter, folder.adapter(member.name), stock.base)


LOCAL = Engine(run=run, check=lambda config: None)
