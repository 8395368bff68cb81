"""One adapter, and examples of which some share a prompt."""

from __future__ import annotations

import pytest

from manylora.adapters.adapter import Adapter
from manylora.base.language import LanguageBase
from manylora.data.example import Example
from manylora.data.examples import Reading, encode
from manylora.data.rows import Row


@pytest.fixture
def adapter(adapters: list[Adapter]) -> Adapter:
    return adapters[0]


PAIRS = [
    ("name : The Eagle", " The Eagle is here ."),
    ("name : The Mill", " The Mill is a pub ."),
    ("name : The Eagle", " This is The Eagle ."),
    ("a", " b"),
    ("food : Thai", " It has Thai food ."),
]


@pytest.fixture
def examples(base: LanguageBase) -> list[Example]:
    rows = [Row({"prompt": p, "completion": c}, "pairs.jsonl", line) for line, (p, c) in enumerate(PAIRS, start=1)]
    return list(encode(rows, base.tokenizer, Reading(max_length=64), eos_id=base.eos_ids).examples)
