"""Sites and the patterns that name them."""

from __future__ import annotations

import pytest
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from manylora.adapters.adapter import Adapter
from manylora.base.frozen import FrozenModel
from manylora.base.sites import layer_of, match_sites
from manylora.errors import SiteNotFound, SpecError
from manylora.methods import METHODS
from manylora.spec import AdapterSpec, match_pattern


@pytest.fixture(scope="module")
def llama() -> FrozenModel:
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    return FrozenModel(model, head=model.get_output_embeddings())


def names(base: FrozenModel, *patterns: str, **more) -> list[str]:
    return [site.name for site in match_sites(base.sites, patterns, **more)]


def test_all_linear_leaves_the_output_head_out(llama: FrozenModel) -> None:
    found = names(llama, "all-linear")
    assert len(found) == 3 * 7
    assert "lm_head" not in found


def test_a_name_matches_whole_endings_only(llama: FrozenModel) -> None:
    assert len(names(llama, "q_proj")) == 3
    assert len(names(llama, "self_attn.q_proj")) == 3
    with pytest.raises(SiteNotFound):
        names(llama, "proj")


def test_globs_and_regular_expressions(llama: FrozenModel) -> None:
    assert len(names(llama, "*.layers.[01].mlp.*")) == 6
    assert len(names(llama, r"re:.*\.(q|v)_proj")) == 6
    with pytest.raises(SiteNotFound, match="no regular expression"):
        names(llama, "re:(")


def test_layers_and_exclusions(llama: FrozenModel) -> None:
    assert names(llama, "q_proj", layers=[2]) == ["model.layers.2.self_attn.q_proj"]
    assert len(names(llama, "all-linear", exclude=["mlp.*", "*.mlp.*"][1:])) == 12
    with pytest.raises(SiteNotFound, match="layer 7"):
        names(llama, "q_proj", layers=[7])
    with pytest.raises(SiteNotFound, match="no site is left"):
        names(llama, "q_proj", exclude=["q_proj"])


def test_a_pattern_that_matches_nothing_gives_near_names(llama: FrozenModel) -> None:
    with pytest.raises(SiteNotFound, match=r"no site matches 'q_porj' \(22 linear sites in this base\)") as caught:
        names(llama, "q_porj")
    assert "q_proj (3)" in caught.value.nearest
    with pytest.raises(SiteNotFound) as caught:
        names(llama, "all_linear")
    assert "all-linear" in caught.value.nearest


def test_a_kind_that_the_method_cannot_adapt_is_named(llama: FrozenModel) -> None:
    with pytest.raises(SiteNotFound, match="LlamaRMSNorm"):
        Adapter.new(llama, AdapterSpec(sites=("input_layernorm",)))


def test_tied_weights_are_found(llama: FrozenModel) -> None:
    assert llama.sites["lm_head"].tied_to == "model.embed_tokens"
    assert llama.sites["model.embed_tokens"].tied_to is None


def test_gpt2s_conv1d_is_a_site_with_its_weight_as_out_in() -> None:
    base = FrozenModel(AutoModelForCausalLM.from_config(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2)))
    site = base.sites["transformer.h.0.attn.c_attn"]
    assert site.kind.name == "conv1d"
    assert site.out_in == (48, 16)


def test_a_rank_above_some_sites_is_capped_there_with_the_scale_kept() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4))
    spec = AdapterSpec(rank=16, alpha=32, sites=("all-linear",))
    adapter = Adapter.new(FrozenModel(model), spec)
    assert adapter.capped == {"1": 4}
    assert adapter.factors["1"].tensors["a"].shape == (4, 64)
    assert adapter.spec.scale("1") == adapter.spec.scale("0") == 2.0


def test_a_rank_above_every_site_is_refused() -> None:
    with pytest.raises(SpecError, match="above what every one of the 1 sites allows"):
        Adapter.new(FrozenModel(nn.Sequential(nn.Linear(64, 4))), AdapterSpec(rank=16))


@pytest.mark.parametrize(
    "values",
    [{"rank": 0}, {"rank": -3}, {"rank": 2.5}, {"alpha": 0.0}, {"alpha": float("nan")}, {"dropout": 1.0},
     {"dropout": -0.1}, {"scale_rule": "alpha"}, {"rank_pattern": {"q": 0}}, {"rank_pattern": {"(": 2}}],
)  # fmt: skip
def test_a_spec_out_of_range_is_refused(values: dict) -> None:
    with pytest.raises(SpecError):
        AdapterSpec(**values)


def test_scales() -> None:
    spec = AdapterSpec(rank=8, alpha=16, rank_pattern={"q_proj": 4}, alpha_pattern={r"layers\.1\..*": 8})
    assert spec.scale("model.layers.0.k_proj") == 2.0
    assert spec.scale("model.layers.0.q_proj") == 4.0
    assert spec.scale("model.layers.1.q_proj") == 2.0
    assert AdapterSpec(rank=16, alpha=16, scale_rule="alpha/sqrt(rank)").scale("x") == 4.0


def test_patterns_follow_pefts_rule() -> None:
    assert match_pattern({"proj": 1}, "a.q_proj") is None
    assert match_pattern({".*proj": 1}, "a.q_proj") == 1
    assert match_pattern({"a.q_proj": 1, "q_proj": 2}, "a.q_proj") == 1


def test_layers_are_numbered_by_the_first_number() -> None:
    assert layer_of("model.layers.3.mlp.experts.5.up_proj") == 3
    assert layer_of("lm_head") is None


def test_the_initial_factors_have_the_published_spread(llama: FrozenModel) -> None:
    base = FrozenModel(nn.Sequential(nn.Linear(400, 300)))
    factors = Adapter.new(base, AdapterSpec(rank=50, sites=("0",)), seed=4).factors["0"].tensors
    assert not factors["b"].any()
    assert factors["a"].abs().max() <= 400**-0.5
    assert factors["a"].var().item() == pytest.approx(1 / (3 * 400), rel=0.05)
    again = Adapter.new(base, AdapterSpec(rank=50, sites=("0",)), seed=4).factors["0"].tensors
    other = Adapter.new(base, AdapterSpec(rank=50, sites=("0",)), seed=5).factors["0"].tensors
    assert factors["a"].equal(again["a"])
    assert not factors["a"].equal(other["a"])


def trained_per_layer(config: LlamaConfig, rank: int) -> int:
    """Parameters of rank-`rank` factors on q and v of the first layer; the weights take no memory."""
    import torch

    with torch.device("meta"):
        sites = FrozenModel(AutoModelForCausalLM.from_config(config)).sites
    method = METHODS.get("lora")
    shapes = [
        shape
        for name in ("q_proj", "v_proj")
        for shape in method.stack_shapes(sites[f"model.layers.0.self_attn.{name}"], rank).values()
    ]
    return sum(rows * columns for rows, columns in shapes)


def test_published_parameter_counts() -> None:
    """On q and v: GPT-3 175B with rank 4, 96 layers of width 12288; Llama-3.2-3B with rank 32, 28 layers."""
    shared = {"vocab_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 128}
    gpt3 = LlamaConfig(hidden_size=12288, num_attention_heads=96, num_key_value_heads=96, **shared)
    llama = LlamaConfig(hidden_size=3072, num_attention_heads=24, num_key_value_heads=8, **shared)
    assert 96 * trained_per_layer(gpt3, rank=4) == 18_874_368
    assert 28 * trained_per_layer(llama, rank=32) == 9_175_040
