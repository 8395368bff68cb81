from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manylora.data import examples
from manylora.data.examples import Encoded, Reading, encode
from manylora.data.faults import RowFault
from manylora.data.rows import Row
from manylora.errors import ConfigError, DataError, UnknownName

EOS, BOS = 0, 1
PAIR = {"prompt": "name : The Eagle\n", "completion": "The Eagle is a coffee shop ."}


def rows(*values):
    return [Row(value, "rows.jsonl", line) for line, value in enumerate(values, start=1)]


def pairs(*values):
    return rows(*({"prompt": prompt, "completion": completion} for prompt, completion in values))


def encoded_as(some_rows, tokenizer, *, eos_id=EOS, **reading) -> Encoded:
    return encode(some_rows, tokenizer, Reading(**{"max_length": 200} | reading), eos_id=eos_id)


def one(values, tokenizer, **options):
    return encoded_as(rows(values), tokenizer, **options).examples[0]


def refused(some_rows, tokenizer, **options) -> str:
    with pytest.raises(DataError) as caught:
        encoded_as(some_rows, tokenizer, **options)
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
    encoded = encoded_as(pairs(("2 + 2", "4"), ("a\n", "4"), ("2 + 2", "5"), ("b", " 4")), tokenizer)
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
    parts = encoded_as(rows({"text": text}), tokenizer, max_length=length).examples
    learned = np.concatenate([part.tokens[part.trained] for part in parts])
    assert learned.tolist() == whole.tokens[1:].tolist()
    assert all(len(part) <= length and not part.trained[0] and part.num_trained for part in parts)
    assert len({part.group for part in parts}) == 1
    assert whole.group == (text if len(text) <= 256 else parts[0].group)


def test_a_long_row_is_refused_with_its_length_the_limit_and_what_would_fit(tokenizer):
    message = refused(pairs(("a\n", "b"), ("a\n", "b " * 40), ("a\n", "b " * 60)), tokenizer, max_length=30)
    assert message.startswith("rows.jsonl:2: the row has ")
    assert "the limit is 30" in message
    longest = max(len(one({"prompt": "a\n", "completion": "b " * 60}, tokenizer)), 0)
    assert f"row_tokens to {longest}" in message
    assert "2 of 3 rows" in message


def chat(*words_of_answers):
    """A conversation with answers of so many words."""
    turns = [
        ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b " * words + "b"})
        for words in words_of_answers
    ]
    return {"messages": [message for turn in turns for message in turn]}


def test_right_cuts_a_text_anywhere_and_says_so(tokenizer):
    some = rows({"text": "b " * 40}, {"text": "b"})
    encoded = encoded_as(some, tokenizer, max_length=30, overflow="right")
    assert [len(example) for example in encoded.examples] == [30, 2]
    assert encoded.examples[0].num_trained == 29
    assert any("1 of 2 rows" in note and "cut at the end" in note for note in encoded.notes)


def test_right_cuts_a_conversation_after_the_last_turn_that_fits_whole(tokenizer):
    encoded = encoded_as(rows(chat(5, 5, 60)), tokenizer, max_length=60, overflow="right")
    whole = one(chat(5, 5), tokenizer)
    assert encoded.examples[0].tokens.tolist() == whole.tokens.tolist()
    assert encoded.examples[0].trained.tolist() == whole.trained.tolist()


def test_right_never_cuts_an_answer(tokenizer):
    message = refused(rows(chat(2), chat(60)), tokenizer, max_length=30, overflow="right")
    assert message.startswith("rows.jsonl:2: the row has ")
    assert "its first target ends at token" in message
    with pytest.raises(ConfigError, match="always cuts its target off"):
        encoded_as(rows(PAIR), tokenizer, overflow="right")


def test_a_data_set_in_which_no_end_is_left_is_refused(tokenizer):
    assert "no end token is learned" in refused(rows({"text": "b " * 40}), tokenizer, max_length=20, overflow="right")


def test_a_split_prompt_makes_no_sense_and_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="cannot be split"):
        encoded_as(rows(PAIR), tokenizer, max_length=20, overflow="split")
    with pytest.raises(ConfigError, match="nearest: right"):
        encoded_as(rows({"text": "a b"}), tokenizer, max_length=20, overflow="rihgt")


