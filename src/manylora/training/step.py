"""One optimiser step for all members at once: forward, backward, clip, update, each member by its own rules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from manylora.base.frozen import FrozenModel
from manylora.data.collate import batch_of
from manylora.data.packing import row_width
from manylora.errors import OutOfMemory
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


def micro_batches(members: Sequence[Member], base: FrozenModel, budget_tokens: int | None = None) -> list[Batch]:
    """The batches of the members' present steps, as `plan.deal` shares out their rows.

    Batches have no say in what is computed, only in how much at once: at most `budget_tokens` (None: any number).
    """
    rows = [member.rows(member.step) for member in members]
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
        index = torch.tensor([place[slot] for slot in batch.slots], device=base.device)
        with base.bank.route(batch.slots, batch.streams):
            outputs = base.outputs(batch.to(base.device))
            totals = sum(objective(outputs, own.to(base.device)).total for objective, own in part)
        assert isinstance(totals, torch.Tensor)
        share = (1.0 / sums.clamp(min=1e-300)).to(base.device)[index].to(totals.dtype)
        (totals * share).sum().backward()
        losses.index_add_(0, index, totals.detach().double())
    means = (losses.cpu() / sums).tolist()
    return {slot: means[index] for slot, index in place.items()}


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
        OutOfMemory: the machine does not hold the step.
    """
    batches = micro_batches(members, base, budget_tokens)
    try:
        losses = backward(base, {member.slot: member.objective for member in members}, batches)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        drop_gradients(base.bank)
        raise OutOfMemory(
            f"the memory does not hold {sum(b.num_rows for b in batches)} rows in {len(batches)} micro-batches: "
            f"{(str(error) or type(error).__name__).splitlines()[0]}",
            next_step="raise train.accumulate (same result, less at once), or lower train.row_tokens",
        ) from error
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


def _is_out_of_memory(error: BaseException) -> bool:
    # torch's CPU allocator raises a plain RuntimeError; the accelerators' a RuntimeError of their own kind.
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or "can't allocate memory" in str(error) or "not enough memory" in str(error)
