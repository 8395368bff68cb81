"""llama.cpp's adapter file (GGUF), written through the `gguf` package.

Source: llama.cpp, `convert_lora_to_gguf.py` and `convert_hf_to_gguf.py`; llama.cpp scales by alpha / rank, the
rank read from each lora_b.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manylora.adapters.adapter import Adapter
from manylora.adapters.export.exporter import is_tied, low_rank_factors, needed
from manylora.errors import AdapterBroken, BaseMismatch, ConfigError, nearest_names

FILE = "adapter.gguf"


@dataclass(frozen=True, slots=True)
class _Architecture:
    """llama.cpp's name, and whether its converter reorders the rows of q and k for its rotary embedding."""

    name: str
    permutes: bool = False


# Only architectures whose converter leaves linear weights as they are, or reorders q and k as `permuted` does.
ARCHITECTURES = {
    "LlamaForCausalLM": _Architecture("LLAMA", permutes=True),
    "MistralForCausalLM": _Architecture("LLAMA", permutes=True),
    "Qwen2ForCausalLM": _Architecture("QWEN2"),
    "Qwen3ForCausalLM": _Architecture("QWEN3"),
    "GemmaForCausalLM": _Architecture("GEMMA"),
    "Gemma2ForCausalLM": _Architecture("GEMMA2"),
    "Gemma3ForCausalLM": _Architecture("GEMMA3"),
    "PhiForCausalLM": _Architecture("PHI2"),
    "Phi3ForCausalLM": _Architecture("PHI3"),
    "Starcoder2ForCausalLM": _Architecture("STARCODER2"),
    "GPT2LMHeadModel": _Architecture("GPT2"),
}


class Gguf:
    needs_config = True

    def write(self, adapter: Adapter, folder: Path, config: Mapping[str, Any] | None) -> tuple[str, ...]:
        gguf = _package()
        config = needed(config, "llama.cpp")
        architecture = _architecture(config)
        factors = low_rank_factors(adapter.plain(), "llama.cpp")
        kind = getattr(gguf.MODEL_ARCH, architecture.name)
        names = gguf.get_tensor_name_map(kind, int(_setting(config, "num_hidden_layers", "n_layer")))
        alpha = _alpha(factors)
        writer = gguf.GGUFWriter(folder / FILE, gguf.MODEL_ARCH_NAMES[kind])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        if adapter.base_name:
            writer.add_name(f"adapter of {adapter.base_name}")
        for site, (a, b, scale) in factors.items():
            name = _name(site, adapter, names, config)
            heads = _heads(site, config) if architecture.permutes else None
            lora_b = permuted(b, heads) if heads else b
            writer.add_tensor(f"{name}.lora_a", a.contiguous().numpy())
            writer.add_tensor(f"{name}.lora_b", (lora_b * (scale * a.shape[0] / alpha)).contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return (f"{FILE}: {len(factors)} sites for {gguf.MODEL_ARCH_NAMES[kind]}, float32, alpha {alpha:g}",)


def permuted(b: Tensor, num_heads: int) -> Tensor:
    """Rows of B in llama.cpp's order: within each head the two halves, which Hugging Face keeps apart, alternate."""
    half = b.shape[0] // num_heads // 2
    return b.reshape(num_heads, 2, half, b.shape[1]).transpose(1, 2).reshape(b.shape)


def _package() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ConfigError(
            "writing GGUF needs the package 'gguf', which is not installed", next_step="pip install gguf"
        ) from error


def _architecture(config: Mapping[str, Any]) -> _Architecture:
    name = (config.get("architectures") or ["a model that its config.json does not name"])[0]
    if name not in ARCHITECTURES:
        raise ConfigError(
            f"a GGUF adapter of {name} is not written here: llama.cpp may reorder its weights",
            nearest=nearest_names(name, ARCHITECTURES),
            allowed=", ".join(ARCHITECTURES),
            next_step="export --to peft, then llama.cpp's own convert_lora_to_gguf.py",
        )
    return ARCHITECTURES[name]


def _alpha(factors: Mapping[str, tuple[Tensor, Tensor, float]]) -> float:
    """The alpha that most sites have, so that their B is written as it is."""
    found = [scale * a.shape[0] for a, _, scale in factors.values()]
    return torch.tensor(max(found, key=found.count), dtype=torch.float32).item()


def _name(site: str, adapter: Adapter, names: Any, config: Mapping[str, Any]) -> str:
    """llama.cpp's name of a site's weight.

    Raises:
        AdapterBroken: an embedding, or a head that llama.cpp takes from the embedding. BaseMismatch: no such tensor.
    """
    step = "merge it instead: manylora merge ADAPTER --into bf16 --output DIR"
    if adapter.kinds.get(site) == "embedding":
        raise AdapterBroken(f"{site!r} is an embedding, which llama.cpp does not adapt", next_step=step)
    found = names.get_name(f"{site}.weight", try_suffixes=(".weight", ".bias"))
    if found is None:
        raise BaseMismatch(f"llama.cpp has no name for the site {site!r} of {config['architectures'][0]}")
    if found == "output.weight" and is_tied(config):
        raise AdapterBroken(
            f"{site!r} is a head that shares the embedding's weight, which llama.cpp does not adapt", next_step=step
        )
    return str(found)


def _heads(site: str, config: Mapping[str, Any]) -> int | None:
    """The heads by which the rows of q and k are reordered; None: they are not."""
    heads = int(_setting(config, "num_attention_heads"))
    if site.endswith(".q_proj"):
        return heads
    return int(config.get("num_key_value_heads") or heads) if site.endswith(".k_proj") else None


def _setting(config: Mapping[str, Any], *keys: str) -> Any:
    inner = config.get("text_config") or {}
    for key in keys:
        for part in (config, inner):
            if part.get(key) is not None:
                return part[key]
    raise BaseMismatch(f"the base's config.json has no {' or '.join(keys)}")


GGUF = Gguf()
