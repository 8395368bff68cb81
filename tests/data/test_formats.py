from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from drawn import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manylora.data.faults import RowFault
from manylora.data.formats import FORMATS
from manylora.data.formats.detect import detect, misfit
from manylora.data.formats.format import Kind, Overflow
from manylora.data.readers import read_rows
from manylora.data.rows import Row
from manylora.data.tokens import TokenRules
from manylora.errors import DataError

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
SHARED = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
SAMPLES = {
    "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "unpaired": {"prompt": "a", "completion": "b", "label": True},
    "messages": {"messages": TALK},
    "sharegpt": {"conversations": SHARED},
    "segments": {"segments": [{"label": False, "text": "a"}, {"label": True, "text": "b"}]},
    "tagged": {"tokens": ["Paris", "is"], "tags": ["B-loc", "O"]},
    "prompt-completion": {"prompt": "a", "completion": "b"},
    "alpaca": {"instruction": "a", "output": "b"},
    "pairs": {"source": "a", "target": "b"},
    "label": {"text": "a", "label": "b"},
    "text": {"text": "a"},
}
CONTAINED = {("unpaired", "prompt-completion"), ("label", "text")}
"""A row of the first has all the columns of the second, so it fits that as well; the first is preferred."""


def rows(*values):
    return [Row(value, "rows.jsonl", line) for line, value in enumerate(values, start=1)]


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_format_keeps_the_contract_of_the_table(name):
    chosen = FORMATS.get(name)
    assert chosen.name == name
    assert chosen.kind in Kind.__args__
    assert chosen.columns
    assert all(chosen.also)
    assert chosen.overflows
    assert set(chosen.overflows) <= set(Overflow.__args__)
    assert not set(chosen.columns) & set(chosen.optional)
    assert {column for columns in chosen.also for column in columns} <= {*chosen.columns, *chosen.optional}


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_format_fits_its_own_rows_and_none_that_lacks_a_column(name):
    chosen, sample = FORMATS.get(name), SAMPLES[name]
    assert chosen.fits(Row(sample, "f", 1))
    assert not chosen.fits(Row({}, "f", 1))
    for lacking in chosen.columns:
        assert not chosen.fits(Row({column: value for column, value in sample.items() if column != lacking}, "f", 1))


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_format_fits_no_row_of_another_but_those_that_hold_its_columns_too(name):
    fitting = {other for other in FORMATS if other != name and FORMATS.get(name).fits(Row(SAMPLES[other], "f", 1))}
    assert fitting == {larger for larger, smaller in CONTAINED if smaller == name}


DETECTED = [
    *((name, sample) for name, sample in SAMPLES.items()),
    ("preference", {"chosen": TALK, "rejected": TALK}),
    ("preference", {"instruction": "a", "input": "", "output": "b", "chosen": "b", "rejected": "c"}),
    ("preference", {"conversations": SHARED[:1], "chosen": SHARED[1], "rejected": SHARED[1]}),
    ("preference", {"messages": TALK, "rejected_response": "b"}),
    ("preference", {"query": "a", "response": "b", "rejected_response": "c"}),
    ("unpaired", {"messages": TALK, "label": True}),
    ("unpaired", {"messages": TALK, "label": "false"}),
    ("unpaired", {"conversations": SHARED, "kto_tag": False}),
    ("unpaired", {"instruction": "a", "output": "b", "desirable": 1}),
    ("messages", {"messages": TALK, "label": "travel"}),
    ("prompt-completion", {"prompt": "a", "completion": "b", "label": "travel", "source": "web", "target": 3}),
    ("sharegpt", {"conversation": [{"human": "a", "assistant": "b"}], "system": ""}),
    ("tagged", {"id": "3", "tokens": ["a"], "ner_tags": [0], "pos_tags": [1], "text": "a"}),
    ("text", {"text": "a", "tokens": 17, "tags": ["news", "sport"]}),
    ("pairs", {"translation": {"en": "a", "de": "b"}}),
    ("pairs", {"source": ["a", "b"], "target": ["c"], "title": "d"}),
    ("alpaca", {"instruction": "a", "output": "b", "text": "a b", "source": "web"}),
]


@pytest.mark.parametrize(("name", "row"), DETECTED, ids=lambda value: value if isinstance(value, str) else "")
def test_each_format_is_found_by_its_columns(name, row):
    assert detect(rows(row, row)) == name


def test_a_row_that_fits_several_goes_to_the_one_that_all_rows_fit():
    assert detect(rows({"prompt": "a", "completion": "b", "text": "ab"}, {"text": "c"})) == "text"
    assert detect(rows({"prompt": "a", "completion": "b", "text": "ab"})) == "prompt-completion"


