"""A source and its target: translations, summaries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import NoneType
from typing import TYPE_CHECKING, Any

from manylora.data.faults import RowFault
from manylora.data.formats.format import Kind, Overflow, Shown, checked_text, shown_completion

if TYPE_CHECKING:
    from manylora.data.rows import Row
    from manylora.data.tokens import TokenRules

LINE_END = "a line end is put between source and target"
SENTENCES = "source is a list of texts: they are joined with spaces"
SEVERAL = "target is a list of several texts: each makes an example"


@dataclass(frozen=True, slots=True)
class Pairs:
    """A source, a line end unless it ends with white space, and the target, which is learned.

    A source that is a list holds sentences, which are joined; a target that is a list holds alternatives, each of which
    makes an example. {"translation": {"en": ..., "de": ...}} goes from the first language to the second.
    """

    name: str = "pairs"
    kind: Kind = "sequence"
    columns: tuple[str, ...] = ("source", "target")
    also: tuple[tuple[str, ...], ...] = (("translation",),)
    optional: tuple[str, ...] = ("translation",)
    overflows: tuple[Overflow, ...] = ("error",)

    def fits(self, row: Row) -> bool:
        if row.values.get("translation") is not None:
            return isinstance(row.values["translation"], Mapping)
        return all(isinstance(row.values.get(column, 0), (str, list, tuple, NoneType)) for column in self.columns)

    def show(self, row: Row, rules: TokenRules) -> tuple[Shown, ...]:
        source, targets, notes = _translation(row) if row.values.get("translation") is not None else _source_target(row)
        if not source[-1].isspace():
            source, notes = f"{source}\n", [*notes, LINE_END]
        shown = [shown_completion(source, target, rules) for target in targets]
        return (replace(shown[0], notes=tuple(notes)), *shown[1:])  # what is said of a row is said once


def _source_target(row: Row) -> tuple[str, list[str], list[str]]:
    sources, targets = _texts(row, "source"), _texts(row, "target")
    source = sources[0] if len(sources) == 1 else " ".join(text.strip() for text in sources)
    notes = [note for note, texts in ((SENTENCES, sources), (SEVERAL, targets)) if len(texts) > 1]
    return source, targets, notes


def _texts(row: Row, column: str) -> list[str]:
    value: Any = row.values.get(column)
    if not isinstance(value, (list, tuple)):
        return [checked_text(value, column)]
    if not value:
        raise RowFault(f"{column} empty", f"{column} is an empty list", next_step="fill it, or leave the row out")
    for number, text in enumerate(value, 1):
        if not isinstance(text, str) or not text.strip():
            raise RowFault(
                f"{column} no text", f"{column}: text {number} of the list is {text!r:.60}", allowed="texts, none empty"
            )
    return list(value)


def _translation(row: Row) -> tuple[str, list[str], list[str]]:
    value: Any = row.values["translation"]
    if not isinstance(value, Mapping) or len(value) != 2:
        held = ", ".join(map(str, value)) if isinstance(value, Mapping) else f"{value!r:.60}"
        raise RowFault(
            "translation broken",
            f"translation holds {held or 'nothing'}",
            allowed='two languages: {"en": "text", "de": "text"}; it goes from the first to the second',
        )
    first, second = value
    texts = [checked_text(value[language], f"translation, {language}") for language in (first, second)]
    return texts[0], texts[1:], [f"translations go from {first} to {second}"]


PAIRS = Pairs()
