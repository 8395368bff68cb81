"""Text while it is being generated."""

from __future__ import annotations

from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Turns a row's tokens into text that can be printed as it comes; the pieces together are the whole text.

    A token may hold part of a character: such text is held back until the character is whole.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start = 0
        self._seen = 0

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        self._tokens.append(token)
        # Decoded together with the tokens before it: alone, a token may lose the space that it begins with.
        before = self._decode(self._start, self._seen)
        now = self._decode(self._start, len(self._tokens))
        if len(now) <= len(before) or now.endswith(UNFINISHED):
            return ""
        self._start, self._seen = self._seen, len(self._tokens)
        return now[len(before) :]

    def close(self) -> str:
        """What is still held back, as the decoder shows it."""
        before = self._decode(self._start, self._seen)
        now = self._decode(self._start, len(self._tokens))
        self._start = self._seen = len(self._tokens)
        return now[len(before) :]

    def _decode(self, start: int, stop: int) -> str:
        return decode_text(self._tokenizer, self._tokens[start:stop])


def decode_text(tokenizer: Any, tokens: list[int]) -> str:
    """The text of tokens, special ones left out, spaces as the tokens have them."""
    text: str = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text
