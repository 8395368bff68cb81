"""messages, sharegpt and alpaca: rows that become conversations."""

from __future__ import annotations

import json

import pytest

HI, HELLO = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}
WEATHER = {"name": "weather", "arguments": {"place": "Rome"}}


def test_of_messages_every_assistant_turn_is_learned_with_its_end(learned, rules):
    said = [("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "so long")]
    row = {"messages": [{"role": role, "content": text} for role, text in said]}
    assert learned("messages", row, rules) == ["hello<|end|>", "so long<|end|>"]


TALK = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
WRAPPED = {"type": "function", "function": {"name": "weather", "parameters": {}}}


@pytest.mark.parametrize(
    "tools", [[WRAPPED], json.dumps([WRAPPED]), [WRAPPED["function"]], json.dumps([WRAPPED["function"]]),
              WRAPPED["function"]]
)  # fmt: skip
def test_tools_are_shown_in_the_shape_of_requests_however_they_are_written(tools, whole, rules):
    for name, row in (("messages", TALK), ("sharegpt", {"conversations": [HI, HELLO]})):
        ((text, _, shown, _),) = whole(name, {**row, "tools": tools}, rules)
        assert json.loads(text.partition("<|system|>")[2].partition("<|end|>")[0]) == [WRAPPED]
        assert bool(shown.notes) is ("function" not in str(tools))


@pytest.mark.parametrize("tools", [None, "", [], "[]"])
def test_empty_tools_are_no_tools(tools, whole, rules):
    ((text, _, _, _),) = whole("messages", {**TALK, "tools": tools}, rules)
    assert text.startswith("<|user|>")


@pytest.mark.parametrize("tools", ["search", 3, [3], {"parameters": {}}])
def test_tools_that_are_no_functions_are_refused(tools, fault, rules):
    assert fault("messages", {**TALK, "tools": tools}, rules, "tools is").kind == "bad tools"


@pytest.mark.parametrize("speaker", ["gpt", "assistant", "chatgpt", "bing", "bard", "model"])
def test_every_name_of_the_assistant_in_sharegpt_is_learned(speaker, learned, rules):
    row = {"conversations": [HI, {"from": speaker, "value": "hello"}]}
    assert learned("sharegpt", row, rules) == ["hello<|end|>"]


def test_a_function_call_is_learned_and_its_observation_is_shown_only(whole, rules):
    call, seen = {"from": "function_call", "value": json.dumps(WEATHER)}, {"from": "observation", "value": "sunny"}
    ((text, parts, _, _),) = whole("sharegpt", {"conversations": [HI, call, seen, HELLO]}, rules)
    assert json.loads(parts[0].removesuffix("<|end|>")) == WEATHER
    assert parts[1:] == ["hello<|end|>"]
    assert "<|tool|>sunny<|end|>" in text


def test_several_calls_of_one_turn_are_one_turn(learned, rules):
    calls = [WEATHER, {"name": "time", "arguments": "{}"}]
    (call,) = learned("sharegpt", {"conversations": [HI, {"from": "tool_call", "value": json.dumps(calls)}]}, rules)
    assert 0 < call.index('"weather"') < call.index('"time"')


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("search(Rome)", "conversations, turn 2 calls a function, but its value is no JSON"),
        ('{"name": "weather"}', "has no arguments"),
        ('{"arguments": {}}', "has no name"),
        ("[]", "turn 2 calls []"),
        ('["weather"]', "has no name and no arguments"),
        ('{"name": "weather", "arguments": 3}', "is malformed"),
    ],
)
def test_a_broken_function_call_is_refused(value, says, fault, rules):
    row = {"conversations": [HI, {"from": "function_call", "value": value}]}
    assert fault("sharegpt", row, rules, says).kind == "broken call"


def test_an_unknown_speaker_is_refused_with_the_nearest_name(fault, rules):
    found = fault(
        "sharegpt", {"conversations": [{"from": "humn", "value": "hi"}, HELLO]}, rules, "turn 1 is from 'humn'"
    )
    assert found.nearest[0] == "human"


@pytest.mark.parametrize(
    ("turns", "says"),
    [
        (None, "conversations is None"),
        ([], "conversations is []"),
        (["hi"], "turn 1 is 'hi'"),
        ([HI, {"from": "gpt", "value": " "}], "turn 2 (gpt) is empty"),
        ([HI, {"from": "gpt", "value": 3}], "turn 2 (gpt) is 3, not text"),
        ([HI, {"from": "gpt"}], "turn 2 has from"),
        ([{"human": "hi", "assistant": ""}], "turn 1, assistant is empty"),
        ([{"from": 3, "value": "hi"}], "turn 1 is from 3"),
    ],
)
def test_a_turn_that_says_nothing_is_refused(turns, says, fault, rules):
    fault("sharegpt", {"conversations": turns}, rules, says)


def test_a_mistyped_key_of_a_turn_is_answered_with_the_nearest(fault, rules):
    found = fault("sharegpt", {"conversations": [HI, {"form": "gpt", "valu": "hello"}]}, rules, "turn 2 has form, valu")
    assert found.nearest == ("from", "value")


