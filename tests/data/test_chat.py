from __future__ import annotations

import pytest

from manylora.data.examples import encode
from manylora.data.readers import Row
from manylora.errors import DataError

CHATML = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
HELLO = [{"role": "user", "content": "What is 2 ?"}, {"role": "assistant", "content": "It is 4 ."}]
LONGER = [{"role": "system", "content": "name : The Eagle"}, *HELLO, *HELLO]


def chat(*conversations, key="messages"):
    return [Row({key: messages}, "chat.jsonl", line) for line, messages in enumerate(conversations, start=1)]


def learned(example, tokenizer) -> list[str]:
    """The learned runs of an example as text."""
    runs, current = [], []
    for token, trained in zip([*example.tokens, 0], [*example.trained, False], strict=True):
        if trained:
            current.append(int(token))
        elif current:
            runs.append(tokenizer.decode(current))
            current = []
    return runs


def refused(tokenizer, *conversations) -> str:
    with pytest.raises(DataError) as caught:
        encode(chat(*conversations), tokenizer, max_length=200, eos_id=0)
    return str(caught.value)


@pytest.mark.parametrize("template", ["marked", "chatml"])
def test_every_assistant_turn_and_its_end_are_learned_and_no_header(make_tokenizer, template):
    tokenizer = make_tokenizer() if template == "marked" else make_tokenizer(CHATML)
    example = encode(chat(LONGER), tokenizer, max_length=200, eos_id=0).examples[0]
    assert learned(example, tokenizer) == ["It is 4 .<|end|>"] * 2
    assert example.trained[-1]
    assert tokenizer.decode([example.tokens[-1]]) == "<|end|>"


def test_the_prompt_is_exactly_what_generation_is_given(make_tokenizer):
    tokenizer = make_tokenizer(CHATML)
    example = encode(chat(LONGER), tokenizer, max_length=200, eos_id=0).examples[0]
    given = tokenizer.apply_chat_template(LONGER[:2], add_generation_prompt=True, return_dict=False)
    assert example.tokens[: example.prompt_length].tolist() == given
    assert example.prompt == tokenizer.decode(given) == example.group
    assert example.reference == "It is 4 ."


def test_our_mask_equals_the_templates_own(tokenizer):
    example = encode(chat(LONGER), tokenizer, max_length=200, eos_id=0).examples[0]
    theirs = tokenizer.apply_chat_template(LONGER, return_dict=True, return_assistant_tokens_mask=True)
    assert example.tokens.tolist() == theirs["input_ids"]
    assert example.trained.tolist() == [bool(mark) for mark in theirs["assistant_masks"]]


def test_message_lists_as_prompt_and_completion_learn_the_completion_only(tokenizer):
    rows = [Row({"prompt": LONGER[:4], "completion": LONGER[4:]}, "f", 1)]
    encoded = encode(rows, tokenizer, max_length=200, eos_id=0)
    assert encoded.format == "prompt-completion"
    assert learned(encoded.examples[0], tokenizer) == ["It is 4 .<|end|>"]
    assert encoded.examples[0].prompt == tokenizer.apply_chat_template(
        LONGER[:4], tokenize=False, add_generation_prompt=True
    )


def test_turns_that_teach_nothing_are_left_out_and_said(tokenizer):
    opened = [HELLO[1], *HELLO, HELLO[0]]
    encoded = encode(chat(opened, HELLO), tokenizer, max_length=200, eos_id=0)
    assert learned(encoded.examples[0], tokenizer) == ["It is 4 .<|end|>"]
    assert encoded.examples[0].trained[-1]
    assert any("turns after the last" in note and "1 of 2 rows" in note for note in encoded.notes)
    assert any("opens the conversation" in note for note in encoded.notes)


def test_an_end_at_which_generation_would_not_stop_is_said(tokenizer):
    assert any(
        "answers end with <|end|>" in note for note in encode(chat(HELLO), tokenizer, max_length=99, eos_id=0).notes
    )
    stops = [0, tokenizer.convert_tokens_to_ids("<|end|>")]
    assert len(encode(chat(HELLO), tokenizer, max_length=99, eos_id=stops).notes) == 1


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_place(make_tokenizer):
    last_only = (
        "{% for message in messages %}<|{{ message['role'] }}|>"
        "{% if loop.last and message['role'] == 'assistant' %}(4){% endif %}{{ message['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    message = refused(make_tokenizer(last_only), HELLO, HELLO * 2)
    assert "chat.jsonl:2" in message
    assert "turn 2" in message
    assert "'(4)" in message
    assert "token " in message
    assert encode(chat(HELLO), make_tokenizer(last_only), max_length=99, eos_id=0).examples


def test_a_template_without_an_end_token_is_refused(make_tokenizer):
    plain = (
        "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    assert "no end token" in refused(make_tokenizer(plain), HELLO)


def test_a_template_that_ignores_the_generation_prompt_is_refused(make_tokenizer):
    headed = "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    assert "ignores add_generation_prompt" in refused(make_tokenizer(headed), HELLO)


def test_a_template_whose_turns_have_no_header_is_fine(make_tokenizer):
    llama = (
        "{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
        "{% else %} {{ message['content'] }}<|endoftext|>{% endif %}{% endfor %}"
    )
    tokenizer = make_tokenizer(llama)
    example = encode(chat(HELLO), tokenizer, max_length=99, eos_id=0).examples[0]
    assert learned(example, tokenizer) == [" It is 4 .<|endoftext|>"]


@pytest.mark.parametrize("fault", ["header marked", "end not marked"])
def test_marks_that_disagree_are_refused(make_tokenizer, fault):
    inner = "{{ message['content'] }}"
    body = {
        "header marked": "{% generation %}<|assistant|>" + inner + "<|end|>{% endgeneration %}",
        "end not marked": "<|assistant|>{% generation %}" + inner + "{% endgeneration %}<|end|>",
    }[fault]
    template = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        + body
        + "{% else %}<|user|>"
        + inner
        + "<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    assert "generation %} marks" in refused(make_tokenizer(template), HELLO * 2)


def test_a_tokenizer_without_a_template_says_where_to_set_one(make_tokenizer):
    assert "data.chat_template" in refused(make_tokenizer(None), HELLO)


def test_what_the_template_itself_refuses_is_said_with_the_row(make_tokenizer):
    strict = "{{ raise_exception('no system role') }}"
    message = refused(make_tokenizer(strict), HELLO)
    assert "chat.jsonl:1" in message
    assert "no system role" in message


BAD = {
    "no assistant turn": ([HELLO[0]], "no assistant turn"),
    "a mistyped role": ([HELLO[0], {"role": "asistant", "content": "x"}], "nearest: asistant"),
    "no messages": ([], "messages is []"),
    "a message that is text": (["hello"], "message 1 is 'hello'"),
    "a missing content": ([HELLO[0], {"role": "assistant", "contents": "x"}], "nearest: contents"),
    "a content that is a list": ([HELLO[0], {"role": "assistant", "content": ["x"]}], "not text"),
    "an empty answer": ([HELLO[0], {"role": "assistant", "content": " "}], "without text"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_conversation_is_refused_and_counted(tokenizer, name):
    messages, expected = BAD[name]
    message = refused(tokenizer, HELLO, messages, messages)
    assert expected in message
    assert "chat.jsonl:2" in message
    assert "2 of 3 rows" in message
