from __future__ import annotations

import json

import pytest

from manylora.data.conversation import normalised
from manylora.data.faults import RowFault

ASK = {"role": "user", "content": "What is 2 ?"}
SAY = {"role": "assistant", "content": "It is 4 ."}
OBJECT = {"city": "Rome"}


def shaped(message, tools=None):
    return normalised([message], tools).messages[0]


def refused(messages, tools=None) -> RowFault:
    with pytest.raises(RowFault) as caught:
        normalised(messages, tools)
    return caught.value


def calling(call):
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def test_plain_messages_are_passed_on_as_they_are():
    talk = normalised([ASK, SAY])
    assert (talk.messages, talk.learned, talk.tools, talk.notes) == ([ASK, SAY], [None, None], None, ())


def test_the_callers_messages_are_not_changed():
    message = {"role": "assistant", "content": "x", "thinking": "y", "weight": 1, "tool_calls": [{**CALL}]}
    before = json.dumps(message)
    shaped(message)
    assert json.dumps(message) == before


def test_text_parts_are_joined_as_they_are():
    parts = [
        {"type": "text", "text": " a"},
        {"type": "text", "value": "b\n"},
        {"type": "text", "text": "", "value": None},
    ]
    assert shaped({"role": "user", "content": parts})["content"] == " ab\n"
    assert shaped({"role": "user", "content": []})["content"] == ""


NO_TEXT = {
    "an image": ([{"type": "image_url", "image_url": {"url": "x"}}], "type 'image_url'"),
    "sound": ([{"type": "text", "text": "a"}, {"type": "input_audio"}], "type 'input_audio'"),
    "a part that is a string": (["x"], "not text: 'x'"),
    "a text part without text": ([{"type": "text", "text": None}], "not text: {'type': 'text'"),
    "a text part with two texts": ([{"type": "text", "text": "a", "value": "b"}], "not text: {'type': 'text'"),
    "an object": ({"text": "x"}, "content is {'text': 'x'}"),
    "a number": (4, "content is 4"),
}


@pytest.mark.parametrize("name", NO_TEXT)
def test_content_that_is_not_text_is_refused(name):
    content, expected = NO_TEXT[name]
    fault = refused([ASK, {"role": "assistant", "content": content}])
    assert fault.kind == "not text"
    assert "message 2" in fault.what
    assert expected in fault.what


@pytest.mark.parametrize("key", ["weight", "loss", "train", "loss_weight", "loss_scale"])
@pytest.mark.parametrize(("value", "learned"), [(0, False), (1, True), (0.0, False), (True, True), (None, None)])
def test_a_weight_says_what_is_learned_and_is_not_shown_to_the_template(key, value, learned):
    talk = normalised([{**ASK, key: 0}, {**SAY, key: value}])
    assert talk.learned == [False, learned]
    assert talk.messages == [ASK, SAY]


@pytest.mark.parametrize("value", [0.5, 2, -1, "yes", float("nan"), [1]])
def test_a_weight_between_or_beyond_is_refused_with_what_is_allowed(value):
    fault = refused([ASK, {**SAY, "loss_scale": value}])
    assert fault.kind == "bad weight"
    assert "message 2: loss_scale is" in fault.what
    assert "0 or false" in fault.allowed
    assert "1 or true" in fault.allowed


def test_weights_that_disagree_are_refused():
    assert normalised([ASK, {**SAY, "weight": 1, "train": True}]).learned == [None, True]
    fault = refused([ASK, {**SAY, "weight": 1, "train": False}])
    assert fault.kind == "weights disagree"
    assert "weight 1, train False" in fault.what


@pytest.mark.parametrize("role", ["system", "user", "tool"])
def test_a_turn_that_is_not_the_assistants_cannot_be_learned(role):
    fault = refused([{"role": role, "content": "x", "loss": True}])
    assert fault.kind == "weight not the assistant's"
    assert f"role {role} has loss True" in fault.what


