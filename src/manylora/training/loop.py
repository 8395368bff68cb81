"""The one loop: it steps every running member, evaluates, keeps the best, stops the weak and writes checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from manylora.base.frozen import FrozenModel
from manylora.errors import NonFiniteLoss
from manylora.evaluation.evaluate import evaluate_loss
from manylora.training.checkpoint import Checkpoints
from manylora.training.member import Member
from manylora.training.memory import peak_bytes
from manylora.training.optim import OPTIMIZERS
from manylora.training.optim.stacked import StackedOptimizer
from manylora.training.step import StepResult, train_step
from manylora.types import Factors, Objective


class Recorder(Protocol):
    """Where the loop says what happens: events on disk, curves, the terminal."""

    def event(self, name: str, **fields: Any) -> None: ...

    def note(self, text: str) -> None: ...

    def stage(self, text: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSettings:
    """`checkpoint_every` counts steps (None: only at the end); `select` is `eval_loss` or `last`."""

    checkpoint_every: int | None = 100
    select: str = "eval_loss"


class Loop:
    """Trains members over one base, all running ones in one forward and backward."""

    def __init__(
        self,
        base: FrozenModel,
        objective: Objective,
        members: Sequence[Member],
        recorder: Recorder,
        checkpoints: Checkpoints | None,
        settings: LoopSettings,
    ):
        self.base = base
        self.bank = base.bank
        self.objective = objective
        self.members = list(members)
        self.recorder = recorder
        self.checkpoints = checkpoints
        self.settings = settings
        names = dict.fromkeys(member.recipe.optimizer for member in members)
        self.optimizers: Mapping[str, StackedOptimizer] = {name: OPTIMIZERS.get(name)(self.bank) for name in names}
        self.best: dict[str, Mapping[str, Factors]] = {}
        self.tick = 0
        self.saved_at: int | None = None

    def resume(self) -> int | None:
        """Continue from the last checkpoint: its step, None where there is none."""
        found = self.checkpoints.restore(self.bank, self.optimizers, self.members) if self.checkpoints else None
        if found is None:
            return None
        self.tick, best = found
        self.best = dict(best)
        self.saved_at = self.tick
        return self.tick

    def run(self, interrupted: Callable[[], bool] = lambda: False) -> None:
        """Step until no member runs.

        Raises:
            KeyboardInterrupt: `interrupted()` became true; a checkpoint has been written.
            NonFiniteLoss: every member was retired. OutOfMemory: the machine does not hold a step.
        """
        while running := [member for member in self.members if member.state == "running"]:
            started = time.perf_counter()
            results = train_step(self.base, self.objective, self.optimizers, running)
            seconds = time.perf_counter() - started
            self.tick += 1
            for member in running:
                self._after_step(member, results[member.name], seconds)
            every = self.settings.checkpoint_every
            if every is not None and self.tick % every == 0:
                self.save()
            if interrupted():
                self.save()
                raise KeyboardInterrupt
        self.save()
        if self.members and all(member.state == "retired" for member in self.members):
            raise NonFiniteLoss(
                f"every member was retired; {self.members[0].name}: {self.members[0].reason}",
                next_step="lower train.learning_rate, set train.clip_norm, or look at the rows of that step",
            )

    def save(self) -> None:
        """Write a checkpoint of the present step, unless it lies there already."""
        if self.checkpoints is not None and self.saved_at != self.tick:
            self.checkpoints.save(self.tick, self.bank, self.optimizers, self.members, self.best)
            self.saved_at = self.tick
            self.recorder.event("checkpoint", step=self.tick)

    def _after_step(self, member: Member, result: StepResult, seconds: float) -> None:
        if not result.finite:
            what = f"loss {result.loss}, gradient norm {result.gradient_norm}"
            member.state, member.reason = "retired", f"{what} at step {member.step + 1}"
            self.recorder.event("retired", member=member.name, step=member.step, reason=member.reason)
            self.recorder.note(f"{member.name} is retired: {member.reason}")
            return
        rate = member.rate(member.step)
        member.step += 1
        member.tokens += result.trained_tokens
        self.recorder.event(
            "step",
            member=member.name,
            step=member.step,
            loss=result.loss,
            learning_rate=rate,
            tokens=member.tokens,
            tokens_per_s=result.computed_tokens / seconds,
            gradient_norm=result.gradient_norm,
            memory_bytes=peak_bytes(self.base.device),
        )
        if member.step == 2:
            self._name_unreached(member)
        if member.evaluates_after(member.step):
            self._evaluate(member)
        if member.state == "running" and member.step >= member.recipe.total_steps:
            member.state = "done"
            self.recorder.event("done", member=member.name, step=member.step)

    def _evaluate(self, member: Member) -> None:
        if not member.eval_examples:
            return
        self.recorder.stage("evaluating")
        scores = evaluate_loss(
            self.base,
            member.eval_examples,
            slot=member.slot,
            row_tokens=member.epochs.row_tokens,
            rows_per_batch=member.recipe.rows_per_step,
            objective=self.objective,
        )
        self.recorder.event("eval", member=member.name, step=member.step, **scores)
        if scores["loss"] < member.best_loss:
            member.best_loss, member.best_step, member.stale_evals = scores["loss"], member.step, 0
            if self.settings.select == "eval_loss":
                self.best[member.name] = self.bank.get(member.slot).factors
            return
        member.stale_evals += 1
        patience = member.recipe.patience
        if patience is not None and member.stale_evals >= patience and member.step < member.recipe.total_steps:
            member.state = "stopped"
            member.reason = f"eval loss has not fallen for {patience} evaluations; best {member.best_loss:.4f}"
            self.recorder.event("done", member=member.name, step=member.step, reason=member.reason)
            self.recorder.note(f"{member.name} stops early at step {member.step}: {member.reason}")

    def _name_unreached(self, member: Member) -> None:
        """After two steps every factor that the forward reaches has moved; say which sites have not."""
        still = []
        for stack, place in self.bank.places(member.slot):
            moments = self.optimizers[member.recipe.optimizer].moved(stack, place)
            if not all(moments.values()):
                still.append(stack.site.name)
        if still:
            share = f"{len(still)} of {len(self.bank.places(member.slot))}"
            self.recorder.note(f"{member.name}: {share} sites got no gradient in two steps: {', '.join(still[:8])}")
            self.recorder.event("unreached", member=member.name, step=member.step, sites=still)
