"""Fast parts in a model that knows nothing of them do not stand in the way of those who change the model too."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from manylora.base.fast.elementwise import FORM, PLAIN, use_elementwise
from manylora.base.language import LanguageBase


def llama() -> LanguageBase:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, attn_implementation="eager",
    )  # fmt: skip
    return LanguageBase(LlamaForCausalLM(config), name="random").probed()


def logits(base: LanguageBase) -> torch.Tensor:
    with torch.no_grad():
        return base.model(input_ids=torch.arange(12)[None]).logits


def test_a_user_s_patch_of_the_model_s_module_is_seen_by_a_switched_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    base = llama()
    attention = base.model.model.layers[0].self_attn
    if FORM not in vars(attention):
        pytest.skip("this version's attention is not recognised")
    before = logits(base)
    turned = modeling_llama.apply_rotary_pos_emb
    calls = []
    monkeypatch.setattr(
        modeling_llama, "apply_rotary_pos_emb", lambda *args, **kwargs: calls.append(1) or turned(*args, **kwargs)
    )
    torch.testing.assert_close(logits(base), before, rtol=1e-4, atol=1e-5)
    assert len(calls) == 2, "the user's rotation is the one that is called"


def test_a_class_put_above_ours_stays_and_ours_steps_back() -> None:
    base = llama()
    norm = base.model.model.norm
    assert FORM in vars(norm)
    ours = type(norm)
    wrapped = type(ours.__name__, (ours,), {"marked": True})
    norm.__class__ = wrapped  # as fully_shard does
    before = logits(base)
    assert type(copy.deepcopy(norm)) is getattr(ours, PLAIN)
    del vars(norm)[FORM]
    torch.testing.assert_close(logits(base), before, rtol=1e-4, atol=1e-5)
    assert type(norm) is wrapped


def test_parts_that_are_refused_get_their_own_class_back() -> None:
    base = llama()
    model = nn.ModuleList([base.model.model.layers[0].input_layernorm])
    plain = getattr(type(model[0]), PLAIN)
    model[0].__class__ = plain
    del vars(model[0])[FORM]
    calls = iter([torch.zeros(3), torch.ones(3), torch.ones(3)])
    note = use_elementwise(model, lambda: next(calls))
    assert "gives other states" in note
    assert type(model[0]) is plain
    assert FORM not in vars(model[0])
