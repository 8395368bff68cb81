"""Data read, encoded and surveyed for a look at them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from manylora.errors import DataError, DataNotFound

if TYPE_CHECKING:
    from manylora.config import DataPlace
    from manylora.data.example import Example
    from manylora.data.examples import Reading
    from manylora.data.faults import Reason
    from manylora.data.load import Loaded, Part
    from manylora.data.store import Examples
    from manylora.data.survey import Survey
    from manylora.look.asked import Asked, Look

WHOLE = 1 << 30
"""A limit that no row reaches: for the lengths of rows that are too long."""
TOO_LONG = ("too long", "target cut off")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The examples of a look and what is known of them; `missing` says why no example came of a row asked for."""

    look: Look
    tokenizer: Any
    train: Loaded
    held_out: Loaded | None
    examples: Examples
    survey: Survey
    asked_for: list[Example] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def parts(self) -> list[Part]:
        return [*self.train.parts, *(self.held_out.parts if self.held_out else ())]

    @property
    def reasons(self) -> list[Reason]:
        return [reason for part in self.parts for reason in part.encoded.skipped]

    @property
    def num_rows(self) -> int:
        return sum(part.encoded.num_rows for part in self.parts)

    @property
    def num_bad(self) -> int:
        return sum(reason.count for reason in self.reasons)

    def notes(self) -> list[str]:
        """What the log would say of the sources besides the counts and the reasons, which are shown apart."""
        from manylora.data.faults import reason_lines

        found = []
        for part in self.parts:
            encoded = part.encoded
            told = {encoded.notes[0], *reason_lines(encoded.skipped, encoded.num_rows)}
            found += [f"{part.name}: {line}" for line in encoded.notes if line not in told]
        return found

    def verdict(self) -> str:
        """One line: whether training would take the rows."""
        if not self.num_bad:
            return (
                "the one row can be learned from"
                if self.num_rows == 1
                else f"all {self.num_rows:,} rows can be learned from"
            )
        bad = f"{self.num_bad:,} of {self.num_rows:,} rows cannot be learned from"
        if self.look.skips:
            return f"{bad}: training leaves them out, as data.on_bad_row: skip asks"
        return f"{bad}: training refuses the data unless data.on_bad_row is skip"

    def to_dict(self) -> dict[str, Any]:
        """All of it but the examples, as JSON holds it."""
        return {
            "base": self.look.base,
            "row_tokens": self.look.reading.max_length,
            "rows": self.num_rows,
            "bad_rows": self.num_bad,
            "sources": [part.describe() for part in self.train.parts],
            "held_out_sources": [part.describe() for part in self.held_out.parts] if self.held_out else [],
            "notes": self.notes(),
            "missing": self.missing,
        } | self.survey.to_dict()


def find(look: Look, asked: Asked) -> Found:
    """Read, encode and survey."""
    from manylora.base.load import load_tokenizer
    from manylora.data.load import load_examples
    from manylora.data.split import split_by_group
    from manylora.data.survey import survey
    from manylora.tasks.data import open_places

    tokenizer, eos_ids = load_tokenizer(look.base, look.chat_template, trust_remote_code=asked.trust_remote_code)

    def load(places: Sequence[DataPlace], reading: Reading) -> Loaded:
        sources = open_places(places, look.columns)
        return load_examples(sources, tokenizer, reading, eos_ids=eos_ids, use_cache=asked.use_cache)

    train = load(look.places, look.reading)
    held_out = load(look.held_out, look.reading) if look.held_out else None
    examples, weights, apart = train.examples, train.weights, held_out.examples if held_out else ()
    if look.eval_fraction is not None:
        places, rest = split_by_group(examples, look.eval_fraction, look.seed)
        examples, apart, weights = examples.take(places), examples.take(rest), ()
    lengths = None
    if _cuts(train, look.reading):
        whole = replace(look.reading, max_length=WHOLE, overflow="error")
        lengths = load(look.places, whole).examples.lengths
    taken = survey(
        examples,
        decode=tokenizer.batch_decode,
        marks=[str(token) for token in tokenizer.added_tokens_decoder.values() if token.special],
        row_tokens=look.reading.max_length,
        rows_per_step=look.rows_per_step,
        weights=weights,
        held_out=apart,
        lengths=lengths,
    )
    asked_for, missing = _rows_at(asked.lines, look, train, tokenizer, eos_ids)
    return Found(
        look=look, tokenizer=tokenizer, train=train, held_out=held_out, examples=examples, survey=taken,
        asked_for=asked_for, missing=missing,
    )  # fmt: skip


def _cuts(loaded: Loaded, reading: Reading) -> bool:
    """Whether rows may have been longer than their examples, or were left out for their length."""
    encoded = [part.encoded for part in loaded.parts]
    left_out = any(reason.kind in TOO_LONG for one in encoded for reason in one.skipped)
    return left_out or reading.overflow == "right" or int(loaded.examples.lengths.max()) >= reading.max_length


def first_rows(loaded: Loaded, count: int) -> list[Example]:
    """The examples of the first rows of each source."""
    found: list[Example] = []
    for part in loaded.parts:
        seen: set[str] = set()
        for example in part.encoded.examples:
            if example.where not in seen and len(seen) == count:
                break
            seen.add(example.where)
            found.append(example)
    return found


def _rows_at(
    lines: Iterable[int], look: Look, loaded: Loaded, tokenizer: Any, eos_ids: Sequence[int]
) -> tuple[list[Example], list[str]]:
    """The examples of the rows at these lines, and for each line without one, why.

    Raises:
        DataNotFound: no row begins at a line.
    """
    from manylora.data.examples import encode
    from manylora.data.store import column_of
    from manylora.tasks.data import open_places

    lines = tuple(dict.fromkeys(lines))
    held: list[Example] = []
    found: dict[int, list[Example]] = {line: [] for line in lines}
    for place, line in enumerate(column_of(loaded.examples, "line")) if lines else ():
        if line in found:
            found[line].append(loaded.examples[place])
    wanted = {line for line, some in found.items() if not some}
    faults: dict[int, list[str]] = {line: [] for line in wanted}
    known: list[int] = []
    for (source, _), part in zip(open_places(look.places, look.columns) if wanted else (), loaded.parts, strict=False):
        reading = replace(look.reading, format=part.encoded.format, on_bad_row="error")
        for row in source.rows():
            known.append(row.line)
            if row.line in wanted:
                try:
                    encode([row], tokenizer, reading, eos_id=eos_ids)
                except DataError as error:
                    faults[row.line].append(str(error))
    for line in lines:
        held += found[line]
        if line in wanted and not faults[line]:
            before = max((at for at in known if at < line), default=None)
            near = "" if before is None else f"; the row before it begins at line {before}"
            raise DataNotFound(
                f"no row begins at line {line}{near}", next_step="give --row a line that a row begins at"
            )
    return held, [fault for line in lines for fault in faults.get(line, ())]
