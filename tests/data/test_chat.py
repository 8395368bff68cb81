from __future__ import annotations

import pytest

from manylora.data import chat
from manylora.data.examples import Reading, encode
from manylora.data.faults import RowFault
from manylora.data.rows import Row
from manylora.data.tokens import TokenRules
from manylora.errors import DataError

CHATML = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
HELLO = [{"role": "user", "content": "What is 2 ?"}, {"role": "assistant", "content": "It is 4 ."}]
LONGER = [{"role": "system", "content": "name : The Eagle"}, *HELLO, *HELLO]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALLING = [
    HELLO[0],
    {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": {"city": "Rome"}}]},
    {"role": "tool", "content": '{"sky": "blue"}'},
    HELLO[1],
]
TOOLS = (
    "{% if tools %}{{ tools | tojson }}<|end|>{% endif %}{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def rules_of(tokenizer) -> TokenRules:
    return TokenRules.of(tokenizer, 0)


def marked(messages, tokenizer, **options):
    rules = rules_of(tokenizer)
    conversation, notes = chat.render(messages, rules, **options)
    return conversation, conversation.mark(rules.encode(conversation.texts)), notes


def learned(messages, tokenizer, **options) -> list[str]:
    """The learned spans as text."""
    _, made, _ = marked(messages, tokenizer, **options)
    return [tokenizer.decode(made.tokens[start:stop]) for start, stop in made.spans]


def refused(messages, tokenizer, **options) -> RowFault:
    with pytest.raises(RowFault) as caught:
        marked(messages, tokenizer, **options)
    return caught.value


def all_of(fault: RowFault) -> str:
    return " ".join([fault.what, *fault.nearest, fault.allowed or "", fault.next_step or ""])


@pytest.mark.parametrize("template", ["marked", "chatml"])
def test_every_assistant_turn_and_its_end_are_learned_and_no_header(make_tokenizer, template):
    tokenizer = make_tokenizer() if template == "marked" else make_tokenizer(CHATML)
    assert learned(LONGER, tokenizer) == ["It is 4 .<|end|>"] * 2
    _, made, _ = marked(LONGER, tokenizer)
    assert made.spans[-1][1] == len(made.tokens)
    assert tokenizer.decode(made.tokens[-1:]) == "<|end|>"


def test_the_prompt_is_exactly_what_generation_is_given(make_tokenizer):
    tokenizer = make_tokenizer(CHATML)
    conversation, made, _ = marked(LONGER, tokenizer)
    expected = tokenizer.apply_chat_template(LONGER[:2], add_generation_prompt=True, return_dict=False)
    assert made.tokens[: made.spans[0][0]] == expected == chat.prompt_tokens(LONGER[:2], tokenizer)
    assert conversation.turns[0].before == tokenizer.decode(expected)


def test_our_mask_equals_the_templates_own(tokenizer):
    _, made, _ = marked(LONGER, tokenizer)
    theirs = tokenizer.apply_chat_template(LONGER, return_dict=True, return_assistant_tokens_mask=True)
    assert made.tokens == theirs["input_ids"]
    trained = [any(start <= place < stop for start, stop in made.spans) for place in range(len(made.tokens))]
    assert trained == [bool(mark) for mark in theirs["assistant_masks"]]


def test_each_text_is_encoded_once(tokenizer):
    conversation, _, _ = marked(LONGER, tokenizer)
    assert len(conversation.texts) == len(set(conversation.texts)) == 4


def test_turns_from_a_place_on_are_learned_and_the_earlier_ones_shown(tokenizer):
    conversation, made, _ = marked(LONGER, tokenizer, learned_from=4)
    assert [turn.index for turn in conversation.turns] == [4]
    assert tokenizer.decode(made.tokens[: made.spans[0][0]]).count("It is 4 .") == 1


def test_the_last_turn_alone_is_learned_where_that_is_asked(tokenizer):
    _, made, _ = marked(LONGER, tokenizer, turns="last")
    assert len(made.spans) == 1
    assert made.tokens == marked(LONGER, tokenizer)[1].tokens


def test_turns_that_teach_nothing_are_left_out_and_said(tokenizer):
    _, made, notes = marked([HELLO[1], *HELLO, HELLO[0]], tokenizer)
    assert len(made.spans) == 1
    assert made.spans[0][1] == len(made.tokens)
    assert any("turns after the last" in note for note in notes)
    assert any("opens the conversation" in note for note in notes)
    assert marked(HELLO, tokenizer)[2] == ()


@pytest.mark.parametrize("key", ["weight", "loss", "train", "loss_weight", "loss_scale"])
def test_a_turn_with_weight_0_is_shown_and_not_learned(tokenizer, key):
    shown, taught = {**HELLO[1], key: 0}, {**HELLO[1], key: 1}
    conversation, made, _ = marked([HELLO[0], shown, HELLO[0], taught, HELLO[0], shown], tokenizer)
    assert [turn.index for turn in conversation.turns] == [3]
    assert made.tokens == marked([*HELLO, *HELLO], tokenizer)[1].tokens


def test_a_row_whose_turns_all_have_weight_0_teaches_nothing(tokenizer):
    fault = refused([HELLO[0], {**HELLO[1], "loss": False}], tokenizer)
    assert fault.kind == "nothing learned"


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_place(make_tokenizer):
    last_only = (
        "{% for message in messages %}<|{{ message['role'] }}|>"
        "{% if loop.last and message['role'] == 'assistant' %}(4){% endif %}{{ message['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = make_tokenizer(last_only)
    fault = refused(HELLO * 2, tokenizer)
    assert fault.kind == "unstable template"
    assert "turn 2" in fault.what
    assert "'(4)" in fault.what
    assert "token " in fault.what
    assert "data.turns: last" in fault.next_step
    assert learned(HELLO, tokenizer) == ["(4)It is 4 .<|end|>"]
    assert learned(HELLO * 2, tokenizer, turns="last") == ["(4)It is 4 .<|end|>"]


def test_a_template_that_leaves_its_own_generation_prompt_is_refused_with_the_place(make_tokenizer):
    other = CHATML.replace("{% if add_generation_prompt %}<|assistant|>", "{% if add_generation_prompt %}<|user|>")
    fault = refused(HELLO, make_tokenizer(other))
    assert fault.kind == "unstable template"
    assert "'<|user|>" not in fault.what
    assert "'user|>" in fault.what
    assert "data.turns" not in fault.next_step


def test_a_template_without_an_end_token_is_refused(make_tokenizer):
    plain = (
        "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    fault = refused(HELLO, make_tokenizer(plain))
    assert fault.kind == "no end token"
    assert "ends turn 2 with" in fault.what


def test_text_that_holds_the_end_at_which_generation_stops_is_refused(tokenizer):
    said = {"role": "assistant", "content": "It is <|endoftext|> 4 ."}
    fault = refused([HELLO[0], said], tokenizer)
    assert fault.kind == "end token inside"
    assert "turn 2 holds <|endoftext|>" in fault.what


def test_an_end_that_text_and_template_both_write_is_refused(make_tokenizer):
    tokenizer = make_tokenizer(CHATML.replace("<|end|>", "<|endoftext|>"))
    assert learned(HELLO, tokenizer) == ["It is 4 .<|endoftext|>"]
    twice = [HELLO[0], {"role": "assistant", "content": "It is 4 .<|endoftext|>"}]
    assert refused(twice, tokenizer).kind == "end token inside"


def test_a_closing_token_after_the_end_is_not_learned(make_tokenizer):
    tokenizer = make_tokenizer(CHATML + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}")
    stops = [0, tokenizer.convert_tokens_to_ids("<|end|>")]
    rules = TokenRules.of(tokenizer, stops)
    conversation, _ = chat.render(HELLO * 2, rules)
    made = conversation.mark(rules.encode(conversation.texts))
    assert [tokenizer.decode(made.tokens[start:stop]) for start, stop in made.spans] == ["It is 4 .<|end|>"] * 2


@pytest.mark.parametrize("answer", [HELLO[1], CALLING[1]])
def test_a_template_that_ignores_the_generation_prompt_is_refused(make_tokenizer, answer):
    headed = TOOLS.partition("{% if add_generation_prompt")[0]
    fault = refused([HELLO[0], answer], make_tokenizer(headed))
    assert fault.kind == "no generation prompt"
    assert "'<|assistant|>'" in fault.what


def test_a_template_whose_turns_have_no_header_is_fine(make_tokenizer):
    llama = (
        "{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
        "{% else %} {{ message['content'] }}<|endoftext|>{% endif %}{% endfor %}"
    )
    assert learned(HELLO, make_tokenizer(llama)) == [" It is 4 .<|endoftext|>"]


MARKED = {
    "the header is marked": "{% generation %}<|assistant|>INNER<|end|>{% endgeneration %}",
    "the end is not marked": "<|assistant|>{% generation %}INNER{% endgeneration %}<|end|>",
    "a part is not marked": "<|assistant|>{% generation %}INNER{% endgeneration %} more{% generation %}<|end|>"
    "{% endgeneration %}",
    "nothing is marked": "<|assistant|>INNER<|end|>{% if false %}{% generation %}{% endgeneration %}{% endif %}",
}


def marking(body: str, other: str = "<|user|>INNER<|end|>") -> str:
    template = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}" + body + "{% else %}" + other +
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )  # fmt: skip
    return template.replace("INNER", "{{ message['content'] }}")


@pytest.mark.parametrize("name", MARKED)
def test_marks_that_disagree_are_refused(make_tokenizer, name):
    fault = refused(HELLO, make_tokenizer(marking(MARKED[name])))
    assert fault.kind == "marks disagree"
    assert "character " in fault.what


def test_marks_on_turns_that_are_not_the_assistants_are_refused(make_tokenizer):
    body = "<|assistant|>{% generation %}INNER<|end|>{% endgeneration %}"
    other = "<|user|>{% generation %}INNER<|end|>{% endgeneration %}"
    assert refused(HELLO, make_tokenizer(marking(body, other))).kind == "marks disagree"


def test_marks_on_turns_that_are_shown_only_are_no_fault(tokenizer):
    assert learned([HELLO[0], {**HELLO[1], "weight": 0}, *HELLO], tokenizer) == ["It is 4 .<|end|>"]


def test_marks_may_be_in_parts_and_reach_over_the_white_space_after_the_end(make_tokenizer):
    body = "<|assistant|>{% generation %}INNER{% endgeneration %}{% generation %}<|end|>\n{% endgeneration %}"
    assert learned(HELLO * 2, make_tokenizer(marking(body))) == ["It is 4 .<|end|>"] * 2


def test_a_mark_after_the_space_that_the_first_token_begins_with_is_no_fault(make_tokenizer):
    body = "<|assistant|> {% generation %}INNER<|end|>{% endgeneration %}"
    assert learned(HELLO * 2, make_tokenizer(marking(body))) == [" It is 4 .<|end|>"] * 2


def test_a_tokenizer_without_a_template_says_where_to_set_one(make_tokenizer):
    assert "data.chat_template" in refused(HELLO, make_tokenizer(None)).next_step


@pytest.mark.parametrize("fails", ["raise_exception('no system role')", "messages[0].content + 1", "messages[0].x.y"])
def test_what_the_template_itself_refuses_is_said_with_the_roles(make_tokenizer, fails):
    fault = refused(HELLO, make_tokenizer("{{ " + fails + " }}"))
    assert fault.kind == "template refuses"
    assert "turns user: " in fault.what


def test_tool_calls_and_tools_are_rendered_and_the_call_is_learned(make_tokenizer):
    tokenizer = make_tokenizer(TOOLS)
    call = '{"arguments": {"city": "Rome"}, "name": "weather"}'
    spans = learned(CALLING, tokenizer, tools=[WEATHER])
    assert [span.replace('"name": "weather", "arguments": {"city": "Rome"}', call[1:-1]) for span in spans] == [
        f"{call}<|end|>",
        "It is 4 .<|end|>",
    ]
    assert spans[0].count("\\") == 0


def test_generation_is_given_the_same_of_tools_and_calls(make_tokenizer):
    tokenizer = make_tokenizer(TOOLS)
    _, made, _ = marked(CALLING, tokenizer, tools=[WEATHER])
    for span, place in zip(made.spans, (1, 3), strict=True):
        assert made.tokens[: span[0]] == chat.prompt_tokens(CALLING[:place], tokenizer, [WEATHER])


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("read", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_learned_whatever_name_the_data_and_the_template_have(make_tokenizer, key, read):
    tokenizer = make_tokenizer(TOOLS.replace("reasoning_content", read))
    thought = {**HELLO[1], key: "Add them"}
    assert learned([HELLO[0], thought], tokenizer) == ["<think>Add them</think>It is 4 .<|end|>"]


BARE = (
    "{% for m in messages %}{% if m.role != 'system' and m.role != 'tool' %}<|{{ m.role }}|>"
    "{{ m.content.split('</think>')[-1] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
DROPPED = {
    "a system message": (LONGER, None, "the text of message 1 (system), 'name : The Eagle'"),
    "a tool call": (CALLING[:2], None, "the tool call 'weather' of message 2"),
    "an earlier tool call": ([CALLING[0], {**CALLING[1], "weight": 0}, *HELLO], None, "the tool call 'weather'"),
    "a tool's answer": ([*HELLO, CALLING[2], HELLO[1]], None, "the text of message 3 (tool)"),
    "reasoning": ([HELLO[0], {**HELLO[1], "thinking": "Add them"}], None, "the reasoning of message 2, 'Add them'"),
    "inline thinking": (
        [HELLO[0], {"role": "assistant", "content": "<think>Add</think>4"}], None, "'</think>', of message 2",
    ),
    "tools": (HELLO, [WEATHER], "the tools"),
}  # fmt: skip


@pytest.mark.parametrize("name", DROPPED)
def test_what_a_template_drops_is_named(make_tokenizer, name):
    messages, tools, expected = DROPPED[name]
    fault = refused(messages, make_tokenizer(BARE), tools=tools)
    assert fault.kind == "template drops"
    assert expected in fault.what
    assert "data.chat_template" in fault.next_step


def test_a_turn_that_the_template_leaves_out_is_named_though_its_text_stands_elsewhere(make_tokenizer):
    first = "{% for m in messages %}{% if not (m.role == 'user' and loop.index > 2) %}<|{{ m.role }}|>{{ m.content }}"
    template = first + "<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    assert refused(HELLO * 2, make_tokenizer(template)).what.startswith("the chat template drops the text of message 3")


def test_thinking_of_earlier_turns_may_be_dropped_where_they_are_not_learned(make_tokenizer):
    inline = {"role": "assistant", "content": "<think>Add</think>It is 4 ."}
    named = {**HELLO[1], "reasoning": "Add"}
    for earlier in (inline, named):
        assert learned([HELLO[0], earlier, *HELLO], make_tokenizer(BARE), turns="last") == ["It is 4 .<|end|>"]


BAD = {
    "no assistant turn": ([HELLO[0]], "no assistant turn to learn (roles: user)"),
    "only an opening turn": ([HELLO[1]], "no assistant turn to learn (roles: assistant)"),
    "a mistyped role": ([HELLO[0], {"role": "asistant", "content": "x"}], "has the role 'asistant' assistant"),
    "no messages": ([], "messages is []"),
    "an empty answer": ([HELLO[0], {"role": "assistant", "content": " "}], "message 2 is an assistant turn without"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_conversation_is_refused(tokenizer, name):
    messages, expected = BAD[name]
    assert expected in all_of(refused(messages, tokenizer))


def encoded(conversations, tokenizer, eos_id=0):
    rows = [Row({"messages": messages}, "chat.jsonl", line) for line, messages in enumerate(conversations, 1)]
    return encode(rows, tokenizer, Reading(max_length=200), eos_id=eos_id)


def test_an_example_holds_the_spans_as_its_targets(tokenizer):
    example = encoded([LONGER], tokenizer).examples[0]
    _, made, _ = marked(LONGER, tokenizer)
    assert example.tokens.tolist() == made.tokens
    assert [place for place, trained in enumerate(example.trained) if trained] == [
        place for start, stop in made.spans for place in range(start, stop)
    ]


def test_a_bad_conversation_is_counted_with_its_line(tokenizer):
    bad = [HELLO[0], {"role": "asistant", "content": "x"}]
    with pytest.raises(DataError, match=r"chat\.jsonl:2: .*\(the same in 2 of 3 rows\)"):
        encoded([HELLO, bad, bad], tokenizer)


def test_an_end_at_which_generation_would_not_stop_is_said(tokenizer):
    assert any("answers end with <|end|>" in note for note in encoded([HELLO], tokenizer).notes)
    stops = [0, tokenizer.convert_tokens_to_ids("<|end|>")]
    assert not any("answers end with" in note for note in encoded([HELLO], tokenizer, stops).notes)
