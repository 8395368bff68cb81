"""One optimiser step for all members at once: forward, backward, clip, update, each member by its own rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from manylora.adapters.bank import Bank
from manylora.base.frozen import FrozenModel
from manylora.data.collate import batch_of
from manylora.data.example import Example
from manylora.data.packing import WIDTH_STEP, row_width
from manylora.data.store import lengths_of
from manylora.errors import OutOfMemory
from manylora.memory.refused import first_line, give_back, is_out_of_memory
from manylora.objectives.forward import Aim, SlotSums, forward_batch
from manylora.training.deal import Step, deal
from manylora.training.member import Member
from manylora.training.optim.stacked import StackedOptimizer, drop_gradients, gradient_norms
from manylora.types import Batch


@dataclass(frozen=True, slots=True)
class StepResult:
    """A member's step: mean loss per unit of weight, gradient norm before clipping, trained and computed tokens."""

    loss: float
    gradient_norm: float
    trained_tokens: int
    computed_tokens: int

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


class ForwardTooLarge(OutOfMemory):
    """The memory does not hold the forward or backward of a batch; nothing of its step is left.

    `half_tokens` is the budget under which a batch has half as many such rows.
    """

    def __init__(self, reason: str, batch: Batch):
        rows, width = batch.num_rows, max(batch.costs)
        of = f"of {width} tokens" if width > 1 else "of the batch"
        super().__init__(f"the memory does not hold {rows} row{'s' if rows > 1 else ''} {of} at once: {reason}")
        self.rows = rows
        self.tokens = rows * width
        self.half_tokens = rows // 2 * row_width(width, width + WIDTH_STEP)


def micro_batches(members: Sequence[Member], base: FrozenModel, budget_tokens: int | None = None) -> list[Batch]:
    """The batches of the members' present steps, as `plan.deal` shares out their rows.

    Batches have no say in what is computed, only in how much at once: at most `budget_tokens` (None: any number).
    """
    return _dealt(members, [member.rows(member.step) for member in members], base, budget_tokens)


def widest_batch(members: Sequence[Member], base: FrozenModel, budget_tokens: int | None = None) -> Batch:
    """The largest batch that steps of these members can come to: as many rows as a step has, all like the longest."""
    rows = [[widest_row(member)[0]] * member.recipe.rows_per_step for member in members]
    return max(_dealt(members, rows, base, budget_tokens), key=lambda batch: sum(batch.costs))


def widest_row(member: Member) -> tuple[list[Example], int]:
    """The longest row of a member's first epoch, and its tokens once padded."""
    epochs = member.epochs
    lengths, plan = lengths_of(epochs.examples), epochs.rows(0)
    totals = np.add.reduceat(lengths[plan.items], plan.starts)
    longest = int(totals.argmax())
    return [epochs.examples[index] for index in plan[longest]], row_width(int(totals[longest]), epochs.row_tokens)


def _dealt(
    members: Sequence[Member], rows: Sequence[list[list[Example]]], base: FrozenModel, budget_tokens: int | None
) -> list[Batch]:
    """Rows of examples that make batches alike, and of heads as wide, are dealt together."""
    streams = [member.streams(member.step, len(own)) for member, own in zip(members, rows, strict=True)]
    steps = [
        Step(tuple(row_width(sum(map(len, row)), member.epochs.row_tokens) for row in own), member.recipe.accumulate)
        for member, own in zip(members, rows, strict=True)
    ]
    alike: dict[Any, list[int]] = {}
    for which, (member, own) in enumerate(zip(members, rows, strict=True)):
        widths = base.bank.widths(member.slot) if base.lacking else ()
        alike.setdefault((type(own[0][0]), widths), []).append(which)
    return [
        batch_of(
            [rows[group[place]][row] for place, row in part],
            base,
            width=max(members[group[place]].epochs.row_tokens for place, _ in part),
            slots=[members[group[place]].slot for place, _ in part],
            streams=[streams[group[place]][row] for place, row in part],
        )
        for group in alike.values()
        for part in deal([steps[which] for which in group], budget_tokens)
    ]


