"""The receipt refuses another base, tokenizer or chat template, and compares only what both sides know."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from manylora.adapters.adapter import Adapter
from manylora.adapters.receipt import check_receipt, samples
from manylora.base.frozen import FrozenModel
from manylora.errors import BaseMismatch
from manylora.spec import AdapterSpec


class Tokenizer:
    """Only what saving asks of a tokenizer."""

    def save_pretrained(self, folder) -> None:
        (folder / "tokenizer.json").write_text("{}")
        (folder / "chat_template.jinja").write_text("{{ messages }}")


class WithTokenizer(FrozenModel):
    tokenizer_digest = "a" * 64
    template_digest: str | None = "b" * 64


def base(tokenizer: str = "a", template: str | None = "b", seed: int = 0) -> WithTokenizer:
    torch.manual_seed(seed)
    made = WithTokenizer(nn.Sequential(nn.Linear(4, 4)), name="small", tokenizer=Tokenizer())
    made.tokenizer_digest = tokenizer * 64
    made.template_digest = None if template is None else template * 64
    return made


@pytest.fixture
def adapter(tmp_path) -> Adapter:
    own = base()
    return Adapter.load(Adapter.new(own, AdapterSpec(rank=2)).save(tmp_path / "adapter", own))


def test_the_tokenizer_and_its_template_lie_beside_the_factors(tmp_path):
    own = base()
    folder = Adapter.new(own, AdapterSpec(rank=2)).save(tmp_path / "adapter", own)
    assert {"tokenizer.json", "chat_template.jinja"} <= {path.name for path in folder.iterdir()}
    receipt = json.loads((folder / "receipt.json").read_text())
    assert (receipt["tokenizer"], receipt["chat_template"]) == ("a" * 64, "b" * 64)


def test_the_same_base_passes(adapter):
    check_receipt(adapter, base())


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (base(seed=1), "trained on small"),
        (base(tokenizer="c"), "another tokenizer"),
        (base(template="c"), "another chat template"),
        (base(template=None), "another chat template"),
    ],
    ids=["base", "tokenizer", "template", "no template"],
)
def test_what_differs_is_named(adapter, other, what):
    with pytest.raises(BaseMismatch, match=what):
        check_receipt(adapter, other)


def test_a_base_without_a_tokenizer_is_compared_by_its_weights_alone(adapter):
    torch.manual_seed(0)
    check_receipt(adapter, FrozenModel(nn.Sequential(nn.Linear(4, 4)), name="small"))


def test_what_the_receipt_said_of_the_tokenizer_survives_saving_without_the_base(adapter, tmp_path):
    again = Adapter.load(adapter.save(tmp_path / "again"))
    check_receipt(again, base())
    with pytest.raises(BaseMismatch, match="another tokenizer"):
        check_receipt(again, base(tokenizer="c"))


def test_samples_hold_across_dtypes_and_tell_tensors_apart():
    value = torch.randn(40, 30)
    said = samples(value)
    assert said["shape"] == [40, 30]
    assert len(said["values"]) == 256
    near = torch.tensor(samples(value.to(torch.bfloat16))["values"], dtype=torch.float64)
    assert torch.allclose(near, torch.tensor(said["values"], dtype=torch.float64), rtol=2**-7)
