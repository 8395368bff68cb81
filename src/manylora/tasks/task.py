"""What a task is: where its base comes from, what it learns from, and how its answers are scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from manylora.base.frozen import FrozenModel
    from manylora.config import Config
    from manylora.evaluation.sample import Metrics
    from manylora.tasks.data import RunData


@dataclass(frozen=True, slots=True)
class Answer:
    """One held-out input as it is shown to people: fields of the task's own, and what a slot answered."""

    asked: Mapping[str, Any]
    given: Any


@dataclass(frozen=True, slots=True)
class Scored:
    """The answers of one slot, in the order in which their inputs first come, their scores by name, and what each score
    is exactly, so that others can compute the same number.
    """

    metrics: Metrics = field(default_factory=dict)
    footnotes: Mapping[str, str] = field(default_factory=dict)
    answers: Sequence[Answer] = ()


class Task(Protocol):
    """Opens its base, reads its examples, scores answers; an entry of TASKS, or `package.module:NAME` of one's own."""

    name: str
    auto: str
    """The transformers Auto class that loads a base for it; "": a module that Python hands over."""
    objective: str
    """The name of what is minimised unless a configuration says otherwise, in `objectives.OBJECTIVES`."""

    def find(self, config: Config, objects: Mapping[str, Any]) -> Any:
        """What `read` is to read, found before the base is opened, which may take minutes.

        Raises:
            DataNotFound: a place that is not there.
        """
        ...

    def open(self, config: Config, objects: Mapping[str, Any]) -> FrozenModel:
        """The base; `objects` are what a configuration names `python:NAME`.

        Raises:
            UserError: it is not there, or nothing that this task can learn on.
        """
        ...

    def row_tokens(self, config: Config, base: FrozenModel) -> tuple[int, list[str]]:
        """The most that a row holds, in the unit of an example's length, and lines for the log."""
        ...

    def read(
        self, config: Config, base: FrozenModel, found: Any, objects: Mapping[str, Any], *, use_cache: bool
    ) -> RunData:
        """The examples, those held out apart where they have places of their own.

        Raises:
            DataError: rows that cannot be read or learned from.
        """
        ...

    def outputs(self, data: RunData) -> int | None:
        """How many numbers an adapter's own head gives for these data; None: the base lacks no head."""
        ...

    def score(self, base: FrozenModel, examples: Sequence[Any], config: Config, *, slot: int) -> Scored:
        """What one slot answers to held-out examples, beside what the objective measures of them."""
        ...

    def record(self, config: Config, base: FrozenModel) -> Mapping[str, Any]:
        """What whoever uses the adapter must know of the task, as JSON: written into the adapter's folder."""
        ...
