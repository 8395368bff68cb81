"""Merged equals unmerged within a measured error; what loses the learning is refused, and nothing is written."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from torch import nn

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.adapters.merge import MergeReport, folder, merge
from manylora.adapters.merge.report import Difference, Losses, SiteError, facts, over_bound
from manylora.base.frozen import FrozenModel
from manylora.base.load import load_base
from manylora.errors import BaseMismatch, ConfigError, MergeRefused, OutputExists, SpecError, UnknownName
from manylora.spec import AdapterSpec
from manylora.types import Factors

if TYPE_CHECKING:
    from pathlib import Path

ALL = AdapterSpec(rank=4, alpha=8.0)
SPECS = {
    "linear": ALL,
    "rsLoRA": replace(ALL, scale_rule="alpha/sqrt(rank)"),
    "patterns": replace(ALL, rank_pattern={"v_proj": 2, "layers.0.mlp.*": 3}, alpha_pattern={"down_proj": 3.0}),
    "embedding": replace(ALL, sites=("embed_tokens", "q_proj")),
    "head": replace(ALL, sites=("lm_head", "q_proj")),
    "norms copied": replace(ALL, full_sites=("norm", "input_layernorm")),
    "one of two tied copied": replace(ALL, full_sites=("embed_tokens",)),
    "both tied copied": replace(ALL, full_sites=("embed_tokens", "lm_head")),
    "everything copied": AdapterSpec(method="full", sites=("everything",)),
}


def filled(base: FrozenModel, spec: AdapterSpec, size: float = 0.1, seed: int = 1) -> Adapter:
    """An adapter whose delta at each site is `size` of the weight, by norm."""
    adapter = Adapter.new(base, spec, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, own in adapter.factors.items():
        drawn = {key: torch.randn(value.shape, generator=generator) for key, value in own.tensors.items()}
        if own.method == "lora":
            delta = adapter.spec.scale(name) * (drawn["b"] @ drawn["a"])
            drawn["b"] *= size * float(base.sites[name].weight(torch.float32).norm() / delta.norm())
        else:
            drawn = {
                key: value + size * float(value.norm()) / value.numel() ** 0.5 * drawn[key]
                for key, value in own.tensors.items()
            }
        factors[name] = Factors(own.method, drawn)
    return replace(adapter, factors=factors)


def tokens(vocabulary: int = 300) -> torch.Tensor:
    return torch.randint(6, vocabulary, (3, 11), generator=torch.Generator().manual_seed(4))


def unmerged(base: FrozenModel, adapter: Adapter, ids: torch.Tensor) -> torch.Tensor:
    with Bank(base) as bank, torch.no_grad():
        bank.put(adapter, slot=0)
        with bank.route((0,) * len(ids)):
            return base.model(input_ids=ids).logits


def opened(path: Path, auto: str = "AutoModelForCausalLM", dtype: Any = torch.float32) -> torch.nn.Module:
    found, info = getattr(transformers, auto).from_pretrained(path, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return found.eval()


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits


@pytest.fixture
def llama(tiny_base_folder: Path):
    return load_base(str(tiny_base_folder), dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """Conv1D, and a checkpoint whose keys lack the prefix that the model's have."""
    from safetensors.torch import load_file, save_file

    path = tmp_path_factory.mktemp("gpt2")
    config = transformers.GPT2Config(
        vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(2)
        transformers.GPT2LMHeadModel(config).save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(tiny_base_folder).save_pretrained(path)
    stored = load_file(path / "model.safetensors")
    bare = {key.removeprefix("transformer."): value.clone() for key, value in stored.items()}
    save_file(bare, path / "model.safetensors", metadata={"format": "pt"})
    return path


# -- merged equals unmerged --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SPECS)
def test_merged_in_float32_computes_what_the_unmerged_model_does(llama, kind, tmp_path):
    adapter = filled(llama, SPECS[kind])
    report = merge(llama, adapter, "fp32", output=tmp_path / "merged")
    ids = tokens()
    expected, bare = unmerged(llama, adapter, ids), logits(llama.model, ids)
    found = logits(opened(tmp_path / "merged"), ids)
    assert (expected - bare).abs().max() > 0.02, "an adapter that changes nothing proves nothing"
    assert (found - expected).abs().max() < 1e-4
    assert report.max_abs_error is not None
    assert report.max_abs_error < 1e-4
    assert report.median_error is not None
    assert report.median_error < 1e-5
    assert any("the folder was opened" in note for note in report.notes)


@pytest.mark.parametrize("kind", ["linear", "embedding", "both tied copied"])
@pytest.mark.parametrize("into", ["bf16", "fp16"])
def test_merged_in_16_bits_is_off_by_no_more_than_was_measured(llama, kind, into, tmp_path):
    adapter = filled(llama, SPECS[kind])
    rows = tokens().tolist()
    report = merge(llama, adapter, into, output=tmp_path / "merged", probes=rows)
    found = logits(opened(tmp_path / "merged"), tokens())
    error = (found - unmerged(llama, adapter, tokens())).abs().max()
    assert 0 < error <= report.max_abs_error * 1.01
    assert report.num_positions == 8 * 32 + 33
    assert opened(tmp_path / "merged", dtype="auto").dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[into]


@pytest.mark.parametrize("into", ["fp32", "bf16"])
def test_conv1d_and_a_checkpoint_without_the_models_prefix_merge(gpt2_folder, into, tmp_path):
    base = load_base(str(gpt2_folder), dtype="float32", device="cpu")
    adapter = filled(base, replace(ALL, sites=("all-linear", "wte"), full_sites=("ln_f",)))
    report = merge(base, adapter, into, output=tmp_path / "merged", probes=tokens().tolist())
    found = logits(opened(tmp_path / "merged"), tokens())
    assert (found - unmerged(base, adapter, tokens())).abs().max() <= max(1e-4, report.max_abs_error * 1.01)
    assert report.untied == ("lm_head",)


@pytest.mark.parametrize("kind", ["linear", "embedding"])
@pytest.mark.parametrize("into", ["int8", "nf4"])
def test_a_packed_folder_is_loaded_by_load_base_with_the_measured_logits(llama, kind, into, tmp_path):
    adapter = filled(llama, SPECS[kind], size=0.5)
    report = merge(llama, adapter, into, output=tmp_path / "merged", probes=tokens().tolist(), max_error=5.0)
    base = load_base(str(tmp_path / "merged"), dtype="float32", device="cpu")
    assert {site.packed.format for site in base.sites.values() if site.packed is not None} == {into}
    error = (logits(base.model, tokens()) - unmerged(llama, adapter, tokens())).abs().max()
    assert 0 < error <= report.max_abs_error * 1.01
    assert base.fingerprint != llama.fingerprint


def test_packed_conv1d_merges(gpt2_folder, tmp_path):
    base = load_base(str(gpt2_folder), dtype="float32", device="cpu")
    adapter = filled(base, ALL, size=0.5)
    report = merge(base, adapter, "int8", output=tmp_path / "merged", probes=tokens().tolist(), max_error=5.0)
    again = load_base(str(tmp_path / "merged"), dtype="float32", device="cpu")
    error = (logits(again.model, tokens()) - unmerged(base, adapter, tokens())).abs().max()
    assert 0 < error <= report.max_abs_error * 1.01


def test_a_start_that_moves_the_base_merges_as_it_computes(llama, tmp_path):
    adapter = Adapter.new(llama, replace(ALL, init="pissa"))
    generator = torch.Generator().manual_seed(3)
    factors = {
        name: replace(
            own, tensors={k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in own.tensors.items()}
        )
        for name, own in adapter.factors.items()
    }
    adapter = replace(adapter, factors=factors)
    assert any(own.anchors for own in adapter.factors.values())
    merge(llama, adapter, "fp32", output=tmp_path / "merged")
    found = logits(opened(tmp_path / "merged"), tokens())
    assert (found - unmerged(llama, adapter, tokens())).abs().max() < 1e-3


def test_a_base_loaded_in_bfloat16_is_merged_from_its_files(tiny_base_folder, llama, tmp_path):
    """The folder holds float32: nothing of it may pass through the dtype that the base was loaded in."""
    narrow = load_base(str(tiny_base_folder), dtype="bfloat16", device="cpu")
    narrow.model.to(torch.bfloat16)
    adapter = filled(llama, ALL)
    merge(narrow, adapter, "fp32", output=tmp_path / "narrow", max_error=1.0)
    merge(llama, adapter, "fp32", output=tmp_path / "wide")
    one, two = (opened(tmp_path / name).state_dict() for name in ("narrow", "wide"))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_noise_of_computing_in_bfloat16_is_not_taken_for_an_error_of_the_merge(tiny_base_folder):
    base = load_base(str(tiny_base_folder), dtype="float32", device="cpu")
    base.model.to(torch.bfloat16)
    report = merge(base, filled(base, ALL, size=3e-3), "fp32")
    assert report.passed
    assert report.median_error is not None
    assert report.median_error < 1e-2


def test_a_base_in_memory_merges_and_says_where_its_weights_came_from(base, adapters, tmp_path):
    report = merge(base, adapters[0], "fp32", output=tmp_path / "merged")
    assert any("in memory" in note for note in report.notes)
    found = logits(opened(tmp_path / "merged"), tokens(200))
    assert (found - unmerged(base, adapters[0], tokens(200))).abs().max() < 1e-3


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.norm = nn.BatchNorm1d(10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.up(x)))


