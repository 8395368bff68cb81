"""Making a base and probing it are two acts; what probes find is a value that other bases of the architecture take."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from random_bases import CONFIGS, fill, language_base, ragged_batch, taken
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.base.fast.elementwise import forms_of
from manylora.base.language import LanguageBase
from manylora.base.transformers_base import TransformersBase
from manylora.errors import BaseBroken, BaseMismatch, RouteError
from manylora.objectives.causal_lm import CAUSAL_LM
from manylora.spec import AdapterSpec
from manylora.types import Batch


def model_on(device: str, kind: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(CONFIGS[kind](3)).to(torch.float64)


def test_making_a_base_runs_no_forward() -> None:
    model = model_on("cpu")

    def refuse(*_: Any) -> None:
        raise AssertionError("a forward was run")

    for module in model.modules():
        module.register_forward_pre_hook(refuse)
    base = LanguageBase(model)
    assert list(base.sites)
    with pytest.raises(AssertionError, match="a forward was run"):
        base.probe()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mamba"])
def test_a_base_without_weights_takes_the_findings_of_a_real_one(kind: str) -> None:
    real = language_base(kind)
    base = LanguageBase(model_on("meta", kind))
    base.take(real.found)
    assert (base.rules, base.post_head, base.max_positions) == (real.rules, real.post_head, real.max_positions)
    assert base.reads_along == real.reads_along
    assert base.notes == real.notes
    assert forms_of(base.model) == forms_of(real.model)
    assert base.config._attn_implementation == real.config._attn_implementation
    base.model.to_empty(device="cpu")
    with torch.no_grad():
        for held in ("named_parameters", "named_buffers"):
            values = dict(getattr(real.model, held)(remove_duplicate=False))
            for name, empty in getattr(base.model, held)(remove_duplicate=False):
                empty.copy_(values[name])
    batch = ragged_batch(real)
    assert torch.equal(base.outputs(batch).hidden, real.outputs(batch).hidden)


def test_a_base_with_the_findings_of_another_trains_to_the_bit_as_with_its_own() -> None:
    own = language_base()
    other = LanguageBase(model_on("cpu"))
    other.take(own.found)
    found = []
    for base in (own, other):
        with Bank(base, num_slots=3, dtype=torch.float64) as bank:
            fill(bank)
            found.append(taken(base, ragged_batch(base), dict.fromkeys((-1, 0, 1, 2), CAUSAL_LM)))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert torch.equal(found[1][name].nan_to_num(), value.nan_to_num())


def test_findings_of_another_architecture_are_refused() -> None:
    found = language_base("llama").found
    with pytest.raises(BaseMismatch, match=r"the findings name 'model\.layers\.0"):
        LanguageBase(model_on("meta", "gpt2")).take(found)
    with pytest.raises(BaseMismatch, match="'softcap' after the head"):
        LanguageBase(model_on("meta")).take(replace(found, post_head="softcap"))


def test_a_base_that_has_taken_nothing_says_so_when_it_is_used() -> None:
    base = LanguageBase(model_on("cpu"), name="bare")
    for use in (lambda: base.packs, lambda: base.post_head, lambda: base.example(2)):
        with pytest.raises(RouteError, match="bare is used before anything is known"):
            use()
    assert base.probed() is base
    found = base.found
    assert base.probed().found is found


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mamba", "mixtral"])
def test_hidden_states_come_of_a_call_of_the_whole_model_and_are_the_backbones(kind: str) -> None:
    """A wrapper of the model works by its hooks, and its head must not run where states alone are wanted."""
    base = language_base(kind)
    batch = ragged_batch(base)
    calls: list[str] = []
    handles = [
        base.model.register_forward_pre_hook(lambda *_: calls.append("before")),
        base.model.register_forward_hook(lambda *_: calls.append("after")),
    ]
    head = base.head
    assert isinstance(head, nn.Module)
    forward = type(head).forward
    head.forward = lambda *args: calls.append("head") or forward(head, *args)
    hidden = base.outputs(batch).hidden
    assert calls == ["before", "after"]
    for handle in handles:
        handle.remove()
    assert torch.equal(hidden, base.states(replace(base.found, enters_model=False), batch.inputs))
    assert calls == ["before", "after"]
    base.logits(hidden)
    assert calls[-1] == "head"


class ReadsItsLogits(LlamaForCausalLM):
    """Does to its logits what cannot be done without tokens."""

    def forward(self, **kwargs: Any) -> Any:
        made = super().forward(**kwargs)
        made.logits = made.logits - 0 * made.logits.amax(dim=-1, keepdim=True)
        return made


def test_a_model_that_cannot_do_without_its_head_is_entered_by_its_backbone() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    base = LanguageBase(ReadsItsLogits(config)).probed()
    assert base.post_head == "none"
    assert not base.found.enters_model
    assert any("taken from the backbone" in note for note in base.notes)
    own = base.model(**base.example(2)).logits
    batch = Batch(inputs=base.example(2), targets={}, slots=(-1, -1))
    torch.testing.assert_close(base.logits(base.outputs(batch).hidden), own)


def images(rows: int) -> Mapping[str, Tensor]:
    return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(0))}


def test_a_transformers_model_without_a_vocabulary_is_a_base_with_a_processor() -> None:
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8,
                       patch_size=4, num_labels=3)  # fmt: skip
    processor = object()
    model = ViTForImageClassification(config)
    plain = copy.deepcopy(model).eval()
    base = TransformersBase(model, processor=processor, example=images, name="sees").probed()
    assert base.processor is processor
    assert base.tokenizer is None
    assert not base.packs
    assert base.reads_along
    batch = Batch(inputs=images(4), targets={}, slots=(0, 1, -1, 0))
    own = plain(**images(4)).logits
    torch.testing.assert_close(base.outputs(batch).logits, own)
    with Bank(base, num_slots=2) as bank:
        for slot in range(2):
            bank.put(Adapter.new(base, AdapterSpec(rank=2), seed=slot), slot=slot)
        with bank.route(batch.slots):
            torch.testing.assert_close(base.outputs(batch).logits, own)
    bare = TransformersBase(ViTForImageClassification(config), processor=processor).probed()
    assert "no example inputs" in bare.notes[0]


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = model_on("cpu")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = float("nan")
    with pytest.raises(BaseBroken, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' of broken holds numbers"):
        LanguageBase(model, name="broken").probed()
