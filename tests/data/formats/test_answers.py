"""preference and unpaired: answers, and which of them is better."""

from __future__ import annotations

import pytest

USER = {"role": "user", "content": "hi"}
GOOD, BAD = {"role": "assistant", "content": "hello"}, {"role": "assistant", "content": "what"}
PLAIN = {"prompt": "Say hi: ", "chosen": "hello", "rejected": "what"}


@pytest.fixture
def both(whole):
    """(row, rules) -> the text before the answer, the chosen and the rejected answer, and the notes of the row."""

    def of_row(row, rules):
        (good, (one,), chosen, _), (bad, (other,), rejected, _) = whole("preference", row, rules)
        assert (chosen.variant, rejected.variant) == ("chosen", "rejected")
        assert chosen.prompt == rejected.prompt
        assert chosen.group == rejected.group
        prompt = good.removesuffix(one)
        assert prompt == bad.removesuffix(other)
        return prompt, one, other, (*chosen.notes, *rejected.notes)

    return of_row


def test_two_texts_follow_their_prompt_as_it_is(both, rules):
    assert both(PLAIN, rules) == ("Say hi: ", "hello<|endoftext|>", "what<|endoftext|>", ())


CHAT = {
    "prompt of messages, answers of messages": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "answers of one message": {"messages": [USER], "chosen": GOOD, "rejected": BAD},
    "answers of text": {"messages": [USER], "chosen": "hello", "rejected": "what"},
    "one answer of text": {"prompt": [USER], "chosen": "hello", "rejected": [BAD]},
    "text and answers of messages": {"prompt": "hi", "chosen": [GOOD], "rejected": [BAD]},
    "whole conversations": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "whole conversations and their prompt": {"prompt": "hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "from and value": {
        "conversations": [{"from": "human", "value": "hi"}],
        "chosen": {"from": "gpt", "value": "hello"},
        "rejected": {"from": "gpt", "value": "what"},
    },
    "rejected_response and messages": {"messages": [USER, GOOD], "rejected_response": "what"},
    "rejected_messages and messages": {"messages": [USER, GOOD], "rejected_messages": [USER, BAD]},
}


@pytest.mark.parametrize("row", CHAT.values(), ids=CHAT)
def test_however_messages_are_spread_over_columns_prompt_and_answers_are_the_same(row, both, rules):
    assert both(row, rules) == ("<|user|>hi<|end|><|assistant|>", "hello<|end|>", "what<|end|>", ())


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "hi", "input": "", "chosen": "hello", "rejected": "what", "output": "hello"},
        {"query": "hi", "response": "hello", "rejected_response": "what"},
        {"instruction": "hi", "chosen": [GOOD], "rejected": [BAD]},
    ],
)
def test_an_instruction_is_shown_as_in_alpaca(row, both, rules, plain_rules):
    prompt, chosen, rejected, _ = both(row, rules)
    assert (prompt, chosen, rejected) == ("<|user|>hi<|end|><|assistant|>", "hello<|end|>", "what<|end|>")
    if isinstance(row.get("chosen", ""), str):
        prompt, chosen, rejected, notes = both(row, plain_rules)
        assert prompt.endswith("### Instruction:\nhi\n\n### Response:\n")
        assert chosen == "hello<|endoftext|>"
        assert notes == ("instructions are shown in the wording of Alpaca, since the tokenizer has no chat template",)


def test_in_the_history_of_an_instruction_nothing_is_learned(both, rules):
    row = {"instruction": "Go on.", "history": [["a", "b"]], "system": "Be kind.", "chosen": "c", "rejected": "d"}
    assert both(row, rules)[0] == (
        "<|system|>Be kind.<|end|><|user|>a<|end|><|assistant|>b<|end|><|user|>Go on.<|end|><|assistant|>"
    )


def test_two_conversations_share_all_turns_up_to_the_first_that_differs(whole, rules):
    common = [USER, GOOD, USER]
    row = {"chosen": [*common, GOOD, USER, GOOD], "rejected": [*common, BAD]}
    (_, chosen, _, _), (_, rejected, _, _) = whole("preference", row, rules)
    assert chosen == ["hello<|end|>", "hello<|end|>"]  # the turns after the one that differs are part of the answer
    assert rejected == ["what<|end|>"]


def test_the_columns_system_and_tools_stand_before_the_messages(both, rules):
    row = {"chosen": [USER, GOOD], "rejected": [USER, BAD], "system": "Be kind."}
    assert both(row, rules)[0].startswith("<|system|>Be kind.<|end|><|user|>hi")
    assert '"lookup"' in both({**row, "tools": [{"name": "lookup", "parameters": {}}]}, rules)[0]