def test_any_module_merges_into_weights_that_it_loads(tmp_path):
    from safetensors.torch import load_file

    torch.manual_seed(0)
    x = torch.randn(8, 6)
    base = FrozenModel(Plain(), example=lambda rows: {"x": x[:rows]})
    adapter = filled(base, AdapterSpec(rank=2, sites=("up", "head"), full_sites=("norm",)))
    report = merge(base, adapter, "fp32", output=tmp_path / "merged")
    assert report.max_abs_error is not None
    assert report.max_abs_error < 1e-5
    again = Plain().eval()
    again.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    with Bank(base) as bank:
        bank.put(adapter, slot=0)
        with bank.route((0,) * 8), torch.no_grad():
            torch.testing.assert_close(again(x), base.model(x))
    with pytest.raises(ConfigError, match="needs a transformers model"):
        merge(base, adapter, "nf4", output=tmp_path / "packed", max_error=9.0)


# -- the folder --------------------------------------------------------------------------------------------------------


def test_the_base_is_not_touched(llama, tmp_path):
    before = {key: value.clone() for key, value in llama.model.state_dict().items()}
    merge(llama, filled(llama, SPECS["embedding"]), "bf16", output=tmp_path / "merged")
    after = llama.model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert llama.bank is None
    assert not any("forward" in site.module.__dict__ for site in llama.sites.values())


