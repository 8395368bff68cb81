"""Rows as examples: shown by their format, encoded, cut to length, checked, and written to disk a chunk at a time.

A data set that cannot teach what it should is refused here, with file and line: a row in which nothing is learned, a
doubled BOS, an end token that no row teaches, a target that is cut off, a row longer than the limit. Faults of single
rows can be skipped, and are counted then; memory holds one chunk of rows, however long the data are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TYPE_CHECKING, Literal

from manylora.data.faults import Faults, Reason, RowFault, reason_lines
from manylora.data.formats import FORMATS
from manylora.data.formats.detect import detect, misfit
from manylora.data.formats.format import Format, Overflow, Shown
from manylora.data.store import Examples, ExampleWriter, Scratch
from manylora.data.tokens import Marked, TokenRules
from manylora.errors import ConfigError, DataError, nearest_names

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from manylora.data.rows import Row

__all__ = ["Encoded", "Reading", "encode"]

CHUNK_ROWS = 1024  # rows encoded in one call: the fast tokenizers work on a whole list in parallel
CHUNK_CHARACTERS = 1 << 23  # and fewer where they are long: memory holds one chunk

SKIP = "to leave such rows out, data.on_bad_row: skip"

_Chunk = list[tuple["Row", tuple[Shown, ...]]]
Piece = tuple["Row", Marked, str, str, str, "str | None", str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How rows become examples of at most `max_length` tokens.

    `kinds`: the kinds of format that may be detected (none: all). `overflow` says what becomes of a longer row:
    "error"; "right" cuts its end off where no answer is cut; "split" (text only) makes several examples of it, each
    beginning with the last token of the one before, so that every token is learned once. None: split for text, else
    error. `turns`: whether all assistant turns of a conversation are learned, or the last. `on_bad_row`: "error" stops
    at the first fault, "skip" leaves the row out and counts it.
    """

    max_length: int
    format: str = "auto"
    kinds: tuple[str, ...] = ()
    overflow: str | None = None
    turns: Literal["all", "last"] = "all"
    on_bad_row: Literal["error", "skip"] = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """Examples in the order of their rows, the format they were read by, notes for the log, and what was left out."""

    examples: Examples
    format: str
    notes: list[str]
    num_rows: int
    skipped: list[Reason]


@dataclass(slots=True)
class _Tally:
    """What is counted on the way; of a note also the first row it is about."""

    num_rows: int = 0
    num_cut: int = 0
    longest_row: int = 0
    end_learned: bool = False
    notes: Counter[str] = field(default_factory=Counter)
    first_note: dict[str, str] = field(default_factory=dict)
    unused: dict[str, None] = field(default_factory=dict)
    last_tokens: set[int] = field(default_factory=set)


def encode(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    reading: Reading,
    *,
    eos_id: int | Sequence[int] | None,
    path: Path | None = None,
) -> Encoded:
    """Rows as examples, written to `path` (None: a temporary file that lives as long as the examples).

    `eos_id` is appended to what is learned; of several, the first, and a chat turn may end with any. Where the format
    is "auto" it is found from the first rows.

    Raises:
        DataError: a row that does not fit the format or teaches nothing, unless such rows are skipped; no row is left.
        ConfigError: an overflow that the format does not know. UnknownName: no such format.
    """
    if reading.max_length < 2:
        raise ConfigError(
            f"rows of {reading.max_length} tokens cannot hold a prompt and a target", allowed="at least 2"
        )
    stream = iter(rows)
    first = list(islice(stream, CHUNK_ROWS))
    if not first:
        raise DataError("there are no rows to encode", next_step="give a data file that holds rows")
    if reading.format == "auto":
        name = detect(first, kinds=reading.kinds or None, strict=reading.on_bad_row == "error")
    else:
        name = FORMATS.check(reading.format)
        if reading.kinds and FORMATS.get(name).kind not in reading.kinds:
            raise ConfigError(
                f"data.format is {name!r}, whose rows are of the kind {FORMATS.get(name).kind!r}, and this task learns "
                f"from {' or '.join(reading.kinds)} rows",
                allowed=", ".join(other for other in FORMATS if FORMATS.get(other).kind in reading.kinds),
                next_step="leave data.format out to have it found, or name the columns to learn in data.columns",
            )
    learns_end = FORMATS.get(name).kind not in ("label", "tags")
    rules = TokenRules.of(tokenizer, eos_id, turns=reading.turns, learns_end=learns_end)
    keep = None
    if path is None:
        keep = Scratch()
        path = keep.path / "examples.arrow"
    work = _Encoder(FORMATS.get(name), rules, reading)
    writer = ExampleWriter(path)
    try:
        for chunk, encoded in work.encoded(work.chunks(chain(first, stream))):
            writer.write(work.pieces(chunk, encoded))
    finally:
        writer.close()
    if not writer.num_examples:
        raise DataError("\n".join(["no row can be learned from", *work.notes()]), next_step="mend the rows")
    work.check_end_is_learned()
    examples = Examples.open(path, keep)
    return Encoded(
        examples=examples,
        format=name,
        notes=[_count(name, writer), *work.notes()],
        num_rows=work.tally.num_rows,
        skipped=work.faults.reasons(),
    )


