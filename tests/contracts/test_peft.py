"""An adapter folder opens in PEFT with the same logits, and PEFT's folders open here.

Every model is a tiny one with random weights; every factor is random and large enough to change the logits by much.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.base.frozen import FrozenModel
from manylora.errors import AdapterBroken, BaseMismatch
from manylora.spec import AdapterSpec
from manylora.types import Factors

TOLERANCE = 1e-4
ROWS = 3

# A warning of PEFT about keys that it misses, or does not know, still fails a test.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
    pytest.mark.filterwarnings(r"ignore:Adapter 'default'. \d+ LoRA tensor.s. have invalid shape.*lora_B\.bias"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]


def llama(*, tied: bool = False) -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> torch.nn.Module:
    config = transformers.GPT2Config(
        vocab_size=61, n_embd=32, n_layer=2, n_head=2, n_positions=32, initializer_range=0.2
    )
    return transformers.GPT2LMHeadModel(config)


def bert() -> torch.nn.Module:
    config = transformers.BertConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=32, num_labels=3, initializer_range=0.2,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


MODELS = {
    "llama": llama,
    "llama-tied": lambda: llama(tied=True),
    "gpt2": gpt2,
    "bert": bert,
}


def make(name: str) -> torch.nn.Module:
    torch.manual_seed(7)
    return MODELS[name]().eval()


def frozen(module: torch.nn.Module) -> FrozenModel:
    return FrozenModel(module, name="tiny", head=module.get_output_embeddings())


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return {"input_ids": torch.randint(0, 61, (ROWS, 9), generator=generator)}


def plain_logits(module: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module(**inputs()).logits


def our_logits(base: FrozenModel, adapter: Adapter) -> torch.Tensor:
    with Bank(base) as bank:
        bank.put(adapter, slot=0)
        with bank.route((0,) * ROWS):
            return plain_logits(base.model)


def filled(adapter: Adapter, seed: int = 3) -> Adapter:
    """The same adapter with random factors, whole copies moved away from the base."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, own in adapter.factors.items():
        noise = {key: 0.2 * torch.randn(value.shape, generator=generator) for key, value in own.tensors.items()}
        moved = noise if own.method == "full" else {"magnitude"} & set(noise)  # these do not start at zero
        noise |= {key: own.tensors[key] + noise[key] for key in moved}
        factors[name] = Factors(own.method, noise)
    return replace(adapter, factors=factors)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


def assert_same(one: torch.Tensor, other: torch.Tensor, bare: torch.Tensor) -> None:
    found = difference(one, other)
    print(f"max logit difference {found:.2e}, the adapter changes logits by {difference(one, bare):.2f}")
    assert found < TOLERANCE
    assert difference(one, bare) > 0.05, "an adapter that changes nothing proves nothing"


