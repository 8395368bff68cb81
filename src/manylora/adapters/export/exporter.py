"""What writes an adapter for another engine, and what the engines have in common."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from manylora.adapters.adapter import Adapter
from manylora.errors import AdapterBroken, BaseMismatch


class Exporter(Protocol):
    """`needs_config`: whether it reads the base's configuration (config.json)."""

    needs_config: bool

    def write(self, adapter: Adapter, folder: Path, config: Mapping[str, Any] | None) -> tuple[str, ...]:
        """Fill an empty folder; lines that say what was written."""
        ...


def low_rank_factors(adapter: Adapter, engine: str) -> dict[str, tuple[Tensor, Tensor, float]]:
    """a (R, I), b (O, R) and the scale of every site of an adapter that is all low-rank.

    Raises:
        AdapterBroken: a site is a whole copy, which this engine's file has no place for.
    """
    found = {}
    for name, own in adapter.factors.items():
        if own.method != "lora":
            raise AdapterBroken(
                f"{name!r} is a whole copy, which an adapter of {engine} has no place for",
                allowed="low-rank sites",
                next_step="merge it instead: manylora merge ADAPTER --into bf16 --output DIR",
            )
        found[name] = own.tensors["a"].float(), own.tensors["b"].float(), adapter.spec.scale(name)
    return found


def needed(config: Mapping[str, Any] | None, engine: str) -> Mapping[str, Any]:
    """The base's configuration.

    Raises:
        BaseMismatch: there is none.
    """
    if config is None:
        raise BaseMismatch(
            f"the names in a file of {engine} depend on the base, and it is not known which that is",
            next_step="give it: --base builtin:tiny-en, a folder, or a hub id",
        )
    return config


def is_tied(config: Mapping[str, Any] | None) -> bool:
    """Whether the base's head is its embedding; so where nothing says that it is not."""
    if config is None:
        return True
    inner = config.get("text_config")
    return bool(config.get("tie_word_embeddings", (inner or {}).get("tie_word_embeddings", True)))
