"""Weights that bitsandbytes packed into 4 bits, as transformers saves them; read without bitsandbytes.

A weight `X` is the tensors `X` (codes), `X.absmax`, `X.quant_map`, with double quantisation `X.nested_absmax` and
`X.nested_quant_map`, and `X.quant_state.bitsandbytes__nf4`: the bytes of a JSON object with the rest.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manylora.base.tensors import TensorFiles
from manylora.errors import BaseBroken
from manylora.types import Packed

STATE = ".quant_state.bitsandbytes__"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """One packed weight: its name in the files and its format."""

    files: TensorFiles
    name: str
    format: str

    @property
    def names(self) -> list[str]:
        """The names of all its tensors."""
        own = [self.name, f"{self.name}{STATE}{self.format}", *(f"{self.name}.{part}" for part in PARTS)]
        return [name for name in own if name in self.files]

    def read(self) -> Packed:
        """The packed weight.

        Raises:
            BaseBroken: a tensor is absent, or the state is not what bitsandbytes writes.
        """
        from manylora.quant import from_tensors

        if self.name not in self.files:
            raise BaseBroken(f"{self.name!r} has no codes, only scales", next_step="copy or download the folder again")
        # Any dtype may hold the codes (`bnb_4bit_quant_storage`): they are bytes all the same.
        tensors = {"codes": self.files.read(self.name).reshape(-1).view(torch.uint8)}
        for part in PARTS:
            if f"{self.name}.{part}" in self.files:
                tensors[part] = self.files.read(f"{self.name}.{part}")
        try:
            return from_tensors(tensors, self._settings(tensors))
        except BaseBroken as error:
            raise BaseBroken(
                f"{self.name!r}: {error.what}", nearest=error.nearest, allowed=error.allowed, next_step=error.next_step
            ) from error

    def _settings(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        raw = self.files.read(f"{self.name}{STATE}{self.format}")
        try:
            state = json.loads(bytes(raw.tolist()))
            settings: dict[str, Any] = {
                "format": state["quant_type"],
                "shape": state["shape"],
                "block": state["blocksize"],
                "dtype": state["dtype"],
                "double_quant": "nested_absmax" in tensors,
            }
            if settings["double_quant"]:
                settings |= {"nested_block": state["nested_blocksize"], "nested_offset": state["nested_offset"]}
        except (ValueError, KeyError, TypeError) as error:
            raise BaseBroken(
                f"the state of {self.name!r} is not what bitsandbytes writes: {type(error).__name__}: {error}"
            ) from error
        return settings


def stored_weights(files: TensorFiles) -> dict[str, StoredWeight]:
    """The packed weights of a checkpoint, by their names in it."""
    found: dict[str, StoredWeight] = {}
    for full in files:
        name, sign, kind = full.partition(STATE)
        if sign:
            found[name] = StoredWeight(files, name, kind)
    return found
