"""The tensor file of a compressed adapter: codes and scales under PEFT's keys, and in its header how to read them.

The file has a name of its own, `adapter_model.quantised.safetensors`, so that a reader that knows nothing of codes
finds no weights and says so; under the usual name it would find codes, and load an adapter that has no tensor at all.
`KEY.codes`, `KEY.step` and so on stand for the tensor that PEFT calls KEY; those of a B are of its transpose. A tensor
without such an ending is stored as it is.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from manylora.adapters.compress.scheme import Part
from manylora.adapters.compress.schemes import SCHEMES
from manylora.errors import AdapterBroken

COMPRESSED_FILE = "adapter_model.quantised.safetensors"
_HEADER = "compression"
_VERSION = 1
_IS_B = re.compile(r".*\.lora_(embedding_)?B(\.weight)?")


def write_coded(
    path: Path,
    scheme: str,
    settings: Mapping[str, Any],
    coded: Mapping[str, tuple[tuple[int, ...], Mapping[str, Tensor]]],
    plain: Mapping[str, Tensor],
) -> None:
    """Write codes by PEFT's key, each with the shape of what they stand for, and tensors that stay as they are."""
    tensors = dict(plain)
    for key, (_, parts) in coded.items():
        tensors |= {f"{key}.{name}": value.contiguous() for name, value in parts.items()}
    shapes = {key: list(shape) for key, (shape, _) in coded.items()}
    header = {"version": _VERSION, "scheme": scheme, "settings": dict(settings), "shapes": shapes}
    # One entry: safetensors writes several in an order that changes, and the same adapter has to give the same bytes.
    save_file(tensors, path, metadata={_HEADER: json.dumps(header, separators=(",", ":"))})


def read_coded(path: Path) -> dict[str, Tensor]:
    """The tensors of the adapter under PEFT's keys, what was coded as the float32 numbers that it stands for.

    Raises:
        AdapterBroken: no description of the codes, or codes that do not fit it.
        SafetensorError: no safetensors file, or a truncated one.
    """
    with safe_open(path, framework="pt") as file:
        header = _header(path, file.metadata())
        stored: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    scheme = SCHEMES.get(header["scheme"])
    found: dict[str, Tensor] = {}
    for key, shape in header["shapes"].items():
        rows, columns = shape[0], math.prod(shape[1:])
        own = {name: stored.pop(name) for name in list(stored) if name.startswith(f"{key}.")}
        parts = {name.removeprefix(f"{key}."): value for name, value in own.items()}
        is_b = _IS_B.fullmatch(key) is not None
        size = (columns, rows) if is_b else (rows, columns)
        values = scheme.decode(Part(f"{key!r} in {path}", *size, parts), header["settings"])
        found[key] = (values.t().contiguous() if is_b else values).view(shape)
    twice = [key for key in stored if key in found]
    if twice:
        raise AdapterBroken(f"{path} holds {twice[0]!r} both coded and plain")
    return found | stored


def _header(path: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    try:
        header = json.loads((metadata or {})[_HEADER])
        known = header["version"] == _VERSION and header["scheme"] in SCHEMES
        whole = isinstance(header["settings"], dict) and all(
            isinstance(size, int) and size > 0
            for shape in header["shapes"].values()
            for size in (*shape, len(shape) - 1)
        )
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise AdapterBroken(
            f"{path} does not say how its codes are to be read ({type(error).__name__}: {error})",
            next_step="it was written by another program, or its header was lost: compress the adapter again",
        ) from error
    if not known:
        raise AdapterBroken(
            f"{path} is compressed as {header['scheme']!r}, version {header['version']!r}",
            allowed=f"{', '.join(SCHEMES)}, version {_VERSION}",
            next_step="a newer manylora may read it",
        )
    if not whole:
        raise AdapterBroken(f"{path} gives settings or shapes that cannot be read")
    return header