def backward(base: FrozenModel, aims: Mapping[int, Aim], batches: Sequence[Batch]) -> SlotSums:
    """Add the gradients of the batches to the bank's factors; the sums of losses and of what was observed, by slot.

    `aims` are those of the slots. Each slot's denominator is the weight of its own rows over all batches, known before
    the first forward: so any split of the rows gives the same gradients, and neighbours share nothing.

    Raises:
        ForwardTooLarge: the memory does not hold one of the batches; all gradients are dropped.
    """
    sums = SlotSums(aims, base.device)
    for batch in batches:
        sums.weigh(batch)
    for batch in batches:
        failure = None
        try:
            add_gradients(base, batch, aims, sums)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failure = first_line(error)
        if failure is not None:
            # Only here: as long as the error is known, its frames hold all that the forward kept.
            drop_gradients(base.bank)
            give_back(base.device)
            raise ForwardTooLarge(failure, batch)
    return sums


def add_gradients(base: FrozenModel, batch: Batch, aims: Mapping[int, Aim], sums: SlotSums) -> None:
    """Forward and backward of one batch, each row's total times its share of its slot; its totals go to `sums`."""
    parts = forward_batch(base, batch, aims)
    shares = sums.shares(batch)
    scaled = [
        (part.totals.total * shares[list(part.rows)].to(base.device, part.totals.total.dtype)).sum() for part in parts
    ]
    sum(scaled[1:], scaled[0]).backward()
    sums.add(batch, parts)


def probe_step(base: FrozenModel, members: Sequence[Member], budget_tokens: int | None = None) -> None:
    """Run the largest batch that steps of these members can come to, and drop its gradients.

    Raises:
        ForwardTooLarge: the memory does not hold it.
    """
    batch = widest_batch(members, base, budget_tokens)
    backward(base, {member.slot: member.aim() for member in members if member.slot in batch.slots}, [batch])
    drop_gradients(base.bank)


AddUp = Callable[[Bank], None]
"""What happens to the gradients between the last backward of a step and their norms: several devices add theirs up."""


def on_one_device(bank: Bank) -> None:
    """One device has the whole gradient already."""


def train_step(
    base: FrozenModel,
    optimizers: Mapping[str, StackedOptimizer],
    members: Sequence[Member],
    budget_tokens: int | None = None,
    *,
    add_up: AddUp = on_one_device,
) -> dict[str, StepResult]:
    """One step of every member given, each by its own objective and by the optimiser its recipe names.

    A member whose loss or gradient is not finite is not updated, and neither are its followers and its objective's
    state.

    Raises:
        ForwardTooLarge: the memory does not hold one of its forwards; nothing is changed.
    """
    batches = micro_batches(members, base, budget_tokens)
    sums = backward(base, {member.slot: member.aim() for member in members}, batches)
    add_up(base.bank)
    norms = gradient_norms(base.bank)
    trained, computed = dict.fromkeys((m.slot for m in members), 0), dict.fromkeys((m.slot for m in members), 0)
    for batch in batches:
        for slot, count, cost in zip(batch.slots, batch.num_trained, batch.costs, strict=True):
            trained[slot] += count
            computed[slot] += cost
    losses = sums.losses()
    results = {
        member.name: StepResult(losses[member.slot], norms[member.slot], trained[member.slot], computed[member.slot])
        for member in members
    }
    stepping = [member for member in members if results[member.name].finite]
    for name, optimizer in optimizers.items():
        chosen = [member for member in stepping if member.recipe.optimizer.name == name]
        optimizer.step({member.slot: member.update() for member in chosen}, norms)
    drop_gradients(base.bank)
    for member in stepping:
        for name, follower in member.objective.followers.items():
            base.bank.follow(member.slot, member.follower_slots[name], follower.decay)
        member.learn(sums.observed(member.slot))
    return results