def test_bad_rows_can_be_skipped_and_are_counted_by_reason(tokenizer):
    bad = [PAIR | {"completion": ""}, {"prompt": "a"}, PAIR | {"completion": " "}, PAIR | {"completion": "b " * 300}]
    broken = Row({}, "rows.jsonl", 7, RowFault("broken JSON", "broken JSON at character 3"))
    encoded = encoded_as([*rows(PAIR, *bad, PAIR), broken], tokenizer, on_bad_row="skip", format="prompt-completion")
    assert [example.line for example in encoded.examples] == [1, 6]
    assert [(reason.kind, reason.count, reason.where) for reason in encoded.skipped] == [
        ("completion empty", 2, "rows.jsonl:2"),
        ("misfit", 1, "rows.jsonl:3"),
        ("broken JSON", 1, "rows.jsonl:7"),
        ("too long", 1, "rows.jsonl:5"),
    ]
    table = encoded.notes[-5:]
    assert table[0] == "5 of 7 rows are skipped:"
    assert table[1] == "  2  completion empty: completion is empty (first rows.jsonl:2)"


def test_skipping_every_row_is_no_success(tokenizer):
    message = refused(pairs(("a\n", ""), ("b\n", ""), ("c\n", None)), tokenizer, on_bad_row="skip")
    assert message.startswith("no row can be learned from\n3 of 3 rows are skipped:")
    assert "2  completion empty: completion is empty (first rows.jsonl:1)" in message
    assert "1  completion no text: completion is None" in message


def test_a_fault_says_how_many_rows_have_other_faults_and_how_to_skip_them(tokenizer):
    message = refused(rows(PAIR, PAIR | {"completion": ""}, PAIR | {"prompt": None}), tokenizer)
    assert "(1 of 3 rows have other faults)" in message
    assert "data.on_bad_row: skip" in message


def test_half_a_surrogate_pair_is_no_text(tokenizer):
    assert "'\\ud83d', half of a surrogate pair" in refused(pairs(("a\n", "b \ud83d")), tokenizer)


def test_rows_beyond_the_first_chunk_are_read_by_the_same_format(tokenizer, monkeypatch):
    monkeypatch.setattr(examples, "CHUNK_ROWS", 4)
    encoded = encoded_as(pairs(*((f"{number}\n", "b") for number in range(11))), tokenizer)
    assert [example.line for example in encoded.examples] == list(range(1, 12))
    assert [example.prompt for example in encoded.examples] == [f"{number}\n" for number in range(11)]
    message = refused([*pairs(*[("a\n", "b")] * 9), Row({"text": "a"}, "rows.jsonl", 10)], tokenizer)
    assert message.startswith("rows.jsonl:10: the columns text do not fit")


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
        encoded_as(rows(PAIR), tokenizer, format="txet")
    assert "rows.jsonl:1: the columns prompt, completion do not fit" in refused(rows(PAIR), tokenizer, format="text")
    assert "no rows" in refused([], tokenizer, format="text")


def test_the_first_note_counts_what_is_learned(tokenizer):
    encoded = encoded_as(rows(PAIR, PAIR), tokenizer)
    learned = sum(example.num_trained for example in encoded.examples)
    assert encoded.notes[0].startswith(f"format prompt-completion: 2 examples, {learned} of ")


def test_columns_that_nobody_reads_are_said(tokenizer):
    notes = encoded_as(rows(PAIR | {"level": 3}, PAIR), tokenizer).notes
    assert "columns not used: level" in notes


def test_classes_are_learned_from_a_tokenizer_without_an_end(make_tokenizer):
    tokenizer = make_tokenizer()
    example = one({"text": "The Eagle", "label": "pub"}, tokenizer, eos_id=None)
    assert (example.label, example.num_trained) == ("pub", 0)


def test_a_tokenizer_with_code_of_its_own_is_obeyed(make_tokenizer):
    plain = make_tokenizer()

    class Shouting(type(plain)):
        def _encode_plus(self, text, *args, **kwargs):
            return super()._encode_plus([one.upper() for one in text], *args, **kwargs)

    shouting = make_tokenizer()
    shouting.__class__ = Shouting
    shown = one(PAIR, shouting)
    assert plain.decode(shown.tokens) == (PAIR["prompt"] + PAIR["completion"]).upper() + "<|endoftext|>"


@pytest.mark.parametrize("state", ["padding", "truncation", "split special tokens"])
def test_what_was_asked_of_the_tokenizer_before_changes_nothing(make_tokenizer, state):
    tokenizer = make_tokenizer()
    wanted = one(PAIR, tokenizer).tokens.tolist()
    match state:
        case "padding":
            tokenizer(["a", "b"], padding="max_length", max_length=90)
        case "truncation":
            tokenizer("a b c d", truncation=True, max_length=2)
        case "split special tokens":
            tokenizer("a <|end|>", split_special_tokens=True)
    assert one(PAIR, tokenizer).tokens.tolist() == wanted
