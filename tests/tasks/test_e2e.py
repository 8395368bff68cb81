from __future__ import annotations

import random
from pathlib import Path

import pytest

from manylora.tasks import Sample
from manylora.tasks.e2e import attributes, missing_attributes, named_values, share_named

DATA = Path(__file__).parents[3] / "shared/data/e2e/dev.txt"


def names(prompt: str, text: str) -> bool:
    return not missing_attributes(prompt, text)


def test_values_are_read_in_order():
    prompt = "name : The Eagle | Type : coffee shop | price : \u00a3 20 - 25"
    assert attributes(prompt) == {"name": "The Eagle", "type": "coffee shop", "price": "\u00a3 20 - 25"}
    assert named_values(prompt, "The Eagle is a coffee shop .") == (2, 3)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("name : The Wrestlers", "the wrestlers is here"),
        ("near : Caf\u00e9 Sicilia", "It is near Cafe Sicilia ."),
        ("area : city centre", "In the city-center there is"),
        ("area : riverside", "It is by the river ."),
        ("Type : coffee shop", "a coffee - shop"),
        ("price : \u00a3 20 - 25", "between \u00a320 and \u00a325"),
        ("price : less than \u00a3 20", "for less than 20 pounds"),
        ("price : more than \u00a3 30", "costs over \u00a3 30"),
        ("price : high", "a highly priced place"),
        ("price : cheap", "low - priced food"),
        ("price : moderate", "a mid - priced place"),
        ("customer rating : high", "rated highly by its customers"),
        ("customer rating : 3 out of 5", "It has a three out of five rating"),
        ("customer rating : 5 out of 5", "a five star place"),
        ("customer rating : average", "an average customer rating"),
        ("family friendly : yes", "It is a kid friendly , cheap place"),
        ("family friendly : yes", "It is not cheap , but children are welcome"),
        ("family friendly : no", "It isn 't family - friendly"),
        ("family friendly : no", "a non - family - friendly pub"),
        ("family friendly : no", "an adults only place"),
    ],
)
def test_a_value_is_named_in_the_words_that_people_use(value, text):
    assert names(value, text)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("name : The Mill", "The Miller is a pub"),
        ("food : Chinese", "It serves English food"),
        ("price : high", "It has a high customer rating"),
        ("customer rating : high", "It is in the high price range"),
        ("customer rating : high", "It has a 1 out of 5 customer rating"),
        ("customer rating : 5 out of 5", "It has a 3 out of 5 customer rating"),
        ("price : \u00a3 20 - 25", "less than \u00a3 20"),
        ("family friendly : yes", "It is not family friendly"),
        ("family friendly : no", "It is family friendly"),
        ("family friendly : no", "It is by the river"),
        ("family friendly : yes", "It is friendly"),
    ],
)
def test_a_value_is_not_named_by_other_words(value, text):
    assert not names(value, text)


def test_the_share_counts_values_and_not_sentences():
    long = Sample("name : A | food : Thai | area : riverside", (), "A is by the river")
    assert share_named([long, Sample("name : B", (), "B")]) == 3 / 4
    assert share_named([]) == 0.0


@pytest.mark.needs_data
@pytest.mark.skipif(not DATA.is_file(), reason="the E2E data are not on this machine")
def test_people_name_nine_in_ten_values_and_chance_names_one_in_twenty():
    pairs = [line.split("||") for line in DATA.read_text(encoding="utf-8").splitlines()]
    assert share_named([Sample(prompt, (), text) for prompt, text in pairs]) > 0.9
    rng, wrong, tried = random.Random(0), 0, 0
    for prompt, _ in pairs:
        other, text = rng.choice(pairs)
        given, elsewhere, missing = attributes(prompt), attributes(other), missing_attributes(prompt, text)
        differing = [key for key in given if key in elsewhere and given[key] != elsewhere[key]]
        tried += len(differing)
        wrong += sum(key not in missing for key in differing)
    assert wrong / tried < 0.05
