"""A member: one training job of a fleet, with its own data order, schedule, random streams and stopping rule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import Tensor

from manylora.adapters.adapter import Adapter
from manylora.data.batches import Epochs
from manylora.data.example import Example
from manylora.errors import ConfigError
from manylora.objectives.forward import Aim
from manylora.ops.dropout import mix
from manylora.spec import AdapterSpec
from manylora.training.optim.stacked import OptimizerSettings, SlotUpdate
from manylora.training.schedule import rate_at
from manylora.types import Follower, Objective

State = Literal["running", "waiting", "done", "stopped", "retired"]
"""`waiting`: judged, and neither let go on nor stopped yet; it has no slot then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a member is trained. Steps are optimiser steps; `warmup` and `total_steps` count them.

    `stop_after` steps the member stops, on a schedule that would go on. `evaluate_at` are counts of trained tokens:
    the held-out rows are due at the first step that reaches one.
    """

    learning_rate: float
    schedule: str
    total_steps: int
    warmup: int
    floor_ratio: float = 0.0
    rows_per_step: int = 4
    accumulate: int = 1
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(clip_norm=1.0))
    evaluate_every: int | None = None
    evaluate_at: tuple[int, ...] = ()
    patience: int | None = None
    stop_after: int | None = None

    @property
    def last_step(self) -> int:
        """The steps that are made: all of the schedule, or those before it is left."""
        return self.total_steps if self.stop_after is None else min(self.total_steps, self.stop_after)


@dataclass(slots=True, kw_only=True)
class Member:
    """One training job; `slot` is its place in the bank, -1 without one, `follower_slots` those of its followers.

    `objective_state` is what its objective has learned of it; None: it has made no step. Everything from `state` on is
    what a checkpoint keeps; `level` counts the places of `recipe.evaluate_at` that are passed, `loss` is the last one
    on the held-out rows, `scores` are the metrics of the best.
    """

    name: str
    seed: int
    spec: AdapterSpec
    recipe: Recipe
    epochs: Epochs
    objective: Objective
    eval_examples: Sequence[Example] = ()
    slot: int = -1
    follower_slots: dict[str, int] = field(default_factory=dict)
    objective_state: Mapping[str, Tensor] | None = None
    state: State = "running"
    reason: str = ""
    step: int = 0
    tokens: int = 0
    level: int = 0
    loss: float | None = None
    best_loss: float = math.inf
    best_step: int = 0
    stale_evals: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    _schedule_of_rows: list[int] = field(default_factory=list)

    @property
    def num_slots(self) -> int:
        """How many slots it takes: its own, and one for each follower of its objective."""
        return 1 + len(self.objective.followers)

    def sit(self, slots: Sequence[int]) -> None:
        """Take these slots, `num_slots` of them, its own first; none at all: it leaves them."""
        self.slot = slots[0] if slots else -1
        self.follower_slots = dict(zip(self.objective.followers, slots[1:], strict=True)) if slots else {}

    def aim(self) -> Aim:
        """What its rows are computed for at its present step."""
        if self.objective_state is None:
            self.objective_state = self.objective.begin()
        return Aim(self.objective, self.follower_slots, self.objective_state)

    def learn(self, observed: Mapping[str, Tensor]) -> None:
        """Let the objective learn from what it observed in all rows of a step."""
        self.objective_state = self.objective.update(self.aim().state, observed)

    def progress(self) -> dict[str, Any]:
        """What a checkpoint keeps beside factors and optimiser state."""
        values = {name: getattr(self, name) for name in KEPT} | {"spec": self.spec.to_dict()}
        return values | {"best_loss": None if math.isinf(self.best_loss) else self.best_loss}

    def restore(self, progress: Mapping[str, Any]) -> None:
        """Take up the progress that a checkpoint kept."""
        written = {"follower_slots": {}, **progress}  # checkpoints of 0.1.0 know no followers
        for name in KEPT:
            setattr(self, name, written[name])
        self.best_loss = math.inf if progress["best_loss"] is None else progress["best_loss"]

    def result(self, select: str) -> float | None:
        """The loss on the held-out rows of the state that is its result; None where it has none."""
        loss = self.best_loss if select == "eval_loss" else self.loss
        return None if loss is None or not math.isfinite(loss) or self.state == "retired" else loss

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        recipe = self.recipe
        return rate_at(
            step,
            schedule=recipe.schedule,
            total_steps=recipe.total_steps,
            warmup_steps=recipe.warmup,
            peak=recipe.learning_rate,
            floor=recipe.learning_rate * recipe.floor_ratio,
        )

    def update(self) -> SlotUpdate:
        """The settings of the present step's update."""
        return SlotUpdate(rate=self.rate(self.step), step=self.step + 1, optimizer=self.recipe.optimizer)

    def rows(self, step: int) -> list[list[Example]]:
        """The rows of a step, a pure function of (seed, step): neighbours and resuming change nothing.

        A step never crosses the end of an epoch, so an epoch's last step may have fewer rows.
        """
        epoch, inside = self.place(step)
        rows = self.epochs.rows(epoch)
        begin = inside * self.recipe.rows_per_step
        return [[self.epochs.examples[i] for i in row] for row in rows[begin : begin + self.recipe.rows_per_step]]

    def place(self, step: int) -> tuple[int, int]:
        """The epoch of a step, and which step of that epoch it is."""
        epoch = 0
        while True:
            if epoch == len(self._schedule_of_rows):
                self._schedule_of_rows.append(steps_of(self.epochs, epoch, self.recipe.rows_per_step))
            if step < self._schedule_of_rows[epoch]:
                return epoch, step
            step -= self._schedule_of_rows[epoch]
            epoch += 1

    def streams(self, step: int, count: int) -> list[int]:
        """The seed of each row's dropout, by the row's place in its step: splitting a step changes nothing."""
        return [mix(self.seed, step, row) for row in range(count)]

    def evaluates_after(self, step: int) -> bool:
        """Whether the held-out rows are due once `step` steps are done: by count, else at the end of every epoch."""
        if step >= self.recipe.last_step:
            return True
        if self.recipe.evaluate_every is not None:
            return step % self.recipe.evaluate_every == 0
        return self.place(step)[1] == 0

    def passes_level(self) -> bool:
        """Whether the tokens trained so far have reached the next of `recipe.evaluate_at`; counts it as passed."""
        passed = sum(1 for tokens in self.recipe.evaluate_at if tokens <= self.tokens)
        self.level, before = passed, self.level
        return passed > before