OURS = {
    "all-linear": ("llama", AdapterSpec(rank=4, alpha=8)),
    "tied base": ("llama-tied", AdapterSpec(rank=4, alpha=8)),
    "rank and alpha patterns": (
        "llama",
        AdapterSpec(
            rank=4,
            alpha=8,
            rank_pattern={"q_proj": 7, r"layers\.0\.mlp\..*": 2, "v_proj": 1},
            alpha_pattern={r"layers\.1\.self_attn\.q_proj": 3.5, "q_proj": 20},
        ),
    ),
    "the first pattern wins": (
        "llama",
        AdapterSpec(rank=4, alpha=8, rank_pattern={r"self_attn\.q_proj": 5, "q_proj": 2, r"layers\.0\..*": 3}),
    ),
    "rank stabilised": (
        "llama",
        AdapterSpec(rank=9, alpha=8, scale_rule="alpha/sqrt(rank)", rank_pattern={"q_proj": 4}),
    ),
    "capped ranks": ("llama", AdapterSpec(rank=24, alpha=8)),
    "embedding": ("llama", AdapterSpec(rank=4, alpha=8, sites=("embed_tokens", "q_proj"))),
    "embedding of a tied base": ("llama-tied", AdapterSpec(rank=4, alpha=8, sites=("embed_tokens", "q_proj"))),
    "head as a low-rank site": ("llama", AdapterSpec(rank=4, alpha=8, sites=("lm_head",))),
    "full head": ("llama", AdapterSpec(rank=4, alpha=8, full_sites=("lm_head",))),
    "full norms": ("llama", AdapterSpec(rank=4, alpha=8, full_sites=("*norm",))),
    "one copy of a tied pair": (
        "llama-tied",
        AdapterSpec(rank=4, alpha=8, full_sites=("embed_tokens", "lm_head")),
    ),
    "head alone of a tied pair": ("llama-tied", AdapterSpec(rank=4, alpha=8, full_sites=("lm_head",))),
    "only a full head": ("llama", AdapterSpec(sites=(), full_sites=("lm_head",))),
    "everything full": ("llama", AdapterSpec(method="full", sites=("everything",))),
    "everything full, tied": ("llama-tied", AdapterSpec(method="full", sites=("everything",))),
    "conv1d": ("gpt2", AdapterSpec(rank=4, alpha=8)),
    "conv1d and embeddings": ("gpt2", AdapterSpec(rank=4, alpha=8, sites=("all-linear", "wte", "wpe"))),
    "conv1d full": ("gpt2", AdapterSpec(method="full", sites=("everything",))),
    "dora": ("llama", AdapterSpec(method="dora", rank=4, alpha=8)),
    "dora with patterns and a full head": (
        "llama",
        AdapterSpec(method="dora", rank=4, alpha=8, rank_pattern={"q_proj": 7}, full_sites=("lm_head", "*norm")),
    ),
    "dora of a model with biases": ("bert", AdapterSpec(method="dora", rank=4, alpha=8, exclude=("classifier",))),
    "dora of conv1d": ("gpt2", AdapterSpec(method="dora", rank=4, alpha=8, scale_rule="alpha/sqrt(rank)")),
    "a bias of b": ("bert", AdapterSpec(method="lora-bias", rank=4, alpha=8, exclude=("classifier",))),
    "a bias of b, of conv1d": ("gpt2", AdapterSpec(method="lora-bias", rank=4, alpha=6, full_sites=("ln_f",))),
    "own biases": ("bert", AdapterSpec(method="lora-own-bias", rank=4, alpha=8, exclude=("classifier",))),
    "own biases where there are none": (
        "llama",
        AdapterSpec(method="lora-own-bias", rank=4, alpha=8, rank_pattern={"q_proj": 7}),
    ),
    "classifier": ("bert", AdapterSpec(rank=4, alpha=8, full_sites=("classifier",))),
    "a classifier that stays frozen": ("bert", AdapterSpec(rank=4, alpha=8, exclude=("classifier",))),
    "encoder full": ("bert", AdapterSpec(method="full", sites=("everything",))),
}


@pytest.mark.parametrize("case", OURS)
def test_our_adapter_opens_in_peft_with_the_same_logits(case, tmp_path):
    model, spec = OURS[case]
    module = make(model)
    theirs = copy.deepcopy(module)
    bare = plain_logits(module)
    base = frozen(module)
    adapter = filled(Adapter.new(base, spec))
    expected = our_logits(base, adapter)

    folder = adapter.save(tmp_path / "adapter", base)
    opened = peft.PeftModel.from_pretrained(theirs, folder).eval()

    assert_same(expected, plain_logits(opened), bare)
    again = Adapter.load(folder)
    assert torch.equal(our_logits(base, again), expected)


