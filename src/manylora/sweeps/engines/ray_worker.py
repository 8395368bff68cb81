"""A worker of a sweep: a base, a bank and the one loop in a process of its own, which asks the hub by post.

The loop runs in a thread; whoever owns the worker calls `exchange` again and again, gets all that was said in between
and brings the answer to a question. Nothing here knows of Ray.
"""

from __future__ import annotations

import math
import os
import socket
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manylora.errors import ConfigError, ManyloraError, NonFiniteLoss
from manylora.sweeps.engines.ray_hub import Answer, Handout
from manylora.training.orders import Ending, Order, Report, Verdict

if TYPE_CHECKING:
    from manylora.adapters.adapter import Adapter
    from manylora.config import Config
    from manylora.sweeps.room import Room
    from manylora.training.member import Member
    from manylora.training.prepare import Stock

POLL_S = 0.25
"""Longest time that an exchange waits for something urgent: what is said in between travels together."""
ASK_S = 0.25
"""Least time between two questions for more members, where the last one was answered with none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a worker is told at its start. `run` and `home` (the working folder) are absolute, and on every machine."""

    name: str
    config: Config
    base: Config
    likely: Sequence[Config]
    num_trials: int
    num_workers: int
    num_threads: int
    device: str
    use_cache: bool
    run: Path
    home: Path


class Post:
    """What a loop's thread says, kept until it is fetched; a question waits for its answer."""

    def __init__(self) -> None:
        self._items: list[tuple[Any, ...]] = []
        self._urgent = False
        self._answer: Answer | None = None
        self._changed = threading.Condition()
        self.stop = threading.Event()

    def tell(self, *item: Any) -> None:
        """Say something that nobody has to know at once; costs the loop nothing."""
        with self._changed:
            self._items.append(item)

    def finish(self, *item: Any) -> None:
        """Say the last thing."""
        with self._changed:
            self._items.append(item)
            self._urgent = True
            self._changed.notify_all()

    def ask(self, *item: Any) -> Any:
        """Say something after all that was said before, and wait for the answer."""
        with self._changed:
            self._items.append(item)
            self._urgent = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._answer is not None)
            answer, self._answer = self._answer, None
        assert answer is not None
        return answer.value

    def exchange(self, answer: Answer | None, stop: bool) -> list[tuple[Any, ...]]:
        """Bring an answer; fetch what was said, at once where a question is among it."""
        with self._changed:
            if stop:
                self.stop.set()
            if answer is not None:
                self._answer = answer
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._urgent, POLL_S)
            items, self._items, self._urgent = self._items, [], False
        return items


class Proxy:
    """The hub as the loop's source of members and its recorder."""

    def __init__(self, post: Post):
        self._post = post
        self._configs: dict[str, Config] = {}
        self.steps: dict[str, int] = {}
        """The step at which each member waits that was handed out to go on."""
        self._refused_at = -math.inf

    def config(self, member: str) -> Config:
        """The configuration that trains a member alone."""
        return self._configs[member]

    def next(self, *, free: bool, idle: bool) -> Order | None:
        if not idle and time.monotonic() - self._refused_at < ASK_S:
            return None
        handout: Handout | None = self._post.ask("next", free, idle)
        if handout is None:
            self._refused_at = time.monotonic()
            return None
        member = handout.order.member
        self._configs[member] = handout.config
        if handout.step is not None:
            self.steps[member] = handout.step
        return handout.order

    def judge(self, reports: Sequence[Report]) -> Mapping[str, Verdict]:
        self._refused_at = -math.inf
        return self._post.ask("judge", list(reports))

    def started(self, member: str, full_tokens: int) -> None:
        self._post.tell("started", member, full_tokens)

    def failed(self, member: str, reason: str) -> bool:
        return self._post.ask("failed", member, reason)

    def ended(self, ending: Ending) -> None:
        self._refused_at = -math.inf
        self._post.tell("ended", ending)

    def state(self) -> dict[str, Any]:
        """Nothing: the driver keeps it. A checkpoint must not hold more than the driver was told, so this waits."""
        self._post.ask("flush")
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        pass

    def event(self, name: str, **fields: Any) -> None:
        self._post.tell("event", name, fields)

    def note(self, text: str) -> None:
        self._post.tell("note", text)

    def stage(self, text: str) -> None:
        """Nothing: the one line of progress is of all workers."""


