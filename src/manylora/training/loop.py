"""The one loop: it admits members to free slots, steps all that run, evaluates, keeps the best and writes checkpoints.

Members come from a source, which also judges them: one job, or a search that stops the weak. What ends is handed over
at once and its slot is free for the next.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.errors import NonFiniteLoss, RouteError, UserError
from manylora.evaluation.evaluate import evaluate_losses
from manylora.memory.allocator import give_back_freed
from manylora.memory.device import peak_bytes
from manylora.spec import AdapterSpec
from manylora.training.at_once import AtOnce
from manylora.training.checkpoint import Checkpoints, Kept
from manylora.training.checkpointing import Checkpointing
from manylora.training.deal import admissible
from manylora.training.footprint import member_bytes
from manylora.training.member import Member, State, follower_start, kept_spec, tokens_of
from manylora.training.optim import OPTIMIZERS
from manylora.training.optim.stacked import WATCHED_STEPS, StackedOptimizer
from manylora.training.orders import Ending, Report, Source, Verdict
from manylora.training.step import AddUp, ForwardTooLarge, StepResult, on_one_device
from manylora.types import Factors


class Recorder(Protocol):
    """Where the loop says what happens: events on disk, curves, the terminal."""

    def event(self, name: str, **fields: Any) -> None: ...

    def note(self, text: str) -> None: ...

    def stage(self, text: str) -> None: ...


Make = Callable[[str, AdapterSpec | None], tuple[Member, Adapter]]
"""A member and its fresh adapter, by name; the same at every call. A specification is given where a checkpoint has the
adapter's numbers: then only its shape is wanted (`Stock.member`)."""
Hand = Callable[[Member, Adapter], None]
"""Called with every member that ends, and the adapter that is its result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSettings:
    """`checkpoint_every` counts ticks (None: only at the end); `select` is `eval_loss` or `last`.

    `budget_tokens` bounds what one forward computes, None: as much as the members' own settings allow; `resident_bytes`
    what all members in slots hold together, None: only the slots bound them. `strengthens`: where one row alone is too
    much, layers may be computed again; `probes`: the largest batch is tried before the first step.
    """

    checkpoint_every: int | None = 100
    select: str = "eval_loss"
    budget_tokens: int | None = None
    resident_bytes: int | None = None
    strengthens: bool = False
    probes: bool = False


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A member on its way into a slot: its adapter, what was kept of it where it waited, and the event's name."""

    member: Member
    adapter: Adapter
    kept: Kept | None
    event: str
    bytes: int