@pytest.mark.parametrize("case", OURS)
def test_saving_and_loading_gives_the_same_adapter_to_the_bit(case, tmp_path):
    model, spec = OURS[case]
    base = frozen(make(model))
    adapter = filled(Adapter.new(base, spec))

    again = Adapter.load(adapter.save(tmp_path / "one", base))

    assert again.spec == replace(adapter.spec, method=again.spec.method, init="default")
    assert list(again.factors) == list(adapter.factors)
    for name, own in adapter.factors.items():
        assert again.factors[name].method == own.method
        assert all(torch.equal(value, again.factors[name].tensors[key]) for key, value in own.tensors.items())
    assert (again.base_name, again.base_fingerprint) == ("tiny", base.fingerprint)
    assert (again.kinds, again.tied, again.task_type) == (adapter.kinds, adapter.tied, adapter.task_type)
    once, twice = tmp_path / "one", again.save(tmp_path / "two", base)
    for path in sorted(once.iterdir()):
        assert path.read_bytes() == (twice / path.name).read_bytes(), path.name
    # The base is not needed to write what PEFT opens; it only adds the receipt's tokenizer and the tokenizer's files.
    bare = adapter.save(tmp_path / "without a base")
    assert (bare / "adapter_model.safetensors").read_bytes() == (once / "adapter_model.safetensors").read_bytes()
    assert (bare / "adapter_config.json").read_bytes() == (once / "adapter_config.json").read_bytes()


