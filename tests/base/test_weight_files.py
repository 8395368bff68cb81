"""Which files a model folder's weights lie in, what opens it, and what a new folder takes along."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import manylora
from manylora.adapters.adapter import Adapter
from manylora.base.auto import auto_class_named, auto_class_of
from manylora.base.fingerprint import folder_fingerprint, weight_files
from manylora.base.load import load_base
from manylora.base.packing.folder import quantise_folder
from manylora.errors import BaseBroken, ConfigError
from manylora.spec import AdapterSpec


@pytest.fixture
def folder(tiny_base_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base_folder, tmp_path / "base"))


def test_weights_that_lie_beside_the_model_s_own_are_no_part_of_it(folder: Path) -> None:
    before = folder_fingerprint(folder)
    adapter = Adapter.new(load_base(str(folder)), AdapterSpec(rank=2), seed=0)
    save_file({"other": torch.ones(3)}, folder / "consolidated.safetensors")
    assert folder_fingerprint(folder) == before
    base = load_base(str(folder))
    with manylora.Bank(base) as bank:
        bank.put(adapter, slot=0)  # and what was trained without them is not refused
    quantise_folder(str(folder), folder.parent / "packed", "int8")
    assert load_base(str(folder.parent / "packed")).fingerprint == before


def test_the_index_says_which_files_are_the_model_s(folder: Path) -> None:
    before = folder_fingerprint(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    halves = [dict(list(tensors.items())[half::2]) for half in range(2)]
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name, half in zip(names, halves, strict=True):
        save_file(half, folder / name, metadata={"format": "pt"})
    index = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    save_file({"other": torch.ones(3)}, folder / "extra.safetensors")
    assert [path.name for path in weight_files(folder)] == names
    assert folder_fingerprint(folder) == before
    (folder / names[1]).unlink()
    with pytest.raises(BaseBroken, match="lacks model-00002-of-00002"):
        folder_fingerprint(folder)


@pytest.mark.parametrize(
    ("architecture", "auto"),
    [
        ("LlamaForCausalLM", "AutoModelForCausalLM"), ("BertForMaskedLM", "AutoModelForMaskedLM"),
        ("T5ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
        ("BertForSequenceClassification", "AutoModelForSequenceClassification"),
        ("BertForTokenClassification", "AutoModelForTokenClassification"),
        ("DistilBertForQuestionAnswering", "AutoModelForQuestionAnswering"),
        ("ViTForImageClassification", "AutoModelForImageClassification"), ("BertModel", "AutoModel"),
        ("Nobody", None),
    ],
)  # fmt: skip
def test_an_architecture_is_opened_by_the_class_that_makes_it(
    architecture: str, auto: str | None, tmp_path: Path
) -> None:
    assert auto_class_named(architecture) == auto
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    assert auto_class_of(tmp_path) == (auto or "AutoModelForCausalLM")


def test_a_classifier_is_packed_as_a_classifier(tmp_path: Path, tiny_base_folder: Path) -> None:
    from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_labels=5,
        pad_token_id=0,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    whole = Path(shutil.copytree(tiny_base_folder, tmp_path / "whole"))
    (whole / "model.safetensors").unlink()
    model.save_pretrained(whole)
    quantise_folder(str(whole), tmp_path / "packed", "int8")
    names = set(load_file(tmp_path / "packed" / "packed.safetensors"))
    assert any(name.startswith("score.") for name in names), "the head is left out"
    assert AutoModelForSequenceClassification.from_config(config).num_labels == 5


RIGHTS = ("LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md", "tokenizer.tiktoken")


@pytest.mark.parametrize("into", ["fp32", "int8"])
def test_a_merged_folder_keeps_licences_and_tokenizer_files(folder: Path, tmp_path: Path, into: str) -> None:
    for name in RIGHTS:
        (folder / name).write_text(f"the {name} of the base")
    (folder / "README.md").write_text("the base's own card")
    base = load_base(str(folder), dtype="float32")
    adapter = Adapter.new(base, AdapterSpec(rank=2), seed=0)
    for factors in adapter.factors.values():
        factors.tensors["b"].normal_(generator=torch.Generator().manual_seed(1))
    manylora.merge(base, adapter, into=into, output=tmp_path / "merged", max_error=10.0)
    for name in RIGHTS:
        assert (tmp_path / "merged" / name).read_text() == f"the {name} of the base", name
    assert "merged into it" in (tmp_path / "merged" / "README.md").read_text()
    assert load_base(str(tmp_path / "merged")).num_parameters() == base.num_parameters()


def test_a_dtype_of_torch_is_taken_for_a_dtype(folder: Path) -> None:
    assert load_base(str(folder), dtype=torch.float32).dtype == torch.float32
    assert manylora.load_config({"base": "b", "data": {"train": "t"}, "output": "o", "dtype": torch.float16}).dtype == (
        "float16"
    )
    with pytest.raises(ConfigError, match="dtype is 'int32'"):
        load_base(str(folder), dtype=torch.int32)
    base = load_base(str(folder), dtype=torch.float32)
    report = manylora.merge(base, Adapter.new(base, AdapterSpec(rank=2), seed=0), into=torch.bfloat16, max_error=10.0)
    assert report.into == "bf16"


def test_a_task_that_needs_a_module_of_python_is_refused_where_there_is_only_a_folder(folder: Path) -> None:
    with pytest.raises(ConfigError, match="only Python can hand over") as caught:
        load_base(str(folder), auto="")
    assert "manylora.train(config, base=" in str(caught.value.next_step)
    with pytest.raises(ConfigError, match="AutoModelForNothing"):
        load_base(str(folder), auto="AutoModelForNothing")
