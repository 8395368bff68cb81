"""A two-layer Llama with random weights in float32 and a byte tokenizer, and two random adapters for it."""

from __future__ import annotations

import pytest
import torch

from manylora.adapters.adapter import Adapter
from manylora.base.language import LanguageBase
from manylora.spec import AdapterSpec
from manylora.types import Factors

TEMPLATE = (
    "{% for m in messages %}"
    "{% if loop.first and m.role == 'assistant' %}{{ raise_exception('users speak first') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>")


def byte_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({sign: place for place, sign in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>", chat_template=TEMPLATE
    )


@pytest.fixture
def base() -> LanguageBase:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256 + len(SPECIAL), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=96, initializer_range=0.3, eos_token_id=256, pad_token_id=257,
        bos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    return LanguageBase(LlamaForCausalLM(config), tokenizer=byte_tokenizer(), name="tiny")


def random_adapter(base: LanguageBase, seed: int) -> Adapter:
    """An adapter whose b is not zero, so that it changes what the base says."""
    adapter = Adapter.new(base, AdapterSpec(rank=4, alpha=8.0), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: Factors(f.method, {key: 0.3 * torch.randn(t.shape, generator=generator) for key, t in f.tensors.items()})
        for name, f in adapter.factors.items()
    }
    return Adapter(adapter.spec, factors, adapter.base_name, adapter.base_fingerprint)


@pytest.fixture
def adapters(base: LanguageBase) -> list[Adapter]:
    return [random_adapter(base, 1), random_adapter(base, 2)]


@pytest.fixture
def prompts(base: LanguageBase) -> list[list[int]]:
    texts = ["name : The Eagle", "a", "Once upon a time there was", "food : Chinese | area", "Hi there"]
    return [base.tokenizer.encode(text) for text in texts]
