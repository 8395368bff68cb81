"""Small random bases and examples for the contracts; no file, no tokenizer, no network."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BloomConfig,
    DistilBertConfig,
    ElectraConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    ModernBertConfig,
    OPTConfig,
    Qwen3Config,
    RobertaConfig,
)

from manylora.base.language import LanguageBase
from manylora.data.example import Example

WINDOW = 6
ENCODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**ENCODER, "num_key_value_heads": 2}

CONFIGS = {
    "llama": lambda **more: LlamaConfig(**DECODER, **more, tie_word_embeddings=True),
    "gpt2": lambda **more: GPT2Config(n_embd=32, n_layer=2, n_head=4, eos_token_id=0, **more),
    "gemma2": lambda **more: Gemma2Config(**DECODER, **more, head_dim=8, final_logit_softcapping=5.0),
    "gemma3": lambda **more: Gemma3TextConfig(
        **DECODER, **more, head_dim=8, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
    ),
    "qwen3": lambda **more: Qwen3Config(**DECODER, **more, head_dim=8),
    "gpt_neox": lambda **more: GPTNeoXConfig(**ENCODER, **more),
    "mixtral": lambda **more: MixtralConfig(**DECODER, **more, num_local_experts=4),
    "opt": lambda initializer_range, **more: OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        init_std=initializer_range, **more,
    ),
    "bloom": lambda max_position_embeddings, **more: BloomConfig(hidden_size=32, n_layer=2, n_head=4, **more),
    "mamba": lambda max_position_embeddings, **more: MambaConfig(
        hidden_size=32, num_hidden_layers=2, state_size=8, **more
    ),
    "lfm2": lambda **more: Lfm2Config(**DECODER, **more, layer_types=["conv", "full_attention"]),
}  # fmt: skip
ENCODERS = {
    "bert": lambda **more: BertConfig(**ENCODER, **more),
    "roberta": lambda **more: RobertaConfig(**ENCODER, **more),  # positions begin at 2
    "electra": lambda **more: ElectraConfig(**ENCODER, **more, embedding_size=16),
    "distilbert": lambda **more: DistilBertConfig(dim=32, hidden_dim=48, n_layers=2, n_heads=4, **more),
    "modernbert": lambda **more: ModernBertConfig(
        **ENCODER, **more, local_attention=2 * WINDOW, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        cls_token_id=1, sep_token_id=2,
    ),
}  # fmt: skip


@pytest.fixture
def make_base() -> Callable[..., LanguageBase]:
    """A random base by name of its architecture; the same weights at every call."""

    def make(
        kind: str = "llama",
        dtype: torch.dtype = torch.float32,
        *,
        vocabulary: int = 97,
        positions: int = 64,
        attention: str | None = None,
    ) -> LanguageBase:
        torch.manual_seed(0)
        config = {**CONFIGS, **ENCODERS}[kind](
            vocab_size=vocabulary, max_position_embeddings=positions, initializer_range=0.2
        )
        auto = AutoModelForMaskedLM if kind in ENCODERS else AutoModelForCausalLM
        model = auto.from_config(config, **({"attn_implementation": attention} if attention else {}))
        return LanguageBase(model.to(dtype), name=f"random {kind}").probed()

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
