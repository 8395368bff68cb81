"""How much of a step is computed at once: as much as memory holds, and from when it refuses a forward, less."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from manylora.base.frozen import FrozenModel
from manylora.errors import OutOfMemory
from manylora.training.checkpointing import Checkpointing
from manylora.training.member import Member
from manylora.training.optim.stacked import StackedOptimizer
from manylora.training.step import AddUp, ForwardTooLarge, StepResult, on_one_device, probe_step, train_step


class AtOnce:
    """The tokens of a forward (None: as many as the members' own settings allow) and what layers keep; both shrink.

    `shrunk` is called with what was too large and with what is done about it, whenever less is computed from then on.
    `strengthens`: where one row alone is too much, layers may be computed again.
    """

    def __init__(
        self,
        base: FrozenModel,
        budget_tokens: int | None,
        checkpointing: Checkpointing | None,
        shrunk: Callable[[ForwardTooLarge, str], None],
        *,
        strengthens: bool = False,
        add_up: AddUp = on_one_device,
    ):
        self.base = base
        self.budget_tokens = budget_tokens
        self.checkpointing = checkpointing
        self._shrunk = shrunk
        self._strengthens = strengthens
        self._add_up = add_up

    def step(self, optimizers: Mapping[str, StackedOptimizer], members: Sequence[Member]) -> dict[str, StepResult]:
        """One step of all, in forwards as large as memory holds.

        Raises:
            OutOfMemory: not even the smallest fits.
        """
        while True:
            try:
                return train_step(self.base, optimizers, members, self.budget_tokens, add_up=self._add_up)
            except ForwardTooLarge as error:
                self._make_room(error, len(members))

    def probe(self, members: Sequence[Member]) -> None:
        """Try the largest batch there can be, so that what memory does not hold shows now and not at its own step.

        Raises:
            OutOfMemory: not even the smallest fits.
        """
        while members:
            try:
                probe_step(self.base, members, self.budget_tokens)
                return
            except ForwardTooLarge as error:
                self._make_room(error, len(members))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        mode = "none" if self.checkpointing is None else self.checkpointing.mode
        return {"budget_tokens": self.budget_tokens, "checkpointing": mode}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Compute as much at once as when a checkpoint was written."""
        self.budget_tokens = state.get("budget_tokens", self.budget_tokens)
        if self.checkpointing is not None:
            self.checkpointing.set(state.get("checkpointing", self.checkpointing.mode))

    def _make_room(self, error: ForwardTooLarge, num_members: int) -> None:
        """From now on less: half of the tokens that were too many, and where that was one row, less of it kept."""
        if error.rows > 1:
            self.budget_tokens = error.half_tokens
            done = f"steps are computed {self.budget_tokens:,} tokens at a time, or a row; the result stays as it is"
        else:
            stronger = self.checkpointing.stronger() if self.checkpointing and self._strengthens else None
            if self.checkpointing is None or stronger is None:
                raise OutOfMemory(error.what, next_step=self._advice(num_members)) from None
            self.checkpointing.set(stronger)
            done = f"checkpointing is {stronger}; the result stays as it is"
        self._shrunk(error, done)

    def _advice(self, num_members: int) -> str:
        """What may be changed where one row does not fit."""
        steps = ["lower train.row_tokens"]
        if self.checkpointing is not None and self.checkpointing.stronger() is not None:
            steps.insert(0, f"set train.checkpointing to auto or {self.checkpointing.stronger()}")
        if self.base.storage is None:
            steps.append("store the base in fewer bits (quantize: nf4)")
        if num_members > 1:
            steps.append("let fewer members train at once (sweep.concurrent)")
        return f"{', or '.join(steps)}, or adapt only the upper layers (adapter.layers): below them nothing is kept"
