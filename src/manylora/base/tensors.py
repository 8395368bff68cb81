"""Tensors of safetensors files, read one at a time into memory of their own: nothing is mapped, nothing is kept."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from manylora.base.fingerprint import read_header
from manylora.errors import BaseBroken

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Place:
    path: Path
    start: int
    num_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorFiles:
    """The tensors of some safetensors files by name; a mapped file would count as the process's own memory."""

    def __init__(self, files: Sequence[Path]):
        self._places: dict[str, _Place] = {}
        for path in files:
            header, start = read_header(path)
            for name, entry in header.items():
                if name in self._places:
                    raise BaseBroken(f"{name!r} is in {path.name} and in {self._places[name].path.name}")
                if entry["dtype"] not in DTYPES:
                    raise BaseBroken(f"{name!r} has the dtype {entry['dtype']}", allowed=", ".join(DTYPES))
                begin, end = entry["data_offsets"]
                shape = tuple(entry["shape"])
                self._places[name] = _Place(path, start + begin, end - begin, DTYPES[entry["dtype"]], shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._places[name].dtype

    def num_bytes(self, name: str) -> int:
        return self._places[name].num_bytes

    def read(self, name: str) -> Tensor:
        """One tensor, in the dtype of the file."""
        place = self._places[name]
        raw = torch.empty(place.num_bytes, dtype=torch.uint8)
        if place.num_bytes:
            view = memoryview(raw.numpy().data)
            with place.path.open("rb", buffering=0) as file:
                file.seek(place.start)
                done = 0
                while done < place.num_bytes:
                    count = file.readinto(view[done:])
                    if not count:
                        raise BaseBroken(f"{place.path} ended while {name!r} was read")
                    done += count
        return raw.view(place.dtype).view(place.shape)


def give_back_memory() -> None:
    """Hand freed memory back to the system, where the C library can.

    glibc keeps what lies between live blocks: packed weights among freed dense ones hold several times their own size.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
