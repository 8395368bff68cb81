"""One optimiser step for all members at once: forward, backward, clip, update, each member by its own rules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from manylora.base.frozen import FrozenModel
from manylora.data.collate import batch_of
from manylora.errors import OutOfMemory
from manylora.training.member import Member
from manylora.training.optim.stacked import StackedOptimizer, drop_gradients, gradient_norms
from manylora.types import Batch, Objective


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


@dataclass(frozen=True, slots=True)
class _Row:
    member: Member
    examples: list[Any]
    stream: int


def micro_batches(members: Sequence[Member], base: FrozenModel) -> list[Batch]:
    """The batches of the members' present steps: part k of every member's rows stands in batch k.

    A member's rows are cut into `accumulate` parts; batches have no say in what is computed, only in how much at once.
    """
    parts: list[list[_Row]] = []
    for member in members:
        rows = member.rows(member.step)
        streams = member.streams(member.step, len(rows))
        size = math.ceil(len(rows) / member.recipe.accumulate)
        for index, (examples, stream) in enumerate(zip(rows, streams, strict=True)):
            while index // size >= len(parts):
                parts.append([])
            parts[index // size].append(_Row(member, examples, stream))
    return [
        batch_of(
            [row.examples for row in part],
            base,
            width=max(row.member.epochs.row_tokens for row in part),
            slots=[row.member.slot for row in part],
            streams=[row.stream for row in part],
        )
        for part in parts
    ]


def backward(base: FrozenModel, objective: Objective, batches: Sequence[Batch], slots: Sequence[int]) -> list[float]:
    """Add the gradients of the batches to the bank's factors; the summed loss of each slot over its summed weight.

    Each slot's denominator is the weight of its own rows over all batches, known before the first forward: so any
    split of the rows gives the same gradients, and neighbours share nothing.
    """
    place = {slot: index for index, slot in enumerate(slots)}
    weights = [objective.weight(batch) for batch in batches]
    sums = torch.zeros(len(slots), dtype=torch.float64)
    for batch, weight in zip(batches, weights, strict=True):
        sums.index_add_(0, torch.tensor([place[slot] for slot in batch.slots]), weight.double().cpu())
    losses = torch.zeros(len(slots), dtype=torch.float64, device=base.device)
    for batch in batches:
        held = batch.to(base.device)
        index = torch.tensor([place[slot] for slot in batch.slots], device=base.device)
        with base.bank.route(batch.slots, batch.streams):
            totals = objective(base.outputs(held), held).total
        share = (1.0 / sums.clamp(min=1e-300)).to(base.device)[index].to(totals.dtype)
        (totals * share).sum().backward()
        losses.index_add_(0, index, totals.detach().double())
    return (losses.cpu() / sums).tolist()


def train_step(
    base: FrozenModel, objective: Objective, optimizers: Mapping[str, StackedOptimizer], members: Sequence[Member]
) -> dict[str, StepResult]:
    """One step of every member given, each by the optimiser its recipe names.

    A member whose loss or gradient is not finite is not updated.

    Raises:
        OutOfMemory: the machine does not hold the step.
    """
    batches = micro_batches(members, base)
    slots = [member.slot for member in members]
    try:
        losses = backward(base, objective, batches, slots)
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
    results: dict[str, StepResult] = {}
    for member, loss in zip(members, losses, strict=True):
        rows = [(b, r) for b in batches for r, slot in enumerate(b.slots) if slot == member.slot]
        trained = sum(int(b.targets["labels"][r].ge(0).sum()) for b, r in rows)
        computed = sum(b.targets["labels"][r].numel() for b, r in rows)
        results[member.name] = StepResult(loss, norms[member.slot], trained, computed)
    for name, optimizer in optimizers.items():
        chosen = [member for member in members if member.recipe.optimizer == name and results[member.name].finite]
        optimizer.step({member.slot: member.update() for member in chosen}, norms)
    drop_gradients(base.bank)
    return results


def _is_out_of_memory(error: BaseException) -> bool:
    # torch's CPU allocator raises a plain RuntimeError; the accelerators' a RuntimeError of their own kind.
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or "can't allocate memory" in str(error) or "not enough memory" in str(error)
