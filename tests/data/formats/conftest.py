"""What is learned of a row, as text: show, encode, mark, decode, with a template that writes tools and calls."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from manylora.data.faults import RowFault
from manylora.data.formats import FORMATS
from manylora.data.rows import Row
from manylora.data.tokens import TokenRules

TEMPLATE = (
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def rules(make_tokenizer):
    """Of a tokenizer with a chat template and no BOS."""
    return TokenRules.of(make_tokenizer(TEMPLATE), 0)


@pytest.fixture(scope="session")
def plain_rules(make_tokenizer):
    """Of a tokenizer without a chat template."""
    return TokenRules.of(make_tokenizer(None), 0)


@pytest.fixture(scope="session")
def bos_rules(make_tokenizer):
    """Of a tokenizer that puts <s> before every text."""
    return TokenRules.of(make_tokenizer(TEMPLATE, bos=True), 0)


@pytest.fixture(scope="session")
def word_rules():
    """Of a tokenizer like BERT's: words in lower case between [CLS] and [SEP]; zero-width characters vanish."""
    return TokenRules.of(_bert(pair="[CLS] $A [SEP] $B:1 [SEP]:1", names=["input_ids", "token_type_ids"]), 3)


@pytest.fixture(scope="session")
def pair_rules():
    """Of a tokenizer like RoBERTa's, which tells two texts apart by what stands between them alone."""
    return TokenRules.of(_bert(pair="[CLS] $A [SEP] [SEP] $B [SEP]", names=["input_ids", "attention_mask"]), 3)


def _bert(*, pair, names):
    words = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "paris", "is", "b", "##ig", "a", "hot", "cold"]
    vocabulary = {word: place for place, word in enumerate(words)}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    core.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair=pair, special_tokens=special)
    named = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=core, model_input_names=names, **named)


def _learned(name, values, rules):
    found = []
    for shown in FORMATS.get(name).show(Row(values, "rows.jsonl", 1), rules):
        marked = shown.mark(rules.encode(shown.texts))
        parts = [rules.decode(marked.tokens[start:stop]) for start, stop in marked.spans]
        found.append((rules.decode(marked.tokens), parts, shown, marked))
    return found


@pytest.fixture
def whole():
    """(format, row, rules) -> (the whole text, the texts of its spans, Shown, Marked) of each sequence."""
    return _learned


@pytest.fixture
def learned():
    """(format, row, rules) -> the texts of the spans of the row's one sequence."""

    def of_one(name, values, rules):
        ((_, parts, _, _),) = _learned(name, values, rules)
        return parts

    return of_one


@pytest.fixture
def fault():
    """(format, row, rules, part of the message) -> the fault that the row is refused with, in `show` or in `mark`."""

    def refused(name, values, rules, says):
        with pytest.raises(RowFault) as caught:
            _learned(name, values, rules)
        assert says in caught.value.what
        return caught.value

    return refused