def test_the_folder_has_tokenizer_template_generation_settings_card_and_report(llama, tmp_path):
    report = merge(llama, filled(llama, ALL), "bf16", output=tmp_path / "merged")
    path = tmp_path / "merged"
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    assert tokenizer.chat_template == llama.tokenizer.chat_template
    assert opened(path).generation_config.eos_token_id == llama.model.generation_config.eos_token_id
    assert json.loads((path / "config.json").read_text())["dtype"] == "bfloat16"
    assert "library_name: transformers" in (path / "README.md").read_text()
    saved = json.loads((path / "merge_report.json").read_text())
    assert saved == json.loads(json.dumps(report.to_dict()))
    assert saved["median_error"] == report.median_error


def test_tied_weights_that_change_apart_are_written_apart(llama, tmp_path):
    merge(llama, filled(llama, SPECS["embedding"]), "fp32", output=tmp_path / "apart")
    assert json.loads((tmp_path / "apart" / "config.json").read_text())["tie_word_embeddings"] is False
    model: Any = opened(tmp_path / "apart")
    assert torch.equal(model.lm_head.weight, llama.model.lm_head.weight)
    assert not torch.equal(model.model.embed_tokens.weight, model.lm_head.weight)
    merge(llama, filled(llama, SPECS["both tied copied"]), "fp32", output=tmp_path / "together")
    assert json.loads((tmp_path / "together" / "config.json").read_text())["tie_word_embeddings"] is True


