"""The tokenizer's chat template: what it renders, what it marks as the assistant's, and what it must not drop."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from manylora.data.faults import RowFault

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from manylora.data.conversation import Message

GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
THINK_TAGS = re.compile(r"</?think>")


def rendered(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tools: list[dict[str, Any]] | None = None,
    generation_prompt: bool,
) -> str:
    """The text that the template makes of messages in its shape: the one rendering, for training and for use.

    Raises:
        RowFault: the template refuses them.
    """
    from jinja2 import TemplateError

    try:
        made: Any = tokenizer.apply_chat_template(
            list(messages),
            tools=cast("Any", tools),
            tokenize=False,
            add_generation_prompt=generation_prompt,
        )
        return str(made)
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        roles = ", ".join(str(message["role"]) for message in messages[:8]) + (", ..." if len(messages) > 8 else "")
        raise RowFault("template refuses", f"the chat template refuses the turns {roles}: {error}") from error


def generation_marks(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, tools: list[dict[str, Any]] | None
) -> list[tuple[int, int]] | None:
    """Where the template's own {% generation %} marks stand in the rendered text, in order; None where it has none."""
    template = tokenizer.get_chat_template(None, tools)
    if not _has_marks(template):
        return None
    from transformers.utils import chat_template_utils

    render: Any = chat_template_utils.render_jinja_template
    # `apply_chat_template` gives the marks by token only, which costs the tokens of the whole once more.
    _, marks = render(
        conversations=[list(messages)],
        tools=tools,
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return sorted((start, stop) for start, stop in marks[0] if start < stop)


@lru_cache(maxsize=16)
def _has_marks(template: str) -> bool:
    return GENERATION_MARK.search(template) is not None


def check_all_written(messages: Sequence[Message], text: str) -> None:
    """The text of each message stands in the rendered text, those of user and assistant in their order.

    Of a text with thinking only what follows it is looked for: templates leave out the thinking of earlier turns.

    Raises:
        RowFault: the template drops one.
    """
    place = 0
    for number, message in enumerate(messages, start=1):
        spoken = message["role"] in ("user", "assistant")
        wanted = message["content"].rpartition("</think>")[2].strip()
        stop = _end_of(wanted, text, place if spoken else 0)
        if stop is None:
            raise dropped(f"the text of message {number} ({message['role']}), {wanted!r:.60}")
        place = stop if spoken else place
        _check_calls(message, number, text)


def check_turn_written(message: Message, number: int, text: str) -> None:
    """Everything that is to be learned of one turn stands in its part of the rendered text: thinking, answer and calls.

    Raises:
        RowFault: the template drops it.
    """
    if _end_of(message.get("reasoning_content", "").strip(), text) is None:
        raise dropped(f"the reasoning of message {number}, {message['reasoning_content'].strip()!r:.60}")
    if "</think>" in message["content"] and "</think>" not in text:
        raise dropped(f"the end of the thinking, '</think>', of message {number}")
    place = 0
    for piece in THINK_TAGS.split(message["content"]):
        stop = _end_of(piece.strip(), text, place)
        if stop is None:
            raise dropped(f"text of message {number} (assistant), {piece.strip()!r:.60}")
        place = stop
    _check_calls(message, number, text)


def dropped(what: str) -> RowFault:
    """The fault of a template that does not write what it was given."""
    return RowFault(
        "template drops",
        f"the chat template drops {what}",
        next_step="set data.chat_template to a template that writes it, or take it out of the data",
    )


def _check_calls(message: Message, number: int, text: str) -> None:
    for call in message.get("tool_calls", ()):
        if call["function"]["name"] not in text:
            raise dropped(f"the tool call {call['function']['name']!r} of message {number}")


def _end_of(wanted: str, text: str, start: int = 0) -> int | None:
    """Where `wanted`, as it is or as JSON writes it, first ends in the text; None where it is not there."""
    place = text.find(wanted, start)
    if place >= 0:
        return place + len(wanted)
    for ascii_only in (False, True):
        escaped = json.dumps(wanted, ensure_ascii=ascii_only)[1:-1]
        if (place := text.find(escaped, start)) >= 0:
            return place + len(escaped)
    return None
