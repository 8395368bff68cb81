from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manylora.data.balance import balance_of, entities_in
from manylora.data.example import Example
from manylora.data.examples import Reading, encode
from manylora.data.likeness import Alike
from manylora.data.rows import Row
from manylora.data.survey import Lengths, survey

WORDS: list[str] = []


def ids(text: str) -> list[int]:
    """A token for each word, with the white space before it."""
    parts = [part for part in text.replace(" ", "\0 ").split("\0") if part]
    for part in parts:
        if part not in WORDS:
            WORDS.append(part)
    return [WORDS.index(part) for part in parts]


def decode(lists):
    return ["".join(WORDS[token] for token in one) for one in lists]


def example(prompt: str, answer: str, line: int = 1, **further) -> Example:
    before, after = ids(prompt), ids(answer)
    trained = np.zeros(len(before) + len(after), np.bool_)
    trained[len(before) :] = further.pop("learned", True)
    values = {"group": prompt, "file": "a.jsonl", "line": line} | further
    return Example(np.array(before + after, np.int32), trained, len(before), prompt, answer, **values)


def text(words: str, line: int = 1, **further) -> Example:
    tokens = np.array(ids(words), np.int32)
    values = {"group": words, "file": "a.jsonl", "line": line} | further
    return Example(tokens, np.zeros(len(tokens), np.bool_), len(tokens), words, "", **values)


def look(examples, held_out=(), **further):
    return survey(examples, decode=decode, row_tokens=further.pop("row_tokens", 8), held_out=held_out, **further)


ROWS = [
    example("Who is it?", " Ann said", 1),
    example("Who is it?", " Ann said", 2),
    example("Who  is it?", " ann SAID!", 3),
    example("Who is it?", " Bob", 4),
    example("What now?", " Go", 5),
]


def test_totals_and_packed_rows_are_counted_by_hand():
    found = look([example("a b", " c", 1), example("d e f", " g h", 2), example("i", " j k", 3)])
    assert (found.totals.num_examples, found.totals.num_tokens, found.totals.num_trained) == (3, 11, 5)
    assert (found.totals.longest, found.totals.mean, found.totals.share_trained) == (5, 11 / 3, 5 / 11)
    # 5 + 3 and 3 tokens; rows of a step are as wide as a multiple of 8
    assert (found.packed.num_rows, found.packed.share_used, found.packed.share_trained) == (2, 11 / 16, 5 / 16)
    assert found.held_out is None
    assert found.leakage is None


def test_repeats_are_those_with_the_same_tokens():
    exact = look(ROWS).repeats.exact
    assert (exact.num_examples, exact.num_groups, exact.num_repeats) == (2, 1, 1)
    assert exact.groups[0].places == ("a.jsonl:1", "a.jsonl:2")
    assert exact.groups[0].text == "Who is it?"


def test_repeats_that_differ_in_case_white_space_and_last_signs_are_alike():
    alike = look(ROWS).repeats.alike
    assert (alike.num_examples, alike.num_groups, alike.num_repeats) == (3, 1, 2)
    assert alike.groups[0].places == ("a.jsonl:1", "a.jsonl:2", "a.jsonl:3")
    assert not look(ROWS[:2]).repeats.alike.groups  # exact ones are named once


def test_one_prompt_with_several_answers_is_counted_apart():
    repeats = look(ROWS).repeats
    assert (repeats.answers.num_examples, repeats.answers.num_groups) == (3, 1)
    assert repeats.answers.groups[0].places == ("a.jsonl:1", "a.jsonl:2", "a.jsonl:4")
    assert repeats.conflicts.num_groups == 0
    assert look(ROWS[:2]).repeats.answers.num_groups == 0


def test_the_largest_groups_come_first_and_name_their_first_places():
    rows = [example("one", " x", line) for line in (1, 2)] + [example("two", " y", line) for line in range(3, 9)]
    groups = look(rows).repeats.exact.groups
    assert [group.count for group in groups] == [6, 2]
    assert groups[0].places == ("a.jsonl:3", "a.jsonl:4", "a.jsonl:5", "a.jsonl:6")


def test_plain_texts_have_no_prompt_to_share():
    rows = [example("", "once upon", 1), example("", "once more", 2), example("", "once upon", 3)]
    found = look(rows, held_out=[example("", "Once  upon", 1), example("", "never", 2)])
    assert found.repeats.answers.num_groups == 0
    assert found.repeats.exact.num_examples == 2
    assert (found.leakage.num_prompt, found.leakage.num_prompt_alike, found.leakage.num_whole_alike) == (0, 1, 1)


