"""The adapter folder: written whole or not at all, and every way in which one may be broken is told by name."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.adapters.peft import store
from manylora.base.frozen import FrozenModel
from manylora.errors import AdapterBroken, BaseMismatch, DiskFull, OutputExists
from manylora.spec import AdapterSpec
from manylora.types import Factors

if TYPE_CHECKING:
    from pathlib import Path

A0 = "base_model.model.layers.0.up.lora_A.weight"
B0 = "base_model.model.layers.0.up.lora_B.weight"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.norm = nn.BatchNorm1d(10)
        self.down = nn.Linear(10, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.norm(self.up(x)))


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 11)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def tiny(seed: int = 0) -> FrozenModel:
    torch.manual_seed(seed)
    return FrozenModel(Tiny(), name="a tiny base")


SPEC = AdapterSpec(rank=3, alpha=7.5, dropout=0.1, sites=("up", "down", "embed"), full_sites=("head",))


def adapter_on(base: FrozenModel, spec: AdapterSpec = SPEC) -> Adapter:
    adapter = Adapter.new(base, spec, seed=1)
    torch.manual_seed(2)
    factors = {
        name: Factors(own.method, {key: torch.randn_like(value) for key, value in own.tensors.items()})
        for name, own in adapter.factors.items()
    }
    return replace(adapter, factors=factors)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = tiny()
    return adapter_on(base).save(tmp_path / "adapter", base)


def edit_config(folder: Path, **settings: object) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | settings
    path.write_text(json.dumps(config))


def edit_tensors(folder: Path, change) -> None:
    """Change the tensors as one does who means it: without the receipt that would tell."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors = {key: value.clone() for key, value in tensors.items()}
    change(tensors)
    save_file(tensors, path)
    (folder / "receipt.json").unlink()


# -- what is written ---------------------------------------------------------------------------------------------------


def test_the_folder_holds_pefts_keys_in_float32(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    shapes = {key: tuple(value.shape) for key, value in tensors.items() if ".1." not in key}
    assert shapes == {
        A0: (3, 6),
        B0: (10, 3),
        "base_model.model.layers.0.down.lora_A.weight": (3, 10),
        "base_model.model.layers.0.down.lora_B.weight": (6, 3),
        "base_model.model.embed.lora_embedding_A": (3, 11),
        "base_model.model.embed.lora_embedding_B": (6, 3),
        "base_model.model.head.weight": (11, 6),
        "base_model.model.head.bias": (11,),
    }
    assert {value.dtype for value in tensors.values()} == {torch.float32}


def test_the_config_spells_out_the_sites_and_keeps_every_setting(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["use_rslora"]) == (3, 7.5, 0.1, False)
    expected = ["embed", *(f"layers.{layer}.{name}" for layer in (0, 1) for name in ("up", "down"))]
    assert config["target_modules"] == expected
    assert config["modules_to_save"] == ["head"]
    assert config["base_model_name_or_path"] == "a tiny base"


def test_the_card_names_the_base_and_the_library(folder):
    card = (folder / "README.md").read_text()
    assert card.startswith('---\nbase_model: "a tiny base"\nlibrary_name: peft\n')


def test_the_receipt_says_base_sites_ranks_and_scales(folder):
    receipt = json.loads((folder / "receipt.json").read_text())
    assert receipt["base"] == {"name": "a tiny base", "fingerprint": tiny().fingerprint, "storage": None}
    assert receipt["sites"]["layers.0.up"] == {"method": "lora", "rank": 3, "scale": 2.5}
    assert receipt["sites"]["embed"]["kind"] == "embedding"
    assert receipt["sites"]["head"] == {"method": "full"}


def test_pattern_order_survives_because_the_first_match_wins(tmp_path):
    base = tiny()
    spec = replace(SPEC, rank_pattern={"layers.1.up": 2, "up": 1, "down": 4}, alpha_pattern={"up": 3.0, "down": 1.0})
    adapter = adapter_on(base, spec)
    again = Adapter.load(adapter.save(tmp_path / "adapter", base))
    assert list(again.spec.rank_pattern) == ["layers.1.up", "up", "down"]
    for name in adapter.spec.sites:
        assert again.spec.rank_at(name) == adapter.spec.rank_at(name)
        assert again.spec.scale(name) == adapter.spec.scale(name)


def test_a_whole_copy_brings_the_buffers_that_peft_asks_for_and_reads_back_without_them(tmp_path):
    base = tiny()
    adapter = adapter_on(base, replace(SPEC, full_sites=("norm",)))
    folder = adapter.save(tmp_path / "adapter", base)
    assert "base_model.model.layers.0.norm.running_mean" in load_file(folder / "adapter_model.safetensors")
    again = Adapter.load(folder)
    assert set(again.factors["layers.0.norm"].tensors) == {"weight", "bias"}
    with Bank(base) as bank:
        bank.put(again, slot=0)


def test_scale_survives_every_rule(tmp_path):
    base = tiny()
    for number, rule in enumerate(("alpha/rank", "alpha/sqrt(rank)")):
        adapter = adapter_on(base, replace(SPEC, scale_rule=rule, rank_pattern={"up": 2}))
        again = Adapter.load(adapter.save(tmp_path / str(number), base))
        assert [again.spec.scale(n) for n in again.spec.sites] == [adapter.spec.scale(n) for n in adapter.spec.sites]


@pytest.mark.parametrize("rule", ["alpha/rank", "alpha/sqrt(rank)"])
def test_a_folded_scale_gives_the_same_map_with_alpha_equal_to_the_rank(tmp_path, rule):
    base = tiny()
    spec = replace(SPEC, scale_rule=rule, rank_pattern={"layers.1.up": 2, "down": 4}, alpha_pattern={"up": 5.0})
    adapter = adapter_on(base, spec)
    folder = store.fold_scale(adapter).save(tmp_path / "adapter", base)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]
    assert config["alpha_pattern"] == config["rank_pattern"]
    again = Adapter.load(folder)
    for name in adapter.spec.sites:
        assert again.spec.scale(name) == 1.0
        one = adapter.spec.scale(name) * adapter.factors[name].tensors["b"] @ adapter.factors[name].tensors["a"]
        torch.testing.assert_close(again.factors[name].tensors["b"] @ again.factors[name].tensors["a"], one)


