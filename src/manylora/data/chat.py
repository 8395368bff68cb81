"""Conversations as tokens, with a mark on what is learned: each assistant turn, from after its header to its end token.

The tokenizer's own template renders everything. It is rendered step by step: what stands before an assistant turn (with
the generation prompt, so exactly what generation will be given) must be a token prefix of the whole conversation, and
so must the conversation up to the turn's end; the tokens between the two are the turn. A template for which this does
not hold (some drop the reasoning of earlier turns) would train on other tokens than generation sees, and is refused.
Where the template has {% generation %} marks of its own, both ways must agree.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from manylora.data.faults import RowFault
from manylora.data.tokens import Marked, TokenRules
from manylora.errors import nearest_names

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Turn:
    """An assistant turn that is learned: the rendered conversation before it (header included) and up to its end."""

    index: int
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation up to its last assistant turn, rendered; `texts` are what the tokenizer must encode for `mark`."""

    messages: list[Message]
    turns: list[Turn]
    rules: TokenRules

    @property
    def texts(self) -> tuple[str, ...]:
        """The whole conversation, then the two renderings of each learned turn."""
        return (self.turns[-1].after, *(text for turn in self.turns for text in (turn.before, turn.after)))

    def mark(self, encoded: Sequence[list[int]]) -> Marked:
        """The tokens of the whole conversation, cut after its last end token; learned: the assistant turns.

        Raises:
            RowFault: the template is not prefix-stable, ends a turn with no end token, or its own marks disagree.
        """
        whole, *partial = encoded
        trained = [False] * len(whole)
        ends = []
        for number, turn in enumerate(self.turns):
            before, after = partial[2 * number], partial[2 * number + 1]
            self._check_prefix(before, whole, turn.index, "before")
            self._check_prefix(after, whole, turn.index, "up to the end of")
            end = self._end_of_turn(whole, len(before), len(after), turn.index)
            trained[len(before) : end + 1] = [True] * (end + 1 - len(before))
            ends.append((end, len(after)))
        if self.rules.tokenizer.is_fast and GENERATION_MARK.search(self.rules.tokenizer.get_chat_template()):
            self._check_marks(whole, trained, ends, len(partial[0]))
        return Marked(whole[: ends[-1][0] + 1], trained[: ends[-1][0] + 1])

    def _check_prefix(self, part: list[int], whole: list[int], turn: int, what: str) -> None:
        if whole[: len(part)] == part:
            return
        place = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(part, whole, strict=False)))
        raise RowFault(
            "unstable template",
            f"the chat template renders the conversation {what} turn {turn + 1} in another way when more turns follow: "
            f"token {place} is {self._shown(part, place)} alone and {self._shown(whole, place)} in the whole",
            next_step="set data.chat_template to a template that never changes what it has already written",
        )

    def _end_of_turn(self, whole: list[int], start: int, stop: int, turn: int) -> int:
        """The place of the turn's end token; only white space may follow it (ChatML writes a line end)."""
        end = next((place for place in range(stop - 1, start - 1, -1) if whole[place] in self.rules.end_ids), None)
        if end is None or self.rules.decode(whole[end + 1 : stop]).strip():
            tail = self.rules.decode(whole[max(start, stop - 4) : stop])
            raise RowFault(
                "no end token",
                f"the chat template ends turn {turn + 1} with {tail!r} and no end token: nothing would teach the stop",
                next_step="set data.chat_template to a template that writes an end token after each assistant turn",
            )
        return end

    def _check_marks(self, whole: list[int], trained: list[bool], ends: list[tuple[int, int]], start: int) -> None:
        rendered: Any = self.rules.tokenizer.apply_chat_template(
            [dict(message) for message in self.messages], return_dict=True, return_assistant_tokens_mask=True
        )
        marks = [bool(mark) for mark in rendered["assistant_masks"]]
        for end, stop in ends:  # white space after the end token is never learned, marked or not
            marks[end + 1 : stop] = [False] * (stop - end - 1)
        # From the first learned turn on: before it the template may mark turns that this row shows only.
        place = next((at for at in range(start, len(whole)) if marks[at] != trained[at]), None)
        if place is not None:
            raise RowFault(
                "marks disagree",
                f"the template's {{% generation %}} marks {'' if marks[place] else 'do not '}cover token {place}, "
                f"{self._shown(whole, place)}, which {'is' if trained[place] else 'is not'} part of an assistant turn",
                allowed="marks around each assistant turn, after its header, its end token included",
                next_step="move the marks in the chat template (data.chat_template)",
            )

    def _shown(self, tokens: list[int], place: int) -> str:
        return repr(self.rules.decode(tokens[place : place + 4])) if place < len(tokens) else "(nothing)"