def test_messages_of_the_prompt_that_the_answers_repeat_are_shown_once(both, rules):
    row = {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    prompt, _, _, notes = both(row, rules)
    assert prompt == "<|user|>hi<|end|><|assistant|>"
    assert notes == ("chosen and rejected begin with the messages of the prompt: these are shown once",)


def test_a_prompt_that_both_texts_repeat_is_kept_and_said(both, rules):
    row = {"prompt": "Hi? ", "chosen": "Hi? hello", "rejected": "Hi? what"}
    prompt, chosen, _, notes = both(row, rules)
    assert (prompt, chosen) == ("Hi? ", "Hi? hello<|endoftext|>")
    assert notes == ("chosen and rejected begin with the text of the prompt: it stands there twice",)


def test_of_several_prompts_the_one_that_is_taken_is_said(both, rules):
    row = {"prompt": "hi", "messages": [USER, GOOD], "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    assert both(row, rules)[3] == ("the prompt is taken from prompt, not from messages",)


def test_texts_without_a_prompt_part_at_their_last_common_assistant(both, rules):
    start = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: and?\n\nAssistant:"
    row = {"chosen": f"{start} Well, yes.", "rejected": f"{start} Well, no."}
    assert both(row, rules) == (start, " Well, yes.<|endoftext|>", " Well, no.<|endoftext|>", ())
    row["rejected"] = f"{start} No.\n\nHuman: why?\n\nAssistant: So."
    assert both(row, rules)[3] == ("an answer goes on with a turn of Human, which is learned too",)


FAULTS = {
    "chosen and rejected are the same": [
        {**PLAIN, "rejected": "hello"},
        {"chosen": [USER, GOOD], "rejected": [USER, dict(GOOD)]},
        {"instruction": "hi", "chosen": "a", "rejected": "a"},
        {"messages": [USER, GOOD], "rejected_response": "hello"},
    ],
    "there is no prompt column": [
        {"chosen": "yes", "rejected": "no"},
        {"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: y"},
        {"chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "other"}, BAD]},
        {"chosen": "yes", "rejected": [BAD]},
    ],
    "chosen is None": [{**PLAIN, "chosen": None}],
    "rejected is 3": [{**PLAIN, "rejected": 3}],
    "rejected is None": [{"messages": [USER, GOOD], "rejected_response": None}],
    "chosen is empty": [{**PLAIN, "chosen": " "}, {"prompt": [USER], "chosen": "", "rejected": [BAD]}],
    "prompt is empty": [{**PLAIN, "prompt": ""}, {"prompt": "", "chosen": [GOOD], "rejected": [BAD]}],
    "chosen is []": [{"prompt": [USER], "chosen": [], "rejected": [BAD]}],
    "chosen has no answer after": [
        {"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: y"}
    ],
    "after the prompt chosen has no message": [{"chosen": [USER], "rejected": [USER, BAD]}],
    "after the prompt chosen goes on with a message from 'user'": [
        {"prompt": [GOOD], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [BAD, USER, GOOD], "rejected": [BAD, BAD]},
    ],
    "no message that chosen and rejected begin with says that": [
        {"prompt": "another", "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    ],
    "system is filled, but prompt and answers are plain text": [{**PLAIN, "system": "Be kind."}],
    "the last of them should be the chosen answer": [{"messages": [GOOD], "rejected_response": "what"}],
    "turn 1 is from 'gtp'": [{"prompt": [USER], "chosen": {"from": "gtp", "value": "a"}, "rejected": "b"}],
}


@pytest.mark.parametrize(
    ("says", "row"), [(says, row) for says, rows in FAULTS.items() for row in rows], ids=lambda value: str(value)[:40]
)
def test_a_preference_that_teaches_none_is_refused(says, row, fault, rules):
    fault("preference", row, rules, says)


def test_a_preference_may_have_an_empty_prompt_where_a_bos_comes_first(both, bos_rules):
    assert both({**PLAIN, "prompt": ""}, bos_rules)[:2] == ("<s>", "hello<|endoftext|>")


BODIES = {
    "prompt and completion": ({"prompt": "Say hi: ", "completion": "hello"}, "hello<|endoftext|>"),
    "messages in prompt and completion": ({"prompt": [USER], "completion": [GOOD]}, "hello<|end|>"),
    "messages": ({"messages": [USER, GOOD]}, "hello<|end|>"),
    "conversations": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}, "hello<|end|>"
    ),
    "instruction": ({"instruction": "hi", "output": "hello", "history": [["a", "b"]]}, "hello<|end|>"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "answer"), BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("column", ["label", "kto_tag", "desirable"])
def test_an_unpaired_answer_is_learned_and_bears_its_label(body, answer, column, whole, rules):
    for value, label in ((True, "true"), (False, "false"), (1, "true"), (0, "false"), ("True", "true"), ("0", "false")):
        ((_, parts, shown, _),) = whole("unpaired", {**body, column: value}, rules)
        assert parts == [answer]
        assert shown.label == label


def test_in_a_conversation_the_label_judges_the_last_message_only(learned, rules):
    assert learned("unpaired", {"messages": [USER, BAD, USER, GOOD], "label": True}, rules) == ["hello<|end|>"]


@pytest.mark.parametrize("value", [None, 2, 0.5, "maybe", [True], ""])
def test_a_label_that_is_no_boolean_is_refused(value, fault, rules):
    fault("unpaired", {"messages": [USER, GOOD], "label": value}, rules, f"label is {value!r}, not true or false")


def test_an_unpaired_row_without_an_answer_is_refused(fault, rules):
    fault("unpaired", {"messages": [USER, GOOD, USER], "label": True}, rules, "the last message is from 'user'")
    fault("unpaired", {"messages": [], "label": True}, rules, "messages is []")
    fault("unpaired", {"messages": None, "label": True}, rules, "messages is None")
    fault("unpaired", {"prompt": "a", "completion": None, "label": True}, rules, "completion is None")
    fault("unpaired", {"messages": [USER, GOOD], "label": True, "kto_tag": True}, rules, "label and kto_tag may both")


def test_columns_that_a_table_filled_with_null_are_not_there(learned, rules):
    row = {"messages": None, "prompt": "Say hi: ", "completion": "hello", "kto_tag": None, "label": False}
    assert learned("unpaired", row, rules) == ["hello<|endoftext|>"]