class Worker:
    """Trains what the hub hands out, from its making until there is no more."""

    def __init__(self, task: Task):
        self._task = task
        self._post = Post()
        threading.Thread(target=self._work, name=task.name, daemon=True).start()

    def exchange(self, answer: Answer | None, stop: bool) -> list[tuple[Any, ...]]:
        """See `Post.exchange`; the last item is "finished", or "broken" with the error."""
        return self._post.exchange(answer, stop)

    def _work(self) -> None:
        try:
            train(self._task, self._post)
        except (KeyboardInterrupt, NonFiniteLoss):
            self._post.finish("finished")  # every member here was retired; others elsewhere may not be
        except ManyloraError as error:
            self._post.finish("broken", error)
        except BaseException:  # noqa: BLE001 - a fault of ours: the thread must not die without a word
            self._post.finish("broken", RuntimeError(f"{self._task.name} broke down\n{traceback.format_exc()}"))
        else:
            self._post.finish("finished")


def train(task: Task, post: Post) -> None:
    """Open the base and train until the hub has no more members.

    Raises:
        KeyboardInterrupt: the owner said stop; a checkpoint is written. UserError: see `training.loop.Loop`.
    """
    _enter(task.home)
    import torch

    from manylora.adapters.bank import Bank
    from manylora.memory.allocator import freed_memory_kept
    from manylora.runs.folder import RunFolder
    from manylora.sweeps.engines.local import hand_over, maker
    from manylora.training.checkpoint import Checkpoints, Kept
    from manylora.training.checkpointing import checkpointed
    from manylora.training.compiling import compiled
    from manylora.training.fitting import asked
    from manylora.training.loop import Loop, LoopSettings
    from manylora.training.prepare import Stock

    proxy = Proxy(post)

    class Shared(Checkpoints):
        """Checkpoints of this worker, and files of members that wait, which another may have written since."""

        def unpark(self, member: str, step: int | None = None) -> tuple[dict[str, Any], Kept]:
            return super().unpark(member, proxy.steps[member])

    torch.set_num_threads(task.num_threads)
    base = task.base.model_copy(update={"device": task.device})
    stock = Stock(base, use_cache=task.use_cache)
    folder, kept = RunFolder(task.run), base.checkpoint
    checkpoints = Shared(folder.checkpoints / task.name, kept.keep, waiting=folder.checkpoints / "waiting")
    stock.new_notes()  # the driver has said the same of the base and the data
    room = _room(task, stock)
    for note in stock.new_notes():
        proxy.note(note)
    where = f"{stock.base.device}, {task.num_threads} threads"
    proxy.note(f"{task.name} is process {os.getpid()} on {socket.gethostname()} ({where}): {room.reason}")

    def hand(member: Member, adapter: Adapter) -> None:
        hand_over(member, adapter, proxy.config(member.name), folder, stock)

    chosen = asked(base.train)
    settings = LoopSettings(
        checkpoint_every=kept.every_steps,
        select=kept.select,
        budget_tokens=room.budget_tokens,
        resident_bytes=room.resident_bytes,
        strengthens=chosen.may_change,
    )
    make = maker(stock, proxy.config, proxy.note)
    with (
        Bank(stock.base, num_slots=room.num_slots * stock.slots_per_member) as bank,
        compiled(stock.base, chosen.compiled),
        checkpointed(stock.base, chosen.mode, chosen.modes) as layers,
        freed_memory_kept(),
    ):
        loop = Loop(
            bank,
            range(bank.num_slots),
            proxy,
            make,
            proxy,
            checkpoints=checkpoints,
            settings=settings,
            hand=hand,
            checkpointing=layers,
        )
        loop.run(post.stop.is_set)


def _enter(home: Path) -> None:
    """Stand where the driver does: a configuration names its files from there.

    Raises:
        ConfigError: a machine that does not have the folder.
    """
    try:
        os.chdir(home)
    except OSError as error:
        raise ConfigError(
            f"{home} is not on {socket.gethostname()} ({error.strerror}), where a worker is to train",
            next_step="share the folders of the run, the base and the data between all machines, at the same paths",
        ) from error


def _room(task: Task, stock: Stock) -> Room:
    """This worker's part of the fleet: of the machine's memory too, where all workers plan with the same."""
    from manylora.sweeps.room import Room, room_for

    config, workers = task.config, task.num_workers
    sweep = config.sweep
    assert sweep is not None
    if stock.base.device.type == "cuda":  # a device of its own
        asked = sweep.concurrent if sweep.concurrent == "auto" else math.ceil(sweep.concurrent / workers)
        own = config.model_copy(update={"sweep": sweep.model_copy(update={"concurrent": asked})})
        return room_for(own, stock, task.likely, math.ceil(task.num_trials / workers))
    whole = room_for(config, stock, task.likely, task.num_trials)
    resident = None if whole.resident_bytes is None else whole.resident_bytes // workers
    num_slots = math.ceil(whole.num_slots / workers)
    reason = whole.reason if workers == 1 else f"{num_slots} slots, one of {workers} parts of a fleet: {whole.reason}"
    return Room(num_slots, math.ceil(whole.budget_tokens / workers), resident, reason)
