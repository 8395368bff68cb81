"""Four-bit weights under the names that bitsandbytes saves and loads, as in checkpoints on the hub.

A weight `q_proj.weight` is the codes under its own name, and beside it `.absmax`, `.quant_map`, with double
quantisation `.nested_absmax` and `.nested_quant_map`, and `.quant_state.bitsandbytes__nf4`: the rest as JSON, in bytes.

Source: bitsandbytes 0.50, `QuantState.as_dict(packed=True)`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from manylora.errors import BaseBroken
from manylora.quant.four_bit import FourBit, FourBitFormat

STATE = "quant_state.bitsandbytes__"
FORMATS = ("nf4", "fp4")
TENSORS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def packed_weights(names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The weights of a checkpoint that bitsandbytes packed: the name of each, and of all its tensors, itself first."""
    held = set(names)
    weights = {}
    for name in names:
        weight, mark, format_name = name.rpartition(f".{STATE}")
        if mark and format_name in FORMATS:
            own = (weight, *(f"{weight}.{tensor}" for tensor in TENSORS), name)
            weights[weight] = tuple(tensor for tensor in own if tensor in held)
    return weights


def to_bitsandbytes(packed: FourBit, name: str = "weight") -> dict[str, Tensor]:
    """The tensors that bitsandbytes saves for this weight, by name; their bytes are its own."""
    tensors = packed.tensors()
    state: dict[str, Any] = {
        "quant_type": packed.format,
        "blocksize": packed.block,
        "dtype": packed.settings()["dtype"],
        "shape": packed.shape,
    }
    if packed.nested is not None:
        settings = packed.settings()
        state |= {
            "nested_blocksize": settings["nested_block"],
            "nested_dtype": "float32",
            "nested_offset": settings["nested_offset"],
        }
    codes = tensors.pop("codes").view(-1, 1)
    saved = {name: codes, **{f"{name}.{short}": tensor for short, tensor in tensors.items()}}
    text = json.dumps(state).encode()
    saved[f"{name}.{STATE}{packed.format}"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return saved


def from_bitsandbytes(tensors: Mapping[str, Tensor], name: str = "weight") -> FourBit:
    """A weight that bitsandbytes packed, from a checkpoint's tensors; others among them are left alone.

    Raises:
        BaseBroken: its state or a tensor is missing, or does not fit the state.
    """
    states = [format_name for format_name in FORMATS if f"{name}.{STATE}{format_name}" in tensors]
    if len(states) != 1 or name not in tensors:
        raise BaseBroken(
            f"{name!r} is no weight that bitsandbytes packed in four bits",
            allowed=f"{name} beside {name}.{STATE}nf4 or {name}.{STATE}fp4",
        )
    state = _state(tensors[f"{name}.{STATE}{states[0]}"], name)
    found = {short: tensors[f"{name}.{short}"] for short in TENSORS if f"{name}.{short}" in tensors}
    # Codes may be saved under a wider dtype (`bnb_4bit_quant_storage`); the bytes are the same.
    found["codes"] = tensors[name].detach().contiguous().view(torch.uint8).view(-1)
    settings = {
        "format": state.pop("quant_type", None),
        "shape": state.pop("shape", None),
        "block": state.pop("blocksize", None),
        "dtype": state.pop("dtype", None),
        "double_quant": "nested_absmax" in found,
    }
    if settings["double_quant"]:
        if state.pop("nested_dtype", "float32") != "float32":
            raise BaseBroken(f"the scales of {name!r} were not float32 before they were quantised")
        settings |= {
            "nested_block": state.pop("nested_blocksize", None),
            "nested_offset": state.pop("nested_offset", None),
        }
    if state:
        raise BaseBroken(f"the quant_state of {name!r} holds what is not known here: {', '.join(state)}")
    return FourBitFormat(states[0]).from_tensors(found, settings)


def _state(tensor: Tensor, name: str) -> dict[str, Any]:
    try:
        state = json.loads(bytes(tensor.cpu().tolist()))
    except ValueError as error:
        raise BaseBroken(f"the quant_state of {name!r} is not JSON: {error}") from error
    if not isinstance(state, dict):
        raise BaseBroken(f"the quant_state of {name!r} is {state!r}", allowed="a JSON object")
    return state
