"""mlx-lm's adapter folder: factors transposed, one rank and one scale for all sites.

Source: mlx-lm, `tuner/utils.py: load_adapters` and `tuner/lora.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from manylora.adapters.adapter import Adapter
from manylora.adapters.export.exporter import is_tied, low_rank_factors
from manylora.errors import AdapterBroken

ALL_LAYERS = -1
"""mlx-lm adapts the last `num_layers`; below zero it takes all. A layer that the file has nothing for starts with
lora_b at zero there, so it is left as it was."""


class Mlx:
    """Semantics: `y = W x + scale * (x lora_a) lora_b`, lora_a (I, R), lora_b (R, O)."""

    needs_config = True

    def write(self, adapter: Adapter, folder: Path, config: Mapping[str, Any] | None) -> tuple[str, ...]:
        factors = low_rank_factors(adapter.plain(), "MLX")
        embeddings = [name for name, kind in adapter.kinds.items() if kind == "embedding"]
        if embeddings and is_tied(config):
            raise AdapterBroken(
                f"{embeddings[0]!r} is an embedding that this base uses as its head too, and MLX would adapt both",
                next_step="merge it instead: manylora merge ADAPTER --into bf16 --output DIR",
            )
        rank = max(a.shape[0] for a, _, _ in factors.values())
        scales = {scale for _, _, scale in factors.values()}
        # One number for all sites: what differs from it goes into lora_b. Ranks of zeros change nothing.
        common = scales.pop() if len(scales) == 1 else 1.0
        tensors: dict[str, torch.Tensor] = {}
        for name, (a, b, scale) in factors.items():
            lora_a, lora_b = a.new_zeros(a.shape[1], rank), b.new_zeros(rank, b.shape[0])
            lora_a[:, : a.shape[0]] = a.t()
            lora_b[: b.shape[1]] = b.t() * (scale / common)
            tensors |= {f"{name}.lora_a": lora_a, f"{name}.lora_b": lora_b}
        settings = {
            "fine_tune_type": "lora",
            "num_layers": ALL_LAYERS,
            "lora_parameters": {
                "rank": rank,
                "scale": common,
                "dropout": 0.0,
                "keys": list(dict.fromkeys(map(_key, factors))),
            },
        }
        save_file(tensors, folder / "adapters.safetensors", metadata={"format": "mlx"})
        (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return (f"{len(factors)} sites, rank {rank}, scale {common:g}",)


def _key(name: str) -> str:
    """How mlx-lm names a module to adapt: within its layer, or from the model's root where it is in no layer."""
    found = re.match(r".*?\.\d+\.(?P<inner>.+)", name)
    return found["inner"] if found else name


MLX = Mlx()
