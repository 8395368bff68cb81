"""How the targets of examples are spread: over classes, over tags, over chosen and rejected answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from manylora.data.store import column_of, num_trained_of

if TYPE_CHECKING:
    from manylora.data.example import Example

BEGINS, GOES_ON = frozenset("BSU"), frozenset("IEL")
"""First letters of tags that begin an entity and that go on with one: of the schemes IOB, IOBES and BILOU."""


@dataclass(frozen=True, slots=True)
class Classes:
    """How often each class is the target, the most frequent first."""

    counts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def imbalance(self) -> float:
        """How often the most frequent class comes for each time that the rarest does."""
        return max(self.counts.values()) / min(self.counts.values())

    def to_dict(self) -> dict[str, Any]:
        return {"counts": self.counts, "total": self.total, "imbalance": self.imbalance}


@dataclass(frozen=True, slots=True)
class AnswerLengths:
    """Trained tokens of chosen and rejected answers on average, and the share of rows whose chosen one is longer."""

    chosen: float
    rejected: float
    chosen_longer: float
    same_length: float

    @property
    def ratio(self) -> float:
        return self.chosen / self.rejected

    def to_dict(self) -> dict[str, Any]:
        names = ("chosen", "rejected", "ratio", "chosen_longer", "same_length")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True)
class Balance:
    """What is known of the targets where they are no tokens of one sequence; None or empty where they are.

    `unseen` are the classes that held-out examples have and training examples have not.
    """

    labels: Classes | None = None
    tags: Classes | None = None
    entities: Classes | None = None
    answers: AnswerLengths | None = None
    unseen: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        parts = {name: getattr(self, name) for name in ("labels", "tags", "entities", "answers")}
        return {name: part.to_dict() for name, part in parts.items() if part is not None} | {
            "unseen": list(self.unseen)
        }


def balance_of(examples: Sequence[Example], held_out: Sequence[Example] = ()) -> Balance:
    """The spread of the targets of examples."""
    labels, tags, entities = _counted(examples)
    other_labels, other_tags, _ = _counted(held_out)
    return Balance(
        labels=_classes(labels),
        tags=_classes(tags),
        entities=_classes(entities),
        answers=_answer_lengths(examples),
        unseen=tuple(sorted((set(other_labels) - set(labels)) | (set(other_tags) - set(tags)))),
    )


def _counted(examples: Sequence[Example]) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """How often each label, each tag and each kind of entity comes."""
    labels = Counter(label for label in column_of(examples, "label") if label is not None)
    tags: Counter[str] = Counter()
    entities: Counter[str] = Counter()
    for held in column_of(examples, "tags"):
        if held is not None:
            tags.update(held)
            entities.update(entities_in(held))
    return labels, tags, entities


def _classes(counts: Counter[str]) -> Classes | None:
    return Classes(dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))) if counts else None


def entities_in(tags: Iterable[str]) -> list[str]:
    """The kinds of the entities in a sentence, one for each: B-PER I-PER O B-LOC has a PER and a LOC.

    Tags without such a letter before a hyphen (parts of speech) hold no entity. As the field counts them, an entity
    also begins where I- follows another kind.
    """
    found, open_kind = [], None
    for tag in tags:
        letter, hyphen, kind = tag.partition("-")
        if not hyphen or not kind or letter not in BEGINS | GOES_ON:
            open_kind = None
            continue
        if letter in BEGINS or kind != open_kind:
            found.append(kind)
        open_kind = None if letter in "SUEL" else kind
    return found


def _answer_lengths(examples: Sequence[Example]) -> AnswerLengths | None:
    variants = np.asarray(list(column_of(examples, "variant")))
    counts = num_trained_of(examples)
    chosen, rejected = counts[variants == "chosen"], counts[variants == "rejected"]
    if not len(chosen) or len(chosen) != len(rejected):
        return None
    return AnswerLengths(
        chosen=float(chosen.mean()),
        rejected=float(rejected.mean()),
        chosen_longer=float((chosen > rejected).mean()),
        same_length=float((chosen == rejected).mean()),
    )
