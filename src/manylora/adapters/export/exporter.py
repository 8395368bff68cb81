"""What writes an adapter for another engine, and what the engines have in common."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from manylora.adapters.adapter import Adapter
from manylora.errors import AdapterBroken, BaseMismatch
from manylora.methods import METHODS


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
        method = METHODS.get(own.method)
        if not method.low_rank or any(tensor.dim() != 2 for tensor in own.tensors.values()):
            what = "a whole copy" if not method.factored else f"of the method {own.method} on a {adapter.kind_at(name)}"
            raise AdapterBroken(
                f"{name!r} is {what}, which an adapter of {engine} has no place for",
                allowed="low-rank sites",
                next_step="merge it instead: manylora merge ADAPTER --into bf16 --output DIR",
            )
        a, b = method.product(own)
        found[name] = a.float(), b.float(), adapter.spec.scale(name)
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
