"""Instructions as Alpaca writes them: instruction, input, output."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from manylora.data.faults import RowFault
from manylora.data.formats.format import Kind, Overflow, Shown, optional_text, shown_completion, text_of
from manylora.data.formats.messages import shown_conversation, with_system

if TYPE_CHECKING:
    from manylora.data.rows import Row
    from manylora.data.tokens import TokenRules

# Source: Taori et al. 2023, Stanford Alpaca, PROMPT_DICT. The line end after "Response:" is ours: an answer encoded
# apart then begins a line, as the same words do in the middle of a text.
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
AS_CONVERSATION = "instructions are shown as a conversation, by the chat template"
AS_WORDED = "instructions are shown in the wording of Alpaca, since the tokenizer has no chat template"


@dataclass(frozen=True, slots=True)
class Alpaca:
    """An instruction, perhaps with an input, and the output that is learned.

    Where the tokenizer has a chat template the row is a conversation: system, the turns of history, then instruction
    and input on a line of their own as the user's message; the answers in history are learned too. Else instruction
    and input are put in the words of the Alpaca paper.
    """

    name: str = "alpaca"
    kind: Kind = "sequence"
    columns: tuple[str, ...] = ("instruction", "output")
    also: tuple[tuple[str, ...], ...] = ()
    optional: tuple[str, ...] = ("input", "system", "history", "tools")
    overflows: tuple[Overflow, ...] = ("error",)

    def fits(self, row: Row) -> bool:
        return "instruction" in row.values and "output" in row.values

    def show(self, row: Row, rules: TokenRules) -> tuple[Shown, ...]:
        return (shown_instruction(row, rules, text_of(row, "output")),)


def shown_instruction(row: Row, rules: TokenRules, answer: str, *, learn_history: bool = True) -> Shown:
    """The instruction of a row and an answer to it, which is learned; a note says how they are shown.

    Raises:
        RowFault: no instruction, or a history or system text that only a chat template could show.
    """
    if rules.tokenizer.chat_template is None:
        shown, note = shown_completion(worded(row), answer, rules), AS_WORDED
    else:
        before = instruction_messages(row)
        turns = [*before, {"role": "assistant", "content": answer}]
        learned_from = 0 if learn_history else len(before)
        shown, note = (
            shown_conversation(turns, rules, learned_from=learned_from, tools=row.values.get("tools")),
            AS_CONVERSATION,
        )
    return replace(shown, notes=(note, *shown.notes))


def instruction_messages(row: Row) -> list[dict[str, Any]]:
    """What comes before the answer, as messages; instruction and input are joined by a line end."""
    said = optional_text(row, "input")
    instruction = text_of(row, "instruction")
    messages = [
        {"role": role, "content": text}
        for turn in _history(row)
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    messages.append({"role": "user", "content": f"{instruction}\n{said}" if said else instruction})
    return with_system(messages, row)


def worded(row: Row) -> str:
    """Instruction and input in the words of the Alpaca paper.

    Raises:
        RowFault: system, history or tools are filled: the wording has no place for them.
    """
    for column in ("system", "history", "tools"):
        if row.values.get(column):
            raise RowFault(
                f"{column} without template",
                f"{column} is filled, but the tokenizer has no chat template to show it with",
                next_step="set data.chat_template to a file with a Jinja template",
            )
    said = optional_text(row, "input")
    instruction = text_of(row, "instruction")
    return (
        WITH_INPUT.format(instruction=instruction, input=said)
        if said
        else WITHOUT_INPUT.format(instruction=instruction)
    )


def _history(row: Row) -> list[tuple[str, str]]:
    history = row.values.get("history")
    if history is None or history == "":
        return []
    if not isinstance(history, (list, tuple)) or not all(
        isinstance(turn, (list, tuple))
        and len(turn) == 2
        and all(isinstance(text, str) and text.strip() for text in turn)
        for turn in history
    ):
        raise RowFault(
            "history broken", f"history is {history!r:.80}", allowed='[["user", "assistant"], ...], no empty text'
        )
    return [(turn[0], turn[1]) for turn in history]


ALPACA = Alpaca()
