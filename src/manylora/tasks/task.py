"""What a task is, and what it scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from manylora.evaluation.sample import Metrics, Sample


class Task(Protocol):
    """Examples + how they are shown + how an answer is scored."""

    name: str
    auto: str
    """The transformers Auto class that loads a base for it."""
    kinds: tuple[str, ...]
    """The kinds of data format that it learns from."""
    causal: bool
    """Whether it learns only from a base in which no token sees a later one."""
    objective: str
    """The name of what is minimised, in `objectives.OBJECTIVES`."""

    def metrics(self, samples: Sequence[Sample]) -> Metrics:
        """Scores of answers, by name; empty without samples."""
        ...

    def footnotes(self, samples: Sequence[Sample]) -> Mapping[str, str]:
        """What each metric is exactly, by its name, so that others can compute the same number."""
        ...
