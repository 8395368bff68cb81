"""One optimiser step for all members at once: forward, backward, clip, update, each member by its own rules."""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from manylora.base.frozen import FrozenModel
from manylora.data.collate import batch_of
from manylora.data.example import Example
from manylora.data.packing import WIDTH_STEP, row_width
from manylora.data.store import lengths_of
from manylora.errors import OutOfMemory
from manylora.ops.allocator import give_back_freed
from manylora.training.member import Member
from manylora.training.optim.stacked import StackedOptimizer, drop_gradients, gradient_norms
from manylora.training.plan import Step, deal
from manylora.types import IGNORED, Batch, Objective


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
        rows, width = batch.num_rows, batch.targets["labels"][0].numel()
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
    return max(_dealt(members, rows, base, budget_tokens), key=lambda batch: batch.targets["labels"].numel())


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
    streams = [member.streams(member.step, len(own)) for member, own in zip(members, rows, strict=True)]
    steps = [
        Step(tuple(row_width(sum(map(len, row)), member.epochs.row_tokens) for row in own), member.recipe.accumulate)
        for member, own in zip(members, rows, strict=True)
    ]
    return [
        batch_of(
            [rows[which][row] for which, row in part],
            base,
            width=max(members[which].epochs.row_tokens for which, _ in part),
            slots=[members[which].slot for which, _ in part],
            streams=[streams[which][row] for which, row in part],
        )
        for part in deal(steps, budget_tokens)
    ]


def backward(base: FrozenModel, objectives: Mapping[int, Objective], batches: Sequence[Batch]) -> dict[int, float]:
    """Add the gradients of the batches to the bank's factors; by slot, the summed loss over the summed weight.

    `objectives` are those of the slots. Each slot's denominator is the weight of its own rows over all batches, known
    before the first forward: so any split of the rows gives the same gradients, and neighbours share nothing.
    """
    place = {slot: index for index, slot in enumerate(objectives)}
    parts = [_by_objective(objectives, batch) for batch in batches]
    sums = torch.zeros(len(place), dtype=torch.float64)
    for batch, part in zip(batches, parts, strict=True):
        index = torch.tensor([place[slot] for slot in batch.slots])
        for objective, own in part:
            sums.index_add_(0, index, objective.weight(own).double().cpu())
    losses = torch.zeros(len(place), dtype=torch.float64, device=base.device)
    for batch, part in zip(batches, parts, strict=True):
        index = torch.tensor([place[slot] for slot in batch.slots])
        failure = None
        try:
            totals = _added(base, batch, part, 1.0 / sums.clamp(min=1e-300)[index])
            losses.index_add_(0, index.to(base.device), totals.double())
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failure = (str(error) or type(error).__name__).splitlines()[0]
        if failure is not None:
            # Only here: as long as the error is known, its frames hold all that the forward kept.
            drop_gradients(base.bank)
            _give_back(base.device)
            raise ForwardTooLarge(failure, batch)
    means = (losses.cpu() / sums).tolist()
    return {slot: means[index] for slot, index in place.items()}


def _added(
    base: FrozenModel, batch: Batch, part: Sequence[tuple[Objective, Batch]], shares: torch.Tensor
) -> torch.Tensor:
    """Forward and backward of a batch, each row's loss times its share; the losses (rows,)."""
    with base.bank.route(batch.slots, batch.streams):
        outputs = base.outputs(batch.to(base.device))
        totals = sum(objective(outputs, own.to(base.device)).total for objective, own in part)
    assert isinstance(totals, torch.Tensor)
    (totals * shares.to(base.device, totals.dtype)).sum().backward()
    return totals.detach()


def probe_step(base: FrozenModel, members: Sequence[Member], budget_tokens: int | None = None) -> None:
    """Run the largest batch that steps of these members can come to, and drop its gradients.

    Raises:
        ForwardTooLarge: the memory does not hold it.
    """
    batch = widest_batch(members, base, budget_tokens)
    backward(base, {member.slot: member.objective for member in members if member.slot in batch.slots}, [batch])
    drop_gradients(base.bank)


def _by_objective(objectives: Mapping[int, Objective], batch: Batch) -> list[tuple[Objective, Batch]]:
    """Each objective of a batch with the batch in which only the rows of its own slots supervise anything."""
    of_rows = [objectives[slot] for slot in batch.slots]
    distinct = list(dict.fromkeys(of_rows))
    if len(distinct) == 1:
        return [(distinct[0], batch)]
    labels = batch.targets["labels"]
    found = []
    for objective in distinct:
        others = torch.tensor([one is not objective for one in of_rows]).view(-1, *(1,) * (labels.dim() - 1))
        own = {**batch.targets, "labels": labels.masked_fill(others, IGNORED)}
        found.append((objective, replace(batch, targets=own)))
    return found


def train_step(
    base: FrozenModel,
    optimizers: Mapping[str, StackedOptimizer],
    members: Sequence[Member],
    budget_tokens: int | None = None,
) -> dict[str, StepResult]:
    """One step of every member given, each by its own objective and by the optimiser its recipe names.

    A member whose loss or gradient is not finite is not updated.

    Raises:
        ForwardTooLarge: the memory does not hold one of its forwards; nothing is changed.
    """
    batches = micro_batches(members, base, budget_tokens)
    losses = backward(base, {member.slot: member.objective for member in members}, batches)
    norms = gradient_norms(base.bank)
    trained, computed = dict.fromkeys(losses, 0), dict.fromkeys(losses, 0)
    for batch in batches:
        labels = batch.targets["labels"]
        counts = labels.ge(0).view(len(labels), -1).sum(dim=1).tolist()
        for slot, count in zip(batch.slots, counts, strict=True):
            trained[slot] += count
            computed[slot] += labels[0].numel()
    results = {
        member.name: StepResult(losses[member.slot], norms[member.slot], trained[member.slot], computed[member.slot])
        for member in members
    }
    for name, optimizer in optimizers.items():
        chosen = [member for member in members if member.recipe.optimizer == name and results[member.name].finite]
        optimizer.step({member.slot: member.update() for member in chosen}, norms)
    drop_gradients(base.bank)
    return results


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    # torch's CPU allocator raises a plain RuntimeError; the accelerators' a RuntimeError of their own kind.
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or "can't allocate memory" in str(error) or "not enough memory" in str(error)


def _give_back(device: torch.device) -> None:
    """Free what a failed forward has left behind, cycles of its graph among it."""
    gc.collect()
    give_back_freed()
    if device.type == "cuda":
        torch.cuda.empty_cache()
