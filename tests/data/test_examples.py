from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manylora.data.examples import encode
from manylora.data.readers import Row
from manylora.errors import ConfigError, DataError, UnknownName

EOS, BOS = 0, 1
PAIR = {"prompt": "name : The Eagle\n", "completion": "The Eagle is a coffee shop ."}


def rows(*values):
    return [Row(value, "rows.jsonl", line) for line, value in enumerate(values, start=1)]


def pairs(*values):
    return rows(*({"prompt": prompt, "completion": completion} for prompt, completion in values))


def one(values, tokenizer, **options):
    return encode(rows(values), tokenizer, **{"max_length": 200, "eos_id": EOS, **options}).examples[0]


def refused(some_rows, tokenizer, **options) -> str:
    with pytest.raises(DataError) as caught:
        encode(some_rows, tokenizer, **{"max_length": 200, "eos_id": EOS, **options})
    return str(caught.value)


def test_prompt_and_completion_are_encoded_apart_and_eos_is_learned(tokenizer):
    example = one(PAIR, tokenizer)
    prompt = tokenizer.encode(PAIR["prompt"])
    completion = tokenizer.encode(PAIR["completion"])
    assert example.tokens.tolist() == [*prompt, *completion, EOS]
    assert example.trained.tolist() == [False] * len(prompt) + [True] * (len(completion) + 1)
    assert example.prompt_length == len(prompt)
    assert example.num_trained == len(completion) + 1
    assert example.tokens.dtype == np.int32
    assert example.trained.dtype == np.bool_
    assert (example.prompt, example.reference, example.group) == (PAIR["prompt"], PAIR["completion"], PAIR["prompt"])
    assert (example.file, example.line) == ("rows.jsonl", 1)


def test_a_tokenizer_with_bos_gets_exactly_one_at_the_front(make_tokenizer):
    tokenizer = make_tokenizer(bos=True)
    assert tokenizer.encode("a")[0] == BOS
    example = one(PAIR, tokenizer)
    assert example.tokens.tolist().count(BOS) == 1
    assert example.tokens[0] == BOS
    assert example.tokens[: example.prompt_length].tolist() == tokenizer.encode(PAIR["prompt"])
    text = one({"text": "The Eagle"}, tokenizer)
    assert text.tokens.tolist() == [*tokenizer.encode("The Eagle"), EOS]
    assert text.prompt_length == 1


def test_eos_that_the_data_wrote_is_not_doubled(tokenizer):
    assert one(PAIR | {"completion": "yes<|endoftext|>"}, tokenizer).tokens.tolist().count(EOS) == 1


def test_the_first_of_several_eos_is_appended(tokenizer):
    assert one(PAIR, tokenizer, eos_id=(5, EOS)).tokens[-1] == 5


def test_missing_white_space_is_said_and_nothing_is_invented(tokenizer):
    encoded = encode(
        pairs(("2 + 2", "4"), ("a\n", "4"), ("2 + 2", "5"), ("b", " 4")), tokenizer, max_length=99, eos_id=EOS
    )
    note = next(note for note in encoded.notes if "white space" in note)
    assert "2 of 4 rows, first rows.jsonl:1" in note
    assert tokenizer.decode(encoded.examples[0].tokens) == "2 + 24<|endoftext|>"


def test_every_token_of_a_text_but_the_first_is_learned(tokenizer):
    example = one({"text": "The Eagle is near ."}, tokenizer)
    assert example.trained.tolist() == [False] + [True] * (len(example.tokens) - 1)
    assert example.tokens[-1] == EOS


@given(length=st.integers(2, 40), words=st.integers(1, 120))
def test_a_split_text_learns_every_token_once_in_order(tokenizer, length, words):
    text = " ".join(f"word{number}" for number in range(words))
    whole = one({"text": text}, tokenizer, max_length=10_000)
    parts = encode(rows({"text": text}), tokenizer, max_length=length, eos_id=EOS).examples
    learned = np.concatenate([part.tokens[part.trained] for part in parts])
    assert learned.tolist() == whole.tokens[1:].tolist()
    assert all(len(part) <= length and not part.trained[0] and part.num_trained for part in parts)
    assert {part.group for part in parts} == {text}


