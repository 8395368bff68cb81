"""Segments of text, each learned or not: for those who write every token of a prompt themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from manylora.data.faults import RowFault
from manylora.data.formats.format import Kind, Overflow, Shown, truth_of
from manylora.data.tokens import Marked

if TYPE_CHECKING:
    from manylora.data.rows import Row
    from manylora.data.tokens import TokenRules

BOS_ADDED = "the first segment does not begin with the tokenizer's BOS: it is put there"


@dataclass(frozen=True, slots=True)
class Segments:
    """Texts encoded apart and joined as they are; those with label true are learned.

    No template, no white space and no end token is added: the end of what is learned must be written in the data. Only
    the BOS that the tokenizer puts before every text is put there unless the first segment begins with it.
    """

    name: str = "segments"
    kind: Kind = "sequence"
    columns: tuple[str, ...] = ("segments",)
    also: tuple[tuple[str, ...], ...] = ()
    optional: tuple[str, ...] = ()
    overflows: tuple[Overflow, ...] = ("error", "right")

    def fits(self, row: Row) -> bool:
        value = row.values.get("segments")
        return isinstance(value, (list, tuple)) and all(isinstance(segment, Mapping) for segment in value)

    def show(self, row: Row, rules: TokenRules) -> tuple[Shown, ...]:
        segments = _segments(row.values["segments"])
        before = "".join(text for _, text in takewhile(lambda segment: not segment[0], segments))
        after = list(segments[sum(1 for _ in takewhile(lambda segment: not segment[0], segments)) :])
        learned = "".join(text for _, text in takewhile(lambda segment: segment[0], after))
        if not learned:
            raise RowFault("nothing learned", "no segment has label true", next_step="leave the row out")
        bos = rules.tokenizer.bos_token
        added = bool(rules.front) and not (isinstance(bos, str) and segments[0][1].startswith(bos))
        return (
            Shown(
                tuple(text for _, text in segments),
                partial(_mark, learned=tuple(label for label, _ in segments), rules=rules),
                prompt=before,
                reference=learned,
                group=before or learned,
                notes=(BOS_ADDED,) if added else (),
            ),
        )


def _segments(value: Any) -> list[tuple[bool, str]]:
    if not isinstance(value, (list, tuple)) or not value:
        raise RowFault("no segments", f"segments is {value!r:.60}", allowed='[{"label": true, "text": "..."}, ...]')
    found = []
    for number, segment in enumerate(value, 1):
        missing = [key for key in ("label", "text") if not isinstance(segment, Mapping) or key not in segment]
        if missing:
            raise RowFault(
                "broken segment",
                f"segment {number} is {segment!r:.60}: it has no {' and no '.join(missing)}",
                allowed='{"label": true, "text": "..."}',
            )
        text = segment["text"]
        if not isinstance(text, str) or not text:
            raise RowFault("segment no text", f"segment {number}: text is {text!r:.60}", allowed="text, not empty")
        try:
            found.append((truth_of(segment["label"], "label"), text))
        except RowFault as fault:
            raise RowFault(fault.kind, f"segment {number}: {fault.what}", allowed=fault.allowed) from fault
    return found


def _mark(encoded: Sequence[list[int]], *, learned: Sequence[bool], rules: TokenRules) -> Marked:
    tokens = [] if encoded[0][:1] == rules.front else list(rules.front)
    spans: list[tuple[int, int]] = []
    for part, is_learned in zip(encoded, learned, strict=True):
        start = len(tokens)
        tokens += part
        if not start and rules.front:
            start = 1  # a BOS in the data comes first, and nothing before it could foretell it
        if not is_learned or start >= len(tokens):
            continue
        if spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], len(tokens))
        else:
            spans.append((start, len(tokens)))
    return Marked(tokens, spans)


SEGMENTS = Segments()
