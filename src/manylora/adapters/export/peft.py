"""PEFT's folder in its plainest form: the scale inside B, alpha equal to the rank, no start that moves the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from manylora.adapters.adapter import Adapter
from manylora.adapters.peft.store import fold_scale, save_adapter


class Peft:
    needs_config = False

    def write(self, adapter: Adapter, folder: Path, config: Mapping[str, Any] | None) -> tuple[str, ...]:
        plain = fold_scale(adapter.plain())
        save_adapter(replace(plain, spec=replace(plain.spec, init="default")), folder)
        return (f"{len(plain.factors)} sites, scale 1 at each: alpha is the rank",)


PEFT = Peft()
