"""Conversations as ShareGPT writes them: from and value; also swift's pairs of human and assistant."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from manylora.data.faults import RowFault
from manylora.data.formats.format import Kind, Overflow, Shown, checked_text
from manylora.data.formats.messages import shown_conversation, with_system
from manylora.errors import nearest_names

if TYPE_CHECKING:
    from manylora.data.rows import Row
    from manylora.data.tokens import TokenRules

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}
"""Who speaks, as data sets write it, and as chat templates do."""

CALLS = ("function_call", "tool_call")
SHAPES = '{"from": ..., "value": ...}, {"role": ..., "content": ...} or {"human": ..., "assistant": ...}'


@dataclass(frozen=True, slots=True)
class ShareGPT:
    """A conversation of {from, value}: what gpt says and the functions that it calls are learned."""

    name: str = "sharegpt"
    kind: Kind = "sequence"
    columns: tuple[str, ...] = ("conversations",)
    also: tuple[tuple[str, ...], ...] = (("conversation",),)
    optional: tuple[str, ...] = ("conversation", "system", "tools")
    overflows: tuple[Overflow, ...] = ("error", "right")

    def fits(self, row: Row) -> bool:
        return any(isinstance(row.values.get(column), (list, tuple)) for column in ("conversations", "conversation"))

    def show(self, row: Row, rules: TokenRules) -> tuple[Shown, ...]:
        return (shown_conversation(conversation_of(row), rules, tools=row.values.get("tools")),)


def conversation_of(row: Row) -> list[dict[str, Any]]:
    """The messages of the column conversations or conversation, after what the column system says.

    Raises:
        RowFault: a turn that says nothing or comes from nobody known.
    """
    column = "conversations" if "conversations" in row.values else "conversation"
    return with_system(as_messages(row.values.get(column), column), row)


def as_messages(turns: Any, column: str) -> list[dict[str, Any]]:
    """Turns of any of the three shapes as messages of {role, content}; other keys, such as weights, are kept.

    Raises:
        RowFault: no turns, or a turn of another shape, from nobody known or that says nothing.
    """
    turns = [turns] if isinstance(turns, Mapping) else turns
    if not isinstance(turns, (list, tuple)) or not turns:
        raise RowFault(f"{column} no turns", f"{column} is {turns!r:.60}", allowed=f"a list of {SHAPES}")
    return [message for number, turn in enumerate(turns, 1) for message in _messages(turn, f"{column}, turn {number}")]


def _messages(turn: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(turn, Mapping):
        raise RowFault("no turn", f"{where} is {turn!r:.60}", allowed=SHAPES)
    turn = {key: value for key, value in turn.items() if value is not None}  # tables fill what a turn lacks with null
    if "from" in turn and "value" in turn:
        return [_from_value(turn, where)]
    if "role" in turn:
        # What a message may hold beside its role is known where conversations are rendered.
        role = turn["role"]
        return [{**turn, "role": ROLES.get(role, role) if isinstance(role, str) and role not in CALLS else role}]
    if "human" in turn and "assistant" in turn:
        return [
            {"role": role, "content": _said(turn[who], f"{where}, {who}")}
            for who, role in (("human", "user"), ("assistant", "assistant"))
        ]
    known = ("from", "value", "role", "content", "human", "assistant")
    raise RowFault(
        "no turn",
        f"{where} has {', '.join(map(str, turn)) or 'nothing'}",
        nearest=[name for key in turn if key not in known for name in nearest_names(str(key), known, 1)],
        allowed=SHAPES,
    )


def _from_value(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    speaker, value = turn["from"], turn["value"]
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise RowFault(
            "unknown speaker",
            f"{where} is from {speaker!r}",
            nearest=nearest_names(speaker, ROLES) if isinstance(speaker, str) else (),
            allowed=", ".join(ROLES),
        )
    kept = {key: of_turn for key, of_turn in turn.items() if key not in ("from", "value")}
    if speaker in CALLS:
        return {"role": "assistant", "content": "", "tool_calls": _calls(value, where), **kept}
    role = ROLES[speaker]
    return {"role": role, "content": _said(value, f"{where} ({speaker})", may_be_empty=role == "tool"), **kept}


def _said(value: Any, where: str, *, may_be_empty: bool = False) -> str:
    try:
        return checked_text(value, where, may_be_empty=may_be_empty)
    except RowFault as fault:
        raise RowFault("turn without text", fault.what, allowed=fault.allowed, next_step=fault.next_step) from fault


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """The functions that a turn calls: its value is {name, arguments} or a list of them, mostly as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise RowFault("broken call", f"{where} calls a function, but its value is no JSON: {error}") from error
    calls = [value] if isinstance(value, Mapping) else value
    if not isinstance(calls, list) or not calls:
        raise RowFault("broken call", f"{where} calls {value!r:.60}", allowed='{"name": ..., "arguments": {...}}')
    for call in calls:
        missing = [key for key in ("name", "arguments") if not isinstance(call, Mapping) or key not in call]
        if missing or not isinstance(call["name"], str) or not isinstance(call["arguments"], (Mapping, str)):
            fault = f"has no {' and no '.join(missing)}" if missing else "is malformed"
            raise RowFault(
                "broken call",
                f"{where}: the call {call!r:.60} {fault}",
                allowed='{"name": "text", "arguments": {...}}, the arguments as an object or as JSON text',
            )
    return [{"type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}} for call in calls]


SHAREGPT = ShareGPT()