LLAMA_Q = r"model\.layers\.\d+\.self_attn\.(q|v)_proj"
THEIRS = {
    "list": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "regular expression": ("llama", {"target_modules": LLAMA_Q}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "defaults of the architecture": ("llama", {}),
    "rslora": ("llama", {"target_modules": "all-linear", "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 7, r"layers\.0\.mlp\.up_proj": 2},
            "alpha_pattern": {"q_proj": 3, r"^model\.layers\.1\.mlp\.up_proj": 31},
        },
    ),
    "patterns with rslora": (
        "llama",
        {
            "target_modules": "all-linear",
            "use_rslora": True,
            "rank_pattern": {"q_proj": 7},
            "alpha_pattern": {"k_proj": 3},
        },
    ),
    "modules to save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "both of a tied pair": (
        "llama-tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "layers to transform": ("llama", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}),
    "excluded": ("llama", {"target_modules": "all-linear", "exclude_modules": ["q_proj"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding of a tied base": ("llama-tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "conv1d and embeddings": ("gpt2", {"target_modules": ["c_attn", "c_fc", "wte", "wpe"]}),
    "conv1d all-linear": ("gpt2", {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "dora": ("llama", {"target_modules": "all-linear", "use_dora": True}),
    "dora, patterns, rslora, copies": (
        "llama",
        {
            "target_modules": ["q_proj", "down_proj"],
            "use_dora": True,
            "use_rslora": True,
            "rank_pattern": {"q_proj": 7},
            "modules_to_save": ["lm_head"],
        },
    ),
    "dora of conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "dora of a classifier": ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS", "use_dora": True}),
    "lora_bias": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "lora_bias": True}),
    "lora_bias of a classifier": (
        "bert",
        {"target_modules": ["query", "dense"], "lora_bias": True, "modules_to_save": ["classifier"]},
    ),
    "bias: lora_only": ("gpt2", {"target_modules": "all-linear", "bias": "lora_only"}),
    "bias: lora_only, rslora, copies": (
        "bert",
        {
            "target_modules": ["query", "dense"],
            "bias": "lora_only",
            "use_rslora": True,
            "modules_to_save": ["classifier"],
        },
    ),
    "bias: lora_only without biases": ("llama", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "classifier": ("bert", {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}),
    "sequence classification": ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
}


def made_by_peft(module: torch.nn.Module, settings: dict, folder) -> torch.Tensor:
    """An adapter made and saved by PEFT, each of its tensors random; the logits that PEFT computes with it."""
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **settings)
    wrapped = peft.get_peft_model(module, config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                noise = 0.2 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(parameter + noise if "magnitude" in name else noise)
            elif parameter.requires_grad:  # trained copies, and biases that are trained in place
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(folder)
    return plain_logits(wrapped)


@pytest.mark.parametrize("case", THEIRS)
def test_an_adapter_made_by_peft_gives_the_same_logits_here(case, tmp_path):
    model, settings = THEIRS[case]
    module = make(model)
    expected = made_by_peft(copy.deepcopy(module), settings, tmp_path / "peft")
    bare = plain_logits(module)
    base = frozen(module)

    adapter = Adapter.load(tmp_path / "peft")

    assert_same(our_logits(base, adapter), expected, bare)
    # Saved again from here, PEFT still reads the same.
    adapter.save(tmp_path / "ours", base)
    opened = peft.PeftModel.from_pretrained(make(model), tmp_path / "ours").eval()
    assert_same(plain_logits(opened), expected, bare)


def test_an_embedding_of_another_base_beside_the_factors_is_refused(tmp_path):
    module = make("llama")
    made_by_peft(copy.deepcopy(module), {"target_modules": ["embed_tokens"]}, tmp_path / "peft")
    adapter = Adapter.load(tmp_path / "peft")
    assert adapter.base_fingerprint is None
    with torch.no_grad():
        module.model.embed_tokens.weight.mul_(1.1)
    with Bank(frozen(module)) as bank, pytest.raises(BaseMismatch, match=r"embed_tokens\.weight"):
        bank.put(adapter, slot=0)


def test_the_copy_of_the_embedding_is_recognised_by_a_bfloat16_base(tmp_path):
    module = make("llama")
    made_by_peft(copy.deepcopy(module), {"target_modules": ["embed_tokens"]}, tmp_path / "peft")
    with Bank(frozen(module.to(torch.bfloat16))) as bank:
        bank.put(Adapter.load(tmp_path / "peft"), slot=0)


UNSUPPORTED_BY_PEFT_MADE = {
    "bias": ({"target_modules": ["q_proj"], "bias": "all"}, "bias to 'all'"),
    "trainable_token_indices": (
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
        r"trainable_token_indices to \[1, 2\]",
    ),
}


@pytest.mark.parametrize("setting", UNSUPPORTED_BY_PEFT_MADE)
def test_what_peft_computes_and_we_do_not_is_refused_by_name(setting, tmp_path):
    settings, message = UNSUPPORTED_BY_PEFT_MADE[setting]
    made_by_peft(make("llama"), settings, tmp_path / "peft")
    with pytest.raises(AdapterBroken, match=message):
        Adapter.load(tmp_path / "peft")


def test_another_kind_of_peft_adapter_is_refused_by_name(tmp_path):
    config = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    peft.get_peft_model(make("llama"), config).save_pretrained(tmp_path / "ia3")
    with pytest.raises(AdapterBroken, match="peft_type 'IA3'"):
        Adapter.load(tmp_path / "ia3")


def test_a_named_adapter_of_peft_is_found_in_its_own_folder(tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj"])
    peft.get_peft_model(make("llama"), config, adapter_name="french").save_pretrained(tmp_path / "many")
    with pytest.raises(AdapterBroken, match="french"):
        Adapter.load(tmp_path / "many")
    assert Adapter.load(tmp_path / "many" / "french").spec.rank == 8


@pytest.mark.parametrize("lost", ["v_proj", "layers.1."])
def test_an_adapter_that_lost_tensors_is_refused_on_its_base(lost, tmp_path):
    module = make("llama")
    made_by_peft(copy.deepcopy(module), {"target_modules": ["q_proj", "v_proj"]}, tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_model.safetensors"
    kept = {name: value for name, value in load_file(path).items() if lost not in name}
    save_file(kept, path)
    adapter = Adapter.load(tmp_path / "peft")
    with Bank(frozen(module)) as bank, pytest.raises(AdapterBroken, match=r"holds no factors for 2 of them, the first"):
        bank.put(adapter, slot=0)
