"""An answer and whether it is good, as KTO learns from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from manylora.data.faults import RowFault
from manylora.data.formats.alpaca import shown_instruction
from manylora.data.formats.format import Kind, Overflow, Shown, has_columns, is_truth, text_of, truth_of
from manylora.data.formats.messages import shown_conversation
from manylora.data.formats.prompt_completion import PROMPT_COMPLETION
from manylora.data.formats.sharegpt import conversation_of

if TYPE_CHECKING:
    from manylora.data.rows import Row
    from manylora.data.tokens import TokenRules

BODIES = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"))
JUDGEMENTS = ("label", "kto_tag", "desirable")


@dataclass(frozen=True, slots=True)
class Unpaired:
    """An answer, which is learned, and whether it is good; in a conversation the last message is that answer."""

    name: str = "unpaired"
    kind: Kind = "unpaired"
    columns: tuple[str, ...] = ("prompt", "completion", "label")
    also: tuple[tuple[str, ...], ...] = tuple(
        (*body, judgement)
        for body in (BODIES[2], BODIES[0], BODIES[1], BODIES[3])
        for judgement in JUDGEMENTS
        if (body, judgement) != (BODIES[2], "label")
    )
    optional: tuple[str, ...] = (
        "messages", "conversations", "instruction", "output", "input", "system", "history", "tools", "kto_tag",
        "desirable",
    )  # fmt: skip
    overflows: tuple[Overflow, ...] = ("error",)

    def fits(self, row: Row) -> bool:
        # A label of words or of other numbers is a class, which many data sets hold beside a prompt or a conversation.
        judgements = [row.values[name] for name in JUDGEMENTS if name in row.values]
        return has_columns(row, self.columns, *self.also) and all(
            value is None or is_truth(value) for value in judgements
        )

    def show(self, row: Row, rules: TokenRules) -> tuple[Shown, ...]:
        judgement = _judgement(row)
        good = truth_of(row.values.get(judgement), judgement)
        return (replace(_shown(row, rules), label="true" if good else "false"),)


def _judgement(row: Row) -> str:
    found = [name for name in JUDGEMENTS if row.values.get(name) is not None]
    if len(found) > 1:
        raise RowFault(
            "several labels",
            f"{' and '.join(found)} may both say whether the answer is good",
            next_step="leave one of the columns out of the file",
        )
    return found[0] if found else next((name for name in JUDGEMENTS if name in row.values), "label")


def _shown(row: Row, rules: TokenRules) -> Shown:
    bodies = [columns for columns in BODIES if has_columns(row, columns)] or BODIES[:1]
    # Of columns that a table filled with null the row holds nothing.
    body = next((columns[0] for columns in bodies if row.values.get(columns[0]) is not None), bodies[0][0])
    if body in ("messages", "conversations"):
        messages: Any = row.values.get("messages") if body == "messages" else conversation_of(row)
        last = messages[-1] if isinstance(messages, (list, tuple)) and messages else None
        if isinstance(last, Mapping) and last.get("role", "assistant") != "assistant":
            raise RowFault(
                "no answer", f"the last message is from {last['role']!r}: there is no answer that the label judges"
            )
        learned_from = len(messages) - 1 if last is not None else 0
        return shown_conversation(messages, rules, learned_from=learned_from, tools=row.values.get("tools"))
    if body == "prompt":
        return PROMPT_COMPLETION.show(row, rules)[0]
    return shown_instruction(row, rules, text_of(row, "output"), learn_history=False)


UNPAIRED = Unpaired()