def test_a_text_with_two_classes_is_a_conflict_and_no_repeat():
    rows = [text("good film", 1, label="yes"), text("good film", 2, label="no"), text("bad film", 3, label="no")]
    repeats = look(rows).repeats
    assert repeats.exact.num_groups == 0
    assert (repeats.conflicts.num_examples, repeats.conflicts.num_groups) == (2, 1)
    assert repeats.answers.num_groups == 0


def test_a_preference_counts_once_and_only_with_both_answers_the_same():
    def pair(chosen, rejected, line):
        return [example("q?", chosen, line, variant="chosen"), example("q?", rejected, line, variant="rejected")]

    repeats = look([*pair(" a", " b", 1), *pair(" a", " c", 2), *pair(" a", " b", 3)]).repeats
    assert (repeats.exact.num_examples, repeats.exact.num_groups) == (2, 1)
    assert repeats.exact.groups[0].places == ("a.jsonl:1", "a.jsonl:3")
    assert repeats.answers.num_examples == 3


def test_leakage_is_exact_or_alike_by_prompt_and_by_the_whole():
    held_out = [
        example("What now?", " Stop", 1, file="b.jsonl"),
        example("what NOW", " go.", 2, file="b.jsonl"),
        example("Something else?", " Go", 3, file="b.jsonl"),
    ]
    leakage = look(ROWS, held_out).leakage
    assert (leakage.num_examples, leakage.num_prompt, leakage.num_prompt_alike, leakage.num_whole_alike) == (3, 1, 2, 1)
    assert leakage.places == (("b.jsonl:1", "a.jsonl:5"), ("b.jsonl:2", "a.jsonl:5"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Who is it?", "  who IS\n it"),
        ("\N{LATIN SMALL LIGATURE FI}ne", "Fine."),
        ("stra\N{LATIN SMALL LETTER SHARP S}e", "STRASSE"),
        ("<|user|>Hi there!<|end|>", "<|user|> hi there <|end|>"),
        ('"quoted"', "quoted"),
    ],
)
def test_texts_that_are_alike(one, other):
    alike = Alike(["<|user|>", "<|end|>"])
    assert alike(one) == alike(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("2 + 2", "22"), ("it's", "its"), ("?", "!"), ("a<|end|>b", "a b"), ("-1", "+1"), ("a", "a b")],
)
def test_texts_that_are_not_alike(one, other):
    alike = Alike(["<|user|>", "<|end|>"])
    assert alike(one) != alike(other)


def test_the_balance_of_labels_is_counted_with_those_that_training_lacks():
    rows = [text(f"t {line}", line, label="ab"[line % 3 == 0]) for line in range(1, 10)]
    balance = balance_of(rows, [text("u", 1, label="c"), text("v", 2, label="a")])
    assert balance.labels.counts == {"a": 6, "b": 3}
    assert (balance.labels.total, balance.labels.imbalance) == (9, 2.0)
    assert balance.unseen == ("c",)
    assert balance.answers is None
    assert balance.tags is None


def test_tags_and_entities_are_counted():
    rows = [
        text("a b c d", 1, tags=("B-PER", "I-PER", "O", "B-LOC")),
        text("e f", 2, tags=("B-PER", "O")),
    ]
    balance = balance_of(rows)
    assert balance.tags.counts == {"B-PER": 2, "O": 2, "B-LOC": 1, "I-PER": 1}
    assert balance.entities.counts == {"PER": 2, "LOC": 1}


@pytest.mark.parametrize(
    ("tags", "entities"),
    [
        (["B-A", "B-A", "I-A"], ["A", "A"]),
        (["I-A", "I-A", "O", "I-A"], ["A", "A"]),
        (["B-A", "I-B"], ["A", "B"]),
        (["S-A", "E-A", "B-B", "E-B", "U-C", "B-D", "L-D"], ["A", "A", "B", "C", "D"]),
        (["NOUN", "O", "X-Y", "-"], []),
        (["B-creative-work", "I-creative-work"], ["creative-work"]),
    ],
)
def test_entities_are_found_as_the_field_counts_them(tags, entities):
    assert entities_in(tags) == entities