def test_only_formats_of_the_kinds_that_a_task_learns_from_are_found():
    row = rows({"text": "a", "label": "b"})
    assert detect(row, kinds=("sequence",)) == "text"
    assert detect(row, kinds=("label", "tags")) == "label"
    row = rows({"instruction": "a", "output": "b", "chosen": "b", "rejected": "c"})
    assert detect(row, kinds=("sequence", "preference")) == "preference"
    assert detect(row, kinds=("sequence",)) == "alpaca"


def test_rows_of_another_kind_are_named_with_the_task_that_learns_from_them():
    with pytest.raises(DataError) as caught:
        detect(rows(SAMPLES["preference"]), kinds=("sequence",))
    assert caught.value.what == (
        "rows.jsonl:1: the rows are `preference` rows (chosen, rejected), and this task learns from sequence rows"
    )
    assert caught.value.next_step.startswith("name the columns to learn in data.columns")
    assert "text: text" in caught.value.allowed
    assert "preference" not in caught.value.allowed
    with pytest.raises(DataError, match=r"`unpaired` rows \(messages, label\), and .* label or tags rows"):
        detect(rows({"messages": TALK, "label": True}), kinds=("label", "tags"))
    with pytest.raises(DataError, match="2 of 3 rows are `tagged` rows"):
        detect(rows(SAMPLES["tagged"], SAMPLES["text"], SAMPLES["tagged"]), kinds=("sequence",))


def test_rows_that_could_not_be_read_are_left_out_of_the_search():
    broken = Row({}, "rows.jsonl", 1, RowFault("broken JSON", "broken JSON at character 3"))
    assert detect([broken, *rows(SAMPLES["alpaca"])]) == "alpaca"
    with pytest.raises(DataError, match=r"no rows can be read \(rows.jsonl:1: broken JSON at character 3\)"):
        detect([broken])


def test_the_row_that_does_not_fit_is_named_with_its_columns_and_counted():
    good = {"prompt": "a", "completion": "b"}
    mixed = rows(good, good, {"prompt": "a", "completoin": "b"}, good, {"text": "b"})
    with pytest.raises(DataError) as caught:
        detect(mixed)
    message = str(caught.value)
    assert message.startswith("rows.jsonl:3: the columns prompt, completoin do not fit")
    assert "prompt-completion, which lacks completion" in message
    assert "2 of 5 rows" in message
    assert "3 of 5 rows are prompt-completion rows" in message
    assert caught.value.nearest == ("completoin",)
    assert detect(mixed, strict=False) == "prompt-completion"


def test_rows_that_fit_no_format_at_all_are_refused_even_where_bad_rows_are_skipped():
    with pytest.raises(DataError, match="do not fit"):
        detect(rows({"a": 1}, {"b": 2}), strict=False)
    with pytest.raises(DataError, match="`tagged` rows"):
        detect(rows(SAMPLES["tagged"]), kinds=("sequence",), strict=False)


NEAREST = {
    "prompt-completion": {"question": "q", "answer": "a"},
    "text": {"sentence": "a"},
    "messages": {"talk": [{"role": "user", "content": "hi"}], "id": 3},
    "sharegpt": {"talk": [{"from": "human", "value": "hi"}], "id": 3},
    "alpaca": {"instruction": "a", "response": "b", "context": "c"},
    "pairs": {"document": "a", "summary": "b"},
    "preference": {"prompt": "a", "chosen": "b", "rejectd": "c"},
    "segments": {"input_output": [{"label": True, "text": "a"}]},
    "tagged": {"words": ["a"], "tags": ["O"]},
}


@pytest.mark.parametrize("name", list(NEAREST))
def test_columns_of_other_names_are_answered_with_the_nearest_format_and_how_to_rename(name):
    with pytest.raises(DataError) as caught:
        detect(rows(NEAREST[name]))
    assert f"the nearest format is {name}" in str(caught.value)
    renames = re.search(r"data\.columns: \{(.*)\}", str(caught.value))[1]
    assert renames.partition(":")[0] in FORMATS.get(name).columns


def test_usual_names_of_other_data_sets_are_proposed_and_unlike_ones_are_not():
    with pytest.raises(DataError, match=r"data.columns: \{prompt: question, completion: answer\}"):
        detect(rows({"question": "q", "answer": "a"}))
    with pytest.raises(DataError, match=r"\{prompt: question, completion: YOUR_COLUMN\}"):
        detect(rows({"question": "q", "level": "a"}))
    with pytest.raises(DataError, match=r"\{label: category\}"):
        detect(rows({"text": "q", "category": "a"}), kinds=("label",))  # although the rows fit the format text


