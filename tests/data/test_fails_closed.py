"""Data that cannot teach what they should never train: each failure has its message, and is counted when skipped."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from manylora.data.examples import Reading
from manylora.data.load import Loaded, load_examples
from manylora.data.sources import open_source
from manylora.errors import DataError

GOOD = {"prompt": "name : The Eagle\n", "completion": "The Eagle is here ."}
TALK = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
TEXT = {"text": "The Eagle is here ."}
LONG = "the fox " * 60


@dataclass(frozen=True)
class Failure:
    """`row` is what is wrong, beside `good` rows; `kind` and `says` are what the user reads."""

    row: dict[str, Any] | bytes
    kind: str
    says: str
    good: dict[str, Any] = field(default_factory=lambda: GOOD)
    reading: dict[str, Any] = field(default_factory=dict)
    bos: bool = False
    template: str | None = None


def said(*messages: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in messages], **more}


DROPS_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FORGETS = (  # as Qwen3's: what an earlier turn thought is not shown once another turn follows
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FAILURES = {
    "all labels masked by weights": Failure(
        {"messages": [TALK["messages"][0], TALK["messages"][1] | {"weight": 0}]}, "nothing learned", "weight", TALK
    ),
    "no assistant turn": Failure(said(("user", "a")), "no assistant turn", "no assistant turn to learn", TALK),
    "an empty answer": Failure(GOOD | {"completion": " "}, "completion empty", "completion is empty"),
    "an empty text": Failure({"text": "\n"}, "text empty", "text is empty", TEXT),
    "an answer that is null": Failure(GOOD | {"completion": None}, "completion no text", "completion is None"),
    "BOS written into the text": Failure(
        {"text": "<s>The Eagle"}, "doubled BOS", "it would come twice", TEXT, bos=True
    ),
    "BOS twice by the template": Failure(
        said(("user", "<s><s>x"), ("assistant", "b")), "doubled BOS", "begins with <s> twice", TALK, bos=True,
        template="{{ messages[0].content[:6] if messages[0].content[:3] == '<s>' else '' }}<|user|>"
        "{{ messages[0].content }}<|end|>{% for m in messages[1:] %}<|assistant|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    ),
    "a target that is cut off": Failure(
        said(("user", "a"), ("assistant", LONG)), "target cut off", "its first target ends at token", TALK,
        {"overflow": "right"},
    ),
    "a row that is too long": Failure(GOOD | {"completion": LONG}, "too long", "the limit is 64"),
    "a prompt that fills the row": Failure(GOOD | {"prompt": LONG}, "too long", "the limit is 64"),
    "bytes that are not UTF-8": Failure(
        b'{"prompt": "caf\xe9\\n", "completion": "b"}', "not UTF-8", "byte 0xe9 is not valid UTF-8"
    ),
    "half a character": Failure(
        b'{"prompt": "a\\n", "completion": "b \\ud83d"}', "half a character", "half of a character"
    ),
    "broken JSON": Failure(b'{"prompt": "a\\n", "completion"', "broken JSON", "broken JSON at character"),
    "a key given twice": Failure(b'{"prompt": "a", "prompt": "b", "completion": "c"}', "key given twice", "'prompt'"),
    "a row of another format": Failure({"question": "a"}, "misfit", "the columns question do not fit"),
    "a role nobody knows": Failure(
        said(("user", "a"), ("asistant", "b")), "mistyped role", "nearest: assistant", TALK
    ),
    "a template that drops a message": Failure(
        said(("system", "be brief"), ("user", "a"), ("assistant", "b")), "template drops", "be brief", TALK,
        template=DROPS_SYSTEM,
    ),
    "a template that rewrites what it wrote": Failure(
        said(("user", "a"), ("assistant", "<think>x</think>b"), ("user", "c"), ("assistant", "d")), "unstable template",
        "data.turns: last", TALK, template=FORGETS,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MANYLORA_CACHE", str(tmp_path / "cache"))


def load(failure: Failure, make_tokenizer, folder: Path, **reading: Any) -> Loaded:
    template = {} if failure.template is None else {"template": failure.template}
    tokenizer = make_tokenizer(**template, bos=failure.bos)
    good = json.dumps(failure.good).encode()
    bad = failure.row if isinstance(failure.row, bytes) else json.dumps(failure.row).encode()
    file = folder / "rows.jsonl"
    file.write_bytes(b"\n".join([good, good, bad, good, bad]) + b"\n")
    chosen = Reading(**{"max_length": 64, "kinds": ("sequence",)} | failure.reading | reading)
    return load_examples([(open_source(file), 1.0)], tokenizer, chosen, eos_ids=(0,))


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_stops_the_run_with_its_line_and_count(name, make_tokenizer, tmp_path):
    failure = FAILURES[name]
    with pytest.raises(DataError) as caught:
        load(failure, make_tokenizer, tmp_path)
    message = str(caught.value)
    assert f"{tmp_path / 'rows.jsonl'}:3: " in message
    assert failure.says in message
    assert "2 of 5 rows" in message


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_that_is_skipped_is_counted_and_the_good_rows_are_kept(name, make_tokenizer, tmp_path):
    failure = FAILURES[name]
    loaded = load(failure, make_tokenizer, tmp_path, on_bad_row="skip")
    assert [example.line for example in loaded.examples] == [1, 2, 4]
    (reason,) = loaded.parts[0].encoded.skipped
    assert (reason.kind, reason.count, reason.where) == (failure.kind, 2, f"{tmp_path / 'rows.jsonl'}:3")
    assert any(line.startswith("2 of 5 rows are skipped") for line in loaded.notes())
    assert any(failure.kind in line and "rows.jsonl:3" in line for line in loaded.notes())


def test_an_end_that_no_row_teaches_is_refused_even_when_rows_are_skipped(make_tokenizer, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"text": LONG}) + "\n")
    for how in ("error", "skip"):
        with pytest.raises(DataError, match="no end token is learned in any of 1 rows"):
            load_examples(
                [(open_source(file), 1.0)], make_tokenizer(),
                Reading(max_length=64, overflow="right", on_bad_row=how), eos_ids=(0,),
            )  # fmt: skip


def test_a_file_that_ends_in_the_middle_is_refused_even_when_rows_are_skipped(make_tokenizer, tmp_path):
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(gzip.compress((json.dumps(GOOD) + "\n").encode() * 5000)[:-200])
    with pytest.raises(DataError, match="not a whole gz file"):
        load_examples(
            [(open_source(file), 1.0)], make_tokenizer(), Reading(max_length=64, on_bad_row="skip"), eos_ids=(0,)
        )


def test_a_pad_that_is_the_end_token_is_still_learned_at_the_end(make_tokenizer, tmp_path):
    """Padding is masked by place and never by token, so a tokenizer whose pad is its EOS learns to stop."""
    from manylora.data.collate import collate

    file = tmp_path / "rows.jsonl"
    file.write_text((json.dumps(GOOD) + "\n") + json.dumps(GOOD | {"completion": "b"}) + "\n")
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    examples = load_examples([(open_source(file), 1.0)], tokenizer, Reading(max_length=64), eos_ids=(0,)).examples
    batch = collate([[one] for one in examples], width=64, pad_id=0, packing="none", causal=True, slots=[0, 0])
    labels = batch.targets["labels"]
    assert [int(row.eq(0).sum()) for row in labels] == [1, 1]