CALL = {"type": "function", "function": {"name": "weather", "arguments": OBJECT}}
CALLS = {
    "as the templates read it": (CALL, CALL),
    "bare": ({"name": "weather", "arguments": OBJECT}, CALL),
    "without a type": ({"function": {"name": "weather", "arguments": OBJECT}}, CALL),
    "with an id": ({"id": "c1", **CALL}, {"id": "c1", **CALL}),
    "bare with an id": ({"id": "c1", "name": "weather", "arguments": OBJECT}, {"id": "c1", **CALL}),
    "with arguments as JSON text": ({"name": "weather", "arguments": '{"city": "Rome"}'}, CALL),
    "with nothing to say": (
        {"name": "weather", "arguments": "{}"}, {"type": "function", "function": {"name": "weather", "arguments": {}}},
    ),
    "filled with None by a table": ({**CALL, "id": None, "index": None}, CALL),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_tool_call_is_brought_into_one_shape(name):
    given, expected = CALLS[name]
    assert shaped(calling(given)) == {"role": "assistant", "content": "", "tool_calls": [expected]}


BAD_CALLS = {
    "no name": ({"function": {"arguments": {}}}, "without a name"),
    "an empty name": ({"name": "", "arguments": {}}, "without a name"),
    "no arguments": ({"name": "weather"}, "the arguments of weather are None"),
    "arguments that are no JSON": ({"name": "weather", "arguments": "Rome"}, "the arguments of weather are 'Rome'"),
    "arguments that are a JSON list": ({"name": "weather", "arguments": "[1]"}, "the arguments of weather are '[1]'"),
    "arguments that are a list": ({"name": "weather", "arguments": [1]}, "the arguments of weather are [1]"),
    "text": ("weather()", "without a name: 'weather()'"),
    "another type": ({**CALL, "type": "custom"}, "type 'custom'"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_tool_call_is_refused(name):
    given, expected = BAD_CALLS[name]
    fault = refused([ASK, calling(given)])
    assert fault.kind == "bad tool call"
    assert "message 2" in fault.what
    assert expected in fault.what


def test_what_belongs_to_a_tools_answer_is_passed_on():
    answer = {"role": "tool", "content": "4", "name": "add", "tool_call_id": "c1"}
    assert shaped(answer) == answer


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_every_name_that_templates_read(key):
    made = shaped({**SAY, key: "Add them"})
    assert made == {**SAY, **dict.fromkeys(["reasoning_content", "reasoning", "thinking"], "Add them")}


def test_empty_reasoning_is_none():
    assert shaped({**SAY, "reasoning": "", "thinking": None}) == SAY


def test_reasoning_of_two_kinds_is_refused():
    assert refused([{**SAY, "reasoning": "a", "thinking": "b"}]).kind == "reasoning disagrees"
    assert refused([{**SAY, "reasoning": ["a"]}]).kind == "bad reasoning"


@pytest.mark.parametrize(("key", "value"), [("reasoning", "x"), ("tool_calls", [CALL]), ("thinking", "x")])
def test_only_the_assistant_thinks_and_calls(key, value):
    fault = refused([{**ASK, key: value}])
    assert fault.kind == f"{key} not the assistant's"


@pytest.mark.parametrize("tools", [[CALL], json.dumps([CALL])])
def test_tools_may_be_a_list_or_its_json(tools):
    assert normalised([ASK], tools).tools == [CALL]


@pytest.mark.parametrize("tools", [None, [], "", "[]", "null"])
def test_no_tools_are_none(tools):
    assert normalised([ASK], tools).tools is None


@pytest.mark.parametrize("tools", ["weather", '{"name": "x"}', [1], [{}], {"name": "x"}])
def test_tools_that_are_no_list_of_schemas_are_refused(tools):
    assert refused([ASK], tools).kind == "bad tools"


@pytest.mark.parametrize(("role", "meant"), [("asistant", "assistant"), ("User", "user"), ("sytem", "system")])
def test_a_mistyped_role_is_refused_with_the_nearest(role, meant):
    fault = refused([{"role": role, "content": "x"}])
    assert fault.kind == "mistyped role"
    assert list(fault.nearest) == [meant]


@pytest.mark.parametrize("role", ["developer", "ipython", "model", "function", "customer", "critic"])
def test_another_role_is_the_templates_business(role):
    assert shaped({"role": role, "content": "x"})["role"] == role


def test_keys_that_nobody_here_reads_are_passed_on_and_said():
    talk = normalised([{**ASK, "mood": "good", "refusal": None, "annotations": []}])
    assert talk.messages == [{**ASK, "mood": "good", "annotations": []}]
    assert [note.rpartition(": ")[2] for note in talk.notes] == ["mood"]


BAD = {
    "no messages": ([], "no messages"),
    "text": ("hello", "no messages"),
    "a message that is text": (["hello"], "no message"),
    "no role": ([{"content": "x"}], "no role"),
    "a role that is a number": ([{"role": 1, "content": "x"}], "bad role"),
    "no content": ([ASK, {"role": "assistant"}], "no content"),
    "no content beside reasoning": ([{"role": "assistant", "content": None, "reasoning": "x"}], "no content"),
    "an empty list of calls": ([{"role": "assistant", "content": None, "tool_calls": []}], "no content"),
    "calls that are an object": (
        [{"role": "assistant", "content": None, "tool_calls": {"name": "x"}}],
        "bad tool_calls",
    ),
    "a function_call": ([{**SAY, "function_call": {"name": "x", "arguments": "{}"}}], "function_call"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_message_is_refused(name):
    messages, kind = BAD[name]
    assert refused(messages).kind == kind


def test_a_mistyped_content_is_named():
    assert list(refused([{"role": "user", "contents": "x"}]).nearest) == ["contents"]