def test_large_weights_are_written_in_several_files(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "SHARD_BYTES", 20_000)
    adapter = filled(llama, ALL)
    merge(llama, adapter, "fp32", output=tmp_path / "merged")
    names = [path.name for path in (tmp_path / "merged").glob("*.safetensors")]
    assert len(names) > 2
    assert f"model-00001-of-{len(names):05d}.safetensors" in names
    found = logits(opened(tmp_path / "merged"), tokens())
    assert (found - unmerged(llama, adapter, tokens())).abs().max() < 1e-4


def test_a_folder_that_holds_something_is_refused_before_anything_is_computed(llama, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputExists, match="notes"):
        merge(llama, filled(llama, ALL), "bf16", output=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


# -- the error ---------------------------------------------------------------------------------------------------------


def test_a_small_update_does_not_survive_nf4_and_is_refused_with_the_numbers(llama, tmp_path):
    adapter = filled(llama, ALL, size=1e-3)
    with pytest.raises(MergeRefused, match="loses too much") as caught:
        merge(llama, adapter, "nf4", output=tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []
    report: MergeReport = caught.value.report
    assert not report.passed
    assert report.median_error is not None
    assert report.median_error > 10
    assert [other.into for other in report.others] == ["bf16", "fp32"]
    assert "fp32 would pass" in str(caught.value)
    assert "--max-error" in str(caught.value)


def test_an_update_below_the_grid_of_a_packed_base_vanishes_whole(tiny_base_folder):
    """Weights that stand on the grid already round back to where they were: nothing of a small delta is left."""
    packed = load_base(str(tiny_base_folder), dtype="float32", device="cpu", quantize="nf4")
    with pytest.raises(MergeRefused) as caught:
        merge(packed, filled(packed, ALL, size=1e-3), "nf4")
    report = caught.value.report
    assert report.onto == "dequantised:nf4"
    assert report.losses.median_survival < 0.1
    assert report.median_error == pytest.approx(1.0, abs=0.3)


def test_the_bound_judges_by_what_is_lost_and_not_by_the_size_of_the_noise():
    """Both as measured of a trained adapter: noise four times the change that costs 2 % of it, and the loss of nearly
    all of it with an error of 1."""
    bare = Difference(max_abs=7.0, mean_abs=0.5, kl=0.3, max_kl=1.0, top1=0.6)
    noisy = Losses("nf4", (SiteError("q", "lora", 3.98, 0.998, 0.02),), replace(bare, kl=0.03))
    lost = Losses("nf4", (SiteError("q", "lora", 1.08, 0.018, 0.02),), replace(bare, kl=0.297))
    assert over_bound(noisy, bare, 0.5, None) == ()
    assert len(over_bound(lost, bare, 0.5, None)) == 2
    assert over_bound(lost, bare, 1.0, None) == ()


def test_without_logits_the_sites_error_is_the_bound():
    base = FrozenModel(Plain())
    adapter = filled(base, AdapterSpec(rank=2, sites=("up", "head")), size=1e-3)
    assert merge(base, adapter, "fp32").kl is None
    with pytest.raises(MergeRefused, match="of the change is the error at the median site"):
        merge(base, adapter, "bf16")


def test_the_error_that_the_refusal_names_is_accepted(llama):
    adapter = filled(llama, ALL, size=0.02)
    with pytest.raises(MergeRefused) as caught:
        merge(llama, adapter, "nf4")
    named = float(str(caught.value).rpartition("--max-error ")[2])
    assert merge(llama, adapter, "nf4", max_error=named).passed


@pytest.mark.parametrize("into", ["fp32", "bf16"])
def test_merging_onto_dequantised_weights_is_the_model_that_was_trained(tiny_base_folder, into, tmp_path):
    packed = load_base(str(tiny_base_folder), dtype="float32", device="cpu", quantize="nf4")
    adapter = filled(packed, ALL)
    report = merge(packed, adapter, into, output=tmp_path / "merged", probes=tokens().tolist())
    assert report.onto == "dequantised:nf4"
    found = logits(opened(tmp_path / "merged"), tokens())
    assert (found - unmerged(packed, adapter, tokens())).abs().max() <= max(1e-4, report.max_abs_error * 1.01)


def test_merging_onto_other_weights_than_those_trained_on_shows_in_the_logits(tiny_base_folder):
    packed = load_base(str(tiny_base_folder), dtype="float32", device="cpu", quantize="nf4")
    adapter = filled(packed, ALL)
    same, other = (merge(packed, adapter, "fp32", onto=onto, max_error=99) for onto in (None, "original"))
    assert other.onto == "original"
    assert other.kl is not None
    assert other.kl > 100 * (same.kl or 0.0)


def test_a_dense_base_merges_onto_what_packing_would_make_of_it(tiny_base_folder, llama, tmp_path):
    packed = load_base(str(tiny_base_folder), dtype="float32", device="cpu", quantize="nf4")
    adapter = filled(llama, ALL)
    report = merge(llama, adapter, "fp32", onto="dequantised:nf4", output=tmp_path / "merged")
    assert report.max_abs_error is not None
    assert report.max_abs_error < 1e-4
    found = logits(opened(tmp_path / "merged"), tokens())
    assert (found - unmerged(packed, adapter, tokens())).abs().max() < 1e-4


def test_sites_are_reported_worst_first_with_what_survives(llama):
    report = merge(llama, filled(llama, ALL), "bf16")
    errors = [site.error for site in report.sites]
    assert errors == sorted(errors, reverse=True)
    assert len(report.sites) == 14
    assert all(abs(site.survives - 1) < 0.05 and abs(site.size - 0.1) < 1e-3 for site in report.sites)
    assert "median site" in facts(report)


def test_an_adapter_that_changes_nothing_is_told(llama):
    report = merge(llama, Adapter.new(llama, ALL), "bf16")
    assert report.median_error is None
    assert any("changes nothing" in note for note in report.notes)


def test_the_measured_error_is_the_same_every_time(llama):
    adapter = filled(llama, ALL)
    assert merge(llama, adapter, "bf16").to_dict() == merge(llama, adapter, "bf16").to_dict()


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_another_base_is_refused(llama, gpt2_folder):
    with pytest.raises(BaseMismatch):
        merge(load_base(str(gpt2_folder), dtype="float32", device="cpu"), filled(llama, ALL), "bf16")


@pytest.mark.parametrize(
    ("onto", "told"), [("orignal", "original"), ("dequantised", "not packed"), ("original:nf4", "original:nf4")]
)
def test_weights_that_cannot_be_merged_onto_are_refused(llama, onto, told):
    with pytest.raises(ConfigError, match=told):
        merge(llama, filled(llama, ALL), "bf16", onto=onto)


def test_original_weights_that_are_not_there_are_refused(tiny_base_folder, tmp_path):
    from manylora.base.packing.folder import quantise_folder

    quantise_folder(str(tiny_base_folder), tmp_path / "packed", "nf4")
    packed = load_base(str(tmp_path / "packed"), dtype="float32", device="cpu")
    adapter = filled(packed, ALL)
    with pytest.raises(ConfigError, match="original weights are not there"):
        merge(packed, adapter, "bf16", onto="original")
    merge(packed, adapter, "bf16", output=tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    found = logits(opened(tmp_path / "merged"), tokens())
    assert (found - unmerged(packed, adapter, tokens())).abs().max() < 0.1


def test_a_storage_that_does_not_exist_is_refused_with_the_nearest(llama):
    with pytest.raises(UnknownName, match="bf16"):
        merge(llama, filled(llama, ALL), "bf15")


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan")])
def test_a_bound_that_is_none_is_refused(llama, bound):
    with pytest.raises(SpecError, match="max_error"):
        merge(llama, filled(llama, ALL), "bf16", max_error=bound)