def test_the_lengths_of_chosen_and_rejected_answers_are_compared():
    rows = []
    for line, (chosen, rejected) in enumerate([(" a b c", " d"), (" a", " b"), (" a b", " c d e f")], start=1):
        rows += [example("q", chosen, line, variant="chosen"), example("q", rejected, line, variant="rejected")]
    answers = balance_of(rows).answers
    assert (answers.chosen, answers.rejected, answers.ratio) == (2.0, 2.0, 1.0)
    assert (answers.chosen_longer, answers.same_length) == (1 / 3, 1 / 3)


def test_the_histogram_of_known_lengths():
    lengths = Lengths.of(np.array([1, 5, 5, 10, 32]), limit=16)
    assert lengths.edges == tuple(range(0, 33, 2))
    assert lengths.counts[0] == 1
    assert lengths.counts[2] == 2
    assert lengths.counts[-1] == 1
    assert (lengths.percentiles, lengths.longest, lengths.above) == ({50: 5, 90: 32, 99: 32}, 32, 1)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=300), st.integers(1, 5000))
def test_the_bins_hold_every_length_once_and_percentiles_are_lengths(values, limit):
    array = np.array(values)
    lengths = Lengths.of(array, limit)
    assert sum(lengths.counts) == len(values)
    for low, high, count in zip(lengths.edges, lengths.edges[1:], lengths.counts, strict=False):
        assert count == sum(low < value <= high for value in values)
    assert len(lengths.counts) <= 20
    assert lengths.above == sum(value > limit for value in values)
    for percent, found in lengths.percentiles.items():
        assert found == np.percentile(array, percent, method="inverted_cdf")


def test_a_long_tail_shares_the_last_bin():
    lengths = Lengths.of(np.array([*range(1, 201), 100_000]), limit=512)
    assert lengths.edges[-1] == 100_000
    assert lengths.edges[-2] < 220
    assert lengths.counts[-1] == 1


def test_examples_on_disk_are_surveyed_as_those_in_memory(tokenizer):
    rows = [
        Row({"prompt": f"name : {number % 4} ", "completion": f"It is {number % 6} ."}, "rows.jsonl", number)
        for number in range(1, 40)
    ]
    stored = encode(rows, tokenizer, Reading(max_length=64), eos_id=0).examples
    marks = ["<|endoftext|>"]
    decoder = tokenizer.batch_decode
    found = survey(stored, decode=decoder, marks=marks, row_tokens=64, held_out=stored[:5])
    again = survey(list(stored), decode=decoder, marks=marks, row_tokens=64, held_out=list(stored[:5]))
    assert found == again
    assert found.repeats.exact.num_groups == 12
    assert found.leakage.num_prompt == 5
    json.dumps(found.to_dict(), allow_nan=False)


def encoded(shared_data, tokenizer, name, columns):
    from manylora.data.load import load_examples
    from manylora.data.sources import open_source

    source = open_source(str(shared_data / name), columns=columns)
    reading = Reading(max_length=2048, on_bad_row="skip")
    return load_examples([(source, 1.0)], tokenizer, reading, eos_ids=[0], use_cache=False).examples


@pytest.mark.needs_data
def test_no_question_of_gsm8ks_test_is_trained_on(shared_data, tokenizer):
    columns = {"prompt": "question", "completion": "answer"}
    train, test = (encoded(shared_data, tokenizer, f"gsm8k/{side}.jsonl", columns) for side in ("train", "test"))
    found = survey(train, decode=tokenizer.batch_decode, row_tokens=2048, held_out=test)
    assert found.totals.num_examples == 7473
    assert found.leakage.num_examples == 1319
    assert (found.leakage.num_prompt, found.leakage.num_prompt_alike) == (0, 0)
    mixed = survey(train, decode=tokenizer.batch_decode, row_tokens=2048, held_out=test + train[:7])
    assert (mixed.leakage.num_prompt, mixed.leakage.num_whole_alike) == (7, 7)


@pytest.mark.needs_data
def test_banking77_has_77_classes_and_some_test_rows_that_are_alike(shared_data, tokenizer):
    train, test = (
        encoded(shared_data, tokenizer, f"banking77/{s}.csv", {"label": "category"}) for s in ("train", "test")
    )
    found = survey(train, decode=tokenizer.batch_decode, row_tokens=2048, held_out=test)
    labels = found.balance.labels
    assert (len(labels.counts), labels.total) == (77, 10_003)
    assert (max(labels.counts.values()), min(labels.counts.values())) == (187, 35)
    assert found.balance.unseen == ()
    assert (found.leakage.num_prompt, found.leakage.num_prompt_alike) == (0, 10)
    assert (found.repeats.exact.num_groups, found.repeats.alike.num_groups) == (0, 5)