def test_a_long_row_is_refused_with_its_length_the_limit_and_what_would_fit(tokenizer):
    message = refused(pairs(("a\n", "b"), ("a\n", "b " * 40), ("a\n", "b " * 60)), tokenizer, max_length=30)
    assert message.startswith("rows.jsonl:2: the row has ")
    assert "the limit is 30" in message
    longest = max(len(one({"prompt": "a\n", "completion": "b " * 60}, tokenizer)), 0)
    assert f"row_tokens to {longest}" in message
    assert "2 of 3 rows" in message


def test_right_cuts_the_end_and_says_so(tokenizer):
    some = pairs(("a\n", "b " * 40), ("a\n", "b"))
    encoded = encode(some, tokenizer, max_length=30, overflow="right", eos_id=EOS)
    assert [len(example) for example in encoded.examples] == [30, len(encoded.examples[1])]
    assert any("1 of 2 rows" in note and "cut at the end" in note for note in encoded.notes)


def test_right_refuses_a_row_of_which_no_target_is_left(tokenizer):
    assert "behind the cut" in refused(
        pairs(("a " * 40, "b"), ("a\n", "b")), tokenizer, max_length=20, overflow="right"
    )


def test_right_refuses_a_data_set_in_which_no_end_is_left(tokenizer):
    assert "no end token is learned" in refused(pairs(("a\n", "b " * 40)), tokenizer, max_length=20, overflow="right")


def test_a_split_prompt_makes_no_sense_and_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="cannot be split"):
        encode(rows(PAIR), tokenizer, max_length=20, overflow="split", eos_id=EOS)
    with pytest.raises(ConfigError, match="nearest: right"):
        encode(rows(PAIR), tokenizer, max_length=20, overflow="rihgt", eos_id=EOS)


BAD = {
    "an empty completion": ({"completion": " "}, "completion is empty"),
    "an empty prompt without BOS": ({"prompt": ""}, "prompt is empty"),
    "a number": ({"completion": 4}, "completion is 4, not text"),
    "a null": ({"prompt": None}, "prompt is None, not text"),
    "a list beside a string": (
        {"prompt": [{"role": "user", "content": "a"}]},
        "one of prompt and completion is a list",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_pair_is_refused_with_its_line_and_count(tokenizer, name):
    change, expected = BAD[name]
    message = refused(rows(PAIR, PAIR | change, PAIR | change), tokenizer)
    assert message.startswith("rows.jsonl:2: ")
    assert expected in message
    assert "2 of 3 rows" in message


def test_an_empty_prompt_stands_behind_bos(make_tokenizer):
    example = one(PAIR | {"prompt": ""}, make_tokenizer(bos=True))
    assert example.prompt_length == 1
    assert example.tokens[0] == BOS


def test_an_empty_text_is_refused(tokenizer):
    assert "text is empty" in refused(rows({"text": "a b"}, {"text": "\n"}), tokenizer)


@pytest.mark.parametrize(
    "values", [{"text": "<s>The Eagle"}, PAIR | {"prompt": "<s>a"}, PAIR | {"completion": "<s>a"}], ids=str
)
def test_a_doubled_bos_is_refused(make_tokenizer, values):
    assert "<s>" in refused(rows(values), make_tokenizer(bos=True))


def test_a_template_that_writes_bos_twice_is_refused(make_tokenizer):
    tokenizer = make_tokenizer("<s><s>" + make_tokenizer().chat_template, bos=True)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert "twice" in refused(rows({"messages": messages}), tokenizer)


def test_a_tokenizer_without_an_end_is_refused(tokenizer):
    assert "no end-of-text token" in refused(rows(PAIR), tokenizer, eos_id=None)


def test_a_named_format_must_exist_and_fit(tokenizer):
    with pytest.raises(UnknownName, match="nearest: text"):
        encode(rows(PAIR), tokenizer, format="txet", max_length=9, eos_id=EOS)
    assert "rows.jsonl:1: the columns prompt, completion do not fit" in refused(rows(PAIR), tokenizer, format="text")
    assert "no rows" in refused([], tokenizer, format="text")


def test_the_first_note_counts_what_is_learned(tokenizer):
    encoded = encode(rows(PAIR, PAIR), tokenizer, max_length=99, eos_id=EOS)
    learned = sum(example.num_trained for example in encoded.examples)
    assert encoded.notes[0].startswith(f"format prompt-completion: 2 examples, {learned} of ")


def test_columns_that_nobody_reads_are_said(tokenizer):
    notes = encode(rows(PAIR | {"level": 3}, PAIR), tokenizer, max_length=99, eos_id=EOS).notes
    assert "columns not used: level" in notes
