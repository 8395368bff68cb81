"""What a data set is made of, counted exactly: tokens, lengths, repeats, what leaks into held-out rows, the classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from manylora.data.balance import Balance, balance_of
from manylora.data.batches import Epochs
from manylora.data.likeness import Alike, Decode, Leakage, Repeats, keys_of, leakage_of, repeats_of
from manylora.data.store import column_of, lengths_of, num_trained_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from manylora.data.batches import Weights
    from manylora.data.example import Example

MOST_BINS = 16
PERCENTS = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over all examples."""

    num_examples: int
    num_tokens: int
    num_trained: int
    longest: int

    @property
    def mean(self) -> float:
        return self.num_tokens / self.num_examples

    @property
    def share_trained(self) -> float:
        return self.num_trained / self.num_tokens

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"mean": self.mean, "share_trained": self.share_trained}


@dataclass(frozen=True, slots=True)
class Packed:
    """The rows of the first epoch, packed; the shares are of the tokens that are computed, padding among them."""

    row_tokens: int
    num_rows: int
    share_used: float
    share_trained: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Lengths:
    """How many sequences are how long. Bin k counts `edges[k]` < length <= `edges[k + 1]`.

    `percentiles` gives by per cent the least length that holds so many of them; `above` counts those longer than
    `limit`.
    """

    edges: tuple[int, ...]
    counts: tuple[int, ...]
    percentiles: dict[int, int]
    longest: int
    limit: int
    above: int

    @classmethod
    def of(cls, lengths: NDArray[np.int64], limit: int) -> Lengths:
        """The histogram of at least one length, in bins of a round width."""
        ordered = np.sort(lengths)
        ranks = {percent: math.ceil(percent / 100 * len(ordered)) for percent in PERCENTS}
        percentiles = {percent: int(ordered[rank - 1]) for percent, rank in ranks.items()}
        longest = int(ordered[-1])
        edges = _edges(percentiles[99], longest)
        counts = np.diff(np.searchsorted(ordered, edges, side="right"))
        above = len(ordered) - int(np.searchsorted(ordered, limit, side="right"))
        return cls(edges, tuple(counts.tolist()), percentiles, longest, limit, above)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _edges(most: int, longest: int) -> tuple[int, ...]:
    """Ends of bins of one width; those above `most`, where there are many, share the last bin."""
    raw = max(1, math.ceil(most / MOST_BINS))
    power = 10 ** (len(str(raw)) - 1)
    width = next(step * power // 2 for step in (2, 4, 10, 20) if step * power // 2 >= raw)
    count = math.ceil(longest / width)
    if count <= MOST_BINS + MOST_BINS // 4:
        return tuple(range(0, count * width + 1, width))
    return (*range(0, math.ceil(most / width) * width + 1, width), longest)


@dataclass(frozen=True, slots=True)
class Survey:
    """All of it; `held_out` and `leakage` are None where nothing is held out."""

    totals: Totals
    packed: Packed
    lengths: Lengths
    repeats: Repeats
    balance: Balance
    held_out: Totals | None = None
    leakage: Leakage | None = None

    def to_dict(self) -> dict[str, Any]:
        """All counts, as JSON holds them."""
        names = ("totals", "packed", "lengths", "repeats", "balance", "held_out", "leakage")
        parts = {name: getattr(self, name) for name in names}
        return {name: None if part is None else part.to_dict() for name, part in parts.items()}


def survey(
    examples: Sequence[Example],
    *,
    decode: Decode,
    marks: Sequence[str] = (),
    row_tokens: int,
    rows_per_step: int = 4,
    weights: Weights = (),
    held_out: Sequence[Example] = (),
    lengths: NDArray[np.int64] | None = None,
) -> Survey:
    """A survey of at least one example.

    `decode` gives the texts of several lists of tokens, `marks` are the special tokens of the tokenizer. `lengths` are
    those of the histogram, where rows were cut or left out for theirs. `weights`: see `Epochs`.
    """
    alike = Alike(marks)
    keys = keys_of(examples, decode, alike)
    leakage = None
    if len(held_out):
        leakage = leakage_of(examples, keys, held_out, keys_of(held_out, decode, alike))
    balance = balance_of(examples, held_out)
    # What is learned of a labelled text is its class: the text is no prompt that may have several answers.
    has_prompts = bool(num_trained_of(examples).any()) and balance.tags is None and any(column_of(examples, "prompt"))
    return Survey(
        totals=_totals(examples),
        packed=_packed(examples, row_tokens, rows_per_step, weights),
        lengths=Lengths.of(lengths_of(examples) if lengths is None else lengths, row_tokens),
        repeats=repeats_of(examples, keys, has_prompts=has_prompts),
        balance=balance,
        held_out=_totals(held_out) if len(held_out) else None,
        leakage=leakage,
    )


def _totals(examples: Sequence[Example]) -> Totals:
    lengths = lengths_of(examples)
    return Totals(len(lengths), int(lengths.sum()), int(num_trained_of(examples).sum()), int(lengths.max()))


def _packed(examples: Sequence[Example], row_tokens: int, rows_per_step: int, weights: Weights) -> Packed:
    epochs = Epochs(examples, row_tokens=row_tokens, seed=0, packs=True, weights=weights)
    trained, used, computed = epochs.fill(rows_per_step)
    return Packed(row_tokens, epochs.num_rows(0), used / computed, trained / computed)
