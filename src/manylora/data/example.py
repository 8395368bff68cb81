"""One example: the tokens of a sequence, which of them are targets, and what generation is given of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from manylora.types import Batch


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One sequence. `tokens` (n,) int32; `trained` (n,) bool says which tokens are targets (never the first).

    `prompt_length` counts the tokens before the first target: what generation is given. `prompt` and `reference` are
    the same as text. Examples with the same `group` stay on one side of a split. `label` is the class of the whole
    sequence, `tags` the class of each target token where a target is a class; `variant` tells the sequences of one row
    apart ("chosen", "rejected").
    """

    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]
    prompt_length: int
    prompt: str
    reference: str
    group: str
    file: str
    line: int
    label: str | None = None
    tags: tuple[str, ...] | None = None
    variant: str = ""

    def __len__(self) -> int:
        return len(self.tokens)

    @staticmethod
    def batch(
        rows: Sequence[Sequence[Example]],
        base: Any,
        *,
        width: int,
        slots: Sequence[int],
        streams: Sequence[int] | None = None,
    ) -> Batch:
        """Sequences laid out by the base's own packing."""
        from manylora.data.collate import collate

        layout = {"pad_id": base.pad_id, "packing": base.packing, "causal": base.causal}
        return collate(rows, width=width, slots=slots, streams=streams, **layout)

    @property
    def num_trained(self) -> int:
        """How many tokens are targets."""
        return int(self.trained.sum())

    @property
    def where(self) -> str:
        """`file:line` of its row."""
        return f"{self.file}:{self.line}"
