"""Small random bases of several architectures, ragged batches over them, and the gradients of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    Qwen3Config,
)

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.base.frozen import FrozenModel
from manylora.base.language import LanguageBase
from manylora.data.collate import batch_of
from manylora.data.example import Example
from manylora.objectives.forward import Aim
from manylora.spec import AdapterSpec
from manylora.training.step import backward
from manylora.types import Batch

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2, "max_position_embeddings": 64,
}  # fmt: skip
SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "initializer_range": 0.2}
EAGER: dict[str, Any] = {"attn_implementation": "eager"}
CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": lambda layers, **_: LlamaConfig(**SIZES, num_hidden_layers=layers),
    "llama, eager": lambda layers, **_: LlamaConfig(**SIZES, **EAGER, num_hidden_layers=layers),
    "qwen3": lambda layers, **_: Qwen3Config(**SIZES, num_hidden_layers=layers, head_dim=8),
    "gemma2": lambda layers, **_: Gemma2Config(**SIZES, num_hidden_layers=layers, head_dim=8),
    "gpt2": lambda layers, **_: GPT2Config(**SMALL, n_embd=32, n_layer=layers, n_head=4, eos_token_id=0),
    "mixtral": lambda layers, **_: MixtralConfig(**SIZES, num_hidden_layers=layers, num_local_experts=4),
    "mamba": lambda layers, **_: MambaConfig(**SMALL, hidden_size=32, num_hidden_layers=layers, state_size=8),
}
SPECS = (
    AdapterSpec(rank=2, dropout=0.1),
    AdapterSpec(rank=8, dropout=0.2, full_sites=("re:.*(norm|ln_f|norm_f).*",)),
    AdapterSpec(rank=5, init="olora", dropout=0.1),
)


def language_base(kind: str = "llama", layers: int = 3) -> LanguageBase:
    torch.manual_seed(0)
    dtype = torch.float32 if kind == "mixtral" else torch.float64  # torch has grouped products in no wider one
    return LanguageBase(
        AutoModelForCausalLM.from_config(CONFIGS[kind](layers)).to(dtype), name=f"random {kind}"
    ).probed()


def ragged_batch(base: LanguageBase, slots: tuple[int, ...] = (0, 2, -1, 1, 0), longest: int = 20) -> Batch:
    draw = np.random.default_rng(1)
    rows = []
    for _ in slots:
        lengths = draw.integers(4, longest // 2 + 1, 2 if base.packs else 1).tolist()
        tokens = [draw.integers(1, base.vocabulary, length).astype(np.int32) for length in lengths]
        rows.append([Example(own, np.arange(len(own)) >= 2, 2, "", "", "", "made", 1) for own in tokens])
    return batch_of(rows, base, width=24, slots=slots, streams=range(len(slots)))


def fill(bank: Bank, specs: tuple[AdapterSpec, ...] = SPECS) -> None:
    for slot, spec in enumerate(specs):
        bank.put(Adapter.new(bank.base, spec, seed=slot), slot=slot)
    draw = torch.Generator().manual_seed(3)
    for stack in bank.stacks.values():
        if "b" in stack.tensors:
            with torch.no_grad():
                stack.tensors["b"].add_(0.1 * torch.randn(stack.tensors["b"].shape, generator=draw))


def taken(base: FrozenModel, batch: Batch, objectives: dict[int, Any]) -> dict[str, Tensor]:
    """Gradients of every factor, and the losses."""
    losses = backward(base, {slot: Aim.fresh(one) for slot, one in objectives.items()}, [batch]).losses()
    found = {"losses": torch.tensor([losses[slot] for slot in sorted(losses)])}
    for key, stack in base.bank.stacks.items():
        for name, tensor in stack.tensors.items():
            if tensor.grad is not None:
                found[f"{key} {name}"] = tensor.grad
                tensor.grad = None
    return found
