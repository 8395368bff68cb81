"""The tokens of a rendered conversation, with a mark on what is learned: each turn, from after its header to its end.

What stands before an assistant turn (with the generation prompt, so exactly what generation will be given) must be a
token prefix of the whole conversation, and so must the conversation up to the end token of the turn; the tokens between
the two are learned. A template for which this does not hold (some drop the reasoning of earlier turns) would train on
other tokens than generation sees, and is refused. Where the template has {% generation %} marks of its own, both ways
must agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from manylora.data.faults import RowFault
from manylora.data.template import generation_marks
from manylora.data.tokens import Marked, TokenRules

if TYPE_CHECKING:
    from collections.abc import Sequence

    from manylora.data.conversation import Message

Span = tuple[int, int]

LAST_ONLY = "learn the last turn only (data.turns: last)"
STABLE = "set data.chat_template to a template that never changes what it has already written"


@dataclass(frozen=True, slots=True)
class Turn:
    """An assistant turn that is learned: the rendered conversation before it (header included) and up to its end."""

    index: int
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation up to its last learned turn, rendered; `texts` are what the tokenizer must encode for `mark`."""

    messages: list[Message]
    turns: list[Turn]
    rules: TokenRules
    tools: list[dict[str, Any]] | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """The two renderings of each learned turn, each text once; that up to the end of the last is the whole."""
        return tuple(dict.fromkeys(text for turn in self.turns for text in (turn.before, turn.after)))

    def mark(self, encoded: Sequence[list[int]]) -> Marked:
        """The tokens of the whole conversation, cut after its last end token; one span for each learned turn.

        Raises:
            RowFault: the template is not prefix-stable, ends a turn with no end token, or its own marks disagree.
        """
        tokens_of = dict(zip(self.texts, encoded, strict=True))
        whole = self._whole(tokens_of)
        spans: list[Span] = []
        regions: list[Span] = []
        for turn in self.turns:
            before = tokens_of[turn.before]
            after = whole if turn is self.turns[-1] else tokens_of[turn.after]
            self._check_prefix(before, whole, turn, "before")
            end = self._end_of_turn(after, len(before), turn.index)
            # White space after the end token may merge with what follows; generation has stopped by then.
            self._check_prefix(after[: end + 1], whole, turn, "up to the end of")
            spans.append((len(before), end + 1))
            closing = self.rules.decode(after[end + 1 :]).strip()
            regions.append((len(turn.before), len(turn.after.rstrip().removesuffix(closing).rstrip())))
        self._check_marks(whole, spans, regions)
        return Marked(whole[: spans[-1][1]], spans)

    def _whole(self, tokens_of: dict[str, list[int]]) -> list[int]:
        """The tokens of the whole conversation.

        Where the last turn's text merges with the header before it, the turn is encoded apart and joined: generation is
        given the header's own tokens and goes on from there. No turn may follow: a chat renders its history whole.
        """
        last = self.turns[-1]
        before, whole = tokens_of[last.before], tokens_of[last.after]
        if whole[: len(before)] == before:
            return whole
        rest, text = last.after[len(last.before) :], self._exact(whole)
        # After a sign too: tokenizers like SentencePiece put a space before whatever begins a text.
        for sign in ("", "\n", ":"):
            first, following = self.rules.encode([sign, sign + rest])
            joined = [*before, *following[len(first) :]]
            if following[: len(first)] == first and self._exact(joined) == text:
                return joined
        return whole

    def _check_prefix(self, part: list[int], whole: list[int], turn: Turn, what: str) -> None:
        if whole[: len(part)] == part:
            return
        place = first_difference(part, whole)
        raise RowFault(
            "unstable template",
            f"the chat template renders the conversation {what} turn {turn.index + 1} in another way when more "
            f"follows: token {place} is {self._shown(part, place)} alone and {self._shown(whole, place)} in the whole",
            next_step=(f"{LAST_ONLY}, or " if turn is not self.turns[-1] else "") + STABLE,
        )

    def _end_of_turn(self, after: list[int], start: int, turn: int) -> int:
        """The place of the turn's end token: the first at which generation stops, or else the last end token.

        Only white space (ChatML writes a line end) and other end tokens (Phi closes the text too) may follow it.
        """
        tail = len(after)
        while tail > start and (
            after[tail - 1] in self.rules.end_ids or not self.rules.decode([after[tail - 1]]).strip()
        ):
            tail -= 1
        ends = [place for place in range(tail, len(after)) if after[place] in self.rules.end_ids]
        if not ends:
            written = self.rules.decode(after[max(start, len(after) - 4) :])
            raise RowFault(
                "no end token",
                f"the chat template ends turn {turn + 1} with {written!r} and no end token: nothing teaches the stop",
                next_step="set data.chat_template to a template that writes an end token after each assistant turn",
            )
        end = next((place for place in ends if after[place] in self.rules.stop_ids), ends[-1])
        twice = after[end] if after[end] in after[end + 1 :] else None
        stop = next((token for token in after[start:end] if token in self.rules.stop_ids), twice)
        if stop is not None:
            raise RowFault(
                "end token inside",
                f"turn {turn + 1} holds {self.rules.name(stop)}, at which generation stops, before its end",
                next_step="take it out of the text; the chat template writes the end",
            )
        return end

    def _check_marks(self, whole: list[int], spans: list[Span], regions: list[Span]) -> None:
        marks = generation_marks(self.messages, self.rules.tokenizer, self.tools)
        if marks is None:
            return
        text, place = self.turns[-1].after, None
        for (start, stop), span in zip(regions, spans, strict=True):
            inside = [mark for mark in marks if mark[0] < stop and mark[1] > start]
            marks = [mark for mark in marks if mark not in inside]
            if inside and inside[0][0] > start and self._same_token(text, (start, inside[0][0]), whole, span[0]):
                inside[0] = (start, inside[0][1])
            if place is None:
                place = _disagreement(inside, start, stop, text)
        # Turns of the assistant that are shown only may be marked too; nothing else may.
        every = len(self.turns) == sum(message["role"] == "assistant" for message in self.messages)
        if place is None and every and marks:
            place = marks[0][0]
        if place is not None:
            raise RowFault(
                "marks disagree",
                "the template's {% generation %} marks do not cover what generation writes: they differ first at "
                f"character {place}, {text[place : place + 20]!r}",
                allowed="marks around each assistant turn, after its header, its end token included",
                next_step="move the marks in the chat template (data.chat_template)",
            )

    def _same_token(self, text: str, gap: Span, whole: list[int], first: int) -> bool:
        """Whether a gap at the begin of a turn is white space that its first token holds, with the text after it."""
        if text[slice(*gap)].strip() or not self.rules.tokenizer.is_fast:
            return False
        found = self.rules.tokenizer(text, add_special_tokens=False, verbose=False)
        return found["input_ids"][: len(whole)] == whole and found.char_to_token(gap[1]) == first

    def _exact(self, tokens: list[int]) -> str:
        return str(self.rules.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))

    def _shown(self, tokens: list[int], place: int) -> str:
        return repr(self.rules.decode(tokens[place : place + 4])) if place < len(tokens) else "(nothing)"


def first_difference(one: Sequence[object], other: Sequence[object]) -> int:
    """The first place at which two sequences differ, or where the shorter ends."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _disagreement(marks: list[Span], start: int, stop: int, text: str) -> int | None:
    """The first character of a turn at which the marks, in order, do not cover it, or cover more."""
    covered = start
    for mark in marks:
        if mark[0] != covered:
            return min(mark[0], covered)
        covered = mark[1]
    if covered < stop or text[stop:covered].strip():
        return min(covered, stop)
    return None