def test_a_misfit_lacks_the_columns_of_the_nearest_of_several_sets():
    fault = misfit(Row({"messages": TALK}, "f", 1), FORMATS.get("unpaired"))
    assert "unpaired, which lacks label here" in fault.what


def test_columns_with_values_that_cannot_be_read_are_shown():
    fault = misfit(Row({"tokens": "Paris is", "tags": "B O"}, "f", 1), FORMATS.get("tagged"))
    assert fault.what.endswith("but not its values: tokens is 'Paris is', tags is 'B O'")


def test_no_rows_have_no_format():
    with pytest.raises(DataError, match="no rows"):
        detect([])


REAL = {
    "formats/alpaca_en_demo.json": ("alpaca", {}),
    "formats/dpo_en_demo.json": ("preference", {}),
    "formats/glaive_toolcall_en_demo.json": ("sharegpt", {}),
    "formats/kto_en_demo.json": ("unpaired", {}),
    "formats/v1_sft_demo.jsonl": ("messages", {}),
    "instruct/instruction-data.json": ("alpaca", {}),
    "prefer/instruction-data-with-preference.json": ("preference", {}),
    "banking77/test.csv": ("label", {"label": "category"}),
    "gsm8k/test.jsonl": ("prompt-completion", {"prompt": "question", "completion": "answer"}),
    "scitldr/dev.jsonl": ("pairs", {}),
    "wnut17/wnut17train.conll": ("tagged", {}),
}
WITH_TOOLS = (
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.needs_data
@pytest.mark.parametrize("path", list(REAL))
def test_real_data_are_found_and_shown_but_for_equal_preferences(path, shared_data, make_tokenizer):
    name, columns = REAL[path]
    read = read_rows(shared_data / path, columns=columns)
    assert detect(read) == name
    rules = TokenRules.of(make_tokenizer(WITH_TOOLS), 0)
    refused = []
    for row in read[:300]:
        try:
            for shown in FORMATS.get(name).show(row, rules):
                marked = shown.mark(rules.encode(shown.texts))
                assert marked.spans or name == "label"
        except RowFault as fault:
            refused.append(fault.kind)
    assert set(refused) <= ({"chosen is rejected"} if path.startswith("prefer/") else set())


NAMES = sorted({column for name in FORMATS for column in (*FORMATS.get(name).columns, *FORMATS.get(name).optional)})
KEYS = ("role", "content", "from", "value", "human", "assistant", "label", "text", "name", "arguments", "en", "de")
WORDS = st.sampled_from(["", "a", "user", "assistant", "human", "gpt", "function_call", "true", '{"name": "a"}', "[]"])
ATOMS = st.none() | st.booleans() | st.integers(-101, 3) | st.floats(allow_nan=False) | WORDS
VALUES = st.recursive(
    ATOMS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=examples(400), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6), name=st.sampled_from(list(FORMATS)))
def test_a_row_of_any_values_is_shown_or_refused_and_breaks_nothing(row, name, make_tokenizer):
    chosen, rules = FORMATS.get(name), _rules(make_tokenizer)
    row = Row({**dict.fromkeys(chosen.columns, "a"), **row}, "f", 1)
    assert chosen.fits(row) in (True, False)
    try:
        for shown in chosen.show(row, rules) if chosen.fits(row) else ():
            shown.mark(rules.encode(shown.texts))
    except RowFault:
        pass  # anything else that is raised would end the run without naming the row


_MADE: list[TokenRules] = []


def _rules(make_tokenizer):
    if not _MADE:
        _MADE.append(TokenRules.of(make_tokenizer(WITH_TOOLS), 0))
    return _MADE[0]


PAGE = Path(__file__).parents[2] / "docs" / "formats.md"


def test_the_page_on_formats_has_every_format_with_a_row_that_is_found_as_such():
    lines = re.findall(r"^\| `([\w-]+)` \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for name, _ in lines] == list(FORMATS)
    for name, rest in lines:
        example = re.search(r"`(\{.*\})`$", rest)[1]
        assert detect(rows(json.loads(example))) == name
        for column in FORMATS.get(name).columns:
            assert f"`{column}`" in rest


def test_rows_that_say_which_answers_are_good_are_not_learned_from_as_if_all_were():
    judged = rows(*({"messages": TALK, "label": good} for good in (True, False)))
    with pytest.raises(DataError, match="a column says which answers are good") as caught:
        detect(judged, kinds=("sequence",))
    assert "data.format: messages" in str(caught.value)
    assert detect(rows({"messages": TALK, "label": 7}), kinds=("sequence",)) == "messages"
