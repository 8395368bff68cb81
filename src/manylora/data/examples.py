"""Examples: the tokens of a row, which of them are learned, and what generation is given of them.

A data set that cannot teach what it should is refused here, with file and line: a row in which nothing is learned, a
doubled BOS, an end token that no row teaches, a row longer than the limit.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from manylora.data.faults import Faults, RowFault
from manylora.data.formats import FORMATS, Format, Overflow, Shown, detect, misfit
from manylora.data.tokens import Marked, TokenRules
from manylora.errors import ConfigError, DataError, nearest_names

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from manylora.data.readers import Row


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One sequence. `tokens` (n,) int32; `trained` (n,) bool says which tokens are targets (never the first).

    `prompt_length` counts the tokens before the first target: what generation is given. `prompt` and `reference` are
    the same as text. Examples with the same `group` stay on one side of a split.
    """

    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]
    prompt_length: int
    prompt: str
    reference: str
    group: str
    file: str
    line: int

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_trained(self) -> int:
        """How many tokens are targets."""
        return int(self.trained.sum())


@dataclass(frozen=True, slots=True)
class Encoded:
    """Examples in the order of their rows, the format they were read by, and notes for the log."""

    examples: list[Example]
    format: str
    notes: list[str]


def encode(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    format: str = "auto",  # noqa: A002 - the name of the configuration key
    max_length: int,
    overflow: str | None = None,
    eos_id: int | Sequence[int] | None,
) -> Encoded:
    """Rows as examples of at most `max_length` tokens.

    `eos_id` is appended to what is learned; of several, the first, and a chat turn may end with any. `overflow` says
    what becomes of a longer row: "error"; "right" cuts its end off; "split" (text only) makes several examples of it,
    each beginning with the last token of the one before, so that every token is learned once. None: split for text,
    else error.

    Raises:
        DataError: a row that does not fit the format or teaches nothing; names the first and how many share its fault.
        ConfigError: an overflow that the format does not know. UnknownName: no such format.
    """
    if max_length < 2:
        raise ConfigError(f"rows of {max_length} tokens cannot hold a prompt and a target", allowed="at least 2")
    if not rows:
        raise DataError("there are no rows to encode", next_step="give a data file that holds rows")
    rules = TokenRules.of(tokenizer, eos_id)
    name = detect(rows) if format == "auto" else FORMATS.check(format)
    chosen = FORMATS.get(name)
    how = _checked_overflow(chosen, overflow)
    shown = _show(rows, chosen, rules)
    marked = _mark(rows, shown, rules)
    examples, cut = _fit(rows, shown, marked, rules, how, max_length)
    _check_end_is_learned(examples, rules)
    notes = [f"format {name}: {_count(examples)}"]
    unused = dict.fromkeys(column for row in rows for column in row.values if column not in chosen.columns)
    notes += [f"columns not used: {', '.join(unused)}"] if unused else []
    notes += _row_notes(rows, shown) + _end_notes(marked, rules)
    if cut:
        done = "split into several examples" if how == "split" else "cut at the end"
        notes.append(f"{cut} of {len(rows)} rows are longer than {max_length} tokens and were {done}")
    return Encoded(examples, name, notes)


def _checked_overflow(chosen: Format, overflow: str | None) -> Overflow:
    if overflow is None:
        return chosen.overflows[0]
    for known in chosen.overflows:
        if known == overflow:
            return known
    reason = f"rows of the format {chosen.name} cannot be split" if overflow == "split" else "no such overflow"
    raise ConfigError(
        f"data.overflow is {overflow!r}: {reason}",
        nearest=nearest_names(overflow, chosen.overflows),
        allowed=", ".join(chosen.overflows),
    )


def _show(rows: Sequence[Row], chosen: Format, rules: TokenRules) -> list[Shown]:
    faults, shown = Faults(), []
    for row in rows:
        try:
            if not chosen.fits(row):
                raise misfit(row, chosen)
            shown.append(chosen.show(row, rules))
        except RowFault as fault:
            faults.add(row, fault)
    faults.raise_first(len(rows))
    return shown


def _mark(rows: Sequence[Row], shown: Sequence[Shown], rules: TokenRules) -> list[Marked]:
    encoded = iter(rules.encode([text for one in shown for text in one.texts]))
    faults, marked = Faults(), []
    for row, one in zip(rows, shown, strict=True):
        texts = [next(encoded) for _ in one.texts]
        try:
            made = one.mark(texts)
            _check_marked(made, rules)
            marked.append(made)
        except RowFault as fault:
            faults.add(row, fault)
    faults.raise_first(len(rows))
    return marked


