"""The runs of items that a use names, as blocks of equal groups: one batched product serves a block.

A block's groups lie at even distances (a view), or they are copied together (short runs only), or they are padded to
the longest (runs that are short and ragged). Padding repeats an item of its own run, so that no member meets another's
numbers, and holds zeros where gradients come in. A long run that fits no block is a block of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from manylora.types import Runs, Segment

LONGEST_COPIED = 128
"""Items of a run up to which the calls that are saved outweigh the copies. Measured: see `blocks`."""
LEAST_UNIT = 16
"""Items of a group below which the factors' copies, one for each group, outweigh padding."""
PADDED_RATIO = 1.5
"""The longest over the shortest run of a padded block, at most."""


@dataclass(frozen=True, slots=True)
class Block:
    """Groups of `length` items: group g is items `starts[g]` to `stops[g]`, and `places[g]` of the stack changes it.

    A group that stops before `starts[g] + length` is padded. `apart` is the even distance of the starts; None where
    there is none, or a group is padded. `segments` are those that the groups were made of, in order.
    """

    places: tuple[int, ...]
    starts: tuple[int, ...]
    stops: tuple[int, ...]
    length: int
    apart: int | None
    padded: bool
    segments: tuple[Segment, ...]

    def take(self, flat: Tensor) -> Tensor:
        """(G, length, C) of the items (n, C); a view where the groups lie evenly, else a copy."""
        if self.apart is None:
            items = _items(self.starts, self.stops, self.length, flat.device)
            return flat.index_select(0, items).view(len(self.places), self.length, -1)
        first, width = flat.stride()
        shape = (len(self.places), self.length, flat.shape[1])
        return flat.as_strided(
            shape, (self.apart * first, first, width), flat.storage_offset() + self.starts[0] * first
        )

    def take_gradient(self, flat: Tensor) -> Tensor:
        """What `take` gives, with zeros where a group is padded."""
        taken = self.take(flat)
        if self.padded:
            taken.masked_fill_(_padding(self.starts, self.stops, self.length, flat.device), 0.0)
        return taken

    def add_product(self, flat: Tensor, left: Tensor, right: Tensor, mask: Tensor | None = None) -> None:
        """Add left (G, length, R) @ right (G, R, C), times a mask, to the items (n, C) in place.

        The items may be of another dtype, to which the product is then rounded.
        """
        if self.apart is not None and mask is None and left.dtype == flat.dtype:
            self.take(flat).baddbmm_(left, right)
            return
        product = torch.bmm(left, right)
        if mask is not None:
            product.mul_(mask)
        if self.apart is not None:
            self.take(flat).add_(product)
            return
        items, product = _items(self.starts, self.stops, self.length, flat.device), product.view(-1, flat.shape[1])
        if self.padded:
            real = _padding(self.starts, self.stops, self.length, flat.device).view(-1).logical_not()
            items, product = items[real], product[real]
        flat.index_add_(0, items, product.to(flat.dtype))


@dataclass(frozen=True, slots=True)
class Choice:
    """Places of a stack, in an order: those from `first` on, or those that `index` lists."""

    first: int
    count: int
    index: tuple[int, ...] | None

    @classmethod
    def of(cls, places: Sequence[int]) -> Choice:
        rising = all(place == places[0] + number for number, place in enumerate(places))
        return cls(places[0], len(places), None if rising else tuple(places))

    def of_stack(self, tensor: Tensor) -> Tensor:
        """(count, ...) of a stack (P, ...): itself, a view or a copy."""
        if self.index is not None:
            return tensor.index_select(0, index_of(self.index, tensor.device))
        return tensor if self.count == len(tensor) else tensor.narrow(0, self.first, self.count)


@dataclass(frozen=True, slots=True, eq=False)
class Grouping:
    """The blocks of some runs, the places that they reach, and which of these each block takes."""

    blocks: list[Block]
    used: Choice
    own: list[Choice]


_groupings: WeakKeyDictionary[Runs, Grouping] = WeakKeyDictionary()


