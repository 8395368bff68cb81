"""Tokens as text, piece by piece: the smallest runs of tokens that are whole characters."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manylora.data.example import Example

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
DIRECTIONS = frozenset(map(chr, (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))))
"""Marks that turn the direction of what is written after them: they could make a line show something else."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of tokens and its text; `trained`: one of them is a target; `tags`: the classes that are learned at it.

    Of a special token, and of one that stands for no text, the text is its name in the vocabulary.
    """

    text: str
    tokens: tuple[int, ...]
    trained: bool
    special: bool = False
    tags: tuple[str, ...] = ()


def pieces_of(example: Example, tokenizer: Any) -> list[Piece]:
    """The pieces of an example, in order; together they hold each token once.

    Most tokens are a piece of their own; of a byte-level vocabulary, those that share a character are one.
    """
    tokens, trained = example.tokens.tolist(), example.trained.tolist()
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    tags = iter(example.tags or ())
    tag_of = [next(tags, None) if is_target else None for is_target in trained]
    made = []
    for start, stop, text in _runs(tokens, special, tokenizer):
        run = tokens[start:stop]
        is_special = run[0] in special
        if is_special or not text:
            text = "".join(map(str, tokenizer.convert_ids_to_tokens(run)))
        learned = tuple(tag for tag in tag_of[start:stop] if tag is not None)
        made.append(Piece(text, tuple(run), any(trained[start:stop]), is_special, learned))
    return made


def _runs(tokens: Sequence[int], special: set[int], tokenizer: Any) -> list[tuple[int, int, str]]:
    """(start, stop, text) of each piece; a special token is one by itself, whatever bytes stand open before it."""
    runs: list[tuple[int, int, str]] = []
    window, read, before = 0, 0, ""

    def close(stop: int) -> None:
        nonlocal window, read, before
        # Decoded together with the piece before it: alone, a token may lose the space that it begins with.
        text = _decoded(tokenizer, tokens[window:stop])
        if not text.startswith(before):
            before, text = "", _decoded(tokenizer, tokens[read:stop])
        runs.append((read, stop, text[len(before) :]))
        window, read = read, stop
        before = _decoded(tokenizer, tokens[window:stop])

    for place, token in enumerate(tokens):
        if token in special and read < place:
            close(place)
        whole = not _decoded(tokenizer, tokens[read : place + 1]).endswith(UNFINISHED)
        if whole or token in special or place + 1 == len(tokens):
            close(place + 1)
    return runs


def _decoded(tokenizer: Any, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def harmless(text: str, *, keep: str = "\n\t") -> str:
    """Text without what a terminal would obey: control characters and marks of direction are written as escapes."""
    if text.isprintable():
        return text
    return "".join(
        sign if sign in keep or not (unicodedata.category(sign) == "Cc" or sign in DIRECTIONS) else _escape(sign)
        for sign in text
    )


def _escape(sign: str) -> str:
    return f"\\x{ord(sign):02x}" if ord(sign) < 256 else f"\\u{ord(sign):04x}"
