from __future__ import annotations

import pytest

from manylora.errors import DataError
from manylora.generation import Conversation, TextStream, generate
from manylora.generation.chat import render_conversation


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
