"""Conversations rendered by the tokenizer's template: for training turn by turn, for generation up to the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from manylora.data import template
from manylora.data.conversation import Message, Talk, normalised
from manylora.data.faults import RowFault
from manylora.data.tokens import TokenRules
from manylora.data.turns import STABLE, Conversation, Turn, first_difference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turns = Literal["all", "last"]
Tools = list[dict[str, Any]] | None

STAND_IN = "An answer."


def render(
    messages: Any, rules: TokenRules, *, learned_from: int = 0, tools: Any = None, turns: Turns = "all"
) -> tuple[Conversation, tuple[str, ...]]:
    """A conversation ready to be encoded, and notes on what was left out of it.

    Assistant turns from message `learned_from` on are learned, or only the last of them, but none whose message says
    that it is not. A first message by the assistant is shown but not learned: nothing comes before it that generation
    could be given.

    Raises:
        RowFault: messages that cannot be brought into shape, no template, no assistant turn to learn, a template that
            refuses the roles or does not write all that it is given.
    """
    talk = normalised(messages, tools)
    tokenizer = rules.tokenizer
    if tokenizer.chat_template is None:
        raise RowFault(
            "no template",
            "messages need a chat template, and the tokenizer of this base has none",
            next_step="set data.chat_template to a file with a Jinja template, or use columns prompt and completion",
        )
    learned = _learned(talk, max(learned_from, 1))[-1 if turns == "last" else 0 :]
    for place in learned:
        if not talk.messages[place]["content"].strip() and not talk.messages[place].get("tool_calls"):
            raise RowFault("empty turn", f"message {place + 1} is an assistant turn without text")
    kept = talk.messages[: learned[-1] + 1]
    notes = list(talk.notes)
    if len(kept) < len(talk.messages):
        notes.append("turns after the last learned turn are left out")
    if kept[0]["role"] == "assistant" and learned_from == 0:
        notes.append("an assistant turn that opens the conversation is shown but not learned")
    shown = [_turn(kept, place, tokenizer, talk.tools) for place in learned]
    template.check_all_written(kept, shown[-1].after)
    first = shown[0]
    if talk.tools and first.before == _before(kept[: first.index], tokenizer, None):
        raise template.dropped("the tools: the text is the same without them")
    return Conversation(kept, shown, rules, talk.tools), tuple(notes)


def prompt_tokens(messages: Any, tokenizer: PreTrainedTokenizerBase, tools: Any = None) -> list[int]:
    """What generation is given of a conversation: the tokens before the assistant's next turn, exactly as in training.

    Raises:
        RowFault: messages that cannot be brought into shape, a template that refuses them or drops one.
    """
    rules = TokenRules.of(tokenizer, 0)  # the end of text is not asked for here
    talk = normalised(messages, tools)
    text = template.rendered(talk.messages, tokenizer, tools=talk.tools, generation_prompt=True)
    template.check_all_written(talk.messages, text)
    return rules.encode([text])[0]


def rendered_turns(
    messages: Any, tokenizer: PreTrainedTokenizerBase, tools: Any = None, *, generation_prompt: bool
) -> str:
    """The text of a conversation, with or without the header of the assistant's next turn.

    Raises:
        RowFault: messages that cannot be brought into shape, or a template that refuses them.
    """
    talk = normalised(messages, tools)
    return template.rendered(talk.messages, tokenizer, tools=talk.tools, generation_prompt=generation_prompt)


def _learned(talk: Talk, first: int) -> list[int]:
    roles = [message["role"] for message in talk.messages]
    able = [place for place in range(first, len(roles)) if roles[place] == "assistant"]
    learned = [place for place in able if talk.learned[place] is not False]
    if able and not learned:
        raise RowFault(
            "nothing learned",
            "every assistant turn says that it is not learned (weight 0)",
            next_step="leave the row out, or give a turn the weight 1",
        )
    if not learned:
        seen = roles[first:] or roles
        raise RowFault(
            "no assistant turn",
            f"the conversation has no assistant turn to learn (roles: {', '.join(dict.fromkeys(seen))})",
            next_step="give at least one message with the role assistant, after another message",
        )
    return learned


def _before(messages: list[Message], tokenizer: PreTrainedTokenizerBase, tools: Tools) -> str:
    return template.rendered(messages, tokenizer, tools=tools, generation_prompt=True)


def _turn(messages: list[Message], place: int, tokenizer: PreTrainedTokenizerBase, tools: Tools) -> Turn:
    earlier, message = messages[:place], messages[place]
    before = _before(earlier, tokenizer, tools)
    after = template.rendered(messages[: place + 1], tokenizer, tools=tools, generation_prompt=False)
    if not after.startswith(before):
        at = first_difference(before, after)
        raise RowFault(
            "unstable template",
            f"the chat template does not go on from its own generation prompt in turn {place + 1}: "
            f"character {at} is {before[at : at + 20]!r} before the turn and {after[at : at + 20]!r} with it",
            next_step=STABLE,
        )
    written = after[len(before) :]
    template.check_turn_written(message, place + 1, written)
    said = message.get("reasoning_content", "").strip() or message["content"].strip()
    if not said:  # tools are called without a word: a header would look like part of the call
        said, stand_in = STAND_IN, [*earlier, {"role": "assistant", "content": STAND_IN}]
        written = template.rendered(stand_in, tokenizer, tools=tools, generation_prompt=False)[len(before) :]
    header = template.THINK_TAGS.sub("", written.partition(said)[0]).strip()
    # Nothing added for generation is right where a turn has no header (Llama 2); else the template forgot it.
    if header and before == template.rendered(earlier, tokenizer, tools=tools, generation_prompt=False):
        raise RowFault(
            "no generation prompt",
            f"the chat template ignores add_generation_prompt, but opens assistant turns with {header!r}: "
            "the model would be trained to write that header",
            next_step="let the template write the header {% if add_generation_prompt %} (data.chat_template)",
        )
    return Turn(place, before, after)
