"""What a model folder says of how its weights are stored: dense, packed here, by bitsandbytes, or by something else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manylora.errors import BaseBroken

METHOD = "manylora"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Stored:
    """`maker` is "manylora", "bitsandbytes" or the name of a foreign method; `format` None: none that is known here."""

    maker: str
    format: str | None
    block: Mapping[str, Any]

    @property
    def readable(self) -> bool:
        """Whether the packed tensors can be taken as they are."""
        return self.format is not None


def stored_format(folder: Path) -> Stored | None:
    """How a folder's weights are packed; None: they are dense.

    Raises:
        BaseBroken: packed by a newer version of this format of folder.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise BaseBroken(f"{folder / 'config.json'} is no JSON: {error}") from error
    block = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(block, dict):
        return None
    maker = str(block.get("quant_method", "bitsandbytes" if "load_in_4bit" in block else "an unnamed method"))
    if maker == METHOD:
        if block.get("version") != VERSION:
            raise BaseBroken(
                f"{folder} is a packed base of version {block.get('version')!r}", allowed=str(VERSION),
                next_step="read it with the manylora that wrote it, or a newer one",
            )  # fmt: skip
        return Stored(METHOD, str(block["format"]), block)
    if maker == "bitsandbytes" and block.get("load_in_4bit"):
        return Stored(maker, str(block.get("bnb_4bit_quant_type", "fp4")), block)
    return Stored(maker, None, block)
