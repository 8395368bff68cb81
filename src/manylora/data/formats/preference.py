"""A prompt with a chosen and a rejected answer, as DPO and reward models learn from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from manylora.data.faults import RowFault
from manylora.data.formats.alpaca import instruction_messages, shown_instruction
from manylora.data.formats.format import Kind, Overflow, Shown, checked_text, has_columns, shown_completion, text_of
from manylora.data.formats.messages import shown_conversation, with_system
from manylora.data.formats.sharegpt import as_messages

if TYPE_CHECKING:
    from manylora.data.rows import Row
    from manylora.data.tokens import TokenRules

Messages = list[dict[str, Any]]

PROMPTS = ("prompt", "instruction", "conversations", "messages")
ANSWERS = ("chosen", "rejected")
TURN, ANSWER = "\n\nHuman:", "\n\nAssistant:"  # as Anthropic's data write a conversation in one text

REPEATED = "chosen and rejected begin with the messages of the prompt: these are shown once"
PROMPT_TWICE = "chosen and rejected begin with the text of the prompt: it stands there twice"
GOES_ON = "an answer goes on with a turn of Human, which is learned too"


@dataclass(frozen=True, slots=True)
class Preference:
    """A chosen and a rejected answer to one prompt; of each, the answer is learned or scored.

    The prompt is a column of its own, or what chosen and rejected have in common: the first messages of two
    conversations, or two texts up to their last common "\\n\\nAssistant:". Two texts are joined as they are; as soon as
    a prompt or an answer is made of messages, all of it is shown by the chat template.
    """

    name: str = "preference"
    kind: Kind = "preference"
    columns: tuple[str, ...] = ANSWERS
    also: tuple[tuple[str, ...], ...] = (
        ("messages", "rejected_response"),
        ("messages", "rejected_messages"),
        ("response", "rejected_response"),
    )
    optional: tuple[str, ...] = (
        *PROMPTS, "query", "input", "system", "history", "tools", "response", "rejected_response", "rejected_messages",
    )  # fmt: skip
    overflows: tuple[Overflow, ...] = ("error",)

    def fits(self, row: Row) -> bool:
        return has_columns(row, self.columns, *self.also)

    def show(self, row: Row, rules: TokenRules) -> tuple[Shown, ...]:
        row = _ordinary(row)
        for column in ANSWERS:
            value = row.values.get(column)
            if not isinstance(value, (str, list, tuple, Mapping)):
                raise RowFault(
                    f"{column} no answer",
                    f"{column} is {value!r:.60}",
                    allowed="text, a message, or a list of messages",
                )
        source = next((column for column in PROMPTS if row.values.get(column) is not None), None)
        plain = all(isinstance(row.values[column], str) for column in ANSWERS)
        if plain and source == "instruction":
            chosen, rejected = _answer_texts(row)
            shown = [shown_instruction(row, rules, text, learn_history=False) for text in (chosen, rejected)]
            notes: list[str] = []
        elif plain and (source is None or isinstance(row.values[source], str)):
            prompt, chosen, rejected, notes = _plain(row, source, rules)
            shown = [shown_completion(prompt, text, rules) for text in (chosen, rejected)]
        else:
            messages, chosen, rejected, notes = _conversations(row, source)
            shown = [
                shown_conversation(
                    [*messages, *answer], rules, learned_from=len(messages), tools=row.values.get("tools")
                )
                for answer in (chosen, rejected)
            ]
        others = [column for column in PROMPTS if column != source and row.values.get(column) is not None]
        if others:
            notes.append(f"the prompt is taken from {source}, not from {' or '.join(others)}")
        # What is said of a row is said once.
        first = (*notes, *shown[0].notes)
        second = tuple(note for note in shown[1].notes if note not in first)
        return replace(shown[0], variant="chosen", notes=first), replace(shown[1], variant="rejected", notes=second)


def _ordinary(row: Row) -> Row:
    """A row with chosen and rejected, where it was written with swift's rejected_response or rejected_messages."""
    values = dict(row.values)
    if "chosen" in values:
        return row
    if "rejected_messages" in values:
        values["chosen"], values["rejected"] = values.pop("messages", None), values.pop("rejected_messages")
    elif "response" in values:
        values["chosen"], values["rejected"] = values.pop("response"), values.pop("rejected_response", None)
    else:
        messages = values.get("messages")
        if not isinstance(messages, (list, tuple)) or len(messages) < 2:
            raise RowFault(
                "no answer",
                f"messages is {messages!r:.60}: the last of them should be the chosen answer",
                allowed="at least a message of the user and one of the assistant",
            )
        values["messages"], values["chosen"] = list(messages[:-1]), [messages[-1]]
        values["rejected"] = values.pop("rejected_response", None)
    if "query" in values:
        values["instruction"] = values.pop("query")
    return replace(row, values=values)


