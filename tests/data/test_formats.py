from __future__ import annotations

import pytest

from manylora.data.formats import FORMATS, detect
from manylora.data.readers import Row
from manylora.errors import DataError


def rows(*values):
    return [Row(value, "rows.jsonl", line) for line, value in enumerate(values, start=1)]


def test_each_format_is_found_by_its_columns():
    assert detect(rows({"text": "a"}, {"text": "b", "source": 1})) == "text"
    assert detect(rows({"prompt": "a", "completion": "b"})) == "prompt-completion"
    assert detect(rows({"messages": []})) == "messages"


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_format_bears_its_own_name_and_fits_a_row_with_its_columns_only(name):
    chosen = FORMATS.get(name)
    assert chosen.name == name
    assert chosen.fits(Row(dict.fromkeys(chosen.columns), "f", 1))
    assert not chosen.fits(Row(dict.fromkeys(chosen.columns[1:]), "f", 1))


def test_a_row_that_fits_several_goes_to_the_one_that_all_rows_fit():
    assert detect(rows({"prompt": "a", "completion": "b", "text": "ab"}, {"text": "c"})) == "text"
    assert detect(rows({"prompt": "a", "completion": "b", "text": "ab"})) == "prompt-completion"


def test_the_row_that_does_not_fit_is_named_with_its_columns_and_counted():
    good = {"prompt": "a", "completion": "b"}
    with pytest.raises(DataError) as caught:
        detect(rows(good, good, {"prompt": "a", "completoin": "b"}, good, {"text": "b"}))
    message = str(caught.value)
    assert message.startswith("rows.jsonl:3: the columns prompt, completoin do not fit")
    assert "prompt-completion, which lacks completion" in message
    assert "2 of 5 rows" in message
    assert caught.value.nearest == ("completoin",)


NEAREST = {
    "prompt-completion": {"question": "q", "answer": "a"},
    "text": {"sentence": "a"},
    "messages": {"conversations": [{"from": "human", "value": "hi"}], "id": 3},
}


@pytest.mark.parametrize("name", list(NEAREST))
def test_columns_of_other_names_are_answered_with_the_nearest_format_and_how_to_rename(name):
    with pytest.raises(DataError) as caught:
        detect(rows(NEAREST[name]))
    assert f"the nearest format is {name}" in str(caught.value)
    assert f"data.columns: {{{FORMATS.get(name).columns[0]}: " in str(caught.value)


def test_usual_names_of_other_data_sets_are_proposed_and_unlike_ones_are_not():
    with pytest.raises(DataError, match=r"data.columns: \{prompt: question, completion: answer\}"):
        detect(rows({"question": "q", "answer": "a"}))
    with pytest.raises(DataError, match=r"\{prompt: question, completion: YOUR_COLUMN\}"):
        detect(rows({"question": "q", "level": "a"}))


def test_no_rows_have_no_format():
    with pytest.raises(DataError, match="no rows"):
        detect([])