class _Encoder:
    """The steps from rows to tokens, and what they count."""

    def __init__(self, chosen: Format, rules: TokenRules, reading: Reading):
        self.format = chosen
        self.rules = rules
        self.reading = reading
        self.overflow = _checked_overflow(chosen, reading.overflow)
        self.faults = Faults()
        self.tally = _Tally()
        self._known = {*chosen.columns, *chosen.optional}

    def chunks(self, rows: Iterable[Row]) -> Iterator[_Chunk]:
        """Rows as their format shows them, as many as are encoded in one call."""
        chunk: _Chunk = []
        characters = seen = 0
        for row in rows:
            self.tally.num_rows += 1
            seen += 1
            try:
                shown = self._show(row)
            except RowFault as fault:
                self.faults.add(row, fault)
            else:
                chunk.append((row, shown))
                characters += sum(len(text) for one in shown for text in one.texts)
            if seen >= CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
                self._stop_at_faults()
                yield chunk
                chunk, characters, seen = [], 0, 0
        self._stop_at_faults()
        if chunk:
            yield chunk

    def encoded(self, chunks: Iterable[_Chunk]) -> Iterator[tuple[_Chunk, list[list[int]]]]:
        """Each chunk with the tokens of its texts; a chunk is encoded while the one before it is worked on."""

        def encode_texts(chunk: _Chunk) -> list[list[int]]:
            return self.rules.encode([text for _, shown in chunk for one in shown for text in one.texts])

        if not self.rules.is_plain:  # a tokenizer with code of its own may not be asked from two threads at once
            for chunk in chunks:
                yield chunk, encode_texts(chunk)
            return
        # The tokenizers library lets go of the interpreter's lock, so one thread is enough.
        with ThreadPoolExecutor(1) as pool:
            before: tuple[_Chunk, Future[list[list[int]]]] | None = None
            for chunk in chunks:
                ahead = chunk, pool.submit(encode_texts, chunk)
                if before is not None:
                    yield before[0], before[1].result()
                before = ahead
            if before is not None:
                yield before[0], before[1].result()

    def pieces(self, chunk: _Chunk, texts: Iterable[list[int]]) -> list[Piece]:
        """What the writer takes, for the rows of a chunk that have no fault."""
        encoded = iter(texts)
        marked: list[tuple[Row, tuple[Shown, ...], list[Marked]]] = []
        for row, shown in chunk:
            parts = [[next(encoded) for _ in one.texts] for one in shown]
            try:
                marked.append((row, shown, [self._marked(one, part) for one, part in zip(shown, parts, strict=True)]))
            except RowFault as fault:
                self.faults.add(row, fault)
        found: list[Piece] = []
        for row, shown, made in marked:
            try:
                found += [piece for one, whole in zip(shown, made, strict=True) for piece in self._cut(row, one, whole)]
            except RowFault as fault:
                self.faults.add(row, fault)
        self._stop_at_faults()
        return found

    def _show(self, row: Row) -> tuple[Shown, ...]:
        if row.fault is not None:
            raise row.fault
        if not self.format.fits(row):
            raise misfit(row, self.format)
        shown = self.format.show(row, self.rules)
        for one in shown:
            for text in one.texts:
                if not text.isascii():
                    _check_unicode(text)
            for note in one.notes:
                self.tally.notes[note] += 1
                self.tally.first_note.setdefault(note, row.where)
        if not self._known.issuperset(row.values):
            self.tally.unused.update(dict.fromkeys(name for name in row.values if name not in self._known))
        return shown

    def _marked(self, shown: Shown, encoded: Sequence[list[int]]) -> Marked:
        marked = shown.mark(encoded)
        self._check(marked)
        self.tally.longest_row = max(self.tally.longest_row, len(marked.tokens))
        self.tally.last_tokens.add(marked.tokens[-1])
        return marked

    def _cut(self, row: Row, shown: Shown, whole: Marked) -> list[Piece]:
        """A sequence within the limit, in several pieces where it was split."""
        parts = [whole]
        if len(whole.tokens) > self.reading.max_length:
            parts = self._within_limit(whole)
            self.tally.num_cut += 1
        if not self.tally.end_learned:
            self.tally.end_learned = any(self._learns_end(part) for part in parts)
        if len(parts) == 1:
            return [(row, parts[0], shown.prompt, shown.reference, shown.group, shown.label, shown.variant)]
        texts = [self.rules.decode(part.tokens) for part in parts]
        return [
            (row, part, shown.prompt, text, shown.group, shown.label, shown.variant)
            for part, text in zip(parts, texts, strict=True)
        ]

    def _check(self, made: Marked) -> None:
        if not made.tokens:
            raise RowFault("no tokens", "the tokenizer makes nothing of this row", next_step="leave the row out")
        if not made.spans and self.format.kind != "label":
            raise RowFault(
                "nothing learned", "no token of this row is learned", next_step="leave the row out, or fill it"
            )
        if made.spans and made.spans[0][0] == 0 and self.format.kind != "tags":
            raise RowFault(
                "no prompt",
                "the first token would be a target, but nothing comes before it (no prompt, and a tokenizer without "
                "BOS)",
                next_step="give the row a prompt, or use the format text",
            )
        bos = self.rules.tokenizer.bos_token_id
        if bos is not None and made.tokens[:2] == [bos, bos]:
            raise RowFault(
                "doubled BOS",
                f"the row begins with {self.rules.name(made.tokens[0])} twice",
                next_step="take it out of the data, or out of the chat template",
            )

    def _within_limit(self, made: Marked) -> list[Marked]:
        limit = self.reading.max_length
        match self.overflow:
            case "split":
                return list(_parts(made, limit))
            case "right" if not made.spans:
                return [Marked(made.tokens[:limit], [], None)]
            case "right" if "split" in self.format.overflows:  # plain text has no answer that must be whole
                return [Marked(made.tokens[:limit], _within(made.spans, 0, limit), None)]
            case "right":
                spans = [span for span in made.spans if span[1] <= limit]
                if spans:
                    tags = None if made.tags is None else made.tags[: len(spans)]
                    return [Marked(made.tokens[: spans[-1][1]], spans, tags)]
                raise self._too_long(made, "target cut off", f"its first target ends at token {made.spans[0][1]}")
        raise self._too_long(made, "too long", "data.overflow is error")

    def _too_long(self, made: Marked, kind: str, why: str) -> RowFault:
        limit, longest = self.reading.max_length, self.tally.longest_row
        others = [f"data.overflow: {name}" for name in self.format.overflows if name not in ("error", self.overflow)]
        wanted = f"set train.row_tokens to {longest} or more (the longest row so far)"
        return RowFault(
            kind,
            f"the row has {len(made.tokens)} tokens, the limit is {limit}, and {why}",
            next_step=", or ".join([wanted, *others]),
        )

    def _learns_end(self, made: Marked) -> bool:
        return bool(made.spans) and made.spans[-1][1] == len(made.tokens) and made.tokens[-1] in self.rules.end_ids

    def _stop_at_faults(self) -> None:
        if self.reading.on_bad_row == "error":
            self.faults.raise_first(self.tally.num_rows, next_step=SKIP)

    def check_end_is_learned(self) -> None:
        """Pass where some sequence teaches an end token, or the format's targets are classes.

        Raises:
            DataError: the model would never learn to stop.
        """
        if self.tally.end_learned or self.format.kind in ("label", "tags"):
            return
        why = "all of them were cut" if self.tally.num_cut else "no row ends with one"
        raise DataError(
            f"no end token is learned in any of {self.tally.num_rows} rows ({why}): the model would not learn to stop",
            allowed=f"rows that end with {', '.join(map(self.rules.name, sorted(self.rules.stop_ids)))}",
            next_step="raise train.row_tokens so that some rows fit whole"
            if self.tally.num_cut
            else "write the end token at the end of what is learned",
        )

    def notes(self) -> list[str]:
        """What the log says of the rows."""
        tally, made = self.tally, []
        if tally.unused:
            made.append(f"columns not used: {', '.join(tally.unused)}")
        for note, count in tally.notes.items():
            made.append(f"{note} ({count} of {tally.num_rows} rows, first {tally.first_note[note]})")
        # Generation would run past the end of an answer that ends with a token at which it does not stop.
        unheeded = sorted(tally.last_tokens - self.rules.stop_ids) if self.format.kind not in ("label", "tags") else []
        if unheeded and len(unheeded) <= 4:
            ends, stops = (", ".join(map(self.rules.name, ids)) for ids in (unheeded, sorted(self.rules.stop_ids)))
            made.append(f"answers end with {ends}, but generation of this base stops at {stops} only")
        if tally.num_cut:
            done = "split into several examples" if self.overflow == "split" else "cut at the end"
            over = f"{tally.num_cut} of {tally.num_rows} rows are longer than {self.reading.max_length} tokens"
            made.append(f"{over} and were {done}")
        return made + reason_lines(self.faults.reasons(), tally.num_rows)


