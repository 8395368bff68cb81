"""label and tagged: rows whose target is a class."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from manylora.data.tokens import TokenRules


@pytest.mark.parametrize(
    ("value", "label"), [("sport", "sport"), (3, "3"), (-1, "-1"), (True, "true"), (False, "false"), ("0", "0")]
)
def test_a_class_is_learned_as_text_and_no_token_is(value, label, whole, rules):
    ((text, parts, shown, marked),) = whole("label", {"text": "The Eagle", "label": value}, rules)
    assert (shown.label, shown.reference, shown.prompt) == (label, label, "The Eagle")
    assert (text, parts, marked.tags) == ("The Eagle", [], None)


def test_a_text_stands_between_what_the_tokenizer_puts_around_it(whole, bos_rules, word_rules):
    ((text, _, _, _),) = whole("label", {"text": "The Eagle", "label": 1}, bos_rules)
    assert text == "<s>The Eagle"
    ((_, _, _, marked),) = whole("label", {"text": "Paris is big", "label": 1}, word_rules)
    assert marked.tokens == word_rules.tokenizer("Paris is big")["input_ids"]


def test_two_texts_are_joined_as_the_tokenizer_joins_them(whole, pair_rules):
    ((_, _, shown, marked),) = whole("label", {"text": "Paris", "text_pair": "is hot", "label": 1}, pair_rules)
    assert marked.tokens == pair_rules.tokenizer("Paris", "is hot")["input_ids"]
    assert shown.prompt == shown.group == "Paris\nis hot"


def test_two_texts_are_refused_where_their_border_would_be_lost(fault, rules, bos_rules, word_rules):
    row = {"text": "Paris", "text_pair": "is hot", "label": 1}
    fault("label", row, word_rules, "tells two texts apart by token types")
    for undivided in (rules, bos_rules):
        found = fault("label", row, undivided, "puts nothing between two texts")
        assert "put both texts into the column text" in str(found.next_step)


@pytest.mark.parametrize("value", [None, "", " ", 0.5, [1, 2], {"a": 1}])
def test_a_label_that_is_no_class_is_refused(value, fault, rules):
    fault("label", {"text": "The Eagle", "label": value}, rules, "label is")


def test_a_text_without_words_has_no_class(fault, rules, bos_rules):
    fault("label", {"text": "", "label": 1}, rules, "text is empty")
    fault("label", {"text": "a", "text_pair": "", "label": 1}, rules, "text_pair is empty")
    fault("label", {"text": "<s>The Eagle", "label": 1}, bos_rules, "the text begins with <s>")


PARIS = {"tokens": ["Paris", "is", "big"], "tags": ["B-loc", "O", "O"]}


def test_the_class_of_a_word_is_learned_at_its_first_token(whole, word_rules):
    ((_, parts, shown, marked),) = whole("tagged", PARIS, word_rules)
    assert word_rules.tokenizer.convert_ids_to_tokens(marked.tokens) == ["[CLS]", "paris", "is", "b", "##ig", "[SEP]"]
    assert marked.spans == [(1, 2), (2, 3), (3, 4)]
    assert marked.tags == ("B-loc", "O", "O")
    assert parts == ["paris", "is", "b"]
    assert (shown.prompt, shown.reference) == ("Paris is big", "B-loc O O")


def test_the_tokens_of_a_tagged_sentence_are_those_of_its_text(whole, bos_rules, word_rules):
    words = ["The", "Eagle", "is", "near", "Burger", "King"]
    for rules in (bos_rules, word_rules):
        ((_, parts, _, marked),) = whole("tagged", {"tokens": words, "tags": list("OBOOBI")}, rules)
        assert marked.tokens == rules.tokenizer(" ".join(words))["input_ids"]
        assert len(parts) == len(words)


def test_a_word_tagged_minus_100_is_shown_and_has_no_class(whole, word_rules):
    ((_, parts, shown, marked),) = whole("tagged", {"tokens": PARIS["tokens"], "tags": [1, -100, 0]}, word_rules)
    assert parts == ["paris", "b"]
    assert marked.tags == ("1", "0")
    assert shown.reference == "1 - 0"


@pytest.mark.parametrize("column", ["ner_tags", "pos_tags", "labels"])
def test_tags_may_have_their_usual_names_unless_two_are_there(column, whole, fault, word_rules):
    row = {"tokens": PARIS["tokens"], column: [1, 0, 0]}
    assert whole("tagged", row, word_rules)[0][3].tags == ("1", "0", "0")
    assert whole("tagged", {**row, "tags": [2, 2, 2]}, word_rules)[0][3].tags == ("2", "2", "2")
    other = "pos_tags" if column != "pos_tags" else "ner_tags"
    found = fault("tagged", {**row, other: [5, 6, 7]}, word_rules, "are all lists that may be the tags")
    assert str(found.next_step).startswith("say which: data.columns: {tags: ")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"tags": ["O", "O"]}, "there are 3 tokens and 2 tags"),
        ({"tokens": [], "tags": []}, "tokens is []"),
        ({"tags": None}, "tags is None"),
        ({"tokens": "Paris is big"}, "tokens is 'Paris is big'"),
        ({"tokens": ["Paris", "", "big"]}, "tokens: word 2 is ''"),
        ({"tokens": ["Paris", 3, "big"]}, "tokens: word 2 is 3"),
        ({"tags": ["O", None, "O"]}, "tags is None, no class"),
        ({"tokens": ["Paris", "\u200b", "big"]}, "the tokenizer makes no token of the word '\\u200b'"),
    ],
)
def test_a_sentence_whose_words_and_tags_do_not_pair_is_refused(changed, says, fault, word_rules):
    fault("tagged", {**PARIS, **changed}, word_rules, says)


def test_a_tokenizer_that_joins_words_is_refused_since_the_first_token_of_a_word_is_not_known(fault):
    vocabulary = {"[UNK]": 0, "a": 1, " b": 2, "a b": 3, "b": 4}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    rules = TokenRules.of(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]"), 0)
    fault("tagged", {"tokens": ["a", "b"], "tags": ["O", "O"]}, rules, "does not encode a text word by word")