def test_an_adapter_is_not_written_over_another(folder):
    base = tiny()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(OutputExists, match="already holds"):
        adapter_on(base).save(folder, base)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_files_of_the_user_are_never_written_over(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(OutputExists, match=r"README\.md"):
        adapter_on(tiny()).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_an_empty_folder_may_be_filled_and_any_other_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    folder = adapter_on(tiny()).save(tmp_path / "run")
    assert Adapter.load(folder).spec.rank == 3
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("base: x\n")
    with pytest.raises(OutputExists, match=r"config\.yaml"):
        adapter_on(tiny()).save(tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "run"]


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def no_space(*_: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "_card", no_space)
    with pytest.raises(DiskFull):
        adapter_on(tiny()).save(tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_base_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(BaseMismatch):
        adapter_on(tiny()).save(tmp_path / "adapter", tiny(seed=5))
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_the_spec_does_not_say_are_not_written(tmp_path):
    adapter = adapter_on(tiny())
    wrong = replace(adapter, spec=replace(adapter.spec, rank=2))
    with pytest.raises(AdapterBroken, match="rank 3"):
        wrong.save(tmp_path / "adapter")


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_no_folder_and_no_config_are_told_apart(tmp_path):
    with pytest.raises(AdapterBroken, match="no folder"):
        Adapter.load(tmp_path / "nowhere")
    with pytest.raises(AdapterBroken, match=r"no adapter_config\.json"):
        Adapter.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '"LORA"', "\x00"])
def test_a_config_that_is_no_json_object_is_refused(folder, text):
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterBroken, match=r"adapter_config\.json"):
        Adapter.load(folder)


UNSUPPORTED = {
    "bias": "all",
    "trainable_token_indices": [3],
    "target_parameters": ["experts.gate"],
    "alora_invocation_tokens": [1, 2],
    "layer_replication": [[0, 2], [1, 2]],
    "megatron_config": {"tensor_model_parallel_size": 2},
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 0.1},
    "monteclora_config": {"samples": 4},
    "ensure_weight_tying": True,
    "init_lora_weights": "pissa_niter_16",
    "a_setting_of_the_future": 1,
    "peft_type": "VERA",
}


@pytest.mark.parametrize("setting", UNSUPPORTED)
def test_a_setting_that_is_not_computed_here_is_refused_with_its_value(folder, setting):
    edit_config(folder, **{setting: UNSUPPORTED[setting]})
    with pytest.raises(AdapterBroken) as caught:
        Adapter.load(folder)
    assert setting in str(caught.value)
    assert repr(UNSUPPORTED[setting]) in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"loftq_config": {}, "eva_config": None},
        {"a_setting_of_the_future": None},
        {"inference_mode": False, "revision": "main"},
    ],
)
def test_settings_that_change_nothing_are_accepted(folder, settings):
    edit_config(folder, **settings)
    assert Adapter.load(folder).spec.rank == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 0},
        {"r": "eight"},
        {"lora_alpha": None},
        {"lora_alpha": 0},
        {"lora_dropout": 1.0},
        {"rank_pattern": {"(": 3}},
        {"alpha_pattern": [1]},
    ],
)
def test_numbers_that_no_adapter_can_have_are_refused(folder, settings):
    edit_config(folder, **settings)
    with pytest.raises(AdapterBroken, match=r"adapter_config\.json"):
        Adapter.load(folder)