def follower_start(follower: Follower, start: Adapter) -> Adapter:
    """What a follower is before the first step: the adapter that it names, else what the member starts from.

    Raises:
        AdapterBroken: no adapter lies where it says.
    """
    return start if follower.adapter is None else Adapter.load(follower.adapter)


def kept_spec(progress: Mapping[str, Any]) -> AdapterSpec | None:
    """What the adapter of a member is, as its progress has it; None: it was written by 0.1.0, which left that out."""
    return AdapterSpec.from_dict(progress["spec"]) if "spec" in progress else None


KEPT = ("slot", "follower_slots", "state", "reason", "step", "tokens", "level", "loss", "best_loss", "best_step",
        "stale_evals", "scores")  # fmt: skip
"""What of a member is its progress."""


def steps_of(epochs: Epochs, epoch: int, rows_per_step: int) -> int:
    """Optimiser steps of one epoch."""
    return math.ceil(epochs.num_rows(epoch) / rows_per_step)


def total_steps(epochs: Epochs, *, num_epochs: float, rows_per_step: int) -> int:
    """Optimiser steps of a number of epochs, which need not be whole.

    Raises:
        ConfigError: not even one step.
    """
    whole = int(num_epochs)
    count = sum(steps_of(epochs, epoch, rows_per_step) for epoch in range(whole))
    if num_epochs > whole:
        count += math.ceil((num_epochs - whole) * steps_of(epochs, whole, rows_per_step))
    if count < 1:
        raise ConfigError(f"train.epochs {num_epochs} gives no step", allowed="more than 0")
    return count


def tokens_of(epochs: Epochs, *, steps: int, rows_per_step: int) -> int:
    """Trained tokens of the first `steps` optimiser steps."""
    total, epoch = 0, 0
    while steps > 0:
        inside = steps_of(epochs, epoch, rows_per_step)
        if steps >= inside:
            total += epochs.total_trained(epoch)
        else:
            total += int(epochs.trained(epoch)[: steps * rows_per_step].sum())
        steps -= inside
        epoch += 1
    return total


def steps_for(epochs: Epochs, *, tokens: int, rows_per_step: int) -> int:
    """The least number of optimiser steps that train at least so many tokens."""
    steps, epoch = 0, 0
    while True:
        of_rows = epochs.trained(epoch)
        by_step = np.add.reduceat(of_rows, np.arange(0, len(of_rows), rows_per_step))
        reached = np.cumsum(by_step)
        if reached[-1] >= tokens:
            return steps + int(np.searchsorted(reached, tokens)) + 1
        tokens -= int(reached[-1])
        steps += len(by_step)
        epoch += 1