class Loop:
    """Trains the members of a source over one base, all running ones in one forward and backward: a tick.

    It puts them into the `slots` of the bank that it is given, and leaves all other slots alone.
    """

    def __init__(
        self,
        bank: Bank,
        slots: Sequence[int],
        source: Source,
        make: Make,
        recorder: Recorder,
        *,
        checkpoints: Checkpoints | None = None,
        settings: LoopSettings | None = None,
        hand: Hand | None = None,
        checkpointing: Checkpointing | None = None,
        add_up: AddUp = on_one_device,
    ):
        self.base = bank.base
        self.bank = bank
        self.slots = tuple(slots)
        self.source = source
        self.make = make
        self.recorder = recorder
        self.checkpoints = checkpoints
        self.settings = settings or LoopSettings()
        self.at_once = AtOnce(
            self.base,
            self.settings.budget_tokens,
            checkpointing,
            self._shrunk,
            strengthens=self.settings.strengthens,
            add_up=add_up,
        )
        self.hand = hand or (lambda member, adapter: None)
        self.members: dict[str, Member] = {}
        self.waiting: dict[str, int] = {}
        self.ended: dict[str, dict[str, Any]] = {}
        self._bare: dict[str, Adapter] = {}
        self._arriving: _Arrival | None = None
        self._bytes: dict[str, int] = {}
        self.optimizers: dict[str, StackedOptimizer] = {}
        self.best: dict[str, Mapping[str, Factors]] = {}
        self.tick = 0
        self.saved_at: int | None = None
        self.tokens_before = 0
        """What its members had trained when it was resumed."""

    @property
    def running(self) -> list[Member]:
        """The members that take a step in the next tick, in the order of their slots."""
        running = (m for m in self.members.values() if m.state == "running" and m.slot != -1)
        return sorted(running, key=lambda member: member.slot)

    def resume(self) -> int | None:
        """Continue from the last checkpoint: its tick, None where there is none.

        Raises:
            CheckpointBroken: a file of it is missing or damaged.
        """
        found = self.checkpoints.read() if self.checkpoints else None
        if found is None:
            return None
        self.source.restore(found.source)
        self.at_once.restore(found.memory)
        self.waiting, self.ended = dict(found.waiting), dict(found.ended)
        for name, progress in found.running.items():
            member, adapter = self._made(name, progress)
            kept = found.tensors(name)
            self._enter(member, replace(adapter, factors=kept.now), kept)
        if found.arriving is not None:
            event, name, step = found.arriving
            self.waiting |= {name: step} if event == "continued" else {}
            self._arriving = self._arrival(event, name)
        self.tokens_before = sum(one["tokens"] for one in (*found.running.values(), *found.ended.values()))
        self.tick = self.saved_at = found.tick
        return self.tick

    def run(self, interrupted: Callable[[], bool] = lambda: False) -> None:
        """Train until every member has ended.

        `interrupted` is asked after each tick; once it says true, a checkpoint is written and KeyboardInterrupt raised.

        Raises:
            NonFiniteLoss: every member was retired. OutOfMemory: the machine does not hold a step.
        """
        self._take_orders()
        if self.settings.probes:
            self.at_once.probe(self.running)
        while running := self.running:
            started = time.perf_counter()
            results = self.at_once.step(self.optimizers, running)
            seconds = time.perf_counter() - started
            self.tick += 1
            for member in running:
                self._after_step(member, results[member.name], seconds)
            self._evaluate([member for member in running if member.state == "running"])
            for member in running:
                if member.state == "running" and member.step >= member.recipe.last_step:
                    cut = member.step < member.recipe.total_steps
                    self._end(member, "stopped" if cut else "done", "train.stop_after" if cut else "")
            self._take_orders()
            every = self.settings.checkpoint_every
            if every is not None and self.tick % every == 0:
                self.save()
            if interrupted():
                self.save()
                raise KeyboardInterrupt
        self.save()
        if self.ended and all(progress["state"] == "retired" for progress in self.ended.values()):
            name, progress = next(iter(self.ended.items()))
            raise NonFiniteLoss(
                f"every member was retired; {name}: {progress['reason']}",
                next_step="lower train.learning_rate, set train.clip_norm, or look at the rows of that step",
            )

    def save(self) -> None:
        """Write a checkpoint of the present tick, unless it lies there already."""
        if self.checkpoints is not None and self.saved_at != self.tick:
            running = {member.name: (member.progress(), self._kept(member)) for member in self.running}
            coming = self._arriving
            arriving = None if coming is None else (coming.event, coming.member.name, coming.member.step)
            state = self.source.state()
            self.checkpoints.save(self.tick, running, self.waiting, self.ended, state, arriving, self.at_once.state())
            self.saved_at = self.tick
            self._event("checkpoint", step=self.tick)

    def _shrunk(self, error: ForwardTooLarge, done: str) -> None:
        """Less is computed at once from now on: a run that resumes must compute the same steps in the same forwards."""
        self.recorder.note(f"{error.what}; from now on {done}")
        self._event("out_of_memory", rows=error.rows, tokens=error.tokens, **self.at_once.state())
        self.saved_at = None
        self.save()

    # -- members come and go -------------------------------------------------------------------------------------------

    def _take_orders(self) -> None:
        """Do what the source says until it has nothing more to say now, or the next member has no room yet."""
        admitted = False
        while True:
            if self._arriving is not None and self.settings.resident_bytes is not None:
                self._empty_left_slots()
            if self._arriving is not None and self._has_room(self._arriving):
                self._admit(self._arriving)
                admitted = True
            free = self._arriving is None and bool(self._free_slots())
            order = self.source.next(free=free, idle=not self.running and self._arriving is None)
            if order is None:
                if admitted:
                    give_back_freed()  # what stacks left behind when they grew fits nothing that comes after
                return
            if order.action == "dismiss":
                member, kept = self._unparked(order.member)
                self._end(member, "stopped", order.reason, kept)
                continue
            try:
                self._arriving = self._arrival("admitted" if order.action == "start" else "continued", order.member)
            except UserError as error:
                if not self.source.failed(order.member, error.what):
                    raise
                self.recorder.event("failed", member=order.member, step=0, reason=error.what, tick=self.tick)
                self.recorder.note(f"{order.member} cannot be trained: {error.what}")

    def _arrival(self, event: str, name: str) -> _Arrival:
        if event == "admitted":
            member, adapter = self._made(name)
            kept = None
        else:
            member, kept = self._unparked(name)
            adapter = replace(self._bare[name], factors=kept.now)
            member.state, member.reason = "running", ""
        if member.num_slots > len(self.slots):
            raise RouteError(
                f"{name} takes {member.num_slots} slots, its own and those of its objective's followers",
                allowed=f"the {len(self.slots)} that this loop may use",
                next_step="give the bank more slots",
            )
        return _Arrival(member, adapter, kept, event, self._bytes_of(member, adapter))

    def _bytes_of(self, member: Member, adapter: Adapter) -> int:
        return member_bytes(self.base, adapter, member.recipe.optimizer, copies=member.num_slots)

    def _has_room(self, arrival: _Arrival) -> bool:
        if len(self._free_slots()) < arrival.member.num_slots:
            return False
        budget = self.settings.resident_bytes
        if budget is None:
            return True
        held = sum(self._bytes[member.name] for member in self.running)
        return admissible([arrival.bytes], budget - held, free_slots=1, resident=len(self.running)) == 1

    def _empty_left_slots(self) -> None:
        """Give back what slots still hold of members that have left: only those that run are counted."""
        for member in self.members.values():
            if member.slot != -1 and member.state != "running":
                for slot in (member.slot, *member.follower_slots.values()):
                    self.bank.clear(slot)
                member.sit(())

    def _made(self, name: str, progress: Mapping[str, Any] | None = None) -> tuple[Member, Adapter]:
        """A member at its start, or where its progress left it: then its adapter's numbers are those that were kept."""
        member, adapter = self.make(name, None if progress is None else kept_spec(progress))
        if progress is not None:
            member.restore(progress)
        self.members[name] = member
        self._bare[name] = replace(adapter, factors={})
        return member, adapter

    def _free_slots(self) -> list[int]:
        taken = {slot for member in self.running for slot in (member.slot, *member.follower_slots.values())}
        return [slot for slot in self.slots if slot not in taken]

    def _admit(self, arrival: _Arrival) -> None:
        self._arriving = None
        member = arrival.member
        slots = self._free_slots()[: member.num_slots]
        for other in self.members.values():
            if not {other.slot, *other.follower_slots.values()}.isdisjoint(slots):
                other.sit(())
        member.sit(slots)
        self._enter(member, arrival.adapter, arrival.kept)
        full = tokens_of(member.epochs, steps=member.recipe.total_steps, rows_per_step=member.recipe.rows_per_step)
        self._event(arrival.event, member, slot=member.slot, steps=member.recipe.last_step, full_tokens=full)
        self.source.started(member.name, full)

    def _enter(self, member: Member, adapter: Adapter, kept: Kept | None) -> None:
        """Put a member into its slot, with a fresh optimiser state or the one that was kept of it."""
        self.bank.put(adapter, slot=member.slot)
        for name, slot in member.follower_slots.items():
            follower = follower_start(member.objective.followers[name], adapter)
            follower = follower if kept is None else replace(follower, factors=kept.followers[name])
            self.bank.put(follower, slot=slot)
        self._bytes[member.name] = self._bytes_of(member, adapter)
        optimizer = self._optimizer(member)
        optimizer.reset(member.slot, member.recipe.optimizer)
        if kept is not None:
            optimizer.load_slot_state(member.slot, member.recipe.optimizer, kept.moments)
            member.objective_state = kept.learned or None
            if kept.best:
                self.best[member.name] = kept.best

    def _optimizer(self, member: Member) -> StackedOptimizer:
        name = member.recipe.optimizer.name
        if name not in self.optimizers:
            self.optimizers[name] = StackedOptimizer(self.bank, OPTIMIZERS.get(name))
        return self.optimizers[name]

    def _kept(self, member: Member) -> Kept:
        """All tensors that a member needs to go on."""
        return Kept(
            now=self.bank.get(member.slot).factors,
            moments=self._optimizer(member).slot_state(member.slot, member.recipe.optimizer),
            best=self.best.get(member.name, {}),
            followers={name: self.bank.get(slot).factors for name, slot in member.follower_slots.items()},
            learned=member.aim().state,
        )

    def _park(self, member: Member, reason: str) -> None:
        """A member leaves its slot until the source says more of it."""
        assert self.checkpoints is not None, "members can only wait where there are checkpoints"
        member.state, member.reason = "waiting", reason
        self.checkpoints.park(member.name, member.progress(), self._kept(member))
        self.waiting[member.name] = member.step
        self.best.pop(member.name, None)
        self._event("waiting", member, reason=reason)

    def _unparked(self, name: str) -> tuple[Member, Kept]:
        """A member that waited, here or in another loop, and what was kept of it when it left its slot."""
        assert self.checkpoints is not None, "members can only wait where there are checkpoints"
        progress, kept = self.checkpoints.unpark(name, self.waiting.pop(name, None))
        member = self.members[name] if name in self.members else self._made(name, progress)[0]
        member.restore(progress)
        member.sit(())
        return member, kept

    def _end(self, member: Member, state: State, reason: str = "", kept: Kept | None = None) -> None:
        """A member makes no step any more: hand over its best factors, or its last where none were evaluated."""
        member.state, member.reason = state, reason
        now, best = (kept.now, kept.best) if kept else (self.bank.get(member.slot).factors, self.best.get(member.name))
        self.best.pop(member.name, None)
        self.ended[member.name] = member.progress()
        self._event("retired" if state == "retired" else "done", member, reason=reason, state=state)
        self.hand(member, replace(self._bare[member.name], factors=best or now))
        self.source.ended(
            Ending(member.name, state, reason, member.tokens, member.result(self.settings.select), member.scores)
        )

    # -- after a step --------------------------------------------------------------------------------------------------

    def _after_step(self, member: Member, result: StepResult, seconds: float) -> None:
        if not result.finite:
            what = f"loss {result.loss}, gradient norm {result.gradient_norm}"
            self._end(member, "retired", f"{what} at step {member.step + 1}")
            self.recorder.note(f"{member.name} is retired: {member.reason}")
            return
        rate = member.rate(member.step)
        member.step += 1
        member.tokens += result.trained_tokens
        self._event(
            "step",
            member,
            loss=result.loss,
            learning_rate=rate,
            tokens=member.tokens,
            tokens_per_s=result.computed_tokens / seconds,
            gradient_norm=result.gradient_norm,
            memory_bytes=peak_bytes(self.base.device),
        )
        if member.step == WATCHED_STEPS:
            self._name_unreached(member)

    def _evaluate(self, members: Sequence[Member]) -> None:
        """Evaluate those that are due, keep their best, and ask the source about those that passed a level."""
        passed = [member for member in members if member.passes_level()]
        due = [member for member in members if member in passed or member.evaluates_after(member.step)]
        due = [member for member in due if member.eval_examples]
        groups: dict[tuple, list[Member]] = {}
        for member in due:
            key = (id(member.eval_examples), member.epochs.row_tokens, member.objective, self.bank.widths(member.slot))
            groups.setdefault(key, []).append(member)
        for group in groups.values():
            self._evaluate_group(group)
        reports = [
            Report(member.name, member.level - 1, member.tokens, math.nan if member.loss is None else member.loss)
            for member in passed
            if member.state == "running" and member.step < member.recipe.last_step
        ]
        verdicts = self.source.judge(reports) if reports else {}
        for report in reports:
            verdict = verdicts.get(report.member, Verdict("go"))
            if verdict.judgement == "wait":
                self._park(self.members[report.member], verdict.reason)
            elif verdict.judgement == "stop":
                self._end(self.members[report.member], "stopped", verdict.reason)

    def _evaluate_group(self, members: Sequence[Member]) -> None:
        """Members with the same held-out rows share the forwards of their evaluation."""
        first = members[0]
        row_tokens = first.epochs.row_tokens
        at_once = max(member.recipe.rows_per_step for member in members)
        budget = self.at_once.budget_tokens or at_once * row_tokens
        self.recorder.stage("evaluating")
        found = evaluate_losses(
            self.base,
            first.eval_examples,
            {member.slot: member.aim() for member in members},
            row_tokens=row_tokens,
            rows_per_batch=max(1, min(at_once, budget // (row_tokens * len(members)))),
        )
        for member, scores in zip(members, found, strict=True):
            self._event("eval", member, **{**scores, "tokens": member.tokens})
            self._after_eval(member, scores)

    def _after_eval(self, member: Member, scores: Mapping[str, float]) -> None:
        loss = scores["loss"]
        member.loss = loss if math.isfinite(loss) else None
        if loss < member.best_loss:
            member.best_loss, member.best_step, member.stale_evals = loss, member.step, 0
            chosen = {name: value for name, value in scores.items() if name not in ("loss", "tokens")}
            member.scores = {name: value for name, value in chosen.items() if math.isfinite(value)}
            if self.settings.select == "eval_loss":
                self.best[member.name] = self.bank.get(member.slot).factors
            return
        member.stale_evals += 1
        patience = member.recipe.patience
        if patience is not None and member.stale_evals >= patience and member.step < member.recipe.last_step:
            reason = f"eval loss has not fallen for {patience} evaluations; best {member.best_loss:.4f}"
            self._end(member, "stopped", reason)
            self.recorder.note(f"{member.name} stops early at step {member.step}: {reason}")

    def _name_unreached(self, member: Member) -> None:
        """After two steps every factor that the forward reaches has moved; say which sites have not."""
        still = []
        for stack, place in self.bank.places(member.slot):
            moments = self.optimizers[member.recipe.optimizer.name].moved(stack, place)
            if not all(moments.values()):
                still.append(stack.site.name)
        if still:
            share = f"{len(still)} of {len(self.bank.places(member.slot))}"
            self.recorder.note(f"{member.name}: {share} sites got no gradient in two steps: {', '.join(still[:8])}")
            self._event("unreached", member, sites=still)

    def _event(self, name: str, member: Member | None = None, **fields: Any) -> None:
        if member is not None:
            fields = {"member": member.name, "step": member.step, **fields}
        self.recorder.event(name, **fields, tick=self.tick)
