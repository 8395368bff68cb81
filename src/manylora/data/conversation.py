"""Messages as other tools write them, brought into the one shape that chat templates read: for training and for use.

Text in parts is joined, arguments of tool calls become objects, reasoning gets every name that templates read, and what
says whether a turn is learned is taken out. Nothing is guessed: what cannot be brought into shape is a fault.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from manylora.data.faults import RowFault
from manylora.errors import nearest_names

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
CONTROLS = ("weight", "loss", "train", "loss_weight", "loss_scale")
"""Names under which other tools say whether an assistant turn is learned."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names under which templates and other tools know what is thought before the answer."""
READ = frozenset({"role", "content", "tool_calls", "tool_call_id", "name", *CONTROLS, *REASONING})


@dataclass(frozen=True, slots=True)
class Talk:
    """Messages and tools as templates read them; `learned` says for each message what its row asks (None: nothing)."""

    messages: list[Message]
    learned: list[bool | None]
    tools: list[dict[str, Any]] | None
    notes: tuple[str, ...]


def normalised(messages: Any, tools: Any = None) -> Talk:
    """Messages in the shape that templates read.

    Raises:
        RowFault: no list of messages, a role that is mistyped, content that is no text, a tool call without a name or
            with arguments that are no object, a weight that is neither 0 nor 1, tools that are no list of objects.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise RowFault(
            "no messages", f"messages is {messages!r:.60}", allowed='a list: [{"role": ..., "content": ...}, ...]'
        )
    made, learned, unread = [], [], set()
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise RowFault(
                "no message", f"message {number} is {message!r:.60}", allowed="an object with role and content"
            )
        # Tables fill the keys that other rows have with None.
        given = {str(key): value for key, value in message.items() if value is not None}
        made.append(_normalised(given, number))
        learned.append(_asked(given, number))
        unread |= {key for key, value in given.items() if key not in READ and value not in ("", [], {})}
    notes = (f"keys of messages that only the chat template may read: {', '.join(sorted(unread))}",) if unread else ()
    return Talk(made, learned, _tools(tools), notes)


def _normalised(given: Message, number: int) -> Message:
    role = _role(given, number)
    made: Message = {"role": role, "content": _content(given, number)}
    for key in ("tool_calls", "function_call", *REASONING):
        if given.get(key) and role != "assistant":
            raise RowFault(f"{key} not the assistant's", f"message {number} of the role {role} has {key!r}")
    if given.get("function_call"):
        raise RowFault(
            "function_call",
            f"message {number} calls its tool by 'function_call', which templates do not read",
            next_step='write it as tool_calls: [{"type": "function", "function": {"name": ..., "arguments": {...}}}]',
        )
    if calls := given.get("tool_calls"):
        if not isinstance(calls, (list, tuple)):
            raise RowFault("bad tool_calls", f"message {number}: tool_calls is {calls!r:.60}", allowed="a list")
        made["tool_calls"] = [_tool_call(call, number) for call in calls]
    if reasoning := _reasoning(given, number):
        made |= dict.fromkeys(REASONING, reasoning)
    taken = {"tool_calls", *CONTROLS, *REASONING}
    return made | {key: value for key, value in given.items() if key not in made and key not in taken}


def _role(given: Message, number: int) -> str:
    if "role" not in given:
        raise _missing("role", given, number)
    role = given["role"]
    if not isinstance(role, str):
        raise RowFault("bad role", f"message {number}: role is {role!r:.60}, not text", allowed="a string")
    # Other names (developer, ipython) are the template's business; one that is nearly ours is a slip.
    near = difflib.get_close_matches(role.strip().lower(), ROLES, n=1, cutoff=0.75)
    if role not in ROLES and near:
        raise RowFault("mistyped role", f"message {number} has the role {role!r}", nearest=near)
    return role


def _content(given: Message, number: int) -> str:
    content = given.get("content")
    if content is None:
        if given.get("tool_calls"):
            return ""  # not left out: many templates add it to other text
        raise _missing("content", given, number)
    if isinstance(content, (list, tuple)):
        return "".join(_part(part, number) for part in content)
    if not isinstance(content, str):
        raise RowFault(
            "not text", f"message {number}: content is {content!r:.60}, not text", allowed="a string, or text parts"
        )
    return content


def _part(part: Any, number: int) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text":
        texts = [part[key] for key in ("text", "value") if isinstance(part.get(key), str)]
        if len(texts) == 1:
            return texts[0]
    kind = part.get("type") if isinstance(part, Mapping) else None
    shown = f"type {kind!r}" if kind not in (None, "text") else f"{part!r:.60}"
    raise RowFault(
        "not text",
        f"message {number} has a part that is not text: {shown}",
        allowed='text parts only: {"type": "text", "text": ...}',
        next_step="leave such rows out: a language model is taught text only",
    )


def _missing(key: str, given: Message, number: int) -> RowFault:
    return RowFault(
        f"no {key}",
        f"message {number} has no {key!r} (it has {', '.join(given) or 'nothing'})",
        nearest=nearest_names(key, [name for name in given if name not in READ]),
        allowed="role and content in each message; content may be missing only beside tool_calls",
    )


def _asked(given: Message, number: int) -> bool | None:
    """Whether the message says that it is learned; None where it says nothing."""
    said: dict[str, bool] = {}
    for key in CONTROLS:
        value = given.get(key)
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise RowFault(
                "bad weight",
                f"message {number}: {key} is {value!r:.60}",
                allowed="0 or false (the turn is shown, not learned), 1 or true (it is learned)",
                next_step="leave the message out, or round the weight: a turn cannot be learned in part",
            )
        said[key] = bool(value)
    if len(set(said.values())) > 1:
        shown = ", ".join(f"{key} {given[key]!r}" for key in said)
        raise RowFault("weights disagree", f"message {number} says both that it is learned and that it is not: {shown}")
    asked = next(iter(said.values()), None)
    if asked and given["role"] != "assistant":
        raise RowFault(
            "weight not the assistant's",
            f"message {number} of the role {given['role']} has {next(iter(said))} {given[next(iter(said))]!r}",
            allowed="only turns of the assistant are learned; 0 or false elsewhere",
        )
    return asked


def _reasoning(given: Message, number: int) -> str:
    texts = {key: given[key] for key in REASONING if given.get(key)}
    for key, text in texts.items():
        if not isinstance(text, str):
            raise RowFault("bad reasoning", f"message {number}: {key} is {text!r:.60}, not text", allowed="a string")
    if len(set(texts.values())) > 1:
        raise RowFault("reasoning disagrees", f"message {number} has different texts in {', '.join(texts)}")
    return next(iter(texts.values()), "")


def _tool_call(call: Any, number: int) -> Message:
    function = call.get("function") if isinstance(call, Mapping) else None
    function = call if function is None else function
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise RowFault(
            "bad tool call",
            f"message {number}: a tool call without a name: {call!r:.80}",
            allowed='{"type": "function", "function": {"name": ..., "arguments": {...}}}, or name and arguments alone',
        )
    if call.get("type", "function") not in ("function", None):
        raise RowFault("bad tool call", f"message {number}: a tool call of the type {call['type']!r}: {name}")
    arguments = _object(function.get("arguments"))
    if arguments is None:
        raise RowFault(
            "bad tool call",
            f"message {number}: the arguments of {name} are {function.get('arguments')!r:.60}",
            allowed="an object, or JSON text of one ({} where there are none)",
        )
    outer = {} if function is call else {key: value for key, value in call.items() if key not in ("type", "function")}
    inner = {key: value for key, value in function.items() if key not in ("type", "id")}
    named = {"id": function["id"]} if function is call and function.get("id") is not None else {}
    outer = {key: value for key, value in outer.items() if value is not None}
    return {"type": "function", **named, **outer, "function": {**inner, "name": name, "arguments": arguments}}


def _object(value: Any) -> dict[str, Any] | None:
    """An object, or what JSON text of an object holds: templates write `arguments | tojson`, which would quote text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return dict(value) if isinstance(value, Mapping) else None


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    given = tools
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError:
            raise RowFault("bad tools", f"tools is no JSON: {given!r:.60}", allowed="a list of JSON schemas") from None
    if tools is None or (isinstance(tools, (list, tuple)) and not tools):
        return None
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) and tool for tool in tools):
        raise RowFault("bad tools", f"tools is {given!r:.60}", allowed="a list of JSON schemas, or JSON text of one")
    return [dict(tool) for tool in tools]
