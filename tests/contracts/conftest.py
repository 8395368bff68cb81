"""Small random bases and examples for the contracts; no file, no tokenizer, no network."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig

from manylora.base.language import LanguageBase
from manylora.data.examples import Example

CONFIGS = {
    "llama": lambda: LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.2,
    ),
    "gpt2": lambda: GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2),
    "gemma2": lambda: Gemma2Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, final_logit_softcapping=5.0,
    ),
}  # fmt: skip


@pytest.fixture
def make_base() -> Callable[..., LanguageBase]:
    """A random base by name of its architecture; the same weights at every call."""

    def make(kind: str = "llama", dtype: torch.dtype = torch.float32) -> LanguageBase:
        torch.manual_seed(0)
        config = CONFIGS[kind]()
        return LanguageBase(AutoModelForCausalLM.from_config(config).to(dtype), name=f"random {kind}")

    return make


@pytest.fixture
def make_examples() -> Callable[..., list[Example]]:
    """Ragged random examples: a prompt that is not learned, an answer that is."""

    def make(count: int, *, seed: int = 0, longest: int = 20, vocabulary: int = 97) -> list[Example]:
        draw = np.random.default_rng(seed)
        made = []
        for index in range(count):
            length = int(draw.integers(4, longest + 1))
            prompt = int(draw.integers(1, length - 1))
            trained = np.arange(length) >= prompt
            tokens = draw.integers(0, vocabulary, length).astype(np.int32)
            made.append(Example(tokens=tokens, trained=trained, prompt_length=prompt, prompt=f"p{index}",
                                reference=f"r{index}", group=f"p{index}", file="made", line=index + 1))  # fmt: skip
        return made

    return make
