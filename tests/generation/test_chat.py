from __future__ import annotations

import pytest

from manylora.errors import DataError
from manylora.generation import Conversation, TextStream, generate
from manylora.generation.chat import answered, render_conversation

BYTE_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_a_conversation_is_rendered_up_to_the_assistants_turn(base):
    tokens = render_conversation(base.tokenizer, [{"role": "user", "content": "hi"}])
    assert base.tokenizer.decode(tokens) == "<|user|>hi<|end|><|assistant|>"


def test_each_answer_sees_the_turns_before_it(base):
    talk = Conversation(base, system="s")
    first = talk.ask("one", max_new_tokens=5)
    second = talk.ask("two", max_new_tokens=5)
    turns = [("system", "s"), ("user", "one"), ("assistant", first.text), ("user", "two"), ("assistant", second.text)]
    assert [(message["role"], message["content"]) for message in talk.messages] == turns
    prompt = render_conversation(base.tokenizer, talk.messages[:-1])
    assert generate(base, [prompt], slots=[-1], max_new_tokens=5) == [second]


def test_tokens_come_as_they_are_made(base):
    seen: list[int] = []
    answer = Conversation(base).ask("one", max_new_tokens=5, on_token=seen.append)
    assert tuple(seen) == answer.tokens


def test_a_base_without_a_template_is_an_error_that_says_what_to_do(base):
    base.tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"no chat template(.|\n)*data.chat_template"):
        Conversation(base).ask("one", max_new_tokens=5)


def test_turns_that_the_template_refuses_are_named(base):
    with pytest.raises(DataError, match="refuses the turns assistant: users speak first"):
        render_conversation(base.tokenizer, [{"role": "assistant", "content": "hi"}])


def test_messages_are_brought_into_the_same_shape_as_in_training(base):
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    plain = render_conversation(base.tokenizer, [{"role": "user", "content": "hi"}])
    assert render_conversation(base.tokenizer, [{"role": "user", "content": parts, "weight": 0}]) == plain
    with pytest.raises(DataError, match=r"has the role 'usr'\n  nearest: user"):
        render_conversation(base.tokenizer, [{"role": "usr", "content": "hi"}])


def test_tools_are_given_to_the_template(base):
    base.tokenizer.chat_template = "{% for tool in tools or [] %}{{ tool.name }};{% endfor %}" + BYTE_TEMPLATE
    tokens = render_conversation(base.tokenizer, [{"role": "user", "content": "hi"}], '[{"name": "add"}]')
    assert base.tokenizer.decode(tokens) == "add;<|user|>hi<|end|><|assistant|>"


SPACED = "{% for m in messages %}{{ ' ' if m.role == 'assistant' }}{{ m.content }}<|end|>{% endfor %}"
REFUSING = "{% for m in messages %}{{ m.content if m.role == 'user' else raise_exception('no') }}<|end|>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "text", "content"),
    [
        (SPACED, " yes ", "yes "),
        (SPACED, "  yes", " yes"),
        (SPACED, "yes", "yes"),
        (BYTE_TEMPLATE, " yes", " yes"),
        (BYTE_TEMPLATE, "  ", "  "),
        (SPACED.replace("m.content", "m.content | trim"), " yes", " yes"),
        (REFUSING, " yes", " yes"),
    ],
)
def test_an_answer_is_kept_so_that_the_template_writes_it_as_it_was_generated(base, template, text, content):
    base.tokenizer.chat_template = template
    messages = [{"role": "user", "content": "hi"}]
    assert answered(base.tokenizer, messages, text) == content


def test_a_turn_that_got_no_answer_is_forgotten(base):
    talk = Conversation(base)
    with pytest.raises(DataError, match="96 positions"):
        talk.ask("x" * 200, max_new_tokens=5)
    assert talk.messages == []


def test_the_oldest_exchanges_make_room_and_the_system_turn_stays(base):
    talk = Conversation(base, system="s")
    for role, text in [("user", "a" * 20), ("assistant", "b" * 20), ("user", "c" * 5), ("assistant", "d" * 5)]:
        talk.messages.append({"role": role, "content": text})
    assert talk.make_room("e" * 10, max_new_tokens=10) == 0
    assert talk.make_room("e" * 30, max_new_tokens=20) == 1
    assert [message["content"][0] for message in talk.messages] == ["s", "c", "d"]
    talk.ask("e" * 30, max_new_tokens=20)


def test_streamed_pieces_are_whole_characters_and_make_the_text(base):
    text = "caf\u00e9 \u00a3 20 \U0001f600 end"
    stream = TextStream(base.tokenizer)
    pieces = [stream.push(token) for token in base.tokenizer.encode(text)]
    assert "".join(pieces) + stream.close() == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_an_unfinished_character_comes_at_the_end(base):
    stream = TextStream(base.tokenizer)
    tokens = base.tokenizer.encode("ab\u00e9")[:-1]
    assert [stream.push(token) for token in tokens] == ["a", "b", ""]
    assert stream.close() == "\ufffd"


def test_a_system_turn_that_the_template_drops_is_said_before_anything_is_generated(base):
    base.tokenizer.chat_template = (
        "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    with pytest.raises(DataError, match="drops the text of message 1"):
        render_conversation(base.tokenizer, turns)
    assert render_conversation(base.tokenizer, turns[1:])
