"""Weights of a model folder that bitsandbytes packed into 4 bits; read one at a time, without bitsandbytes."""

from __future__ import annotations

from dataclasses import dataclass

from manylora.base.tensors import TensorFiles
from manylora.quant.bitsandbytes_names import from_bitsandbytes, packed_weights
from manylora.types import Packed


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """One packed weight: the files, its name in them, and the names of all its tensors, its own first."""

    files: TensorFiles
    name: str
    names: tuple[str, ...]

    def read(self) -> Packed:
        """The packed weight.

        Raises:
            BaseBroken: a tensor is absent, or the state is not what bitsandbytes writes.
        """
        return from_bitsandbytes({name: self.files.read(name) for name in self.names}, self.name)


def stored_weights(files: TensorFiles) -> dict[str, StoredWeight]:
    """The packed weights of a checkpoint, by their names in it."""
    return {name: StoredWeight(files, name, names) for name, names in packed_weights(list(files)).items()}
