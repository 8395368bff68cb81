"""What a scheme is. All of them work on rows: the rows of A, and the columns of B as the rows of its transpose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from manylora.errors import AdapterBroken


class Scheme(Protocol):
    """How the factors of a site are stored in few bits."""

    name: str

    def settings(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """What reading needs beside the tensors, as JSON; `options` are those of the command.

        Raises:
            ConfigError: an option out of range.
        """
        ...

    def encode(self, a: Tensor, b: Tensor, options: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The tensors, by short name, that stand for A (R, I) and for B (O, R), both float32 or wider."""
        ...

    def decode(self, part: Part, settings: Mapping[str, Any]) -> Tensor:
        """The rows that the tensors stand for, float32 (R, n).

        Raises:
            AdapterBroken: a tensor is missing, misshapen or holds what the scheme cannot have written.
        """
        ...


@dataclass(slots=True)
class Part:
    """The stored tensors of one factor, taken one after another: each is checked, and none may be left.

    `rows` and `columns` are those of what they stand for; `name` says whose they are, in messages.
    """

    name: str
    rows: int
    columns: int
    tensors: dict[str, Tensor]

    def take(self, key: str, dtype: torch.dtype, shape: tuple[int | None, ...]) -> Tensor:
        """A tensor of this dtype and shape (None: any size).

        Raises:
            AdapterBroken: missing, of another dtype or shape, or scales that are negative or not finite.
        """
        found = self.tensors.pop(key, None)
        if found is None:
            raise AdapterBroken(f"{self.name} lacks its {key!r}", next_step="fetch the folder again")
        fits = found.dim() == len(shape) and all(
            want is None or size == want for size, want in zip(found.shape, shape, strict=True)
        )
        if found.dtype != dtype or not fits:
            sizes = " x ".join("any" if size is None else str(size) for size in shape)
            raise AdapterBroken(
                f"{key!r} of {self.name} is {found.dtype} of shape {tuple(found.shape)}", allowed=f"{dtype}, {sizes}"
            )
        if dtype.is_floating_point and not bool((torch.isfinite(found) & (found >= 0)).all()):
            raise AdapterBroken(f"{key!r} of {self.name} holds a number that is no scale: negative or not finite")
        return found

    def done(self) -> None:
        """Refuse what was not taken."""
        if self.tensors:
            raise AdapterBroken(f"{self.name} has an unexpected {next(iter(self.tensors))!r}")