def test_a_pickle_alone_is_not_read_and_the_way_out_is_told(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterBroken, match="save_pretrained"):
        Adapter.load(folder)


def test_no_tensor_file_at_all_is_refused(folder):
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterBroken, match=r"no adapter_model\.safetensors"):
        Adapter.load(folder)


@pytest.mark.parametrize("keep", [0, 4, 300, -1])
def test_a_truncated_file_is_refused(folder, keep):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(AdapterBroken, match="SHA-256"):
        Adapter.load(folder)
    (folder / "receipt.json").unlink()
    with pytest.raises(AdapterBroken, match="truncated"):
        Adapter.load(folder)


BROKEN = {
    "A missing": (lambda t: t.pop(A0), "lacks factor A of 'layers.0.up'"),
    "B missing": (lambda t: t.pop(B0), "lacks factor B of 'layers.0.up'"),
    "a site missing": (lambda t: (t.pop(A0), t.pop(B0)), "lacks the factors of 'layers.0.up'"),
    "a copy missing": (
        lambda t: (t.pop("base_model.model.head.weight"), t.pop("base_model.model.head.bias")),
        "lacks the tensors of 'head'",
    ),
    "a stray tensor": (lambda t: t.update({"base_model.model.other.weight": torch.zeros(2)}), "unexpected tensor"),
    "no prefix": (lambda t: t.update({"layers.0.up.lora_A.weight": t.pop(A0)}), "unexpected tensor 'layers"),
    "a magnitude": (
        lambda t: t.update({"base_model.model.layers.0.up.lora_magnitude_vector": torch.zeros(10)}),
        "lora_magnitude_vector",
    ),
    "a bias of B": (lambda t: t.update({"base_model.model.layers.0.up.lora_B.bias": torch.zeros(10)}), "lora_B.bias"),
    "A of another rank": (lambda t: t.update({A0: torch.zeros(2, 6)}), "factor A of 'layers.0.up'"),
    "B of another rank": (lambda t: t.update({B0: torch.zeros(10, 4)}), "factor B of 'layers.0.up'"),
    "A of a convolution": (lambda t: t.update({A0: torch.zeros(3, 6, 1, 1)}), "of a linear"),
    "A of five dimensions": (lambda t: t.update({A0: torch.zeros(3, 6, 1, 1, 1)}), A0),
    "not a number": (lambda t: t[A0].fill_(float("nan")), A0),
    "no tensors": (lambda t: t.clear(), "no tensors"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_tensor_is_refused_by_name(folder, case):
    change, message = BROKEN[case]
    edit_tensors(folder, change)
    with pytest.raises(AdapterBroken) as caught:
        Adapter.load(folder)
    assert message in str(caught.value)


def test_tensors_of_another_size_are_refused_by_the_bank(folder):
    edit_tensors(folder, lambda t: t.update({A0: torch.zeros(3, 8)}))
    with Bank(tiny()) as bank, pytest.raises(AdapterBroken, match=r"layers\.0\.up"):
        bank.put(Adapter.load(folder), slot=0)


def test_tensors_that_the_receipt_does_not_know_are_refused(folder):
    receipt = (folder / "receipt.json").read_text()
    edit_tensors(folder, lambda t: t[A0].add_(1.0))
    (folder / "receipt.json").write_text(receipt)
    with pytest.raises(AdapterBroken, match="SHA-256"):
        Adapter.load(folder)


def test_a_scale_that_was_edited_after_training_is_refused(folder):
    edit_config(folder, lora_alpha=64)
    with pytest.raises(AdapterBroken, match=r"lora_alpha"):
        Adapter.load(folder)
    (folder / "receipt.json").unlink()
    assert Adapter.load(folder).spec.alpha == 64


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"tensors": {"sha256": "0"}}'])
def test_a_receipt_that_is_none_is_refused(folder, text):
    (folder / "receipt.json").write_text(text)
    with pytest.raises(AdapterBroken, match=r"receipt"):
        Adapter.load(folder)


def test_a_folder_of_adapters_lists_them(folder, tmp_path):
    for name in ("french", "german"):
        shutil.copytree(folder, tmp_path / "many" / name)
    with pytest.raises(AdapterBroken, match="french, german"):
        Adapter.load(tmp_path / "many")


def test_an_adapter_of_another_base_is_refused(folder):
    with Bank(tiny(seed=5)) as bank, pytest.raises(BaseMismatch, match="was trained on a tiny base"):
        bank.put(Adapter.load(folder), slot=0)


def test_an_adapter_that_matches_no_site_is_refused(folder):
    (folder / "receipt.json").unlink()
    other = FrozenModel(nn.Sequential(nn.Linear(6, 10)), name="other")
    with Bank(other) as bank, pytest.raises(BaseMismatch, match="are not in this base"):
        bank.put(Adapter.load(folder), slot=0)
