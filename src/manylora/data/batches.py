"""From examples to batches: which examples share a row in each epoch, and the tensors of some rows.

The plan of an epoch is a pure function of (examples, seed, epoch): resuming needs no state of it, and a neighbour in a
fleet cannot change it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from manylora.data.packing import pack
from manylora.types import IGNORED, Batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from manylora.data.examples import Example

WINDOW = 4096  # examples packed together: enough that rows fill to the brim, few enough that packing takes milliseconds
BLOCK = 16  # unpacked rows of like length that stay together: a batch of 4, 8 or 16 rows then has little padding
WIDTH_STEP = 8  # widths are multiples of this: fast kernels want it, and fewer widths mean fewer compiled graphs

Plan = list[tuple[int, ...]]


class Epochs:
    """The rows of each epoch, as indices into `examples`. `packs`: several examples may share a row; else one each."""

    def __init__(self, examples: Sequence[Example], *, row_tokens: int, seed: int, packs: bool):
        self.examples = examples
        self.row_tokens = row_tokens
        self.seed = seed
        self.packs = packs
        self._lengths = [len(example) for example in examples]
        self._counts: dict[int, int] = {}
        self._last: tuple[int, Plan] | None = None
        if not self._lengths or max(self._lengths) > row_tokens:
            raise ValueError(
                f"{len(self._lengths)} examples of up to {max(self._lengths, default=0)} tokens, rows of {row_tokens}"
            )

    def rows(self, epoch: int) -> Plan:
        """The rows of an epoch, in the order of training; every example once."""
        if self._last is None or self._last[0] != epoch:
            draw = np.random.default_rng([self.seed % 2**64, epoch])
            order = draw.permutation(len(self._lengths))
            arrange = self._packed if self.packs else self._blocks
            groups: list[Plan] = []
            for start in range(0, len(order), WINDOW):
                groups += arrange(order[start : start + WINDOW].tolist())
            self._last = epoch, [row for place in draw.permutation(len(groups)) for row in groups[place]]
            self._counts[epoch] = len(self._last[1])
        return self._last[1]

    def num_rows(self, epoch: int) -> int:
        """How many rows an epoch has."""
        if not self.packs:
            return len(self._lengths)
        if len(self._lengths) <= WINDOW:
            epoch = 0  # one window: its rows depend on the lengths, not on their order
        if epoch not in self._counts:
            self.rows(epoch)
        return self._counts[epoch]

    def total_rows(self, epochs: float) -> int:
        """How many rows the first `epochs` epochs have; of a part of an epoch, that part, rounded up."""
        whole = math.floor(epochs)
        rest = epochs - whole
        return sum(map(self.num_rows, range(whole))) + (math.ceil(rest * self.num_rows(whole)) if rest else 0)

    def _packed(self, window: list[int]) -> list[Plan]:
        rows = pack([self._lengths[index] for index in window], self.row_tokens)
        return [[tuple(window[place] for place in row)] for row in rows]

    def _blocks(self, window: list[int]) -> list[Plan]:
        # The sort is stable, so examples of one length stay in their drawn order.
        rows: Plan = [(index,) for index in sorted(window, key=lambda index: self._lengths[index])]
        return [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]


def collate(
    examples_per_row: Sequence[Sequence[Example]],
    *,
    width: int,
    pad_id: int,
    packed: bool,
    slots: Sequence[int],
    streams: Sequence[int] | None = None,
) -> Batch:
    """The tensors of some rows, on the CPU; as wide as the longest row, rounded up to a multiple of 8, at most `width`.

    `labels` (rows, tokens) int64 are shifted: what each position must predict, IGNORED at the end of each sequence,
    where the next token is no target, and on padding. Packed: positions restart at each sequence, padding is one more
    run from 0, and there is no attention mask (transformers finds packed sequences by position only without one).
    Padded: one example a row and `attention_mask` (rows, tokens) bool, True on its tokens.

    Raises:
        ValueError: a row longer than `width`; several examples in a padded row; not one slot and stream per row.
    """
    if len(slots) != len(examples_per_row) or (streams is not None and len(streams) != len(slots)):
        raise ValueError(
            f"{len(examples_per_row)} rows, {len(slots)} slots, {'no' if streams is None else len(streams)} streams"
        )
    if not packed and any(len(row) != 1 for row in examples_per_row):
        raise ValueError("a padded row holds one example")
    used = [sum(map(len, row)) for row in examples_per_row]
    if max(used) > width:
        raise ValueError(f"a row of {max(used)} tokens in a batch of width {width}")
    shape = len(used), min(width, -(-max(used) // WIDTH_STEP) * WIDTH_STEP)
    tokens = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    for row, examples in enumerate(examples_per_row):
        start = 0
        for example in examples:
            stop = start + len(example)
            tokens[row, start:stop] = example.tokens
            labels[row, start : stop - 1] = np.where(example.trained[1:], example.tokens[1:], IGNORED)
            positions[row, start:stop] = np.arange(stop - start)
            start = stop
        positions[row, start:] = np.arange(shape[1] - start)
    inputs = {"input_ids": torch.from_numpy(tokens), "position_ids": torch.from_numpy(positions)}
    if not packed:
        inputs["attention_mask"] = torch.arange(shape[1]) < torch.tensor(used)[:, None]
    return Batch(
        inputs=inputs,
        targets={"labels": torch.from_numpy(labels)},
        slots=tuple(slots),
        streams=None if streams is None else tuple(streams),
    )