def _answer_texts(row: Row) -> tuple[str, str]:
    chosen, rejected = (text_of(row, column) for column in ANSWERS)
    _check_unlike(chosen, rejected)
    return chosen, rejected


def _check_unlike(chosen: Any, rejected: Any) -> None:
    if chosen == rejected:
        raise RowFault(
            "chosen is rejected",
            "chosen and rejected are the same, so there is nothing to prefer",
            next_step="leave the row out",
        )


def _plain(row: Row, source: str | None, rules: TokenRules) -> tuple[str, str, str, list[str]]:
    """Prompt, chosen and rejected of two texts."""
    if row.values.get("system"):
        raise RowFault(
            "system beside text",
            "system is filled, but prompt and answers are plain text, which has no place for it",
            next_step="name the prompt column instruction (data.columns: {instruction: YOUR_COLUMN}), so that the row "
            "is shown by the chat template",
        )
    chosen, rejected = _answer_texts(row)
    notes = []
    if source is None:
        prompt = _common_text(chosen, rejected)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        if TURN in chosen or TURN in rejected:
            notes.append(GOES_ON)
    else:
        # Without a BOS something must come before the first target.
        prompt = text_of(row, source, may_be_empty=rules.front_bos is not None)
        if prompt.strip() and chosen.startswith(prompt) and rejected.startswith(prompt):
            notes.append(PROMPT_TWICE)
    return prompt, chosen, rejected, notes


def _common_text(chosen: str, rejected: str) -> str:
    common = chosen[: _num_common(chosen, rejected)]
    place = common.rfind(ANSWER)
    prompt = common[: place + len(ANSWER)]
    if place < 0 or "Human:" not in prompt:
        raise RowFault(
            "no prompt",
            "there is no prompt column, and chosen and rejected have no common beginning that ends with "
            f"{ANSWER!r} after 'Human:'",
            allowed=f"a column {', '.join(PROMPTS[:-1])} or {PROMPTS[-1]}",
            next_step="name the column that holds the prompt, data.columns: {prompt: YOUR_COLUMN}",
        )
    for column, text in (("chosen", chosen), ("rejected", rejected)):
        if not text[len(prompt) :].strip():
            raise RowFault(f"{column} empty", f"{column} has no answer after the last common {ANSWER!r}")
    return prompt


def _conversations(row: Row, source: str | None) -> tuple[Messages, Messages, Messages, list[str]]:
    """The messages of the prompt, of chosen and of rejected."""
    chosen, rejected = (_answer(row.values[column], column) for column in ANSWERS)
    _check_unlike(chosen, rejected)
    given = None if source is None else row.values[source]
    whole = [answer[0].get("role") != "assistant" for answer in (chosen, rejected)]
    notes = []
    if source is None or (source == "prompt" and isinstance(given, str) and all(whole)):
        prompt = _common_messages(chosen, rejected)
        if isinstance(given, str) and not any(message.get("content") == given for message in prompt):
            raise RowFault(
                "another prompt",
                f"prompt is {given!r:.60}, and no message that chosen and rejected begin with says that",
                next_step="leave the column prompt out of the file, if chosen and rejected are whole conversations",
            )
        cut = len(prompt)
    else:
        prompt = _given_messages(row, source, given)
        cut = len(prompt) if chosen[: len(prompt)] == rejected[: len(prompt)] == prompt else 0
        notes = [REPEATED] if cut else []
    chosen, rejected = chosen[cut:], rejected[cut:]
    for column, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer or answer[0].get("role") != "assistant":
            found = f"goes on with a message from {answer[0].get('role')!r}" if answer else "has no message"
            raise RowFault(
                "no answer",
                f"after the prompt {column} {found}",
                allowed="an answer: a message from the assistant first",
            )
    return (prompt if source == "instruction" else with_system(prompt, row)), chosen, rejected, notes


def _answer(value: Any, column: str) -> Messages:
    if isinstance(value, str):
        return [{"role": "assistant", "content": checked_text(value, column)}]
    return as_messages(value, column)


def _given_messages(row: Row, source: str, given: Any) -> Messages:
    if source == "instruction":
        return instruction_messages(row)
    if source == "prompt" and isinstance(given, str):
        return [{"role": "user", "content": checked_text(given, source)}]
    return as_messages(given, source)


def _common_messages(chosen: Messages, rejected: Messages) -> Messages:
    count = _num_common(chosen, rejected)
    if not count:
        raise RowFault(
            "no prompt",
            "there is no prompt column, and chosen and rejected do not begin with the same message",
            allowed=f"a column {', '.join(PROMPTS[:-1])} or {PROMPTS[-1]}",
            next_step="name the column that holds the prompt, data.columns: {prompt: YOUR_COLUMN}",
        )
    return chosen[:count]


def _num_common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many signs or messages both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


PREFERENCE = Preference()