def _check_marked(made: Marked, rules: TokenRules) -> None:
    if not any(made.trained):
        raise RowFault("nothing learned", "no token of this row is learned", next_step="leave the row out, or fill it")
    if made.trained[0]:
        raise RowFault(
            "no prompt",
            "the first token would be a target, but nothing comes before it (no prompt, and a tokenizer without BOS)",
            next_step="give the row a prompt, or use the format text",
        )
    bos = rules.tokenizer.bos_token_id
    if bos is not None and made.tokens[:2] == [bos, bos]:
        raise RowFault(
            "doubled BOS",
            f"the row begins with {rules.name(made.tokens[0])} twice",
            next_step="take it out of the data, or out of the chat template",
        )


def _fit(
    rows: Sequence[Row],
    shown: Sequence[Shown],
    marked: Sequence[Marked],
    rules: TokenRules,
    how: Overflow,
    max_length: int,
) -> tuple[list[Example], int]:
    """Examples within the limit, and how many rows were over it."""
    longest = max(len(made.tokens) for made in marked)
    faults, examples, cut = Faults(), [], 0
    for row, one, made in zip(rows, shown, marked, strict=True):
        if len(made.tokens) <= max_length:
            examples.append(_example(row, one, made, one.reference))
            continue
        cut += 1
        match how:
            case "split":
                parts = _parts(made, max_length)
                examples += [_example(row, one, part, rules.decode(part.tokens)) for part in parts]
            case "right":
                part = Marked(made.tokens[:max_length], made.trained[:max_length])
                if any(part.trained):
                    examples.append(_example(row, one, part, one.reference))
                else:
                    faults.add(row, _too_long(made, max_length, longest, "its first target lies behind the cut"))
            case "error":
                faults.add(row, _too_long(made, max_length, longest, "data.overflow is error"))
    faults.raise_first(len(rows))
    return examples, cut


def _too_long(made: Marked, max_length: int, longest: int, why: str) -> RowFault:
    return RowFault(
        "too long",
        f"the row has {len(made.tokens)} tokens, the limit is {max_length}, and {why}",
        next_step=f"set train.row_tokens to {longest} or more (the longest row), or data.overflow: right",
    )


def _parts(made: Marked, max_length: int) -> Iterator[Marked]:
    """Runs of at most `max_length` tokens; each begins with the last token of the one before, not learned again."""
    start, last = 0, len(made.tokens) - 1
    while start < last:
        stop = min(start + max_length, last + 1)
        yield Marked(made.tokens[start:stop], [False, *made.trained[start + 1 : stop]])
        start = stop - 1


def _example(row: Row, shown: Shown, made: Marked, reference: str) -> Example:
    trained = np.array(made.trained, dtype=np.bool_)
    return Example(
        tokens=np.array(made.tokens, dtype=np.int32),
        trained=trained,
        prompt_length=int(trained.argmax()),
        prompt=shown.prompt,
        reference=reference,
        group=shown.group,
        file=row.file,
        line=row.line,
    )


def _check_end_is_learned(examples: Sequence[Example], rules: TokenRules) -> None:
    if not any(one.trained[-1] and int(one.tokens[-1]) in rules.end_ids for one in examples):
        first = examples[0]
        raise DataError(
            f"{first.file}:{first.line}: no end token is learned in any of {len(examples)} examples, all of them cut: "
            "the model would never learn to stop",
            next_step="raise train.row_tokens so that some rows fit whole",
        )


def _row_notes(rows: Sequence[Row], shown: Sequence[Shown]) -> list[str]:
    counts = Counter(note for one in shown for note in one.notes)
    firsts: dict[str, str] = {}
    for row, one in zip(rows, shown, strict=True):
        for note in one.notes:
            firsts.setdefault(note, row.where)
    return [f"{note} ({count} of {len(rows)} rows, first {firsts[note]})" for note, count in counts.items()]


def _end_notes(marked: Sequence[Marked], rules: TokenRules) -> list[str]:
    """Generation would run past the end of an answer that ends with a token at which it does not stop."""
    unheeded = sorted({made.tokens[-1] for made in marked} - rules.stop_ids)
    if not unheeded:
        return []
    ends, stops = ", ".join(map(rules.name, unheeded)), ", ".join(map(rules.name, sorted(rules.stop_ids)))
    return [f"answers end with {ends}, but generation of this base stops at {stops} only"]


def _count(examples: Sequence[Example]) -> str:
    tokens = sum(len(one) for one in examples)
    trained = sum(one.num_trained for one in examples)
    longest = max(len(one) for one in examples)
    return f"{len(examples)} examples, {trained} of {tokens} tokens are learned, the longest example has {longest}"
