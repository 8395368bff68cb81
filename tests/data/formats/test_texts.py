"""text, prompt-completion, pairs and segments: rows that become bare texts."""

from __future__ import annotations

import pytest


def test_of_a_text_every_token_but_the_first_is_learned(learned, rules, bos_rules):
    assert learned("text", {"text": "The Eagle"}, bos_rules) == ["The Eagle<|endoftext|>"]
    assert learned("text", {"text": "is near"}, rules) == [" near<|endoftext|>"]


def test_of_a_prompt_and_its_completion_the_completion_is_learned(whole, rules):
    ((text, parts, _, _),) = whole("prompt-completion", {"prompt": "2 + 2 is ", "completion": "4"}, rules)
    assert (text, parts) == ("2 + 2 is 4<|endoftext|>", ["4<|endoftext|>"])


def test_a_source_and_its_target_stand_on_lines_of_their_own(whole, rules):
    ((text, parts, shown, _),) = whole("pairs", {"source": "a dog", "target": "ein Hund"}, rules)
    assert (text, parts) == ("a dog\nein Hund<|endoftext|>", ["ein Hund<|endoftext|>"])
    assert shown.notes == ("a line end is put between source and target",)
    ((text, _, shown, _),) = whole("pairs", {"source": "a dog => ", "target": "ein Hund"}, rules)
    assert (text, shown.notes) == ("a dog => ein Hund<|endoftext|>", ())


def test_a_translation_goes_from_its_first_language_to_the_second_and_a_note_says_so(whole, rules):
    row = {"translation": {"en": "a dog", "de": "ein Hund"}}
    ((_, parts, shown, _),) = whole("pairs", row, rules)
    assert parts == ["ein Hund<|endoftext|>"]
    assert shown.notes[0] == "translations go from en to de"


def test_sentences_are_joined_and_every_target_of_a_source_is_an_example_of_the_same_group(whole, rules):
    found = whole("pairs", {"source": ["One. ", "Two."], "target": ["first", "second"]}, rules)
    assert [parts for _, parts, _, _ in found] == [["first<|endoftext|>"], ["second<|endoftext|>"]]
    assert {shown.prompt for _, _, shown, _ in found} == {shown.group for _, _, shown, _ in found} == {"One. Two.\n"}
    assert len(found[0][2].notes) == 3
    assert found[1][2].notes == ()


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"source": "", "target": "a"}, "source is empty"),
        ({"source": "a", "target": None}, "target is None"),
        ({"source": [], "target": "a"}, "source is an empty list"),
        ({"source": "a", "target": ["b", ""]}, "target: text 2 of the list is ''"),
        ({"source": "a", "target": [3]}, "target: text 1 of the list is 3"),
        ({"translation": {"en": "a", "de": "b", "fr": "c"}}, "translation holds en, de, fr"),
        ({"translation": {"en": "a"}}, "translation holds en"),
        ({"translation": {"en": "a", "de": ""}}, "translation, de is empty"),
        ({"translation": "a"}, "translation holds 'a'"),
    ],
)
def test_a_pair_that_lacks_one_side_is_refused(row, says, fault, rules):
    fault("pairs", row, rules, says)


def segments(*labelled):
    return {"segments": [{"label": label, "text": text} for label, text in labelled]}


def test_segments_are_joined_as_they_are_and_those_with_label_true_are_learned(whole, rules):
    row = segments((False, "Q: 2 + 2?"), (True, "A: 4"), (True, "<|endoftext|>"), (False, "Q: 3?"), (True, "3<|end|>"))
    ((text, parts, shown, marked),) = whole("segments", row, rules)
    assert text == "Q: 2 + 2?A: 4<|endoftext|>Q: 3?3<|end|>"
    assert parts == ["A: 4<|endoftext|>", "3<|end|>"]  # neighbours are one span
    assert (shown.prompt, shown.reference) == ("Q: 2 + 2?", "A: 4<|endoftext|>")
    assert all(first[1] < second[0] for first, second in zip(marked.spans, marked.spans[1:], strict=False))


def test_no_end_token_is_added_to_segments(learned, rules):
    assert learned("segments", segments((False, "Q"), (True, "A")), rules) == ["A"]


def test_the_bos_stands_before_segments_once_and_is_never_learned(whole, bos_rules):
    ((text, parts, shown, _),) = whole("segments", segments((False, "Q"), (True, "A")), bos_rules)
    assert (text, parts) == ("<s>QA", ["A"])
    assert shown.notes == ("the first segment does not begin with the tokenizer's BOS: it is put there",)
    ((text, parts, shown, _),) = whole("segments", segments((True, "<s>Q"), (True, "A")), bos_rules)
    assert (text, parts, shown.notes) == ("<s>QA", ["QA"], ())


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([], "segments is []"),
        (None, "segments is None"),
        (["a"], "segment 1 is 'a': it has no label and no text"),
        ([{"label": True}], "it has no text"),
        ([{"label": True, "text": ""}], "segment 1: text is ''"),
        ([{"label": True, "text": 3}], "segment 1: text is 3"),
        ([{"label": "yes", "text": "a"}], "segment 1: label is 'yes', not true or false"),
        ([{"label": False, "text": "a"}], "no segment has label true"),
    ],
)
def test_segments_that_cannot_be_told_apart_are_refused(value, says, fault, rules):
    fault("segments", {"segments": value}, rules, says)
