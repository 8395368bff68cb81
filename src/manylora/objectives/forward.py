"""The one place where a batch is run and its rows are totalled: training, evaluation and plans all call it.

Rows of several objectives share a forward. Each objective is then given the outputs of its own rows, and may ask for
those of other adapters on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from manylora.adapters.route import route_rows
from manylora.errors import RouteError
from manylora.types import Batch, Objective, Outputs, RowTotals

if TYPE_CHECKING:
    from manylora.base.frozen import FrozenModel


@dataclass(frozen=True, slots=True, eq=False)
class Aim:
    """What the rows of a slot are computed for: an objective, the slots of its followers, and its state by now."""

    objective: Objective
    followers: Mapping[str, int] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def fresh(cls, objective: Objective, follower_slot: int = -1) -> Aim:
        """The aim of a slot whose member has made no step; all followers are in one slot, -1: the bare base."""
        return cls(objective, dict.fromkeys(objective.followers, follower_slot), objective.begin())


@dataclass(frozen=True, slots=True)
class Part:
    """The totals of the rows of a batch that share an objective and its state; `rows` are their places in the batch."""

    rows: tuple[int, ...]
    totals: RowTotals


def forward_batch(base: FrozenModel, batch: Batch, aims: Mapping[int, Aim]) -> list[Part]:
    """Run a batch once, and total each of its rows by the aim of its slot; every row is in one part.

    The batch is moved to the base's device. Gradients flow to the slots' factors where they are enabled.

    Raises:
        RouteError: a slot without a bank, or without an aim.
    """
    batch = batch.to(base.device)
    with route_rows(base, batch.slots, batch.streams):
        outputs = base.outputs(batch)
        parts = []
        for rows in rows_by_aim(batch, aims):
            chosen = batch.take(rows)
            beside = _Beside(base, {slot: aims[slot] for slot in chosen.slots})
            parts.append(Part(rows, aims[chosen.slots[0]].objective(outputs.take(rows), chosen, beside)))
    return parts


def rows_by_aim(batch: Batch, aims: Mapping[int, Aim]) -> list[tuple[int, ...]]:
    """Rows for which an objective is called once: those of one objective, of one member only where it has a state."""
    groups: dict[Any, list[int]] = {}
    for row, slot in enumerate(batch.slots):
        if slot not in aims:
            raise RouteError(f"row {row} belongs to slot {slot}, which has no aim")
        aim = aims[slot]
        groups.setdefault((aim.objective, slot if aim.state else None), []).append(row)
    return [tuple(rows) for rows in groups.values()]


class _Beside:
    """What an objective may ask for beside the outputs of its rows, run when it asks."""

    def __init__(self, base: FrozenModel, aims: Mapping[int, Aim]):
        self._base = base
        self._aims = aims

    @property
    def state(self) -> Mapping[str, Tensor]:
        return next(iter(self._aims.values())).state

    def outputs(self, batch: Batch, who: str = "base") -> Outputs:
        if who == "own":
            with route_rows(self._base, batch.slots, batch.streams):
                return self._base.outputs(batch)
        slots = [-1 if who == "base" else self._follower(slot, who) for slot in batch.slots]
        with torch.no_grad(), route_rows(self._base, slots):
            return self._base.outputs(batch)

    def _follower(self, slot: int, name: str) -> int:
        followers = self._aims[slot].followers
        if name not in followers:
            raise RouteError(
                f"{type(self._aims[slot].objective).__name__} asks for the follower {name!r}",
                allowed=", ".join(["own", "base", *followers]),
                next_step="name it in the objective's `followers`",
            )
        return followers[name]


class SlotSums:
    """Sums over batches by slot: weights, losses, metrics, and what objectives observe; float64, on one device.

    Semantics: the loss of a slot is the sum of its rows' totals over the sum of their weights, whatever the batches.
    """

    def __init__(self, aims: Mapping[int, Aim], device: torch.device):
        self._aims = aims
        self._place = {slot: index for index, slot in enumerate(aims)}
        self._device = device
        self.weights = torch.zeros(len(aims), dtype=torch.float64)
        self._losses = torch.zeros(len(aims), dtype=torch.float64, device=device)
        self._metrics: dict[str, Tensor] = {}
        self._observed: dict[tuple[int, str], Tensor] = {}

    def weigh(self, batch: Batch) -> None:
        """Count the rows of a batch, which need not have been run: their weight is known from the data."""
        for rows in rows_by_aim(batch, self._aims):
            chosen = batch.take(rows)
            weight = self._aims[chosen.slots[0]].objective.weight(chosen)
            self.weights.index_add_(0, self._index(batch, rows), weight.double().cpu())

    def shares(self, batch: Batch) -> Tensor:
        """(rows,) float64, on the CPU: one over the weight of each row's slot, by which its total is multiplied."""
        return 1.0 / self.weights.clamp(min=1e-300)[self._index(batch, range(batch.num_rows))]

    def add(self, batch: Batch, parts: Sequence[Part]) -> None:
        """Add the totals of a batch that was run."""
        for part in parts:
            index = self._index(batch, part.rows).to(self._device)
            self._losses.index_add_(0, index, part.totals.total.detach().double())
            for name, values in part.totals.metrics.items():
                if name not in self._metrics:
                    self._metrics[name] = torch.zeros_like(self._losses)
                self._metrics[name].index_add_(0, index, values.detach().double())
            for name, values in part.totals.observed.items():
                self._observe(name, [batch.slots[row] for row in part.rows], values.detach().double())

    def _observe(self, name: str, slots: Sequence[int], values: Tensor) -> None:
        for slot in dict.fromkeys(slots):
            rows = torch.tensor([row for row, other in enumerate(slots) if other == slot], device=values.device)
            total = values[rows].sum(dim=0)
            before = self._observed.get((slot, name))
            self._observed[slot, name] = total if before is None else before + total

    def loss(self, slot: int) -> float:
        """The mean loss of a slot per unit of weight; NaN without any weight."""
        return self.losses()[slot]

    def losses(self) -> dict[int, float]:
        """The mean losses of all slots per unit of weight; NaN without any weight."""
        means = (self._losses.cpu() / self.weights).tolist()
        return {slot: means[index] for slot, index in self._place.items()}

    def metrics(self, slot: int) -> dict[str, float]:
        """A slot's metrics per unit of weight."""
        weight = float(self.weights[self._place[slot]])
        return {name: float(sums[self._place[slot]]) / weight for name, sums in self._metrics.items()}

    def weight(self, slot: int) -> float:
        """The weight of all of a slot's rows."""
        return float(self.weights[self._place[slot]])

    def observed(self, slot: int) -> dict[str, Tensor]:
        """What a slot's objective observed in all rows."""
        return {name: value for (owner, name), value in self._observed.items() if owner == slot}

    def _index(self, batch: Batch, rows: Sequence[int]) -> Tensor:
        return torch.tensor([self._place[batch.slots[row]] for row in rows], dtype=torch.int64)
