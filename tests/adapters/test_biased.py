"""LoRA with trained biases: what is trained, what a merge makes of it, and what is refused."""

from __future__ import annotations

import pytest
import torch
from fleets import Running, member, ragged
from random_bases import language_base
from transformers import GPT2Config, GPT2LMHeadModel

import manylora
from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.adapters.export.exported import export
from manylora.errors import AdapterBroken, SpecError
from manylora.spec import AdapterSpec

BIASED = ("lora-bias", "lora-own-bias")


@pytest.fixture
def gpt2(tiny_base_folder, tmp_path):
    torch.manual_seed(0)
    tokenizer = manylora.load_base(str(tiny_base_folder), dtype="float32").tokenizer
    tokenizer.save_pretrained(tmp_path / "base")
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=4)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    model.save_pretrained(tmp_path / "base")
    return manylora.load_base(str(tmp_path / "base"), dtype="float32")


def moved(adapter: Adapter, size: float = 0.1) -> Adapter:
    generator = torch.Generator().manual_seed(3)
    for own in adapter.factors.values():
        for tensor in own.tensors.values():
            tensor.add_(size * torch.randn(tensor.shape, generator=generator))
    return adapter


def logits(base, adapter: Adapter | None) -> torch.Tensor:
    tokens = torch.arange(24).view(2, 12)
    if adapter is None:
        return base.model(input_ids=tokens).logits
    with Bank(base) as bank, torch.no_grad():
        bank.put(adapter, slot=0)
        with bank.route((0, 0)):
            return base.model(input_ids=tokens).logits


@pytest.mark.parametrize("method", BIASED)
def test_biases_are_trained_in_a_fleet_as_alone(method: str) -> None:
    def members() -> list:
        specs = {
            "biased": AdapterSpec(method=method, rank=4, dropout=0.1), "plain": AdapterSpec(rank=2),
            "dora": AdapterSpec(method="dora", rank=3),
        }  # fmt: skip
        return [member(name, ragged(12, seed=n), spec=spec, seed=n) for n, (name, spec) in enumerate(specs.items())]

    together = Running(language_base("gpt2"), members(), torch.float64).run()
    alone = Running(language_base("gpt2"), members()[:1], torch.float64).run()
    start = Adapter.new(language_base("gpt2"), AdapterSpec(method=method, rank=4)).factors
    for name, own in alone.adapters["biased"].factors.items():
        assert "bias" in own.tensors
        assert not torch.equal(own.tensors["bias"], start[name].tensors["bias"].double()), name
    for key, value in alone.final("biased").items():
        torch.testing.assert_close(together.final("biased")[key], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", BIASED)
def test_a_merge_puts_the_bias_into_the_sites_own(method: str, gpt2, tmp_path) -> None:
    bare = logits(gpt2, None)
    adapter = Adapter.new(gpt2, AdapterSpec(method=method, rank=4))
    assert torch.equal(logits(gpt2, adapter), bare)
    want = logits(gpt2, moved(adapter))
    assert (want - bare).abs().max() > 0.1
    manylora.merge(gpt2, adapter, "fp32", output=tmp_path / "merged")
    torch.testing.assert_close(logits(manylora.load_base(str(tmp_path / "merged"), dtype="float32"), None), want)


def test_what_has_no_place_for_a_bias_is_named(tiny_base_folder, gpt2, tmp_path) -> None:
    llama = manylora.load_base(str(tiny_base_folder), dtype="float32")
    adapter = moved(Adapter.new(llama, AdapterSpec(method="lora-bias", rank=4)))
    with pytest.raises(SpecError, match=r"the adapter adds a bias at 'model\.layers\.0"):
        manylora.merge(llama, adapter, "fp32", output=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    for method in BIASED:
        with pytest.raises(AdapterBroken, match="has no place for"):
            export(moved(Adapter.new(gpt2, AdapterSpec(method=method, rank=4))), "mlx", tmp_path / "out")
    with pytest.raises(SpecError, match="is not stored in few bits"):
        Adapter.new(gpt2, AdapterSpec(method="lora-bias", rank=4, quantize="int4"))


@pytest.mark.parametrize("method", BIASED)
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_biases_stand_on_packed_bases(method: str, quantize: str, gpt2, tmp_path) -> None:
    base = manylora.load_base(gpt2.name, dtype="float32", quantize=quantize)
    adapter = Adapter.new(base, AdapterSpec(method=method, rank=4))
    assert torch.equal(logits(base, adapter), logits(base, None))
    want = logits(base, moved(adapter))
    assert torch.equal(logits(base, Adapter.load(adapter.save(tmp_path / "adapter", base))), want)
