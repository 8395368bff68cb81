"""Prompts as tokens: bare text as training saw it, and conversations by the tokenizer's own chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from manylora.data import chat
from manylora.data.faults import RowFault
from manylora.data.tokens import TokenRules
from manylora.errors import DataError
from manylora.generation.decode import Generation, generate

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from manylora.base.language import LanguageBase


def encode_prompt(base: LanguageBase, text: str) -> list[int]:
    """The tokens of a bare prompt, exactly as examples of prompt and completion show it: no template, no end token."""
    # The end of text is not asked for here, so a base that has none may still be given a prompt.
    rules = TokenRules.of(base.tokenizer, base.eos_ids or (base.pad_id,))
    return [*rules.front, *rules.encode([text])[0]]


def render_conversation(tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> list[int]:
    """The tokens of a conversation, up to where the assistant's next turn begins: rendered as training renders it.

    Raises:
        DataError: the tokenizer has no chat template, a message cannot be read, or the template refuses the turns.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "this base has no chat template, so it cannot hold a conversation",
            next_step="give one with data.chat_template, or use `manylora generate`, which needs none",
        )
    try:
        return chat.prompt_tokens(list(messages), tokenizer, tools)
    except RowFault as fault:
        raise DataError(fault.what, nearest=fault.nearest, allowed=fault.allowed, next_step=fault.next_step) from fault


def answered(tokenizer: Any, messages: Sequence[Mapping[str, Any]], text: str, tools: Any = None) -> str:
    """The content of an assistant turn that was generated as `text`.

    A template may write white space before the content; what was generated then begins with it, and would have it twice
    when the turn is rendered again.
    """
    num_spaces = len(text) - len(text.lstrip())
    if num_spaces in (0, len(text)):
        return text
    before = chat.rendered_turns(messages, tokenizer, tools, generation_prompt=True)
    for content in (text[start:] for start in range(num_spaces + 1)):
        turns = [*messages, {"role": "assistant", "content": content}]
        try:
            again = chat.rendered_turns(turns, tokenizer, tools, generation_prompt=False)
        except RowFault:
            break  # said when the next turn is asked for; the answer is given all the same
        if again.startswith(before + text):
            return content
    return text


class Conversation:
    """The turns so far between a user and one slot of a base (-1: the bare base)."""

    def __init__(self, base: LanguageBase, *, slot: int = -1, system: str | None = None):
        self.base = base
        self.slot = slot
        self.messages: list[dict[str, str]] = []
        if system:
            self.messages.append({"role": "system", "content": system})

    def ask(
        self,
        text: str,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        on_token: Callable[[int], object] | None = None,
    ) -> Generation:
        """The assistant's answer to one more turn of the user; both turns are kept for the next one.

        Raises:
            DataError: no chat template, or this turn alone leaves no room for an answer.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            (answer,) = generate(
                self.base,
                [render_conversation(self.base.tokenizer, self.messages)],
                slots=[self.slot],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seeds=[seed + len(self.messages)],  # another stream each turn, so an answer's draws are not repeated
                on_token=None if on_token is None else lambda _, token: on_token(token),
            )
        except BaseException:
            self.messages.pop()  # a turn that got no answer is not part of the conversation
            raise
        content = answered(self.base.tokenizer, self.messages, answer.text)
        self.messages.append({"role": "assistant", "content": content})
        return answer

    def make_room(self, text: str, *, max_new_tokens: int) -> int:
        """Forget the oldest exchanges until `text` and an answer to it fit; how many were forgotten.

        The system's turn stays. Where not even the bare turn fits, all exchanges are forgotten and `ask` says so.
        """
        forgotten = 0
        if self.base.max_positions is None:
            return forgotten
        first = 1 if self.messages and self.messages[0]["role"] == "system" else 0
        while len(self.messages) > first:
            turns = [*self.messages, {"role": "user", "content": text}]
            if len(render_conversation(self.base.tokenizer, turns)) + max_new_tokens <= self.base.max_positions:
                break
            del self.messages[first : first + 2]
            forgotten += 1
        return forgotten
