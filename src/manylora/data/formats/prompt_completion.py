"""A prompt and its completion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from manylora.data.faults import RowFault
from manylora.data.formats.format import Kind, Overflow, Shown, shown_completion, text_of
from manylora.data.formats.messages import shown_conversation

if TYPE_CHECKING:
    from manylora.data.rows import Row
    from manylora.data.tokens import TokenRules


@dataclass(frozen=True, slots=True)
class PromptCompletion:
    """A prompt and what should follow it: two strings, encoded apart and joined, or two lists of messages."""

    name: str = "prompt-completion"
    kind: Kind = "sequence"
    columns: tuple[str, ...] = ("prompt", "completion")
    also: tuple[tuple[str, ...], ...] = ()
    optional: tuple[str, ...] = ("tools",)
    overflows: tuple[Overflow, ...] = ("error",)

    def fits(self, row: Row) -> bool:
        return "prompt" in row.values and "completion" in row.values

    def show(self, row: Row, rules: TokenRules) -> tuple[Shown, ...]:
        prompt, completion = row.values["prompt"], row.values["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            turns = [*prompt, *completion]
            return (shown_conversation(turns, rules, learned_from=len(prompt), tools=row.values.get("tools")),)
        if isinstance(prompt, list) or isinstance(completion, list):
            raise RowFault(
                "mixed",
                "one of prompt and completion is a list and the other is not",
                allowed="two strings, or two lists",
            )
        # Without a BOS something must come before the first target.
        prompt = text_of(row, "prompt", may_be_empty=rules.front_bos is not None)
        return (shown_completion(prompt, text_of(row, "completion"), rules),)


PROMPT_COMPLETION = PromptCompletion()
