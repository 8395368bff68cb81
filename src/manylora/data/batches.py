"""Which examples share a row in each epoch, and in what order the rows come.

The plan of an epoch is a pure function of (examples, weights, seed, epoch): resuming needs no state of it, and a
neighbour in a fleet cannot change it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

import numpy as np

from manylora.data.packing import pack, row_width
from manylora.data.store import lengths_of, num_trained_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from manylora.data.example import Example

WINDOW = 4096  # examples packed together: enough that rows fill to the brim, few enough that packing takes milliseconds
PLANS_KEPT = 3  # epochs: members of a fleet that share their rows are not all in the same one
BLOCK = 16  # unpacked rows of like length that stay together: a batch of 4, 8 or 16 rows then has little padding

Weights = Sequence[tuple[int, float]]
"""How often an epoch shows the examples, in runs of (how many examples, how often each)."""


class Plan(Sequence[tuple[int, ...]]):
    """Rows of indices of examples, in order. Two arrays: an epoch of a million examples takes 16 MB."""

    def __init__(self, rows: Sequence[Sequence[int]]):
        self._starts = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=self._starts[1:])
        self._items = np.fromiter((index for row in rows for index in row), np.int64, count=int(self._starts[-1]))

    @classmethod
    def joined(cls, plans: Sequence[Plan], order: NDArray[np.int64]) -> Plan:
        """The rows of several plans as one plan, row `order[k]` in place k."""
        sizes = np.concatenate([np.diff(plan._starts) for plan in plans])
        items = np.concatenate([plan._items for plan in plans])
        firsts = np.concatenate([[0], np.cumsum(sizes)])
        made = cls(())
        made._starts = np.concatenate([[0], np.cumsum(sizes[order])])
        # Item j of the new row k is item j of the old row order[k].
        inside = np.arange(made._starts[-1]) - np.repeat(made._starts[:-1], sizes[order])
        made._items = items[np.repeat(firsts[:-1][order], sizes[order]) + inside]
        return made

    @property
    def items(self) -> NDArray[np.int64]:
        """The indices of all rows, one row after the other."""
        return self._items

    @property
    def starts(self) -> NDArray[np.int64]:
        """(rows,) where each row begins in `items`."""
        return self._starts[:-1]

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, place: int) -> tuple[int, ...]: ...
    @overload
    def __getitem__(self, place: slice) -> list[tuple[int, ...]]: ...
    def __getitem__(self, place: int | slice) -> tuple[int, ...] | list[tuple[int, ...]]:
        if isinstance(place, slice):
            return [self[at] for at in range(*place.indices(len(self)))]
        at = range(len(self))[place]
        return tuple(self._items[self._starts[at] : self._starts[at + 1]].tolist())


class Epochs:
    """The rows of each epoch, as indices into `examples`. `packs`: several examples may share a row; else one each.

    `weights` (none: each example once) says how often an epoch shows each run of examples: 2.5 is twice, and half of
    them, drawn anew each epoch, once more.
    """

    def __init__(self, examples: Sequence[Example], *, row_tokens: int, seed: int, packs: bool, weights: Weights = ()):
        self.examples = examples
        self.row_tokens = row_tokens
        self.seed = seed
        self.packs = packs
        self.weights = tuple(weights) or ((len(examples), 1.0),)
        self.lengths = lengths_of(examples)
        self._counts: dict[int, int] = {}
        self._plans: dict[int, Plan] = {}
        if not len(self.lengths) or self.lengths.max() > row_tokens:
            longest = self.lengths.max(initial=0)
            raise ValueError(f"{len(self.lengths)} examples of up to {longest} tokens, rows of {row_tokens}")
        if sum(count for count, _ in self.weights) != len(examples):
            raise ValueError(
                f"weights of {sum(count for count, _ in self.weights)} examples, and {len(examples)} are there"
            )

    def rows(self, epoch: int) -> Plan:
        """The rows of an epoch, in the order of training; without weights, every example once."""
        if epoch not in self._plans:
            draw = np.random.default_rng([self.seed % 2**64, epoch])
            order = self._drawn(draw)
            arrange = self._packed if self.packs else self._blocks
            windows = [arrange(order[start : start + WINDOW]) for start in range(0, len(order), WINDOW)]
            size = 1 if self.packs else BLOCK
            plan = Plan.joined(windows, _shuffled(windows, size, draw))
            self._counts[epoch] = len(plan)
            if len(self._plans) == PLANS_KEPT:
                self._plans.pop(next(iter(self._plans)))
            self._plans[epoch] = plan
        return self._plans[epoch]

    def num_rows(self, epoch: int) -> int:
        """How many rows an epoch has."""
        if self._same_each_epoch:
            if not self.packs:
                return len(self.lengths)
            if len(self.lengths) <= WINDOW:
                epoch = 0  # one window: its rows depend on the lengths, not on their order
        if epoch not in self._counts:
            self.rows(epoch)
        return self._counts[epoch]

    def trained(self, epoch: int) -> NDArray[np.int64]:
        """(rows,) how many targets each row of an epoch holds."""
        plan = self.rows(epoch)
        return np.add.reduceat(num_trained_of(self.examples)[plan.items], plan.starts)

    def total_trained(self, epoch: int) -> int:
        """How many targets an epoch holds."""
        if self._same_each_epoch:
            return int(num_trained_of(self.examples).sum())
        return int(self.trained(epoch).sum())

    def total_rows(self, epochs: float) -> int:
        """How many rows the first `epochs` epochs have; of a part of an epoch, that part, rounded up."""
        whole = math.floor(epochs)
        rest = epochs - whole
        return sum(map(self.num_rows, range(whole))) + (math.ceil(rest * self.num_rows(whole)) if rest else 0)

    def fill(self, rows_per_step: int) -> tuple[int, int, int]:
        """Of the first epoch: targets, tokens, and tokens that are computed when a step holds so many rows."""
        plan = self.rows(0)
        used = np.fromiter((int(self.lengths[list(row)].sum()) for row in plan), dtype=np.int64, count=len(plan))
        steps = [used[start : start + rows_per_step] for start in range(0, len(used), rows_per_step)]
        computed = sum(len(step) * row_width(int(step.max()), self.row_tokens) for step in steps)
        shown = np.fromiter((index for row in plan for index in row), dtype=np.int64)
        return int(num_trained_of(self.examples)[shown].sum()), int(used.sum()), computed

    @property
    def _same_each_epoch(self) -> bool:
        return all(weight == 1.0 for _, weight in self.weights)

    def _drawn(self, draw: np.random.Generator) -> NDArray[np.int64]:
        """The examples of one epoch, in random order."""
        if self._same_each_epoch:
            return draw.permutation(len(self.lengths))
        chosen, start = [], 0
        for count, weight in self.weights:
            run = np.arange(start, start + count)
            again = round((weight - math.floor(weight)) * count)
            chosen += [run] * math.floor(weight) + [draw.permutation(run)[:again]]
            start += count
        return draw.permutation(np.concatenate(chosen))

    def _packed(self, window: NDArray[np.int64]) -> Plan:
        places = window.tolist()
        rows = pack(self.lengths[window].tolist(), self.row_tokens)
        return Plan([[places[place] for place in row] for row in rows])

    def _blocks(self, window: NDArray[np.int64]) -> Plan:
        # The sort is stable, so examples of one length stay in their drawn order.
        return Plan([(index,) for index in window[np.argsort(self.lengths[window], kind="stable")].tolist()])


def _shuffled(windows: Sequence[Plan], size: int, draw: np.random.Generator) -> NDArray[np.int64]:
    """The rows of all windows in random order, but rows of one window in groups of `size` that stay together."""
    starts, first = [], 0
    for window in windows:
        starts += [(first + at, first + min(at + size, len(window))) for at in range(0, len(window), size)]
        first += len(window)
    return np.concatenate([np.arange(*starts[place]) for place in draw.permutation(len(starts))])