def test_turns_of_role_and_content_and_pairs_of_human_and_assistant_are_read_too(learned, rules):
    spoken = [{"role": "human", "content": "hi"}, {"role": "gpt", "content": "hello"}]
    assert learned("sharegpt", {"conversations": spoken}, rules) == ["hello<|end|>"]
    pairs = [{"human": "hi", "assistant": "hello"}, {"human": "bye", "assistant": "so long"}]
    assert learned("sharegpt", {"conversation": pairs}, rules) == ["hello<|end|>", "so long<|end|>"]


def test_keys_that_a_table_filled_with_null_are_not_there(learned, rules):
    turns = [{**HI, "role": None}, {"role": "assistant", "content": "hello", "from": None, "value": None}]
    assert learned("sharegpt", {"conversations": turns, "system": None, "tools": None}, rules) == ["hello<|end|>"]


@pytest.mark.parametrize("key", ["weight", "loss", "loss_weight"])
def test_the_weight_of_a_turn_is_kept(key, learned, rules):
    turns = [HI, {**HELLO, key: 0}, HI, {"from": "gpt", "value": "again"}]
    assert learned("sharegpt", {"conversations": turns}, rules) == ["again<|end|>"]


def test_the_column_system_comes_first_and_only_once(whole, fault, rules):
    ((text, _, _, _),) = whole("sharegpt", {"conversations": [HI, HELLO], "system": "Be kind."}, rules)
    assert text.startswith("<|system|>Be kind.<|end|><|user|>hi")
    ((text, _, _, _),) = whole("sharegpt", {"conversations": [HI, HELLO], "system": ""}, rules)
    assert text.startswith("<|user|>hi")
    twice = {"conversations": [{"from": "system", "value": "Be brief."}, HI, HELLO], "system": "Be kind."}
    fault("sharegpt", twice, rules, "the conversation begins with a system message as well")


ADD = {"instruction": "Add.", "input": "1 and 2", "output": "3"}


def test_an_instruction_is_a_conversation_where_there_is_a_template_and_a_note_says_so(whole, rules):
    ((text, parts, shown, _),) = whole("alpaca", {**ADD, "system": "Be brief."}, rules)
    assert text == "<|system|>Be brief.<|end|><|user|>Add.\n1 and 2<|end|><|assistant|>3<|end|>"
    assert parts == ["3<|end|>"]
    assert shown.notes == ("instructions are shown as a conversation, by the chat template",)


@pytest.mark.parametrize("nothing", ["", " ", None])
def test_an_instruction_without_input_stands_alone(nothing, whole, rules):
    ((text, _, _, _),) = whole("alpaca", {**ADD, "input": nothing}, rules)
    assert text == "<|user|>Add.<|end|><|assistant|>3<|end|>"


def test_answers_in_the_history_of_an_instruction_are_learned_too(learned, rules):
    assert learned("alpaca", {**ADD, "history": [["hi", "hello"]]}, rules) == ["hello<|end|>", "3<|end|>"]


def test_without_a_template_an_instruction_takes_the_wording_of_alpaca_and_a_note_says_so(whole, plain_rules):
    ((text, parts, shown, _),) = whole("alpaca", ADD, plain_rules)
    assert text.startswith("Below is an instruction that describes a task, paired with an input that provides further")
    assert text.endswith("### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n3<|endoftext|>")
    assert parts == ["3<|endoftext|>"]
    assert shown.notes == ("instructions are shown in the wording of Alpaca, since the tokenizer has no chat template",)
    ((text, _, _, _),) = whole("alpaca", {**ADD, "input": ""}, plain_rules)
    assert text.startswith("Below is an instruction that describes a task. Write")
    assert "### Input" not in text


def test_braces_in_an_instruction_stay_as_they_are(whole, plain_rules):
    ((text, _, _, _),) = whole("alpaca", {**ADD, "instruction": "Fill {input} and {x}.", "input": "{0}"}, plain_rules)
    assert "### Instruction:\nFill {input} and {x}.\n\n### Input:\n{0}\n\n" in text


@pytest.mark.parametrize("column", ["system", "history"])
def test_what_the_wording_of_alpaca_has_no_place_for_is_refused(column, fault, plain_rules):
    value = {"system": "Be brief.", "history": [["hi", "hello"]]}[column]
    found = fault("alpaca", {**ADD, column: value}, plain_rules, f"{column} is filled, but the tokenizer has no chat")
    assert "data.chat_template" in str(found.next_step)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"instruction": ""}, "instruction is empty"),
        ({"output": None}, "output is None, not text"),
        ({"output": " "}, "output is empty"),
        ({"input": 3}, "input is 3, not text"),
        ({"system": ["a"]}, "system is ['a'], not text"),
        ({"history": [["hi"]]}, "history is [['hi']]"),
        ({"history": [["hi", ""]]}, "history is [['hi', '']]"),
        ({"history": "hi"}, "history is 'hi'"),
    ],
)
def test_an_instruction_with_a_broken_column_is_refused_by_name(changed, says, fault, rules):
    fault("alpaca", {**ADD, **changed}, rules, says)