def grouping(runs: Runs) -> Grouping:
    """The blocks of runs that hold something, found once for all sites that share them."""
    found = _groupings.get(runs)
    if found is None:
        made = blocks(runs.segments)
        used = sorted({place for block in made for place in block.places})
        where = {place: number for number, place in enumerate(used)}
        own = [Choice.of([where[place] for place in block.places]) for block in made]
        found = _groupings[runs] = Grouping(made, Choice.of(used), own)
    return found


def blocks(segments: Sequence[Segment]) -> list[Block]:
    """Blocks that hold each item of the segments once.

    The rule. Runs of one length at even distances: one block, whatever the length. Otherwise, of the runs that are
    short enough to be copied: where they share a divisor of some size (rows of one width, several of them for some
    members) they are cut to it; else those of about one length are padded together. The rest stand alone.

    A copy pays while a product is no longer than the call that starts it. Sixteen uneven runs of rank 16 in bfloat16,
    forward and backward on one thread, a copied block over a loop: width 576: 0.57 for runs of 64, 0.53 for 128, 0.73
    for 256, 2.4 for 1024; width 1536: 0.66, 1.0, 1.0, 2.1. Padded: 576: 0.55, 0.75, 1.1; 1536: 1.0, 1.2, 1.5.
    """
    segments = [segment for segment in segments if segment.stop > segment.start]
    if not segments:
        return []
    sizes = [segment.stop - segment.start for segment in segments]
    if len(set(sizes)) == 1 and _distance([segment.start for segment in segments], sizes[0]) is not None:
        return [_block(segments)]
    short = [segment for segment, size in zip(segments, sizes, strict=True) if size <= LONGEST_COPIED]
    made = [_block([segment]) for segment, size in zip(segments, sizes, strict=True) if size > LONGEST_COPIED]
    unit = math.gcd(*(segment.stop - segment.start for segment in short))
    if unit >= LEAST_UNIT:
        return [*made, _block(short, unit)]
    together: list[Segment] = []
    for segment in sorted(short, key=lambda one: one.start - one.stop):
        if together and (together[0].stop - together[0].start) > PADDED_RATIO * (segment.stop - segment.start):
            made.append(_block(together))
            together = []
        together.append(segment)
    return [*made, _block(together)] if together else made


def _block(segments: Sequence[Segment], unit: int | None = None) -> Block:
    """One block of some segments, cut to `unit` where it is given, else padded to the longest of them."""
    length = unit or max(segment.stop - segment.start for segment in segments)
    groups = [
        (s.place, start, min(start + length, s.stop)) for s in segments for start in range(s.start, s.stop, length)
    ]
    places, starts, stops = (tuple(column) for column in zip(*groups, strict=True))
    padded = any(stop - start < length for _, start, stop in groups)
    apart = None if padded else _distance(starts, length)
    return Block(places, starts, stops, length, apart, padded, tuple(segments))


def _distance(starts: Sequence[int], alone: int) -> int | None:
    """The even, rising distance of some starts; `alone` for a single one, None where they lie unevenly."""
    if len(starts) == 1:
        return alone
    apart = starts[1] - starts[0]
    even = apart > 0 and all(later - start == apart for start, later in pairwise(starts))
    return apart if even else None


@lru_cache(maxsize=256)
def index_of(places: tuple[int, ...], device: torch.device) -> Tensor:
    """Places as a tensor on a device."""
    return torch.tensor(places, device=device)


@lru_cache(maxsize=64)
def _items(starts: tuple[int, ...], stops: tuple[int, ...], length: int, device: torch.device) -> Tensor:
    """(G * length,) the item at each position of the groups; padding repeats the last of its own group."""
    positions = torch.tensor(starts)[:, None] + torch.arange(length)
    return positions.minimum(torch.tensor(stops)[:, None] - 1).view(-1).to(device)


@lru_cache(maxsize=64)
def _padding(starts: tuple[int, ...], stops: tuple[int, ...], length: int, device: torch.device) -> Tensor:
    """(G, length, 1) true where a group is padded."""
    sizes = torch.tensor(stops) - torch.tensor(starts)
    return (torch.arange(length) >= sizes[:, None])[:, :, None].to(device)