def _checked_overflow(chosen: Format, overflow: str | None) -> Overflow:
    if overflow is None:
        return chosen.overflows[0]
    for known in chosen.overflows:
        if known == overflow:
            return known
    reasons = {
        "split": f"rows of the format {chosen.name} cannot be split",
        "right": f"cutting the right end of a {chosen.name} row always cuts its target off",
    }
    raise ConfigError(
        f"data.overflow is {overflow!r}: {reasons.get(overflow, 'no such overflow')}",
        nearest=nearest_names(overflow, chosen.overflows),
        allowed=", ".join(chosen.overflows),
    )


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowFault(
            "not Unicode",
            f"character {error.start} is {error.object[error.start]!a}, half of a surrogate pair and no character",
            next_step="write the file anew with whole characters",
        ) from error


def _within(spans: Sequence[tuple[int, int]], start: int, stop: int) -> list[tuple[int, int]]:
    """The parts of spans that lie in tokens start to stop, counted from start."""
    return [(max(a, start) - start, min(b, stop) - start) for a, b in spans if a < stop and b > start]


def _parts(made: Marked, max_length: int) -> Iterator[Marked]:
    """Runs of at most `max_length` tokens; each begins with the last token of the one before, not learned again."""
    start, last = 0, len(made.tokens) - 1
    while start < last:
        stop = min(start + max_length, last + 1)
        spans = [(max(1, a), b) for a, b in _within(made.spans, start, stop) if b > 1]
        if spans:
            yield Marked(made.tokens[start:stop], spans)
        start = stop - 1


def _count(name: str, writer: ExampleWriter) -> str:
    return (
        f"format {name}: {writer.num_examples:,} examples, {writer.num_trained:,} of {writer.num_tokens:,} tokens are "
        f"learned, the longest example has {writer.longest:,}"
    )
