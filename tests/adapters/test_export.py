"""An adapter for another engine is the same map: recomputed from the files that were written."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.adapters.export.exported import export
from manylora.adapters.export.gguf import permuted
from manylora.base.load import load_base
from manylora.errors import AdapterBroken, BaseMismatch, ConfigError, OutputExists, UnknownName
from manylora.spec import AdapterSpec

if TYPE_CHECKING:
    from pathlib import Path

# Of PEFT itself; a warning about keys that it misses, or does not know, still fails a test.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SPECS = {
    "plain": AdapterSpec(rank=4, alpha=8.0),
    "rsLoRA": AdapterSpec(rank=4, alpha=8.0, scale_rule="alpha/sqrt(rank)"),
    "patterns": AdapterSpec(rank=4, alpha=8.0, rank_pattern={"v_proj": 2}, alpha_pattern={"k_proj": 3.0}),
}


@pytest.fixture
def llama(tiny_base_folder: Path):
    return load_base(str(tiny_base_folder), dtype="float32", device="cpu")


def filled(base, spec: AdapterSpec) -> Adapter:
    adapter = Adapter.new(base, spec)
    generator = torch.Generator().manual_seed(1)
    factors = {
        name: replace(
            own, tensors={k: v + 0.2 * torch.randn(v.shape, generator=generator) for k, v in own.tensors.items()}
        )
        for name, own in adapter.factors.items()
    }
    return replace(adapter, factors=factors)


def delta(adapter: Adapter, site: str) -> Tensor:
    own = adapter.factors[site].tensors
    return adapter.spec.scale(site) * own["b"] @ own["a"]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", SPECS)
def test_peft_opens_the_export_with_the_same_logits_and_a_scale_of_one(llama, kind, tmp_path, tiny_base_folder):
    adapter = filled(llama, SPECS[kind])
    export(adapter, "peft", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]
    assert not config["use_rslora"]
    ids = torch.randint(6, 300, (2, 9), generator=torch.Generator().manual_seed(2))
    with Bank(llama) as bank, torch.no_grad():
        bank.put(adapter, slot=0)
        with bank.route((0, 0)):
            expected = llama.model(input_ids=ids).logits
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_base_folder)
    opened = peft.PeftModel.from_pretrained(model, str(tmp_path / "out"))
    with torch.no_grad():
        assert (opened(input_ids=ids).logits - expected).abs().max() < 1e-4


def test_a_start_that_moves_the_base_is_exported_as_plain_factors(llama, tmp_path):
    adapter = filled(llama, AdapterSpec(rank=4, alpha=8.0, init="pissa"))
    export(adapter, "peft", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (8, True)


@pytest.mark.parametrize("kind", SPECS)
def test_mlx_factors_are_transposed_and_give_the_same_delta(llama, kind, tmp_path):
    adapter = filled(llama, SPECS[kind])
    export(adapter, "mlx", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapters.safetensors")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    settings = config["lora_parameters"]
    assert config["fine_tune_type"] == "lora"
    assert config["num_layers"] == -1
    assert "self_attn.q_proj" in settings["keys"]
    assert len(settings["keys"]) == 7
    for site in adapter.factors:
        a, b = tensors[f"{site}.lora_a"], tensors[f"{site}.lora_b"]
        rows, columns = llama.sites[site].out_in
        assert (a.shape, b.shape) == ((columns, settings["rank"]), (settings["rank"], rows))
        close(settings["scale"] * (a @ b).t(), delta(adapter, site))
    assert len(tensors) == 2 * len(adapter.factors)


def test_mlx_keeps_a_scale_that_all_sites_share(llama, tmp_path):
    adapter = filled(llama, SPECS["plain"])
    export(adapter, "mlx", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_parameters"]["scale"] == 2.0
    stored = load_file(tmp_path / "out" / "adapters.safetensors")
    site = next(iter(adapter.factors))
    assert torch.equal(stored[f"{site}.lora_a"].t(), adapter.factors[site].tensors["a"])


def test_mlx_refuses_an_embedding_that_is_the_head_too(llama, tmp_path):
    adapter = filled(llama, AdapterSpec(rank=4, sites=("embed_tokens",)))
    with pytest.raises(AdapterBroken, match="would adapt both"):
        export(adapter, "mlx", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def unpermuted(rows: Tensor, num_heads: int) -> Tensor:
    """Hugging Face's order of rows from llama.cpp's, written apart from the code under test: one row at a time."""
    size = rows.shape[0] // num_heads
    place = {h * size + 2 * i + half: h * size + half * (size // 2) + i for h in range(num_heads)
             for i in range(size // 2) for half in (0, 1)}  # fmt: skip
    found = torch.empty_like(rows)
    for theirs, ours in place.items():
        found[ours] = rows[theirs]
    return found


@pytest.mark.parametrize("kind", SPECS)
def test_gguf_read_back_gives_the_same_delta_with_q_and_k_reordered(llama, kind, tmp_path):
    gguf = pytest.importorskip("gguf")
    adapter = filled(llama, SPECS[kind])
    export(adapter, "gguf", tmp_path / "out")
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    said = {key: reader.get_field(key).contents() for key in ("general.type", "adapter.type", "general.architecture")}
    assert said == {"general.type": "adapter", "adapter.type": "lora", "general.architecture": "llama"}
    alpha = reader.get_field("adapter.lora.alpha").contents()
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
             "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}  # fmt: skip
    heads = {"q_proj": 4, "k_proj": 2}
    for site in adapter.factors:
        layer, ending = site.split(".")[2], site.rpartition(".")[2]
        name = f"blk.{layer}.{names[ending]}.weight"
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        found = alpha / b.shape[1] * b @ a
        close(unpermuted(found, heads[ending]) if ending in heads else found, delta(adapter, site))
    assert len(tensors) == 2 * len(adapter.factors)


def test_the_reordering_moves_rows_and_is_its_own_tests_inverse():
    rows = torch.arange(16.0)[:, None].expand(16, 3)
    moved = permuted(rows, 2)
    assert moved[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert torch.equal(unpermuted(moved, 2), rows)


def test_gguf_of_conv1d_has_the_rows_of_the_output(tmp_path):
    gguf = pytest.importorskip("gguf")
    from manylora.base.language import LanguageBase

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32, architectures=["GPT2LMHeadModel"]
    )
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "base")
    base = LanguageBase(model, name=str(tmp_path / "base")).probed()
    adapter = filled(base, SPECS["plain"])
    export(adapter, "gguf", tmp_path / "out")
    tensors = {
        t.name: torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(tmp_path / "out" / "adapter.gguf").tensors
    }
    a, b = tensors["blk.0.attn_qkv.weight.lora_a"], tensors["blk.0.attn_qkv.weight.lora_b"]
    assert (a.shape, b.shape) == ((4, 16), (48, 4))
    close(2.0 * b @ a, delta(adapter, "transformer.h.0.attn.c_attn"))


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (AdapterSpec(rank=4, sites=("embed_tokens",)), "is an embedding"),
        (AdapterSpec(rank=4, sites=("lm_head",)), "shares the embedding's weight"),
        (AdapterSpec(rank=4, sites=("q_proj",), full_sites=("lm_head",)), "whole copy"),
    ],
)
def test_what_llama_cpp_does_not_adapt_is_refused_by_name(llama, spec, told, tmp_path):
    pytest.importorskip("gguf")
    with pytest.raises(AdapterBroken, match=told):
        export(filled(llama, spec), "gguf", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_architecture_that_is_not_known_to_keep_its_weights_is_refused(llama, tmp_path, tiny_base_folder):
    pytest.importorskip("gguf")
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((tiny_base_folder / "config.json").read_text()) | {"architectures": ["LlamoForCausalLM"]}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="nearest: LlamaForCausalLM"):
        export(filled(llama, SPECS["plain"]), "gguf", tmp_path / "out", base=str(other))


def test_a_base_that_is_not_known_is_asked_for(llama, tmp_path):
    pytest.importorskip("gguf")
    with pytest.raises(BaseMismatch, match="--base"):
        export(replace(filled(llama, SPECS["plain"]), base_name=""), "gguf", tmp_path / "out")


def test_without_the_package_it_says_how_to_install_it(llama, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match="pip install gguf"):
        export(filled(llama, SPECS["plain"]), "gguf", tmp_path / "out")


def test_an_engine_that_does_not_exist_and_a_folder_in_use_are_refused(llama, tmp_path):
    adapter = filled(llama, SPECS["plain"])
    with pytest.raises(UnknownName, match="nearest: gguf"):
        export(adapter, "ggml-gguf", tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(OutputExists, match="mine"):
        export(adapter, "peft", tmp_path / "out")