def render(messages: Any, rules: TokenRules, *, learned_from: int = 0) -> tuple[Conversation, tuple[str, ...]]:
    """A conversation ready to be encoded, and notes on what was left out of it.

    Assistant turns from message `learned_from` on are learned. A first message by the assistant is shown but not
    learned: nothing comes before it that generation could be given.

    Raises:
        RowFault: no template, a message without role or text, no assistant turn, a template that refuses the roles.
    """
    _check_messages(messages)
    if rules.tokenizer.chat_template is None:
        raise RowFault(
            "no template",
            "messages need a chat template, and the tokenizer of this base has none",
            next_step="set data.chat_template to a file with a Jinja template, or use columns prompt and completion",
        )
    assistant = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    learned = [place for place in assistant if place >= max(learned_from, 1)]
    if not learned:
        roles = list(dict.fromkeys(message["role"] for message in messages[learned_from:]))
        raise RowFault(
            "no assistant turn",
            f"the conversation has no assistant turn to learn (roles: {', '.join(roles)})",
            nearest=nearest_names("assistant", roles),
            next_step="give at least one message with the role assistant, after another message",
        )
    for place in learned:
        if not messages[place]["content"].strip():
            raise RowFault("empty turn", f"message {place + 1} is an assistant turn without text")
    kept = list(messages[: learned[-1] + 1])
    notes = []
    if len(kept) < len(messages):
        notes.append("turns after the last assistant turn are left out")
    if 0 in assistant and learned_from == 0:
        notes.append("an assistant turn that opens the conversation is shown but not learned")
    return Conversation(kept, [_turn(kept, place, rules) for place in learned], rules), tuple(notes)


def _turn(messages: list[Message], place: int, rules: TokenRules) -> Turn:
    before = _apply(messages[:place], rules, generation_prompt=True)
    after = _apply(messages[: place + 1], rules, generation_prompt=False)
    content = messages[place]["content"].strip()
    if before == _apply(messages[:place], rules, generation_prompt=False) and after.startswith(before):
        # Nothing was added for generation: right where a turn has no header (Llama 2), else the template forgot it.
        header, found, _ = after[len(before) :].partition(content)
        if found and header.strip():
            raise RowFault(
                "no generation prompt",
                f"the chat template ignores add_generation_prompt, but opens assistant turns with {header.strip()!r}: "
                "the model would be trained to write that header",
                next_step="let the template write the header {% if add_generation_prompt %} (data.chat_template)",
            )
    return Turn(place, before, after)


def _apply(messages: Sequence[Message], rules: TokenRules, *, generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        return str(
            rules.tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=generation_prompt
            )
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise RowFault("template refuses", f"the chat template refuses the conversation: {error}") from error


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise RowFault(
            "no messages", f"messages is {messages!r:.60}", allowed='a list: [{"role": ..., "content": ...}, ...]'
        )
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise RowFault(
                "no message", f"message {number} is {message!r:.60}", allowed="an object with role and content"
            )
        for key in ("role", "content"):
            if key not in message:
                raise RowFault(
                    f"no {key}",
                    f"message {number} has no {key!r} (it has {', '.join(map(str, message)) or 'nothing'})",
                    nearest=nearest_names(key, map(str, message)),
                    allowed="role and content in each message",
                )
            if not isinstance(message[key], str):
                raise RowFault(
                    f"bad {key}", f"message {number}: {key} is {message[key]!r:.60}, not text", allowed="a string"
                )
