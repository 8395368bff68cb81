"""Tensors as they were at some time: whether what was derived from them still holds."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import ref

from torch import Tensor


class Snapshot:
    """These very tensors and the counts of their changes; it keeps none of them alive.

    A change through a view counts. What writes past torch's own count must call
    `torch.autograd.graph.increment_version`.
    """

    __slots__ = ("_refs", "_versions")

    def __init__(self, tensors: Sequence[Tensor]):
        counted = not any(tensor.is_inference() for tensor in tensors)  # of these changes are not counted
        self._refs = [ref(tensor) for tensor in tensors] if counted else None
        self._versions = [tensor._version for tensor in tensors] if counted else []

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors, unchanged."""
        return (
            self._refs is not None
            and len(self._refs) == len(tensors)
            and all(
                own() is tensor and version == tensor._version
                for own, version, tensor in zip(self._refs, self._versions, tensors, strict=True)
            )
        )
