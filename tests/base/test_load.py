"""Loading a base: what is found, what is refused, and the fingerprint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from manylora.base.load import builtin_names, load_base
from manylora.errors import BaseBroken, BaseNotFound, ConfigError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tiny_base_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base_folder, tmp_path / "base"))


def test_a_folder_loads_in_the_dtype_asked_for(folder: Path) -> None:
    for dtype in ("float32", "float64", "bfloat16"):
        base = load_base(str(folder), dtype=dtype)
        assert base.dtype == getattr(torch, dtype) or "no bfloat16 products" in " ".join(base.notes)
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not base.model.training


def test_the_fingerprint_is_of_the_weights_and_not_of_their_dtype_or_files(folder: Path, tmp_path: Path) -> None:
    first = load_base(str(folder), dtype="float32").fingerprint
    assert load_base(str(folder), dtype="bfloat16").fingerprint == first
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    split = Path(shutil.copytree(folder, tmp_path / "split"))
    (split / "model.safetensors").unlink()
    for file, held in halves.items():
        save_file({name: tensors[name] for name in held}, split / file, metadata={"format": "pt"})
    weight_map = {name: file for file, held in halves.items() for name in held}
    (split / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert load_base(str(split), dtype="float32").fingerprint == first


def test_another_weight_has_another_fingerprint(folder: Path) -> None:
    first = load_base(str(folder)).fingerprint
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_base(str(folder)).fingerprint != first


def test_a_damaged_cache_of_fingerprints_is_only_slower(folder: Path, tmp_path: Path) -> None:
    first = load_base(str(folder)).fingerprint
    cache = tmp_path / "cache" / "manylora" / "fingerprints.json"
    assert first in cache.read_text()
    cache.write_text("{nonsense")
    assert load_base(str(folder)).fingerprint == first


def test_an_unknown_base_gives_the_names_that_exist(folder: Path) -> None:
    with pytest.raises(BaseNotFound, match="builtin:tiny-ne") as caught:
        load_base("builtin:tiny-ne")
    assert caught.value.allowed == ", ".join(builtin_names())
    with pytest.raises(BaseNotFound) as caught:
        load_base(str(folder.parent / "bsae"))
    assert str(folder) in caught.value.nearest


def test_a_hub_id_without_a_connection_says_so() -> None:
    with pytest.raises(BaseNotFound, match="neither a folder nor a model that the hub gave"):
        load_base("nobody/no-such-model")


def test_a_folder_without_config_or_weights_is_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(BaseBroken, match=r"holds no weights but pickled ones \(pytorch_model.bin\)"):
        load_base(str(folder))
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(BaseBroken, match="holds no weights"):
        load_base(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(BaseBroken, match=r"no config\.json"):
        load_base(str(folder))


@pytest.mark.parametrize("kept", [4, 60, 5000])
def test_truncated_weights_are_named(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(BaseBroken, match=r"model\.safetensors"):
        load_base(str(folder))


def test_missing_tensors_are_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseBroken, match=r"model\.norm\.weight"):
        load_base(str(folder))


def test_a_folder_without_a_tokenizer_is_refused(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(BaseBroken, match="no tokenizer"):
        load_base(str(folder))


def test_a_device_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be used"):
        load_base(str(folder), device="cuda:99")


def test_a_chat_template_from_a_file_replaces_the_bases_own(folder: Path, tmp_path: Path) -> None:
    before = load_base(str(folder)).template_digest
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages[0]['content'] }}")
    assert load_base(str(folder), chat_template=template).template_digest != before
    with pytest.raises(BaseNotFound, match="no chat template"):
        load_base(str(folder), chat_template=tmp_path / "none.jinja")


def test_the_builtin_base_knows_how_to_stop_and_to_chat() -> None:
    base = load_base("builtin:tiny-en")
    assert base.packs
    assert base.post_head == "none"
    assert base.tokenizer.convert_ids_to_tokens(list(base.eos_ids)) == ["<|endoftext|>", "<|end|>"]
    text = "Prices: 3.50 £, ~10 % | a_b [c] {d} @ #1 \\ <x> é ü 中 😀\tend"
    tokens = base.tokenizer(text, add_special_tokens=False).input_ids
    assert base.tokenizer.decode(tokens) == text
    norms = base.model.get_input_embeddings().weight.float().norm(dim=1)
    assert norms[tokens].min() > 0.25 * norms.median(), "a row of the embedding that was never trained"
