"""Conversations as OpenAI writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from manylora.data import chat
from manylora.data.faults import RowFault
from manylora.data.formats.format import Kind, Overflow, Shown, optional_text

if TYPE_CHECKING:
    from manylora.data.rows import Row
    from manylora.data.tokens import TokenRules

WRAPPED = 'tools are shown as {"type": "function", "function": ...}, as requests to a server bring them'


@dataclass(frozen=True, slots=True)
class Messages:
    """A conversation: every assistant turn is learned."""

    name: str = "messages"
    kind: Kind = "sequence"
    columns: tuple[str, ...] = ("messages",)
    also: tuple[tuple[str, ...], ...] = ()
    optional: tuple[str, ...] = ("tools",)
    overflows: tuple[Overflow, ...] = ("error", "right")

    def fits(self, row: Row) -> bool:
        return "messages" in row.values

    def show(self, row: Row, rules: TokenRules) -> tuple[Shown, ...]:
        return (shown_conversation(row.values["messages"], rules, tools=row.values.get("tools")),)


def shown_conversation(messages: Any, rules: TokenRules, *, learned_from: int = 0, tools: Any = None) -> Shown:
    """A conversation; its assistant turns from message `learned_from` on, or of them the last, are targets."""
    tools, wrapped = _wrapped(tools)
    conversation, notes = chat.render(messages, rules, learned_from=learned_from, tools=tools, turns=rules.turns)
    first = conversation.turns[0]
    reference = str(conversation.messages[first.index]["content"] or "")
    notes = (*notes, WRAPPED) if wrapped else notes
    return Shown(conversation.texts, conversation.mark, first.before, reference, group=first.before, notes=notes)


def _wrapped(tools: Any) -> tuple[Any, bool]:
    """Tools as requests to a server bring them, and whether that changed them; what is no list of objects stays."""
    found = tools
    if isinstance(tools, str):
        try:
            found = json.loads(tools)
        except ValueError:
            return tools, False
    found = [found] if isinstance(found, Mapping) else found
    bare = [isinstance(tool, Mapping) and "name" in tool for tool in found] if isinstance(found, list) else []
    if not any(bare):
        return tools, False
    return [
        {"type": "function", "function": tool} if is_bare else tool for tool, is_bare in zip(found, bare, strict=True)
    ], True


def with_system(messages: list[Any], row: Row) -> list[Any]:
    """The messages after the system message that the column `system` holds, if it holds one.

    Raises:
        RowFault: the messages begin with a system message of their own.
    """
    system = optional_text(row, "system")
    if not system:
        return messages
    if isinstance(messages[0], Mapping) and messages[0].get("role") == "system":
        raise RowFault(
            "two system messages",
            "the column system is filled, and the conversation begins with a system message as well",
            next_step="keep one of the two",
        )
    return [{"role": "system", "content": system}, *messages]


MESSAGES = Messages()
